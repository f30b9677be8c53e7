//! What ends the program.

use std::process::ExitCode;

use super::train::INTERRUPTED;
use crate::backend::BackendError;
use crate::bench::BenchError;
use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::demo::corpus::CorpusError;
use crate::eval::EvalError;
use crate::model::ModelError;
use crate::text::TextError;
use crate::train::TrainError;

/// Why a subcommand failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A flag, a variable or a file of settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Standard input or output.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The model's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model's tokenizer or chat template.
    #[error("the model's text files: {0}")]
    Text(#[from] TextError),
    /// The model does not fit the device.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The engine's thread has died: nothing can be answered any more.
    #[error("the engine has died; the log says why")]
    EngineDead,
    /// A bench.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// An evaluation.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// Training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The demo's corpus.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// Another server.
    #[error("{url}: {reason}")]
    Remote {
        /// Its address.
        url: String,
        /// What it said, or did not.
        reason: String,
    },
}

impl CliError {
    /// 2 for what the user wrote, 1 for what happened later.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_) | Self::Bench(BenchError::Flag { .. } | BenchError::Url { .. }) => {
                ExitCode::from(2)
            }
            Self::Eval(EvalError::Flag { .. }) => ExitCode::from(2),
            Self::Train(TrainError::Setting { .. } | TrainError::Config(_)) => ExitCode::from(2),
            Self::Train(TrainError::Interrupted { .. } | TrainError::Stopped { .. }) => {
                ExitCode::from(INTERRUPTED)
            }
            _ => ExitCode::FAILURE,
        }
    }

    /// Wraps an I/O error.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
