//! `midpo convert`.

use std::io::Write;
use std::process::ExitCode;

use super::{CliError, engine, logging};
use crate::checkpoint::{self, Overwrite};
use crate::config::{ConfigError, ConvertOptions};

/// Packs base, experts and folded router into one directory.
pub(super) fn run(options: &ConvertOptions) -> Result<ExitCode, CliError> {
    let source = options.model.validate()?;
    logging::start(&options.log)?;
    let sources = engine::sources(&source)?.ok_or_else(|| ConfigError::Value {
        origin: "--model".to_owned(),
        key: "model".to_owned(),
        expected: "the base to pack".to_owned(),
        found: "none".to_owned(),
    })?;
    checkpoint::pack(&sources, &options.output, Overwrite::Never)?;
    let output = options.output.display();
    writeln!(
        std::io::stdout(),
        "packed into {output}; serve it with: midpo serve --model {output}"
    )
    .map_err(CliError::io("standard output"))?;
    Ok(ExitCode::SUCCESS)
}
