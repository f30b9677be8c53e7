//! silu(gate) * up, and the experts' half of the routed layer, in one pass over h.
//!
//! h is cut into splits of [`SPLIT`] inputs. Each split is written and, while it is in the first-level cache, met with its
//! columns of E; the splits' sums are added in order. So one row can keep all threads busy, and the bits depend on m only.
//!
//! Bound: 2m + m numbers a row, and E from the second-level cache once for [`ROWS`] rows; E is a few rows beside the base's d.

#![allow(unsafe_code)]

use std::ops::Range;

use super::gemm::{self, Product};
use super::int8;
use super::pack::PackedMatrix;
use super::pool::Parts;
use super::simd::{Kernel, LANES, Simd, load_some, silu, store_some};
use crate::backend::ops::{ExpertShape, bind_parts};
use crate::backend::{BackendError, HostMatrix, HostSequence, HostStep, Matrix};
use crate::types::GateOverride;

/// Inputs in a split: a multiple of every format's unit.
pub const SPLIT: usize = 256;
/// Rows that meet a split of E while it is in the cache.
pub const ROWS: usize = 4 * gemm::FEW_ROWS;

/// What all chunks share.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The step: rules of the gates.
    pub step: &'a HostStep,
    /// Columns of `gates`: 2 layer, 2 layer + 1.
    pub layer: usize,
    /// m.
    pub m: usize,
    /// (n, 2m).
    pub gate_up: &'a [f32],
    /// E.
    pub experts: Option<(&'a PackedMatrix, ExpertShape)>,
    /// (n, m + w).
    pub hu: &'a Parts<'a, f32>,
    /// Numbers in a row of `hu`.
    pub hu_width: usize,
    /// (n, gates' width).
    pub gates: &'a Parts<'a, f32>,
    /// Numbers in a row of `gates`.
    pub gates_width: usize,
    /// (n, w + 2): takes z instead.
    pub z: Option<&'a Parts<'a, f32>>,
    /// Receives hu as block formats meet it: the blocks of h, then those of u, as far as it has room.
    pub blocks: int8::Blocks,
}

/// What one chunk of the op does.
pub enum Job<'a> {
    /// Some rows wholly.
    Rows(Range<usize>),
    /// One split of some rows; its part of z goes to row r, split s, of the shared (n, splits, outputs of E).
    Split(Range<usize>, usize, &'a Parts<'a, f32>),
    /// Gates and u of some rows, from their parts of z.
    Finish(Range<usize>, &'a [f32]),
}

/// A thread's room: z of some rows, and one split's part of it.
#[derive(Default)]
pub struct Scratch {
    z: Vec<f32>,
    part: Vec<f32>,
}

impl Scratch {
    /// Bytes of both.
    pub fn bytes(outputs: usize) -> usize {
        2 * ROWS * outputs * size_of::<f32>()
    }

    /// Makes room for E's outputs; does nothing from the second call on.
    pub fn reserve(&mut self, outputs: usize) {
        if self.z.len() < ROWS * outputs {
            self.z.resize(ROWS * outputs, 0.0);
            self.part.resize(ROWS * outputs, 0.0);
        }
    }
}

/// A chunk as a kernel.
pub struct Mix<'a>(
    pub Context<'a>,
    pub Job<'a>,
    pub &'a mut Scratch,
    pub &'a mut gemm::Scratch,
);

impl Kernel for Mix<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(context, job, scratch, widened) = self;
        match job {
            Job::Rows(rows) => context.rows(simd, rows, scratch, widened),
            Job::Split(rows, split, parts) => {
                let Some((e, _)) = context.experts else {
                    return context.silu_mul(simd, &rows, split, None);
                };
                let stride = context.splits() * e.outputs();
                let y = parts
                    .as_ptr()
                    .wrapping_add(rows.start * stride + split * e.outputs());
                assert!(rows.end * stride <= parts.len());
                context.silu_mul(simd, &rows, split, Some((e, y, stride)));
                context.multiply(simd, e, &rows, split, (y, stride), widened);
            }
            Job::Finish(rows, parts) => context.finish_parts(simd, rows, parts, scratch),
        }
    }
}

