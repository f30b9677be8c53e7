//! Rows and matrices in device memory. Every row is padded with zeros to 16 bytes, so that kernels load and store whole packs.

use half::{bf16, f16};

use super::super::ops::bind_parts;
use super::super::{BackendError, HostMatrix, KvShape, Matrix, Shaped};
use super::driver::{Driver, Storage};
use super::staging::{PIECE_BYTES, Return, Staging};
use super::tiles::ROW_ALIGN;
use crate::dtype::DType;

/// How the numbers of a buffer are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// As activations: two bytes.
    Activations(Storage),
    /// f32.
    Exact,
}

impl Kept {
    fn bytes(self) -> usize {
        match self {
            Self::Activations(_) => 2,
            Self::Exact => 4,
        }
    }

    /// Writes `values` as they are kept, and zeros behind them.
    fn lay(self, values: &[f32], bytes: &mut [u8]) {
        let (own, padding) = bytes.split_at_mut(values.len() * self.bytes());
        padding.fill(0);
        match self {
            Self::Activations(Storage::BF16) => {
                lay(values, own, |value| bf16::from_f32(value).to_le_bytes());
            }
            Self::Activations(Storage::F16) => {
                lay(values, own, |value| f16::from_f32(value).to_le_bytes());
            }
            Self::Exact => lay(values, own, f32::to_le_bytes),
        }
    }

    fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::Activations(Storage::BF16) => DType::BF16.widen(bytes, out),
            Self::Activations(Storage::F16) => DType::F16.widen(bytes, out),
            Self::Exact => DType::F32.widen(bytes, out),
        }
    }
}

fn lay<const N: usize>(values: &[f32], bytes: &mut [u8], kept: impl Fn(f32) -> [u8; N]) {
    let places = bytes.as_chunks_mut::<N>().0.iter_mut();
    places
        .zip(values)
        .for_each(|(to, value)| *to = kept(*value));
}

/// (rows, width) on the device.
pub struct Buffer<D: Driver> {
    rows: usize,
    width: usize,
    kept: Kept,
    memory: D::Memory,
    /// Where reads pass through.
    back: Return<D>,
    values: Vec<f32>,
}

impl<D: Driver> Shaped for Buffer<D> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn width(&self) -> usize {
        self.width
    }
}

impl<D: Driver> Buffer<D> {
    /// What [`Self::new`] asks of the device.
    pub(super) fn bytes(rows: usize, width: usize, kept: Kept) -> usize {
        rows.saturating_mul(padded(width))
            .saturating_mul(kept.bytes())
    }

    pub(super) fn new(
        driver: &D,
        rows: usize,
        width: usize,
        kept: Kept,
    ) -> Result<Self, BackendError> {
        let bytes = Self::bytes(rows, width, kept);
        let mut memory = driver.allocate("a buffer", bytes)?;
        driver.zero(&mut memory)?;
        Ok(Self {
            rows,
            width,
            kept,
            memory,
            back: Return::EMPTY,
            values: Vec::new(),
        })
    }

    /// Numbers from one row to the next.
    pub(super) fn stride(&self) -> usize {
        padded(self.width)
    }

    /// Overwrites the first rows; padding stays zero.
    pub(super) fn write(&mut self, driver: &D, values: &[f32]) -> Result<(), BackendError> {
        let row_bytes = self.row_bytes();
        let rows = values.len() / self.width.max(1);
        let mut bytes = vec![0; rows * row_bytes];
        let rows = values.chunks_exact(self.width.max(1));
        for (row, bytes) in rows.zip(bytes.chunks_exact_mut(row_bytes.max(1))) {
            self.kept.lay(row, bytes);
        }
        driver.upload(&mut self.memory, 0, &bytes)
    }

    fn row_bytes(&self) -> usize {
        self.stride() * self.kept.bytes()
    }

    /// Starts the way of the first `rows` rows to the host, for [`Self::read`].
    pub(super) fn fetch(&mut self, driver: &D, rows: usize) -> Result<(), BackendError> {
        let row_bytes = self.row_bytes();
        self.back.fetch(
            driver,
            &self.memory,
            rows * row_bytes,
            self.rows * row_bytes,
        )
    }

