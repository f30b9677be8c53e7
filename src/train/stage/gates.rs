//! What fixed gates are worth on D_dual: whether a router has anything to learn (DEMO.md 6).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::prepare::{Examples, Threads};
use crate::train::autograd::{FixedGates, Router};
use crate::train::data::PairLine;
use crate::train::{Pair, TrainError};

/// (alpha, beta): one expert, the other, both.
const SETTINGS: [(f32, f32); 3] = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)];
/// Pairs measured at most, evenly taken: a standard error of a thirtieth of a standard deviation is enough to decide by.
const PAIRS_MAX: usize = 1024;
/// Pairs whose kind is not said.
const ALL: &str = "all";

/// Mean loss and Delta of every setting by kind of pair, as a table.
///
/// # Errors
/// Where the engine fails; [`TrainError::Stopped`].
pub(super) fn table(
    router: &Router,
    pairs: &Examples<Pair>,
    lines: &[PairLine],
    threads: &Threads<'_>,
) -> Result<String, TrainError> {
    let stride = pairs.items.len().div_ceil(PAIRS_MAX).max(1);
    let measured: Vec<usize> = (0..pairs.items.len()).step_by(stride).collect();
    let mut rows: BTreeMap<&str, Vec<Vec<FixedGates>>> = BTreeMap::new();
    for (index, (alpha, beta)) in SETTINGS.into_iter().enumerate() {
        let worth = threads.map(&measured, |at| match pairs.items.get(*at) {
            Some(pair) => router.fixed_gates(&[pair], alpha, beta),
            None => Ok(Vec::new()),
        })?;
        for (at, worth) in measured.iter().zip(worth) {
            let line = pairs.sources.get(*at).and_then(|at| lines.get(*at));
            let kind = line.and_then(|line| line.kind.as_deref());
            let mut names = vec![ALL];
            names.extend(kind.filter(|kind| *kind != ALL));
            for name in names {
                let settings = rows.entry(name).or_default();
                settings.resize(SETTINGS.len(), Vec::new());
                if let Some(setting) = settings.get_mut(index) {
                    setting.extend(&worth);
                }
            }
        }
    }
    Ok(text(&rows, measured.len()))
}

fn text(rows: &BTreeMap<&str, Vec<Vec<FixedGates>>>, measured: usize) -> String {
    let mut text = format!(
        "what fixed gates (alpha, beta) are worth on {measured} pairs: loss, mean Delta\n| kind | pairs |"
    );
    // Writing to a string cannot fail.
    for (alpha, beta) in SETTINGS {
        let _ = write!(text, " ({alpha:.0}, {beta:.0}) |");
    }
    text.push_str("\n| --- | --: |");
    text.push_str(&" --: |".repeat(SETTINGS.len()));
    for (kind, settings) in rows {
        let pairs = settings.first().map_or(0, Vec::len);
        let _ = write!(text, "\n| {kind} | {pairs} |");
        for worth in settings {
            let count = worth.len().max(1) as f64;
            let loss: f64 = worth.iter().map(|pair| pair.loss).sum();
            let delta: f64 = worth.iter().map(|pair| pair.delta).sum();
            let _ = write!(text, " {:.3}, {:.2} |", loss / count, delta / count);
        }
    }
    text
}
