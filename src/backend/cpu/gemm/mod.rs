//! Matrix products over panels. Panels of block formats meet x in int8 ([`super::int8`]), the others, and all extensions, in f32.
//!
//! One reduction order for every output: a single chain of fused multiply-adds over the inputs, ascending, then over the
//! extension's. Lanes are outputs, so neither the number of rows, nor tiles, nor blocks of inputs (partial sums wait in `y`, f32
//! as in the register) can change a bit.
//!
//! Bound: with few rows every weight is read once for few multiply-adds, so panels stream from memory, several at a time to
//! hide the latency of a chain. With many rows a block of inputs of a panel is widened to f32 once and used by all rows.

#![allow(unsafe_code)]

mod few_rows;
mod integers;
mod many_rows;
mod tile;
mod widen;

pub use few_rows::FEW_ROWS;
pub use tile::{Bf16s, F32s, Int8s, Target, Tile, Weights, panels_beside};

use std::ops::Range;

use few_rows::few_rows;
use integers::{extend_integers, multiply_integers};
use many_rows::many_rows;

use super::int8;
use super::pack::{PackedMatrix, Panel};
use super::simd::{Kernel, LANES, Simd};

/// Inputs in a block; a multiple of every format's unit.
const BLOCK: usize = 256;
/// Rows whose inputs of one block stay in the second-level cache.
const ROW_BLOCK: usize = 240;
/// Panels in one tile at most.
const PANELS_MAX: usize = 8;

/// A thread's room for widened weights.
#[repr(align(64))]
pub struct Scratch([f32; PANELS_MAX * BLOCK * LANES]);

impl Scratch {
    /// Zeros.
    pub fn boxed() -> Box<Self> {
        Box::new(Self([0.0; PANELS_MAX * BLOCK * LANES]))
    }
}

/// What is multiplied: rows `rows` of x (columns from `inputs.start` on meet the weights `inputs`) into y.
#[derive(Clone)]
pub struct Product<'a> {
    /// The weights.
    pub matrix: &'a PackedMatrix,
    /// Panels to compute.
    pub panels: Range<usize>,
    /// Inputs to sum over, whole units.
    pub inputs: Range<usize>,
    /// Whether the extension is added; its inputs follow the matrix's last one in x.
    pub extension: bool,
    /// Rows of x and y.
    pub rows: Range<usize>,
    /// Row 0, input 0.
    pub x: *const f32,
    /// Numbers from one row of x to the next.
    pub x_stride: usize,
    /// Row 0, output 0.
    pub y: *mut f32,
    /// Numbers from one row of y to the next.
    pub y_stride: usize,
    /// Sums start from y instead of 0.
    pub add: bool,
    /// x quantised, where a panel or the extension needs it.
    pub blocks: int8::Blocks,
}

// SAFETY: the pointers are used under the contract of `multiply`, which the maker of the product upholds for its thread.
unsafe impl Send for Product<'_> {}
// SAFETY: as above.
unsafe impl Sync for Product<'_> {}

/// Runs one product as a kernel.
pub struct Multiply<'a>(pub Product<'a>, pub &'a mut Scratch);

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: whoever builds a `Multiply` upholds the contract of `multiply`.
        unsafe { multiply(simd, &self.0, self.1) }
    }
}

/// # Safety
/// Rows of x must be readable for the inputs used, rows of y writable in the panels' outputs, and nobody else may use the latter.
#[inline(always)]
pub unsafe fn multiply<S: Simd>(simd: S, product: &Product<'_>, scratch: &mut Scratch) {
    let matrix = product.matrix;
    let extension = product.extension && matrix.extension_integers().is_none();
    let mut rest = product.panels.clone();
    while let Some(first) = matrix.panels().get(rest.clone()).and_then(<[Panel]>::first) {
        let integers = matrix.integers(first).is_some();
        let alike = |panel: &&Panel| matrix.integers(panel).is_some() == integers;
        let run = matrix.panels()[rest.clone()]
            .iter()
            .take_while(alike)
            .count();
        let run = Product {
            panels: rest.start..rest.start + run,
            extension,
            ..product.clone()
        };
        // SAFETY: by contract.
        unsafe {
            match integers {
                true => multiply_integers(simd, &run, scratch),
                false => multiply_floats(simd, &run, scratch),
            }
        }
        rest.start = run.panels.end;
    }
    if product.extension && !extension {
        extend_integers(simd, product);
    }
}

/// # Safety
/// As `multiply`; all panels meet x in f32 (or no inputs at all).
#[inline(always)]
unsafe fn multiply_floats<S: Simd>(simd: S, product: &Product<'_>, scratch: &mut Scratch) {
    // SAFETY: by contract.
    unsafe {
        if const { S::ACCUMULATORS == 1 } {
            for row in product.rows.clone() {
                let product = Product {
                    rows: row..row + 1,
                    ..product.clone()
                };
                few_rows::<S, 1>(simd, &product, scratch);
            }
            return;
        }
        match product.rows.len() {
            0 => {}
            1 => few_rows::<S, 1>(simd, product, scratch),
            2 => few_rows::<S, 2>(simd, product, scratch),
            3 => few_rows::<S, 3>(simd, product, scratch),
            4 => few_rows::<S, 4>(simd, product, scratch),
            5 => few_rows::<S, 5>(simd, product, scratch),
            6 => few_rows::<S, 6>(simd, product, scratch),
            _ => many_rows(simd, product, scratch),
        }
    }
}

impl Product<'_> {
    fn x_at(&self, row: usize, input: usize) -> *const f32 {
        self.x.wrapping_add(row * self.x_stride + input)
    }

    fn target(&self, row: usize, panel: &Panel, lanes: usize, add: bool) -> Target {
        Target {
            y: self.y.wrapping_add(row * self.y_stride + panel.first),
            stride: self.y_stride,
            lanes,
            add,
        }
    }
}

/// The first P panels, if one tile can take them: they are of one part, contiguous in memory and in y, and full.
#[inline(always)]
fn alike<const P: usize>(panels: &[Panel]) -> Option<&[Panel; P]> {
    let group = panels.first_chunk::<P>()?;
    let alike = |panel: &Panel| panel.lanes == LANES && panel.format == group[0].format;
    (P > 1 && group.iter().all(alike)).then_some(group)
}
