//! Intervals from resampled prompts.
//!
//! What is drawn again are prompts, not answers: answers to one prompt, under several seeds, are alike. All numbers of a class
//! share their resamples.

use serde::Serialize;

use super::auroc::Ranking;
use crate::random::SplitMix64;

/// Ends of a 95 % interval, as shares of the sorted resamples.
const ENDS: [f64; 2] = [0.025, 0.975];

/// A number with its 95 % bootstrap interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Of what was seen.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// What the answers to one prompt add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Of their values.
    pub sum: f64,
    /// Answers that have a value.
    pub count: u32,
}

impl Cluster {
    /// Of the values of one prompt's answers.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut cluster = Self::default();
        for value in values {
            cluster.sum += value;
            cluster.count += 1;
        }
        cluster
    }

    /// `None` without a value.
    pub fn mean(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count))
    }
}

/// Prompts drawn with replacement, again and again.
#[derive(Clone, Debug)]
pub struct Resamples {
    prompts: usize,
    /// How often each prompt was drawn, resample by resample: (resamples, prompts).
    weights: Vec<u32>,
}

impl Resamples {
    /// `count` resamples of `prompts` prompts; `stream` separates those of one seed.
    pub fn new(prompts: usize, count: usize, seed: u64, stream: u64) -> Self {
        let mut random = SplitMix64::new(seed, stream);
        let mut weights = vec![0; prompts * count];
        for resample in weights.chunks_mut(prompts.max(1)) {
            for _ in 0..prompts {
                resample[random.below(prompts)] += 1;
            }
        }
        Self { prompts, weights }
    }

    /// How often each prompt was drawn, one resample after the other.
    pub fn weights(&self) -> impl Iterator<Item = &[u32]> {
        self.weights.chunks(self.prompts.max(1))
    }

    /// The mean over answers. `None` without a value.
    pub fn mean(&self, clusters: &[Cluster]) -> Option<Interval> {
        let once = vec![1; clusters.len()];
        let mean = weighted_mean(clusters, &once)?;
        let resampled = self
            .weights()
            .filter_map(|weights| weighted_mean(clusters, weights));
        Some(interval(mean, resampled.collect()))
    }

    /// The mean of values that are 0 or 1. Where all prompts agree no resample differs; the far end is then Clopper and
    /// Pearson's for so many prompts.
    pub fn share(&self, clusters: &[Cluster]) -> Option<Interval> {
        let mut share = self.mean(clusters)?;
        let prompts = clusters.iter().filter(|cluster| cluster.count > 0).count();
        let far = ENDS[0].powf(1.0 / prompts.max(1) as f64);
        if share.mean <= 0.0 {
            share.high = 1.0 - far;
        } else if share.mean >= 1.0 {
            share.low = far;
        }
        Some(share)
    }
}

/// The area under the ROC curve with its interval: positives and negatives are drawn each from their own. `None` where one of
/// the classes is empty.
pub fn area(ranking: &Ranking, positives: &Resamples, negatives: &Resamples) -> Option<Interval> {
    let once = (vec![1; positives.prompts], vec![1; negatives.prompts]);
    let seen = ranking.area((&once.0, &once.1))?;
    let pairs = positives.weights().zip(negatives.weights());
    Some(interval(
        seen,
        pairs.filter_map(|pair| ranking.area(pair)).collect(),
    ))
}

fn weighted_mean(clusters: &[Cluster], weights: &[u32]) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for (cluster, weight) in clusters.iter().zip(weights) {
        sum += cluster.sum * f64::from(*weight);
        count += f64::from(cluster.count) * f64::from(*weight);
    }
    (count > 0.0).then(|| sum / count)
}

fn interval(mean: f64, mut resampled: Vec<f64>) -> Interval {
    resampled.sort_by(f64::total_cmp);
    let [low, high] = ENDS.map(|share| quantile(&resampled, share).unwrap_or(mean));
    Interval { mean, low, high }
}

