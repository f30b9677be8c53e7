//! Causal attention over the paged cache.
//!
//! All query heads of a K/V head, and some rows, go over a block ([`super::kv`]) together.
//!
//! Keys are cut into splits of [`SPLIT`] absolute positions. Each split gives a maximum, a sum and a mixture, and splits are
//! merged in order: the bits of a row depend on its position, not on chunks, tiles or threads. Keys beyond a row's position
//! get weight 0 and add exactly nothing; keys beyond the last row's are not read.

#![allow(unsafe_code)]

use super::gemm::{Bf16s, F32s, Int8s, Target, Tile, Weights, panels_beside};
use super::int8;
use super::kv::{KvMemory, View, block_at, scales_at};
use super::pool::Parts;
use super::simd::{Kernel, LANES, Simd, exp, load_some, store_some, sum};
use crate::backend::ops::Heads;
use crate::backend::{HostSequence, HostStep, StepLimits};
use crate::types::{BLOCK_TOKENS, BlockId};

/// Positions in a split.
pub const SPLIT: usize = 256;
const SPLIT_BLOCKS: usize = SPLIT / BLOCK_TOKENS;
/// Query vectors that go over the keys together, unless one row has more heads.
const QUERIES: usize = 24;

/// Some rows of one sequence and all query heads of one K/V head.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    sequence: usize,
    kv_head: usize,
    /// First row within the sequence, and rows.
    first: usize,
    rows: usize,
    /// Splits that its last row sees.
    pub splits: usize,
}

/// Rows of a unit.
fn tile(heads: Heads) -> usize {
    (QUERIES / (heads.query / heads.kv)).max(1)
}

/// Units of any step within `limits`, at most.
pub fn units_max(limits: &StepLimits, heads: Heads) -> usize {
    // Of each sequence one unit may be short.
    (limits.rows / tile(heads) + limits.sequences_in_a_step()) * heads.kv
}

/// Splits of any unit within `limits`, at most.
pub fn splits_max(limits: &StepLimits) -> usize {
    limits.positions.div_ceil(SPLIT)
}

/// Cuts a step into units, long ones first within a sequence; reuses the room of `units`.
pub fn units(step: &HostStep, heads: Heads, units: &mut Vec<Unit>) {
    units.clear();
    let tile = tile(heads);
    for (index, sequence) in step.sequences().enumerate() {
        for first in (0..sequence.rows).step_by(tile).rev() {
            let rows = tile.min(sequence.rows - first);
            let splits = (sequence.start + first + rows).div_ceil(SPLIT);
            units.extend((0..heads.kv).map(|kv_head| Unit {
                sequence: index,
                kv_head,
                first,
                rows,
                splits,
            }));
        }
    }
}

/// Query vectors of the largest unit.
pub fn queries_max(heads: Heads) -> usize {
    QUERIES.max(heads.query / heads.kv)
}

/// Numbers that one split of a unit leaves: mixtures, then maxima, then sums.
pub fn partial_len(heads: Heads) -> usize {
    queries_max(heads) * (heads.size + 2)
}

/// A thread's room: scaled queries, scores of a split, the partial of a split, and the merged one.
#[derive(Default)]
pub struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    partial: Vec<f32>,
    merged: Vec<f32>,
}

impl Scratch {
    /// Bytes of all four.
    pub fn bytes(heads: Heads) -> usize {
        Self::lens(heads).iter().sum::<usize>() * size_of::<f32>()
    }

    fn lens(heads: Heads) -> [usize; 4] {
        let queries = queries_max(heads);
        let partial = partial_len(heads);
        // The mixture of sixteen outputs is stored whole even if fewer are left.
        [queries * heads.size, queries * SPLIT, partial, partial]
    }

    /// Makes room for these heads; does nothing from the second call on.
    pub fn reserve(&mut self, heads: Heads) {
        let grow = |room: &mut Vec<f32>, len: usize| {
            if room.len() < len {
                room.resize(len, 0.0);
            }
        };
        let [q, scores, partial, merged] = Self::lens(heads);
        grow(&mut self.q, q);
        grow(&mut self.scores, scores);
        grow(&mut self.partial, partial);
        grow(&mut self.merged, merged);
    }
}

