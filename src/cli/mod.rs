//! The command line: one file a subcommand. It builds the objects and joins them; what they do is theirs.

mod bench;
mod error;
mod health;
mod logging;
pub mod reference;
mod version;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{ConfigError, HealthOptions, without_empty_variables};

pub use error::CliError;

const EXAMPLES: &str = "\
Examples:
  midpo serve                                          the embedded demo on http://127.0.0.1:8000
  midpo serve --model Llama-2-7b --safety S --helpfulness H --router router.pth
  midpo serve --model model.gguf --port 0              a plain Llama, on a port that the system chooses
  midpo chat                                           talk to the embedded demo in the terminal
  midpo convert --model BASE --safety S --helpfulness H --router router.pth --output packed
  midpo bench --concurrency 1,8,32 --svg sweep.svg     load on a running server, as a table and a picture
  midpo reference toml > midpo.toml                    every setting with its default

Every flag is also a key of a TOML file (--config FILE) and an environment variable MIDPO_*.
A flag beats the environment, the environment the file, the file the default.";

/// Serves a routed Llama (MidPO): a base, a safety and a helpfulness expert, and a router that mixes them per token.
#[derive(Debug, Parser)]
#[command(name = "midpo", version, after_help = EXAMPLES, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    /// TOML file of settings; `midpo reference toml` prints one with every key.
    #[arg(long, global = true, env = "MIDPO_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure a server under load.
    ///
    /// Any server that speaks OpenAI's API. Prints a table in Markdown; writes JSON and SVG where asked.
    Bench(Box<bench::BenchArgs>),
    /// Ask a running server whether it is ready.
    ///
    /// Exits 0 when it is, 1 when it is not: the health check of a container that has no curl.
    Health(HealthOptions),
    /// Print the generated reference of settings and metrics.
    Reference(reference::ReferenceOptions),
    /// Print the version.
    Version,
}

/// Runs the program with its arguments (the first is its name). What went wrong is on standard error: exit code 2 for what the
/// user wrote, 1 for what happened later.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match try_run(arguments) {
        Ok(code) => code,
        Err(CliError::Config(ConfigError::Usage(error))) => {
            // Help and version come this way too, on standard output and with code 0.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
        Err(error) => {
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "error: {error}");
            let mut said = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                // Most messages end in their cause already.
                let text = cause.to_string();
                if !said.contains(&text) {
                    let _ = writeln!(stderr, "  because: {text}");
                    said = text;
                }
                source = cause.source();
            }
            error.exit_code()
        }
    }
}

fn try_run(arguments: impl IntoIterator<Item = OsString>) -> Result<ExitCode, CliError> {
    let program = without_empty_variables(Cli::command());
    let matches = program
        .try_get_matches_from(arguments)
        .map_err(|error| ConfigError::from(Box::new(error)))?;
    let cli =
        Cli::from_arg_matches(&matches).map_err(|error| ConfigError::from(Box::new(error)))?;
    let _arguments_of_subcommand: Option<&ArgMatches> =
        matches.subcommand().map(|(_, matches)| matches);
    match cli.command {
        Command::Bench(args) => {
            bench::run(&args)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Health(options) => health::run(&options),
        Command::Reference(options) => reference::run(&options),
        Command::Version => version::run(),
    }
}
