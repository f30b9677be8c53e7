//! `tokenizer.ggml.*` as the `tokenizer.json` that it was made from.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};
use serde_json::{Value as Json, json};

use super::super::{CheckpointError, TextParts};
use super::pre_tokenizer;
use super::reader::{Header, Value};

/// Bytes of a token.
const TOKEN_BYTES_MAX: usize = 1 << 12;
/// SentencePiece writes a space as this.
const SPACE_MARK: &str = "\u{2581}";

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const PRE: &str = "tokenizer.ggml.pre";

/// What the tokenizer and the chat template are made from.
pub(super) fn read(header: &Header<'_>, vocab_size: usize) -> Result<TextParts, CheckpointError> {
    let vocabulary = Vocabulary::read(header, vocab_size)?;
    let json = match header.text(MODEL)? {
        "gpt2" => byte_level(header, &vocabulary)?,
        "llama" => sentence_piece(header, &vocabulary)?,
        other => {
            return Err(header.value_error(
                MODEL,
                "`gpt2` or `llama`".to_owned(),
                format!("`{other}`"),
            ));
        }
    };
    let tokenizer_json = serde_json::to_vec(&json).map_err(|error| CheckpointError::Malformed {
        file: header.file().to_path_buf(),
        reason: format!("the tokenizer cannot be written as JSON: {error}"),
    })?;
    let token = |name: &str| vocabulary.special(header, name);
    let text = |id: Option<u32>| id.and_then(|id| vocabulary.text(id).map(str::to_owned));
    let mut special_tokens = Vec::new();
    for (ggml, name) in [("unknown", "unk_token"), ("padding", "pad_token")] {
        special_tokens.extend(text(token(ggml)?).map(|text| (name.to_owned(), text)));
    }
    Ok(TextParts {
        tokenizer_json,
        chat_template: header
            .optional_text("tokenizer.chat_template")?
            .map(str::to_owned),
        bos_token: text(token("bos")?),
        eos_token: text(token("eos")?),
        special_tokens,
    })
}

/// What a token is for (llama.cpp's numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenType {
    fn of(code: i64) -> Option<Self> {
        Some(match code {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// The tokens. Invariant: no text comes twice, so ids and texts are one to one.
struct Vocabulary<'a> {
    texts: Vec<Cow<'a, str>>,
    types: Vec<TokenType>,
}

impl<'a> Vocabulary<'a> {
    fn read(header: &Header<'a>, vocab_size: usize) -> Result<Self, CheckpointError> {
        let expected = "an array of strings";
        let tokens = header
            .optional_array(TOKENS)?
            .ok_or_else(|| header.missing(TOKENS, expected))?;
        if tokens.len == 0 || tokens.len > vocab_size {
            return Err(header.value_error(
                TOKENS,
                format!("1 to {vocab_size} tokens, the rows of token_embd.weight"),
                tokens.len.to_string(),
            ));
        }
        let mut texts: Vec<Cow<'a, str>> = Vec::with_capacity(tokens.len);
        for (id, token) in tokens.iter().enumerate() {
            let key = format!("{TOKENS}[{id}]");
            texts.push(match token {
                // llama.cpp's own name for them.
                Value::Text("") => format!("[EMPTY_{id}]").into(),
                Value::Text(text) if text.len() <= TOKEN_BYTES_MAX => text.into(),
                other => {
                    let expected = format!("a string of at most {TOKEN_BYTES_MAX} bytes");
                    return Err(header.kind_error(&key, &expected, other));
                }
            });
        }
        let mut seen = HashSet::with_capacity(texts.len());
        for (id, text) in texts.iter().enumerate() {
            if !seen.insert(text.as_ref()) {
                return Err(header.value_error(
                    &format!("{TOKENS}[{id}]"),
                    "a token of its own".to_owned(),
                    format!("{text:?} a second time"),
                ));
            }
        }
        let types = Self::types(header, texts.len())?;
        Ok(Self { texts, types })
    }

    fn types(header: &Header<'a>, len: usize) -> Result<Vec<TokenType>, CheckpointError> {
        let Some(types) = header.optional_array(TYPES)? else {
            return Ok(vec![TokenType::Normal; len]);
        };
        if types.len != len {
            let expected = format!("{len} types, one a token");
            return Err(header.value_error(TYPES, expected, types.len.to_string()));
        }
        types
            .iter()
            .enumerate()
            .map(|(id, found)| {
                let code = match found {
                    Value::Signed(code) => Some(code),
                    Value::Unsigned(code) => i64::try_from(code).ok(),
                    _ => None,
                };
                code.and_then(TokenType::of).ok_or_else(|| {
                    header.kind_error(&format!("{TYPES}[{id}]"), "a type of 1 to 6", found)
                })
            })
            .collect()
    }

    fn text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(AsRef::as_ref)
    }

    /// Tokens with their ids and types.
    fn iter(&self) -> impl Iterator<Item = (u32, &str, TokenType)> {
        let ids = 0u32..;
        ids.zip(&self.texts)
            .zip(&self.types)
            .map(|((id, text), kind)| (id, text.as_ref(), *kind))
    }

    /// Id of the token that the metadata names `{name}_token_id`.
    fn special(&self, header: &Header<'_>, name: &str) -> Result<Option<u32>, CheckpointError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(found) = header.optional_u64(&key)? else {
            return Ok(None);
        };
        u32::try_from(found)
            .ok()
            .filter(|id| self.text(*id).is_some())
            .map(Some)
            .ok_or_else(|| {
                let expected = format!("an id below {}", self.texts.len());
                header.value_error(&key, expected, found.to_string())
            })
    }

    fn added_tokens(&self) -> Vec<Json> {
        self.iter()
            .filter_map(|(id, text, kind)| {
                let special = match kind {
                    TokenType::Control | TokenType::Unknown => true,
                    TokenType::UserDefined => false,
                    TokenType::Normal | TokenType::Unused | TokenType::Byte => return None,
                };
                Some(json!({
                    "id": id, "content": text, "special": special, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                }))
            })
            .collect()
    }
}

