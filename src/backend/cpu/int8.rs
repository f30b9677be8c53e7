//! Block formats against x in int8: products of bytes, exact sums in i32 over a block, one chain of f32 over the blocks.
//!
//! x is quantised once a product ([`Quantise`]), by the rule of [`ops::quantise_block`]. For an output and a block of 32 inputs
//! (Q6_K: twice 16) with weights s q + m, where m is the format's minimum or what its integers are offset by, and x = t p:
//!
//! `y += sum(q p) * (s t)`, then `y += m * (t sum(p))`; where m is an offset, it is taken off the integers instead: the exact sum begins
//! with it.
//!
//! Lanes are outputs and a row's sum depends on that row alone, so the laws of [`super::gemm`] hold here too.
//!
//! Bound: with few rows the panel's bytes from memory; with many 16 x 32 products for each row and block, whose unpacking is shared
//! by the rows of a tile.

#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use super::gemm::Target;
use super::quant::{QUAD, Quant, Sixteen};
use super::simd::{Kernel, LANES, Simd, load_some, store_some};
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
    halves: [i16; 2],
    /// -8 sum(p): what the offset of four bits adds to a sum of products.
    offset: i32,
}

impl Block {
    /// 32 times 0.
    pub const ZERO: Self = Self {
        p: [0; INT8_BLOCK],
        scale: 0.0,
        sum: 0.0,
        halves: [0; 2],
        offset: 0,
    };
}

/// Rows whose blocks lie side by side, so that a tile finds those of its rows at distances that are known when it is compiled.
const GROUP: usize = 4;

/// Rows of x, quantised: (rows / [`GROUP`], stride, [`GROUP`]) blocks.
///
/// Whoever makes one vouches that the blocks are there while it is used, and that no two threads write one, or one reads what another
/// writes.
#[derive(Clone, Copy)]
pub struct Blocks {
    /// Row 0, block 0.
    pub start: *mut Block,
    /// Of all rows from there.
    pub len: usize,
    /// Blocks in a row.
    pub stride: usize,
}

// SAFETY: the pointer is used as whoever made the blocks vouches.
unsafe impl Send for Blocks {}
// SAFETY: as above.
unsafe impl Sync for Blocks {}

impl Blocks {
    /// Of no length.
    pub const NONE: Self = Self {
        start: std::ptr::null_mut(),
        len: 0,
        stride: 0,
    };

    /// Blocks that `rows` rows take.
    pub const fn room(rows: usize, stride: usize) -> usize {
        rows.next_multiple_of(GROUP) * stride
    }

    /// The rows from `row` on, which is a multiple of [`GROUP`].
    #[inline(always)]
    pub fn from(&self, row: usize) -> Self {
        let first = row / GROUP * GROUP * self.stride;
        Self {
            start: self.start.wrapping_add(first),
            len: self.len.saturating_sub(first),
            stride: self.stride,
        }
    }

    /// The blocks of `inputs` in row 0.
    ///
    /// # Panics
    /// When the first `rows` rows do not have them: a comparison a panel.
    #[inline(always)]
    fn at(&self, rows: usize, inputs: Range<usize>) -> *const Block {
        let room = Self::room(rows, self.stride);
        assert!(inputs.end <= self.stride * INT8_BLOCK && self.len >= room);
        self.start
            .wrapping_add(inputs.start / INT8_BLOCK * GROUP)
            .cast_const()
    }

    /// Quantises the whole blocks of `x`, which is what row `row` has from column `column` on; nothing, if the row has no room for it.
    ///
    /// # Panics
    /// When there is no such row.
    #[inline(always)]
    pub fn write<S: Simd>(&self, simd: S, row: usize, column: usize, x: &[f32]) {
        let (block, (x, _)) = (column / INT8_BLOCK, x.as_chunks::<INT8_BLOCK>());
        if block + x.len() > self.stride {
            return;
        }
        assert!(Self::room(row + 1, self.stride) <= self.len);
        let first = (row / GROUP * self.stride + block) * GROUP + row % GROUP;
        for (i, x) in x.iter().enumerate() {
            // SAFETY: within the blocks by the assertion, and nobody else's by contract.
            unsafe { *self.start.add(first + i * GROUP) = quantise(simd, x) };
        }
    }
}

