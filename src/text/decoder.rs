//! How token ids become bytes: the `decoder` of `tokenizer.json`, compiled once into a table.

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Model;

use super::TextError;
use crate::types::TokenId;

/// Ids of a vocabulary are below this.
const VOCABULARY_MAX: usize = 1 << 22;
/// All token texts together.
const TABLE_BYTES_MAX: usize = 256 << 20;
/// Text that a `Replace` step may put in place of a match.
const REPLACEMENT_BYTES_MAX: usize = 16;
/// Steps of a decoder, nested sequences included.
const STEPS_MAX: usize = 64;

/// What a token adds to the text, before anything that depends on its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// No such token.
    Unknown,
    /// Bytes; whole characters unless the tokenizer is byte-level.
    Bytes(&'a [u8]),
    /// One byte of a character that the vocabulary lacks (`<0xE2>`).
    Fallback(u8),
}

/// What happens to the beginning of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beginning {
    /// Nothing.
    Kept,
    /// Up to `count` leading `content` are dropped (`Strip` after `Fuse`).
    Stripped { content: char, count: usize },
    /// Every space marker in the first token is dropped (`Metaspace`).
    Unmarked { marker: char },
}

/// How pieces join into text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Joining {
    /// Bytes of all tokens form one stream of UTF-8.
    pub(super) byte_level: bool,
    /// What happens to the beginning.
    pub(super) beginning: Beginning,
    /// Put between tokens, where there is no decoder at all.
    pub(super) separator: &'static str,
}

/// The table of all tokens.
pub(super) struct Decoder {
    joining: Joining,
    kinds: Vec<Kind>,
    /// End of each token's bytes in `bytes`; the start is the end of the one before.
    ends: Vec<u32>,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Unknown,
    Words,
    Special,
}

impl Decoder {
    /// Compiles the decoder of `tokenizer_json`, which `library` was made from.
    pub(super) fn new(
        tokenizer_json: &[u8],
        library: &tokenizers::Tokenizer,
    ) -> Result<Self, TextError> {
        let plan = Plan::read(tokenizer_json)?;
        let ids = library.get_vocab(true).into_values();
        let size = ids.max().map_or(0, |id| id as usize + 1);
        if size > VOCABULARY_MAX {
            return Err(reason(format!(
                "expected ids below {VOCABULARY_MAX}, found {}",
                size - 1
            )));
        }
        let added = library.get_added_vocabulary();
        let mut table = Self {
            joining: plan.joining.clone(),
            kinds: Vec::with_capacity(size),
            ends: Vec::with_capacity(size),
            bytes: Vec::new(),
        };
        for id in 0..size as u32 {
            let text = added
                .simple_id_to_token(id)
                .or_else(|| library.get_model().id_to_token(id));
            table.kinds.push(match &text {
                None => Kind::Unknown,
                Some(text) if added.is_special_token(text) => Kind::Special,
                Some(_)
                    if added
                        .get_added_tokens_decoder()
                        .get(&id)
                        .is_some_and(|token| token.special) =>
                {
                    Kind::Special
                }
                Some(_) => Kind::Words,
            });
            plan.append(&text.unwrap_or_default(), &mut table.bytes);
            if table.bytes.len() > TABLE_BYTES_MAX {
                return Err(reason(format!(
                    "expected at most {TABLE_BYTES_MAX} bytes of token texts, found more"
                )));
            }
            table.ends.push(table.bytes.len() as u32);
        }
        if plan.byte_fallback {
            table.mark_fallback();
        }
        Ok(table)
    }

    /// Ids are below this.
    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// How pieces join.
    pub(super) fn joining(&self) -> &Joining {
        &self.joining
    }

    /// What `id` adds.
    pub(super) fn piece(&self, id: TokenId) -> Piece<'_> {
        let Some(kind) = self.kinds.get(id.index()) else {
            return Piece::Unknown;
        };
        let bytes = self.slice(id.index());
        match (kind, bytes) {
            (Kind::Unknown, _) => Piece::Unknown,
            (_, [FALLBACK, byte]) if !self.joining.byte_level => Piece::Fallback(*byte),
            _ => Piece::Bytes(bytes),
        }
    }

    /// Whether `id` is a special token.
    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.kinds.get(id.index()) == Some(&Kind::Special)
    }

    fn slice(&self, index: usize) -> &[u8] {
        let end = self.ends.get(index).copied().unwrap_or_default() as usize;
        let before = index
            .checked_sub(1)
            .and_then(|index| self.ends.get(index).copied());
        let start = before.unwrap_or_default() as usize;
        self.bytes.get(start..end).unwrap_or_default()
    }

    /// Rewrites `<0xE2>` as [`FALLBACK`] and the byte.
    fn mark_fallback(&mut self) {
        let mut bytes = Vec::with_capacity(self.bytes.len());
        let mut ends = Vec::with_capacity(self.ends.len());
        for index in 0..self.ends.len() {
            let text = self.slice(index);
            match fallback_byte(text) {
                Some(byte) => bytes.extend([FALLBACK, byte]),
                None => bytes.extend_from_slice(text),
            }
            ends.push(bytes.len() as u32);
        }
        (self.bytes, self.ends) = (bytes, ends);
    }
}

/// Never occurs in UTF-8, so no token's text begins with it.
const FALLBACK: u8 = 0xff;

