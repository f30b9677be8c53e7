//! What is wrong with a file.

use std::path::PathBuf;

/// Names the file, the key or tensor, what was expected and what came.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file cannot be opened or read.
    #[error("{}: {source}", file.display())]
    Io {
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what its name says: broken container, header or syntax.
    #[error("{}: {reason}", file.display())]
    Malformed {
        /// Which file.
        file: PathBuf,
        /// What was expected and what came.
        reason: String,
    },
    /// A value of a configuration file is missing or cannot be used.
    #[error("{}: `{key}`: expected {expected}, found {found}", file.display())]
    Value {
        /// Which file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is legal.
        expected: String,
        /// What came.
        found: String,
    },
    /// A tensor that the model needs is not there.
    #[error("{}: tensor `{name}`: expected {expected}, found none", file.display())]
    MissingTensor {
        /// Which file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        expected: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor `{name}`: expected shape {expected:?}, found {found:?}", file.display())]
    Shape {
        /// Which file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// What the configuration says.
        expected: Vec<usize>,
        /// What came.
        found: Vec<usize>,
    },
    /// A tensor that this model cannot use.
    #[error("{}: tensor `{name}`: {reason}", file.display())]
    Tensor {
        /// Which file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// What was expected and what came.
        reason: String,
    },
}