/// Quantises rows of x, whole blocks each.
pub struct Quantise<'a> {
    /// Rows, `width` apart.
    pub x: &'a [f32],
    /// Numbers from row to row.
    pub width: usize,
    /// Which rows.
    pub rows: Range<usize>,
    /// Receives the first of each row's blocks, as many as it has room for.
    pub out: Blocks,
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.rows {
            let x = &self.x[row * self.width..][..self.out.stride * INT8_BLOCK];
            self.out.write(simd, row, 0, x);
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
    let most = simd.largest(most);
    // 0, but NaN where x has anything that is not finite: it must reach the outputs.
    let differences = simd.add(
        simd.sub(halves[0], halves[0]),
        simd.sub(halves[1], halves[1]),
    );
    let broken = match simd.any_nan(differences) {
        true => f32::NAN,
        false => 0.0,
    };
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
        // At most 16 * 127.
        let mut sum = 0;
        for p in &block.p[half * LANES..][..LANES] {
            sum += i16::from(*p);
        }
        block.halves[half] = sum;
    }
    let sum = i32::from(block.halves[0] + block.halves[1]);
    block.offset = -8 * sum;
    block.scale = most / 127.0 + broken;
    block.sum = block.scale * sum as f32;
    block
}

/// R rows of x against one panel.
///
/// Whoever makes one vouches that all it names is readable, y writable, and that nobody else uses y.
#[derive(Clone, Copy)]
pub struct Tile<const R: usize> {
    /// Format of the panel.
    quant: Quant,
    /// Its units.
    units: *const u8,
    /// How many: inputs / unit length.
    count: usize,
    /// The first row's first block.
    x: *const Block,
    /// Blocks from one group of rows to the next.
    x_stride: usize,
    /// Where the sums go.
    target: Target,
}

impl Tile<1> {
    /// The inputs `inputs` of rows 0.. (below `end`) of `x` against a panel of `quant` whose units these are, from input 0 on.
    ///
    /// # Panics
    /// When `x` does not have them.
    #[inline(always)]
    pub fn new(
        (quant, units): (Quant, *const u8),
        (x, inputs, end): (&Blocks, Range<usize>, usize),
        target: Target,
    ) -> Self {
        Self {
            quant,
            units,
            count: inputs.len() / quant.unit_len(),
            x: x.at(end, inputs),
            x_stride: x.stride * GROUP,
            target,
        }
    }

    /// R rows from `row` on.
    ///
    /// # Panics
    /// When they begin within a group and end outside of it.
    #[inline(always)]
    pub fn rows<const R: usize>(&self, row: usize) -> Tile<R> {
        assert!(row.is_multiple_of(GROUP) || row % GROUP + R <= GROUP);
        Tile {
            quant: self.quant,
            units: self.units,
            count: self.count,
            x: self
                .x
                .wrapping_add(row / GROUP * self.x_stride + row % GROUP),
            x_stride: self.x_stride,
            target: Target {
                y: self.target.y.wrapping_add(row * self.target.stride),
                ..self.target
            },
        }
    }
}

impl<const R: usize> Kernel for Tile<R> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // A kernel for each format, which knows its layout when it is compiled.
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
            let block = self.row(r, block);
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
        unsafe { &*self.row(r, block) }
    }

    #[inline(always)]
    fn row(&self, r: usize, block: usize) -> *const Block {
        let at = r / GROUP * self.x_stride + block * GROUP + r % GROUP;
        self.x.wrapping_add(at)
    }
}

/// Q8_0.
struct Bytes<const R: usize>(Tile<R>);

impl<const R: usize> Kernel for Bytes<R> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let tile = self.0;
        let at = const { BYTES.layout() };
        let bytes = const { BYTES.unit_bytes() };
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
                    for r in 0..R {
                        dots[r] = simd.pin(dots[r]);
                    }
                }
                let scale = simd.load_f16(unit.cast());
                let minimum = simd.mul(scale, simd.splat(const { -S::SIGNED_OFFSET as f32 }));
                for r in 0..R {
                    let x = tile.block(r, index);
                    let scale = simd.mul(scale, simd.splat(x.scale));
                    sums[r] = simd.fma(simd.to_float(dots[r]), scale, sums[r]);
                    if const { S::SIGNED_OFFSET != 0 } {
                        sums[r] = simd.fma(minimum, simd.splat(x.sum), sums[r]);
                    }
                }
            }
            tile.finish(simd, sums);
        }
    }
}

