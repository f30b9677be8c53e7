//! Reward and cost models.

use std::path::Path;

use super::models::{base, text_files};
use super::prepare::{Examples, bad_lines, examples, score_pair};
use super::session::{How, Rules, Session, required};
use crate::checkpoint::{ScoreType, write};
use crate::config::train::{
    BaseModel, CostStage, DataOptions, LoopOptions, RewardStage, ScoreOptions, Stage, StageOptions,
};
use crate::train::autograd::{ScoreKind, ScoreModel};
use crate::train::data::{Encoder, PairLine, read_pairs};
use crate::train::{Report, ScorePair, TrainError, Watch};

/// What both have.
struct Parts<'o> {
    base: &'o BaseModel,
    score: &'o ScoreOptions,
    data: &'o DataOptions,
    training: &'o LoopOptions,
}

/// Trains R on which response is better, and writes a LlamaForScore directory.
///
/// # Errors
/// [`TrainError`] names the setting, file, line or step.
pub fn reward(
    options: &RewardStage,
    how: How,
    watch: &mut Watch<'_>,
) -> Result<Report, TrainError> {
    let parts = Parts {
        base: &options.base,
        score: &options.score,
        data: &options.data,
        training: &options.training,
    };
    train(options, &parts, ScoreKind::Reward, how, watch)
}

/// Trains C on which response is safer and which are safe, and writes a LlamaForScore directory.
///
/// # Errors
/// As [`reward`].
pub fn cost(options: &CostStage, how: How, watch: &mut Watch<'_>) -> Result<Report, TrainError> {
    let parts = Parts {
        base: &options.base,
        score: &options.score,
        data: &options.data,
        training: &options.training,
    };
    train(options, &parts, ScoreKind::Cost, how, watch)
}

fn train<S: StageOptions>(
    options: &S,
    parts: &Parts<'_>,
    kind: ScoreKind,
    how: How,
    watch: &mut Watch<'_>,
) -> Result<Report, TrainError> {
    let data = required(S::STAGE, "data", &parts.data.data, PAIRS_EXPECTED)?;
    let path = required(
        S::STAGE,
        "base",
        &parts.base.base,
        "the base whose trunk it is",
    )?;
    let mut session = Session::begin(options, how, watch)?;
    let checkpoint = base(S::STAGE, Some(path))?;
    let encoder = Encoder::new(&checkpoint.text, &checkpoint.config, parts.data.max_length)?;
    let trained_on = pairs(&session, data, parts.data, &encoder, kind)?;
    session.note(&trained_on.summary("pairs", data));
    let validated_on = match &parts.training.validation {
        Some(file) => Some(pairs(&session, file, parts.data, &encoder, kind)?),
        None => None,
    };
    let mut model = ScoreModel::from_checkpoint(&checkpoint, parts.score.layers, kind)?;
    let report = session.train(&mut model, &trained_on, parts.training, Rules::default())?;
    if let Some(examples) = validated_on {
        session.validate(&model, &examples)?;
    }
    let score_type = match kind {
        ScoreKind::Reward => ScoreType::Reward,
        ScoreKind::Cost => ScoreType::Cost,
    };
    write::score(
        &session.output,
        model.config(),
        &model.export(),
        score_type,
        session.dtype(),
        &text_files(path, &checkpoint)?,
    )?;
    session.finish()?;
    Ok(report)
}

/// What the data of every stage on pairs is.
pub(super) const PAIRS_EXPECTED: &str = "a JSONL file of pairs in PKU-SafeRLHF's schema";

fn pairs(
    session: &Session<'_, '_>,
    file: &Path,
    data: &DataOptions,
    encoder: &Encoder,
    kind: ScoreKind,
) -> Result<Examples<ScorePair>, TrainError> {
    let lines = read_pairs(file, bad_lines(data))?;
    let winner = |line: &PairLine| match kind {
        ScoreKind::Reward => line.better,
        ScoreKind::Cost => line.safer,
    };
    let threads = session.threads();
    examples(file, &lines, data, &threads, |line| {
        score_pair(encoder, line, winner(line))
    })
}

/// The stage that trains a kind of score model.
pub(super) fn stage_of(kind: ScoreKind) -> Stage {
    match kind {
        ScoreKind::Reward => Stage::Reward,
        ScoreKind::Cost => Stage::Cost,
    }
}
