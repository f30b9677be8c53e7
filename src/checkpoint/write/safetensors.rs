//! A safetensors file, written tensor by tensor: no second copy of the model is made.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use ::safetensors::Dtype;
use ::safetensors::tensor::{Metadata, TensorInfo};

use crate::checkpoint::CheckpointError;
use crate::dtype::bf16_bytes;

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
}

impl Numbers<'_> {
    fn dtype(self) -> Dtype {
        match self {
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
            shape: entry.shape.to_vec(),
            data_offsets: (start, end),
        };
        (entry.name.to_owned(), info)
    });
    let infos = infos.collect();
    // transformers refuses a file that does not say this.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
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
    }
}

/// Little-endian f32.
pub(super) fn le_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}
