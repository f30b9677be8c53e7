//! The experts, by SPE-DPO (MIDPO.md 3), and plain DPO as what they are compared with.

use std::path::Path;
use std::sync::Arc;

use super::models::base;
use super::prepare::{Examples, Outcome, Threads, bad_lines, examples, preference_pairs};
use super::score::{PAIRS_EXPECTED, stage_of};
use super::session::{How, Rules, Session, required, setting};
use crate::checkpoint::{CheckpointError, write};
use crate::config::train::{
    BaseModel, DataOptions, DpoStage, ExpertOptions as ExpertSettings, HelpfulnessStage,
    LoopOptions, MarginOptions, PreferenceLoss, SafetyStage, Stage, StageOptions,
};
use crate::text::Message;
use crate::train::autograd::{Base, Expert, ExpertOptions, ScoreKind};
use crate::train::data::{Encoder, PairLine, read_pairs};
use crate::train::{Pair, Report, Scorer, TrainError, Watch};

/// Weight decay of the authors' experts.
const WEIGHT_DECAY: f64 = 0.01;
/// Pairs whose pi_ref a thread computes at once.
const AT_ONCE: usize = 4;

/// What every expert has.
struct Parts<'o> {
    base: &'o BaseModel,
    expert: &'o ExpertSettings,
    data: &'o DataOptions,
    training: &'o LoopOptions,
    margin: Option<Margin<'o>>,
}

/// Where margins come from.
struct Margin<'o> {
    kind: ScoreKind,
    directory: &'o Path,
    scale: f32,
}

/// Trains the safety expert on pairs of which exactly one response is safe, the safer winning, with the margin min(0, C(y_w) - C(y_l));
/// writes a PEFT directory.
///
/// # Errors
/// [`TrainError`] names the setting, file, line or step.
pub fn safety(
    options: &SafetyStage,
    how: How,
    watch: &mut Watch<'_>,
) -> Result<Report, TrainError> {
    let directory = options.cost.cost.as_deref();
    let parts = Parts {
        base: &options.base,
        expert: &options.expert,
        data: &options.data,
        training: &options.training,
        margin: margin(Stage::Safety, &options.margin, ScoreKind::Cost, directory)?,
    };
    train(options, &parts, how, watch, |line| match line.only_safe() {
        Some(_) => Ok(vec![line.safer]),
        None => Err("not exactly one response is safe"),
    })
}

/// Trains the helpfulness expert on all pairs, the better response winning, with the margin -max(0, R(y_w) - R(y_l)); writes a PEFT
/// directory.
///
/// # Errors
/// As [`safety`].
pub fn helpfulness(
    options: &HelpfulnessStage,
    how: How,
    watch: &mut Watch<'_>,
) -> Result<Report, TrainError> {
    let directory = options.reward.reward.as_deref();
    let parts = Parts {
        base: &options.base,
        expert: &options.expert,
        data: &options.data,
        training: &options.training,
        margin: margin(
            Stage::Helpfulness,
            &options.margin,
            ScoreKind::Reward,
            directory,
        )?,
    };
    train(options, &parts, how, watch, |line| Ok(vec![line.better]))
}

/// Trains one LoRA on both preferences without margins: every pair by its better response, and every pair with exactly one safe
/// response by its safer one; writes a PEFT directory.
///
/// # Errors
/// As [`safety`].
pub fn dpo(options: &DpoStage, how: How, watch: &mut Watch<'_>) -> Result<Report, TrainError> {
    let parts = Parts {
        base: &options.base,
        expert: &options.expert,
        data: &options.data,
        training: &options.training,
        margin: None,
    };
    train(options, &parts, how, watch, |line| {
        let mut winners = vec![line.better];
        if line.only_safe().is_some() {
            winners.extend(std::iter::repeat_n(line.safer, options.dpo.safety_repeats));
        }
        Ok(winners)
    })
}

