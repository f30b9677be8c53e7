//! A new tokenizer: byte-level BPE, learned from a text.

use std::collections::HashSet;

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, TokenizerImpl};

use super::TextError;

/// What a new tokenizer should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BytePairs<'a> {
    /// Ids, special tokens and the 256 bytes included. Fewer are made where the text has no more pairs.
    pub vocab_size: usize,
    /// The first ids, in this order. Never split, and skipped in decoding.
    pub special_tokens: &'a [&'a str],
    /// The special token in front of every text that is no chat.
    pub bos_token: &'a str,
}

/// Pairs seen less often make no token.
const FREQUENCY_MIN: u64 = 2;
/// All bytes are tokens: any text can be encoded.
const BYTES: usize = 256;

impl BytePairs<'_> {
    /// Learns from `texts` and returns the `tokenizer.json`. The same texts give the same bytes.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] where `vocab_size` has no room for special tokens and bytes, or `bos_token` is no special token.
    pub fn train(&self, texts: impl Iterator<Item = String> + Send) -> Result<Vec<u8>, TextError> {
        let least = self.special_tokens.len() + BYTES;
        if self.vocab_size < least {
            let found = self.vocab_size;
            return Err(malformed(format!(
                "expected a vocabulary of {least} ids or more, found {found}"
            )));
        }
        let special = |text: &&str| AddedToken::from(*text, true);
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .min_frequency(FREQUENCY_MIN)
            .vocab_size(self.vocab_size)
            .special_tokens(self.special_tokens.iter().map(special).collect())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<char>>())
            .build();
        let mut tokenizer: TokenizerImpl<
            BPE,
            NoNormalizer,
            ByteLevel,
            TemplateProcessing,
            ByteLevel,
        > = TokenizerImpl::new(BPE::default());
        let byte_level = ByteLevel::new(false, true, true);
        tokenizer
            .with_pre_tokenizer(Some(byte_level))
            .with_decoder(Some(byte_level))
            .with_post_processor(Some(self.post_processor()?));
        tokenizer.train(&mut trainer, texts).map_err(malformed)?;
        tokenizer
            .to_string(false)
            .map(String::into_bytes)
            .map_err(malformed)
    }

    /// Start of sequence, then the text.
    fn post_processor(&self) -> Result<TemplateProcessing, TextError> {
        let bos = self.bos_token;
        let at = self.special_tokens.iter().position(|token| *token == bos);
        let id = at.and_then(|at| u32::try_from(at).ok()).ok_or_else(|| {
            let special = self.special_tokens;
            malformed(format!(
                "expected `{bos}` among the special tokens, found {special:?}"
            ))
        })?;
        TemplateProcessing::builder()
            .try_single(format!("{bos} $A"))
            .map_err(malformed)?
            .special_tokens(vec![(bos, id)])
            .build()
            .map_err(malformed)
    }
}

type NoNormalizer = tokenizers::normalizers::NormalizerWrapper;

fn malformed(reason: impl ToString) -> TextError {
    TextError::Tokenizer {
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::Tokenizer;
    use super::*;
    use crate::types::TokenId;

    const SPECIAL: [&str; 3] = ["<pad>", "<s>", "</s>"];

    fn trained(vocab_size: usize) -> Result<Vec<u8>, TextError> {
        let pairs = BytePairs {
            vocab_size,
            special_tokens: &SPECIAL,
            bos_token: "<s>",
        };
        let texts = [
            "How do I kill a Python process?",
            "How do I open a door?",
            "I open the process.",
        ];
        pairs.train(texts.iter().cycle().take(30).map(|text| (*text).to_owned()))
    }

    #[test]
    fn a_new_tokenizer_knows_frequent_words_and_any_byte_and_is_the_same_each_time() {
        let json = trained(320).unwrap();
        assert_eq!(json, trained(320).unwrap());
        let tokenizer = Tokenizer::new(&json).unwrap();
        assert!(
            (280..=320).contains(&tokenizer.vocab_size()),
            "{}",
            tokenizer.vocab_size()
        );
        assert_eq!(tokenizer.id_of("</s>"), Some(TokenId(2)));
        let ids = tokenizer.encode("How do I open", true).unwrap();
        assert_eq!((ids.first(), ids.len()), (Some(&TokenId(1)), 5));
        for text in ["How do I kill", "Ünïcode \u{1F980}\n", "</s>"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false), text);
            assert!(!ids.contains(&TokenId(2)));
        }
    }

    #[test]
    fn what_cannot_be_says_what_was_expected() {
        let error = trained(258).unwrap_err().to_string();
        assert!(error.contains("259") && error.contains("258"), "{error}");
        let pairs = BytePairs {
            vocab_size: 300,
            special_tokens: &SPECIAL,
            bos_token: "<bos>",
        };
        let error = pairs.train(std::iter::empty()).unwrap_err().to_string();
        assert!(error.contains("<bos>"), "{error}");
    }
}