/// The rows of both gates (2, m).
pub fn rows_of(gates: HostMatrix<'_>) -> Result<[HostMatrix<'_>; 2], BackendError> {
    bind_parts(&[gates], None)?;
    if gates.rows != 2 {
        return Err(BackendError::Contract {
            op: "experts",
            operand: "gates",
            expected: "2 rows".to_owned(),
            found: format!("{} rows", gates.rows),
        });
    }
    let (a, b) = gates.bytes.split_at(gates.bytes.len() / 2);
    let row = |bytes| HostMatrix {
        rows: 1,
        bytes,
        ..gates
    };
    Ok([row(a), row(b)])
}

/// Splits of `m` inputs.
pub fn splits(m: usize) -> usize {
    m.div_ceil(SPLIT)
}

/// z += part, without a closure: what calls one is compiled without the kernel's instructions.
#[inline(always)]
fn add(z: &mut [f32], part: &[f32]) {
    for (z, part) in z.iter_mut().zip(part) {
        *z += part;
    }
}

impl Context<'_> {
    /// Splits of m.
    pub fn splits(&self) -> usize {
        splits(self.m)
    }

    fn inputs(&self, split: usize) -> Range<usize> {
        split * SPLIT..self.m.min((split + 1) * SPLIT)
    }

    #[inline(always)]
    fn rows<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        scratch: &mut Scratch,
        widened: &mut gemm::Scratch,
    ) {
        for first in rows.clone().step_by(ROWS) {
            let rows = first..rows.end.min(first + ROWS);
            for split in 0..self.splits() {
                let Some((e, _)) = self.experts else {
                    self.silu_mul(simd, &rows, split, None);
                    continue;
                };
                let outputs = e.outputs();
                let part = if split == 0 {
                    &mut scratch.z
                } else {
                    &mut scratch.part
                };
                let y = part.as_mut_ptr();
                self.silu_mul(simd, &rows, split, Some((e, y, outputs)));
                self.multiply(simd, e, &rows, split, (y, outputs), widened);
                if split > 0 {
                    add(&mut scratch.z, &scratch.part[..rows.len() * outputs]);
                }
            }
            if let Some((e, shape)) = self.experts {
                for (row, z) in rows.zip(scratch.z.chunks_exact(e.outputs())) {
                    self.finish(simd, row, z, &shape);
                }
            }
        }
    }

    /// h of one split of some rows, and what the gates' rows of E (rows of parts `stride` apart from y on) make of it while it is in registers.
    #[inline(always)]
    fn silu_mul<S: Simd>(
        &self,
        simd: S,
        rows: &Range<usize>,
        split: usize,
        e: Option<(&PackedMatrix, *mut f32, usize)>,
    ) {
        let inputs = self.inputs(split);
        let gates = e.and_then(|(e, y, stride)| {
            let [a, b] = e.last_rows()?;
            Some(([&a[inputs.clone()], &b[inputs.clone()]], y, stride))
        });
        for row in rows.clone() {
            let mut dots = [simd.splat(0.0); 2];
            let (gate, up) = self.gate_up[row * 2 * self.m..][..2 * self.m].split_at(self.m);
            // SAFETY: each split of each row is one chunk's.
            let h = unsafe {
                self.hu
                    .slice(row * self.hu_width + inputs.start, inputs.len())
            };
            let (gate, up) = (&gate[inputs.clone()], &up[inputs.clone()]);
            for at in (0..h.len()).step_by(LANES) {
                let lanes = LANES.min(h.len() - at);
                // SAFETY: all are as long as the split.
                unsafe {
                    let gate = load_some(simd, gate.as_ptr().add(at), lanes);
                    let up = load_some(simd, up.as_ptr().add(at), lanes);
                    let product = simd.mul(silu(simd, gate), up);
                    store_some(simd, h.as_mut_ptr().add(at), lanes, product);
                    if let Some((rows, ..)) = gates {
                        for gate in 0..2 {
                            let weights = load_some(simd, rows[gate].as_ptr().add(at), lanes);
                            dots[gate] = simd.fma(product, weights, dots[gate]);
                        }
                    }
                }
            }
            if let (Some((_, y, stride)), Some((_, shape))) = (gates, self.experts) {
                let to = y.wrapping_add((row - rows.start) * stride + shape.width());
                for (gate, dot) in dots.into_iter().enumerate() {
                    // SAFETY: y has room for the rows' outputs of E (`bind`: the width and both gates), for this chunk alone.
                    unsafe { *to.add(gate) = super::simd::sum(simd, dot) };
                }
            }
            self.blocks.write(simd, row, inputs.start, h);
        }
    }

    /// One split's part of z = E h, rows `stride` apart from y on.
    #[inline(always)]
    fn multiply<S: Simd>(
        &self,
        simd: S,
        e: &PackedMatrix,
        rows: &Range<usize>,
        split: usize,
        (y, stride): (*mut f32, usize),
        widened: &mut gemm::Scratch,
    ) {
        let x = self.hu.as_ptr().wrapping_add(rows.start * self.hu_width);
        let product = Product {
            matrix: e,
            // The last two were met as h was made.
            panels: 0..e.panels().len() - if e.last_rows().is_some() { 2 } else { 0 },
            inputs: self.inputs(split),
            extension: false,
            rows: 0..rows.len(),
            x,
            x_stride: self.hu_width,
            y,
            y_stride: stride,
            add: false,
            blocks: self.blocks.from(rows.start),
        };
        // SAFETY: h of this split was just written by this chunk, as were its blocks; y has room for the rows' outputs of E, for this chunk alone.
        unsafe { gemm::multiply(simd, &product, widened) }
    }

    /// Adds the parts of z in the order in which `rows` does.
    #[inline(always)]
    fn finish_parts<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        parts: &[f32],
        scratch: &mut Scratch,
    ) {
        let Some((e, shape)) = self.experts else {
            return;
        };
        let outputs = e.outputs();
        for row in rows {
            let parts = &parts[row * self.splits() * outputs..][..self.splits() * outputs];
            let z = &mut scratch.z[..outputs];
            for (split, part) in parts.chunks_exact(outputs).enumerate() {
                match split {
                    0 => z.copy_from_slice(part),
                    _ => add(z, part),
                }
            }
            self.finish(simd, row, z, &shape);
        }
    }

    /// Gates and u of a row, or its z alone.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, row: usize, z: &[f32], shape: &ExpertShape) {
        if let Some(part) = self.z {
            // SAFETY: a row is one chunk's.
            return unsafe { part.slice(row * z.len(), z.len()) }.copy_from_slice(z);
        }
        // SAFETY: as above.
        let (u, gates) = unsafe {
            let gates_at = row * self.gates_width + 2 * self.layer;
            (
                self.hu.slice(row * self.hu_width + self.m, shape.width()),
                self.gates.slice(gates_at, 2),
            )
        };
        mixed(z, shape, self.sequence_of(row).gates, (u, gates));
        self.blocks.write(simd, row, self.m, u);
    }

    fn sequence_of(&self, row: usize) -> HostSequence<'_> {
        self.step.sequence(self.step.sequence_of(row))
    }
}

/// u and both gates of a row's z.
pub fn mixed(
    z: &[f32],
    shape: &ExpertShape,
    rules: GateOverride,
    (u, gates): (&mut [f32], &mut [f32]),
) {
    let width = shape.width();
    let alpha = rules.safety.apply(z[width] + shape.safety_bias);
    let beta = rules
        .helpfulness
        .apply(z[width + 1] + shape.helpfulness_bias);
    for (j, u) in u.iter_mut().enumerate() {
        *u = z[j] * if j < shape.safety_rank { alpha } else { beta };
    }
    gates.copy_from_slice(&[alpha, beta]);
}
