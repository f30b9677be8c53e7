//! Files of one directory that appear together.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;

/// Bytes gathered before they go to the disk.
const BUFFER_BYTES: usize = 1 << 20;

/// Files that were written beside their places, to be renamed to them. Invariant: until [`Files::finish`] the directory holds what it
/// held before, and dropping takes away what was written.
pub(super) struct Files {
    directory: PathBuf,
    staged: Vec<&'static str>,
    stale: Vec<&'static str>,
}

impl Files {
    /// Makes the directory where it is missing.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(super) fn new(directory: &Path) -> Result<Self, CheckpointError> {
        fs::create_dir_all(directory).map_err(|error| CheckpointError::io(directory, error))?;
        Ok(Self {
            directory: directory.to_path_buf(),
            staged: Vec::new(),
            stale: Vec::new(),
        })
    }

    /// Where a file will be.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Where it is until then. One name for every try, so that what a killed process left is written over.
    fn part(&self, name: &str) -> PathBuf {
        self.directory.join(format!(".{name}.part"))
    }

    /// Writes a file, to the disk and not only to the system's memory; `content` is told the file's path for its errors.
    ///
    /// # Errors
    /// Those of `content`; [`CheckpointError::Io`].
    pub(super) fn stage(
        &mut self,
        name: &'static str,
        content: impl FnOnce(&Path, &mut BufWriter<File>) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let (path, part) = (self.path(name), self.part(name));
        let io = |error| CheckpointError::io(&part, error);
        let file = File::create(&part).map_err(io)?;
        self.staged.push(name);
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
        content(&path, &mut out)?;
        let file = out.into_inner().map_err(|error| io(error.into_error()))?;
        file.sync_all().map_err(io)
    }

    /// As [`Files::stage`], of bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(super) fn stage_bytes(
        &mut self,
        name: &'static str,
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        self.stage(name, |path, out| {
            out.write_all(bytes)
                .map_err(|error| CheckpointError::io(path, error))
        })
    }

    /// As [`Files::stage`], of JSON as people read it.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(super) fn stage_json(
        &mut self,
        name: &'static str,
        json: &impl serde::Serialize,
    ) -> Result<(), CheckpointError> {
        self.stage(name, |path, out| {
            let written = serde_json::to_writer_pretty(&mut *out, json).map_err(Into::into);
            written
                .and_then(|()| out.write_all(b"\n"))
                .map_err(|error| CheckpointError::io(path, error))
        })
    }

    /// A file that an earlier writing may have left, and that would be read instead of the new ones.
    pub(super) fn remove(&mut self, name: &'static str) {
        self.stale.push(name);
    }

    /// Everything takes its place, in the order of staging.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(super) fn finish(mut self) -> Result<(), CheckpointError> {
        for name in std::mem::take(&mut self.stale) {
            let path = self.path(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(CheckpointError::io(&path, error));
                }
                _ => {}
            }
        }
        for name in &self.staged {
            let path = self.path(name);
            fs::rename(self.part(name), &path)
                .map_err(|error| CheckpointError::io(&path, error))?;
        }
        self.staged.clear();
        Ok(())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for name in &self.staged {
            // Nothing more can be done about a file that stays; one that took its place is not there.
            let _ = fs::remove_file(self.part(name));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn files_when_one_cannot_be_written_leave_the_directory_as_it_was() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("new");
        let list = || {
            let names = fs::read_dir(&directory).unwrap();
            let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let mut files = Files::new(&directory).unwrap();
        files.stage_bytes("a", b"old").unwrap();
        files.stage_bytes("stale", b"old").unwrap();
        files.finish().unwrap();

        let mut files = Files::new(&directory).unwrap();
        files.stage_bytes("a", b"new").unwrap();
        files.remove("stale");
        let failed = files.stage("b", |path, out| {
            out.write_all(b"half").unwrap();
            Err(CheckpointError::malformed(path, "expected a whole one"))
        });
        assert!(failed.unwrap_err().to_string().contains("b: expected"));
        drop(files);
        assert_eq!(list(), ["a", "stale"]);
        assert_eq!(fs::read(directory.join("a")).unwrap(), b"old");

        let mut files = Files::new(&directory).unwrap();
        files.stage_bytes("a", b"new").unwrap();
        files.remove("stale");
        files.remove("never-there");
        files.finish().unwrap();
        assert_eq!(list(), ["a"]);
        assert_eq!(fs::read(directory.join("a")).unwrap(), b"new");
    }
}
