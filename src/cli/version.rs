//! `midpo version`.

use std::io::Write;
use std::process::ExitCode;

use super::CliError;

/// Prints name and version.
pub(super) fn run() -> Result<ExitCode, CliError> {
    writeln!(std::io::stdout(), "midpo {}", env!("CARGO_PKG_VERSION"))
        .map_err(CliError::io("standard output"))?;
    Ok(ExitCode::SUCCESS)
}
