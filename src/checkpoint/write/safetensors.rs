//! A safetensors file, written tensor by tensor: no second copy of the model is made.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use ::safetensors::Dtype;
use ::safetensors::tensor::{Metadata, TensorInfo};

use crate::checkpoint::tensor_file::BLOCKS;
use crate::checkpoint::{CheckpointError, HostTensor};
use crate::dtype::{BlockType, DType, bf16_bytes};

/// Numbers converted at a time.
const CHUNK: usize = 1 << 16;
/// Headers end on such a boundary, so that numbers after them are aligned.
const ALIGNMENT: usize = 8;

/// A tensor of a file to be.
pub(crate) struct Entry<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// Row-major axes, whose product is the count of `numbers`.
    pub(crate) shape: &'a [usize],
    /// Its content.
    pub(crate) numbers: Numbers<'a>,
}

/// Numbers as they are here, and as they are stored.
#[derive(Clone, Copy)]
pub(crate) enum Numbers<'a> {
    /// As they are.
    F32(&'a [f32]),
    /// Rounded to nearest, ties to even.
    Bf16(&'a [f32]),
    /// As they are.
    I64(&'a [i64]),
    /// A matrix, as it is or rounded to a format: bf16 or blocks.
    Kept(&'a HostTensor, Kept),
}

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// As it is.
    Same,
    /// In blocks, or in bf16 where rows are no whole blocks.
    Blocks(BlockType),
}

impl Kept {
    fn dtype(self, tensor: &HostTensor) -> DType {
        match self {
            Self::Same => tensor.dtype(),
            Self::Blocks(block) => block.kept(tensor.shape().last().copied().unwrap_or(1)),
        }
    }

    /// Some rows: widened and rounded.
    fn round(self, values: &[f32]) -> Result<Vec<u8>, f32> {
        match self {
            Self::Blocks(block) if values.len().is_multiple_of(BlockType::LEN) => {
                let bytes = block.quantise(values);
                match block.dtype().first_non_finite(&bytes) {
                    Some(at) => Err(values.get(at).copied().unwrap_or(f32::INFINITY)),
                    None => Ok(bytes),
                }
            }
            Self::Same | Self::Blocks(_) => bf16_bytes(values),
        }
    }
}

impl Numbers<'_> {
    /// What they are stored as, where that is a format of ours.
    fn kept(self) -> Option<DType> {
        match self {
            Self::Kept(tensor, kept) => Some(kept.dtype(tensor)),
            _ => None,
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::Kept(tensor, kept) => match kept.dtype(tensor) {
                DType::F32 => Dtype::F32,
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                // The format knows no blocks: `BLOCKS` says what the bytes are.
                _ => Dtype::U8,
            },
            Self::F32(_) => Dtype::F32,
            Self::Bf16(_) => Dtype::BF16,
            Self::I64(_) => Dtype::I64,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F32(values) => 4 * values.len(),
            Self::Bf16(values) => 2 * values.len(),
            Self::I64(values) => 8 * values.len(),
            Self::Kept(tensor, kept) => {
                let elements = tensor.shape().iter().product();
                kept.dtype(tensor).bytes_of(elements).unwrap_or_default()
            }
        }
    }
}

/// Writes the file.
///
/// # Errors
/// [`CheckpointError::Tensor`] names the first tensor with a number that is not finite as it is stored; [`CheckpointError::Malformed`]
/// for a shape that does not fit its numbers; [`CheckpointError::Io`].
pub(crate) fn write(
    file: &Path,
    mut entries: Vec<Entry<'_>>,
    out: &mut impl Write,
) -> Result<(), CheckpointError> {
    // As the format's own writers do: wide formats first, so that every tensor is aligned; then by name.
    entries.sort_by(|a, b| {
        let (wide, other) = (a.numbers.dtype(), b.numbers.dtype());
        other.cmp(&wide).then(a.name.cmp(b.name))
    });
    let header = header(file, &entries)?;
    let io = |error| CheckpointError::io(file, error);
    out.write_all(&(header.len() as u64).to_le_bytes())
        .map_err(io)?;
    out.write_all(&header).map_err(io)?;
    entries
        .iter()
        .try_for_each(|entry| write_numbers(file, entry, out))
}

fn header(file: &Path, entries: &[Entry<'_>]) -> Result<Vec<u8>, CheckpointError> {
    let malformed = |reason: String| CheckpointError::malformed(file, reason);
    let mut end = 0;
    let infos = entries.iter().map(|entry| {
        let start = end;
        end += entry.numbers.bytes();
        let info = TensorInfo {
            dtype: entry.numbers.dtype(),
            shape: entry.stored_shape(),
            data_offsets: (start, end),
        };
        (entry.name.to_owned(), info)
    });
    let infos = infos.collect();
    let blocks: BTreeMap<&str, &str> = entries
        .iter()
        .filter_map(|entry| Some((entry.name, entry.numbers.kept()?)))
        .filter(|(_, dtype)| dtype.is_quantised())
        .map(|(name, dtype)| (name, dtype.as_str()))
        .collect();
    // transformers refuses a file that does not say `format`, and should where blocks are bytes to it. One key, so that the order of a
    // map is not in the file.
    let format = if blocks.is_empty() {
        HashMap::from([("format".to_owned(), "pt".to_owned())])
    } else {
        let blocks =
            serde_json::to_string(&blocks).map_err(|error| malformed(error.to_string()))?;
        HashMap::from([(BLOCKS.to_owned(), blocks)])
    };
    let metadata =
        Metadata::new(Some(format), infos).map_err(|error| malformed(error.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| malformed(error.to_string()))?;
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    Ok(header)
}

fn write_numbers(
    file: &Path,
    entry: &Entry<'_>,
    out: &mut impl Write,
) -> Result<(), CheckpointError> {
    let tensor = |value: f32, format: &str| {
        let reason = format!("expected numbers that are finite in {format}, found {value}");
        CheckpointError::tensor(file, entry.name, reason)
    };
    let mut put = |bytes: &[u8]| {
        out.write_all(bytes)
            .map_err(|error| CheckpointError::io(file, error))
    };
    match entry.numbers {
        Numbers::F32(values) => values.chunks(CHUNK).try_for_each(|chunk| {
            match chunk.iter().find(|value| !value.is_finite()) {
                Some(value) => Err(tensor(*value, "f32")),
                None => put(&le_bytes(chunk)),
            }
        }),
        Numbers::Bf16(values) => values.chunks(CHUNK).try_for_each(|chunk| {
            let bytes = bf16_bytes(chunk).map_err(|value| tensor(value, "bf16"))?;
            put(&bytes)
        }),
        Numbers::I64(values) => values
            .iter()
            .try_for_each(|value| put(&value.to_le_bytes())),
        Numbers::Kept(matrix, kept) if kept.dtype(matrix) == matrix.dtype() => put(matrix.bytes()),
        Numbers::Kept(matrix, kept) => {
            let cols = matrix.shape().last().copied().unwrap_or_default().max(1);
            let row_bytes = matrix.dtype().bytes_of(cols).unwrap_or_default().max(1);
            let mut row = vec![0.0; cols];
            matrix
                .bytes()
                .chunks_exact(row_bytes)
                .try_for_each(|bytes| {
                    matrix.dtype().widen(bytes, &mut row);
                    put(&kept
                        .round(&row)
                        .map_err(|value| tensor(value, kept.dtype(matrix).as_str()))?)
                })
        }
    }
}

impl Entry<'_> {
    /// Its axes in the file: rows of blocks are rows of bytes.
    fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.to_vec();
        if let (Some(cols), Some(dtype)) = (shape.last_mut(), self.numbers.kept())
            && dtype.is_quantised()
        {
            *cols = *cols / dtype.block_len() * dtype.block_bytes();
        }
        shape
    }
}

/// Little-endian f32.
pub(super) fn le_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}
