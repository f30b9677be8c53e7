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
    /// What ranks cannot share evenly.
    #[error("`{what}`: expected a multiple of {expected} to share over the ranks, found {found}")]
    Shard {
        /// Field of the configuration, or matrix, in Hugging Face's names.
        what: String,
        /// Ranks, times the numbers of a block.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// Buffers or cache.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
