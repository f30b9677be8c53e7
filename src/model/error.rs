//! Why a model cannot be laid out.

use crate::backend::BackendError;

/// A checkpoint that a backend cannot take.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A tensor could not be repacked or uploaded.
    #[error("weights `{name}`: {source}")]
    Weights {
        /// Which matrix, in Hugging Face's names.
        name: String,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// Buffers or cache.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
