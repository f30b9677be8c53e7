//! Block formats against x in int8: products of bytes, exact sums in i32 over a block, one chain of f32 over the blocks.
//!
//! x is quantised once a product ([`Quantise`]), by the rule of [`ops::quantise_block`]. For an output and a block of 32 inputs
//! (Q6_K: twice 16) with weights s q - o s + m and x = t p:
//!
//! `y += (sum(q p) - o sum(p)) * (s t)`, then, where the format has a minimum, `y += m * (t sum(p))`.
//!
//! Lanes are outputs and a row's sum depends on that row alone, so the laws of [`super::gemm`] hold here too.
//!
//! Bound: with few rows the panel's bytes from memory; with many 16 x 32 products for each row and block, whose unpacking is shared
//! by the rows of a tile.

#![allow(unsafe_code, clippy::needless_range_loop)]

use super::gemm::Target;
use super::quant::{QUAD, Quant, Sixteen};
use super::simd::{Kernel, LANES, Simd, largest, load_some, store_some};
use crate::backend::ops::{INT8_BLOCK, INT8_LEAST};
use crate::dtype::DType;

/// 32 inputs of one row.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub struct Block {
    p: [i8; INT8_BLOCK],
    /// t.
    scale: f32,
    /// t sum(p).
    sum: f32,
    /// sum(p) of each half.
    halves: [i32; 2],
}

impl Block {
    /// 32 times 0.
    pub const ZERO: Self = Self {
        p: [0; INT8_BLOCK],
        scale: 0.0,
        sum: 0.0,
        halves: [0; 2],
    };
}

/// Quantises rows of x, whole blocks each.
pub struct Quantise<'a> {
    /// Rows, `stride` apart.
    pub x: &'a [f32],
    /// Numbers from row to row.
    pub stride: usize,
    /// Inputs of a row to quantise.
    pub inputs: usize,
    /// (rows, inputs / 32).
    pub out: &'a mut [Block],
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let blocks = self.inputs / INT8_BLOCK;
        if blocks == 0 {
            return;
        }
        let rows = self
            .x
            .chunks(self.stride)
            .zip(self.out.chunks_exact_mut(blocks));
        for (row, out) in rows {
            for (x, out) in row.as_chunks::<INT8_BLOCK>().0.iter().zip(out) {
                *out = quantise(simd, x);
            }
        }
    }
}

#[inline(always)]
fn quantise<S: Simd>(simd: S, x: &[f32; INT8_BLOCK]) -> Block {
    // SAFETY: 32 numbers are two vectors.
    let halves = unsafe { [simd.load(x.as_ptr()), simd.load(x.as_ptr().add(LANES))] };
    let most = simd.max(simd.max(halves[0], halves[1]), {
        let zero = simd.splat(0.0);
        simd.max(simd.sub(zero, halves[0]), simd.sub(zero, halves[1]))
    });
    let most = largest(simd, most);
    // 0, but NaN where x has anything that is not finite: it must reach the outputs. No closure: an iterator that calls
    // one is compiled without the kernel's instructions.
    let broken = simd.add(
        simd.sub(halves[0], halves[0]),
        simd.sub(halves[1], halves[1]),
    );
    let broken = super::simd::sum(simd, broken);
    let mut block = Block::ZERO;
    if most < INT8_LEAST {
        return Block {
            scale: broken,
            sum: broken,
            ..block
        };
    }
    let inverse = simd.splat(127.0 / most);
    for half in 0..2 {
        let p = simd.round(simd.mul(halves[half], inverse));
        // SAFETY: each half has 16 bytes.
        unsafe { simd.store_i8(block.p.as_mut_ptr().add(half * LANES), p) };
        let mut sum = 0;
        for p in &block.p[half * LANES..][..LANES] {
            sum += i32::from(*p);
        }
        block.halves[half] = sum;
    }
    block.scale = most / 127.0 + broken;
    block.sum = block.scale * (block.halves[0] + block.halves[1]) as f32;
    block
}

/// R rows of x against one panel.
///
/// Whoever makes one vouches that all it names is readable, y writable, and that nobody else uses y.
#[derive(Clone, Copy)]
pub struct Tile<const R: usize> {
    /// Format of the panel.
    pub quant: Quant,
    /// Its units.
    pub units: *const u8,
    /// How many: inputs / unit length.
    pub count: usize,
    /// The first row's first block.
    pub x: *const Block,
    /// Blocks from row to row.
    pub x_stride: usize,
    /// Where the sums go.
    pub target: Target,
}

