//! What a trainer leaves (MIDPO.md 2): base, experts, router and score models in the files that [`super::load`], [`super::load_score`],
//! transformers, PEFT and the authors' code read.
//!
//! `files` makes the files of a directory appear together; `safetensors` and `torch` are the two containers; `config` is `config.json`.

mod base;
mod config;
mod expert;
mod files;
mod quantised;
mod router;
mod safetensors;
mod score;
mod text;
mod torch;

pub use base::base;
pub use expert::expert;
pub use router::router;
pub use score::score;
pub use text::TextFiles;

pub(super) use base::files as base_files;
pub(super) use quantised::weights as quantised_weights;
pub(super) use router::folded;

use std::collections::HashMap;
use std::path::Path;

use super::{CheckpointError, NamedTensor};
use crate::dtype::DType;

use safetensors::Numbers;

/// The numbers of a tensor as they are to be stored.
///
/// # Errors
/// [`CheckpointError::Malformed`] for a format that is not trained in.
fn numbers<'a>(
    file: &Path,
    values: &'a [f32],
    dtype: DType,
) -> Result<Numbers<'a>, CheckpointError> {
    match dtype {
        DType::F32 => Ok(Numbers::F32(values)),
        DType::BF16 => Ok(Numbers::Bf16(values)),
        other => {
            let reason = format!("expected to write f32 or bf16, found {}", other.as_str());
            Err(CheckpointError::malformed(file, reason))
        }
    }
}

/// Checks that `tensors` are those of `expected`, each once, of its shape, and no others: what is written can be read.
///
/// # Errors
/// [`CheckpointError`] names the first tensor that is missing, too many or of another shape; `file` is where it should go.
fn check(
    file: &Path,
    tensors: &[NamedTensor],
    expected: &[(String, Vec<usize>)],
) -> Result<(), CheckpointError> {
    let mut found: HashMap<&str, &NamedTensor> = HashMap::new();
    for tensor in tensors {
        if found.insert(&tensor.0, tensor).is_some() {
            let reason = "expected once, found twice";
            return Err(CheckpointError::tensor(file, &tensor.0, reason));
        }
    }
    for (name, expected) in expected {
        let Some((_, shape, values)) = found.remove(name.as_str()) else {
            return Err(CheckpointError::MissingTensor {
                file: file.to_path_buf(),
                name: name.clone(),
                expected: format!("shape {expected:?}"),
            });
        };
        if shape != expected {
            return Err(CheckpointError::Shape {
                file: file.to_path_buf(),
                name: name.clone(),
                expected: expected.clone(),
                found: shape.clone(),
            });
        }
        check_len(file, name, shape, values)?;
    }
    match found.keys().min() {
        None => Ok(()),
        Some(name) => {
            let reason = "expected no such tensor: the configuration has no use for it";
            Err(CheckpointError::tensor(file, name, reason))
        }
    }
}

/// As many numbers as the shape says.
fn check_len(
    file: &Path,
    name: &str,
    shape: &[usize],
    values: &[f32],
) -> Result<(), CheckpointError> {
    let elements = shape
        .iter()
        .try_fold(1usize, |product, axis| product.checked_mul(*axis));
    if elements == Some(values.len()) {
        return Ok(());
    }
    let found = values.len();
    let reason = format!("expected as many numbers as shape {shape:?} says, found {found}");
    Err(CheckpointError::tensor(file, name, reason))
}
