//! Text to ids and back, by a model's `tokenizer.json`.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokenizers::{Model, OffsetType, PreTokenizer};

use super::TextError;
use super::decoder::{Decoder, Piece};
use super::detokenize::{Detokenizer, Start};
use super::special::{Segment, SpecialTokens};
use crate::types::TokenId;

/// `tokenizer.json` of the largest vocabularies is a tenth of this.
const TOKENIZER_JSON_BYTES_MAX: usize = 256 << 20;
/// Text of one encoding. A token is rarely above 8 bytes: this is far beyond any context.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// A model's tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    /// With `encode_special_tokens`: special tokens are never found in text.
    library: tokenizers::Tokenizer,
    decoder: Decoder,
    special: SpecialTokens,
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] says what is wrong with it, or which part of it we do not know.
    pub fn new(tokenizer_json: &[u8]) -> Result<Self, TextError> {
        if tokenizer_json.len() > TOKENIZER_JSON_BYTES_MAX {
            return Err(TextError::TooLong {
                what: "tokenizer.json",
                limit: TOKENIZER_JSON_BYTES_MAX,
                found: tokenizer_json.len(),
            });
        }
        // The library panics on JSON that ends early, so look at the syntax first.
        serde_json::from_slice::<serde::de::IgnoredAny>(tokenizer_json).map_err(malformed)?;
        // Its deserialisers hold more `expect`s than can be checked for here, and the file is not ours.
        catch_unwind(AssertUnwindSafe(|| Self::build(tokenizer_json)))
            .unwrap_or_else(|_| Err(malformed("its parts contradict each other")))
    }

    fn build(tokenizer_json: &[u8]) -> Result<Self, TextError> {
        let mut library = tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(malformed)?;
        library.with_truncation(None).map_err(malformed)?;
        library.with_padding(None);
        library.set_encode_special_tokens(true);
        let decoder = Decoder::new(tokenizer_json, &library)?;
        let special = SpecialTokens::new(&library)?;
        Ok(Self(Arc::new(Inner {
            library,
            decoder,
            special,
        })))
    }

    /// The ids of `text`. The user's words stay words: the text of a special token is spelt out, not turned into it.
    /// `bos`: with what the tokenizer puts around every text, a start of sequence for most.
    ///
    /// # Errors
    /// [`TextError::TooLong`], [`TextError::Encode`].
    pub fn encode(&self, text: &str, bos: bool) -> Result<Vec<TokenId>, TextError> {
        check_length(text.len())?;
        let encoding = self.0.library.encode_fast(text, bos).map_err(encode)?;
        Ok(encoding.get_ids().iter().map(|id| TokenId(*id)).collect())
    }

    /// The ids of `text`, special tokens in it included: for text that is ours or the model's, never for a client's.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_trusted(&self, text: &str, bos: bool) -> Result<Vec<TokenId>, TextError> {
        check_length(text.len())?;
        self.encode_segments(&self.0.special.split(text), bos)
    }

    /// The ids of a text whose special tokens are known: as the library would encode it, if it knew too.
    pub(super) fn encode_segments(
        &self,
        segments: &[Segment<'_>],
        bos: bool,
    ) -> Result<Vec<TokenId>, TextError> {
        let library = &self.0.library;
        let (text, names) = self.0.special.name(segments, library)?;
        check_length(text.len())?;
        let names = names.get();
        let mut parts = names.extract(&text, library.get_normalizer());
        if let Some(pre_tokenizer) = library.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut parts).map_err(encode)?;
        }
        library
            .get_model()
            .tokenize_in_pretokenized(&mut parts, None)
            .map_err(encode)?;
        let encoding = parts
            .into_encoding(None, 0, OffsetType::None)
            .map_err(encode)?;
        let encoding = library.post_process(encoding, None, bos).map_err(encode)?;
        Ok(encoding
            .get_ids()
            .iter()
            .map(|id| names.token(*id))
            .collect())
    }

    /// The text of `ids`. Ids outside the vocabulary add nothing; bytes that are no character become U+FFFD.
    pub fn decode(&self, ids: &[TokenId], skip_special_tokens: bool) -> String {
        let mut detokenizer = Detokenizer::new(self, Start::Text, skip_special_tokens);
        let mut text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    /// The raw bytes that `id` stands for, which may be part of a character; empty for ids outside the vocabulary.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        match self.piece(id) {
            Piece::Unknown => Vec::new(),
            Piece::Bytes(bytes) => bytes.to_vec(),
            Piece::Fallback(byte) => vec![byte],
        }
    }

    /// [`Tokenizer::token_bytes`] as text, U+FFFD where they are part of a character.
    pub fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// Every id is below this.
    pub fn vocab_size(&self) -> usize {
        self.0.decoder.len()
    }

    /// Whether `id` is a special token, which decoding may skip.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.0.decoder.is_special(id)
    }

    /// The id of the token that `tokenizer.json` writes as `token`.
    pub fn id_of(&self, token: &str) -> Option<TokenId> {
        self.0.library.token_to_id(token).map(TokenId)
    }

    pub(super) fn piece(&self, id: TokenId) -> Piece<'_> {
        self.0.decoder.piece(id)
    }

    pub(super) fn decoder(&self) -> &Decoder {
        &self.0.decoder
    }

    /// The token as `tokenizer.json` writes it.
    pub(super) fn written(&self, id: TokenId) -> Option<String> {
        let added = self.0.library.get_added_vocabulary();
        added
            .simple_id_to_token(id.0)
            .or_else(|| self.0.library.get_model().id_to_token(id.0))
    }

    pub(super) fn special(&self) -> &SpecialTokens {
        &self.0.special
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

fn check_length(found: usize) -> Result<(), TextError> {
    if found > TEXT_BYTES_MAX {
        return Err(TextError::TooLong {
            what: "the text",
            limit: TEXT_BYTES_MAX,
            found,
        });
    }
    Ok(())
}

fn malformed(reason: impl ToString) -> TextError {
    TextError::Tokenizer {
        reason: reason.to_string(),
    }
}

fn encode(reason: tokenizers::Error) -> TextError {
    TextError::Encode {
        reason: reason.to_string(),
    }
}
