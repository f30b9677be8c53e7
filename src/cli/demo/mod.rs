//! `midpo demo`: the corpus of the embedded demo, and all that is made of it.

mod ask;
mod build;
mod judge;
mod prepare;
mod recipe;
mod table;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::CliError;
use crate::demo::corpus::{self, Corpus, Written};
use recipe::DemoRecipe;

const EXAMPLES: &str = "\
Examples:
  midpo demo corpus --seed 1 --output corpus           prompts, answers and preferences as JSONL
  midpo demo build                                     corpus, tokenizer, base, reward, cost, experts, router, table
  midpo demo judge                                     the table alone, of the embedded model";

/// `midpo demo`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct DemoArgs {
    #[command(subcommand)]
    command: DemoCommand,
}

#[derive(Debug, Subcommand)]
enum DemoCommand {
    /// Write the corpus: training files in the schemas of `midpo train`, and held-out prompts with what is needed to judge answers.
    Corpus(CorpusArgs),
    /// Make a demo model of nothing: corpus, tokenizer, every stage of training, and a table of what each variant answers.
    ///
    /// The output is a pipeline of its own: `midpo train all --recipe OUTPUT/recipe.toml` runs it without evaluation. What is current
    /// is skipped.
    Build(BuildArgs),
    /// Answer held-out prompts with every variant, judge each answer by the words that the corpus has, and print shares.
    Judge(judge::JudgeArgs),
}

#[derive(Debug, Args)]
struct CorpusArgs {
    /// Of all that is drawn.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Directory of the files.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Take the number of lines from the recipe of a demo.
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct BuildArgs {
    /// The demo: its corpus, tokenizer, base, evaluation and training (demo/recipes).
    #[arg(long, value_name = "FILE", default_value = "demo/recipes/demo.toml")]
    recipe: PathBuf,
    /// Write here instead of `build/NAME`, by the recipe's name.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Threads; 0: all cores. Results do not depend on it.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Go on from the state that an interrupted stage has left.
    #[arg(long)]
    resume: bool,
}

/// Runs it.
///
/// # Errors
/// A recipe or a file that cannot be used; a stage that fails.
pub(super) fn run(args: &DemoArgs) -> Result<ExitCode, CliError> {
    match &args.command {
        DemoCommand::Corpus(args) => write_corpus(args)?,
        DemoCommand::Build(args) => build::run(args)?,
        DemoCommand::Judge(args) => judge::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn write_corpus(args: &CorpusArgs) -> Result<(), CliError> {
    let sizes = match &args.recipe {
        Some(file) => DemoRecipe::load(file)?.corpus,
        None => corpus::Sizes::default(),
    };
    let written = corpus::write(&Corpus::new()?, args.seed, &sizes, &args.output)?;
    for Written { path, rows } in written {
        say(&format!("{}: {rows} lines", path.display()))?;
    }
    Ok(())
}

fn say(text: &str) -> Result<(), CliError> {
    writeln!(std::io::stdout(), "{text}").map_err(CliError::io("standard output"))
}
