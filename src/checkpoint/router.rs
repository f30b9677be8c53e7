//! The router: `router.pth`, its tensors in `router.safetensors`, or already folded in `router_folded.safetensors`. Whatever it
//! comes in, it leaves folded.

use super::fold::{GateLayers, fold_gate};
use super::pth;
use super::source::Source;
use super::tensor_file::{FileTensor, TensorFile, check_finite};
use super::{CheckpointError, FoldedGate, LlamaConfig, RouterLayer, parallel};

/// What `midpo convert` writes: `layer_{i}_{alpha,beta}.weight` (m) and `.bias` (1), f32.
pub(crate) const FOLDED: &str = "router_folded.safetensors";
/// The authors' tensors, keys joined with a dot.
pub(crate) const FLAT: &str = "router.safetensors";
/// What the authors' trainer saves.
pub(crate) const TORCH: &str = "router.pth";

/// What a router may come in, the least to read first.
pub(crate) const NAMES: [&str; 3] = [FOLDED, FLAT, TORCH];

/// Which of a directory's files is the router: the first of [`NAMES`].
pub(crate) fn find(source: &Source) -> Result<&'static str, CheckpointError> {
    NAMES
        .into_iter()
        .find(|name| source.exists(name))
        .ok_or_else(|| {
            let reason = format!("expected {FOLDED}, {FLAT} or {TORCH}, found none of them");
            CheckpointError::malformed(&source.path(""), reason)
        })
}

/// Loads the router for a base of this configuration from the file `name`.
///
/// # Errors
/// [`CheckpointError`] names the file, and the tensor where there is one.
pub(crate) fn load(
    source: &Source,
    name: &str,
    base: &LlamaConfig,
) -> Result<Vec<RouterLayer>, CheckpointError> {
    let (file, bytes) = (source.path(name), source.open(name)?);
    let tensors = if pth::is_torch(name, bytes.as_slice()) {
        pth::read(&file, &bytes)?
    } else {
        TensorFile::safetensors(&file, &bytes)?
    };
    folded(tensors, base.num_layers, base.intermediate_size)
}

/// The folded gates of a router of `layers` layers on an MLP of width `m`.
///
/// # Errors
/// [`CheckpointError`] names the tensor.
pub(crate) fn folded(
    mut tensors: TensorFile,
    layers: usize,
    m: usize,
) -> Result<Vec<RouterLayer>, CheckpointError> {
    let gates: Vec<String> = (0..layers)
        .flat_map(|layer| {
            [
                format!("layer_{layer}_alpha"),
                format!("layer_{layer}_beta"),
            ]
        })
        .collect();
    let folded = if tensors.contains("layer_0_alpha.weight") {
        read_folded(&mut tensors, &gates, m)?
    } else {
        fold_all(&mut tensors, &gates, m)?
    };
    tensors.finish("the router of this base", |_| false)?;
    let mut folded = folded.into_iter();
    let mut layers = Vec::new();
    while let (Some(safety), Some(helpfulness)) = (folded.next(), folded.next()) {
        layers.push(RouterLayer {
            safety,
            helpfulness,
        });
    }
    Ok(layers)
}

fn read_folded(
    tensors: &mut TensorFile,
    gates: &[String],
    m: usize,
) -> Result<Vec<FoldedGate>, CheckpointError> {
    let mut taken = Vec::new();
    for gate in gates {
        taken.push((
            tensors.take(&format!("{gate}.weight"), &[m], "")?,
            tensors.take(&format!("{gate}.bias"), &[1], "")?,
        ));
    }
    check_finite(taken.iter().flat_map(|(weight, bias)| [weight, bias]))?;
    Ok(taken
        .into_iter()
        .map(|(weight, bias)| FoldedGate {
            weight: weight.tensor.to_f32(),
            bias: bias.tensor.to_f32().first().copied().unwrap_or_default(),
        })
        .collect())
}

fn fold_all(
    tensors: &mut TensorFile,
    gates: &[String],
    m: usize,
) -> Result<Vec<FoldedGate>, CheckpointError> {
    let mut taken = Vec::new();
    for gate in gates {
        taken.push(take_gate(tensors, gate, m)?);
    }
    check_finite(
        taken
            .iter()
            .flat_map(|gate| [&gate.w0, &gate.b0, &gate.w1, &gate.b1, &gate.w2, &gate.b2]),
    )?;
    parallel::map(taken.len(), |index| match taken.get(index) {
        Some(gate) => fold_gate(gate).map(Some),
        None => Ok(None),
    })
    .map(|folded| folded.into_iter().flatten().collect())
}

/// The six tensors of a gate. Its inner widths are its own: the fold is exact for any that chain.
fn take_gate(
    tensors: &mut TensorFile,
    gate: &str,
    m: usize,
) -> Result<GateLayers, CheckpointError> {
    let (w0, k0) = take_matrix(tensors, &format!("{gate}.linear_0.weight"), m)?;
    let b0 = tensors.take(&format!("{gate}.linear_0.bias"), &[k0], "")?;
    let (w1, k1) = take_matrix(tensors, &format!("{gate}.linear_1.weight"), k0)?;
    let b1 = tensors.take(&format!("{gate}.linear_1.bias"), &[k1], "")?;
    Ok(GateLayers {
        w0,
        b0,
        w1,
        b1,
        w2: tensors.take(&format!("{gate}.linear_2.weight"), &[1, k1], "")?,
        b2: tensors.take(&format!("{gate}.linear_2.bias"), &[1], "")?,
    })
}

/// A matrix of `columns`, and its rows.
fn take_matrix(
    tensors: &mut TensorFile,
    name: &str,
    columns: usize,
) -> Result<(FileTensor, usize), CheckpointError> {
    let found = tensors.take_any(name, &format!("shape [any, {columns}]"))?;
    let rows = found.tensor.shape().first().copied().unwrap_or(0).max(1);
    if found.tensor.shape() != [rows, columns] {
        return Err(CheckpointError::Shape {
            file: found.file,
            name: found.name,
            expected: vec![rows, columns],
            found: found.tensor.shape().to_vec(),
        });
    }
    Ok((found, rows))
}
