//! The router.

use std::path::Path;

use super::expert::set_references;
use super::gates;
use super::models::base;
use super::prepare::{Examples, bad_lines, examples, preference_pairs};
use super::score::PAIRS_EXPECTED;
use super::session::{How, Rules, Session, required, setting};
use crate::checkpoint::{load_expert, write};
use crate::config::train::{RouterOptions as RouterSettings, RouterStage, Stage};
use crate::train::autograd::{Base, Router, RouterOptions};
use crate::train::data::{Encoder, Lines, PairLine, read_pairs};
use crate::train::{Pair, Report, TrainError, Watch};

/// Widest middle of a gate.
const HIDDEN_MAX: usize = 8192;

/// Trains the router on D_dual, base and experts frozen, after telling what fixed gates are worth there; writes `router.pth`,
/// `router.safetensors` and `router_folded.safetensors`.
///
/// # Errors
/// [`TrainError`] names the setting, file, line or step.
pub fn router(
    options: &RouterStage,
    how: How,
    watch: &mut Watch<'_>,
) -> Result<Report, TrainError> {
    let stage = Stage::Router;
    let data = required(stage, "data", &options.data.data, PAIRS_EXPECTED)?;
    let path = required(
        stage,
        "base",
        &options.base.base,
        "the base of both experts",
    )?;
    let expected = "a PEFT directory";
    let safety = required(stage, "safety", &options.experts.safety, expected)?;
    let helpfulness = required(stage, "helpfulness", &options.experts.helpfulness, expected)?;
    let settings = settings(&options.router, options.training.seed)?;
    let mut session = Session::begin(options, how, watch)?;
    let checkpoint = base(stage, Some(path))?;
    let safety = load_expert(safety, &checkpoint.config)?;
    let helpfulness = load_expert(helpfulness, &checkpoint.config)?;
    let encoder = Encoder::new(
        &checkpoint.text,
        &checkpoint.config,
        options.data.max_length,
    )?;
    let base = Base::new(&checkpoint)?;
    let mut router = Router::new(base.clone(), &safety, &helpfulness, settings)?;
    let threads = session.threads();
    let read = |file: &Path| -> Result<(Examples<Pair>, Lines<PairLine>), TrainError> {
        let lines = read_pairs(file, bad_lines(&options.data))?;
        let mut pairs = examples(file, &lines, &options.data, &threads, |line| {
            preference_pairs(&encoder, line, &[line.better])
        })?;
        set_references(&mut pairs.items, &base, &threads)?;
        Ok((pairs, lines))
    };
    let (pairs, lines) = read(data)?;
    session.note(&pairs.summary("pairs", data));
    let validated_on = match &options.training.validation {
        Some(file) => Some(read(file)?.0),
        None => None,
    };
    let table = gates::table(&router, &pairs, &lines.items, &threads)?;
    session.note(&table);
    let report = session.train(&mut router, &pairs, &options.training, Rules::default())?;
    if let Some(examples) = validated_on {
        session.validate(&router, &examples)?;
    }
    write::router(&session.output, &router.export())?;
    session.finish()?;
    Ok(report)
}

fn settings(router: &RouterSettings, seed: u64) -> Result<RouterOptions, TrainError> {
    if !(1..=HIDDEN_MAX).contains(&router.hidden) {
        let expected = format!("from 1 to {HIDDEN_MAX}");
        return Err(setting(Stage::Router, "hidden", expected, router.hidden));
    }
    for (key, value) in [
        ("weight_alpha", router.weight_alpha),
        ("weight_beta", router.weight_beta),
        ("beta_dpo", router.beta_dpo),
    ] {
        if !(value.is_finite() && value >= 0.0) {
            return Err(setting(Stage::Router, key, "a number of at least 0", value));
        }
    }
    Ok(RouterOptions {
        hidden: router.hidden,
        beta_dpo: router.beta_dpo,
        weight_alpha: router.weight_alpha,
        weight_beta: router.weight_beta,
        seed,
    })
}
