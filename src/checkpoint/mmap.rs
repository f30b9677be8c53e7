//! Read-only mappings of files: the one unsafe act of `checkpoint`.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::CheckpointError;

/// Maps a regular file that is not empty. Its pages are read when they are first touched.
///
/// # Errors
/// [`CheckpointError::Io`] when it cannot be opened or mapped, [`CheckpointError::Malformed`] when it is no regular file or empty.
pub(crate) fn map(file: &Path) -> Result<Arc<Mmap>, CheckpointError> {
    let io = |source| CheckpointError::io(file, source);
    let malformed = |reason: &str| CheckpointError::malformed(file, reason);
    // Asked by name first: opening a pipe would wait for somebody to write to it.
    if !std::fs::metadata(file).map_err(io)?.is_file() {
        return Err(malformed("expected a regular file"));
    }
    let opened = File::open(file).map_err(io)?;
    let metadata = opened.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(malformed("expected a regular file"));
    }
    if metadata.len() == 0 {
        return Err(malformed("expected content, found an empty file"));
    }
    // SAFETY: the mapping is read-only and only ever read as bytes, for which every value is valid. What Rust cannot rule out is
    // that somebody rewrites or truncates the file while we serve from it: then weights change, or reading ends the process. Both
    // are an operator's act upon their own model (as with every server that maps weights); `pack` replaces by renaming, never in
    // place.
    let map = unsafe { Mmap::map(&opened) }.map_err(io)?;
    Ok(Arc::new(map))
}
