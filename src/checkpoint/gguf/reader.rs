//! The container: metadata and the directory of tensors, every length checked before anything is reserved for it.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::super::CheckpointError;
use crate::dtype::DType;

/// Tensors of a file: a Llama has 9 a layer.
const TENSORS_MAX: u64 = 1 << 16;
/// Keys of a file.
const KEYS_MAX: u64 = 1 << 14;
/// Bytes of a key or a tensor's name.
const NAME_BYTES_MAX: usize = 1 << 10;
/// Axes of a tensor.
const AXES_MAX: u32 = 4;
/// `general.alignment`.
const ALIGNMENT_MAX: u64 = 1 << 20;
/// Where a file does not say.
const ALIGNMENT_DEFAULT: u64 = 32;

/// A parsed header. Invariant: every range lies within the file, and no two tensors overlap.
pub(super) struct Header<'a> {
    file: &'a Path,
    values: HashMap<&'a str, Value<'a>>,
    tensors: HashMap<&'a str, TensorInfo>,
}

/// A tensor of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorInfo {
    /// Row-major axes: the file's, reversed.
    pub(super) shape: Vec<usize>,
    pub(super) dtype: DType,
    /// In the file.
    pub(super) range: Range<usize>,
}

/// A metadata value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Array(Array<'a>),
}

/// An array of one kind, whose elements were walked once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Array<'a> {
    kind: Kind,
    pub(super) len: usize,
    bytes: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn of(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::Text,
            9 => Self::Array,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of a scalar.
    fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::Array => None,
        }
    }
}

/// ggml's numbers of the formats that we read.
fn dtype_of(code: u32) -> Option<DType> {
    Some(match code {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        12 => DType::Q4K,
        13 => DType::Q5K,
        14 => DType::Q6K,
        30 => DType::BF16,
        _ => return None,
    })
}

/// Walks bytes; what is not there is `None`.
#[derive(Clone, Copy)]
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Walk<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(len)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u64()?).ok()?;
        self.take(len)
    }

    fn scalar(&mut self, kind: Kind) -> Option<Value<'a>> {
        Some(match kind {
            Kind::U8 => Value::Unsigned(self.array().map(u8::from_le_bytes)?.into()),
            Kind::I8 => Value::Signed(self.array().map(i8::from_le_bytes)?.into()),
            Kind::U16 => Value::Unsigned(self.array().map(u16::from_le_bytes)?.into()),
            Kind::I16 => Value::Signed(self.array().map(i16::from_le_bytes)?.into()),
            Kind::U32 => Value::Unsigned(self.u32()?.into()),
            Kind::I32 => Value::Signed(self.array().map(i32::from_le_bytes)?.into()),
            Kind::F32 => Value::Float(self.array().map(f32::from_le_bytes)?.into()),
            Kind::Bool => Value::Bool(self.array().map(u8::from_le_bytes)? != 0),
            Kind::U64 => Value::Unsigned(self.u64()?),
            Kind::I64 => Value::Signed(self.array().map(i64::from_le_bytes)?),
            Kind::F64 => Value::Float(self.array().map(f64::from_le_bytes)?),
            Kind::Text => Value::Text(std::str::from_utf8(self.bytes()?).ok()?),
            Kind::Array => return None,
        })
    }
}

impl<'a> Array<'a> {
    /// The elements in order.
    pub(super) fn iter(self) -> impl Iterator<Item = Value<'a>> {
        let mut walk = Walk {
            bytes: self.bytes,
            at: 0,
        };
        (0..self.len).map_while(move |_| walk.scalar(self.kind))
    }
}

