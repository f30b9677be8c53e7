//! Panels of block formats against x in int8 ([`int8`]), and extensions of that kind.

#![allow(unsafe_code)]

use std::ops::Range;

use super::super::int8;
use super::super::simd::{Kernel, Simd};
use super::few_rows::FEW_ROWS;
use super::{Product, ROW_BLOCK, Scratch, multiply_floats};
use crate::backend::Matrix;
use crate::backend::ops::INT8_BLOCK;

/// Rows at most that meet a panel of int8 products together, whatever their length: a batch of decodes, which waits for weights, not rows.
const INTEGER_ROWS_TOGETHER: usize = 48;
/// Bytes of rows in int8 that stay in the first-level cache beside a panel.
const INTEGER_ROW_BYTES: usize = 24 << 10;
/// Rows of the largest tile of int8 products.
const TILE_ROWS: usize = 12;

/// All panels in int8, then their extensions in f32.
///
/// # Safety
/// As `multiply`; all panels meet x in int8.
#[inline(always)]
pub(super) unsafe fn multiply_integers<S: Simd>(
    simd: S,
    product: &Product<'_>,
    scratch: &mut Scratch,
) {
    let (matrix, inputs) = (product.matrix, product.inputs.clone());
    let block = integer_row_block(product.rows.len(), inputs.len());
    for first in product.rows.clone().step_by(block) {
        let rows = first..product.rows.end.min(first + block);
        for panel in &matrix.panels()[product.panels.clone()] {
            let Some(quant) = matrix.integers(panel) else {
                continue;
            };
            let unit = inputs.start / quant.unit_len();
            let units = matrix
                .weights(panel)
                .wrapping_add(unit * quant.unit_bytes());
            let target = product.target(0, panel, panel.lanes, product.add);
            let x = (&product.blocks, inputs.clone(), product.rows.end);
            let tile = int8::Tile::new((quant, units), x, target);
            integer_rows(simd, tile, &rows);
        }
    }
    if product.extension {
        for first in product.rows.clone().step_by(FEW_ROWS) {
            let extension = Product {
                inputs: 0..0,
                rows: first..product.rows.end.min(first + FEW_ROWS),
                add: true,
                ..product.clone()
            };
            // SAFETY: by contract: no inputs but the extension's.
            unsafe { multiply_floats(simd, &extension, scratch) };
        }
    }
}

/// Rows of `inputs` numbers that stay in the first-level cache while panels pass by. So few rows that weights are still on their way from
/// memory meet each panel together.
fn integer_row_block(rows: usize, inputs: usize) -> usize {
    if rows <= INTEGER_ROWS_TOGETHER {
        return INTEGER_ROWS_TOGETHER;
    }
    let row_bytes = inputs.div_ceil(INT8_BLOCK) * size_of::<int8::Block>();
    let fitting = INTEGER_ROW_BYTES / row_bytes.max(1);
    (fitting / TILE_ROWS * TILE_ROWS).clamp(TILE_ROWS, ROW_BLOCK)
}

/// Adds the extension of all panels, in int8.
#[inline(always)]
pub(super) fn extend_integers<S: Simd>(simd: S, product: &Product<'_>) {
    let matrix = product.matrix;
    let inputs = matrix.inputs()..matrix.inputs() + matrix.extension_inputs();
    for panel in &matrix.panels()[product.panels.clone()] {
        let Some(quant) = matrix.extension_integers() else {
            continue;
        };
        let target = product.target(0, panel, panel.lanes, true);
        let x = (&product.blocks, inputs.clone(), product.rows.end);
        let tile = int8::Tile::new((quant, matrix.extension(panel)), x, target);
        integer_rows(simd, tile, &product.rows);
    }
}

/// All `rows` against the panel of `tile` (row 0's), in the largest tiles that the registers hold.
#[inline(always)]
fn integer_rows<S: Simd>(simd: S, tile: int8::Tile<1>, rows: &Range<usize>) {
    let mut row = rows.start;
    while row < rows.end {
        row += match rows.end - row {
            12.. if const { S::INTEGER_ROWS >= 12 } => integer_tile::<S, 12>(simd, tile, row),
            8.. if const { S::INTEGER_ROWS >= 8 } => integer_tile::<S, 8>(simd, tile, row),
            4.. if const { S::INTEGER_ROWS >= 4 } => integer_tile::<S, 4>(simd, tile, row),
            2.. if const { S::INTEGER_ROWS >= 4 } => integer_tile::<S, 2>(simd, tile, row),
            _ => integer_tile::<S, 1>(simd, tile, row),
        };
    }
}

#[inline(always)]
fn integer_tile<S: Simd, const R: usize>(simd: S, tile: int8::Tile<1>, row: usize) -> usize {
    tile.rows::<R>(row).run(simd);
    R
}
