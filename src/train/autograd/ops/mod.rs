//! The operations of a Llama as nodes of candle's graph, forward and backward written by hand. candle's own would make ten passes
//! and as many buffers where one does, and its matmul computes the gradient of frozen weights too.

mod attention;
mod linear;
mod math;
mod mix;
mod norm;
mod rows;
mod silu_mul;
mod token_log_probs;

pub(super) use attention::{Heads, attention};
pub(super) use linear::linear;
pub(super) use mix::{gates, mix};
pub(super) use norm::rms_norm;
pub(super) use rows::select_rows;
pub(super) use silu_mul::silu_mul;
pub(super) use token_log_probs::{Hits, token_log_probs};

use candle_core::{CpuStorage, Error, Layout, Result, Shape, Storage, Tensor};

/// The numbers of a contiguous f32 tensor, as an op's forward pass is given it.
fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| Error::Msg("expected a contiguous tensor".to_owned()))?;
    values
        .get(start..end)
        .ok_or_else(|| Error::Msg("expected a tensor within its storage".to_owned()))
}

/// The numbers of a contiguous f32 tensor on the CPU.
pub(super) fn read<R>(tensor: &Tensor, take: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(take(numbers(storage, layout)?)),
        _ => Err(Error::Msg("expected a tensor on the CPU".to_owned())),
    }
}

/// As [`read`], of two.
fn read2<R>(a: &Tensor, b: &Tensor, take: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R> {
    read(a, |a| read(b, |b| take(a, b)))?
}

/// As [`read`], of three.
fn read3<R>(
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
    take: impl FnOnce(&[f32], &[f32], &[f32]) -> R,
) -> Result<R> {
    read2(a, b, |a, b| read(c, |c| take(a, b, c)))?
}

/// What an op's forward pass returns.
fn output(values: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(values), shape.into()))
}

#[cfg(test)]
mod check {
    //! Analytic gradients against central differences.
    #![allow(clippy::unwrap_used)]

    use candle_core::{Device, Tensor, Var};

    use crate::random::SplitMix64;

    /// A variable of standard normal numbers.
    pub(super) fn normal(seed: u64, shape: &[usize]) -> Var {
        let mut random = SplitMix64::new(seed, 0);
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| random.normal() as f32).collect();
        Var::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Largest absolute difference.
    pub(super) fn distance(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let differences = values(a)
            .into_iter()
            .zip(values(b))
            .map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f32::max)
    }

    /// Gradients of `sum(weights * f(inputs))` for fixed normal weights, by autograd.
    pub(super) fn gradients(f: impl Fn(&[Tensor]) -> Tensor, inputs: &[Var]) -> Vec<Tensor> {
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tensors);
        let weights = normal(99, y.dims());
        let store = (y * weights.as_detached_tensor())
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        tensors
            .iter()
            .map(|t| store.get(t).unwrap().clone())
            .collect()
    }

    /// Compares an op with a composition of candle's own ops: values and all gradients.
    pub(super) fn same_as(
        op: impl Fn(&[Tensor]) -> Tensor,
        composed: impl Fn(&[Tensor]) -> Tensor,
        inputs: &[Var],
        tolerance: f32,
    ) {
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let difference = distance(&op(&tensors), &composed(&tensors));
        assert!(difference <= tolerance, "values differ by {difference}");
        let (got, want) = (gradients(op, inputs), gradients(composed, inputs));
        for (index, (got, want)) in got.iter().zip(&want).enumerate() {
            let difference = distance(got, want);
            assert!(
                difference <= tolerance,
                "gradient {index} differs by {difference}"
            );
        }
    }

    /// Compares the gradients of an op with central differences along each axis of its inputs.
    pub(super) fn finite_differences(
        f: impl Fn(&[Tensor]) -> Tensor,
        inputs: &[Var],
        tolerance: f32,
    ) {
        const STEP: f32 = 1e-2;
        let analytic = gradients(&f, inputs);
        let total = |tensors: &[Tensor]| -> f64 {
            let y = f(tensors);
            let weights = normal(99, y.dims())
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            y.iter()
                .zip(&weights)
                .map(|(y, w)| f64::from(*y) * f64::from(*w))
                .sum()
        };
        for (which, input) in inputs.iter().enumerate() {
            let values = input.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let gradient = analytic[which]
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            for axis in 0..values.len() {
                let moved = |by: f32| {
                    let mut values = values.clone();
                    values[axis] += by;
                    let moved = Tensor::from_vec(values, input.dims(), &Device::Cpu).unwrap();
                    let mut tensors: Vec<Tensor> =
                        inputs.iter().map(|v| v.as_detached_tensor()).collect();
                    tensors[which] = moved;
                    total(&tensors)
                };
                let slope = ((moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP)) as f32;
                let error = (slope - gradient[axis]).abs() / slope.abs().max(1.0);
                assert!(
                    error <= tolerance,
                    "input {which}, axis {axis}: {slope} and {}",
                    gradient[axis]
                );
            }
        }
    }
}