impl<'a> Header<'a> {
    /// Parses the header of `bytes`, the whole file.
    pub(super) fn parse(file: &'a Path, bytes: &'a [u8]) -> Result<Self, CheckpointError> {
        let mut parser = Parser {
            file,
            walk: Walk { bytes, at: 0 },
        };
        let (tensor_count, key_count) = parser.preamble()?;
        let mut values = HashMap::new();
        for _ in 0..key_count {
            let (key, value) = parser.key_value()?;
            if values.insert(key, value).is_some() {
                return Err(parser.malformed(format!("metadata: `{key}` comes twice")));
            }
        }
        let mut directory = Vec::new();
        for _ in 0..tensor_count {
            directory.push(parser.tensor()?);
        }
        let header = Self {
            file,
            values,
            tensors: HashMap::new(),
        };
        let alignment = header.alignment()?;
        let data = (parser.walk.at as u64).next_multiple_of(alignment);
        let tensors = place(file, directory, data, alignment, bytes.len())?;
        Ok(Self { tensors, ..header })
    }

    fn alignment(&self) -> Result<u64, CheckpointError> {
        const KEY: &str = "general.alignment";
        let alignment = self.optional_u64(KEY)?.unwrap_or(ALIGNMENT_DEFAULT);
        if alignment == 0 || alignment % 8 != 0 || alignment > ALIGNMENT_MAX {
            return Err(self.value_error(
                KEY,
                format!("a multiple of 8 up to {ALIGNMENT_MAX}"),
                alignment.to_string(),
            ));
        }
        Ok(alignment)
    }

    pub(super) fn file(&self) -> &'a Path {
        self.file
    }

    pub(super) fn get(&self, key: &str) -> Option<Value<'a>> {
        self.values.get(key).copied()
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    pub(super) fn tensor_names(&self) -> impl Iterator<Item = &'a str> {
        self.tensors.keys().copied()
    }

    /// A number that is not negative, of whichever integer kind.
    pub(super) fn optional_u64(&self, key: &str) -> Result<Option<u64>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(value)),
            Some(Value::Signed(value)) if value >= 0 => Ok(Some(value.unsigned_abs())),
            Some(other) => Err(self.kind_error(key, "a number that is not negative", other)),
        }
    }

    pub(super) fn optional_f64(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) if value.is_finite() => Ok(Some(value)),
            Some(other) => Err(self.kind_error(key, "a finite float", other)),
        }
    }

    pub(super) fn optional_bool(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.kind_error(key, "true or false", other)),
        }
    }

    pub(super) fn optional_text(&self, key: &str) -> Result<Option<&'a str>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(value)) => Ok(Some(value)),
            Some(other) => Err(self.kind_error(key, "a string", other)),
        }
    }

    pub(super) fn optional_array(&self, key: &str) -> Result<Option<Array<'a>>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(value)) => Ok(Some(value)),
            Some(other) => Err(self.kind_error(key, "an array", other)),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<&'a str, CheckpointError> {
        self.optional_text(key)?
            .ok_or_else(|| self.missing(key, "a string"))
    }

    pub(super) fn missing(&self, key: &str, expected: &str) -> CheckpointError {
        self.value_error(key, expected.to_owned(), "nothing".to_owned())
    }

    pub(super) fn kind_error(
        &self,
        key: &str,
        expected: &str,
        found: Value<'_>,
    ) -> CheckpointError {
        let found = match found {
            Value::Unsigned(value) => value.to_string(),
            Value::Signed(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::Text(value) => {
                format!("{:?}", value.chars().take(SHOWN_CHARS).collect::<String>())
            }
            Value::Array(array) => format!("an array of {} elements", array.len),
        };
        self.value_error(key, expected.to_owned(), found)
    }

    pub(super) fn value_error(
        &self,
        key: &str,
        expected: String,
        found: String,
    ) -> CheckpointError {
        CheckpointError::Value {
            file: self.file.to_path_buf(),
            key: key.to_owned(),
            expected,
            found,
        }
    }
}

/// Of a string in an error message.
const SHOWN_CHARS: usize = 64;

/// A tensor whose place is not checked yet.
struct Entry<'a> {
    name: &'a str,
    shape: Vec<usize>,
    dtype: DType,
    bytes: usize,
    offset: u64,
}

struct Parser<'a> {
    file: &'a Path,
    walk: Walk<'a>,
}

