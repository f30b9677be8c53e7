//! Matrix products over panels. Panels of block formats meet x in int8 ([`super::int8`]), the others, and all extensions, in f32.
//!
//! One reduction order for every output: a single chain of fused multiply-adds over the inputs, ascending, then over the
//! extension's. Lanes are outputs, so neither the number of rows, nor tiles, nor blocks of inputs (partial sums wait in `y`, f32
//! as in the register) can change a bit.
//!
//! Bound: with few rows every weight is read once for few multiply-adds, so panels stream from memory, several at a time to
//! hide the latency of a chain. With many rows a block of inputs of a panel is widened to f32 once and used by all rows.

// Indices name a tile's axes: r its rows, p its panels.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use super::int8;
use super::pack::{Format, PackedMatrix, Panel};
use super::simd::{Kernel, LANES, Simd, load_some, store_some};
use crate::backend::Matrix;
use crate::backend::ops::INT8_BLOCK;

/// Inputs in a block; a multiple of every format's unit.
const BLOCK: usize = 256;
/// The same with few rows, where several panels share the scratch.
const SMALL_BLOCK: usize = 64;
/// Rows at most that stream the weights instead of widening them once.
pub const FEW_ROWS: usize = 6;
/// Rows whose inputs of one block stay in the second-level cache.
const ROW_BLOCK: usize = 240;
/// Rows at most that meet a panel of int8 products together, whatever their length: a batch of decodes, which waits for weights, not rows.
const INTEGER_ROWS_TOGETHER: usize = 48;
/// Bytes of rows in int8 that stay in the first-level cache beside a panel.
const INTEGER_ROW_BYTES: usize = 24 << 10;
/// Rows of the largest tile of int8 products.
const TILE_ROWS: usize = 12;
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

/// All panels in int8, then their extensions in f32.
///
/// # Safety
/// As `multiply`; all panels meet x in int8.
#[inline(always)]
unsafe fn multiply_integers<S: Simd>(simd: S, product: &Product<'_>, scratch: &mut Scratch) {
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
fn extend_integers<S: Simd>(simd: S, product: &Product<'_>) {
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

/// Where weights come from.
pub trait Weights: Copy {
    /// Sixteen weights, `at` numbers from the first.
    ///
    /// # Safety
    /// A vector must be readable there.
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::F;
}

/// f32, from the first on.
#[derive(Clone, Copy)]
pub struct F32s(pub *const f32);
/// bf16, from the first on.
#[derive(Clone, Copy)]
pub struct Bf16s(pub *const u16);

impl Weights for F32s {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { simd.load(self.0.add(at)) }
    }
}

impl Weights for Bf16s {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { simd.load_bf16(self.0.add(at)) }
    }
}

/// Integers of a signed byte, from the first on.
#[derive(Clone, Copy)]
pub struct Int8s(pub *const i8);

impl Weights for Int8s {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::F {
        // SAFETY: by contract.
        simd.to_float(unsafe { simd.load_i8(self.0.add(at)) })
    }
}

/// Where a tile's sums go.
#[derive(Clone, Copy)]
pub struct Target {
    /// The first row's first output.
    pub y: *mut f32,
    /// Numbers from row to row.
    pub stride: usize,
    /// Outputs of the last panel.
    pub lanes: usize,
    /// Sums start from y instead of 0.
    pub add: bool,
}

/// R rows of x against P panels: sums over segments of inputs, one behind the other in x, each anywhere among the weights.
///
/// Whoever makes one vouches that all it names is readable, y writable, and that nobody else uses y.
#[derive(Clone, Copy)]
pub struct Tile<'a, W, const R: usize, const P: usize> {
    /// All weights.
    pub weights: W,
    /// Where each segment's weights start in each panel, in numbers from the first.
    pub segments: &'a [[usize; P]],
    /// Numbers from the weights of one input to those of the next.
    pub stride: usize,
    /// Inputs in a segment.
    pub count: usize,
    /// The first row's first input.
    pub x: *const f32,
    /// Numbers from row to row.
    pub x_stride: usize,
    /// Where the sums go.
    pub target: Target,
}

impl<W: Weights, const R: usize, const P: usize> Kernel for Tile<'_, W, R, P> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: vouched for by the maker of the tile.
        unsafe {
            let mut sums = self.begin(simd);
            let mut x = self.x;
            for segment in self.segments {
                for k in 0..self.count {
                    let mut w = [simd.splat(0.0); P];
                    for p in 0..P {
                        w[p] = self.weights.load(simd, segment[p] + k * self.stride);
                    }
                    for r in 0..R {
                        let x = simd.splat(*x.add(r * self.x_stride + k));
                        for p in 0..P {
                            sums[r][p] = simd.fma(x, w[p], sums[r][p]);
                        }
                    }
                }
                x = x.add(self.count);
            }
            self.finish(simd, sums);
        }
    }
}

