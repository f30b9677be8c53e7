//! What can go wrong in training.

use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::text::TextError;

/// Why training stopped or did not start.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A model's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line of a data file cannot be used.
    #[error("{}: line {line}: {}expected {expected}, found {found}", file.display(), field_named(field))]
    Line {
        /// Which file.
        file: PathBuf,
        /// From 1.
        line: usize,
        /// Which field; empty: the line as a whole.
        field: String,
        /// What is legal.
        expected: String,
        /// What came.
        found: String,
    },
    /// A setting is missing or cannot be used.
    #[error("{stage}: `{key}`: expected {expected}, found {found}")]
    Setting {
        /// Of which stage.
        stage: &'static str,
        /// As in a recipe; as a flag, with dashes.
        key: &'static str,
        /// What is legal.
        expected: String,
        /// What came.
        found: String,
    },
    /// A recipe, or a value in it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A stage would write over something.
    #[error(
        "{}: exists already; --overwrite replaces it, --resume goes on with an interrupted run",
        output.display()
    )]
    Exists {
        /// What it would write.
        output: PathBuf,
    },
    /// Somebody asked for the end before the first step.
    #[error("{stage}: stopped before the first step; nothing is lost")]
    Stopped {
        /// The stage.
        stage: String,
    },
    /// A value does not have the shape that it must have.
    #[error("{name}: expected {expected} numbers, found {found}")]
    Shape {
        /// Of which tensor.
        name: String,
        /// As its parameter says.
        expected: usize,
        /// As it came.
        found: usize,
    },
    /// The autograd engine failed.
    #[error("autograd: {0}")]
    Engine(String),
    /// There is nothing to train on.
    #[error("{what}: nothing to train on: no example is left")]
    Empty {
        /// The run.
        what: String,
    },
    /// The loss or a gradient is NaN or infinite. Nothing was changed by that batch.
    #[error(
        "{stage}: step {step}: loss {loss}, norm of the gradient {norm}: expected finite numbers (lines of the batch: {}); {}",
        lines_named(lines), last_good(state.as_deref())
    )]
    NotFinite {
        /// The run.
        stage: String,
        /// From 1.
        step: usize,
        /// Of the batch.
        loss: f64,
        /// Of the batch.
        norm: f64,
        /// Lines of the data file that the batch came from.
        lines: Vec<usize>,
        /// The last state that was saved.
        state: Option<PathBuf>,
    },
    /// Somebody asked for the end. Everything is saved.
    #[error(
        "{stage}: stopped after step {step} of {steps}; saved in {}: go on with --resume",
        state.display()
    )]
    Interrupted {
        /// The run.
        stage: String,
        /// Steps done.
        step: usize,
        /// Of so many.
        steps: usize,
        /// Where the state is.
        state: PathBuf,
    },
    /// A saved state cannot be gone on with.
    #[error("{}: {reason}", file.display())]
    State {
        /// Which.
        file: PathBuf,
        /// Why.
        reason: String,
    },
}

fn field_named(field: &str) -> String {
    if field.is_empty() {
        String::new()
    } else {
        format!("`{field}`: ")
    }
}

/// Lines of a batch that a message names at most.
const LINES_NAMED: usize = 64;

fn lines_named(lines: &[usize]) -> String {
    let mut sorted = lines.to_vec();
    sorted.sort_unstable();
    let named: Vec<String> = sorted
        .iter()
        .take(LINES_NAMED)
        .map(usize::to_string)
        .collect();
    let more = if sorted.len() > LINES_NAMED {
        ", ..."
    } else {
        ""
    };
    format!("{}{more}", named.join(", "))
}

fn last_good(state: Option<&Path>) -> String {
    match state {
        Some(state) => format!("the last good state is {}", state.display()),
        None => "no state was saved before it".to_owned(),
    }
}
