//! h = silu(g) * u, of g and u side by side.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::math::sigmoid;
use super::{numbers, output, read2};

struct SiluMul;

/// [g ; u] (n, 2m): (n, m).
pub(in super::super) fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.apply_op1(SiluMul)
}

impl CustomOp1 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, width) = layout.shape().dims2()?;
        let m = width / 2;
        let gate_up = numbers(storage, layout)?;
        let mut h = vec![0.0; n * m];
        for (row, h) in gate_up.chunks_exact(width).zip(h.chunks_exact_mut(m)) {
            let (g, u) = row.split_at(m);
            for ((h, g), u) in h.iter_mut().zip(g).zip(u) {
                *h = g * sigmoid(*g) * u;
            }
        }
        output(h, (n, m))
    }

    fn bwd(&self, gate_up: &Tensor, _h: &Tensor, dh: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = gate_up.dims2()?;
        let m = width / 2;
        let d = read2(gate_up, dh, |gate_up, dh| {
            let mut d = vec![0.0; gate_up.len()];
            let rows = gate_up.chunks_exact(width).zip(dh.chunks_exact(m));
            for ((row, dh), d) in rows.zip(d.chunks_exact_mut(width)) {
                let (g, u) = row.split_at(m);
                let (dg, du) = d.split_at_mut(m);
                for ((((g, u), dh), dg), du) in g.iter().zip(u).zip(dh).zip(dg).zip(du) {
                    let s = sigmoid(*g);
                    *du = dh * g * s;
                    *dg = dh * u * s * (1.0 + g * (1.0 - s));
                }
            }
            d
        })?;
        Tensor::from_vec(d, gate_up.shape(), gate_up.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::check;
    use super::*;

    #[test]
    fn silu_mul_is_the_composition_of_candles_ops() {
        let inputs = [check::normal(1, &[3, 14])];
        let op = |t: &[Tensor]| silu_mul(&t[0]).unwrap();
        let composed = |t: &[Tensor]| {
            let (g, u) = (t[0].narrow(1, 0, 7).unwrap(), t[0].narrow(1, 7, 7).unwrap());
            (g.silu().unwrap() * u).unwrap()
        };
        check::same_as(op, composed, &inputs, 1e-6);
        check::finite_differences(op, &inputs, 2e-3);
    }
}
