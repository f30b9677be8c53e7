//! Training the router at folded cost (DEMO.md 3): a gate's three linear maps are one affine map of h, so a step folds them, runs
//! with the folded map, and takes the folded map's gradient back through the chain rule.

use super::weights::{matrix, name_hash, vector};
use crate::random::SplitMix64;
use crate::train::Parameter;

/// Tensors of a gate.
pub(super) const GATE_TENSORS: usize = 6;

/// A gate's tensors: W0 (k, m), b0 (k), W1 (m, k), b1 (m), w2 (1, m), b2 (1).
pub(super) struct Gate<'a> {
    w0: &'a [f32],
    b0: &'a [f32],
    w1: &'a [f32],
    b1: &'a [f32],
    w2: &'a [f32],
    b2: &'a [f32],
}

/// Names and shapes of one gate's tensors, `word` being alpha or beta; torch decays biases too, the authors decay nothing.
pub(super) fn parameters(layer: usize, word: &str, hidden: usize, m: usize) -> Vec<Parameter> {
    let name = |linear: usize, part: &str| format!("layer_{layer}_{word}.linear_{linear}.{part}");
    vec![
        matrix(&name(0, "weight"), hidden, m),
        vector(&name(0, "bias"), hidden),
        matrix(&name(1, "weight"), m, hidden),
        vector(&name(1, "bias"), m),
        matrix(&name(2, "weight"), 1, m),
        vector(&name(2, "bias"), 1),
    ]
}

/// torch's `Linear` start: uniform in ±1 / sqrt(inputs), weights and bias alike.
pub(super) fn start(parameters: &[Parameter], seed: u64) -> Vec<Vec<f32>> {
    let mut inputs = 1;
    let mut values = Vec::with_capacity(parameters.len());
    for parameter in parameters {
        // A bias follows its weight.
        inputs = parameter.shape.get(1).copied().unwrap_or(inputs);
        let bound = 1.0 / (inputs.max(1) as f64).sqrt();
        let mut stream = SplitMix64::new(seed, name_hash(&parameter.name));
        let size: usize = parameter.shape.iter().product();
        let uniform = (0..size).map(|_| ((2.0 * stream.unit() - 1.0) * bound) as f32);
        values.push(uniform.collect());
    }
    values
}

impl<'a> Gate<'a> {
    /// Of [`GATE_TENSORS`] tensors in order.
    pub(super) fn new(tensors: &'a [Vec<f32>]) -> Option<Self> {
        let [w0, b0, w1, b1, w2, b2] = tensors else {
            return None;
        };
        Some(Self {
            w0,
            b0,
            w1,
            b1,
            w2,
            b2,
        })
    }

    /// w2 W1, (k).
    fn row(&self) -> Vec<f64> {
        times(&widened(self.w2), self.w1, self.b0.len())
    }

    /// a (m) and a0, folded in f64.
    pub(super) fn fold(&self) -> (Vec<f32>, f32) {
        let row = self.row();
        let a = times(&row, self.w0, self.b1.len());
        let bias = self.b2.first().copied().unwrap_or(0.0);
        let a0 = dot(&row, self.b0) + dot(&widened(self.w2), self.b1) + f64::from(bias);
        (a.into_iter().map(|x| x as f32).collect(), a0 as f32)
    }

    /// Gradients of the six tensors from da (m) and da0.
    pub(super) fn unfold(&self, da: &[f32], da0: f32) -> Vec<Vec<f32>> {
        let row: Vec<f32> = self.row().into_iter().map(|x| x as f32).collect();
        let m = self.b1.len();
        // d(w2 W1) = W0 da + b0 da0.
        let drow: Vec<f32> = rows(self.w0, m)
            .zip(self.b0)
            .map(|(w0, b0)| (dot_f32(w0, da) + f64::from(b0 * da0)) as f32)
            .collect();
        let dw2 = rows(self.w1, self.b0.len())
            .zip(self.b1)
            .map(|(w1, b1)| (dot_f32(w1, &drow) + f64::from(b1 * da0)) as f32)
            .collect();
        vec![
            outer(&row, da),
            row.iter().map(|x| x * da0).collect(),
            outer(self.w2, &drow),
            self.w2.iter().map(|x| x * da0).collect(),
            dw2,
            vec![da0],
        ]
    }
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

fn rows(matrix: &[f32], columns: usize) -> std::slice::ChunksExact<'_, f32> {
    matrix.chunks_exact(columns.max(1))
}

/// `row` (k) times `matrix` (k, columns).
fn times(row: &[f64], matrix: &[f32], columns: usize) -> Vec<f64> {
    let mut product = vec![0.0; columns];
    for (factor, values) in row.iter().zip(rows(matrix, columns)) {
        for (sum, value) in product.iter_mut().zip(values) {
            *sum += factor * f64::from(*value);
        }
    }
    product
}

fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

/// In four lanes: these are the largest matrices of the router.
fn dot_f32(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0f64; 4];
    let (a, b) = (a.chunks(4), b.chunks(4));
    for (a, b) in a.zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f64::from(*a) * f64::from(*b);
        }
    }
    lanes.into_iter().sum()
}

/// (rows, columns) of products.
fn outer(rows: &[f32], columns: &[f32]) -> Vec<f32> {
    let mut product = Vec::with_capacity(rows.len() * columns.len());
    for row in rows {
        product.extend(columns.iter().map(|column| row * column));
    }
    product
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn unfold_is_the_slope_of_fold() {
        let (hidden, m) = (3, 4);
        let parameters = parameters(0, "alpha", hidden, m);
        let values = start(&parameters, 5);
        let (da, da0) = ([0.3f32, -0.7, 1.1, 0.2], -0.4f32);
        let value = |values: &[Vec<f32>]| {
            let (a, a0) = Gate::new(values).unwrap().fold();
            a.iter()
                .zip(&da)
                .map(|(a, d)| f64::from(a * d))
                .sum::<f64>()
                + f64::from(a0 * da0)
        };
        let gradients = Gate::new(&values).unwrap().unfold(&da, da0);
        for (tensor, gradient) in gradients.iter().enumerate() {
            assert_eq!(gradient.len(), values[tensor].len());
            for (index, gradient) in gradient.iter().enumerate() {
                let moved = |by: f32| {
                    let mut values = values.clone();
                    values[tensor][index] += by;
                    value(&values)
                };
                let slope = (moved(0.5) - moved(-0.5)) as f32;
                assert!(
                    (slope - gradient).abs() < 1e-5,
                    "{tensor} {index}: {slope} {gradient}"
                );
            }
        }
    }
}