impl<const R: usize> Kernel for Tile<R> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.quant.dtype {
            DType::Q8_0 => simd.call(Bytes(self)),
            DType::Q4_0 => simd.call(Nibbles::<R, 0, false, false>(self)),
            DType::Q4_1 => simd.call(Nibbles::<R, 0, true, false>(self)),
            DType::Q5_0 => simd.call(Nibbles::<R, 1, false, false>(self)),
            DType::Q5_1 => simd.call(Nibbles::<R, 1, true, false>(self)),
            DType::Q4K => simd.call(Nibbles::<R, 0, true, true>(self)),
            DType::Q5K => simd.call(Nibbles::<R, 1, true, true>(self)),
            DType::Q6K => simd.call(Nibbles::<R, 2, false, true>(self)),
            DType::F32 | DType::F16 | DType::BF16 => {}
        }
    }
}

impl<const R: usize> Tile<R> {
    /// # Safety
    /// The tile of y must be readable.
    #[inline(always)]
    unsafe fn begin<S: Simd>(&self, simd: S) -> [S::F; R] {
        let Target {
            y,
            stride,
            lanes,
            add,
        } = self.target;
        let mut sums = [simd.splat(0.0); R];
        if add {
            for r in 0..R {
                // SAFETY: by contract.
                sums[r] = unsafe { load_some(simd, y.add(r * stride), lanes) };
            }
        }
        sums
    }

    /// # Safety
    /// The tile of y must be writable.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, simd: S, sums: [S::F; R]) {
        let Target {
            y, stride, lanes, ..
        } = self.target;
        for r in 0..R {
            // SAFETY: by contract.
            unsafe { store_some(simd, y.add(r * stride), lanes, sums[r]) };
        }
    }

    /// Quad `quad` of block `block` of row r, in all lanes.
    ///
    /// # Safety
    /// The row must have the block.
    #[inline(always)]
    unsafe fn quad<S: Simd>(&self, simd: S, r: usize, block: usize, quad: usize) -> S::I {
        // SAFETY: by contract, and `quad` is below 8.
        simd.splat_int(unsafe {
            let block = self.x.add(r * self.x_stride + block);
            (&raw const (*block).p)
                .cast::<i32>()
                .add(quad)
                .read_unaligned()
        })
    }

    /// # Safety
    /// The row must have the block.
    #[inline(always)]
    unsafe fn block(&self, r: usize, block: usize) -> &Block {
        // SAFETY: by contract.
        unsafe { &*self.x.add(r * self.x_stride + block) }
    }
}

/// Q8_0.
struct Bytes<const R: usize>(Tile<R>);

impl<const R: usize> Kernel for Bytes<R> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let tile = self.0;
        let (at, bytes) = (tile.quant.layout(), tile.quant.unit_bytes());
        // SAFETY: vouched for by the maker of the tile; offsets are the layout's.
        unsafe {
            let mut sums = tile.begin(simd);
            for index in 0..tile.count {
                let unit = tile.units.add(index * bytes);
                let mut dots = [simd.splat_int(0); R];
                for quad in 0..8 {
                    let w = simd.load_quads(unit.add(at.low + quad * QUAD));
                    for r in 0..R {
                        dots[r] = simd.dot_signed(dots[r], w, tile.quad(simd, r, index, quad));
                    }
                }
                let scale = simd.load_f16(unit.cast());
                for r in 0..R {
                    let x = tile.block(r, index);
                    let mut dot = dots[r];
                    if S::SIGNED_OFFSET != 0 {
                        let sum = x.halves[0] + x.halves[1];
                        dot = simd.add_int(dot, simd.splat_int(-S::SIGNED_OFFSET * sum));
                    }
                    let scale = simd.mul(scale, simd.splat(x.scale));
                    sums[r] = simd.fma(simd.to_float(dot), scale, sums[r]);
                }
            }
            tile.finish(simd, sums);
        }
    }
}

/// Formats with nibbles: HIGH bits above them, a MINIMUM, K-quants' integer scales.
struct Nibbles<const R: usize, const HIGH: usize, const MINIMUM: bool, const K: bool>(Tile<R>);

/// The exact sums of 32 inputs; of Q6_K (HIGH = 2) of each half, else all in the first.
type Dots<I, const R: usize> = [[I; R]; 2];

