//! Row-wise ops: the norm, and the rotary embedding with its write into the cache. A row's arithmetic depends on its width only.

#![allow(unsafe_code)]

use std::ops::Range;

use super::int8;
use super::kv::Cache;
use super::pool::Parts;
use super::simd::{Kernel, LANES, Simd, load_some, store_some, sum};
use crate::backend::ops::Heads;
use crate::backend::{HostSequence, HostStep};
use crate::types::BLOCK_TOKENS;

/// y = x / sqrt(mean(x^2) + eps) * weight, of some rows.
pub struct RmsNormRows<'a> {
    /// (rows, d).
    pub x: &'a [f32],
    /// (d).
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
    /// (rows, d).
    pub y: &'a mut [f32],
    /// The first row's number among those of `blocks`.
    pub first: usize,
    /// Receives y as block formats meet it, if it has room.
    pub blocks: int8::Blocks,
}

impl Kernel for RmsNormRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let d = self.weight.len();
        let rows = self.x.chunks_exact(d).zip(self.y.chunks_exact_mut(d));
        for (row, (x, y)) in (self.first..).zip(rows) {
            let scale = 1.0 / (sum_of_squares(simd, x) / d as f32 + self.eps).sqrt();
            let scale = simd.splat(scale);
            for at in (0..d).step_by(LANES) {
                let lanes = LANES.min(d - at);
                // SAFETY: all three are `d` long.
                unsafe {
                    let x = load_some(simd, x.as_ptr().add(at), lanes);
                    let weight = load_some(simd, self.weight.as_ptr().add(at), lanes);
                    let normed = simd.mul(simd.mul(x, scale), weight);
                    store_some(simd, y.as_mut_ptr().add(at), lanes, normed);
                }
            }
            self.blocks.write(simd, row, 0, y);
        }
    }
}

/// In four chains, so that one addition need not wait for the last.
#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let mut sums = [simd.splat(0.0); 4];
    for at in (0..x.len()).step_by(4 * LANES) {
        for (i, sum) in sums.iter_mut().enumerate() {
            let at = at + i * LANES;
            if at < x.len() {
                // SAFETY: within x.
                let x = unsafe { load_some(simd, x.as_ptr().add(at), LANES.min(x.len() - at)) };
                *sum = simd.fma(x, x, *sum);
            }
        }
    }
    let halves = simd.add(simd.add(sums[0], sums[2]), simd.add(sums[1], sums[3]));
    sum(simd, halves)
}

/// Rotates q and k of some rows of one sequence and writes k and v into the cache.
pub struct RopeRows<'a> {
    /// The step, for positions and blocks.
    pub step: &'a HostStep,
    /// Rows to do.
    pub rows: Range<usize>,
    /// Heads.
    pub heads: Heads,
    /// (positions, head size).
    pub rope: &'a [f32],
    /// (n, qkv width).
    pub qkv: &'a Parts<'a, f32>,
    /// Where k and v go.
    pub cache: &'a Cache<'a>,
}

impl Kernel for RopeRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Heads { query, kv, size } = self.heads;
        let width = self.heads.qkv_width();
        for sequence in self.step.sequences() {
            for row in overlap(&sequence, &self.rows) {
                let position = sequence.start + row - sequence.first_row;
                // SAFETY: rows do not overlap, and each is done by one chunk.
                let qkv = unsafe { self.qkv.slice(row * width, width) };
                let rope = &self.rope[position * size..][..size];
                let (rotated, v) = qkv.split_at_mut((query + kv) * size);
                for head in rotated.chunks_exact_mut(size) {
                    rotate(simd, head, rope);
                }
                let k = &rotated[query * size..];
                let block = sequence.block_table[position / BLOCK_TOKENS];
                for head in 0..kv {
                    let (k, v) = (&k[head * size..][..size], &v[head * size..][..size]);
                    let place = (block, position % BLOCK_TOKENS);
                    // SAFETY: a block is written by the one sequence that owns this position (`HostStep::load`), and a
                    // position by the one chunk that has its row.
                    unsafe { self.cache.write(simd, place, head, k, v) };
                }
            }
        }
    }
}

/// The rows of `sequence` that are in `rows`.
fn overlap(sequence: &HostSequence<'_>, rows: &Range<usize>) -> Range<usize> {
    let end = sequence.first_row + sequence.rows;
    sequence.first_row.max(rows.start)..end.min(rows.end)
}

/// (a, b) -> (a cos - b sin, b cos + a sin).
#[inline(always)]
fn rotate<S: Simd>(simd: S, head: &mut [f32], rope: &[f32]) {
    let half = head.len() / 2;
    let (low, high) = head.split_at_mut(half);
    let (cos, sin) = rope.split_at(half);
    for at in (0..half).step_by(LANES) {
        let lanes = LANES.min(half - at);
        // SAFETY: all four are `half` long.
        unsafe {
            let a = load_some(simd, low.as_ptr().add(at), lanes);
            let b = load_some(simd, high.as_ptr().add(at), lanes);
            let cos = load_some(simd, cos.as_ptr().add(at), lanes);
            let sin = load_some(simd, sin.as_ptr().add(at), lanes);
            let minus_sin = simd.sub(simd.splat(0.0), sin);
            let turned_low = simd.fma(b, minus_sin, simd.mul(a, cos));
            let turned_high = simd.fma(a, sin, simd.mul(b, cos));
            store_some(simd, low.as_mut_ptr().add(at), lanes, turned_low);
            store_some(simd, high.as_mut_ptr().add(at), lanes, turned_high);
        }
    }
}