    /// The first `rows` rows without their padding, as they were when their fetch was asked for, or else as they are.
    pub(super) fn read(&mut self, driver: &D, rows: usize) -> Result<&[f32], BackendError> {
        let row_bytes = self.row_bytes();
        let used = self.width * self.kept.bytes();
        self.values.resize(rows * self.width, 0.0);
        if self.values.is_empty() {
            return Ok(&[]);
        }
        if !self.back.is_coming(rows * row_bytes) {
            self.fetch(driver, rows)?;
        }
        if let Some(bytes) = self.back.read(driver, rows * row_bytes)? {
            let values = self.values.chunks_exact_mut(self.width);
            let rows = bytes.chunks_exact(row_bytes).zip(values);
            rows.for_each(|(bytes, out)| self.kept.widen(&bytes[..used], out));
        }
        Ok(&self.values)
    }

    /// Address of an operand that the kernel takes as activations.
    pub(super) fn activations(
        &self,
        driver: &D,
        op: &'static str,
        operand: &'static str,
    ) -> Result<u64, BackendError> {
        self.address_if(
            driver,
            matches!(self.kept, Kept::Activations(_)),
            op,
            operand,
        )
    }

    /// Address of an operand that the kernel takes in f32.
    pub(super) fn exact(
        &self,
        driver: &D,
        op: &'static str,
        operand: &'static str,
    ) -> Result<u64, BackendError> {
        self.address_if(driver, self.is_exact(), op, operand)
    }

    pub(super) fn is_exact(&self) -> bool {
        self.kept == Kept::Exact
    }

    /// Address, whatever is kept there.
    pub(super) fn address(&self, driver: &D) -> u64 {
        driver.address(&self.memory)
    }

    fn address_if(
        &self,
        driver: &D,
        fits: bool,
        op: &'static str,
        operand: &'static str,
    ) -> Result<u64, BackendError> {
        if fits {
            return Ok(self.address(driver));
        }
        let (buffer, exact) = (
            "an activation buffer".to_owned(),
            "an exact buffer".to_owned(),
        );
        let (expected, found) = if self.is_exact() {
            (buffer, exact)
        } else {
            (exact, buffer)
        };
        Err(BackendError::Contract {
            op,
            operand,
            expected,
            found,
        })
    }
}

/// [W | X] (o, k + w) on the device, rows padded; the last rows of E in f32 beside it.
pub struct DeviceMatrix<D: Driver> {
    outputs: usize,
    inputs: usize,
    extension_inputs: usize,
    memory: D::Memory,
    exact_rows: Option<ExactRows<D>>,
}

struct ExactRows<D: Driver> {
    rows: usize,
    memory: D::Memory,
}

impl<D: Driver> Matrix for DeviceMatrix<D> {
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
        let exact = self.exact_rows.as_ref().map_or(0, |exact| exact.rows);
        ((self.outputs - exact) * 2 + exact * 4) * self.stride()
    }
}

impl<D: Driver> DeviceMatrix<D> {
    /// The parts, rounded to `storage`, with the extension behind their columns.
    pub(super) fn new(
        to: (&D, &mut Staging<D>),
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        storage: Storage,
    ) -> Result<Self, BackendError> {
        let (outputs, inputs, extension_inputs) = bind_parts(parts, extension.as_ref())?;
        let kept = Kept::Activations(storage);
        let memory = upload(to, parts, extension.as_ref(), kept)?;
        Ok(Self {
            outputs,
            inputs,
            extension_inputs,
            memory,
            exact_rows: None,
        })
    }

    /// E: A_s and A_h rounded to `storage`, the gates' rows in f32.
    pub(super) fn experts(
        (driver, staging): (&D, &mut Staging<D>),
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
        storage: Storage,
    ) -> Result<Self, BackendError> {
        let (outputs, inputs, extension_inputs) = bind_parts(&[lora_a, gates], None)?;
        let memory = upload(
            (driver, staging),
            &[lora_a],
            None,
            Kept::Activations(storage),
        )?;
        let exact = upload((driver, staging), &[gates], None, Kept::Exact)?;
        let exact_rows = Some(ExactRows {
            rows: gates.rows,
            memory: exact,
        });
        Ok(Self {
            outputs,
            inputs,
            extension_inputs,
            memory,
            exact_rows,
        })
    }

