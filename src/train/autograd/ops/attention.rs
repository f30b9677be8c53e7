//! Causal self-attention of several sequences laid end to end, with the rotary embedding: from stacked q, k, v to the heads'
//! outputs. Heads are read and written where they are in the rows, so nothing is copied and nothing padded.

use super::math::{dot, exp_row, max, scale, simd};
use super::matrix::{Columns, product};

/// Sizes of the heads.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Heads {
    /// Query heads.
    pub query: usize,
    /// K/V heads; divides `query`.
    pub kv: usize,
    /// Of a head, even.
    pub size: usize,
}

impl Heads {
    /// Of a row of [q ; k ; v].
    pub(in super::super) fn width(self) -> usize {
        (self.query + 2 * self.kv) * self.size
    }

    /// Of a row of outputs.
    fn outputs(self) -> usize {
        self.query * self.size
    }

    /// Head `index` of a row of [q ; k ; v].
    fn head(self, index: usize) -> Columns {
        Columns {
            width: self.width(),
            first: index * self.size,
            count: self.size,
        }
    }

    /// q, k, v and output of a query head.
    fn columns(self, query: usize) -> [Columns; 4] {
        let kv = query * self.kv / self.query.max(1);
        let output = Columns {
            width: self.outputs(),
            first: query * self.size,
            count: self.size,
        };
        [
            self.head(query),
            self.head(self.query + kv),
            self.head(self.query + self.kv + kv),
            output,
        ]
    }
}

/// Attention within each of some sequences.
#[derive(Clone, Copy)]
pub(in super::super) struct Attention<'a> {
    /// Sizes.
    pub heads: Heads,
    /// (positions, size): cosines, then sines; as many positions as the longest sequence has tokens, or more.
    pub rope: &'a [f32],
    /// Tokens of each.
    pub lengths: &'a [usize],
}

/// Turns the pairs (i, i + size / 2) of each head of a row by the angles of its position; back with `sign` -1.
#[inline(always)]
fn turn(heads: &mut [f32], angles: &[f32], sign: f32) {
    let size = angles.len().max(1);
    let (cosines, sines) = angles.split_at(size / 2);
    for head in heads.chunks_exact_mut(size) {
        let (low, high) = head.split_at_mut(size / 2);
        for (((low, high), cosine), sine) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
            let (x, y, sine) = (*low, *high, sign * sine);
            *low = x * cosine - y * sine;
            *high = y * cosine + x * sine;
        }
    }
}

/// Softmax of row i over columns 0..=i, 0 beyond, in place.
fn causal_softmax(scores: &mut [f32], t: usize) {
    simd(
        #[inline(always)]
        || {
            for (index, row) in scores.chunks_exact_mut(t).enumerate() {
                let (seen, future) = row.split_at_mut(index + 1);
                let total = exp_row(seen, max(seen));
                scale(seen, 1.0 / total);
                future.fill(0.0);
            }
        },
    );
}

/// dS = P * (dP - rowsum(P * dP)), in place of dP.
fn softmax_backward(p: &[f32], dp: &mut [f32], t: usize) {
    simd(
        #[inline(always)]
        || {
            for (index, (p, dp)) in p.chunks_exact(t).zip(dp.chunks_exact_mut(t)).enumerate() {
                let (seen, future) = dp.split_at_mut(index + 1);
                let (p, _) = p.split_at(index + 1);
                let along = dot(p, seen);
                for (dp, p) in seen.iter_mut().zip(p) {
                    *dp = p * (*dp - along);
                }
                future.fill(0.0);
            }
        },
    );
}

