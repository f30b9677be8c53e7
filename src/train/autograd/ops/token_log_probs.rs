//! Head, log-softmax and choice of the target as one: log p(target) of each row. Of the logits only their softmax is kept.

use super::math::{exp_row, max, scale, simd};
use super::matrix::{add_product, add_weight_gradient, linear};

/// What the head says of each row.
pub(in super::super) struct TokenLogProbs {
    /// log p(target), (k).
    pub log_probs: Vec<f32>,
    /// Whether the target has the largest logit, (k).
    pub hits: Vec<bool>,
    /// (k, vocabulary).
    softmax: Vec<f32>,
    targets: Vec<usize>,
}

/// x (k, d), head (vocabulary, d), targets (k) below the vocabulary.
pub(in super::super) fn token_log_probs(
    x: &[f32],
    head: &[f32],
    d: usize,
    targets: Vec<usize>,
) -> TokenLogProbs {
    let vocabulary = (head.len() / d.max(1)).max(1);
    let mut softmax = linear(x, head, d);
    let (mut log_probs, mut hits) = (Vec::new(), Vec::new());
    for (row, target) in softmax.chunks_exact_mut(vocabulary).zip(&targets) {
        let wanted = row.get(*target).copied().unwrap_or(f32::NEG_INFINITY);
        let (largest, total) = simd(
            #[inline(always)]
            || {
                let largest = max(row);
                let total = exp_row(row, largest);
                scale(row, 1.0 / total);
                (largest, total)
            },
        );
        log_probs.push(wanted - largest - total.ln());
        hits.push(wanted >= largest);
    }
    TokenLogProbs {
        log_probs,
        hits,
        softmax,
        targets,
    }
}

impl TokenLogProbs {
    /// From `slopes` (k), d loss / d log p: dx (k, d); dhead += the head's gradient, where it is wanted.
    pub(in super::super) fn backward(
        self,
        x: &[f32],
        head: &[f32],
        d: usize,
        slopes: &[f32],
        dhead: Option<&mut [f32]>,
    ) -> Vec<f32> {
        // A pair that is told apart for good moves nothing, and its slope times a probability would be subnormal.
        const SLOPE_LEAST: f32 = 1e-16;
        let vocabulary = (head.len() / d.max(1)).max(1);
        let mut dlogits = self.softmax;
        // d log p(target) / d logits = onehot - softmax.
        for ((row, target), slope) in dlogits
            .chunks_exact_mut(vocabulary)
            .zip(self.targets)
            .zip(slopes)
        {
            let slope = if slope.abs() < SLOPE_LEAST {
                0.0
            } else {
                *slope
            };
            simd(
                #[inline(always)]
                || scale(row, -slope),
            );
            if let Some(wanted) = row.get_mut(target) {
                *wanted += slope;
            }
        }
        let mut dx = vec![0.0; x.len()];
        add_product(&mut dx, 1.0, &dlogits, head, d);
        if let Some(dhead) = dhead {
            add_weight_gradient(dhead, 1.0, &dlogits, x, d);
        }
        dx
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::{Device, Tensor};

    use super::super::check;
    use super::*;

    #[test]
    fn token_log_probs_are_candles_log_softmax_and_gather() {
        let forward =
            |inputs: &[Vec<f32>]| token_log_probs(&inputs[0], &inputs[1], 6, vec![8, 0, 3, 3]);
        let ids = Tensor::new(&[[8u32], [0], [3], [3]], &Device::Cpu).unwrap();
        check::same_as(
            &[&[4, 6], &[9, 6]],
            |inputs| forward(inputs).log_probs,
            |inputs, dy| {
                let mut dhead = vec![0.0; 54];
                let dx = forward(inputs).backward(&inputs[0], &inputs[1], 6, dy, Some(&mut dhead));
                vec![dx, dhead]
            },
            |t| {
                let logits = t[0].matmul(&t[1].t().unwrap()).unwrap();
                let total = logits.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap();
                let log_probs = logits.broadcast_sub(&total).unwrap();
                log_probs.gather(&ids, 1).unwrap().squeeze(1).unwrap()
            },
            4e-6,
        );
    }

    #[test]
    fn hits_say_which_targets_have_the_largest_logit() {
        let head = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5];
        let found = token_log_probs(&[1.0, 0.0, 0.0, 1.0], &head, 2, vec![0, 2]);
        assert_eq!(found.hits, [true, false]);
    }
}
