//! Why a bench cannot run or go on. Failures of single requests are counted, not raised: [`super::Failure`].

use std::path::PathBuf;

/// What ends a bench.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// An address that cannot be a server's.
    #[error("--url: expected http://HOST:PORT, found `{found}`: {reason}")]
    Url {
        /// As given.
        found: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A flag whose value makes no sense.
    #[error("{flag}: expected {expected}, found {found}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What it takes.
        expected: String,
        /// What came.
        found: String,
    },
    /// The server does not answer what must be known before the load starts.
    #[error("{url}: {what}: {reason}")]
    Server {
        /// Asked here.
        url: String,
        /// What was asked.
        what: &'static str,
        /// What came instead.
        reason: String,
    },
    /// A file of prompts that cannot be used.
    #[error("{}:{line}: expected {expected}, found {found}", file.display())]
    Prompts {
        /// The file.
        file: PathBuf,
        /// From 1; 0 for the file as a whole.
        line: usize,
        /// What a line may be.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {source}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The client could not be made.
    #[error("HTTP client: {0}")]
    Client(#[source] reqwest::Error),
}
