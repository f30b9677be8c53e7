//! The router in its three files.

use std::collections::BTreeMap;
use std::path::Path;

use super::base::entries;
use super::files::Files;
use super::safetensors::{self, Entry, Numbers};
use super::{check_len, torch};
use crate::checkpoint::tensor::HostTensor;
use crate::checkpoint::tensor_file::{TensorFile, owned};
use crate::checkpoint::{CheckpointError, NamedTensor, RouterLayer, router as format};
use crate::dtype::DType;

/// Writes `router.pth` (the authors' dict of state dicts), `router.safetensors` (the same tensors) and `router_folded.safetensors`
/// (what is served), all in f32. `tensors` are named as in `router.safetensors`: `layer_{i}_alpha.linear_0.weight`, ... All files
/// appear together; on an error the directory is as it was.
///
/// # Errors
/// [`CheckpointError`] names the tensor that is missing, too many, not finite or does not chain with the others; or the file that
/// cannot be written.
pub fn router(directory: &Path, tensors: &[NamedTensor]) -> Result<(), CheckpointError> {
    let mut files = Files::new(directory)?;
    let file = files.path(format::FLAT);
    // Folding is the check: it is the reader's own.
    let layers = fold(&file, tensors)?;
    files.stage(format::TORCH, |file, out| {
        torch::write(out, &state_dicts(tensors)).map_err(|error| CheckpointError::io(file, error))
    })?;
    files.stage(format::FLAT, |file, out| {
        safetensors::write(file, entries(file, tensors, DType::F32)?, out)
    })?;
    files.stage_bytes(format::FOLDED, &folded(&layers)?)?;
    files.finish()
}

/// The bytes of `router_folded.safetensors`: `layer_{i}_{alpha,beta}.weight` (m) and `.bias` (1), f32.
///
/// # Errors
/// [`CheckpointError::Tensor`] for a number that is not finite; loaded ones are.
pub(in crate::checkpoint) fn folded(layers: &[RouterLayer]) -> Result<Vec<u8>, CheckpointError> {
    let mut named = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        for (word, gate) in [("alpha", &layer.safety), ("beta", &layer.helpfulness)] {
            let name = format!("layer_{index}_{word}");
            let bias = std::slice::from_ref(&gate.bias);
            named.push((
                format!("{name}.weight"),
                [gate.weight.len()],
                gate.weight.as_slice(),
            ));
            named.push((format!("{name}.bias"), [1], bias));
        }
    }
    let entries = named.iter().map(|(name, shape, values)| Entry {
        name,
        shape,
        numbers: Numbers::F32(values),
    });
    let mut bytes = Vec::new();
    safetensors::write(format::FOLDED.as_ref(), entries.collect(), &mut bytes)?;
    Ok(bytes)
}

/// Folds the tensors as loading them would.
fn fold(file: &Path, tensors: &[NamedTensor]) -> Result<Vec<RouterLayer>, CheckpointError> {
    let mut host = BTreeMap::new();
    for (name, shape, values) in tensors {
        check_len(file, name, shape, values)?;
        let bytes = owned(safetensors::le_bytes(values));
        // Of this length, as was just checked.
        let Some(tensor) = HostTensor::new(shape.clone(), DType::F32, bytes) else {
            continue;
        };
        if host.insert(name.clone(), tensor).is_some() {
            let reason = "expected once, found twice";
            return Err(CheckpointError::tensor(file, name, reason));
        }
    }
    let first = "layer_0_alpha.linear_0.weight";
    let m = host.get(first).and_then(|tensor| tensor.shape().last());
    let m = m.copied().unwrap_or(0);
    let layers = host
        .keys()
        .filter(|name| name.ends_with("_alpha.linear_0.weight"))
        .count();
    let tensors = TensorFile::from_tensors(file, host);
    format::folded(tensors, layers.max(1), m)
}

/// By gate, in the order in which gates and their tensors come.
fn state_dicts(tensors: &[NamedTensor]) -> Vec<(String, Vec<torch::State<'_>>)> {
    let mut dicts: Vec<(String, Vec<torch::State<'_>>)> = Vec::new();
    for (name, shape, values) in tensors {
        let (gate, key) = name.split_once('.').unwrap_or((name, ""));
        let state = (key, shape.as_slice(), values.as_slice());
        match dicts.iter_mut().find(|(known, _)| known == gate) {
            Some((_, states)) => states.push(state),
            None => dicts.push((gate.to_owned(), vec![state])),
        }
    }
    dicts
}
