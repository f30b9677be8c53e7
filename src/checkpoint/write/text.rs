//! The text side of a directory to be.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::files::Files;
use crate::checkpoint::limits::{CONFIG_BYTES_MAX, TEMPLATE_BYTES_MAX, TOKENIZER_BYTES_MAX};
use crate::checkpoint::source::Source;
use crate::checkpoint::{CheckpointError, TextParts, text_parts};

/// All files of the text side, whatever a directory has of them.
const NAMES: [(&str, u64); 4] = [
    (text_parts::TOKENIZER, TOKENIZER_BYTES_MAX),
    (text_parts::TOKENIZER_CONFIG, CONFIG_BYTES_MAX),
    (text_parts::SPECIAL_TOKENS, CONFIG_BYTES_MAX),
    (text_parts::TEMPLATE, TEMPLATE_BYTES_MAX),
];

/// Tokenizer, special tokens and chat template, as the files of a directory.
#[derive(Clone, Debug)]
pub struct TextFiles(Vec<(&'static str, Vec<u8>)>);

impl TextFiles {
    /// Those of a Hugging Face directory, byte for byte.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file that cannot be read or is none of its kind.
    pub fn read(directory: &Path) -> Result<Self, CheckpointError> {
        let source = Source::directory(directory);
        // Whatever is wrong with them is told here, and not to who loads what was written.
        text_parts::read(&source)?;
        let mut files = Vec::new();
        for (name, bytes_max) in NAMES {
            if let Some(bytes) = source.read_optional(name, bytes_max)? {
                files.push((name, bytes));
            }
        }
        Ok(Self(files))
    }

    /// Made of parts: a GGUF file's, or a new tokenizer's. `positions` is the longest text in tokens.
    pub fn of(parts: &TextParts, positions: usize) -> Self {
        let mut config = Map::new();
        let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
        put("tokenizer_class", json!("PreTrainedTokenizerFast"));
        for (key, token) in [
            ("bos_token", &parts.bos_token),
            ("eos_token", &parts.eos_token),
        ] {
            if let Some(token) = token {
                put(key, json!(token));
            }
        }
        for (key, token) in &parts.special_tokens {
            put(key, json!(token));
        }
        put("model_max_length", json!(positions));
        put("clean_up_tokenization_spaces", json!(false));
        if let Some(template) = &parts.chat_template {
            put("chat_template", json!(template));
        }
        let config = format!("{:#}\n", Value::Object(config));
        Self(vec![
            (text_parts::TOKENIZER, parts.tokenizer_json.clone()),
            (text_parts::TOKENIZER_CONFIG, config.into_bytes()),
        ])
    }

    /// Writes them into a directory that exists; files of another tokenizer go.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] where one cannot be written; then none has changed.
    pub fn write(&self, directory: &Path) -> Result<(), CheckpointError> {
        let mut files = Files::new(directory)?;
        self.stage(&mut files)?;
        files.finish()
    }

    /// Names of the files.
    pub(in crate::checkpoint) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(name, _)| *name)
    }

    /// Stages them; files of another tokenizer go.
    pub(super) fn stage(&self, files: &mut Files) -> Result<(), CheckpointError> {
        for (name, bytes) in &self.0 {
            files.stage_bytes(name, bytes)?;
        }
        for (name, _) in NAMES {
            if !self.0.iter().any(|(ours, _)| *ours == name) {
                files.remove(name);
            }
        }
        Ok(())
    }
}
