//! Many rows: a block of inputs of some panels is widened once for a block of rows.

#![allow(unsafe_code)]

use std::ops::Range;

use super::super::pack::{Format, Panel};
use super::super::simd::{LANES, Simd};
use super::tile::{F32s, Target, Tile};
use super::widen::Widen;
use super::{BLOCK, Product, ROW_BLOCK, Scratch, alike};
use crate::backend::Matrix;

/// Blocks of rows, blocks of inputs, panels, tiles: each block of a panel is widened once for a block of rows.
///
/// # Safety
/// As `multiply`.
#[inline(always)]
pub(super) unsafe fn many_rows<S: Simd>(simd: S, product: &Product<'_>, scratch: &mut Scratch) {
    for row in product.rows.clone().step_by(ROW_BLOCK) {
        let rows = row..product.rows.end.min(row + ROW_BLOCK);
        for input in product.inputs.clone().step_by(BLOCK) {
            let inputs = input..product.inputs.end.min(input + BLOCK);
            let add = product.add || input > product.inputs.start;
            // SAFETY: by contract. Wide registers need two panels for their many sums.
            unsafe {
                if const { S::ACCUMULATORS >= 24 } {
                    block::<S, 2>(simd, product, &rows, inputs, add, scratch);
                } else {
                    block::<S, 1>(simd, product, &rows, inputs, add, scratch);
                }
            }
        }
    }
}

/// One block of rows and inputs against all panels, P at a time where as many are alike; after the last inputs the extension.
///
/// # Safety
/// As `multiply`.
#[inline(always)]
unsafe fn block<S: Simd, const P: usize>(
    simd: S,
    product: &Product<'_>,
    rows: &Range<usize>,
    inputs: Range<usize>,
    add: bool,
    scratch: &mut Scratch,
) {
    let mut panels = &product.matrix.panels()[product.panels.clone()];
    while let Some(first) = panels.first() {
        let group = alike::<P>(panels);
        // SAFETY: by contract.
        unsafe {
            match group {
                Some(group) => {
                    block_group::<S, P>(simd, product, group, rows, inputs.clone(), add, scratch);
                }
                None => {
                    let group = [*first];
                    block_group::<S, 1>(simd, product, &group, rows, inputs.clone(), add, scratch);
                }
            }
        }
        panels = &panels[group.map_or(1, |group| group.len())..];
    }
}

/// # Safety
/// As `multiply`; all panels of the group have the same outputs and format.
#[inline(always)]
unsafe fn block_group<S: Simd, const P: usize>(
    simd: S,
    product: &Product<'_>,
    group: &[Panel; P],
    rows: &Range<usize>,
    inputs: Range<usize>,
    add: bool,
    scratch: &mut Scratch,
) {
    let matrix = product.matrix;
    let last = inputs.end == product.inputs.end;
    assert!(inputs.end <= matrix.inputs());
    let weights = BlockOf {
        product,
        group,
        weights: group.map(|panel| matrix.weights(&panel)),
        format: group[0].format,
        x: product.x_at(0, inputs.start),
        add,
    };
    // SAFETY: by contract, and the inputs are the matrix's (asserted).
    unsafe { weights.multiply(simd, rows, inputs, scratch) };
    if product.extension && last {
        for input in (0..matrix.extension_inputs()).step_by(BLOCK) {
            let inputs = input..matrix.extension_inputs().min(input + BLOCK);
            let extension = BlockOf {
                weights: group.map(|panel| matrix.extension(&panel)),
                format: matrix.extension_format(),
                x: product.x_at(0, matrix.inputs() + input),
                add: true,
                ..weights
            };
            // SAFETY: by contract, and the inputs are the extension's.
            unsafe { extension.multiply(simd, rows, inputs, scratch) };
        }
    }
}

/// A block of inputs of P panels, or of their extensions.
#[derive(Clone, Copy)]
struct BlockOf<'a, const P: usize> {
    product: &'a Product<'a>,
    group: &'a [Panel; P],
    /// Input 0 of each panel.
    weights: [*const u8; P],
    format: Format,
    /// Row 0, the block's first input.
    x: *const f32,
    add: bool,
}

impl<const P: usize> BlockOf<'_, P> {
    /// All `rows` against `inputs`, which are widened once unless they are f32.
    ///
    /// # Safety
    /// As `block_group`; the panels must have the inputs.
    #[inline(always)]
    unsafe fn multiply<S: Simd>(
        &self,
        simd: S,
        rows: &Range<usize>,
        inputs: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let lanes = self.group[0].lanes;
        let count = inputs.len();
        let (weights, step, stride) = if self.format == Format::F32 {
            let first: *const f32 = self.weights[0].cast();
            let step = self.product.matrix.panel_bytes(&self.group[0]) / 4;
            (first.wrapping_add(inputs.start * lanes), step, lanes)
        } else {
            let room = scratch.0.chunks_exact_mut(BLOCK * LANES);
            for (weights, out) in self.weights.into_iter().zip(room) {
                simd.call(Widen {
                    weights,
                    format: self.format,
                    lanes,
                    inputs: inputs.clone(),
                    out,
                });
            }
            (scratch.0.as_ptr(), BLOCK * LANES, LANES)
        };
        let tile = Tile::<_, 1, P> {
            weights: F32s(weights),
            segments: &[std::array::from_fn(|p| p * step)],
            stride,
            count,
            x: self.x,
            x_stride: self.product.x_stride,
            target: self.product.target(0, &self.group[0], lanes, self.add),
        };
        rows_by_tiles(simd, &tile, rows);
    }
}

/// All `rows` against the panels of `tile` (row 0's), in the largest tiles that the registers hold.
#[inline(always)]
fn rows_by_tiles<S: Simd, const P: usize>(
    simd: S,
    tile: &Tile<'_, F32s, 1, P>,
    rows: &Range<usize>,
) {
    let mut row = rows.start;
    while row < rows.end {
        let left = rows.end - row;
        if const { S::ACCUMULATORS >= 12 * P } && left >= 12 {
            row += call_rows::<S, 12, P>(simd, tile, row);
            continue;
        }
        if const { S::ACCUMULATORS < 6 * P } {
            row += call_rows::<S, 1, P>(simd, tile, row);
            continue;
        }
        // Tiles of about one height: a low one has too few chains to hide their latency (8 rows are 4 + 4, not 6 + 2).
        row += match left.div_ceil(left.div_ceil(6)) {
            6.. => call_rows::<S, 6, P>(simd, tile, row),
            5 => call_rows::<S, 5, P>(simd, tile, row),
            4 => call_rows::<S, 4, P>(simd, tile, row),
            3 => call_rows::<S, 3, P>(simd, tile, row),
            2 => call_rows::<S, 2, P>(simd, tile, row),
            _ => call_rows::<S, 1, P>(simd, tile, row),
        };
    }
}

#[inline(always)]
fn call_rows<S: Simd, const R: usize, const P: usize>(
    simd: S,
    tile: &Tile<'_, F32s, 1, P>,
    row: usize,
) -> usize {
    simd.call(Tile::<_, R, P> {
        weights: tile.weights,
        segments: tile.segments,
        stride: tile.stride,
        count: tile.count,
        x: tile.x.wrapping_add(row * tile.x_stride),
        x_stride: tile.x_stride,
        target: Target {
            y: tile.target.y.wrapping_add(row * tile.target.stride),
            ..tile.target
        },
    });
    R
}
