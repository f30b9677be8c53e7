//! Named host tensors: a shape, a format, and bytes that are mapped from a file, in the binary, or owned.

use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;

use crate::dtype::DType;

/// A tensor on the host. Invariant: its bytes are exactly what shape and format need, and all its numbers are finite.
#[derive(Clone, Debug)]
pub struct HostTensor {
    shape: Vec<usize>,
    dtype: DType,
    bytes: TensorBytes,
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug)]
pub enum TensorBytes {
    /// A range of a mapped file.
    Mapped(Arc<Mmap>, Range<usize>),
    /// Bytes of the binary itself.
    Static(&'static [u8]),
    /// Made here: permuted, converted or read from an archive.
    Owned(Arc<[u8]>),
    /// A range of what several tensors share: weights of a bench, whose numbers nobody asks for.
    Shared(Arc<[u8]>, Range<usize>),
}

impl TensorBytes {
    /// All of them.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map, range) => map.get(range.clone()).unwrap_or_default(),
            Self::Static(bytes) => bytes,
            Self::Owned(bytes) => bytes,
            Self::Shared(bytes, range) => bytes.get(range.clone()).unwrap_or_default(),
        }
    }
}

impl HostTensor {
    /// `None` when `bytes` does not have the length that `shape` and `dtype` need, or its rows are not whole blocks.
    /// The caller has checked that the numbers are finite.
    pub(crate) fn new(shape: Vec<usize>, dtype: DType, bytes: TensorBytes) -> Option<Self> {
        let tensor = Self {
            shape,
            dtype,
            bytes,
        };
        let elements = tensor
            .shape
            .iter()
            .try_fold(1usize, |product, axis| product.checked_mul(*axis))?;
        let whole_rows = tensor
            .shape
            .last()
            .is_none_or(|cols| cols.is_multiple_of(dtype.block_len()));
        let expected = dtype.bytes_of(elements)?;
        (whole_rows && tensor.bytes().len() == expected).then_some(tensor)
    }

    /// Row-major axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Format of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements, row-major, little-endian.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// All elements, widened exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.shape.iter().product()];
        self.dtype.widen(self.bytes(), &mut values);
        values
    }
}
