//! Floats of eight bits: a sign, four bits of exponent (bias 7), three of mantissa, as "E4M3" of the OCP 8-bit floating point
//! specification has them: no infinity, 448 is the largest, steps of 2^-9 below 2^-6. The kernels have the same code in `kernels/e4m3.cuh`.

/// The largest magnitude.
pub const LARGEST: f32 = 448.0;

/// The code of the number nearest to `x` (ties to even), of 448 where `x` is larger. NaN has the sign of `x` and the magnitude of 448.
pub fn encode(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    let code = if magnitude < LEAST_NORMAL {
        // The sum's last bit is worth 2^-9.
        (magnitude + 16384.0).to_bits() - 16384.0f32.to_bits()
    } else {
        let bits = magnitude.to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        ((rounded >> 20) - ((127 - 7) << 3)).min(CODE_OF_LARGEST)
    };
    sign | code as u8
}

/// 2^-6.
const LEAST_NORMAL: f32 = 1.0 / 64.0;
/// Of 448.
const CODE_OF_LARGEST: u32 = 0x7e;

/// The number of a code; 480 and -480 for the two that stand for NaN, which [`encode`] never gives.
pub fn decode(code: u8) -> f32 {
    // The same exponent and mantissa in an f32, whose bias is 120 larger: steps below the least normal number come out right, too.
    let small = f32::from_bits(u32::from(code & 0x7f) << 20);
    let magnitude = small * f32::from_bits((127 + 120) << 23);
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes() -> impl Iterator<Item = u8> {
        (0..=255).filter(|code| code & 0x7f != 0x7f)
    }

    #[test]
    fn the_format_is_that_of_its_specification() {
        assert_eq!(decode(0x7e), LARGEST);
        assert_eq!(decode(0x08), LEAST_NORMAL);
        assert_eq!(decode(0x01), 1.0 / 512.0);
        assert_eq!(decode(0x38), 1.0);
        assert_eq!(decode(0xb9), -1.125);
    }

    #[test]
    fn every_number_has_its_code() {
        for code in codes() {
            assert_eq!(encode(decode(code)), code, "{code:#x}");
        }
        assert_eq!(encode(1e30), 0x7e);
        assert_eq!(encode(f32::NEG_INFINITY), 0xfe);
    }

    #[test]
    fn what_lies_between_goes_to_the_nearest_and_to_even() {
        let mut numbers: Vec<f32> = codes().map(decode).collect();
        numbers.sort_by(f32::total_cmp);
        numbers.dedup();
        for pair in numbers.windows(2) {
            let (low, high) = (pair[0], pair[1]);
            let middle = (low + high) / 2.0;
            let nearest = |x: f32| decode(encode(x));
            assert_eq!(nearest(middle - (middle - low) / 1024.0), low, "{low}");
            assert_eq!(nearest(middle + (high - middle) / 1024.0), high, "{high}");
            let even = [low, high]
                .into_iter()
                .find(|x| encode(*x).is_multiple_of(2));
            assert_eq!(Some(nearest(middle)), even, "{low} and {high}");
        }
    }
}