impl<W: Weights, const R: usize, const P: usize> Tile<'_, W, R, P> {
    /// # Safety
    /// The tile of y must be readable.
    #[inline(always)]
    unsafe fn begin<S: Simd>(&self, simd: S) -> [[S::F; P]; R] {
        let Target {
            y,
            stride,
            lanes,
            add,
        } = self.target;
        let mut sums = [[simd.splat(0.0); P]; R];
        if add {
            for r in 0..R {
                for p in 0..P {
                    let lanes = if p + 1 == P { lanes } else { LANES };
                    // SAFETY: by contract.
                    sums[r][p] = unsafe { load_some(simd, y.add(r * stride + p * LANES), lanes) };
                }
            }
        }
        sums
    }

    /// # Safety
    /// The tile of y must be writable.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, simd: S, sums: [[S::F; P]; R]) {
        let Target {
            y, stride, lanes, ..
        } = self.target;
        for r in 0..R {
            for p in 0..P {
                let lanes = if p + 1 == P { lanes } else { LANES };
                // SAFETY: by contract.
                unsafe { store_some(simd, y.add(r * stride + p * LANES), lanes, sums[r][p]) };
            }
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

/// Panels in a tile of `rows`: as many as the registers hold.
pub const fn panels_beside(accumulators: usize, rows: usize) -> usize {
    match accumulators / rows {
        0 | 1 => 1,
        2 | 3 => 2,
        _ => 4,
    }
}

/// All R rows of the product against each panel in turn, as many panels at a time as there are registers for.
///
/// # Safety
/// As `multiply`.
#[inline(always)]
unsafe fn few_rows<S: Simd, const R: usize>(simd: S, product: &Product<'_>, scratch: &mut Scratch) {
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

/// The first P panels, if one tile can take them: they are of one part, contiguous in memory and in y, and full.
#[inline(always)]
fn alike<const P: usize>(panels: &[Panel]) -> Option<&[Panel; P]> {
    let group = panels.first_chunk::<P>()?;
    let alike = |panel: &Panel| panel.lanes == LANES && panel.format == group[0].format;
    (P > 1 && group.iter().all(alike)).then_some(group)
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

/// Widens some inputs (whole units) of a panel, or of its extension, into (inputs, LANES). Its maker vouches that it has them.
struct Widen<'a> {
    weights: *const u8,
    format: Format,
    lanes: usize,
    inputs: Range<usize>,
    out: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (weights, lanes) = (self.weights, self.lanes);
        let (out, _) = self.out.as_chunks_mut::<LANES>();
        // SAFETY: vouched for by the maker, and `out` is a slice that `zip` and `chunks` keep within.
        unsafe {
            match self.format {
                Format::F32 => {
                    for (out, k) in out.iter_mut().zip(self.inputs) {
                        let w = simd.load(weights.cast::<f32>().add(k * lanes));
                        simd.store(out.as_mut_ptr(), w);
                    }
                }
                Format::BF16 => {
                    for (out, k) in out.iter_mut().zip(self.inputs) {
                        let w = simd.load_bf16(weights.cast::<u16>().add(k * lanes));
                        simd.store(out.as_mut_ptr(), w);
                    }
                }
                Format::F16 => {
                    for (out, k) in out.iter_mut().zip(self.inputs) {
                        let w = simd.load_f16(weights.cast::<u16>().add(k * lanes));
                        simd.store(out.as_mut_ptr(), w);
                    }
                }
                Format::Quant(quant) => {
                    let len = quant.unit_len();
                    let units = self.inputs.start / len..self.inputs.end / len;
                    for (unit, out) in units.zip(out.chunks_exact_mut(len)) {
                        let unit = weights.add(unit * quant.unit_bytes());
                        quant.widen(simd, unit, out.as_mut_ptr().cast());
                    }
                }
            }
        }
    }
}

/// Blocks of rows, blocks of inputs, panels, tiles: each block of a panel is widened once for a block of rows.
///
/// # Safety
/// As `multiply`.
#[inline(always)]
unsafe fn many_rows<S: Simd>(simd: S, product: &Product<'_>, scratch: &mut Scratch) {
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