/// `<0xE2>` -> 0xE2, as the library reads it.
fn fallback_byte(text: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(text).ok()?;
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// The steps of a decoder.
struct Plan {
    joining: Joining,
    byte_fallback: bool,
    replacements: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    decoder: Option<Value>,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Step {
    ByteLevel,
    ByteFallback,
    Fuse,
    Replace {
        pattern: Pattern,
        content: String,
    },
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    Metaspace {
        replacement: char,
        #[serde(default)]
        prepend_scheme: Option<String>,
        #[serde(default)]
        add_prefix_space: Option<bool>,
    },
    Sequence {
        decoders: Vec<Step>,
    },
}

#[derive(Deserialize)]
enum Pattern {
    String(String),
    Regex(#[expect(dead_code, reason = "only refused")] String),
}

impl Plan {
    fn read(tokenizer_json: &[u8]) -> Result<Self, TextError> {
        let head: Head =
            serde_json::from_slice(tokenizer_json).map_err(|error| reason(error.to_string()))?;
        let mut plan = Self {
            joining: Joining {
                byte_level: false,
                beginning: Beginning::Kept,
                separator: "",
            },
            byte_fallback: false,
            replacements: Vec::new(),
        };
        let Some(decoder) = head.decoder else {
            plan.joining.separator = " ";
            return Ok(plan);
        };
        let step: Step = serde_json::from_value(decoder).map_err(|error| {
            reason(format!(
                "decoder: expected ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace or a Sequence of these, found {error}"
            ))
        })?;
        let mut steps = Vec::new();
        flatten(step, &mut steps);
        if steps.len() > STEPS_MAX {
            return Err(reason(format!(
                "decoder: expected at most {STEPS_MAX} steps, found {}",
                steps.len()
            )));
        }
        let mut fused = false;
        for step in steps {
            plan.add(step, &mut fused)?;
        }
        Ok(plan)
    }

    /// Adds one step. `fused`: all later steps see one text.
    fn add(&mut self, step: Step, fused: &mut bool) -> Result<(), TextError> {
        let per_token = !*fused && !self.byte_fallback && !self.joining.byte_level;
        match step {
            Step::Fuse => *fused = true,
            Step::ByteLevel if per_token && self.replacements.is_empty() => {
                self.joining.byte_level = true;
            }
            Step::ByteFallback if per_token => self.byte_fallback = true,
            Step::Replace {
                pattern: Pattern::String(pattern),
                content,
            } if per_token && !pattern.is_empty() && content.len() <= REPLACEMENT_BYTES_MAX => {
                self.replacements.push((pattern, content));
            }
            Step::Metaspace {
                replacement,
                prepend_scheme,
                add_prefix_space,
            } if per_token => {
                let kept =
                    prepend_scheme.as_deref() == Some("never") || add_prefix_space == Some(false);
                if !kept {
                    self.joining.beginning = Beginning::Unmarked {
                        marker: replacement,
                    };
                }
                self.replacements
                    .push((replacement.to_string(), " ".to_owned()));
            }
            Step::Strip {
                content,
                start: count,
                stop: 0,
            } if *fused && self.joining.beginning == Beginning::Kept => {
                self.joining.beginning = Beginning::Stripped { content, count };
            }
            _ => {
                return Err(reason(
                    "decoder: expected steps in the order Replace or Metaspace, ByteFallback, Fuse, Strip of the beginning; or ByteLevel alone; found another".to_owned(),
                ));
            }
        }
        Ok(())
    }

    fn append(&self, text: &str, bytes: &mut Vec<u8>) {
        if self.joining.byte_level {
            let before = bytes.len();
            for character in text.chars() {
                match byte_of(character) {
                    Some(byte) => bytes.push(byte),
                    None => {
                        // As the library: one foreign character makes the whole token literal text.
                        bytes.truncate(before);
                        bytes.extend_from_slice(text.as_bytes());
                        return;
                    }
                }
            }
        } else if self.replacements.is_empty() {
            bytes.extend_from_slice(text.as_bytes());
        } else {
            let replaced = self
                .replacements
                .iter()
                .fold(text.to_owned(), |text, (pattern, content)| {
                    text.replace(pattern, content)
                });
            bytes.extend_from_slice(replaced.as_bytes());
        }
    }
}

fn flatten(step: Step, steps: &mut Vec<Step>) {
    match step {
        Step::Sequence { decoders } => decoders.into_iter().for_each(|step| flatten(step, steps)),
        step => steps.push(step),
    }
}

/// The byte that a byte-level vocabulary writes as `character`: printable Latin-1 stands for itself, the others are moved up to
/// 256 and beyond, in order (GPT-2's `bytes_to_unicode`).
fn byte_of(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

fn reason(reason: String) -> TextError {
    TextError::Tokenizer { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_of_is_a_bijection_of_all_bytes() {
        let mut seen = [0; 256];
        for character in (0..=0x143).filter_map(char::from_u32) {
            if let Some(byte) = byte_of(character) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        let library = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert!(
            library
                .into_iter()
                .all(|character| byte_of(character).is_some())
        );
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn fallback_byte_reads_two_hex_digits_only() {
        for (text, want) in [
            ("<0xE2>", Some(0xe2)),
            ("<0x0a>", Some(0x0a)),
            ("<0xE>", None),
            ("<0xE2A>", None),
            ("<0xZZ>", None),
            ("0xE2", None),
        ] {
            assert_eq!(fallback_byte(text.as_bytes()), want, "{text}");
        }
    }
}
