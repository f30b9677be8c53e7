//! What is wrong with a tokenizer, a template, or a text.

/// Whose fault it is follows from the variant: the model's files ([`TextError::Tokenizer`], [`TextError::TemplateSource`]), or the
/// request (all others).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// `tokenizer.json` cannot be used.
    #[error("tokenizer.json: {reason}")]
    Tokenizer {
        /// What was expected and what came.
        reason: String,
    },
    /// The chat template is no Jinja that we understand.
    #[error("chat template: {reason}")]
    TemplateSource {
        /// What and where.
        reason: String,
    },
    /// The template refuses the chat (`raise_exception`: exactly its message) or fails on it.
    #[error("{message}")]
    Template {
        /// For the client.
        message: String,
    },
    /// A text is longer than any context could hold.
    #[error("{what} has {found} bytes, more than the limit of {limit}")]
    TooLong {
        /// Which text.
        what: &'static str,
        /// The limit.
        limit: usize,
        /// Its length.
        found: usize,
    },
    /// The tokenizer's own machinery fails on this text.
    #[error("the text cannot be encoded: {reason}")]
    Encode {
        /// The library's words.
        reason: String,
    },
}