/// What all units share.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The step.
    pub step: &'a HostStep,
    /// Layer of the cache.
    pub layer: usize,
    /// Heads.
    pub heads: Heads,
    /// (n, qkv width).
    pub qkv: &'a [f32],
    /// K and V.
    pub cache: &'a KvMemory,
    /// (n, query heads * head size).
    pub y: &'a Parts<'a, f32>,
    /// Receives y as block formats meet it, if it has room; a head is whole blocks then.
    pub blocks: int8::Blocks,
}

/// What one chunk of the op does.
pub enum Job<'a> {
    /// A whole unit.
    Unit(Unit),
    /// One split of a unit, into its partial.
    Split(Unit, usize, &'a mut [f32]),
    /// The merging of all splits' partials (one behind the other).
    Merge(Unit, &'a [f32]),
}

/// A chunk as a kernel.
pub struct Attend<'a>(pub Context<'a>, pub Job<'a>, pub &'a mut Scratch);

impl Kernel for Attend<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(context, job, scratch) = self;
        let len = partial_len(context.heads);
        match job {
            Job::Unit(unit) => {
                context.scale_queries(&unit, &mut scratch.q);
                for split in 0..unit.splits {
                    let Scratch {
                        q,
                        scores,
                        partial,
                        merged,
                    } = &mut *scratch;
                    context.split(simd, &unit, split, q, scores, partial);
                    context.merge(simd, &unit, split, partial, merged);
                }
                context.finish(simd, &unit, &scratch.merged);
            }
            Job::Split(unit, split, partial) => {
                context.scale_queries(&unit, &mut scratch.q);
                context.split(simd, &unit, split, &scratch.q, &mut scratch.scores, partial);
            }
            Job::Merge(unit, partials) => {
                for (split, partial) in partials.chunks_exact(len).take(unit.splits).enumerate() {
                    context.merge(simd, &unit, split, partial, &mut scratch.merged);
                }
                context.finish(simd, &unit, &scratch.merged);
            }
        }
    }
}

impl<'a> Context<'a> {
    fn group(&self) -> usize {
        self.heads.query / self.heads.kv
    }

