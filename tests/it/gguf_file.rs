//! Writes GGUF files: for want of a real one in the repository.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

/// A metadata value.
#[derive(Clone, Debug)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

impl Meta {
    fn write(&self, bytes: &mut Vec<u8>) {
        let mut head = |kind: u32, more: &[u8]| {
            bytes.extend(kind.to_le_bytes());
            bytes.extend_from_slice(more);
        };
        let array = |kind: u32, len: usize| {
            let mut head = kind.to_le_bytes().to_vec();
            head.extend((len as u64).to_le_bytes());
            head
        };
        match self {
            Self::U32(value) => head(4, &value.to_le_bytes()),
            Self::F32(value) => head(6, &value.to_le_bytes()),
            Self::Bool(value) => head(7, &[u8::from(*value)]),
            Self::Text(value) => {
                head(8, &[]);
                write_text(value, bytes);
            }
            Self::Texts(values) => {
                head(9, &array(8, values.len()));
                values.iter().for_each(|value| write_text(value, bytes));
            }
            Self::F32s(values) => {
                head(9, &array(6, values.len()));
                values
                    .iter()
                    .for_each(|value| bytes.extend(value.to_le_bytes()));
            }
            Self::I32s(values) => {
                head(9, &array(5, values.len()));
                values
                    .iter()
                    .for_each(|value| bytes.extend(value.to_le_bytes()));
            }
        }
    }
}

/// A tensor: row-major shape, ggml's number of its format, its bytes.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub format: u32,
    pub bytes: Vec<u8>,
}

/// A file to be.
#[derive(Clone, Debug)]
pub struct GgufFile {
    pub version: u32,
    pub meta: Vec<(String, Meta)>,
    pub tensors: Vec<Tensor>,
}

const ALIGNMENT: usize = 32;

impl GgufFile {
    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            write_text(key, &mut bytes);
            value.write(&mut bytes);
        }
        let mut offset = 0usize;
        for tensor in &self.tensors {
            write_text(&tensor.name, &mut bytes);
            bytes.extend((tensor.shape.len() as u32).to_le_bytes());
            for axis in tensor.shape.iter().rev() {
                bytes.extend((*axis as u64).to_le_bytes());
            }
            bytes.extend(tensor.format.to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset = (offset + tensor.bytes.len()).next_multiple_of(ALIGNMENT);
        }
        for tensor in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
            bytes.extend_from_slice(&tensor.bytes);
        }
        bytes
    }

    /// Writes it under a name of its own in the target's folder for tests.
    pub fn write(&self, name: &str) -> Written {
        Written::new(name, &self.bytes())
    }

    pub fn set(&mut self, key: &str, value: Meta) {
        self.remove(key);
        self.meta.push((key.to_owned(), value));
    }

    pub fn remove(&mut self, key: &str) {
        self.meta.retain(|(name, _)| name != key);
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        let found = self.tensors.iter_mut().find(|tensor| tensor.name == name);
        found.unwrap()
    }
}

/// A file that is removed again.
pub struct Written(PathBuf);

impl Written {
    pub fn new(name: &str, bytes: &[u8]) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("{name}-{}.gguf", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn write_text(text: &str, bytes: &mut Vec<u8>) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}
