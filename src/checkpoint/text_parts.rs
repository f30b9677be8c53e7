//! The text side of a directory: `tokenizer.json`, its special tokens, and a chat template.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::json::Object;
use super::limits::{CONFIG_BYTES_MAX, TEMPLATE_BYTES_MAX, TOKENIZER_BYTES_MAX};
use super::source::Source;
use super::{CheckpointError, TextParts};

/// The tokenizer itself.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Special tokens and, often, the chat template.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Special tokens where [`TOKENIZER_CONFIG`] names none.
pub(crate) const SPECIAL_TOKENS: &str = "special_tokens_map.json";
/// The chat template, before any other.
pub(crate) const TEMPLATE: &str = "chat_template.jinja";

/// Special tokens that templates may name, beside start and end.
const OTHER_TOKENS: [&str; 5] = [
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
];

/// Just enough of `tokenizer.json` to say that it is none. `text` reads the rest.
#[derive(Deserialize)]
struct TokenizerOutline {
    #[serde(rename = "model")]
    _model: IgnoredAny,
}

/// Reads what `text` makes a tokenizer and a template from.
///
/// # Errors
/// [`CheckpointError`] names the file, and the key where there is one.
pub(crate) fn read(source: &Source) -> Result<TextParts, CheckpointError> {
    let tokenizer_json = tokenizer(source)?;
    named_tokens_and_template(source, tokenizer_json)
}

/// Adds to `text`, a GGUF file's, what its metadata leave open and the files beside it say: chat template, special tokens.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_beside(source: &Source, text: &mut TextParts) -> Result<(), CheckpointError> {
    let beside = named_tokens_and_template(source, Vec::new())?;
    text.chat_template = text.chat_template.take().or(beside.chat_template);
    text.bos_token = text.bos_token.take().or(beside.bos_token);
    text.eos_token = text.eos_token.take().or(beside.eos_token);
    for (key, token) in beside.special_tokens {
        if !text.special_tokens.iter().any(|(known, _)| *known == key) {
            text.special_tokens.push((key, token));
        }
    }
    Ok(())
}

fn named_tokens_and_template(
    source: &Source,
    tokenizer_json: Vec<u8>,
) -> Result<TextParts, CheckpointError> {
    let object = |name: &str| match source.read_optional(name, CONFIG_BYTES_MAX)? {
        Some(bytes) => Object::parse(&source.path(name), &bytes).map(Some),
        None => Ok(None),
    };
    let config = object(TOKENIZER_CONFIG)?;
    let fallback = object(SPECIAL_TOKENS)?;
    let token = |key: &str| {
        for json in [&config, &fallback].into_iter().flatten() {
            if let Some(token) = token(json, key)? {
                return Ok(Some(token));
            }
        }
        Ok::<_, CheckpointError>(None)
    };
    let mut special_tokens = Vec::new();
    for key in OTHER_TOKENS {
        if let Some(text) = token(key)? {
            special_tokens.push((key.to_owned(), text));
        }
    }
    Ok(TextParts {
        tokenizer_json,
        chat_template: chat_template(source, config.as_ref())?,
        bos_token: token("bos_token")?,
        eos_token: token("eos_token")?,
        special_tokens,
    })
}

fn tokenizer(source: &Source) -> Result<Vec<u8>, CheckpointError> {
    let file = source.path(TOKENIZER);
    if !source.exists(TOKENIZER) && source.exists("tokenizer.model") {
        let reason = "expected this file, found only tokenizer.model: load the tokenizer with transformers' AutoTokenizer and \
                      save it with save_pretrained";
        return Err(CheckpointError::malformed(&file, reason));
    }
    let bytes = source.read(TOKENIZER, TOKENIZER_BYTES_MAX)?;
    match serde_json::from_slice::<TokenizerOutline>(&bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => {
            let reason = format!("expected a tokenizer in JSON: {error}");
            Err(CheckpointError::malformed(&file, reason))
        }
    }
}

/// A special token: its text, or an object (`AddedToken`) with its text in `content`.
fn token(json: &Object, key: &str) -> Result<Option<String>, CheckpointError> {
    let text = match json.get(key) {
        None => return Ok(None),
        Some(Value::String(text)) => Some(text),
        Some(Value::Object(token)) => match token.get("content") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        },
        Some(_) => None,
    };
    text.map(|text| Some(text.clone()))
        .ok_or_else(|| json.error(key, "a string, or an object with a string in `content`"))
}

fn chat_template(
    source: &Source,
    config: Option<&Object>,
) -> Result<Option<String>, CheckpointError> {
    if let Some(bytes) = source.read_optional(TEMPLATE, TEMPLATE_BYTES_MAX)? {
        return match String::from_utf8(bytes) {
            Ok(template) => Ok(Some(template)),
            Err(error) => {
                let reason = format!("expected UTF-8: {error}");
                Err(CheckpointError::malformed(&source.path(TEMPLATE), reason))
            }
        };
    }
    let Some(config) = config else {
        return Ok(None);
    };
    let expected = "a template, or a list of {name, template} with a `default` or just one";
    match config.get("chat_template") {
        None => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(named)) => named_template(named)
            .map(|template| Some(template.to_owned()))
            .ok_or_else(|| config.error("chat_template", expected)),
        Some(_) => Err(config.error("chat_template", expected)),
    }
}

/// The template named `default`, or the only one.
fn named_template(named: &[Value]) -> Option<&str> {
    let default = named
        .iter()
        .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
    let chosen = match (default, named) {
        (Some(default), _) => default,
        (None, [only]) => only,
        (None, _) => return None,
    };
    chosen.get("template").and_then(Value::as_str)
}