/// Between the two nearest of `sorted`. `None` of nothing.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let at = share * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use proptest::prelude::*;

    use super::*;

    fn clusters() -> impl Strategy<Value = Vec<Vec<f64>>> {
        let answers = prop::collection::vec(-4.0f64..4.0, 0..4);
        prop::collection::vec(answers, 1..8)
    }

    fn sums(answers: &[Vec<f64>]) -> Vec<Cluster> {
        let each = answers.iter();
        each.map(|values| Cluster::of(values.iter().copied()))
            .collect()
    }

    /// Every resample written out, answer by answer.
    fn written_out(answers: &[Vec<f64>], weights: &[u32]) -> Option<f64> {
        let mut all = Vec::new();
        for (values, weight) in answers.iter().zip(weights) {
            for _ in 0..*weight {
                all.extend_from_slice(values);
            }
        }
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    }

    proptest! {
        #[test]
        fn an_interval_is_that_of_the_resamples_written_out(answers in clusters(), seed: u64) {
            let resamples = Resamples::new(answers.len(), 50, seed, 0);
            let mut means = Vec::new();
            for weights in resamples.weights() {
                prop_assert_eq!(weights.iter().sum::<u32>() as usize, answers.len());
                means.extend(written_out(&answers, weights));
            }
            means.sort_by(f64::total_cmp);
            let found = resamples.mean(&sums(&answers));
            prop_assert_eq!(found.is_some(), answers.iter().any(|values| !values.is_empty()));
            if let Some(found) = found {
                let seen = written_out(&answers, &vec![1; answers.len()]).unwrap();
                prop_assert!((found.mean - seen).abs() < 1e-9);
                for (end, share) in [(found.low, 0.025), (found.high, 0.975)] {
                    prop_assert!((end - quantile(&means, share).unwrap()).abs() < 1e-9);
                }
                prop_assert_eq!(Some(found), resamples.mean(&sums(&answers)));
            }
        }
    }

    #[test]
    fn resamples_are_spread_as_all_possible_ones_are() {
        // Three prompts have 27 resamples, all equally likely.
        let answers = [vec![0.0], vec![1.0], vec![5.0]];
        let mut exact = Vec::new();
        for draw in 0..27 {
            let mut weights = [0; 3];
            for prompt in [draw % 3, draw / 3 % 3, draw / 9] {
                weights[prompt] += 1;
            }
            exact.push(written_out(&answers, &weights).unwrap());
        }
        let count = 20_000;
        let resamples = Resamples::new(3, count, 5, 1);
        let means: Vec<f64> = resamples
            .weights()
            .map(|weights| weighted_mean(&sums(&answers), weights).unwrap())
            .collect();
        for bound in [0.1, 0.5, 1.0, 2.0, 2.5, 3.5, 4.0] {
            let share = |means: &[f64]| {
                means.iter().filter(|mean| **mean < bound).count() as f64 / means.len() as f64
            };
            // Five standard deviations of a share of 20,000.
            let off = (share(&means) - share(&exact)).abs();
            assert!(off < 5.0 * 0.5 / (count as f64).sqrt(), "{bound}: {off}");
        }
    }

    #[test]
    fn a_share_of_all_or_none_has_a_width() {
        let resamples = Resamples::new(10, 100, 1, 0);
        let all = [Cluster { sum: 3.0, count: 3 }; 10];
        let share = resamples.share(&all).unwrap();
        assert_eq!((share.mean, share.high), (1.0, 1.0));
        // Ten of ten, both sides of 95 %.
        assert!((share.low - 0.691_502_892).abs() < 1e-6, "{}", share.low);
        let none = [Cluster { sum: 0.0, count: 3 }; 10];
        let share = resamples.share(&none).unwrap();
        assert_eq!((share.mean, share.low), (0.0, 0.0));
        assert!((share.high - 0.308_497_108).abs() < 1e-6, "{}", share.high);
        assert_eq!(resamples.share(&[]), None);
    }

    #[test]
    fn the_interval_of_an_area_holds_it_and_narrows_with_more_prompts() {
        let width = |n: usize| {
            let values = |stream| {
                let mut random = SplitMix64::new(3, stream);
                (0..n).map(|_| random.normal() + stream as f64).collect()
            };
            let (positives, negatives): (Vec<f64>, Vec<f64>) = (values(1), values(0));
            let ranking = Ranking::new(&positives, &negatives);
            let resamples = |stream| Resamples::new(n, 400, 1, stream);
            let found = area(&ranking, &resamples(0), &resamples(1)).unwrap();
            assert!(found.low < found.mean && found.mean < found.high);
            // One standard deviation apart: Phi(1 / sqrt 2).
            assert!(found.low < 0.760 && 0.760 < found.high, "{found:?}");
            found.high - found.low
        };
        assert!(width(400) < 0.6 * width(50));
    }
}
