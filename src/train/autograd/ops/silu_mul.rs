//! h = silu(g) * u, of g and u side by side.

use super::math::{sigmoid, simd};

/// [g ; u] (n, 2m): (n, m).
pub(in super::super) fn silu_mul(gate_up: &[f32], m: usize) -> Vec<f32> {
    let mut h = vec![0.0; gate_up.len() / 2];
    let m = m.max(1);
    simd(
        #[inline(always)]
        || {
            for (row, h) in gate_up.chunks_exact(2 * m).zip(h.chunks_exact_mut(m)) {
                let (g, u) = row.split_at(m);
                for ((h, g), u) in h.iter_mut().zip(g).zip(u) {
                    *h = g * sigmoid(*g) * u;
                }
            }
        },
    );
    h
}

/// d[g ; u] (n, 2m) in place of [g ; u], from dh (n, m).
pub(in super::super) fn silu_mul_backward(gate_up: &mut [f32], dh: &[f32], m: usize) {
    let m = m.max(1);
    simd(
        #[inline(always)]
        || {
            for (row, dh) in gate_up.chunks_exact_mut(2 * m).zip(dh.chunks_exact(m)) {
                let (g, u) = row.split_at_mut(m);
                for ((g, u), dh) in g.iter_mut().zip(u).zip(dh) {
                    let s = sigmoid(*g);
                    let (silu, slope) = (*g * s, s * (1.0 + *g * (1.0 - s)));
                    *g = dh * *u * slope;
                    *u = dh * silu;
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::check;
    use super::*;

    #[test]
    fn silu_mul_is_the_composition_of_candles_ops() {
        check::same_as(
            &[&[3, 14]],
            |inputs| silu_mul(&inputs[0], 7),
            |inputs, dy| {
                let mut d = inputs[0].clone();
                silu_mul_backward(&mut d, dy, 7);
                vec![d]
            },
            |t| {
                let (g, u) = (t[0].narrow(1, 0, 7).unwrap(), t[0].narrow(1, 7, 7).unwrap());
                (g.silu().unwrap() * u).unwrap()
            },
            2e-6,
        );
    }
}
