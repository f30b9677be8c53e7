//! Files that are there whole or not at all.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use super::TrainError;

impl TrainError {
    /// [`TrainError::File`].
    pub(crate) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

/// Writes beside `path`, then renames: whoever reads sees the old file or the new one.
///
/// # Errors
/// [`TrainError::File`].
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    let written = fs::File::create(&part).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(TrainError::file(&part))?;
    fs::rename(&part, path).map_err(TrainError::file(path))
}

/// Makes `directory` and those above it.
///
/// # Errors
/// [`TrainError::File`].
pub(crate) fn make_directory(directory: &Path) -> Result<(), TrainError> {
    fs::create_dir_all(directory).map_err(TrainError::file(directory))
}
