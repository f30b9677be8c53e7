//! Weights in the order in which the kernels read them: panels of sixteen outputs, each contiguous over all inputs.
//!
//! A panel of a float format is (inputs, lanes), so that one load takes one input's weights of all its outputs; a panel of a
//! block format is units of [`Quant`]. The last panel of a part holds fewer outputs: a float panel is then narrower, and a
//! load of sixteen lanes reads into the next input, whose lanes nobody looks at. Behind its weights a panel carries its
//! outputs of the extension: f32 or bf16 (extension inputs, lanes), or units.

#![allow(unsafe_code)]

use std::borrow::Cow;

use half::{bf16, f16};

use super::memory::{Arena, Memory};
use super::pool::{Parts, Pool};
use super::quant::Quant;
use super::simd::LANES;
use crate::backend::ops::{bind_parts, meets_integers};
use crate::backend::{BackendError, HostMatrix, Matrix, WeightFormat};
use crate::dtype::DType;

/// Every panel starts on a cache line.
const ALIGN: usize = 64;
/// A vector load at the last weight may read this far past it.
const SLACK: usize = LANES * size_of::<f32>();
/// Inputs widened at a time while packing.
const CHUNK: usize = 256;

/// How a panel is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// (inputs, lanes) f32.
    F32,
    /// (inputs, lanes) f16.
    F16,
    /// (inputs, lanes) bf16.
    BF16,
    /// Units of a block format.
    Quant(Quant),
}

impl Format {
    fn of(kept: DType) -> Self {
        match (Quant::of(kept), kept) {
            (Some(quant), _) => Self::Quant(quant),
            (None, DType::F16) => Self::F16,
            (None, DType::BF16) => Self::BF16,
            (None, _) => Self::F32,
        }
    }

    /// As [`crate::backend::ops::MATMUL`] says: units if they are to meet x in int8, widened otherwise.
    fn of_extension(
        extension: Option<&HostMatrix<'_>>,
        inputs: usize,
        format: WeightFormat,
    ) -> Self {
        extension.map_or(Self::F32, |extension| {
            match meets_integers(extension.dtype, inputs, format) {
                false if extension.dtype.is_quantised() => Self::F32,
                _ => Self::of(extension.dtype),
            }
        })
    }

    #[inline(always)]
    fn panel_bytes(self, inputs: usize, lanes: usize) -> usize {
        match self {
            Self::F32 => 4 * inputs * lanes,
            Self::F16 | Self::BF16 => 2 * inputs * lanes,
            Self::Quant(quant) => inputs / quant.unit_len() * quant.unit_bytes(),
        }
    }
}

/// Up to sixteen outputs.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// Its first output.
    pub first: usize,
    /// Its outputs.
    pub lanes: usize,
    /// Storage of its weights.
    pub format: Format,
    /// Where its weights start.
    at: usize,
    /// Where its extension starts.
    extension_at: usize,
}

/// Where the panels of a matrix lie.
struct Layout {
    panels: Vec<Panel>,
    /// Part and row in it where each panel begins.
    sources: Vec<(usize, usize)>,
    /// All of it.
    bytes: usize,
}

impl Layout {
    /// `parts` and `extension` have passed `bind_parts`.
    fn new(
        parts: &[HostMatrix<'_>],
        extension: Option<&HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Self {
        let inputs = parts.first().map_or(0, |part| part.cols);
        let extension_format = Format::of_extension(extension, inputs, format);
        let extension_inputs = extension.map_or(0, |extension| extension.cols);
        let mut panels = Vec::new();
        let mut sources = Vec::new();
        let (mut first, mut end) = (0, 0);
        for (index, part) in parts.iter().enumerate() {
            let format = Format::of(format.kept(part.dtype, inputs));
            for row in (0..part.rows).step_by(LANES) {
                let lanes = LANES.min(part.rows - row);
                let at = end;
                // No overflow: `bind_parts` saw all these weights in memory, and repacking at most quadruples a size.
                let extension_at = at + format.panel_bytes(inputs, lanes);
                let extension_at = extension_at.next_multiple_of(ALIGN);
                let extension_bytes = extension_format.panel_bytes(extension_inputs, lanes);
                end = (extension_at + extension_bytes).next_multiple_of(ALIGN);
                sources.push((index, row));
                panels.push(Panel {
                    first,
                    lanes,
                    format,
                    at,
                    extension_at,
                });
                first += lanes;
            }
        }
        Self {
            panels,
            sources,
            bytes: end + SLACK,
        }
    }
}

/// A matrix in panels.
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    extension_inputs: usize,
    extension_format: Format,
    /// Whether block formats meet x in int8.
    integers: bool,
    panels: Vec<Panel>,
    bytes: Memory<u8>,
}

impl Matrix for PackedMatrix {
    fn outputs(&self) -> usize {
        self.outputs
    }

    fn inputs(&self) -> usize {
        self.inputs
    }

    fn extension_inputs(&self) -> usize {
        self.extension_inputs
    }

