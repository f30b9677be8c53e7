//! Log-probabilities as the wire tells them, in both of its styles.

use std::collections::BTreeMap;

use crate::engine::{GeneratedToken, TokenLogprobs};
use crate::openai::{ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob};
use crate::text::Tokenizer;
use crate::types::TokenId;

/// JSON has no infinity; OpenAI's own stand-in.
const LOGPROB_MIN: f32 = -9999.0;

/// Not below [`LOGPROB_MIN`], and a number.
fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

/// In the style of chats.
pub fn chat(tokenizer: &Tokenizer, tokens: &[GeneratedToken]) -> ChatLogprobs {
    let content = tokens.iter().filter_map(|token| {
        let logprobs = token.logprobs.as_ref()?;
        let top = |(id, logprob): &(TokenId, f32)| TopLogprob {
            token: tokenizer.token_text(*id),
            logprob: finite(*logprob),
            bytes: Some(tokenizer.token_bytes(*id)),
        };
        Some(TokenLogprob {
            token: tokenizer.token_text(token.id),
            logprob: finite(logprobs.logprob),
            bytes: Some(tokenizer.token_bytes(token.id)),
            top_logprobs: logprobs.top.iter().map(top).collect(),
        })
    });
    ChatLogprobs {
        content: Some(content.collect()),
        refusal: None,
    }
}

/// In the style of texts, token by token of one choice.
#[derive(Clone, Debug, Default)]
pub struct TextLogprobsWriter {
    /// Characters of the choice's text before the next token.
    offset: usize,
}

impl TextLogprobsWriter {
    /// Text that comes without tokens.
    pub fn skip(&mut self, text: &str) {
        self.offset += text.chars().count();
    }

    /// The tokens of a prompt that is echoed: the first has no log-probability.
    pub fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        ids: &[TokenId],
        logprobs: &[Option<TokenLogprobs>],
        skip_special_tokens: bool,
    ) -> TextLogprobs {
        let mut told = TextLogprobs::default();
        for (at, id) in ids.iter().enumerate() {
            let logprobs = logprobs.get(at).and_then(Option::as_ref);
            self.push(&mut told, tokenizer, *id, logprobs, skip_special_tokens);
        }
        told
    }

    /// Tokens of the answer.
    pub fn answer(
        &mut self,
        tokenizer: &Tokenizer,
        tokens: &[GeneratedToken],
        skip_special_tokens: bool,
    ) -> TextLogprobs {
        let mut told = TextLogprobs::default();
        for token in tokens {
            let logprobs = token.logprobs.as_ref();
            self.push(
                &mut told,
                tokenizer,
                token.id,
                logprobs,
                skip_special_tokens,
            );
        }
        told
    }

    fn push(
        &mut self,
        told: &mut TextLogprobs,
        tokenizer: &Tokenizer,
        id: TokenId,
        logprobs: Option<&TokenLogprobs>,
        skip_special_tokens: bool,
    ) {
        let token = tokenizer.token_text(id);
        told.text_offset.push(self.offset);
        if !(skip_special_tokens && tokenizer.is_special(id)) {
            self.offset += characters_begun(&tokenizer.token_bytes(id));
        }
        told.token_logprobs
            .push(logprobs.map(|of| finite(of.logprob)));
        told.top_logprobs.push(logprobs.map(|of| {
            let mut top = BTreeMap::new();
            for (other, logprob) in &of.top {
                // Parts of characters look alike; the most likely comes first and stays.
                top.entry(tokenizer.token_text(*other))
                    .or_insert(finite(*logprob));
            }
            top.entry(token.clone()).or_insert(finite(of.logprob));
            top
        }));
        told.tokens.push(token);
    }
}

/// Characters whose first byte is among `bytes`: summed over tokens it counts every character once, however tokens cut them.
fn characters_begun(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| (**byte & 0xC0) != 0x80).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finite_has_no_infinity_and_no_nan() {
        assert_eq!(finite(f32::NEG_INFINITY), LOGPROB_MIN);
        assert_eq!(finite(f32::NAN), LOGPROB_MIN);
        assert_eq!(finite(-0.5), -0.5);
    }

    #[test]
    fn characters_are_counted_once_however_tokens_cut_them() {
        let text = "aé€😀";
        for cut in 0..=text.len() {
            let (left, right) = text.as_bytes().split_at(cut);
            assert_eq!(characters_begun(left) + characters_begun(right), 4);
        }
    }
}
