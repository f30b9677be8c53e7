//! `midpo demo build`: from nothing to a model that is packed and measured.

use std::path::{Path, PathBuf};

use super::BuildArgs;
use super::judge::{self, JudgeArgs};
use super::prepare::{self, HELD_OUT};
use super::recipe::DemoRecipe;
use crate::cli::{CliError, train};
use crate::config::train::AllFlags;

/// Where demos are built, unless it is said.
const BUILD: &str = "build";

/// Runs it.
///
/// # Errors
/// A recipe or a file that cannot be used; a stage that fails.
pub(super) fn run(args: &BuildArgs) -> Result<(), CliError> {
    let recipe = DemoRecipe::load(&args.recipe)?;
    let name = args.recipe.file_stem().unwrap_or_default();
    let by_name = || Path::new(BUILD).join(name);
    let output: PathBuf = args.output.clone().unwrap_or_else(by_name);
    let flags = AllFlags {
        recipe: prepare::prepare(&recipe, &output)?,
        output: None,
        threads: args.threads,
        resume: args.resume,
    };
    train::run_all(&flags)?;
    let stage = |name| output.join(recipe.output_of(name));
    let evaluation = &recipe.evaluation;
    let routers = evaluation.routers.iter();
    judge::run(&JudgeArgs {
        model: Some(stage("pack")),
        base: Some(stage("sft")),
        dpo: recipe.train.contains_key("dpo").then(|| stage("dpo")),
        router: routers.map(|router| output.join(router)).collect(),
        prompts: Some(output.join(HELD_OUT)),
        seeds: evaluation.seeds.clone(),
        temperature: evaluation.temperature,
        max_tokens: evaluation.max_tokens,
        threads: args.threads,
        answers: Some(output.join("answers.jsonl")),
        output: Some(output.join("table.md")),
    })
}
