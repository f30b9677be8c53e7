//! The router's gates and what they weigh: (alpha, beta) = sigmoid(logits), u = [alpha * S h ; beta * H h] (MIDPO.md 1).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::math::{dot, sigmoid};
use super::{numbers, output, read2, read3};

struct Gates;

/// Logits without bias (n, 2), bias (2): alpha and beta of each row, (n, 2).
pub(in super::super) fn gates(logits: &Tensor, bias: &Tensor) -> Result<Tensor> {
    logits.apply_op2(bias, Gates)
}

impl CustomOp2 for Gates {
    fn name(&self) -> &'static str {
        "gates"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (logits, bias) = (numbers(logits, logits_layout)?, numbers(bias, bias_layout)?);
        let logits = logits.iter().zip(bias.iter().cycle());
        let gates = logits.map(|(logit, bias)| sigmoid(logit + bias)).collect();
        output(gates, logits_layout.shape().clone())
    }

    fn bwd(
        &self,
        logits: &Tensor,
        bias: &Tensor,
        gates: &Tensor,
        dgates: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dlogits, dbias) = read2(gates, dgates, |gates, dgates| {
            let slopes = gates
                .iter()
                .zip(dgates)
                .map(|(gate, d)| d * gate * (1.0 - gate));
            let dlogits: Vec<f32> = slopes.collect();
            let mut dbias = [0.0; 2];
            for (index, d) in dlogits.iter().enumerate() {
                dbias[index % 2] += d;
            }
            (dlogits, dbias)
        })?;
        let dlogits = Tensor::from_vec(dlogits, logits.shape(), logits.device())?;
        let dbias = bias.track_op().then(|| Tensor::new(&dbias, bias.device()));
        Ok((Some(dlogits), dbias.transpose()?))
    }
}

struct Mix;

/// [S h ; H h] (n, w) of both experts' ranks side by side, half of w each, and gates (n, 2): u (n, w).
pub(in super::super) fn mix(low: &Tensor, gates: &Tensor) -> Result<Tensor> {
    low.apply_op2(gates, Mix)
}

impl Mix {
    /// u or d[S h ; H h]: both are a product with the gates.
    fn weigh(low: &[f32], gates: &[f32], width: usize) -> Vec<f32> {
        let mut u = Vec::with_capacity(low.len());
        let experts = low.chunks_exact((width / 2).max(1));
        for (expert, gate) in experts.zip(gates) {
            u.extend(expert.iter().map(|x| x * gate));
        }
        u
    }
}

impl CustomOp2 for Mix {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn cpu_fwd(
        &self,
        low: &CpuStorage,
        low_layout: &Layout,
        gates: &CpuStorage,
        gates_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = low_layout.shape().dims2()?;
        let (low, gates) = (numbers(low, low_layout)?, numbers(gates, gates_layout)?);
        output(Self::weigh(low, gates, width), low_layout.shape().clone())
    }

    fn bwd(
        &self,
        low: &Tensor,
        gates: &Tensor,
        _u: &Tensor,
        du: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, width) = low.dims2()?;
        let half = (width / 2).max(1);
        let (wants_low, wants_gates) = (low.track_op(), gates.track_op());
        let (dlow, dgates) = read3(low, gates, du, |low, gates, du| {
            let dlow = wants_low.then(|| Self::weigh(du, gates, width));
            let experts = low.chunks_exact(half).zip(du.chunks_exact(half));
            let dgates: Vec<f32> = experts.map(|(low, du)| dot(low, du)).collect();
            (dlow, dgates)
        })?;
        let dlow = dlow.map(|dlow| Tensor::from_vec(dlow, low.shape(), low.device()));
        let dgates = wants_gates.then(|| Tensor::from_vec(dgates, gates.shape(), gates.device()));
        Ok((dlow.transpose()?, dgates.transpose()?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::check;
    use super::*;

    #[test]
    fn gates_are_sigmoids() {
        let inputs = [check::normal(1, &[5, 2]), check::normal(2, &[2])];
        let op = |t: &[Tensor]| gates(&t[0], &t[1]).unwrap();
        let composed = |t: &[Tensor]| {
            let logits = t[0].broadcast_add(&t[1]).unwrap();
            (logits.neg().unwrap().exp().unwrap() + 1.0)
                .unwrap()
                .recip()
                .unwrap()
        };
        check::same_as(op, composed, &inputs, 1e-6);
    }

    #[test]
    fn mix_weighs_each_expert_with_its_gate() {
        let inputs = [check::normal(1, &[5, 6]), check::normal(2, &[5, 2])];
        let op = |t: &[Tensor]| mix(&t[0], &t[1]).unwrap();
        let composed = |t: &[Tensor]| {
            let part = |index: usize| {
                let gate = t[1].narrow(1, index, 1).unwrap();
                t[0].narrow(1, 3 * index, 3)
                    .unwrap()
                    .broadcast_mul(&gate)
                    .unwrap()
            };
            Tensor::cat(&[part(0), part(1)], 1).unwrap()
        };
        check::same_as(op, composed, &inputs, 1e-6);
    }
}
