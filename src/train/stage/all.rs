//! A whole pipeline: the stages of a recipe, but for those whose outputs are still what they would become.

use super::models::base;
use super::session::{How, Session, output_of, required};
use super::stamp::{self, Stamp};
use super::{cost, dpo, dual, helpfulness, reward, router, safety, sft};
use crate::checkpoint::{Overwrite, Sources, Verify, pack};
use crate::config::train::{PackStage, Recipe, Stage, StageOptions};
use crate::train::{TrainError, Watch, files};

/// How a pipeline runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllOptions {
    /// Go on from the state of the stage that was interrupted.
    pub resume: bool,
}

/// Runs the stages of a recipe in order.
///
/// # Errors
/// That of the first stage that fails; what came before it is kept.
pub fn all(recipe: &Recipe, options: AllOptions, watch: &mut Watch<'_>) -> Result<(), TrainError> {
    let how = How {
        resume: options.resume,
        // What a recipe's output holds of an earlier run is the recipe's.
        overwrite: true,
    };
    let stages: Vec<Stage> = recipe.stages().collect();
    for stage in stages {
        match stage {
            Stage::Sft => run(recipe, how, watch, sft)?,
            Stage::Reward => run(recipe, how, watch, reward)?,
            Stage::Cost => run(recipe, how, watch, cost)?,
            Stage::Safety => run(recipe, how, watch, safety)?,
            Stage::Helpfulness => run(recipe, how, watch, helpfulness)?,
            Stage::Dpo => run(recipe, how, watch, dpo)?,
            Stage::Dual => run(recipe, how, watch, dual)?,
            Stage::Router => run(recipe, how, watch, router)?,
            Stage::Pack => run(recipe, how, watch, packed)?,
        }
    }
    Ok(())
}

/// One stage, unless it need not run.
fn run<S: StageOptions, R>(
    recipe: &Recipe,
    how: How,
    watch: &mut Watch<'_>,
    stage: impl FnOnce(&S, How, &mut Watch<'_>) -> Result<R, TrainError>,
) -> Result<(), TrainError> {
    let options: S = recipe.stage()?;
    let output = output_of(S::STAGE, options.output())?;
    if stamp::exists(output) && Stamp::of(&options)?.is_of(output) {
        let text = format!("{}: {} is current, skipped", S::STAGE, output.display());
        watch.observer.note(&text);
        return Ok(());
    }
    stage(&options, how, watch).map(drop)
}

/// Base, experts and router in one directory to serve.
fn packed(options: &PackStage, how: How, watch: &mut Watch<'_>) -> Result<(), TrainError> {
    let stage = Stage::Pack;
    let path = required(stage, "base", &options.base.base, "the base")?;
    let sources = Sources {
        safety: options.experts.safety.clone(),
        helpfulness: options.experts.helpfulness.clone(),
        router: options.router.router.clone(),
        verify: Verify::default(),
        model: path.to_owned(),
    };
    let session = Session::begin(options, how, watch)?;
    if let Some(directory) = session.output.parent() {
        files::make_directory(directory)?;
    }
    pack(&sources, &session.output, Overwrite::Packed, None)?;
    // As it will be served.
    base(stage, Some(&session.output))?;
    session.finish()
}
