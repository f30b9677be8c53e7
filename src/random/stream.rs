//! A sequence of numbers from a seed and the name of a stream.

/// SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, every seed is good.
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// A stream of its own for each `(seed, stream)`.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = Self(seed ^ stream.wrapping_mul(0xD1B5_4A32_D192_ED03));
        mixed.next_u64();
        mixed
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        const STEP: f64 = 1.0 / (1u64 << 53) as f64;
        (self.next_u64() >> 11) as f64 * STEP
    }

    /// Shuffles in place (Fisher and Yates): every order is equally likely.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        // 1 - unit() is in (0, 1]: its logarithm is finite.
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Uniform in `0..bound`; 0 where `bound` is 0. The bias of the multiply is below 2^-32 for any bound used here.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_u64_of_seed_zero_is_the_published_sequence() {
        let mut random = SplitMix64(0);
        assert_eq!(random.next_u64(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(random.next_u64(), 0x6E78_9E6A_A1B9_65F4);
    }

    #[test]
    fn unit_and_below_stay_in_range_and_streams_differ() {
        let (mut a, mut b) = (SplitMix64::new(7, 0), SplitMix64::new(7, 1));
        assert_ne!(a.next_u64(), b.next_u64());
        for bound in [1usize, 2, 3, 1000] {
            for _ in 0..100 {
                assert!((0.0..1.0).contains(&a.unit()));
                assert!(a.below(bound) < bound);
            }
        }
        assert_eq!(a.below(0), 0);
    }

    #[test]
    fn shuffle_keeps_every_item_and_moves_them() {
        let mut items: Vec<usize> = (0..100).collect();
        SplitMix64::new(3, 0).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let mut random = SplitMix64::new(11, 0);
        let draws: Vec<f64> = (0..10_000).map(|_| random.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        // Five standard deviations of either estimate.
        assert!(mean.abs() < 0.05, "{mean}");
        assert!((variance - 1.0).abs() < 0.08, "{variance}");
    }
}
