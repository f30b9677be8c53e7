//! The models that stages start from.

use std::fs;
use std::path::Path;

use super::session::setting;
use crate::checkpoint::write::TextFiles;
use crate::checkpoint::{self, Checkpoint, Sources};
use crate::config::train::Stage;
use crate::train::{TrainError, files};

/// What a request that says nothing gets.
const GENERATION: &str = "generation_config.json";

/// A base.
///
/// # Errors
/// As [`checkpoint::load`]; [`TrainError::Setting`] where nobody says which.
pub(super) fn base(stage: Stage, path: Option<&Path>) -> Result<Checkpoint, TrainError> {
    let path = path.ok_or_else(|| {
        let expected = "a base: a Hugging Face directory or a GGUF file";
        setting(stage, "base", expected, "none")
    })?;
    Ok(checkpoint::load(&Sources::model(path))?)
}

/// The text side of what is written, as it is beside the base.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn text_files(path: &Path, checkpoint: &Checkpoint) -> Result<TextFiles, TrainError> {
    if path.join("tokenizer.json").exists() {
        return Ok(TextFiles::read(path)?);
    }
    let positions = checkpoint.config.max_position_embeddings;
    Ok(TextFiles::of(&checkpoint.text, positions))
}

/// Copies how answers are sampled by default.
///
/// # Errors
/// [`TrainError::File`].
pub(super) fn copy_generation(from: &Path, to: &Path) -> Result<(), TrainError> {
    let source = from.join(GENERATION);
    if !source.exists() {
        return Ok(());
    }
    let bytes = fs::read(&source).map_err(TrainError::file(&source))?;
    files::write(&to.join(GENERATION), &bytes)
}