/// `tokenizer.json`.
#[derive(Serialize)]
struct TokenizerJson<'a> {
    version: &'static str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<Json>,
    normalizer: Json,
    pre_tokenizer: Json,
    post_processor: Json,
    decoder: Json,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'static str,
    dropout: Option<()>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<()>,
    end_of_word_suffix: Option<()>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Ids<'a>,
    merges: Pairs<'a>,
}

/// Texts to ids.
struct Ids<'a>(&'a Vocabulary<'a>);

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.texts.len()))?;
        for (id, text, _) in self.0.iter() {
            map.serialize_entry(text, &id)?;
        }
        map.end()
    }
}

struct Pairs<'a>(Vec<(&'a str, &'a str)>);

impl Serialize for Pairs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for pair in &self.0 {
            list.serialize_element(pair)?;
        }
        list.end()
    }
}

/// GPT-2's kind: every byte is a character, words are cut by regular expressions.
fn byte_level<'a>(
    header: &Header<'a>,
    vocabulary: &'a Vocabulary<'a>,
) -> Result<TokenizerJson<'a>, CheckpointError> {
    let name = header.optional_text(PRE)?.unwrap_or("default");
    let pre = pre_tokenizer::find(name)
        .ok_or_else(|| header.value_error(PRE, pre_tokenizer::known(), format!("`{name}`")))?;
    Ok(TokenizerJson {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: vocabulary.added_tokens(),
        normalizer: Json::Null,
        pre_tokenizer: pre.json(),
        post_processor: post_processor(header, vocabulary, pre.add_bos)?,
        decoder: json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        }),
        model: Bpe {
            r#type: "BPE",
            dropout: None,
            unk_token: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: pre.ignore_merges,
            vocab: Ids(vocabulary),
            merges: Pairs(listed_merges(header, vocabulary)?),
        },
    })
}

/// The merges that the file lists, `left right` each.
fn listed_merges<'a>(
    header: &Header<'a>,
    vocabulary: &Vocabulary<'_>,
) -> Result<Vec<(&'a str, &'a str)>, CheckpointError> {
    let merges = header
        .optional_array(MERGES)?
        .ok_or_else(|| header.missing(MERGES, "an array of strings"))?;
    let known: HashSet<&str> = vocabulary.texts.iter().map(AsRef::as_ref).collect();
    let mut whole = String::new();
    merges
        .iter()
        .enumerate()
        .map(|(index, merge)| {
            let Value::Text(text) = merge else {
                let key = format!("{MERGES}[{index}]");
                return Err(header.kind_error(&key, "a string", merge));
            };
            // A token may begin with a space, though none of GPT-2's does.
            let pair = text
                .char_indices()
                .skip(1)
                .find(|(_, character)| *character == ' ')
                .map(|(at, _)| (&text[..at], &text[at + 1..]));
            pair.filter(|(left, right)| {
                whole.clear();
                whole.push_str(left);
                whole.push_str(right);
                [*left, *right, whole.as_str()]
                    .iter()
                    .all(|token| known.contains(token))
            })
            .ok_or_else(|| {
                let expected = "two tokens whose joining is one too";
                header.kind_error(&format!("{MERGES}[{index}]"), expected, merge)
            })
        })
        .collect()
}

