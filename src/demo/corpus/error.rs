//! What can go wrong in making a corpus.

use std::path::PathBuf;

/// Why there is no corpus.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// A list is not TOML of its form.
    #[error("demo/corpus/{file}: {reason}")]
    Data {
        /// Which.
        file: &'static str,
        /// What was expected and what came.
        reason: String,
    },
    /// Something names a list that is not there.
    #[error("demo/corpus/{file}: `{name}`: expected one of the names in {expected}")]
    Unknown {
        /// Which file names it.
        file: &'static str,
        /// The name.
        name: String,
        /// Where such names are.
        expected: &'static str,
    },
    /// A file could not be written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}