    fn sequence(&self, unit: &Unit) -> HostSequence<'a> {
        self.step.sequence(unit.sequence)
    }

    /// Keys of `split` that query `query` of the unit sees.
    fn visible(&self, unit: &Unit, split: usize, query: usize) -> usize {
        let row = unit.first + query / self.group();
        let keys = self.sequence(unit).start + row + 1;
        keys.saturating_sub(split * SPLIT).min(SPLIT)
    }

    /// Queries of a unit, in order of rows, then heads.
    fn queries(&self, unit: &Unit) -> usize {
        unit.rows * self.group()
    }

    /// (queries, head size), times 1 / sqrt(head size).
    fn scale_queries(&self, unit: &Unit, out: &mut [f32]) {
        let (group, size) = (self.group(), self.heads.size);
        let scale = 1.0 / (size as f32).sqrt();
        let first_row = self.sequence(unit).first_row + unit.first;
        for (row, out) in out
            .chunks_exact_mut(group * size)
            .take(unit.rows)
            .enumerate()
        {
            let at = (first_row + row) * self.heads.qkv_width() + unit.kv_head * group * size;
            let q = &self.qkv[at..][..group * size];
            out.iter_mut().zip(q).for_each(|(out, q)| *out = q * scale);
        }
    }

    /// One split: scores, weights, mixtures.
    #[inline(always)]
    fn split<S: Simd>(
        &self,
        simd: S,
        unit: &Unit,
        split: usize,
        q: &[f32],
        scores: &mut [f32],
        partial: &mut [f32],
    ) {
        let queries = self.queries(unit);
        let keys = self.visible(unit, split, queries - 1);
        let table = self.sequence(unit).block_table;
        let first = split * SPLIT_BLOCKS;
        let table = &table[first..first + keys.div_ceil(BLOCK_TOKENS)];
        let size = self.heads.size;
        let shape = self.cache.shape();
        let at = |block: BlockId| block_at(&shape, self.layer, block, unit.kv_head);
        let (mixed, sums) = partial.split_at_mut(queries_max(self.heads) * size);
        let mut keys = Keys {
            starts: [0; SPLIT_BLOCKS],
            blocks: table.len(),
            keys,
            size,
            queries,
        };
        for (start, block) in keys.starts.iter_mut().zip(table) {
            *start = at(*block);
        }
        // All blocks end within the cache, behind which a vector may be read: what the tiles of `Keys` rely on.
        let end = keys
            .starts
            .iter()
            .max()
            .map_or(0, |start| start + 2 * size * BLOCK_TOKENS);
        match self.cache.view() {
            View::F32(numbers) => {
                assert!(end + LANES <= numbers.len());
                let numbers = F32s(numbers.as_ptr());
                keys.score(simd, numbers, q, scores);
                self.weigh(simd, unit, split, keys.blocks, scores, sums);
                keys.mix(simd, numbers, scores, mixed);
            }
            View::BF16(numbers) => {
                assert!(end + LANES <= numbers.len());
                let numbers = Bf16s(numbers.as_ptr());
                keys.score(simd, numbers, q, scores);
                self.weigh(simd, unit, split, keys.blocks, scores, sums);
                keys.mix(simd, numbers, scores, mixed);
            }
            View::INT8(codes, scales) => {
                assert!(end + LANES <= codes.len());
                let numbers = Int8s(codes.as_ptr());
                keys.score(simd, numbers, q, scores);
                keys.scale(simd, scales, 0, scores);
                self.weigh(simd, unit, split, keys.blocks, scores, sums);
                keys.scale(simd, scales, BLOCK_TOKENS, scores);
                keys.mix(simd, numbers, scores, mixed);
            }
        }
    }

    /// Turns scores into exp(score - max), and keeps each query's maximum and sum.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        simd: S,
        unit: &Unit,
        split: usize,
        blocks: usize,
        scores: &mut [f32],
        sums: &mut [f32],
    ) {
        let queries = self.queries(unit);
        let (maxima, totals) = sums.split_at_mut(queries_max(self.heads));
        for query in 0..queries {
            let scores = &mut scores[query * SPLIT..][..blocks * BLOCK_TOKENS];
            scores[self.visible(unit, split, query)..].fill(f32::NEG_INFINITY);
            let (vectors, _) = scores.as_chunks_mut::<LANES>();
            let mut max = simd.splat(f32::NEG_INFINITY);
            for vector in vectors.iter() {
                // SAFETY: a vector.
                max = simd.max(max, unsafe { simd.load(vector.as_ptr()) });
            }
            maxima[query] = simd.largest(max);
            // A row that sees nothing of this split is never merged; any finite maximum keeps its weights at 0.
            let max = simd.splat(maxima[query].max(f32::MIN));
            let mut total = simd.splat(0.0);
            for vector in vectors {
                // SAFETY: a vector.
                unsafe {
                    let weight = exp(simd, simd.sub(simd.load(vector.as_ptr()), max));
                    simd.store(vector.as_mut_ptr(), weight);
                    total = simd.add(total, weight);
                }
            }
            totals[query] = sum(simd, total);
        }
    }

    /// Adds a split's partial to the merged one. The first split starts it.
    #[inline(always)]
    fn merge<S: Simd>(
        &self,
        simd: S,
        unit: &Unit,
        split: usize,
        partial: &[f32],
        merged: &mut [f32],
    ) {
        let (size, max_queries) = (self.heads.size, queries_max(self.heads));
        if split == 0 {
            merged[..partial.len()].copy_from_slice(partial);
            return;
        }
        let (maxima, totals) = (max_queries * size, max_queries * (size + 1));
        for query in 0..self.queries(unit) {
            if self.visible(unit, split, query) == 0 {
                continue;
            }
            let (old, new) = (merged[maxima + query], partial[maxima + query]);
            let max = old.max(new);
            merged[maxima + query] = max;
            let old = exp(simd, simd.splat(old - max));
            let new = exp(simd, simd.splat(new - max));
            let mut at = query * size;
            // Its mixture in vectors, then its sum.
            for lanes in (0..size).step_by(LANES).map(|done| LANES.min(size - done)) {
                rescale(
                    simd,
                    old,
                    new,
                    &partial[at..][..lanes],
                    &mut merged[at..][..lanes],
                );
                at += lanes;
            }
            let total = totals + query;
            rescale(
                simd,
                old,
                new,
                &partial[total..][..1],
                &mut merged[total..][..1],
            );
        }
    }

    /// y = mixture / sum.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, unit: &Unit, merged: &[f32]) {
        let (group, size) = (self.group(), self.heads.size);
        let totals = queries_max(self.heads) * (size + 1);
        let first_row = self.sequence(unit).first_row + unit.first;
        for query in 0..self.queries(unit) {
            let scale = simd.splat(1.0 / merged[totals + query]);
            let (row, head) = (
                first_row + query / group,
                unit.kv_head * group + query % group,
            );
            let at = (row * self.heads.query + head) * size;
            // SAFETY: a head of a row belongs to one unit.
            let y = unsafe { self.y.slice(at, size) };
            for at in (0..size).step_by(LANES) {
                let lanes = LANES.min(size - at);
                // SAFETY: `lanes` numbers are left in both.
                unsafe {
                    let mixed = load_some(simd, merged[query * size + at..].as_ptr(), lanes);
                    store_some(simd, y[at..].as_mut_ptr(), lanes, simd.mul(mixed, scale));
                }
            }
            self.blocks.write(simd, row, head * size, y);
        }
    }
}