/// SentencePiece's kind: BPE by scores, spaces written as a mark, bytes for what the vocabulary lacks.
fn sentence_piece<'a>(
    header: &Header<'a>,
    vocabulary: &'a Vocabulary<'a>,
) -> Result<TokenizerJson<'a>, CheckpointError> {
    let space_prefix = header
        .optional_bool("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space_prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE_MARK}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}));
    let unknown = vocabulary
        .iter()
        .find(|(_, _, kind)| *kind == TokenType::Unknown);
    let unknown = match vocabulary.special(header, "unknown")? {
        Some(id) => vocabulary.text(id),
        None => unknown.map(|(_, text, _)| text),
    };
    Ok(TokenizerJson {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: vocabulary.added_tokens(),
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        post_processor: post_processor(header, vocabulary, true)?,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: Bpe {
            r#type: "BPE",
            dropout: None,
            unk_token: unknown,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: true,
            byte_fallback: true,
            ignore_merges: false,
            vocab: Ids(vocabulary),
            merges: Pairs(scored_merges(header, vocabulary)?),
        },
    })
}

/// Every way to make a word of two words, best score first: what SentencePiece does, as ranks. Control tokens and bytes are
/// never made of words, or a user could type them.
fn scored_merges<'a>(
    header: &Header<'a>,
    vocabulary: &'a Vocabulary<'a>,
) -> Result<Vec<(&'a str, &'a str)>, CheckpointError> {
    let scores = header
        .optional_array(SCORES)?
        .ok_or_else(|| header.missing(SCORES, "an array of numbers"))?;
    if scores.len != vocabulary.texts.len() {
        let expected = format!("{} scores, one a token", vocabulary.texts.len());
        return Err(header.value_error(SCORES, expected, scores.len.to_string()));
    }
    let words: HashMap<&str, u32> = vocabulary
        .iter()
        .filter(|(_, _, kind)| matches!(kind, TokenType::Normal | TokenType::UserDefined))
        .map(|(id, text, _)| (text, id))
        .collect();
    let mut merges = Vec::new();
    for ((id, text, _), score) in vocabulary.iter().zip(scores.iter()) {
        let score = match score {
            Value::Float(score) if score.is_finite() => score,
            Value::Signed(score) => score as f64,
            other => {
                let key = format!("{SCORES}[{id}]");
                return Err(header.kind_error(&key, "a finite number", other));
            }
        };
        if words.get(text) != Some(&id) {
            continue;
        }
        let mut ways: Vec<_> = text
            .char_indices()
            .skip(1)
            .map(|(at, _)| text.split_at(at))
            .filter_map(|(left, right)| Some((*words.get(left)?, *words.get(right)?, left, right)))
            .collect();
        ways.sort_unstable_by_key(|(left, right, ..)| (*left, *right));
        merges.extend(ways.into_iter().map(|(_, _, left, right)| {
            let lengths = (left.chars().count(), right.chars().count());
            (score, lengths, left, right)
        }));
    }
    // Stable, so that equals stay in the order of ids.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| b.1.cmp(&a.1)));
    Ok(merges
        .into_iter()
        .map(|(_, _, left, right)| (left, right))
        .collect())
}

/// What is put around every text.
fn post_processor(
    header: &Header<'_>,
    vocabulary: &Vocabulary<'_>,
    add_bos: bool,
) -> Result<Json, CheckpointError> {
    let add_bos = header
        .optional_bool("tokenizer.ggml.add_bos_token")?
        .unwrap_or(add_bos);
    let add_eos = header
        .optional_bool("tokenizer.ggml.add_eos_token")?
        .unwrap_or(false);
    let mut special = serde_json::Map::new();
    let mut piece = |add: bool, name: &str| -> Result<Option<String>, CheckpointError> {
        let id = if add {
            vocabulary.special(header, name)?
        } else {
            None
        };
        let Some((id, text)) = id.and_then(|id| Some((id, vocabulary.text(id)?))) else {
            return Ok(None);
        };
        special.insert(
            text.to_owned(),
            json!({"id": text, "ids": [id], "tokens": [text]}),
        );
        Ok(Some(text.to_owned()))
    };
    let (bos, eos) = (piece(add_bos, "bos")?, piece(add_eos, "eos")?);
    if bos.is_none() && eos.is_none() {
        return Ok(Json::Null);
    }
    let template = |sequences: &[&str]| -> Vec<Json> {
        let mut pieces = Vec::new();
        for (kind, sequence) in sequences.iter().enumerate() {
            let token = |text: &String| json!({"SpecialToken": {"id": text, "type_id": kind}});
            pieces.extend(bos.as_ref().map(token));
            pieces.push(json!({"Sequence": {"id": sequence, "type_id": kind}}));
            pieces.extend(eos.as_ref().map(token));
        }
        pieces
    };
    Ok(json!({
        "type": "TemplateProcessing",
        "single": template(&["A"]),
        "pair": template(&["A", "B"]),
        "special_tokens": special,
    }))
}
