//! When the requests of an open loop are due.

use std::time::Duration;

use crate::random::SplitMix64;

/// Longest wait that a schedule holds: keeps every sum representable, whatever rate is asked for.
const GAP_SECONDS_MAX: f64 = 86_400.0;

/// `count` arrival times of a Poisson process of `rate` a second, ascending, the first after one gap. A function of its arguments.
pub fn poisson(rate: f64, count: usize, seed: u64) -> Vec<Duration> {
    let mut random = SplitMix64::new(seed, 0x00A1);
    let mut due = 0.0f64;
    let next = |_| {
        // ln(1 - u), never ln(0): u is below 1.
        let gap = -(1.0 - random.unit()).ln() / rate;
        due += gap.clamp(0.0, GAP_SECONDS_MAX);
        Duration::from_secs_f64(due)
    };
    (0..count).map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poisson_of_equal_seeds_is_equal_and_of_other_seeds_is_not() {
        assert_eq!(poisson(5.0, 50, 1), poisson(5.0, 50, 1));
        assert_ne!(poisson(5.0, 50, 1), poisson(5.0, 50, 2));
    }

    #[test]
    fn poisson_gaps_have_the_mean_and_spread_of_an_exponential() {
        for rate in [0.5, 4.0, 200.0] {
            let (count, times) = (20_000, poisson(rate, 20_000, 9));
            let gaps: Vec<f64> = std::iter::once(Duration::ZERO)
                .chain(times.iter().copied())
                .zip(&times)
                .map(|(before, after)| after.abs_diff(before).as_secs_f64())
                .collect();
            assert!(times.is_sorted());
            let mean = gaps.iter().sum::<f64>() / count as f64;
            let var = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count as f64;
            // Exponential: mean = standard deviation = 1 / rate; 20,000 draws err by about 1 %.
            assert!((mean * rate - 1.0).abs() < 0.04, "mean {mean} at {rate}");
            assert!((var.sqrt() * rate - 1.0).abs() < 0.06, "at {rate}");
        }
    }

    #[test]
    fn poisson_of_an_absurd_rate_still_ends() {
        assert_eq!(poisson(1e-300, 3, 0).len(), 3);
        assert!(poisson(1.0, 0, 0).is_empty());
    }
}
