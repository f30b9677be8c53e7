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
    /// An expert's weight beside a base that is not f32, for which experts are kept in bf16.
    #[error(
        "weights `{name}`: expected numbers that bf16 can hold, found {value:e} (--dtype f32 keeps it)"
    )]
    TooLarge {
        /// Which matrix, in Hugging Face's names.
        name: String,
        /// Its first number that becomes infinite.
        value: f32,
    },
    /// Buffers or cache.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