/// merged = merged * old + partial * new, of at most LANES numbers.
#[inline(always)]
fn rescale<S: Simd>(simd: S, old: S::F, new: S::F, partial: &[f32], merged: &mut [f32]) {
    let lanes = LANES.min(partial.len()).min(merged.len());
    // SAFETY: both hold `lanes`.
    unsafe {
        let a = load_some(simd, merged.as_ptr(), lanes);
        let b = load_some(simd, partial.as_ptr(), lanes);
        let sum = simd.fma(a, old, simd.mul(b, new));
        store_some(simd, merged.as_mut_ptr(), lanes, sum);
    }
}

/// The blocks of one split: where each starts, the keys that the last query sees, the size of the head, and the queries.
struct Keys {
    starts: [usize; SPLIT_BLOCKS],
    blocks: usize,
    keys: usize,
    size: usize,
    queries: usize,
}

impl Keys {
    /// scores (queries, SPLIT) = q K^T.
    #[inline(always)]
    fn score<S: Simd, W: Weights>(&self, simd: S, numbers: W, q: &[f32], scores: &mut [f32]) {
        assert!(self.queries * self.size <= q.len() && self.queries * SPLIT <= scores.len());
        let mut query = 0;
        while query < self.queries {
            let q = q[query * self.size..].as_ptr();
            let scores = scores[query * SPLIT..].as_mut_ptr();
            let left = self.queries - query;
            query += if const { S::ACCUMULATORS >= 6 } && left >= 6 {
                self.score_rows::<S, W, 6>(simd, numbers, q, scores)
            } else if const { S::ACCUMULATORS >= 6 } && left >= 3 {
                self.score_rows::<S, W, 3>(simd, numbers, q, scores)
            } else {
                self.score_rows::<S, W, 1>(simd, numbers, q, scores)
            };
        }
    }

    /// R queries against all blocks, as many at a time as there are registers for.
    #[inline(always)]
    fn score_rows<S: Simd, W: Weights, const R: usize>(
        &self,
        simd: S,
        numbers: W,
        q: *const f32,
        scores: *mut f32,
    ) -> usize {
        let mut block = 0;
        if const { panels_beside(S::ACCUMULATORS, R) == 4 } {
            block = self.score_blocks::<S, W, R, 4>(simd, numbers, q, scores, block);
        } else if const { panels_beside(S::ACCUMULATORS, R) == 2 } {
            block = self.score_blocks::<S, W, R, 2>(simd, numbers, q, scores, block);
        }
        self.score_blocks::<S, W, R, 1>(simd, numbers, q, scores, block);
        R
    }

    /// From `block` on, P blocks at a time; returns the first block that is left.
    #[inline(always)]
    fn score_blocks<S: Simd, W: Weights, const R: usize, const P: usize>(
        &self,
        simd: S,
        numbers: W,
        q: *const f32,
        scores: *mut f32,
        mut block: usize,
    ) -> usize {
        while let Some(starts) = self.starts[block..self.blocks].first_chunk::<P>() {
            simd.call(Tile::<_, R, P> {
                weights: numbers,
                segments: &[*starts],
                stride: BLOCK_TOKENS,
                count: self.size,
                x: q,
                x_stride: self.size,
                target: Target {
                    y: scores.wrapping_add(block * BLOCK_TOKENS),
                    stride: SPLIT,
                    lanes: LANES,
                    add: false,
                },
            });
            block += P;
        }
        block
    }

