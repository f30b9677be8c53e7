//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): a number from a key and a counter.

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Added to the key after each round.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// A number in [0, 1), uniform over multiples of 2^-53, for the token at `position` of a request's answer `choice`.
pub fn uniform(seed: u64, choice: u32, position: u64) -> f64 {
    let [low, high] = halves(position);
    let [a, b, _, _] = philox([low, high, choice, 0], halves(seed));
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [low0, high0] = halves(u64::from(counter[0]) * u64::from(MULTIPLIERS[0]));
        let [low1, high1] = halves(u64::from(counter[2]) * u64::from(MULTIPLIERS[1]));
        counter = [
            high1 ^ counter[1] ^ key[0],
            low1,
            high0 ^ counter[3] ^ key[1],
            low0,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `philox4x32 10` of Random123's `kat_vectors`.
    #[test]
    fn philox_gives_the_known_answers() {
        let ones = u32::MAX;
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
            ),
            (
                [ones; 4],
                [ones; 2],
                [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
            ),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox(counter, key), want);
        }
    }

    #[test]
    fn uniform_is_below_one_and_centred() {
        let numbers: Vec<f64> = (0..10_000)
            .map(|position| uniform(7, 0, position))
            .collect();
        assert!(numbers.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        // Five standard deviations of the mean of 10,000.
        assert!((mean - 0.5).abs() < 5.0 * 0.2887 / 100.0, "{mean}");
    }

    #[test]
    fn uniform_differs_by_seed_choice_and_position() {
        let base = uniform(1, 0, 0);
        for other in [
            uniform(2, 0, 0),
            uniform(1 << 32, 0, 0),
            uniform(1, 1, 0),
            uniform(1, 0, 1),
            uniform(1, 0, 1 << 32),
        ] {
            assert_ne!(base, other);
        }
    }
}
