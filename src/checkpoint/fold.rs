//! Folding the router: three linear maps without anything between them are one (MIDPO.md 1, "The router folds").

use super::tensor_file::FileTensor;
use super::{CheckpointError, FoldedGate};

/// One gate as it was trained. The shapes chain; k0 is 512 and k1 is m in the authors' models.
pub(crate) struct GateLayers {
    /// (k0, m).
    pub(crate) w0: FileTensor,
    /// (k0).
    pub(crate) b0: FileTensor,
    /// (k1, k0).
    pub(crate) w1: FileTensor,
    /// (k1).
    pub(crate) b1: FileTensor,
    /// (1, k1).
    pub(crate) w2: FileTensor,
    /// (1).
    pub(crate) b2: FileTensor,
}

/// Folds a gate: `a = w2 W1 W0` (m) and `a0 = w2 (W1 b0 + b1) + b2`, in f64, kept in f32.
///
/// # Errors
/// [`CheckpointError::Tensor`] when a folded number is beyond f32.
pub(crate) fn fold_gate(layers: &GateLayers) -> Result<FoldedGate, CheckpointError> {
    // f64, though f32 errs by 2e-6 only: it runs once a load, and parity tests then need no slack for it.
    let w2 = layers.w2.tensor.to_f32();
    let row = times(
        &w2.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
        &layers.w1,
    );
    let weight = times(&row, &layers.w0);
    let bias = dot(&row, &layers.b0.tensor.to_f32())
        + dot(
            &w2.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
            &layers.b1.tensor.to_f32(),
        )
        + layers
            .b2
            .tensor
            .to_f32()
            .iter()
            .map(|x| f64::from(*x))
            .sum::<f64>();
    let gate = FoldedGate {
        weight: weight.into_iter().map(|x| x as f32).collect(),
        bias: bias as f32,
    };
    if gate.weight.iter().all(|x| x.is_finite()) && gate.bias.is_finite() {
        Ok(gate)
    } else {
        let (file, name) = (&layers.w0.file, &layers.w0.name);
        let reason = "expected a gate that folds into numbers of f32, found one beyond";
        Err(CheckpointError::tensor(file, name, reason))
    }
}

/// `row` (k) times `matrix` (k, n): (n).
fn times(row: &[f64], matrix: &FileTensor) -> Vec<f64> {
    let columns = matrix.tensor.shape().last().copied().unwrap_or(0);
    let mut product = vec![0.0; columns];
    let values = matrix.tensor.to_f32();
    for (factor, values) in row.iter().zip(values.chunks_exact(columns.max(1))) {
        for (sum, value) in product.iter_mut().zip(values) {
            *sum += factor * f64::from(*value);
        }
    }
    product
}

fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}
