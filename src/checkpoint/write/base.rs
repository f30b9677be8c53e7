//! A base in a Hugging Face directory.

use std::path::Path;

use super::config::{Generation, Llama};
use super::files::Files;
use super::safetensors::{self, Entry};
use super::{TextFiles, check, numbers};
use crate::checkpoint::{CheckpointError, LlamaConfig, NamedTensor, hf};
use crate::dtype::DType;

/// Writes `config.json`, `generation_config.json`, `model.safetensors` (f32 or bf16) and the text files: what transformers'
/// `LlamaForCausalLM` and [`crate::checkpoint::load`] read. `tensors` are Hugging Face's by name, the head among them unless it is tied.
/// All files appear together; on an error the directory is as it was.
///
/// # Errors
/// [`CheckpointError`] names the tensor that is missing, too many, of another shape or not finite in `dtype`; or the file that cannot
/// be written.
pub fn base(
    directory: &Path,
    config: &LlamaConfig,
    tensors: &[NamedTensor],
    dtype: DType,
    text: &TextFiles,
) -> Result<(), CheckpointError> {
    let mut files = Files::new(directory)?;
    let expected = hf::tensor_shapes(config);
    check(&files.path(hf::SINGLE), tensors, &expected)?;
    files.stage(hf::SINGLE, |file, out| {
        safetensors::write(file, entries(file, tensors, dtype)?, out)
    })?;
    stage_files(&mut files, config, dtype, text)?;
    files.remove(hf::INDEX);
    files.finish()
}

/// All of a base but its weights: what a GGUF file holds beside them.
///
/// # Errors
/// [`CheckpointError::Io`].
pub(in crate::checkpoint) fn files(
    directory: &Path,
    config: &LlamaConfig,
    text: &TextFiles,
) -> Result<(), CheckpointError> {
    let mut files = Files::new(directory)?;
    stage_files(&mut files, config, DType::BF16, text)?;
    files.finish()
}

fn stage_files(
    files: &mut Files,
    config: &LlamaConfig,
    dtype: DType,
    text: &TextFiles,
) -> Result<(), CheckpointError> {
    text.stage(files)?;
    files.stage_json(hf::GENERATION, &Generation::of(config))?;
    files.stage_json(hf::CONFIG, &Llama::of(config, dtype))
}

/// Tensors as they are to be stored.
pub(super) fn entries<'a>(
    file: &Path,
    tensors: &'a [NamedTensor],
    dtype: DType,
) -> Result<Vec<Entry<'a>>, CheckpointError> {
    let entry = |(name, shape, values): &'a NamedTensor| {
        Ok(Entry {
            name,
            shape,
            numbers: numbers(file, values, dtype)?,
        })
    };
    tensors.iter().map(entry).collect()
}
