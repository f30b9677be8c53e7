//! The command line: one file a subcommand. It builds the objects and joins them; what they do is theirs.

mod bench;
mod chat;
mod convert;
mod demo;
mod engine;
mod error;
mod eval;
mod health;
mod logging;
mod memory;
mod pairs;
mod perplexity;
pub mod reference;
mod serve;
mod train;
mod version;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{
    ChatOptions, ConfigError, ConvertOptions, HealthOptions, ServeOptions, Sources,
    without_empty_variables,
};

pub use error::CliError;

const EXAMPLES: &str = "\
Examples:
  midpo serve                                          the embedded demo on http://127.0.0.1:8000
  midpo serve --model Llama-2-7b --safety S --helpfulness H --router router.pth
  midpo serve --model model.gguf --port 0              a plain Llama, on a port that the system chooses
  midpo chat                                           talk to the embedded demo in the terminal
  midpo convert --model BASE --safety S --helpfulness H --router router.pth --output packed
  midpo pairs --model model.gguf --prompts sets/ --output pairs.jsonl     preference pairs of a base's own answers
  midpo train all --recipe recipe.toml                 base, reward, cost, experts, router: a pipeline from your own pairs
  midpo eval --model packed --prompts sets/            how safe and helpful each variant is, as tables and a picture
  midpo bench --concurrency 1,8,32 --svg sweep.svg     load on a running server, as a table and a picture
  midpo perplexity --model BASE --text FILE --dtype q4_0 --against f32    what four bits cost
  midpo reference toml > midpo.toml                    every setting with its default

Every flag is also a key of a TOML file (--config FILE) and an environment variable MIDPO_*.
A flag beats the environment, the environment the file, the file the default.";

const SERVE_EXAMPLES: &str = "\
Examples:
  midpo serve
  midpo serve --model Llama-2-7b --safety S --helpfulness H --router router.pth
  midpo serve --model model.gguf --host 0.0.0.0 --api-key-file keys.toml
  midpo serve --model packed --max-model-len 4096 --kv-cache-bytes 4GiB
  midpo serve --model packed --check                   how much memory that takes
  MIDPO_PORT=8080 midpo serve --config midpo.toml

Then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"midpo-demo\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'";

const CHAT_EXAMPLES: &str = "\
Examples:
  midpo chat --gates                                   the embedded demo, and what its gates did
  midpo chat --model packed --variant safety
  midpo chat --url http://127.0.0.1:8000
  echo 'What is the capital of France?' | midpo chat --model model.gguf --temperature 0";

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
    /// Serve a model over HTTP; without --model, the embedded demo.
    ///
    /// Speaks OpenAI's API at /v1. The first line on standard output is `listening on http://HOST:PORT`; logs go to standard
    /// error. After SIGTERM or SIGINT nothing new is taken, what runs may finish within --drain-timeout, and the exit code is 0.
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Box<ServeOptions>),
    /// Talk to a model in the terminal.
    ///
    /// With the embedded demo, with a model in this process (--model), or with any OpenAI-compatible server (--url). Reads one
    /// turn a line, so it works in a pipe, too. /help lists its commands.
    #[command(after_help = CHAT_EXAMPLES)]
    Chat(Box<ChatOptions>),
    /// Pack a base, its experts and its router into one directory.
    ///
    /// The router is folded (to one vector a gate), every part is hashed, and `midpo serve --model DIR` loads the directory alone.
    Convert(Box<ConvertOptions>),
    /// Train what is served: a base, reward and cost models, both experts, the router.
    ///
    /// One stage a subcommand, on one's own pairs, or all of them from a recipe. Ctrl-C saves a state; --resume goes on from it to
    /// the same result.
    Train(train::TrainArgs),
    /// Make preference pairs from prompts: the base itself answers each in several voices.
    ///
    /// One voice refuses and says why, one helps, one is unguarded, and so on; a judge drops answers that are not what their voice is
    /// for. The class of each prompt and the voices say which answer is better, which safer and which safe.
    Pairs(Box<pairs::PairsArgs>),
    /// Make the embedded demo: its corpus, and from it tokenizer, base, experts and router.
    Demo(demo::DemoArgs),
    /// Evaluate a model's variants on sets of prompts.
    ///
    /// All variants answer in one pass of the engine. Refusals by class of prompt, reward and cost, what the gates did and how well
    /// alpha tells harmful prompts apart, with 95 % intervals. Prints tables in Markdown; writes JSON, SVG and all answers where asked.
    Eval(Box<eval::EvalArgs>),
    /// Measure a server under load.
    ///
    /// Any server that speaks OpenAI's API. Prints a table in Markdown; writes JSON and SVG where asked.
    Bench(Box<bench::BenchArgs>),
    /// Measure how well a model foretells a text, and what a format of its weights costs.
    ///
    /// As llama.cpp's llama-perplexity: windows side by side, the second half of each counts. With --against, two formats of the same
    /// model are compared token by token.
    Perplexity(Box<perplexity::PerplexityArgs>),
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

fn program() -> clap::Command {
    // Between the lines of a conversation only what needs the user's attention is logged.
    Cli::command().mut_subcommand("chat", |chat| {
        chat.mut_arg("log_level", |arg| arg.default_value("warn"))
    })
}

fn try_run(arguments: impl IntoIterator<Item = OsString>) -> Result<ExitCode, CliError> {
    let usage = |error| ConfigError::from(Box::new(error));
    let program = without_empty_variables(program());
    let matches = program
        .clone()
        .try_get_matches_from(arguments)
        .map_err(usage)?;
    let cli = Cli::from_arg_matches(&matches).map_err(usage)?;
    // There is one: clap has refused a command line without.
    let arguments = matches
        .subcommand()
        .map_or(&matches, |(_, matches)| matches);
    let sources = || Sources::new(&program, arguments, cli.config.as_deref());
    match cli.command {
        Command::Serve(options) => serve::run(&options.load(&sources()?)?),
        Command::Chat(_) => chat::run(&ChatOptions::load(&sources()?)?),
        Command::Convert(options) => convert::run(&options.load(&sources()?)?),
        Command::Train(args) => train::run(&args, arguments),
        Command::Demo(args) => demo::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Pairs(args) => pairs::run(&args),
        Command::Bench(args) => {
            bench::run(&args)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Health(options) => health::run(&options),
        Command::Reference(options) => reference::run(&options),
        Command::Version => version::run(),
    }
}
