//! The router's gates and what they weigh: (alpha, beta) = sigmoid(logits), u = [alpha * S h ; beta * H h] (MIDPO.md 1).

use super::math::{dot, sigmoid};

/// Logits (n, 2) without bias, bias (2): alpha and beta of each row, in place.
pub(in super::super) fn gates(logits: &mut [f32], bias: &[f32]) {
    for (logit, bias) in logits.iter_mut().zip(bias.iter().cycle()) {
        *logit = sigmoid(*logit + bias);
    }
}

/// d logits (n, 2) in place of d gates; dbias (2) += theirs.
pub(in super::super) fn gates_backward(gates: &[f32], d: &mut [f32], dbias: &mut [f32]) {
    for (row, d) in gates.chunks_exact(2).zip(d.chunks_exact_mut(2)) {
        for ((gate, d), dbias) in row.iter().zip(d).zip(dbias.iter_mut()) {
            *d *= gate * (1.0 - gate);
            *dbias += *d;
        }
    }
}

/// [S h ; H h] (n, w) of both experts' ranks side by side, half of w each, and gates (n, 2): u (n, w).
pub(in super::super) fn mix(low: &[f32], gates: &[f32], width: usize) -> Vec<f32> {
    let mut u = Vec::with_capacity(low.len());
    let experts = low.chunks_exact((width / 2).max(1));
    for (expert, gate) in experts.zip(gates) {
        u.extend(expert.iter().map(|x| x * gate));
    }
    u
}

/// d[S h ; H h] in place of du (n, w); returns d gates (n, 2).
pub(in super::super) fn mix_backward(
    low: &[f32],
    gates: &[f32],
    du: &mut [f32],
    width: usize,
) -> Vec<f32> {
    let half = (width / 2).max(1);
    let mut dgates = Vec::with_capacity(gates.len());
    for ((low, gate), du) in low
        .chunks_exact(half)
        .zip(gates)
        .zip(du.chunks_exact_mut(half))
    {
        dgates.push(dot(low, du));
        for du in du {
            *du *= gate;
        }
    }
    dgates
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::Tensor;

    use super::super::check;
    use super::*;

    #[test]
    fn gates_are_sigmoids() {
        let forward = |inputs: &[Vec<f32>]| {
            let mut values = inputs[0].clone();
            gates(&mut values, &inputs[1]);
            values
        };
        check::same_as(
            &[&[5, 2], &[2]],
            forward,
            |inputs, dy| {
                let (mut d, mut dbias) = (dy.to_vec(), vec![0.0; 2]);
                gates_backward(&forward(inputs), &mut d, &mut dbias);
                vec![d, dbias]
            },
            |t| {
                let logits = t[0].broadcast_add(&t[1]).unwrap();
                (logits.neg().unwrap().exp().unwrap() + 1.0)
                    .unwrap()
                    .recip()
                    .unwrap()
            },
            1e-6,
        );
    }

    #[test]
    fn mix_weighs_each_expert_with_its_gate() {
        check::same_as(
            &[&[5, 6], &[5, 2]],
            |inputs| mix(&inputs[0], &inputs[1], 6),
            |inputs, dy| {
                let mut d = dy.to_vec();
                let dgates = mix_backward(&inputs[0], &inputs[1], &mut d, 6);
                vec![d, dgates]
            },
            |t| {
                let part = |index: usize| {
                    let gate = t[1].narrow(1, index, 1).unwrap();
                    t[0].narrow(1, 3 * index, 3)
                        .unwrap()
                        .broadcast_mul(&gate)
                        .unwrap()
                };
                Tensor::cat(&[part(0), part(1)], 1).unwrap()
            },
            1e-6,
        );
    }
}