impl<const R: usize, const HIGH: usize, const MINIMUM: bool, const K: bool> Kernel
    for Nibbles<R, HIGH, MINIMUM, K>
{
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let tile = &self.0;
        let (at, bytes) = (tile.quant.layout(), tile.quant.unit_bytes());
        let blocks = tile.quant.unit_len() / INT8_BLOCK;
        // SAFETY: vouched for by the maker of the tile; offsets are the layout's.
        unsafe {
            let mut sums = tile.begin(simd);
            for index in 0..tile.count {
                let unit = tile.units.add(index * bytes);
                for block in 0..blocks {
                    let low = unit.add(at.low + block * 4 * QUAD);
                    let high = unit.add(at.high + block * HIGH * QUAD);
                    let x = index * blocks + block;
                    let dots = self.dots(simd, low, high, x);
                    self.add(simd, &mut sums, unit, block, (dots, x));
                }
            }
            tile.finish(simd, sums);
        }
    }
}

impl<const R: usize, const HIGH: usize, const MINIMUM: bool, const K: bool>
    Nibbles<R, HIGH, MINIMUM, K>
{
    /// # Safety
    /// `low` is four quads, `high` HIGH; the rows must have block `x`.
    #[inline(always)]
    unsafe fn dots<S: Simd>(
        &self,
        simd: S,
        low: *const u8,
        high: *const u8,
        x: usize,
    ) -> Dots<S::I, R> {
        let zero = simd.splat_int(0);
        let mut dots = [[zero; R]; 2];
        let mut sums = [zero; R];
        for half in 0..2 {
            // SAFETY: by contract.
            let quads = unsafe {
                let high = high.add(if HIGH == 2 { half * QUAD } else { 0 });
                Sixteen::<S, HIGH>::load(simd, low.add(half * 2 * QUAD), high, half).0
            };
            for quad in 0..4 {
                for r in 0..R {
                    // SAFETY: by contract.
                    let x = unsafe { self.0.quad(simd, r, x, half * 4 + quad) };
                    sums[r] = simd.dot_small(sums[r], quads[quad], x);
                }
                // The most an i16 takes: 8 quads of 4 bits (8 * 2 * 15 * 127 = 30,480), 4 of 5 bits, 2 of 6.
                let full = match HIGH {
                    0 => half == 1 && quad == 3,
                    1 => quad == 3,
                    _ => quad % 2 == 1,
                };
                if full {
                    let into = if HIGH == 2 { half } else { 0 };
                    for r in 0..R {
                        dots[into][r] = simd.add_int(dots[into][r], simd.whole(sums[r]));
                        sums[r] = zero;
                    }
                }
            }
        }
        dots
    }

    /// # Safety
    /// `unit` is a unit of the format, `block` one of its blocks; the rows must have block `x`.
    #[inline(always)]
    unsafe fn add<S: Simd>(
        &self,
        simd: S,
        sums: &mut [S::F; R],
        unit: *const u8,
        block: usize,
        (dots, x): (Dots<S::I, R>, usize),
    ) {
        let (tile, at) = (&self.0, self.0.quant.layout());
        let groups = if HIGH == 2 { 2 } else { 1 };
        for group in 0..groups {
            let lanes = (block * groups + group) * LANES;
            // SAFETY: offsets are the layout's.
            let (scale, minimum) = unsafe {
                let mut scale = simd.load_f16(unit.cast());
                if K {
                    let integer = unit.add(at.group_scale + lanes);
                    let integer = match MINIMUM {
                        true => simd.load_u8(integer),
                        false => simd.load_i8(integer.cast()),
                    };
                    scale = simd.mul(scale, simd.to_float(integer));
                }
                let mut minimum = simd.splat(0.0);
                if MINIMUM {
                    minimum = simd.load_f16(unit.add(at.minimum).cast());
                }
                if K && MINIMUM {
                    let integer = simd.load_u8(unit.add(at.group_minimum + lanes));
                    minimum = simd.mul(minimum, simd.to_float(integer));
                    minimum = simd.sub(simd.splat(0.0), minimum);
                }
                (scale, minimum)
            };
            for r in 0..R {
                // SAFETY: by contract.
                let x = unsafe { tile.block(r, x) };
                let mut dot = dots[group][r];
                if !MINIMUM {
                    let sum = match HIGH {
                        2 => x.halves[group],
                        _ => x.halves[0] + x.halves[1],
                    };
                    dot = simd.add_int(dot, simd.splat_int(-tile.quant.offset * sum));
                }
                let scale = simd.mul(scale, simd.splat(x.scale));
                sums[r] = simd.fma(simd.to_float(dot), scale, sums[r]);
                if MINIMUM {
                    sums[r] = simd.fma(minimum, simd.splat(x.sum), sums[r]);
                }
            }
        }
    }
}
