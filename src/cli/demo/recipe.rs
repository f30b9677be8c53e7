//! What a demo is made by: a file of `demo/recipes`.

use std::path::Path;

use serde::Deserialize;

use crate::cli::CliError;
use crate::config::ConfigError;
use crate::demo::corpus::Sizes;

/// A demo, from nothing.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DemoRecipe {
    /// Of the corpus.
    pub(super) seed: u64,
    pub(super) corpus: Sizes,
    pub(super) tokenizer: TokenizerSize,
    pub(super) base: BaseShape,
    pub(super) evaluation: Evaluation,
    /// A recipe of `midpo train`, its paths relative to the demo's output.
    pub(super) train: toml::Table,
}

/// The tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TokenizerSize {
    pub(super) vocab_size: usize,
    /// Lines of the corpus that it is learned from.
    pub(super) lines: usize,
}

/// The Llama, under the names of its config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BaseShape {
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) max_position_embeddings: usize,
}

/// How held-out prompts are answered.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Evaluation {
    pub(super) temperature: f32,
    pub(super) max_tokens: u32,
    /// One answer a prompt and seed.
    pub(super) seeds: Vec<u64>,
    /// Further routers, by directory in the output: a row each.
    #[serde(default)]
    pub(super) routers: Vec<String>,
}

impl DemoRecipe {
    /// Where a stage of the training writes, in the demo's output: its `output`, or its name.
    pub(super) fn output_of<'a>(&'a self, stage: &'a str) -> &'a str {
        let table = self.train.get(stage);
        let output = table.and_then(|table| table.get("output"));
        output.and_then(toml::Value::as_str).unwrap_or(stage)
    }

    /// Reads one.
    ///
    /// # Errors
    /// A file that cannot be read, is no TOML, or has a key that nobody knows.
    pub(super) fn load(file: &Path) -> Result<Self, CliError> {
        let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Io {
            flag: "recipe",
            file: file.to_owned(),
            source,
        })?;
        let recipe = toml::from_str(&text).map_err(|error| ConfigError::Syntax {
            file: file.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(recipe)
    }
}
