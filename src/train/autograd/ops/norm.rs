//! RMSNorm: y = x / sqrt(mean(x^2) + eps) * w.

use super::math::{dot, dot3, simd};

/// The norm of rows of `weight.len()` numbers.
#[derive(Clone, Copy)]
pub(in super::super) struct RmsNorm<'a> {
    /// w (d).
    pub weight: &'a [f32],
    /// eps.
    pub eps: f32,
}

impl RmsNorm<'_> {
    /// 1 / sqrt(mean(x^2) + eps).
    #[inline(always)]
    fn inverse(self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }

    /// x (n, d): (n, d).
    pub(in super::super) fn forward(self, x: &[f32]) -> Vec<f32> {
        let d = self.weight.len().max(1);
        let mut y = vec![0.0; x.len()];
        simd(
            #[inline(always)]
            || {
                for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
                    let inverse = self.inverse(x);
                    for ((y, x), w) in y.iter_mut().zip(x).zip(self.weight) {
                        *y = x * inverse * w;
                    }
                }
            },
        );
        y
    }

    /// dx += what dy (n, d) moves at x (n, d); dw += the weight's gradient, where it is wanted.
    pub(in super::super) fn backward(
        self,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        dw: Option<&mut [f32]>,
    ) {
        let d = self.weight.len().max(1);
        simd(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(d).zip(dy.chunks_exact(d));
                for ((x, dy), dx) in rows.clone().zip(dx.chunks_exact_mut(d)) {
                    let inverse = self.inverse(x);
                    let along = dot3(x, dy, self.weight);
                    let along = along * inverse * inverse * inverse / d as f32;
                    for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(self.weight) {
                        *dx += inverse * dy * w - along * x;
                    }
                }
                let Some(dw) = dw else {
                    return;
                };
                for (x, dy) in rows {
                    let inverse = self.inverse(x);
                    for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                        *dw += dy * x * inverse;
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::check;
    use super::*;

    #[test]
    fn rms_norm_is_the_composition_of_candles_ops() {
        fn norm(weight: &[f32]) -> RmsNorm<'_> {
            RmsNorm { weight, eps: 1e-5 }
        }
        check::same_as(
            &[&[5, 12], &[12]],
            |inputs| norm(&inputs[1]).forward(&inputs[0]),
            |inputs, dy| {
                let (mut dx, mut dw) = (vec![0.0; 60], vec![0.0; 12]);
                norm(&inputs[1]).backward(&inputs[0], dy, &mut dx, Some(&mut dw));
                vec![dx, dw]
            },
            |t| {
                let mean = t[0].sqr().unwrap().mean_keepdim(1).unwrap();
                let root = (mean + 1e-5).unwrap().sqrt().unwrap();
                let y = t[0].broadcast_div(&root).unwrap();
                y.broadcast_mul(&t[1]).unwrap()
            },
            3e-6,
        );
    }
}
