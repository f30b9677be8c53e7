//! The operations of a Llama, forward and backward, as loops over rows and as matrix products. Matrices are row-major slices; an op
//! that is given slices of other lengths than its documentation says is our mistake, and panics.

mod attention;
mod math;
mod matrix;
mod mix;
mod norm;
mod silu_mul;
mod token_log_probs;

pub(super) use attention::{Attention, Heads};
pub(super) use math::add_scaled;
pub(super) use matrix::{add_linear, add_product, add_weight_gradient, linear};
pub(super) use mix::{gates, gates_backward, mix, mix_backward};
pub(super) use norm::RmsNorm;
pub(super) use silu_mul::{silu_mul, silu_mul_backward};
pub(super) use token_log_probs::{TokenLogProbs, token_log_probs};

#[cfg(test)]
mod check {
    //! Values and gradients against compositions of candle's ops and its autograd, and against central differences.
    #![allow(clippy::unwrap_used)]

    use candle_core::{Device, Tensor, Var};

    use crate::random::SplitMix64;

    /// Standard normal numbers.
    pub(super) fn normal(seed: u64, count: usize) -> Vec<f32> {
        let mut random = SplitMix64::new(seed, 0);
        (0..count).map(|_| random.normal() as f32).collect()
    }

    pub(super) fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
        assert_eq!(got.len(), want.len(), "{what}: length");
        let differences = got.iter().zip(want).map(|(a, b)| (a - b).abs());
        let worst = differences.fold(0f32, f32::max);
        assert!(worst <= tolerance, "{what}: differs by {worst}");
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Compares `forward` and `backward` (inputs and dy to the gradients of all inputs) with a composition of candle's ops.
    pub(super) fn same_as(
        shapes: &[&[usize]],
        forward: impl Fn(&[Vec<f32>]) -> Vec<f32>,
        backward: impl Fn(&[Vec<f32>], &[f32]) -> Vec<Vec<f32>>,
        composed: impl Fn(&[Tensor]) -> Tensor,
        tolerance: f32,
    ) {
        let variables: Vec<Var> = (1..)
            .zip(shapes)
            .map(|(seed, shape)| {
                let values = normal(seed, shape.iter().product());
                Var::from_vec(values, *shape, &Device::Cpu).unwrap()
            })
            .collect();
        let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        let inputs: Vec<Vec<f32>> = tensors.iter().map(numbers).collect();
        let y = composed(&tensors);
        close("values", &forward(&inputs), &numbers(&y), tolerance);
        let dy = normal(99, y.elem_count());
        let weights = Tensor::from_slice(&dy, y.shape(), &Device::Cpu).unwrap();
        let store = (y * weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        for (index, (got, tensor)) in backward(&inputs, &dy).iter().zip(&tensors).enumerate() {
            let want = numbers(store.get(tensor).unwrap());
            close(&format!("gradient {index}"), got, &want, tolerance);
            let slopes = slopes(&inputs, index, &dy, &forward);
            let scale = slopes.iter().fold(1f32, |scale, x| scale.max(x.abs()));
            close(&format!("slope {index}"), got, &slopes, 5e-3 * scale);
        }
    }

    /// Central differences of <dy, forward(inputs)> along one input.
    fn slopes(
        inputs: &[Vec<f32>],
        which: usize,
        dy: &[f32],
        forward: impl Fn(&[Vec<f32>]) -> Vec<f32>,
    ) -> Vec<f32> {
        const STEP: f32 = 1e-2;
        let total = |axis: usize, by: f32| -> f64 {
            let mut inputs = inputs.to_vec();
            inputs[which][axis] += by;
            let y = forward(&inputs);
            y.iter()
                .zip(dy)
                .map(|(y, d)| f64::from(*y) * f64::from(*d))
                .sum()
        };
        let slope = |axis| (total(axis, STEP) - total(axis, -STEP)) / f64::from(2.0 * STEP);
        (0..inputs[which].len())
            .map(|axis| slope(axis) as f32)
            .collect()
    }
}
