//! What can go wrong in an evaluation.

use std::path::PathBuf;

use crate::demo::corpus::CorpusError;
use crate::engine::SubmitError;
use crate::text::TextError;
use crate::train::TrainError;

/// Why an evaluation stopped or did not start.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A flag's value.
    #[error("--{flag}: expected {expected}, found {found}")]
    Flag {
        /// Which, without its dashes.
        flag: &'static str,
        /// What is legal.
        expected: String,
        /// What came.
        found: String,
    },
    /// A file or directory that a flag names cannot be read or written.
    #[error("--{flag}: {}: {source}", file.display())]
    Io {
        /// The flag that names it.
        flag: &'static str,
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A line of a file that a flag names.
    #[error("--{flag}: {}, line {line}, `{field}`: expected {expected}, found {found}", file.display())]
    Line {
        /// The flag that names the file.
        flag: &'static str,
        /// Which.
        file: PathBuf,
        /// From 1.
        line: usize,
        /// Of the line's object, or what stands there.
        field: String,
        /// What is legal.
        expected: String,
        /// What came.
        found: String,
    },
    /// A file that a flag names is not what it should be, as a whole.
    #[error("--{flag}: {}: {reason}", file.display())]
    Syntax {
        /// The flag that names it.
        flag: &'static str,
        /// Which.
        file: PathBuf,
        /// Where, what was expected and what was found.
        reason: String,
    },
    /// Files without what is wanted of them.
    #[error("--{flag}: {}: expected {expected}, found none", file.display())]
    Nothing {
        /// The flag that names it.
        flag: &'static str,
        /// File or directory.
        file: PathBuf,
        /// What was looked for.
        expected: String,
    },
    /// A prompt that the judge can say nothing of.
    #[error("prompt `{id}` of {set}: expected {expected}, found {found}")]
    Prompt {
        /// Of the prompt.
        set: String,
        /// Of the prompt.
        id: String,
        /// What the judge knows.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// The lists of the demo's corpus.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// A prompt cannot become token ids.
    #[error("prompt `{id}`: {source}")]
    Text {
        /// Of the prompt.
        id: String,
        /// Why.
        #[source]
        source: TextError,
    },
    /// The engine refuses a request.
    #[error("prompt `{id}`, variant `{variant}`: {source}")]
    Submit {
        /// Of the prompt.
        id: String,
        /// Which.
        variant: String,
        /// Why.
        #[source]
        source: SubmitError,
    },
    /// The engine could not answer.
    #[error("prompt `{id}`, variant `{variant}`: {reason}")]
    Answer {
        /// Of the prompt.
        id: String,
        /// Which.
        variant: String,
        /// In the engine's words.
        reason: String,
    },
    /// A score model could not score.
    #[error("--{flag}: {source}")]
    Score {
        /// `reward` or `cost`.
        flag: &'static str,
        /// Why.
        #[source]
        source: Box<TrainError>,
    },
}
