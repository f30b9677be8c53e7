//! AdamW (Loshchilov, Hutter 2019) with decoupled weight decay, in torch's order of operations, and the clipping of gradients.

use super::TrainError;
use super::objective::Parameter;
use super::workers::Workers;

/// Constants of the optimiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the mean and of the mean square.
    pub betas: (f64, f64),
    /// Added to the root of the mean square.
    pub epsilon: f64,
    /// Share of a weight that a step of learning rate 1 takes away, where [`Parameter::decay`] says so.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    /// The authors' betas, no decay.
    fn default() -> Self {
        Self {
            betas: (0.9, 0.95),
            epsilon: 1e-8,
            weight_decay: 0.0,
        }
    }
}

/// What the optimiser remembers: as long as the parameters, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Mean of the gradients.
    pub mean: Vec<Vec<f32>>,
    /// Mean of their squares.
    pub square: Vec<Vec<f32>>,
}

impl Moments {
    /// Zeros for `parameters`.
    pub fn new(parameters: &[Parameter]) -> Self {
        let zeros = || {
            let lengths = parameters.iter().map(|p| p.shape.iter().product());
            lengths.map(|length| vec![0.0; length]).collect()
        };
        Self {
            mean: zeros(),
            square: zeros(),
        }
    }

    /// One step: `step` is how many came before, `gradients` are multiplied by `factor` (clipping) on the way.
    /// `values`, `gradients` and `parameters` are in one order and of equal lengths.
    ///
    /// # Errors
    /// As [`Workers::map`].
    pub fn update(
        &mut self,
        values: &mut [Vec<f32>],
        gradients: &[Vec<f32>],
        parameters: &[Parameter],
        (step, rate): (usize, Rate),
        options: &AdamWOptions,
        workers: &Workers,
    ) -> Result<(), TrainError> {
        let (beta1, beta2) = options.betas;
        let power = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let step_size = (rate.learning_rate / (1.0 - beta1.powi(power))) as f32;
        let root = (1.0 - beta2.powi(power)).sqrt() as f32;
        let (clip, epsilon) = (rate.clip as f32, options.epsilon as f32);
        let tensors = values.iter_mut().zip(gradients).zip(parameters);
        let moments = self.mean.iter_mut().zip(&mut self.square);
        workers.map(tensors.zip(moments), |task| {
            let (((values, gradients), parameter), (means, squares)) = task;
            let decay = if parameter.decay {
                options.weight_decay
            } else {
                0.0
            };
            let keep = (1.0 - rate.learning_rate * decay) as f32;
            let numbers = values.iter_mut().zip(gradients);
            let moments = means.iter_mut().zip(squares);
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((value, gradient), (mean, square)) in numbers.zip(moments) {
                        let gradient = gradient * clip;
                        *mean += (gradient - *mean) * (1.0 - beta1) as f32;
                        *square =
                            *square * beta2 as f32 + gradient * gradient * (1.0 - beta2) as f32;
                        let scale = square.sqrt() / root + epsilon;
                        *value = *value * keep - step_size * *mean / scale;
                    }
                },
            );
            Ok(())
        })?;
        Ok(())
    }
}

/// What a step's gradients are scaled by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// After the schedule.
    pub learning_rate: f64,
    /// At most 1; see [`clip_factor`].
    pub clip: f64,
}

/// Sum of squares, in lanes; NaN or infinite where one of the values is. The root of all gradients' is their norm.
pub fn square_sum(values: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for chunk in chunks {
                for (lane, value) in lanes.iter_mut().zip(chunk) {
                    *lane += f64::from(*value) * f64::from(*value);
                }
            }
        },
    );
    let rest = rest.iter().map(|x| f64::from(*x).powi(2));
    lanes.into_iter().chain(rest).sum()
}

/// What brings a norm down to `limit`, as torch's `clip_grad_norm_` does; 1 where it is below, or where there is no limit.
pub fn clip_factor(norm: f64, limit: Option<f64>) -> f64 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parameters(decay: bool) -> Vec<Parameter> {
        vec![Parameter {
            name: "w".to_owned(),
            shape: vec![2],
            decay,
        }]
    }

    #[test]
    fn update_takes_the_steps_of_torch() {
        // torch.optim.AdamW([1., -2.], lr=.1, betas=(.9, .95), weight_decay=.5), gradients [.5, -1.] then [.25, 3.]: by hand.
        let options = AdamWOptions {
            weight_decay: 0.5,
            ..AdamWOptions::default()
        };
        let parameters = parameters(true);
        let (mut moments, workers) = (Moments::new(&parameters), Workers::new(2));
        let mut values = vec![vec![1.0, -2.0]];
        let rate = Rate {
            learning_rate: 0.1,
            clip: 1.0,
        };
        for (step, gradient) in [[0.5, -1.0], [0.25, 3.0]].into_iter().enumerate() {
            let gradients = vec![gradient.to_vec()];
            let at = (step, rate);
            moments
                .update(&mut values, &gradients, &parameters, at, &options, &workers)
                .unwrap();
        }
        let by_hand = |start: f64, first: f64, second: f64| {
            let after_one = start * 0.95 - 0.1 * first.signum();
            let mean = (0.1 * first * 0.9 + 0.1 * second) / (1.0 - 0.81);
            let square = (0.05 * first * first * 0.95 + 0.05 * second * second) / (1.0 - 0.9025);
            after_one * 0.95 - 0.1 * mean / square.sqrt()
        };
        for (value, want) in values[0]
            .iter()
            .zip([by_hand(1.0, 0.5, 0.25), by_hand(-2.0, -1.0, 3.0)])
        {
            assert!((f64::from(*value) - want).abs() < 1e-6, "{value} {want}");
        }
    }

    #[test]
    fn update_decays_only_what_says_so() {
        let options = AdamWOptions {
            weight_decay: 1.0,
            ..AdamWOptions::default()
        };
        let rate = Rate {
            learning_rate: 0.1,
            clip: 1.0,
        };
        for (decay, want) in [(true, 0.9), (false, 1.0)] {
            let parameters = parameters(decay);
            let mut values = vec![vec![1.0, 1.0]];
            let gradients = vec![vec![0.0, 0.0]];
            let (mut moments, workers) = (Moments::new(&parameters), Workers::new(2));
            moments
                .update(
                    &mut values,
                    &gradients,
                    &parameters,
                    (0, rate),
                    &options,
                    &workers,
                )
                .unwrap();
            assert_eq!(values[0], [want, want]);
        }
    }

    #[test]
    fn clipping_brings_the_norm_to_its_limit_and_leaves_smaller_ones() {
        assert_eq!(square_sum(&[3.0, 4.0]), 25.0);
        assert_eq!(square_sum(&[2.0; 37]), 148.0);
        assert!((clip_factor(5.0, Some(1.0)) * 5.0 - 1.0).abs() < 1e-6);
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_factor(5.0, None), 1.0);
        assert!(square_sum(&[f32::NAN]).is_nan());
    }
}