impl<'a> Parser<'a> {
    fn malformed(&self, reason: String) -> CheckpointError {
        CheckpointError::Malformed {
            file: self.file.to_path_buf(),
            reason,
        }
    }

    fn need<T>(&self, value: Option<T>, what: &str) -> Result<T, CheckpointError> {
        value.ok_or_else(|| {
            self.malformed(format!(
                "expected {what} at byte {}, found the end of the file or bytes that are none",
                self.walk.at
            ))
        })
    }

    /// Tensors and keys that the file claims.
    fn preamble(&mut self) -> Result<(u64, u64), CheckpointError> {
        let magic = self.walk.array::<4>();
        if magic != Some(*b"GGUF") {
            return Err(self.malformed("expected a GGUF file, found another beginning".to_owned()));
        }
        let version = self.walk.u32();
        let version = self.need(version, "a version")?;
        if !(2..=3).contains(&version) {
            let hint = if (2..=3).contains(&version.swap_bytes()) {
                " (a big-endian file)"
            } else {
                ""
            };
            return Err(self.malformed(format!(
                "expected GGUF version 2 or 3, found {version}{hint}"
            )));
        }
        let tensors = self.walk.u64();
        let tensors = self.need(tensors, "the number of tensors")?;
        let keys = self.walk.u64();
        let keys = self.need(keys, "the number of keys")?;
        for (what, found, limit) in [("tensors", tensors, TENSORS_MAX), ("keys", keys, KEYS_MAX)] {
            if found > limit {
                return Err(
                    self.malformed(format!("expected at most {limit} {what}, found {found}"))
                );
            }
        }
        Ok((tensors, keys))
    }

    fn name(&mut self, what: &str) -> Result<&'a str, CheckpointError> {
        let before = self.walk.at;
        let name = self
            .walk
            .bytes()
            .filter(|bytes| bytes.len() <= NAME_BYTES_MAX)
            .and_then(|bytes| std::str::from_utf8(bytes).ok());
        name.ok_or_else(|| {
            self.malformed(format!(
                "expected {what} of at most {NAME_BYTES_MAX} bytes of UTF-8 at byte {before}, found none"
            ))
        })
    }

    fn key_value(&mut self) -> Result<(&'a str, Value<'a>), CheckpointError> {
        let key = self.name("a key")?;
        let kind = self.kind(key)?;
        let value = if kind == Kind::Array {
            Value::Array(self.array(key)?)
        } else {
            let value = self.walk.scalar(kind);
            self.need(value, &format!("the value of `{key}`"))?
        };
        Ok((key, value))
    }

    fn kind(&mut self, key: &str) -> Result<Kind, CheckpointError> {
        let code = self.walk.u32();
        let code = self.need(code, &format!("the kind of `{key}`"))?;
        Kind::of(code).ok_or_else(|| {
            self.malformed(format!(
                "metadata: `{key}`: expected a kind of 0 to 12, found {code}"
            ))
        })
    }

    fn array(&mut self, key: &str) -> Result<Array<'a>, CheckpointError> {
        let kind = self.kind(key)?;
        if kind == Kind::Array {
            return Err(self.malformed(format!(
                "metadata: `{key}`: expected an array of scalars or strings, found an array of arrays"
            )));
        }
        let claimed = self.walk.u64();
        let claimed = self.need(claimed, &format!("the length of `{key}`"))?;
        let what = format!("the {claimed} elements of `{key}`");
        let start = self.walk.at;
        let len = self.need(usize::try_from(claimed).ok(), &what)?;
        if let Some(size) = kind.size() {
            let bytes = len.checked_mul(size).and_then(|len| self.walk.take(len));
            let bytes = self.need(bytes, &what)?;
            return Ok(Array { kind, len, bytes });
        }
        // Every string takes 8 bytes at least, so a false length ends at the file's end.
        for _ in 0..len {
            let text = self.walk.scalar(Kind::Text);
            self.need(text, &what)?;
        }
        let bytes = self.walk.bytes.get(start..self.walk.at);
        let bytes = self.need(bytes, &what)?;
        Ok(Array { kind, len, bytes })
    }

    fn tensor(&mut self) -> Result<Entry<'a>, CheckpointError> {
        let name = self.name("a tensor's name")?;
        let wrong = |reason: String| CheckpointError::Tensor {
            file: self.file.to_path_buf(),
            name: name.to_owned(),
            reason,
        };
        let axes = self.walk.u32();
        let axes = axes
            .filter(|axes| (1..=AXES_MAX).contains(axes))
            .ok_or_else(|| wrong(format!("expected 1 to {AXES_MAX} axes, found {axes:?}")))?;
        let mut shape = Vec::new();
        for _ in 0..axes {
            let axis = self.walk.u64();
            let axis = axis.and_then(|axis| usize::try_from(axis).ok());
            shape.push(self.need(axis, &format!("an axis of tensor `{name}`"))?);
        }
        shape.reverse();
        let code = self.walk.u32();
        let code = self.need(code, &format!("the format of tensor `{name}`"))?;
        let offset = self.walk.u64();
        let offset = self.need(offset, &format!("the offset of tensor `{name}`"))?;
        let wrong = |reason: String| CheckpointError::Tensor {
            file: self.file.to_path_buf(),
            name: name.to_owned(),
            reason,
        };
        let dtype = dtype_of(code).ok_or_else(|| {
            let known = DType::ALL.map(DType::as_str).join(", ");
            wrong(format!(
                "expected one of the formats {known}, found ggml's number {code}"
            ))
        })?;
        let row = shape.last().copied().unwrap_or_default();
        if shape.contains(&0) || !row.is_multiple_of(dtype.block_len()) {
            return Err(wrong(format!(
                "expected rows of whole blocks of {} ({} weights), found shape {shape:?}",
                dtype.as_str(),
                dtype.block_len()
            )));
        }
        let bytes = shape
            .iter()
            .try_fold(1usize, |product, axis| product.checked_mul(*axis))
            .and_then(|elements| dtype.bytes_of(elements))
            .ok_or_else(|| wrong(format!("expected a size below 2^64, found {shape:?}")))?;
        Ok(Entry {
            name,
            shape,
            dtype,
            bytes,
            offset,
        })
    }
}

