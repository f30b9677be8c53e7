//! `midpo reference`: what the files `config/midpo.toml` and README.md repeat.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::CliError;
use crate::config::reference;
use crate::metrics::Metrics;

#[derive(Debug, Args)]
pub(super) struct ReferenceOptions {
    /// What to print.
    #[arg(value_enum)]
    subject: Subject,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Subject {
    /// Every setting, as the file that --config reads.
    Toml,
    /// Every setting, as Markdown tables.
    Settings,
    /// Every metric, as a Markdown table.
    Metrics,
}

pub(super) fn run(options: &ReferenceOptions) -> Result<ExitCode, CliError> {
    let text = match options.subject {
        Subject::Toml => reference::toml(),
        Subject::Settings => reference::markdown(),
        Subject::Metrics => metrics(),
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(CliError::io("standard output"))?;
    Ok(ExitCode::SUCCESS)
}

/// The README's table of metrics.
pub fn metrics() -> String {
    let mut text =
        String::from("| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n");
    for info in Metrics::new("midpo").infos() {
        text += &format!(
            "| `{}` | {} | {} | {} |\n",
            info.name,
            info.kind.as_str(),
            info.labels.join(", "),
            info.help
        );
    }
    text
}