fn margin<'o>(
    stage: Stage,
    options: &MarginOptions,
    kind: ScoreKind,
    directory: Option<&'o Path>,
) -> Result<Option<Margin<'o>>, TrainError> {
    if options.loss == PreferenceLoss::Dpo {
        return Ok(None);
    }
    let key = stage_of(kind).as_str();
    let expected = "the score model that margins come from, or `loss` dpo for none";
    let directory = directory.ok_or_else(|| setting(stage, key, expected, "none"))?;
    Ok(Some(Margin {
        kind,
        directory,
        scale: options.margin_scale,
    }))
}

/// `winners`: the responses that win, or why the line is dropped.
fn train<S: StageOptions>(
    options: &S,
    parts: &Parts<'_>,
    how: How,
    watch: &mut Watch<'_>,
    winners: impl Fn(&PairLine) -> Result<Vec<usize>, &'static str> + Sync,
) -> Result<Report, TrainError> {
    let data = required(S::STAGE, "data", &parts.data.data, PAIRS_EXPECTED)?;
    let path = required(
        S::STAGE,
        "base",
        &parts.base.base,
        "the base that it is an expert of",
    )?;
    let settings = settings(S::STAGE, parts)?;
    let mut session = Session::begin(options, how, watch)?;
    let checkpoint = base(S::STAGE, Some(path))?;
    let base = Base::new(&checkpoint)?;
    let source = Source {
        encoder: Encoder::new(&checkpoint.text, &checkpoint.config, parts.data.max_length)?,
        base: &base,
        data: parts.data,
        margin: parts.margin.as_ref(),
    };
    let pairs = source.pairs(data, &winners, &mut session)?;
    let validated_on = match &parts.training.validation {
        Some(file) => Some(source.pairs(file, &winners, &mut session)?),
        None => None,
    };
    let mut expert = Expert::new(base.clone(), settings)?;
    let rules = Rules {
        weight_decay: WEIGHT_DECAY,
        stop_delta: parts.expert.stop_delta,
    };
    let report = session.train(&mut expert, &pairs, parts.training, rules)?;
    if let Some(examples) = validated_on {
        session.validate(&expert, &examples)?;
    }
    let name = path.to_string_lossy();
    write::expert(&session.output, &name, &expert.export(), session.dtype())?;
    session.finish()?;
    Ok(report)
}

/// What pairs are made with.
struct Source<'o> {
    encoder: Encoder,
    base: &'o Arc<Base>,
    data: &'o DataOptions,
    margin: Option<&'o Margin<'o>>,
}

impl Source<'_> {
    /// The pairs of a file, with margins and pi_ref.
    fn pairs(
        &self,
        file: &Path,
        winners: &(impl Fn(&PairLine) -> Result<Vec<usize>, &'static str> + Sync),
        session: &mut Session<'_, '_>,
    ) -> Result<Examples<Pair>, TrainError> {
        let threads = session.threads();
        let lines = read_pairs(file, bad_lines(self.data))?;
        let mut pairs = examples(file, &lines, self.data, &threads, |line| {
            match winners(line) {
                Ok(winners) => preference_pairs(&self.encoder, line, &winners),
                Err(reason) => Ok(Outcome::Dropped(reason)),
            }
        })?;
        session.note(&pairs.summary("pairs", file));
        if let Some(margin) = self.margin {
            let text = set_margins(&mut pairs, &lines.items, margin, self.data, &threads)?;
            session.note(&text);
        }
        set_references(&mut pairs.items, self.base, &threads)?;
        Ok(pairs)
    }
}