    /// Numbers from one row to the next.
    pub(super) fn stride(&self) -> usize {
        padded(self.inputs + self.extension_inputs)
    }

    pub(super) fn address(&self, driver: &D) -> u64 {
        driver.address(&self.memory)
    }

    /// The gates' rows of E.
    pub(super) fn exact_rows(&self, driver: &D) -> Option<u64> {
        self.exact_rows
            .as_ref()
            .map(|exact| driver.address(&exact.memory))
    }
}

/// What [`upload`] asks of the device.
pub(super) fn matrix_bytes(
    parts: &[HostMatrix<'_>],
    extension: Option<&HostMatrix<'_>>,
    kept: Kept,
) -> usize {
    let rows: usize = parts.iter().map(|part| part.rows).sum();
    let inputs = parts.first().map_or(0, |part| part.cols);
    let row = padded(inputs + extension.map_or(0, |x| x.cols));
    rows.saturating_mul(row).saturating_mul(kept.bytes())
}

/// `parts` stacked, `extension` behind their columns, as `kept` says.
fn upload<D: Driver>(
    (driver, staging): (&D, &mut Staging<D>),
    parts: &[HostMatrix<'_>],
    extension: Option<&HostMatrix<'_>>,
    kept: Kept,
) -> Result<D::Memory, BackendError> {
    let inputs = parts.first().map_or(0, |part| part.cols);
    let width = inputs + extension.map_or(0, |x| x.cols);
    let row_bytes = padded(width) * kept.bytes();
    let all_bytes = matrix_bytes(parts, extension, kept);
    let mut memory = driver.allocate("a matrix", all_bytes)?;
    let mut widened = vec![0.0; width];
    let mut lay_row = |(output, (part, row)): (usize, (&HostMatrix<'_>, usize)), to: &mut [u8]| {
        let as_is = matches!(
            (kept, part.dtype),
            (Kept::Activations(Storage::BF16), DType::BF16)
        );
        if as_is && extension.is_none() {
            let (own, padding) = to.split_at_mut(inputs * kept.bytes());
            own.copy_from_slice(part.row_bytes(row));
            return padding.fill(0);
        }
        let (own, extended) = widened.split_at_mut(inputs);
        part.widen_row(row, own);
        if let Some(extension) = extension {
            extension.widen_row(output, extended);
        }
        kept.lay(&widened, to);
    };
    let stacked = parts
        .iter()
        .flat_map(|part| (0..part.rows).map(move |row| (part, row)));
    let mut rows = stacked.enumerate();
    let piece = (PIECE_BYTES / row_bytes.max(1)).max(1) * row_bytes;
    for offset in (0..all_bytes).step_by(piece.max(1)) {
        let bytes = piece.min(all_bytes - offset);
        staging.send(driver, (&mut memory, offset), bytes, |to| {
            let places = to.chunks_exact_mut(row_bytes);
            places.zip(&mut rows).for_each(|(to, row)| lay_row(row, to));
        })?;
    }
    driver.join()?;
    Ok(memory)
}

/// K and V, each (layers, blocks, kv heads, KV_BLOCK, head size): a block's keys of one head are one piece.
pub struct DeviceCache<D: Driver> {
    shape: KvShape,
    k: D::Memory,
    v: D::Memory,
}

impl<D: Driver> DeviceCache<D> {
    pub(super) fn new(driver: &D, shape: KvShape) -> Result<Self, BackendError> {
        let half = shape.blocks.saturating_mul(shape.block_bytes()) / 2;
        Ok(Self {
            shape,
            k: driver.allocate("the cache of K", half)?,
            v: driver.allocate("the cache of V", half)?,
        })
    }

    pub(super) fn shape(&self) -> KvShape {
        self.shape
    }

    /// Addresses of a layer's K and V.
    pub(super) fn layer(&self, driver: &D, layer: usize) -> (u64, u64) {
        let bytes = self.shape.blocks * self.shape.block_bytes() / 2 / self.shape.layers.max(1);
        let offset = (layer * bytes) as u64;
        (
            driver.address(&self.k) + offset,
            driver.address(&self.v) + offset,
        )
    }
}

/// Numbers of a row with its padding.
pub(super) fn padded(width: usize) -> usize {
    width.next_multiple_of(ROW_ALIGN)
}
