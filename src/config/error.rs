//! What is wrong with a flag, an environment variable or a configuration file.

use std::path::PathBuf;

use super::budget::Shortfall;

/// Names the flag, variable or key, what was expected and what came.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The command line (or an environment variable that stands for a flag) cannot be read; help and version come this way too.
    #[error("{0}")]
    Usage(#[from] Box<clap::Error>),
    /// A file cannot be opened or read.
    #[error("--{flag}: {}: {source}", file.display())]
    Io {
        /// The flag that names it.
        flag: &'static str,
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The configuration file is not TOML.
    #[error("{}: {reason}", file.display())]
    Syntax {
        /// Which file.
        file: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A key that no subcommand knows.
    #[error("{origin}: unknown key `{key}`{}", nearest_hint(nearest))]
    UnknownKey {
        /// The file, or `environment`.
        origin: String,
        /// The key as it was written.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
    },
    /// A value that cannot be used.
    #[error("{origin}: `{key}`: expected {expected}, found {found}")]
    Value {
        /// The file, or how the flag is written.
        origin: String,
        /// The key.
        key: String,
        /// What is legal.
        expected: String,
        /// What came.
        found: String,
    },
    /// A model that the device's memory is too small for.
    #[error("memory: {0}")]
    Memory(Box<Shortfall>),
    /// A value that cannot be used, in the words of whoever tried to read it.
    #[error("{origin}: `{key}`: {reason}")]
    Invalid {
        /// The file.
        origin: String,
        /// The key.
        key: String,
        /// What is legal and what came.
        reason: String,
    },
}

fn nearest_hint(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!("; did you mean `{name}`?"))
        .unwrap_or_default()
}

impl ConfigError {
    /// A value out of its range, named by its flag.
    pub(crate) fn flag(key: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Value {
            origin: format!("--{}", key.replace('_', "-")),
            key: key.to_owned(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }
}