fn settings(stage: Stage, parts: &Parts<'_>) -> Result<ExpertOptions, TrainError> {
    let expert = parts.expert;
    if !(1..=RANK_MAX).contains(&expert.rank) {
        let expected = format!("from 1 to {RANK_MAX}");
        return Err(setting(stage, "rank", expected, expert.rank));
    }
    for (key, value) in [
        ("alpha", expert.alpha),
        ("beta_dpo", expert.beta_dpo),
        ("anchor", expert.anchor),
    ] {
        if !(value.is_finite() && value >= 0.0) {
            return Err(setting(stage, key, "a number of at least 0", value));
        }
    }
    Ok(ExpertOptions {
        rank: expert.rank,
        alpha: expert.alpha,
        beta_dpo: expert.beta_dpo,
        anchor: expert.anchor,
        seed: parts.training.seed,
    })
}

/// Far beyond what pays.
const RANK_MAX: usize = 1024;

/// Gives every pair its clamped margin, once; tells their mean.
fn set_margins(
    pairs: &mut Examples<Pair>,
    lines: &[PairLine],
    margin: &Margin<'_>,
    data: &DataOptions,
    threads: &Threads<'_>,
) -> Result<String, TrainError> {
    let scorer = Scorer::open(margin.directory, data.max_length, 1)?;
    expect_kind(margin.directory, margin.kind, &scorer)?;
    let used: Vec<&PairLine> = pairs
        .sources
        .iter()
        .filter_map(|at| lines.get(*at))
        .collect();
    let scores = threads.map(&used, |line| score_both(&scorer, line))?;
    let (mut sum, mut none) = (0.0, 0);
    for ((pair, line), scores) in pairs.items.iter_mut().zip(used).zip(scores) {
        let (winner, loser) = match margin.kind {
            ScoreKind::Cost => (line.safer, 1 - line.safer),
            ScoreKind::Reward => (line.better, 1 - line.better),
        };
        let of = |index: usize| scores.get(index).copied().unwrap_or_default();
        let ahead = of(winner) - of(loser);
        let clamped = match margin.kind {
            ScoreKind::Cost => ahead.min(0.0),
            ScoreKind::Reward => -ahead.max(0.0),
        };
        pair.margin = margin.scale * clamped;
        sum += f64::from(clamped);
        none += usize::from(clamped == 0.0);
    }
    let mean = sum / pairs.items.len().max(1) as f64;
    Ok(format!(
        "margins by {}: mean {mean:.3}, times {}; 0 since the score disagrees with the label: {none}",
        margin.directory.display(),
        margin.scale
    ))
}

/// A reward model where a cost model should be would turn every margin around.
///
/// # Errors
/// [`TrainError::Checkpoint`] names the directory's config.json.
pub(super) fn expect_kind(
    directory: &Path,
    kind: ScoreKind,
    scorer: &Scorer,
) -> Result<(), TrainError> {
    if scorer.kind() == kind {
        return Ok(());
    }
    Err(CheckpointError::Value {
        file: directory.join("config.json"),
        key: "score_type".to_owned(),
        expected: format!("{:?}", stage_of(kind).as_str()),
        found: format!("{:?}", stage_of(scorer.kind()).as_str()),
    }
    .into())
}

/// Scores of both responses, on the thread that calls.
pub(super) fn score_both(scorer: &Scorer, line: &PairLine) -> Result<Vec<f32>, TrainError> {
    let prompt: &[Message] = &line.prompt;
    let [first, second] = &line.responses;
    scorer.score_here(&[(prompt, first), (prompt, second)])
}

/// Gives every pair pi_ref's sums, once.
pub(super) fn set_references(
    pairs: &mut [Pair],
    base: &Arc<Base>,
    threads: &Threads<'_>,
) -> Result<(), TrainError> {
    let parts: Vec<&[Pair]> = pairs.chunks(AT_ONCE).collect();
    let sums = threads.map(&parts, |part| {
        let part: Vec<&Pair> = part.iter().collect();
        base.reference_logps(&part)
    })?;
    for (pair, sums) in pairs.iter_mut().zip(sums.into_iter().flatten()) {
        pair.reference = Some(sums);
    }
    Ok(())
}
