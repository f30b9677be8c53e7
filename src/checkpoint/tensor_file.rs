//! The tensors of one file by name, each taken once with the shape that its user expects, so that at the end what nobody took is
//! known. A safetensors file or a `router.pth` becomes one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::{Metadata, TensorInfo};

use super::limits::HEADER_BYTES_MAX;
use super::source::FileBytes;
use super::tensor::{HostTensor, TensorBytes};
use super::{CheckpointError, NamedTensor, parallel};
use crate::dtype::DType;

/// Metadata key of a safetensors file: which tensors of bytes are rows of blocks, as a JSON object from names to formats of
/// [`DType::as_str`]. Blocks are ggml's, row after row.
pub(crate) const BLOCKS: &str = "midpo.blocks";
/// Bytes that one thread scans for NaN at a time.
const SCAN_BYTES: usize = 8 << 20;

/// A file's tensors that have not been taken yet.
#[derive(Debug)]
pub(crate) struct TensorFile {
    file: PathBuf,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    Usable(HostTensor),
    /// One int64: a counter.
    Integer(i64),
    /// In a format that no weight of ours has.
    Foreign(Dtype),
}

/// A tensor, and where it came from for messages.
#[derive(Clone, Debug)]
pub(crate) struct FileTensor {
    /// Which file.
    pub(crate) file: PathBuf,
    /// Its name there.
    pub(crate) name: String,
    /// Its content.
    pub(crate) tensor: HostTensor,
}

impl FileTensor {
    /// With its numbers widened.
    pub(crate) fn into_named(self) -> NamedTensor {
        let values = self.tensor.to_f32();
        (self.name, self.tensor.shape().to_vec(), values)
    }
}

impl TensorFile {
    /// Reads the header of a safetensors file; tensors stay where they are.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] when the header does not fit the file, is not JSON, or its offsets leave gaps, overlap, or
    /// disagree with a shape.
    pub(crate) fn safetensors(file: &Path, bytes: &FileBytes) -> Result<Self, CheckpointError> {
        let malformed = |reason: String| CheckpointError::malformed(file, reason);
        let content = bytes.as_slice();
        let (length, rest) = content.split_first_chunk::<8>().ok_or_else(|| {
            malformed(format!(
                "expected a header of 8 bytes or more, found {}",
                content.len()
            ))
        })?;
        let length = u64::from_le_bytes(*length);
        let header = usize::try_from(length)
            .ok()
            .filter(|_| length <= HEADER_BYTES_MAX)
            .and_then(|length| rest.get(..length))
            .ok_or_else(|| {
                malformed(format!(
                    "expected a header within the file and of at most {HEADER_BYTES_MAX} bytes, found one of {length} bytes in a \
                     file of {}",
                    content.len()
                ))
            })?;
        // Not `SafeTensors::read_metadata`: its sum of sizes may overflow. Parsing the header checks order, gaps and sizes.
        let metadata: Metadata = serde_json::from_slice(header)
            .map_err(|error| malformed(format!("expected a safetensors header: {error}")))?;
        let data_start = 8 + header.len();
        let data_len = content.len() - data_start;
        if metadata.data_len() != data_len {
            return Err(malformed(format!(
                "expected {} bytes of tensors, as the header says, found {data_len}",
                metadata.data_len()
            )));
        }
        let blocks = blocks(file, &metadata)?;
        let tensors = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let block = blocks.get(&name).copied();
                match entry(bytes, data_start, info, block) {
                    Some(entry) => Ok((name, entry)),
                    None => {
                        let reason = "expected bytes as its shape and format say";
                        Err(CheckpointError::tensor(file, &name, reason))
                    }
                }
            })
            .collect::<Result<_, CheckpointError>>()?;
        Ok(Self {
            file: file.to_path_buf(),
            tensors,
        })
    }

    /// Tensors that were read some other way.
    pub(crate) fn from_tensors(file: &Path, tensors: BTreeMap<String, HostTensor>) -> Self {
        Self {
            file: file.to_path_buf(),
            tensors: tensors
                .into_iter()
                .map(|(name, tensor)| (name, Entry::Usable(tensor)))
                .collect(),
        }
    }

    /// The file.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// Names of what has not been taken.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether `name` is there and has not been taken.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of a tensor of a usable format.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        match self.tensors.get(name)? {
            Entry::Usable(tensor) => Some(tensor.shape()),
            Entry::Integer(_) | Entry::Foreign(_) => None,
        }
    }

    /// Takes a tensor of one of our formats, whatever its shape; `expected` says which it should have had.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], or [`CheckpointError::Tensor`] for a foreign format.
    pub(crate) fn take_any(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<FileTensor, CheckpointError> {
        match self.tensors.remove(name) {
            Some(Entry::Usable(tensor)) => Ok(FileTensor {
                file: self.file.clone(),
                name: name.to_owned(),
                tensor,
            }),
            Some(Entry::Integer(_)) => {
                let reason = "expected F32, F16 or BF16, found I64";
                Err(CheckpointError::tensor(&self.file, name, reason))
            }
            Some(Entry::Foreign(dtype)) => {
                let reason = format!("expected F32, F16 or BF16, found {dtype}");
                Err(CheckpointError::tensor(&self.file, name, reason))
            }
            None => Err(CheckpointError::MissingTensor {
                file: self.file.clone(),
                name: name.to_owned(),
                expected: expected.to_owned(),
            }),
        }
    }

    /// Takes a tensor of one int64.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], or [`CheckpointError::Tensor`] for another format or shape.
    pub(crate) fn take_integer(&mut self, name: &str) -> Result<i64, CheckpointError> {
        match self.tensors.remove(name) {
            Some(Entry::Integer(value)) => Ok(value),
            Some(_) => {
                let reason = "expected one int64, found something else";
                Err(CheckpointError::tensor(&self.file, name, reason))
            }
            None => Err(CheckpointError::MissingTensor {
                file: self.file.clone(),
                name: name.to_owned(),
                expected: "one int64".to_owned(),
            }),
        }
    }

    /// Takes a tensor of this shape; `context` tells, where it is missing, who says that it should be there.
    ///
    /// # Errors
    /// As [`TensorFile::take_any`], and [`CheckpointError::Shape`].
    pub(crate) fn take(
        &mut self,
        name: &str,
        shape: &[usize],
        context: &str,
    ) -> Result<FileTensor, CheckpointError> {
        let found = self.take_any(name, &format!("shape {shape:?}{context}"))?;
        if found.tensor.shape() != shape {
            return Err(CheckpointError::Shape {
                file: self.file.clone(),
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: found.tensor.shape().to_vec(),
            });
        }
        Ok(found)
    }

    /// Ends the taking: whatever is left is something that the file's user would silently not compute.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] names the first tensor left for which `harmless` does not hold.
    pub(crate) fn finish(
        self,
        owner: &str,
        harmless: impl Fn(&str) -> bool,
    ) -> Result<(), CheckpointError> {
        match self.names().find(|name| !harmless(name)) {
            None => Ok(()),
            Some(name) => {
                let reason = format!("expected no such tensor: {owner} has no use for it");
                Err(CheckpointError::tensor(&self.file, name, reason))
            }
        }
    }
}