    /// Multiplies what belongs to a key by its scale: those from `first` on among the scales of each block.
    #[inline(always)]
    fn scale<S: Simd>(&self, simd: S, scales: &[u16], first: usize, scores: &mut [f32]) {
        for (block, start) in self.starts[..self.blocks].iter().enumerate() {
            let at = scales_at(self.size, *start) + first;
            let scales = &scales[at..][..BLOCK_TOKENS];
            // SAFETY: a vector each, `BLOCK_TOKENS` is LANES.
            unsafe {
                let scale = simd.load_bf16(scales.as_ptr());
                for query in 0..self.queries {
                    let score = &mut scores[query * SPLIT + block * BLOCK_TOKENS..][..LANES];
                    let scaled = simd.mul(simd.load(score.as_ptr()), scale);
                    simd.store(score.as_mut_ptr(), scaled);
                }
            }
        }
    }

    /// mixed (queries, head size) = weights V.
    #[inline(always)]
    fn mix<S: Simd, W: Weights>(&self, simd: S, numbers: W, weights: &[f32], mixed: &mut [f32]) {
        assert!(self.queries * self.size <= mixed.len() && self.queries * SPLIT <= weights.len());
        let mut query = 0;
        while query < self.queries {
            let weights = weights[query * SPLIT..].as_ptr();
            let mixed = mixed[query * self.size..].as_mut_ptr();
            let left = self.queries - query;
            query += if const { S::ACCUMULATORS >= 6 } && left >= 6 {
                self.mix_rows::<S, W, 6>(simd, numbers, weights, mixed)
            } else if const { S::ACCUMULATORS >= 6 } && left >= 3 {
                self.mix_rows::<S, W, 3>(simd, numbers, weights, mixed)
            } else {
                self.mix_rows::<S, W, 1>(simd, numbers, weights, mixed)
            };
        }
    }

    #[inline(always)]
    fn mix_rows<S: Simd, W: Weights, const R: usize>(
        &self,
        simd: S,
        numbers: W,
        weights: *const f32,
        mixed: *mut f32,
    ) -> usize {
        let mut at = 0;
        if const { panels_beside(S::ACCUMULATORS, R) == 4 } {
            at = self.mix_columns::<S, W, R, 4>(simd, numbers, weights, mixed, at);
        } else if const { panels_beside(S::ACCUMULATORS, R) == 2 } {
            at = self.mix_columns::<S, W, R, 2>(simd, numbers, weights, mixed, at);
        }
        self.mix_columns::<S, W, R, 1>(simd, numbers, weights, mixed, at);
        R
    }

    /// From column `at` on, P vectors of columns at a time; returns the first column that is left.
    #[inline(always)]
    fn mix_columns<S: Simd, W: Weights, const R: usize, const P: usize>(
        &self,
        simd: S,
        numbers: W,
        weights: *const f32,
        mixed: *mut f32,
        mut at: usize,
    ) -> usize {
        let (size, v) = (self.size, self.size * BLOCK_TOKENS);
        // The last vector may be narrow, but only if it is alone.
        while at < size && (P == 1 || at + P * LANES <= size) {
            let columns = self
                .starts
                .map(|start| std::array::from_fn(|p| start + v + at + p * LANES));
            // What lies beyond the last key was never written, or by a sequence that is gone: it may be NaN, which 0 would not
            // silence. So the last block ends where the keys do.
            let (whole, left) = (self.keys / BLOCK_TOKENS, self.keys % BLOCK_TOKENS);
            let tile = Tile::<_, R, P> {
                weights: numbers,
                segments: &columns[..whole],
                stride: size,
                count: BLOCK_TOKENS,
                x: weights,
                x_stride: SPLIT,
                target: Target {
                    y: mixed.wrapping_add(at),
                    stride: size,
                    lanes: if P == 1 { LANES.min(size - at) } else { LANES },
                    add: false,
                },
            };
            if whole > 0 {
                simd.call(tile);
            }
            if left > 0 {
                let target = Target {
                    add: whole > 0,
                    ..tile.target
                };
                simd.call(Tile {
                    segments: &columns[whole..][..1],
                    count: left,
                    x: weights.wrapping_add(whole * BLOCK_TOKENS),
                    target,
                    ..tile
                });
            }
            at += P * LANES;
        }
        at
    }
}
