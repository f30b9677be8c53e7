//! Where a checkpoint's files are: a directory, the listed part of one, or the binary itself. Names are relative and have been
//! checked: none leaves its directory.

use std::collections::BTreeSet;
use std::io::Read;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::tensor::TensorBytes;
use super::{CheckpointError, mmap};

/// Files built into the binary: name relative to the checkpoint's directory (`safety/adapter_config.json`), content.
pub type EmbeddedFiles = &'static [(&'static str, &'static [u8])];

/// A directory of files.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// For messages, and for opening files on disk.
    root: PathBuf,
    /// Below the root: empty, or `name/`.
    prefix: String,
    files: Files,
}

#[derive(Clone, Debug)]
enum Files {
    /// Whatever is in the directory.
    Directory,
    /// Only these, relative to the root: what `midpo.json` lists.
    Listed(Arc<BTreeSet<String>>),
    /// In the binary.
    Embedded(EmbeddedFiles),
}

/// Content of one file.
#[derive(Clone, Debug)]
pub(crate) enum FileBytes {
    /// On disk.
    Mapped(Arc<Mmap>),
    /// In the binary.
    Static(&'static [u8]),
}

impl FileBytes {
    /// All of it.
    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }

    /// A part of it, not copied; `None` when it reaches beyond the end.
    pub(crate) fn part(&self, range: Range<usize>) -> Option<TensorBytes> {
        self.as_slice().get(range.clone())?;
        Some(match self {
            Self::Mapped(map) => TensorBytes::Mapped(Arc::clone(map), range),
            Self::Static(bytes) => TensorBytes::Static(bytes.get(range)?),
        })
    }
}

impl Source {
    /// Every file of a directory.
    pub(crate) fn directory(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
            prefix: String::new(),
            files: Files::Directory,
        }
    }

    /// Files in the binary; `name` stands for their directory in messages.
    pub(crate) fn embedded(name: &str, files: EmbeddedFiles) -> Self {
        Self {
            root: PathBuf::from(name),
            prefix: String::new(),
            files: Files::Embedded(files),
        }
    }

    /// The same directory, of which only the files in `names` are seen.
    pub(crate) fn only(&self, names: BTreeSet<String>) -> Self {
        let files = match &self.files {
            // All of these were chosen when the binary was built.
            Files::Embedded(files) => Files::Embedded(files),
            Files::Directory | Files::Listed(_) => Files::Listed(Arc::new(names)),
        };
        Self {
            files,
            ..self.clone()
        }
    }

    /// A directory inside this one.
    pub(crate) fn inside(&self, name: &str) -> Self {
        Self {
            prefix: format!("{}{name}/", self.prefix),
            ..self.clone()
        }
    }

    /// The path of a file, for messages.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(self.full(name))
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Whether there is such a file.
    pub(crate) fn exists(&self, name: &str) -> bool {
        let full = self.full(name);
        match &self.files {
            Files::Directory => self.path(name).is_file(),
            Files::Listed(names) => names.contains(&full) && self.path(name).is_file(),
            Files::Embedded(files) => files.iter().any(|(name, _)| *name == full),
        }
    }

    /// Opens a file for reading in place.
    ///
    /// # Errors
    /// As [`mmap::map`].
    pub(crate) fn open(&self, name: &str) -> Result<FileBytes, CheckpointError> {
        let full = self.full(name);
        match &self.files {
            Files::Listed(names) if !names.contains(&full) => Err(self.not_found(name)),
            Files::Directory | Files::Listed(_) => {
                mmap::map(&self.path(name)).map(FileBytes::Mapped)
            }
            Files::Embedded(files) => files
                .iter()
                .find(|(name, _)| *name == full)
                .map(|(_, bytes)| FileBytes::Static(bytes))
                .ok_or_else(|| self.not_found(name)),
        }
    }

    /// A copy of a small file.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] for one of more than `bytes_max`, before it is read.
    pub(crate) fn read(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>, CheckpointError> {
        let full = self.full(name);
        match &self.files {
            Files::Listed(names) if !names.contains(&full) => Err(self.not_found(name)),
            Files::Directory | Files::Listed(_) => read_small(&self.path(name), bytes_max),
            Files::Embedded(_) => {
                let bytes = self.open(name)?;
                let bytes = bytes.as_slice();
                let found = bytes.len() as u64;
                if found > bytes_max {
                    return Err(too_large(&self.path(name), bytes_max, found));
                }
                Ok(bytes.to_vec())
            }
        }
    }

    /// As [`Source::read`]; `None` where there is no such file.
    pub(crate) fn read_optional(
        &self,
        name: &str,
        bytes_max: u64,
    ) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.exists(name)
            .then(|| self.read(name, bytes_max))
            .transpose()
    }

    fn not_found(&self, name: &str) -> CheckpointError {
        CheckpointError::io(&self.path(name), std::io::ErrorKind::NotFound.into())
    }
}

/// Reads a regular file of at most `bytes_max` bytes, even if it grows meanwhile.
fn read_small(file: &Path, bytes_max: u64) -> Result<Vec<u8>, CheckpointError> {
    let io = |source| CheckpointError::io(file, source);
    let metadata = std::fs::metadata(file).map_err(io)?;
    if !metadata.is_file() {
        return Err(CheckpointError::malformed(file, "expected a regular file"));
    }
    if metadata.len() > bytes_max {
        return Err(too_large(file, bytes_max, metadata.len()));
    }
    let opened = std::fs::File::open(file).map_err(io)?;
    let mut bytes = Vec::new();
    opened
        .take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    let found = bytes.len() as u64;
    if found > bytes_max {
        return Err(too_large(file, bytes_max, found));
    }
    Ok(bytes)
}

fn too_large(file: &Path, bytes_max: u64, found: u64) -> CheckpointError {
    let reason = format!("expected at most {bytes_max} bytes, found {found}");
    CheckpointError::malformed(file, reason)
}

/// Whether `name` is `parts_max` or fewer plain names joined by `/`: no root, no `..`, no `.`, no backslash.
pub(crate) fn is_inside(name: &str, parts_max: usize) -> bool {
    let is_plain = |part: &str| {
        let mut components = Path::new(part).components();
        let first = components.next();
        matches!(first, Some(Component::Normal(_))) && components.next().is_none()
    };
    name.split('/').all(is_plain)
        && name.split('/').count() <= parts_max
        && !name.contains(|c: char| c == '\\' || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::is_inside;

    #[test]
    fn is_inside_when_a_name_could_leave_the_directory_is_false() {
        for (name, parts, want) in [
            ("model.safetensors", 1, true),
            ("safety/adapter_config.json", 2, true),
            ("safety/adapter_config.json", 1, false),
            ("..", 1, false),
            ("../good/model.safetensors", 3, false),
            ("safety/../../x", 4, false),
            ("/etc/hostname", 3, false),
            ("a//b", 3, false),
            ("./a", 2, false),
            ("a/.", 2, false),
            ("..\\a", 1, false),
            ("a\tb", 1, false),
            ("", 1, false),
        ] {
            assert_eq!(is_inside(name, parts), want, "{name:?}");
        }
    }
}