/// The formats that [`BLOCKS`] names.
fn blocks(file: &Path, metadata: &Metadata) -> Result<BTreeMap<String, DType>, CheckpointError> {
    let Some(named) = metadata
        .metadata()
        .as_ref()
        .and_then(|keys| keys.get(BLOCKS))
    else {
        return Ok(BTreeMap::new());
    };
    let malformed = |reason: String| CheckpointError::malformed(file, reason);
    let named: BTreeMap<String, String> = serde_json::from_str(named).map_err(|error| {
        malformed(format!(
            "`{BLOCKS}`: expected names and formats in JSON: {error}"
        ))
    })?;
    let blocks = named.into_iter().map(|(name, word)| {
        let dtype = DType::ALL.into_iter().find(|dtype| dtype.as_str() == word);
        let dtype = dtype.filter(|dtype| dtype.is_quantised()).ok_or_else(|| {
            let reason = format!(
                "`{BLOCKS}`: expected a block format, found `{}`",
                word.escape_debug()
            );
            CheckpointError::tensor(file, &name, reason)
        })?;
        match metadata
            .info(&name)
            .map(|info| (info.dtype, info.shape.len()))
        {
            Some((Dtype::U8, 2)) => Ok((name, dtype)),
            _ => {
                let reason =
                    format!("`{BLOCKS}`: expected a matrix of U8 of this name, found none");
                Err(CheckpointError::tensor(file, &name, reason))
            }
        }
    });
    blocks.collect()
}

fn entry(
    bytes: &FileBytes,
    data_start: usize,
    info: &TensorInfo,
    block: Option<DType>,
) -> Option<Entry> {
    let start = data_start.checked_add(info.data_offsets.0)?;
    let end = data_start.checked_add(info.data_offsets.1)?;
    let dtype = match info.dtype {
        Dtype::I64 if info.shape.iter().product::<usize>() == 1 => {
            let part = bytes.part(start..end)?;
            let value = part.as_slice().first_chunk::<8>()?;
            return Some(Entry::Integer(i64::from_le_bytes(*value)));
        }
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::U8 if block.is_some() => {
            let (dtype, [rows, row_bytes]) = (block?, info.shape.as_slice().try_into().ok()?);
            let whole = row_bytes % dtype.block_bytes() == 0;
            let shape = vec![rows, row_bytes / dtype.block_bytes() * dtype.block_len()];
            let bytes = bytes.part(start..end)?;
            return HostTensor::new(shape, dtype, bytes)
                .filter(|_| whole)
                .map(Entry::Usable);
        }
        other => return Some(Entry::Foreign(other)),
    };
    let bytes = bytes.part(start..end)?;
    HostTensor::new(info.shape.clone(), dtype, bytes).map(Entry::Usable)
}

/// Checks on all cores that every number of every tensor is finite; brings mapped files into memory on the way.
///
/// # Errors
/// [`CheckpointError::Tensor`] names the first tensor with a NaN or an infinity.
pub(crate) fn check_finite<'a>(
    tensors: impl IntoIterator<Item = &'a FileTensor>,
) -> Result<(), CheckpointError> {
    let mut scans = Vec::new();
    for named in tensors {
        let dtype = named.tensor.dtype();
        let whole_blocks = (SCAN_BYTES / dtype.block_bytes()).max(1) * dtype.block_bytes();
        for (index, bytes) in named.tensor.bytes().chunks(whole_blocks).enumerate() {
            let elements_before = index * (whole_blocks / dtype.block_bytes()) * dtype.block_len();
            scans.push((named, elements_before, bytes));
        }
    }
    parallel::map(scans.len(), |index| {
        let Some((named, elements_before, bytes)) = scans.get(index) else {
            return Ok(());
        };
        match named.tensor.dtype().first_non_finite(bytes) {
            None => Ok(()),
            Some(at) => {
                let reason = format!(
                    "expected finite numbers, found NaN or infinity at element {}",
                    elements_before + at
                );
                Err(CheckpointError::tensor(&named.file, &named.name, reason))
            }
        }
    })?;
    Ok(())
}

/// Bytes that were made here.
pub(crate) fn owned(bytes: Vec<u8>) -> TensorBytes {
    TensorBytes::Owned(bytes.into())
}
