//! How well a number tells two classes apart.

/// Numbers of two classes, sorted once so that every resample costs one pass.
#[derive(Clone, Debug)]
pub struct Ranking {
    /// In rising order: the value, whether it is of a positive, and its index in its class.
    ranked: Vec<(f64, bool, usize)>,
}

impl Ranking {
    /// NaN ranks above every number.
    pub fn new(positives: &[f64], negatives: &[f64]) -> Self {
        let of = |class: &[f64], positive| {
            let values = class.iter().copied().enumerate();
            values
                .map(|(index, value)| (value, positive, index))
                .collect::<Vec<_>>()
        };
        let mut ranked = of(positives, true);
        ranked.extend(of(negatives, false));
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        Self { ranked }
    }

    /// The chance that a random positive has the higher number, ties counting half: the area under the ROC curve (Mann and
    /// Whitney's U over the number of pairs). Each value counts as often as `weights` says: those of the positives, and those of
    /// the negatives. `None` where one of the classes is empty.
    pub fn area(&self, weights: (&[u32], &[u32])) -> Option<f64> {
        let weight = |positive: bool, index: usize| {
            let class = if positive { weights.0 } else { weights.1 };
            f64::from(class.get(index).copied().unwrap_or(0))
        };
        let (mut won, mut positives, mut negatives) = (0.0, 0.0, 0.0);
        for ties in self.ranked.chunk_by(|a, b| a.0.total_cmp(&b.0).is_eq()) {
            let (mut above, mut level) = (0.0, 0.0);
            for &(_, positive, index) in ties {
                let side = if positive { &mut above } else { &mut level };
                *side += weight(positive, index);
            }
            won += above * (negatives + level / 2.0);
            positives += above;
            negatives += level;
        }
        (positives > 0.0 && negatives > 0.0).then(|| won / (positives * negatives))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All pairs, one by one.
    fn pairs(positives: &[f64], negatives: &[f64]) -> Option<f64> {
        let mut won = 0.0;
        for positive in positives {
            for negative in negatives {
                won += match positive.total_cmp(negative) {
                    std::cmp::Ordering::Greater => 1.0,
                    std::cmp::Ordering::Equal => 0.5,
                    std::cmp::Ordering::Less => 0.0,
                };
            }
        }
        let count = positives.len() * negatives.len();
        (count > 0).then(|| won / count as f64)
    }

    fn repeated(values: &[f64], weights: &[u32]) -> Vec<f64> {
        let each = values.iter().zip(weights);
        each.flat_map(|(value, weight)| std::iter::repeat_n(*value, *weight as usize))
            .collect()
    }

    fn class() -> impl Strategy<Value = Vec<(f64, u32)>> {
        // Few values, so that there are ties.
        prop::collection::vec(
            ((-6i32..6).prop_map(|x| f64::from(x) / 4.0), 0u32..4),
            0..12,
        )
    }

    proptest! {
        #[test]
        fn area_is_the_share_of_pairs_won(positives in class(), negatives in class()) {
            let (p, p_weights): (Vec<f64>, Vec<u32>) = positives.into_iter().unzip();
            let (n, n_weights): (Vec<f64>, Vec<u32>) = negatives.into_iter().unzip();
            let want = pairs(&repeated(&p, &p_weights), &repeated(&n, &n_weights));
            let found = Ranking::new(&p, &n).area((&p_weights, &n_weights));
            match (found, want) {
                (Some(found), Some(want)) => prop_assert!((found - want).abs() < 1e-12, "{found} {want}"),
                (found, want) => prop_assert_eq!(found, want),
            }
            // What tells harmful apart as such tells harmless apart when it is turned round.
            let turned: (Vec<f64>, Vec<f64>) = (p.iter().map(|x| -x).collect(), n.iter().map(|x| -x).collect());
            let turned = Ranking::new(&turned.0, &turned.1).area((&p_weights, &n_weights));
            if let (Some(found), Some(turned)) = (found, turned) {
                prop_assert!((found + turned - 1.0).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn area_of_classes_apart_is_one_and_of_equals_a_half() {
        let area = |p: &[f64], n: &[f64]| {
            let weights = (vec![1; p.len()], vec![1; n.len()]);
            Ranking::new(p, n).area((&weights.0, &weights.1))
        };
        assert_eq!(area(&[2.0, 3.0], &[0.0, 1.0]), Some(1.0));
        assert_eq!(area(&[0.0], &[0.5, 1.0]), Some(0.0));
        assert_eq!(area(&[1.0; 3], &[1.0; 5]), Some(0.5));
        assert_eq!(area(&[], &[1.0]), None);
        assert_eq!(area(&[1.0], &[]), None);
    }
}
