//! RMSNorm: y = x / sqrt(mean(x^2) + eps) * w.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::math::{dot, scale};
use super::{numbers, output, read3};

struct RmsNorm {
    eps: f32,
}

/// x (n, d), w (d): (n, d).
pub(in super::super) fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op2(w, RmsNorm { eps })
}

impl RmsNorm {
    /// 1 / sqrt(mean(x^2) + eps).
    fn inverse(&self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }

    /// dx where it is wanted, and dw.
    fn backward(&self, x: &[f32], w: &[f32], dy: &[f32], wants_dx: bool) -> (Vec<f32>, Vec<f32>) {
        let d = w.len().max(1);
        let mut dx = vec![0.0; if wants_dx { x.len() } else { 0 }];
        let mut dw = vec![0.0; w.len()];
        for (row, (x, dy)) in x.chunks_exact(d).zip(dy.chunks_exact(d)).enumerate() {
            let inverse = self.inverse(x);
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * x * inverse;
            }
            let Some(dx) = dx.get_mut(row * d..(row + 1) * d) else {
                continue;
            };
            for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(w) {
                *dx = dy * w;
            }
            let along = dot(dx, x) * inverse * inverse / d as f32;
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx -= along * x;
            }
            scale(dx, inverse);
        }
        (dx, dw)
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, d) = x_layout.shape().dims2()?;
        let (x, w) = (numbers(x, x_layout)?, numbers(w, w_layout)?);
        let mut y = vec![0.0; n * d];
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let inverse = self.inverse(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * inverse * w;
            }
        }
        output(y, (n, d))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let wants_dx = x.track_op();
        let backward = |x: &[f32], w: &[f32], dy: &[f32]| self.backward(x, w, dy, wants_dx);
        let (dx, dw) = read3(x, w, dy, backward)?;
        let dx = wants_dx.then(|| Tensor::from_vec(dx, x.shape(), x.device()));
        let dw = w
            .track_op()
            .then(|| Tensor::from_vec(dw, w.shape(), w.device()));
        Ok((dx.transpose()?, dw.transpose()?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::check;
    use super::*;

    #[test]
    fn rms_norm_is_the_composition_of_candles_ops() {
        let inputs = [check::normal(1, &[5, 12]), check::normal(2, &[12])];
        let op = |t: &[Tensor]| rms_norm(&t[0], &t[1], 1e-5).unwrap();
        let composed = |t: &[Tensor]| {
            let mean = t[0].sqr().unwrap().mean_keepdim(1).unwrap();
            let root = (mean + 1e-5).unwrap().sqrt().unwrap();
            t[0].broadcast_div(&root)
                .unwrap()
                .broadcast_mul(&t[1])
                .unwrap()
        };
        check::same_as(op, composed, &inputs, 2e-6);
        check::finite_differences(op, &inputs, 2e-3);
    }
}
