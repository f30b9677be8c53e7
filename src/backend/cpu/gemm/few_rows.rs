//! Few rows: panels stream from memory, several at a time.

#![allow(unsafe_code)]

use std::ops::Range;

use super::super::pack::{Format, Panel};
use super::super::simd::{LANES, Simd};
use super::tile::{Bf16s, F32s, Tile, Weights, panels_beside};
use super::widen::Widen;
use super::{Product, Scratch, alike};
use crate::backend::Matrix;

/// Inputs that are widened at a time: several panels share the scratch.
const SMALL_BLOCK: usize = 64;
/// Rows at most that stream the weights instead of widening them once.
pub const FEW_ROWS: usize = 6;

/// All R rows of the product against each panel in turn, as many panels at a time as there are registers for.
///
/// # Safety
/// As `multiply`.
#[inline(always)]
pub(super) unsafe fn few_rows<S: Simd, const R: usize>(
    simd: S,
    product: &Product<'_>,
    scratch: &mut Scratch,
) {
    // SAFETY: by contract.
    unsafe {
        if const { panels_beside(S::ACCUMULATORS, R) == 4 } {
            few_rows_by::<S, R, 4>(simd, product, scratch);
        } else if const { panels_beside(S::ACCUMULATORS, R) == 2 } {
            few_rows_by::<S, R, 2>(simd, product, scratch);
        } else {
            few_rows_by::<S, R, 1>(simd, product, scratch);
        }
    }
}

/// # Safety
/// As `multiply`.
#[inline(always)]
unsafe fn few_rows_by<S: Simd, const R: usize, const P: usize>(
    simd: S,
    product: &Product<'_>,
    scratch: &mut Scratch,
) {
    let mut panels = &product.matrix.panels()[product.panels.clone()];
    while let Some(first) = panels.first() {
        // SAFETY: by contract.
        panels = unsafe {
            if let Some(group) = alike::<P>(panels) {
                few_rows_tile::<S, R, P>(simd, product, group, scratch);
                &panels[P..]
            } else if let (true, Some(group)) = (const { P == 4 }, alike::<2>(panels)) {
                few_rows_tile::<S, R, 2>(simd, product, group, scratch);
                &panels[2..]
            } else {
                few_rows_tile::<S, R, 1>(simd, product, &[*first], scratch);
                &panels[1..]
            }
        };
    }
}

/// # Safety
/// As `multiply`; all panels of the group have the same outputs and format.
#[inline(always)]
unsafe fn few_rows_tile<S: Simd, const R: usize, const P: usize>(
    simd: S,
    product: &Product<'_>,
    group: &[Panel; P],
    scratch: &mut Scratch,
) {
    let (matrix, inputs) = (product.matrix, product.inputs.clone());
    let (first, step) = (matrix.weights(&group[0]), matrix.panel_bytes(&group[0]));
    let start = inputs.start * group[0].lanes;
    match group[0].format {
        Format::F32 => {
            let segment = std::array::from_fn(|p| start + p * step / 4);
            stream::<S, _, R, P>(simd, product, group, F32s(first.cast()), segment, inputs);
        }
        Format::BF16 => {
            let segment = std::array::from_fn(|p| start + p * step / 2);
            stream::<S, _, R, P>(simd, product, group, Bf16s(first.cast()), segment, inputs);
        }
        Format::F16 | Format::Quant(_) => {
            // SAFETY: by contract.
            unsafe { widened_tile::<S, R, P>(simd, product, group, scratch) };
        }
    }
    if product.extension {
        let product = Product {
            add: true,
            ..product.clone()
        };
        let first = matrix.extension(&group[0]);
        let inputs = matrix.inputs()..matrix.inputs() + matrix.extension_inputs();
        if matrix.extension_format() == Format::BF16 {
            let segment = std::array::from_fn(|p| p * step / 2);
            stream::<S, _, R, P>(simd, &product, group, Bf16s(first.cast()), segment, inputs);
        } else {
            let segment = std::array::from_fn(|p| p * step / 4);
            stream::<S, _, R, P>(simd, &product, group, F32s(first.cast()), segment, inputs);
        }
    }
}

/// A tile of weights as they are stored: the columns `inputs` of x meet those of `segment`.
#[inline(always)]
fn stream<S: Simd, W: Weights, const R: usize, const P: usize>(
    simd: S,
    product: &Product<'_>,
    group: &[Panel; P],
    weights: W,
    segment: [usize; P],
    inputs: Range<usize>,
) {
    let (row, lanes) = (product.rows.start, group[0].lanes);
    simd.call(Tile::<_, R, P> {
        weights,
        segments: &[segment],
        stride: lanes,
        count: inputs.len(),
        x: product.x_at(row, inputs.start),
        x_stride: product.x_stride,
        target: product.target(row, &group[0], lanes, product.add),
    });
}

/// A tile of panels that are widened first, some inputs at a time.
///
/// # Safety
/// As `few_rows_tile`.
#[inline(always)]
unsafe fn widened_tile<S: Simd, const R: usize, const P: usize>(
    simd: S,
    product: &Product<'_>,
    group: &[Panel; P],
    scratch: &mut Scratch,
) {
    let unit = match group[0].format {
        Format::Quant(quant) => quant.unit_len(),
        _ => 1,
    };
    let (block, row) = (SMALL_BLOCK.max(unit), product.rows.start);
    assert!(product.inputs.end <= product.matrix.inputs());
    for input in product.inputs.clone().step_by(block) {
        let inputs = input..product.inputs.end.min(input + block);
        for (p, panel) in group.iter().enumerate() {
            simd.call(Widen {
                weights: product.matrix.weights(panel),
                format: panel.format,
                lanes: panel.lanes,
                inputs: inputs.clone(),
                out: &mut scratch.0[p * block * LANES..][..block * LANES],
            });
        }
        let add = product.add || input > product.inputs.start;
        simd.call(Tile::<_, R, P> {
            weights: F32s(scratch.0.as_ptr()),
            segments: &[std::array::from_fn(|p| p * block * LANES)],
            stride: LANES,
            count: inputs.len(),
            x: product.x_at(row, input),
            x_stride: product.x_stride,
            target: product.target(row, &group[0], group[0].lanes, add),
        });
    }
}
