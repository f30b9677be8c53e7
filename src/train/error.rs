//! What can go wrong in training.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
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
}
