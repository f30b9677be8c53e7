//! How well a model foretells a text, and how far two of its forms (formats, backends) are from each other on it.
//!
//! As llama.cpp's `llama-perplexity`, so that figures compare: windows of equal length side by side, of each only the second half counts,
//! since a token with little before it says more about the cut than about the model.

use crate::backend::{Backend, BackendError, KvFormat, StepLayout, StepSequence, WeightFormat};
use crate::model::{ModelOptions, RoutedLlama};
use crate::types::{BLOCK_TOKENS, BlockId, GateOverride, TokenId};

/// A text cut into windows.
#[derive(Clone, Copy, Debug)]
pub struct Windows<'a> {
    /// Ids of the text, without a beginning-of-sequence token.
    pub tokens: &'a [TokenId],
    /// Tokens of a window; a rest that fills none is left out.
    pub context: usize,
    /// Goes before every window, where the model knows one.
    pub bos: Option<TokenId>,
}

impl Windows<'_> {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.context.max(1)
    }

    /// Tokens of a window that count.
    fn scored(&self) -> usize {
        self.context / 2
    }

    /// What a model needs that is to read them, one at a time.
    pub fn model_options(&self, kv_format: KvFormat, weight_format: WeightFormat) -> ModelOptions {
        let positions = self.context + usize::from(self.bos.is_some());
        ModelOptions {
            rows: positions,
            logit_rows: self.scored().max(1),
            sequences: 1,
            positions,
            kv_blocks: positions.div_ceil(BLOCK_TOKENS),
            kv_format,
            weight_format,
        }
    }

    /// The `index`-th window as it is fed, and the tokens to foretell from its last rows.
    fn get(&self, index: usize) -> (Vec<TokenId>, &[TokenId]) {
        let window = &self.tokens[index * self.context..][..self.context];
        let fed = self.bos.iter().chain(window).copied().collect();
        (fed, &window[self.context - self.scored()..])
    }
}

/// A mean over tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    count: usize,
    sum: f64,
    squares: f64,
    most: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.count += 1;
        self.sum += value;
        self.squares += value * value;
        self.most = self.most.max(value);
    }

    /// How many values.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The mean; NaN of none.
    pub fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }

    /// The largest value.
    pub fn most(&self) -> f64 {
        self.most
    }

    /// Standard error of the mean, taking values for independent; NaN of fewer than two.
    pub fn standard_error(&self) -> f64 {
        let count = self.count as f64;
        let variance = (self.squares / count - self.mean().powi(2)).max(0.0);
        (variance / (count - 1.0)).sqrt()
    }
}

/// What a text told about a model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    /// -log p(token), in nats.
    pub surprise: Mean,
}

impl Perplexity {
    /// exp of the mean surprise.
    pub fn value(&self) -> f64 {
        self.surprise.mean().exp()
    }

    /// Standard error of [`Self::value`], to first order.
    pub fn standard_error(&self) -> f64 {
        self.value() * self.surprise.standard_error()
    }
}

/// How far a model is from a reference, row by row of the same text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// |logits - reference's| / |reference's|, Euclidean norms of rows centred at 0: softmax does not see a row's mean.
    pub relative_error: Mean,
    /// KL(reference || model) of the next token's distribution, in nats.
    pub divergence: Mean,
    /// 1 where both have the same most likely token, else 0.
    pub same_top: Mean,
}

/// One model's reading of a text.
pub struct Reader<B: Backend> {
    model: RoutedLlama<B>,
    gates: GateOverride,
    blocks: Vec<BlockId>,
    /// What it has shown so far.
    pub perplexity: Perplexity,
}

impl<B: Backend> Reader<B> {
    /// `model` must have been made with [`Windows::model_options`]; `gates` rule all its tokens.
    pub fn new(model: RoutedLlama<B>, gates: GateOverride) -> Self {
        let blocks = u32::try_from(model.kv_shape().blocks).unwrap_or(u32::MAX);
        Self {
            model,
            gates,
            blocks: (0..blocks).map(BlockId::new).collect(),
            perplexity: Perplexity::default(),
        }
    }

