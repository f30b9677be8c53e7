//! What is wrong with a file.

use std::path::{Path, PathBuf};

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
    /// Of both experts and the router only some are given: they work together or not at all.
    #[error(
        "expected both experts and the router, or none of them: {given} is given, {missing} is not"
    )]
    PartialExperts {
        /// What is given.
        given: &'static str,
        /// What is not.
        missing: &'static str,
    },
    /// A part of a packed checkpoint is not the one that was packed.
    #[error("{}: expected SHA-256 {expected}, found {found}", file.display())]
    Hash {
        /// Which file.
        file: PathBuf,
        /// What `midpo.json` says.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// `midpo convert` would write over something.
    #[error("{}: exists already{hint}", directory.display())]
    Exists {
        /// Where it should go.
        directory: PathBuf,
        /// What to do about it, or empty.
        hint: &'static str,
    },
}

impl CheckpointError {
    /// [`CheckpointError::Io`].
    pub(crate) fn io(file: &Path, source: std::io::Error) -> Self {
        Self::Io {
            file: file.to_path_buf(),
            source,
        }
    }

    /// [`CheckpointError::Malformed`].
    pub(crate) fn malformed(file: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed {
            file: file.to_path_buf(),
            reason: reason.into(),
        }
    }

    /// [`CheckpointError::Tensor`].
    pub(crate) fn tensor(file: &Path, name: &str, reason: impl Into<String>) -> Self {
        Self::Tensor {
            file: file.to_path_buf(),
            name: name.to_owned(),
            reason: reason.into(),
        }
    }
}
