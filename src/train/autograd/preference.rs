//! What SPE-DPO and the router's loss share (MIDPO.md 3): Delta from log-probabilities, -log sigmoid, and how both move with each
//! log-probability. Sums are taken in f64.

use std::ops::Range;

use super::batch::{Batch, Last};
use crate::checkpoint::LlamaConfig;
use crate::train::{Pair, TrainError};

/// beta_DPO of the paper.
pub(super) const BETA_DPO: f32 = 0.1;

/// Which tokens of the better answer count besides those of Delta.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    /// None.
    None,
    /// All of the answer.
    Answer,
}

/// Pairs as one batch: better, worse, better, worse, ...
pub(super) struct PairBatch {
    /// All sequences.
    pub batch: Batch,
    /// One a pair.
    pub spans: Vec<Span>,
}

/// Where a pair's log-probabilities are.
pub(super) struct Span {
    /// Those of y_w that Delta sums.
    better: Range<usize>,
    /// Those of y_l that Delta sums.
    worse: Range<usize>,
    /// Those of all of y_w, for the anchor.
    answer: Range<usize>,
}

impl PairBatch {
    pub(super) fn new(
        pairs: &[&Pair],
        anchor: Anchor,
        last: Last,
        config: &LlamaConfig,
    ) -> Result<Self, TrainError> {
        let mut batch = Batch::default();
        let mut spans = Vec::with_capacity(pairs.len());
        for pair in pairs {
            let from = match anchor {
                Anchor::None => pair.first_difference,
                Anchor::Answer => pair.first_difference.min(pair.better.answer),
            };
            let answer = batch.push(&pair.better, from, last, config)?;
            let skipped = pair.first_difference.max(1) - from.max(1);
            let better = (answer.start + skipped).min(answer.end)..answer.end;
            let worse = batch.push(&pair.worse, pair.first_difference, last, config)?;
            spans.push(Span {
                better,
                worse,
                answer,
            });
        }
        Ok(Self { batch, spans })
    }
}

impl Span {
    /// Summed log-probabilities of (y_w, y_l).
    pub(super) fn sums(&self, log_probs: &[f32]) -> (f64, f64) {
        let sum = |range: &Range<usize>| {
            let values = log_probs.get(range.clone()).unwrap_or_default();
            values.iter().map(|x| f64::from(*x)).sum::<f64>()
        };
        (sum(&self.better), sum(&self.worse))
    }

    /// Mean log-probability of a token of y_w; 0 of none.
    fn anchor(&self, log_probs: &[f32]) -> f64 {
        let values = log_probs.get(self.answer.clone()).unwrap_or_default();
        let sum: f64 = values.iter().map(|x| f64::from(*x)).sum();
        sum / values.len().max(1) as f64
    }
}

/// beta_DPO, and the weight of -log p(y_w) per token.
#[derive(Clone, Copy)]
pub(super) struct Loss {
    /// Of Delta.
    pub beta_dpo: f64,
    /// 0: the paper's.
    pub anchor: f64,
}

/// Sums over pairs.
#[derive(Default)]
pub(super) struct Preference {
    /// -log sigmoid, without the anchor.
    pub dpo: f64,
    /// With it.
    pub loss: f64,
    /// Delta.
    pub delta: f64,
    /// Delta > 0.
    pub right: f64,
    /// d loss / d log-probability.
    pub slopes: Vec<f64>,
}

impl Loss {
    /// -log sigmoid(beta_DPO * Delta + margin), of one pair.
    pub(super) fn dpo(self, delta: f64, margin: f32) -> f64 {
        softplus(-(self.beta_dpo * delta + f64::from(margin)))
    }

    /// Over pairs, given pi_ref's sums; `margin` of each.
    pub(super) fn of(
        self,
        log_probs: &[f32],
        spans: &[Span],
        references: &[(f32, f32)],
        margins: impl Iterator<Item = f32>,
    ) -> Preference {
        let mut result = Preference {
            slopes: vec![0.0; log_probs.len()],
            ..Preference::default()
        };
        for ((span, reference), margin) in spans.iter().zip(references).zip(margins) {
            let delta = delta(span.sums(log_probs), *reference);
            let dpo = self.dpo(delta, margin);
            result.dpo += dpo;
            result.loss += dpo - self.anchor * span.anchor(log_probs);
            result.delta += delta;
            result.right += f64::from(u8::from(delta > 0.0));
            // d softplus(-z) / dz = -sigmoid(-z).
            let slope = -self.beta_dpo * sigmoid(-(self.beta_dpo * delta + f64::from(margin)));
            let anchor = -self.anchor / span.answer.len().max(1) as f64;
            for (range, slope) in [
                (&span.better, slope),
                (&span.worse, -slope),
                (&span.answer, anchor),
            ] {
                for value in result.slopes.get_mut(range.clone()).unwrap_or_default() {
                    *value += slope;
                }
            }
        }
        result
    }
}

/// Delta of MIDPO.md 3 from the sums of (y_w, y_l) under pi and pi_ref.
pub(super) fn delta(policy: (f64, f64), reference: (f32, f32)) -> f64 {
    (policy.0 - f64::from(reference.0)) - (policy.1 - f64::from(reference.1))
}

/// log(1 + e^x) = -log sigmoid(-x).
pub(super) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// 1 / (1 + e^-x).
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