/// The directory with every tensor in its place in the file.
fn place<'a>(
    file: &Path,
    mut directory: Vec<Entry<'a>>,
    data: u64,
    alignment: u64,
    file_len: usize,
) -> Result<HashMap<&'a str, TensorInfo>, CheckpointError> {
    directory.sort_by_key(|entry| entry.offset);
    let mut tensors = HashMap::with_capacity(directory.len());
    let mut free_from = 0;
    for entry in directory {
        let wrong = |reason: String| CheckpointError::Tensor {
            file: file.to_path_buf(),
            name: entry.name.to_owned(),
            reason,
        };
        if !entry.offset.is_multiple_of(alignment) {
            return Err(wrong(format!(
                "expected an offset that is a multiple of {alignment}, found {}",
                entry.offset
            )));
        }
        let range = data
            .checked_add(entry.offset)
            .and_then(|start| usize::try_from(start).ok())
            .and_then(|start| Some(start..start.checked_add(entry.bytes)?))
            .filter(|range| range.end <= file_len)
            .ok_or_else(|| {
                wrong(format!(
                    "expected {} bytes at offset {} of the data, found the end of the file ({file_len} bytes)",
                    entry.bytes, entry.offset
                ))
            })?;
        if range.start < free_from {
            return Err(wrong(format!(
                "expected bytes of its own, found an overlap with another tensor at offset {}",
                entry.offset
            )));
        }
        free_from = range.end;
        let info = TensorInfo {
            shape: entry.shape.clone(),
            dtype: entry.dtype,
            range,
        };
        if tensors.insert(entry.name, info).is_some() {
            return Err(wrong("expected one of this name, found two".to_owned()));
        }
    }
    Ok(tensors)
}
