//! Head, log-softmax and choice of the target as one: log p(target) of each row. The logits never leave it, and what it keeps of
//! them is their softmax.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};

use super::math::{exp_row, max, scale};
use super::{output, read};

/// For each row whether its target has the largest logit; filled by the forward pass.
#[derive(Clone, Default)]
pub(in super::super) struct Hits(Arc<Mutex<Vec<bool>>>);

impl Hits {
    /// Of all rows.
    pub(in super::super) fn take(&self) -> Vec<bool> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, hits: Vec<bool>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = hits;
    }
}

struct TokenLogProbs {
    targets: Vec<usize>,
    hits: Option<Hits>,
    /// (rows, vocabulary), filled by a forward pass that will be followed by a backward one.
    softmax: Option<OnceLock<Vec<f32>>>,
}

/// x (k, d), head (vocabulary, d), targets (k) below the vocabulary: log p(target), (k).
pub(in super::super) fn token_log_probs(
    x: &Tensor,
    head: &Tensor,
    targets: Vec<usize>,
    hits: Option<Hits>,
) -> Result<Tensor> {
    let softmax = (x.track_op() || head.track_op()).then(OnceLock::new);
    x.apply_op2(
        head,
        TokenLogProbs {
            targets,
            hits,
            softmax,
        },
    )
}

impl TokenLogProbs {
    /// Logits to softmax in place; log p(target) and whether it is the largest.
    fn row(logits: &mut [f32], target: usize) -> Result<(f32, bool)> {
        let largest = max(logits);
        let wanted = logits.get(target).copied().ok_or_else(|| {
            let vocabulary = logits.len();
            Error::Msg(format!("token {target}: expected one below {vocabulary}"))
        })?;
        let total = exp_row(logits, largest);
        scale(logits, 1.0 / total);
        Ok((wanted - largest - total.ln(), wanted >= largest))
    }
}

impl CustomOp2 for TokenLogProbs {
    fn name(&self) -> &'static str {
        "token-log-probs"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        head: &CpuStorage,
        head_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (k, d) = x_layout.shape().dims2()?;
        let (vocabulary, _) = head_layout.shape().dims2()?;
        let transposed = head_layout.transpose(0, 1)?;
        let logits = x.matmul(head, (1, k, vocabulary, d), x_layout, &transposed)?;
        let CpuStorage::F32(mut logits) = logits else {
            return Err(Error::Msg("expected f32".to_owned()));
        };
        let mut log_probs = Vec::with_capacity(k);
        let mut hits = Vec::with_capacity(k);
        let rows = logits.chunks_exact_mut(vocabulary);
        for (row, target) in rows.zip(&self.targets) {
            let (log_prob, hit) = Self::row(row, *target)?;
            log_probs.push(log_prob);
            hits.push(hit);
        }
        if let Some(cell) = &self.hits {
            cell.put(hits);
        }
        if let Some(cell) = &self.softmax {
            // A second forward pass of the same node would save the same.
            let _ = cell.set(logits);
        }
        output(log_probs, k)
    }

    fn bwd(
        &self,
        x: &Tensor,
        head: &Tensor,
        _log_probs: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let softmax = self.softmax.as_ref().and_then(OnceLock::get);
        let softmax =
            softmax.ok_or_else(|| Error::Msg("log-probabilities: no forward pass".to_owned()))?;
        let (vocabulary, _) = head.dims2()?;
        // d log p(target) / d logits = onehot - softmax.
        let dlogits = read(d, |d| {
            let mut dlogits = Vec::with_capacity(softmax.len());
            let rows = softmax.chunks_exact(vocabulary).zip(&self.targets);
            for ((row, target), d) in rows.zip(d) {
                let at = dlogits.len() + target;
                dlogits.extend(row.iter().map(|p| -d * p));
                if let Some(wanted) = dlogits.get_mut(at) {
                    *wanted += d;
                }
            }
            dlogits
        })?;
        let dlogits = Tensor::from_vec(dlogits, (self.targets.len(), vocabulary), x.device())?;
        let dx = x.track_op().then(|| dlogits.matmul(&head.detach()));
        let dhead = head.track_op().then(|| dlogits.t()?.matmul(&x.detach()));
        Ok((dx.transpose()?, dhead.transpose()?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::Device;

    use super::super::check;
    use super::*;

    #[test]
    fn token_log_probs_are_candles_log_softmax_and_gather() {
        let inputs = [check::normal(1, &[4, 6]), check::normal(2, &[9, 6])];
        let targets = vec![8, 0, 3, 3];
        let op = |t: &[Tensor]| token_log_probs(&t[0], &t[1], targets.clone(), None).unwrap();
        let ids = Tensor::new(&[[8u32], [0], [3], [3]], &Device::Cpu).unwrap();
        let composed = |t: &[Tensor]| {
            let logits = t[0].matmul(&t[1].t().unwrap()).unwrap();
            let total = logits.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap();
            let log_probs = logits.broadcast_sub(&total).unwrap();
            log_probs.gather(&ids, 1).unwrap().squeeze(1).unwrap()
        };
        check::same_as(op, composed, &inputs, 3e-6);
        check::finite_differences(op, &inputs, 5e-3);
    }

    #[test]
    fn hits_say_which_targets_have_the_largest_logit() {
        let x = Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], &Device::Cpu).unwrap();
        let head = Tensor::new(&[[1f32, 0.0], [0.0, 1.0], [0.5, 0.5]], &Device::Cpu).unwrap();
        let hits = Hits::default();
        token_log_probs(&x, &head, vec![0, 2], Some(hits.clone())).unwrap();
        assert_eq!(hits.take(), [true, false]);
    }
}