    /// Reads the `index`-th window.
    ///
    /// # Errors
    /// A token that the model does not know, a failed step.
    ///
    /// # Panics
    /// When there is no such window.
    pub fn read(&mut self, windows: &Windows<'_>, index: usize) -> Result<Row<'_>, BackendError> {
        let (tokens, targets) = windows.get(index);
        // The row of a token foretells the one behind it.
        let last = tokens.len() - 1;
        let logit_rows: Vec<usize> = (last - targets.len()..last).collect();
        let sequences = [StepSequence {
            rows: tokens.len(),
            start: 0,
            block_table: &self.blocks,
            gates: self.gates,
        }];
        let vocabulary = self.model.vocabulary();
        let output = self.model.forward(&StepLayout {
            tokens: &tokens,
            sequences: &sequences,
            logit_rows: &logit_rows,
        })?;
        for (row, target) in output.logits.chunks_exact(vocabulary).zip(targets) {
            let target = row.get(target.index()).copied().unwrap_or(f32::NAN);
            let surprise = log_sum_exp(row) - f64::from(target);
            self.perplexity.surprise.add(surprise);
        }
        Ok(Row {
            logits: output.logits,
            vocabulary,
        })
    }
}

/// Logits of the rows of a window that count.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// (rows, vocabulary).
    pub logits: &'a [f32],
    /// Logits of a row.
    pub vocabulary: usize,
}

impl Distance {
    /// Adds the rows of a window that `reference` and a model have read. `reference`: its logits of them.
    pub fn add(&mut self, reference: &[f32], model: Row<'_>) {
        let rows = reference.chunks_exact(model.vocabulary);
        for (reference, model) in rows.zip(model.logits.chunks_exact(model.vocabulary)) {
            self.relative_error.add(relative_error(reference, model));
            self.divergence.add(divergence(reference, model));
            let same = top(reference) == top(model);
            self.same_top.add(f64::from(u8::from(same)));
        }
    }
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
    f64::from(most) + sum.ln()
}

fn top(row: &[f32]) -> Option<usize> {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]))
}

fn mean(row: &[f32]) -> f64 {
    row.iter().copied().map(f64::from).sum::<f64>() / row.len() as f64
}

fn relative_error(reference: &[f32], model: &[f32]) -> f64 {
    let (reference_mean, model_mean) = (mean(reference), mean(model));
    let (mut error, mut norm) = (0.0, 0.0);
    for (reference, model) in reference.iter().zip(model) {
        let reference = f64::from(*reference) - reference_mean;
        error += (f64::from(*model) - model_mean - reference).powi(2);
        norm += reference * reference;
    }
    (error / norm).sqrt()
}

fn divergence(reference: &[f32], model: &[f32]) -> f64 {
    let (reference_sum, model_sum) = (log_sum_exp(reference), log_sum_exp(model));
    let terms = reference.iter().zip(model).map(|(reference, model)| {
        let log_p = f64::from(*reference) - reference_sum;
        log_p.exp() * (log_p - (f64::from(*model) - model_sum))
    });
    // Rounding may leave a divergence of 0 a little below it.
    terms.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn ids(count: u32) -> Vec<TokenId> {
        (0..count).map(TokenId).collect()
    }

    #[test]
    fn windows_when_the_text_is_longer_leave_its_rest_out_and_count_second_halves() {
        let tokens = ids(11);
        let windows = Windows {
            tokens: &tokens,
            context: 4,
            bos: Some(TokenId(99)),
        };
        assert_eq!(windows.count(), 2);
        let (fed, targets) = windows.get(1);
        assert_eq!(fed, [99, 4, 5, 6, 7].map(TokenId));
        assert_eq!(targets, [6, 7].map(TokenId));
    }

    #[test]
    fn mean_of_known_values_has_their_standard_error() {
        let mut mean = Mean::default();
        [1.0, 2.0, 3.0, 4.0].into_iter().for_each(|x| mean.add(x));
        assert_eq!((mean.count(), mean.mean(), mean.most()), (4, 2.5, 4.0));
        // Sample deviation sqrt(5/3), over sqrt(4).
        assert!((mean.standard_error() - (5.0f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
    }

    #[test]
    fn divergence_of_known_distributions_is_theirs() {
        let logits = |p: [f32; 2]| p.map(f32::ln);
        let (p, q) = (logits([0.75, 0.25]), logits([0.5, 0.5]));
        let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-6);
        assert_eq!(divergence(&p, &p), 0.0);
    }

    #[test]
    fn relative_error_when_a_row_is_shifted_is_none_and_when_stretched_its_stretch() {
        let row = [1.0, -2.0, 4.0, 0.5];
        assert!(relative_error(&row, &row.map(|x| x + 3.0)) < 1e-6);
        assert!((relative_error(&row, &row.map(|x| x * 1.25)) - 0.25).abs() < 1e-6);
    }

    #[test]
    fn log_sum_exp_when_logits_are_huge_stays_finite() {
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2f64.ln())).abs() < 1e-9);
    }
}
