//! AdamW (Loshchilov, Hutter 2019) with decoupled weight decay, in torch's order of operations, and the clipping of gradients.

use super::objective::Parameter;

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
    pub fn update(
        &mut self,
        values: &mut [Vec<f32>],
        gradients: &[Vec<f32>],
        parameters: &[Parameter],
        step: usize,
        rate: Rate,
        options: &AdamWOptions,
    ) {
        let (beta1, beta2) = options.betas;
        let power = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let step_size = rate.learning_rate / (1.0 - beta1.powi(power));
        let root = (1.0 - beta2.powi(power)).sqrt();
        let tensors = values.iter_mut().zip(gradients).zip(parameters);
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for (((values, gradients), parameter), (means, squares)) in tensors.zip(moments) {
            let decay = if parameter.decay {
                options.weight_decay
            } else {
                0.0
            };
            let keep = (1.0 - rate.learning_rate * decay) as f32;
            let numbers = values.iter_mut().zip(gradients);
            for ((value, gradient), (mean, square)) in numbers.zip(means.iter_mut().zip(squares)) {
                let gradient = gradient * rate.clip as f32;
                *mean += (gradient - *mean) * (1.0 - beta1) as f32;
                *square = *square * beta2 as f32 + gradient * gradient * (1.0 - beta2) as f32;
                let scale = square.sqrt() / root as f32 + options.epsilon as f32;
                *value = *value * keep - step_size as f32 * *mean / scale;
            }
        }
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

/// Euclidean norm over all gradients; NaN or infinite where one of them is.
pub fn norm(gradients: &[Vec<f32>]) -> f64 {
    let squares = gradients
        .iter()
        .map(|tensor| tensor.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>());
    squares.sum::<f64>().sqrt()
}

/// What brings a norm down to `limit`, as torch's `clip_grad_norm_` does; 1 where it is below, or where there is no limit.
pub fn clip_factor(norm: f64, limit: Option<f64>) -> f64 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
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
        let mut moments = Moments::new(&parameters);
        let mut values = vec![vec![1.0, -2.0]];
        let rate = Rate {
            learning_rate: 0.1,
            clip: 1.0,
        };
        for (step, gradient) in [[0.5, -1.0], [0.25, 3.0]].into_iter().enumerate() {
            let gradients = vec![gradient.to_vec()];
            moments.update(&mut values, &gradients, &parameters, step, rate, &options);
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
            let mut moments = Moments::new(&parameters);
            moments.update(&mut values, &gradients, &parameters, 0, rate, &options);
            assert_eq!(values[0], [want, want]);
        }
    }

    #[test]
    fn clipping_brings_the_norm_to_its_limit_and_leaves_smaller_ones() {
        let gradients = vec![vec![3.0], vec![4.0]];
        assert_eq!(norm(&gradients), 5.0);
        assert!((clip_factor(5.0, Some(1.0)) * 5.0 - 1.0).abs() < 1e-6);
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_factor(5.0, None), 1.0);
        assert!(norm(&[vec![f32::NAN]]).is_nan());
    }
}
