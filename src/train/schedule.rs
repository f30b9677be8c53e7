//! How large a step is, by its number: linear warm-up, then a cosine (transformers' `get_cosine_schedule_with_warmup`).

/// A schedule over a known number of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cosine {
    /// All steps, warm-up included.
    pub steps: usize,
    /// Steps of the warm-up. The first step's factor is then 0, as it is in the authors' runs.
    pub warmup_steps: usize,
    /// What the cosine falls to, 0 to 1.
    pub final_factor: f64,
}

impl Cosine {
    /// What the learning rate is multiplied by at `step`, counted from 0.
    pub fn factor(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let falling = self.steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / falling as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.final_factor + (1.0 - self.final_factor) * cosine
    }
}

/// How long the warm-up is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// A share of all steps, rounded up as transformers does.
    Share(f64),
    /// So many steps.
    Steps(usize),
}

impl Warmup {
    /// In steps, of `steps` in all.
    pub fn steps(self, steps: usize) -> usize {
        match self {
            Self::Share(share) => (share * steps as f64).ceil() as usize,
            Self::Steps(warmup) => warmup,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factor_warms_up_falls_to_the_final_factor_and_stays_there() {
        let cosine = Cosine {
            steps: 100,
            warmup_steps: Warmup::Share(0.03).steps(100),
            final_factor: 0.1,
        };
        assert_eq!(cosine.warmup_steps, 3);
        assert_eq!(cosine.factor(0), 0.0);
        assert_eq!(cosine.factor(3), 1.0);
        let falls = (4..100).all(|step| cosine.factor(step) < cosine.factor(step - 1));
        assert!(falls && cosine.factor(99) > 0.1);
        assert!((cosine.factor(100) - 0.1).abs() < 1e-12);
        assert!((cosine.factor(1000) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn factor_without_warm_up_starts_at_one() {
        let cosine = Cosine {
            steps: 1,
            warmup_steps: Warmup::Steps(0).steps(1),
            final_factor: 0.0,
        };
        assert_eq!(cosine.factor(0), 1.0);
    }
}
