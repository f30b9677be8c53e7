//! A generated answer as text: detokenised, and cut at stop strings.

use std::collections::VecDeque;

use super::detokenize::{Detokenizer, Start};
use super::stop::{StopMatch, StopStrings};
use super::tokenizer::Tokenizer;
use crate::types::TokenId;

/// How an answer becomes text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextStreamOptions {
    /// What the answer comes after.
    pub start: Start,
    /// Special tokens add no text.
    pub skip_special_tokens: bool,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// The stop string itself is part of the answer.
    pub include_stop_str_in_output: bool,
}

impl Default for TextStreamOptions {
    fn default() -> Self {
        Self {
            start: Start::Continuation,
            skip_special_tokens: true,
            stop: Vec::new(),
            include_stop_str_in_output: false,
        }
    }
}

/// More of the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextPiece {
    /// Whole characters that nothing will change or cut; often empty.
    pub text: String,
    /// Tokens, after those of the pieces before, whose text is now out: over a whole stream, as many as were pushed.
    pub tokens: usize,
    /// The stop string that ends the answer here.
    pub stop: Option<StopMatch>,
}

/// Turns an answer's ids into pieces of text. Invariant: a piece is final, and says which tokens it completes.
#[derive(Clone, Debug)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// Of each token not yet covered, in order: where its text ends, in bytes of the answer.
    ends: VecDeque<usize>,
    /// Tokens after those, whose text ends within a character that is not complete.
    open: usize,
    decoded: usize,
    shown: usize,
    stopped: bool,
}

impl TextStream {
    /// Nothing pushed yet.
    pub fn new(tokenizer: &Tokenizer, options: &TextStreamOptions) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer, options.start, options.skip_special_tokens),
            stops: StopStrings::new(&options.stop, options.include_stop_str_in_output),
            ends: VecDeque::new(),
            open: 0,
            decoded: 0,
            shown: 0,
            stopped: false,
        }
    }

    /// The next token. After a piece with `stop`, tokens add nothing.
    pub fn push(&mut self, id: TokenId) -> TextPiece {
        if self.stopped {
            return TextPiece::default();
        }
        let text = self.detokenizer.push(id);
        self.open += 1;
        self.decoded += text.len();
        // Text means that the character which was open is complete; then only the last token can end within the next one.
        let still_open = match (self.detokenizer.is_pending(), text.is_empty()) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => self.open,
        };
        self.close(self.open - still_open);
        self.advance(&text)
    }

    /// The next token, where it shall add no text: an end of sequence or a stop token.
    pub fn push_silent(&mut self) -> TextPiece {
        if self.stopped {
            return TextPiece::default();
        }
        self.open += 1;
        if !self.detokenizer.is_pending() {
            self.close(self.open);
        }
        self.advance("")
    }

    /// What was held back. Its `stop` is set when the last broken bytes complete a stop string.
    pub fn finish(mut self) -> TextPiece {
        if self.stopped {
            return TextPiece::default();
        }
        let rest = self.detokenizer.clone().finish();
        self.decoded += rest.len();
        self.close(self.open);
        let mut piece = self.advance(&rest);
        if piece.stop.is_none() {
            piece.text.push_str(&self.stops.finish());
            piece.tokens += self.ends.len();
        }
        piece
    }

    /// The first `count` open tokens end where the decoded text does.
    fn close(&mut self, count: usize) {
        self.open -= count;
        self.ends.extend(std::iter::repeat_n(self.decoded, count));
    }

    fn advance(&mut self, text: &str) -> TextPiece {
        let (text, stop) = self.stops.push(text);
        self.shown += text.len();
        let tokens = if stop.is_some() {
            self.stopped = true;
            let rest = self.ends.len() + self.open;
            self.ends.clear();
            rest
        } else {
            let covered = self.ends.partition_point(|end| *end <= self.shown);
            self.ends.drain(..covered).count()
        };
        TextPiece { text, tokens, stop }
    }
}