    fn bytes(&self) -> usize {
        self.bytes.len()
    }
}

impl PackedMatrix {
    /// What [`Self::pack`] asks for.
    pub fn bytes_of(
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<usize, BackendError> {
        bind_parts(parts, extension.as_ref())?;
        Ok(Layout::new(parts, extension.as_ref(), format).bytes)
    }

    /// Stacks `parts` and packs them in parallel, one panel a chunk. Packing the same parts twice gives the same bytes.
    pub fn pack(
        pool: &Pool,
        arena: &mut Arena,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<Self, BackendError> {
        let (outputs, inputs, extension_inputs) = bind_parts(parts, extension.as_ref())?;
        let extension_format = Format::of_extension(extension.as_ref(), inputs, format);
        let Layout {
            panels,
            sources,
            bytes,
        } = Layout::new(parts, extension.as_ref(), format);
        let mut bytes = arena.zeroed::<u8>("weights", bytes)?;
        let out = Parts::new(&mut bytes);
        pool.for_each(panels.len(), &|_, i| {
            let (panel, (part, row)) = (&panels[i], sources[i]);
            let len = panel.format.panel_bytes(inputs, panel.lanes);
            // SAFETY: panels do not overlap, and each is one chunk.
            let (weights, tail) = unsafe {
                let tail = extension_format.panel_bytes(extension_inputs, panel.lanes);
                (
                    out.slice(panel.at, len),
                    out.slice(panel.extension_at, tail),
                )
            };
            pack_panel(&parts[part], row, panel, format, weights);
            if let Some(extension) = &extension {
                let panel = Panel {
                    format: extension_format,
                    ..*panel
                };
                pack_panel(extension, panel.first, &panel, WeightFormat::Stored, tail);
            }
        });
        Ok(Self {
            outputs,
            inputs,
            extension_inputs,
            extension_format,
            integers: format != WeightFormat::F32,
            panels,
            bytes,
        })
    }

    /// How a panel meets x in int8; `None` where it meets it in f32.
    #[inline(always)]
    pub fn integers(&self, panel: &Panel) -> Option<Quant> {
        match panel.format {
            Format::Quant(quant) if self.integers => Some(quant),
            _ => None,
        }
    }

    /// How the extension meets its inputs in int8; `None` where it meets them in f32.
    #[inline(always)]
    pub fn extension_integers(&self) -> Option<Quant> {
        match self.extension_format {
            Format::Quant(quant) => Some(quant),
            _ => None,
        }
    }

    /// Inputs that any panel meets in int8, the extension's among them: all that x has of them in [`INT8_BLOCK`]s, or none.
    pub fn integer_inputs(&self) -> usize {
        let integers = |panel| self.integers(panel).is_some();
        if self.extension_integers().is_some() {
            return self.inputs + self.extension_inputs;
        }
        if self.panels.iter().any(integers) {
            return self.inputs;
        }
        0
    }

    /// The last two outputs' weights, if each is a part of its own in f32: one behind the other as they came, which the gates of E are.
    #[inline(always)]
    pub fn last_rows(&self) -> Option<[&[f32]; 2]> {
        let panels = self.panels.last_chunk::<2>()?;
        if panels
            .iter()
            .any(|panel| panel.lanes != 1 || panel.format != Format::F32)
        {
            return None;
        }
        // SAFETY: a panel of f32 holds as many as there are inputs for each lane, on a cache line.
        Some(panels.each_ref().map(|panel| unsafe {
            std::slice::from_raw_parts(self.weights(panel).cast(), self.inputs)
        }))
    }

    /// All panels, in order of their outputs.
    pub fn panels(&self) -> &[Panel] {
        &self.panels
    }

    /// The weights of a panel: `inputs` of them, and then at least one more vector that may be read.
    #[inline(always)]
    pub fn weights(&self, panel: &Panel) -> *const u8 {
        // Within the memory by construction; the assertion is a comparison a panel.
        assert!(panel.at < self.bytes.len());
        self.bytes.as_ptr().wrapping_add(panel.at)
    }

    /// The extension of a panel, as [`Self::weights`].
    #[inline(always)]
    pub fn extension(&self, panel: &Panel) -> *const u8 {
        assert!(panel.extension_at < self.bytes.len());
        self.bytes.as_ptr().wrapping_add(panel.extension_at)
    }

    /// [`Format::F32`], [`Format::BF16`], or units that meet x in int8.
    #[inline(always)]
    pub fn extension_format(&self) -> Format {
        self.extension_format
    }

    /// Bytes from one panel to the next of the same part.
    #[inline(always)]
    pub fn panel_bytes(&self, panel: &Panel) -> usize {
        let extension = self
            .extension_format
            .panel_bytes(self.extension_inputs, panel.lanes);
        (panel.extension_at - panel.at + extension).next_multiple_of(ALIGN)
    }

    /// Writes the weights of one output, widened, without its extension.
    ///
    /// # Panics
    /// When there is no such output, or `out` is not as long as the inputs.
    pub fn row(&self, output: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.inputs);
        let index = self.panels.partition_point(|panel| panel.first <= output);
        let panel = &self.panels[index - 1];
        let lane = output - panel.first;
        let weights = &self.bytes[panel.at..][..panel.format.panel_bytes(self.inputs, panel.lanes)];
        let lanes = panel.lanes;
        match panel.format {
            Format::F32 => {
                let numbers = &weights.as_chunks::<4>().0[lane..];
                let column = numbers.iter().step_by(lanes);
                out.iter_mut()
                    .zip(column)
                    .for_each(|(x, b)| *x = f32::from_ne_bytes(*b));
            }
            Format::F16 => {
                let numbers = &weights.as_chunks::<2>().0[lane..];
                let column = numbers
                    .iter()
                    .step_by(lanes)
                    .map(|b| f16::from_ne_bytes(*b));
                out.iter_mut()
                    .zip(column)
                    .for_each(|(x, w)| *x = w.to_f32());
            }
            Format::BF16 => {
                let numbers = &weights.as_chunks::<2>().0[lane..];
                let column = numbers
                    .iter()
                    .step_by(lanes)
                    .map(|b| bf16::from_ne_bytes(*b));
                out.iter_mut()
                    .zip(column)
                    .for_each(|(x, w)| *x = w.to_f32());
            }
            Format::Quant(quant) => {
                let units = weights.chunks_exact(quant.unit_bytes());
                for (unit, out) in units.zip(out.chunks_exact_mut(quant.unit_len())) {
                    for (k, x) in out.iter_mut().enumerate() {
                        *x = quant.value(unit, lane, k);
                    }
                }
            }
        }
    }
}

fn pack_panel(
    part: &HostMatrix<'_>,
    row: usize,
    panel: &Panel,
    format: WeightFormat,
    out: &mut [u8],
) {
    let Format::Quant(quant) = panel.format else {
        return pack_floats(part, row, panel.lanes, panel.format, out);
    };
    let mut wide = Vec::new();
    for lane in 0..panel.lanes {
        let bytes = match format {
            WeightFormat::Block(block) if part.dtype != quant.dtype => {
                wide.resize(part.cols, 0.0);
                part.widen_row(row + lane, &mut wide);
                Cow::Owned(block.quantise(&wide))
            }
            _ => Cow::Borrowed(part.row_bytes(row + lane)),
        };
        let blocks = bytes.chunks_exact(quant.dtype.block_bytes());
        for (block, unit) in blocks.zip(out.chunks_exact_mut(quant.unit_bytes())) {
            quant.interleave(block, lane, unit);
        }
    }
}

/// Packs `lanes` rows from `row` on as (cols, lanes) of a float `format`.
fn pack_floats(part: &HostMatrix<'_>, row: usize, lanes: usize, format: Format, out: &mut [u8]) {
    for lane in 0..lanes {
        let bytes = part.row_bytes(row + lane);
        match (part.dtype, format) {
            (DType::F32, Format::F32) => transpose::<4>(bytes, lane, lanes, out),
            (DType::BF16, Format::BF16) | (DType::F16, Format::F16) => {
                transpose::<2>(bytes, lane, lanes, out);
            }
            _ => convert(part, bytes, lane, lanes, format, out),
        }
    }
}

/// Copies a row of numbers of SIZE bytes into column `lane` of `out`.
fn transpose<const SIZE: usize>(row: &[u8], lane: usize, lanes: usize, out: &mut [u8]) {
    let column = out.as_chunks_mut::<SIZE>().0[lane..]
        .iter_mut()
        .step_by(lanes);
    for (to, from) in column.zip(row.as_chunks::<SIZE>().0) {
        // Files are little-endian, kernels native.
        *to = *from;
        if cfg!(target_endian = "big") {
            to.reverse();
        }
    }
}

fn convert(
    part: &HostMatrix<'_>,
    row: &[u8],
    lane: usize,
    lanes: usize,
    format: Format,
    out: &mut [u8],
) {
    let (len, bytes) = (part.dtype.block_len(), part.dtype.block_bytes());
    let chunk = CHUNK / len * bytes;
    let mut wide = [0.0f32; CHUNK];
    for (index, row) in row.chunks(chunk).enumerate() {
        let wide = &mut wide[..row.len() / bytes * len];
        part.dtype.widen(row, wide);
        let at = index * CHUNK * lanes + lane;
        if format == Format::F32 {
            let column = out.as_chunks_mut::<4>().0[at..].iter_mut().step_by(lanes);
            column.zip(wide).for_each(|(to, x)| *to = x.to_ne_bytes());
        } else {
            let column = out.as_chunks_mut::<2>().0[at..].iter_mut().step_by(lanes);
            column
                .zip(wide)
                .for_each(|(to, x)| *to = bf16::from_f32(*x).to_ne_bytes());
        }
    }
}
