//! Ids to text as they come.

use super::Tokenizer;
use super::decoder::{Beginning, Piece};
use crate::types::TokenId;

/// What the generated text comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing: tokenizers that put a space in front of a text drop it again.
    Text,
    /// A prompt: the first token's space is a space.
    Continuation,
}

/// Turns ids into text one at a time. Invariant: what was returned never changes, and ends with a whole character.
///
/// All that [`Detokenizer::push`] and [`Detokenizer::finish`] return, joined, is the tokenizer's decoding of all ids.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    /// Whether a token has been kept.
    begun: bool,
    /// What may still be dropped from the beginning of the text.
    strip: usize,
    /// Byte-level: the beginning of a character. Byte fallback: the run of byte tokens so far, of which nothing is certain
    /// until it ends, since one bad byte spoils all of it.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Nothing pushed yet.
    pub fn new(tokenizer: &Tokenizer, start: Start, skip_special_tokens: bool) -> Self {
        let strip = match (start, tokenizer.decoder().joining().beginning) {
            (Start::Text, Beginning::Stripped { count, .. }) => count,
            _ => 0,
        };
        Self {
            tokenizer: tokenizer.clone(),
            skip_special_tokens,
            begun: start == Start::Continuation,
            strip,
            pending: Vec::new(),
        }
    }

    /// The text that is certain now and was not before.
    pub fn push(&mut self, id: TokenId) -> String {
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return String::new();
        }
        let tokenizer = self.tokenizer.clone();
        let first = !std::mem::replace(&mut self.begun, true);
        let separator = if first {
            ""
        } else {
            tokenizer.decoder().joining().separator
        };
        match tokenizer.piece(id) {
            Piece::Unknown => {
                self.begun = !first;
                String::new()
            }
            Piece::Fallback(byte) => {
                self.pending.push(byte);
                String::new()
            }
            Piece::Bytes(bytes) if tokenizer.decoder().joining().byte_level => {
                self.pending.extend_from_slice(bytes);
                self.take_characters()
            }
            Piece::Bytes(bytes) => {
                let mut text = self.take_run();
                text.push_str(separator);
                match tokenizer.decoder().joining().beginning {
                    Beginning::Unmarked { marker } if first => {
                        let written = tokenizer.written(id).unwrap_or_default();
                        text.extend(written.chars().filter(|character| *character != marker));
                    }
                    _ => text.push_str(&String::from_utf8_lossy(bytes)),
                }
                self.strip(text)
            }
        }
    }

    /// The text of the bytes that are left; nothing can be pushed after.
    pub fn finish(mut self) -> String {
        if self.tokenizer.decoder().joining().byte_level {
            return String::from_utf8_lossy(&self.pending).into_owned();
        }
        let text = self.take_run();
        self.strip(text)
    }

    /// Whether bytes are held back.
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// All of `pending` but a beginning of a character, as `String::from_utf8_lossy` has it.
    fn take_characters(&mut self) -> String {
        let mut text = String::new();
        let mut kept = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let last = chunks.peek().is_none();
            if last && is_beginning(chunk.invalid()) {
                kept = chunk.invalid().len();
            } else if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - kept);
        text
    }

    /// The run of byte tokens that has ended: characters, or one U+FFFD a byte when any is bad (as the library has it).
    fn take_run(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.pending)).unwrap_or_else(|error| {
            let bytes = error.as_bytes().len();
            String::from(char::REPLACEMENT_CHARACTER).repeat(bytes)
        })
    }

    fn strip(&mut self, mut text: String) -> String {
        let Beginning::Stripped { content, .. } = self.tokenizer.decoder().joining().beginning
        else {
            return text;
        };
        while self.strip > 0 && !text.is_empty() {
            if text.starts_with(content) {
                text.drain(..content.len_utf8());
                self.strip -= 1;
            } else {
                self.strip = 0;
            }
        }
        text
    }
}

/// Whether more bytes could make `bytes` a character.
fn is_beginning(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
