//! Summaries of samples: quantiles of many, minimum, median and maximum of a few repeats.

use std::fmt;

use serde::Serialize;

/// Quantiles of a sample, in the sample's unit. All 0 where the sample is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// Values in the sample.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90 in 100 are at or below.
    pub p90: f64,
    /// 99 in 100 are at or below.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Quantiles {
    /// Of `sample`, in any order; values that are not finite are left out.
    pub fn of(sample: impl IntoIterator<Item = f64>) -> Self {
        let sorted = ascending(sample);
        let Some(max) = sorted.last().copied() else {
            return Self::default();
        };
        Self {
            count: sorted.len(),
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            p50: quantile(&sorted, 0.50),
            p90: quantile(&sorted, 0.90),
            p99: quantile(&sorted, 0.99),
            max,
        }
    }
}

/// Minimum, median and maximum of the repeats of one measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Repeats.
    pub repeats: usize,
    /// Smallest.
    pub min: f64,
    /// Median.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of `repeats`, in any order; all 0 where there are none.
    pub fn of(repeats: impl IntoIterator<Item = f64>) -> Self {
        let sorted = ascending(repeats);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else {
            return Self::default();
        };
        Self {
            repeats: sorted.len(),
            min: *min,
            median: quantile(&sorted, 0.5),
            max: *max,
        }
    }

    /// `numerator / value` of each: tokens of a step and its seconds to tokens a second. Least and greatest change places.
    pub fn inverse(self, numerator: f64) -> Self {
        let divide = |value: f64| if value > 0.0 { numerator / value } else { 0.0 };
        Self {
            repeats: self.repeats,
            min: divide(self.max),
            median: divide(self.median),
            max: divide(self.min),
        }
    }
}

impl fmt::Display for Spread {
    /// `median (min to max)`, with three significant digits or none after the point from 100 on.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (median, min, max) = (digits(self.median), digits(self.min), digits(self.max));
        write!(f, "{median} ({min} to {max})")
    }
}

/// `a / b` of each pair of runs made next to each other, so that what disturbs a machine for a while disturbs both.
pub fn ratios(pairs: &[(f64, f64)]) -> Spread {
    let legal = pairs.iter().filter(|(_, below)| *below > 0.0);
    Spread::of(legal.map(|(above, below)| above / below))
}

/// Three significant digits, at most three after the point, none from 100 on: what a table needs.
pub(super) fn digits(value: f64) -> String {
    let places = match value.abs() {
        magnitude if magnitude >= 99.95 => 0,
        magnitude if magnitude >= 9.995 => 1,
        magnitude if magnitude >= 0.9995 => 2,
        _ => 3,
    };
    format!("{value:.places$}")
}

fn ascending(sample: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = sample.into_iter().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Linear between the closest ranks, as numpy's default and the field's load testers do. `sorted` ascending; 0 where empty.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = q.clamp(0.0, 1.0) * sorted.len().saturating_sub(1) as f64;
    let (low, part) = (rank.floor() as usize, rank.fract());
    match (sorted.get(low), sorted.get(low + 1)) {
        (Some(below), Some(above)) => below + part * (above - below),
        (Some(last), None) => *last,
        (None, _) => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantile_is_linear_between_the_closest_ranks() {
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        for (sorted, q, want) in [
            (hundred.as_slice(), 0.5, 50.0),
            (&hundred, 0.99, 99.0),
            (&[1.0, 2.0], 0.5, 1.5),
            (&[1.0, 2.0, 4.0, 8.0], 0.9, 6.8),
            (&[3.0], 0.99, 3.0),
            (&[], 0.5, 0.0),
        ] {
            let found = quantile(sorted, q);
            assert!((found - want).abs() < 1e-9, "{q} of {sorted:?}: {found}");
        }
    }

    #[test]
    fn quantiles_of_any_order_are_those_of_the_sorted_sample() {
        let found = Quantiles::of([4.0, 1.0, f64::NAN, 3.0, 2.0, f64::INFINITY]);
        assert_eq!((found.count, found.p50, found.max), (4, 2.5, 4.0));
        assert_eq!(found.mean, 2.5);
        assert_eq!(Quantiles::of([]), Quantiles::default());
    }

    #[test]
    fn spread_inverse_turns_seconds_into_rates() {
        let rate = Spread::of([0.5, 0.25, 1.0]).inverse(8.0);
        assert_eq!((rate.min, rate.median, rate.max), (8.0, 16.0, 32.0));
        assert_eq!(Spread::of([]).inverse(8.0).median, 0.0);
    }

    #[test]
    fn ratios_pair_runs_made_side_by_side() {
        let found = ratios(&[(2.0, 1.0), (30.0, 10.0), (4.0, 1.0), (1.0, 0.0)]);
        assert_eq!((found.repeats, found.median, found.max), (3, 3.0, 4.0));
    }

    #[test]
    fn digits_are_three_and_no_more() {
        for (value, want) in [
            (0.0, "0.000"),
            (0.01234, "0.012"),
            (1.0, "1.00"),
            (9.996, "10.0"),
            (99.96, "100"),
            (1234.5, "1234"),
        ] {
            assert_eq!(digits(value), want);
        }
    }
}