impl Attention<'_> {
    /// Turns q and k of all rows, or turns them back.
    fn turn(&self, qkv: &mut [f32], sign: f32) {
        let (width, size) = (self.heads.width(), self.heads.size);
        let turned = (self.heads.query + self.heads.kv) * size;
        let mut rows = qkv.chunks_exact_mut(width);
        simd(
            #[inline(always)]
            || {
                for length in self.lengths {
                    let angles = self.rope.chunks_exact(size);
                    for (row, angles) in rows.by_ref().take(*length).zip(angles) {
                        let (heads, _) = row.split_at_mut(turned);
                        turn(heads, angles, sign);
                    }
                }
            },
        );
    }

    /// 1 / sqrt(size).
    fn factor(&self) -> f32 {
        1.0 / (self.heads.size as f32).sqrt()
    }

    /// [q ; k ; v] (n, width), q and k turned in place: the heads' outputs (n, query * size), and the softmax of each sequence
    /// and query head, (t, t) each.
    pub(in super::super) fn forward(&self, qkv: &mut [f32]) -> (Vec<f32>, Vec<f32>) {
        self.turn(qkv, 1.0);
        let (width, out) = (self.heads.width(), self.heads.outputs());
        let squares: usize = self.lengths.iter().map(|t| t * t).sum();
        let mut softmax = vec![0.0; self.heads.query * squares];
        let mut y = vec![0.0; qkv.len() / width * out];
        let (mut rows, mut outputs, mut left) = (&*qkv, y.as_mut_slice(), softmax.as_mut_slice());
        for t in self.lengths {
            let (qkv, other_rows) = rows.split_at(t * width);
            let (y, other_outputs) = outputs.split_at_mut(t * out);
            let (p, other_left) = left.split_at_mut(self.heads.query * t * t);
            for (head, p) in p.chunks_exact_mut((t * t).max(1)).enumerate() {
                let [q, k, v, output] = self.heads.columns(head);
                let mut scores = Columns::all(*t).of_mut(p);
                product(self.factor(), &q.of(qkv), &k.of(qkv).t(), 0.0, &mut scores);
                causal_softmax(p, *t);
                let p = Columns::all(*t).of(p);
                product(1.0, &p, &v.of(qkv), 0.0, &mut output.of_mut(y));
            }
            (rows, outputs, left) = (other_rows, other_outputs, other_left);
        }
        (y, softmax)
    }

    /// d[q ; k ; v] (n, width) before turning, from dy (n, query * size); `qkv` and `softmax` as [`Attention::forward`] left them.
    pub(in super::super) fn backward(&self, qkv: &[f32], softmax: &[f32], dy: &[f32]) -> Vec<f32> {
        let (width, out) = (self.heads.width(), self.heads.outputs());
        let longest = self.lengths.iter().max().copied().unwrap_or(0);
        let mut scratch = vec![0.0; longest * longest];
        let mut d = vec![0.0; qkv.len()];
        let (mut rows, mut moved, mut left, mut dys) = (qkv, d.as_mut_slice(), softmax, dy);
        for t in self.lengths {
            let (qkv, other_rows) = rows.split_at(t * width);
            let (d, other_moved) = moved.split_at_mut(t * width);
            let (p, other_left) = left.split_at(self.heads.query * t * t);
            let (dy, other_dys) = dys.split_at(t * out);
            let (ds, _) = scratch.split_at_mut(t * t);
            for (head, p) in p.chunks_exact((t * t).max(1)).enumerate() {
                self.head_backward(head, *t, qkv, p, dy, ds, d);
            }
            (rows, moved, left, dys) = (other_rows, other_moved, other_left, other_dys);
        }
        self.turn(&mut d, -1.0);
        d
    }

    /// One query head of one sequence of t tokens; several may add to one head of k and v.
    #[allow(clippy::too_many_arguments)]
    fn head_backward(
        &self,
        head: usize,
        t: usize,
        qkv: &[f32],
        p: &[f32],
        dy: &[f32],
        ds: &mut [f32],
        d: &mut [f32],
    ) {
        let [q, k, v, output] = self.heads.columns(head);
        let (square, dy) = (Columns::all(t), output.of(dy));
        product(1.0, &square.of(p).t(), &dy, 1.0, &mut v.of_mut(d));
        product(1.0, &dy, &v.of(qkv).t(), 0.0, &mut square.of_mut(ds));
        softmax_backward(p, ds, t);
        let ds = square.of(ds);
        product(self.factor(), &ds, &k.of(qkv), 1.0, &mut q.of_mut(d));
        product(self.factor(), &ds.t(), &q.of(qkv), 1.0, &mut k.of_mut(d));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::{Device, Tensor};

    use super::super::check;
    use super::*;

    const ROPE: [f32; 5 * 4] = [
        1.0, 1.0, 0.0, 0.0, 0.6, 0.8, 0.8, 0.6, 0.0, 0.28, 1.0, 0.96, -0.6, 0.96, 0.8, 0.28, -0.8,
        0.0, -0.6, 1.0,
    ];

    /// The same, of candle's ops, a query head at a time: x (t, width) of one sequence.
    fn composed_sequence(x: &Tensor, heads: Heads) -> Tensor {
        let t = x.dim(0).unwrap();
        let half = heads.size / 2;
        let table = Tensor::from_slice(&ROPE, (5, 4), &Device::Cpu).unwrap();
        let table = table.narrow(0, 0, t).unwrap();
        let (cos, sin) = (
            table.narrow(1, 0, half).unwrap(),
            table.narrow(1, half, half).unwrap(),
        );
        let head = |index: usize| x.narrow(1, index * heads.size, heads.size).unwrap();
        let turned = |x: Tensor| {
            let (a, b) = (
                x.narrow(1, 0, half).unwrap(),
                x.narrow(1, half, half).unwrap(),
            );
            let low = ((&a * &cos).unwrap() - (&b * &sin).unwrap()).unwrap();
            let high = ((&b * &cos).unwrap() + (&a * &sin).unwrap()).unwrap();
            Tensor::cat(&[low, high], 1).unwrap()
        };
        let mask: Vec<f32> = (0..t * t)
            .map(|i| if i % t > i / t { -1e9 } else { 0.0 })
            .collect();
        let mask = Tensor::from_vec(mask, (t, t), &Device::Cpu).unwrap();
        let outputs: Vec<Tensor> = (0..heads.query)
            .map(|q| {
                let kv = q / (heads.query / heads.kv);
                let k = turned(head(heads.query + kv));
                let v = head(heads.query + heads.kv + kv);
                let scores = turned(head(q)).matmul(&k.t().unwrap()).unwrap();
                let scores = ((scores / (heads.size as f64).sqrt()).unwrap() + &mask).unwrap();
                let e = scores.exp().unwrap();
                let p = e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap();
                p.matmul(&v.contiguous().unwrap()).unwrap()
            })
            .collect();
        Tensor::cat(&outputs, 1).unwrap()
    }

    #[test]
    fn attention_is_the_composition_of_candles_ops_for_each_sequence() {
        for (query, kv) in [(2, 2), (4, 2), (3, 1)] {
            let heads = Heads { query, kv, size: 4 };
            let attention = Attention {
                heads,
                rope: &ROPE,
                lengths: &[3, 0, 1, 4],
            };
            check::same_as(
                &[&[8, heads.width()]],
                |inputs| attention.forward(&mut inputs[0].clone()).0,
                |inputs, dy| {
                    let mut qkv = inputs[0].clone();
                    let (_, softmax) = attention.forward(&mut qkv);
                    vec![attention.backward(&qkv, &softmax, dy)]
                },
                |t| {
                    let sequence =
                        |at, len| composed_sequence(&t[0].narrow(0, at, len).unwrap(), heads);
                    Tensor::cat(&[sequence(0, 3), sequence(3, 1), sequence(4, 4)], 0).unwrap()
                },
                3e-6,
            );
        }
    }
}