const BYTES: Quant = known(DType::Q8_0);

const fn known(dtype: DType) -> Quant {
    match Quant::of(dtype) {
        Some(quant) => quant,
        None => panic!("a format of blocks"),
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
        let at = const { Self::QUANT.layout() };
        let bytes = const { Self::QUANT.unit_bytes() };
        let blocks = const { Self::QUANT.unit_len() / INT8_BLOCK };
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
    const QUANT: Quant = known(match (HIGH, MINIMUM, K) {
        (0, false, _) => DType::Q4_0,
        (0, true, false) => DType::Q4_1,
        (0, true, true) => DType::Q4K,
        (1, false, _) => DType::Q5_0,
        (1, true, false) => DType::Q5_1,
        (1, true, true) => DType::Q5K,
        _ => DType::Q6K,
    });

    /// Whether sums of products begin with the format's offset: 8 of four bits, 16 of five. That of six belongs to halves.
    const OFFSET_FIRST: bool = {
        let first = !MINIMUM && HIGH < 2;
        assert!(!first || Self::QUANT.offset == 8 << HIGH);
        first
    };

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
        let (mut dots, mut small) = ([[zero; R]; 2], [zero; R]);
        if const { Self::OFFSET_FIRST } {
            for r in 0..R {
                // SAFETY: by contract.
                let offset = simd.splat_int(unsafe { self.0.block(r, x) }.offset);
                dots[0][r] = match HIGH {
                    0 => offset,
                    _ => simd.shl::<1>(offset),
                };
            }
        }
        let second = if HIGH == 2 { QUAD } else { 0 };
        // Two calls and no loop, which would keep the sums in memory.
        // SAFETY: by contract.
        unsafe {
            self.half(simd, (low, high, 0), x, &mut dots, &mut small);
            let (low, high) = (low.add(2 * QUAD), high.add(second));
            self.half(simd, (low, high, 1), x, &mut dots, &mut small);
        }
        dots
    }

    /// Sixteen inputs: those of half `half` of block `x`.
    ///
    /// # Safety
    /// `low` is two quads, `high` one (if HIGH > 0); the rows must have block `x`.
    #[inline(always)]
    unsafe fn half<S: Simd>(
        &self,
        simd: S,
        (low, high, half): (*const u8, *const u8, usize),
        x: usize,
        dots: &mut Dots<S::I, R>,
        small: &mut [S::I; R],
    ) {
        let into = if HIGH == 2 { half } else { 0 };
        // SAFETY: by contract.
        let quads = unsafe { Sixteen::<S, HIGH>::load(simd, low, high, half).0 };
        for quad in 0..4 {
            for r in 0..R {
                // SAFETY: by contract.
                let x = unsafe { self.0.quad(simd, r, x, half * 4 + quad) };
                if const { S::SMALL_IS_WHOLE } {
                    dots[into][r] = simd.dot_small(dots[into][r], quads[quad], x);
                } else {
                    small[r] = simd.dot_small(small[r], quads[quad], x);
                }
            }
            for r in 0..R {
                dots[into][r] = simd.pin(dots[into][r]);
            }
            // The most an i16 takes: 8 quads of 4 bits (8 * 2 * 15 * 127 = 30,480), 4 of 5 bits, 2 of 6.
            let full = match HIGH {
                0 => half == 1 && quad == 3,
                1 => quad == 3,
                _ => quad % 2 == 1,
            };
            if const { !S::SMALL_IS_WHOLE } && full {
                for r in 0..R {
                    dots[into][r] = simd.add_int(dots[into][r], simd.whole(small[r]));
                    small[r] = simd.splat_int(0);
                }
            }
        }
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
        let tile = &self.0;
        let at = const { Self::QUANT.layout() };
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
                if groups == 2 {
                    let offset = const { -Self::QUANT.offset };
                    dot = simd.add_int(dot, simd.splat_int(offset * i32::from(x.halves[group])));
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
