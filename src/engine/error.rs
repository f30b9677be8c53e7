//! Why a request is not taken.

/// A submission that the engine refuses; nothing was queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A token id outside the vocabulary.
    #[error("token id {found} is outside the vocabulary of {vocabulary}")]
    TokenOutOfRange {
        /// The id.
        found: u32,
        /// Tokens in the vocabulary.
        vocabulary: usize,
    },
    /// Prompt alone, or with `max_tokens`, exceeds the context.
    #[error(
        "this model's context is {limit} tokens, but the request needs {prompt} for the prompt and {max_tokens} for the answer"
    )]
    ContextLength {
        /// Context served.
        limit: usize,
        /// Prompt tokens.
        prompt: usize,
        /// Answer tokens asked for.
        max_tokens: usize,
    },
    /// It could never fit the K/V cache, even alone.
    #[error("the request needs {needed} K/V blocks, but the cache has {blocks}")]
    CacheTooSmall {
        /// Blocks of the whole request.
        needed: usize,
        /// Blocks there are.
        blocks: usize,
    },
    /// A routed variant on a model without experts.
    #[error("this model has no experts: only the variant `base` can be served, not `{variant}`")]
    NoExperts {
        /// What was asked for.
        variant: &'static str,
    },
    /// Too many wait.
    #[error("{limit} requests are waiting already")]
    QueueFull {
        /// The bound.
        limit: usize,
    },
    /// Shutting down.
    #[error("the server is shutting down")]
    Draining,
    /// The engine thread has died.
    #[error("the engine is gone")]
    EngineGone,
}
