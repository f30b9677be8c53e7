//! Loops over rows that the compiler turns into vector code: no branches, no library call, sums in eight lanes.

/// Lanes of a sum: two SSE or one AVX register.
const LANES: usize = 8;

/// Runs loops as the widest vector code that this CPU has. What is called inside must be inlined to profit.
#[inline(always)]
pub(super) fn simd<R>(loops: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(loops)
}

/// Where e^x is 1e-20, which vanishes beside 1. What is smaller is 0: multiplied a few times it would be subnormal, and a product of
/// subnormals takes a processor a hundred times as long.
const EXP_LEAST: f32 = -46.0;

/// e^x, relative error below 3e-7; 0 below [`EXP_LEAST`], finite for any x (Cephes' expf, by powers of two and a polynomial).
#[inline(always)]
#[allow(clippy::excessive_precision)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_375;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < EXP_LEAST { EXP_LEAST } else { x };
    let clamped = if clamped > 88.0 { 88.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let whole = shifted - ROUND;
    let rest = clamped - whole * LN2_HIGH - whole * LN2_LOW;
    let mut y = 1.987_569_15e-4;
    y = y * rest + 1.398_199_95e-3;
    y = y * rest + 8.333_451_907e-3;
    y = y * rest + 4.166_579_589e-2;
    y = y * rest + 1.666_666_546e-1;
    y = y * rest + 5.000_000_12e-1;
    let y = y * rest * rest + rest + 1.0;
    let y = y * f32::from_bits(power.wrapping_add(127) << 23);
    if x < EXP_LEAST { 0.0 } else { y }
}

/// 1 / (1 + e^-x); 0 below [`EXP_LEAST`].
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    let numerator = if x < 0.0 { e } else { 1.0 };
    numerator / (1.0 + e)
}

/// Folds a row in eight lanes, then the lanes.
#[inline(always)]
fn fold(row: &[f32], start: f32, combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = combine(*lane, *value);
        }
    }
    let whole = lanes.into_iter().fold(start, &combine);
    rest.iter().fold(whole, |sum, value| combine(sum, *value))
}

/// Sum of a row.
#[inline(always)]
pub(super) fn sum(row: &[f32]) -> f32 {
    fold(row, 0.0, |sum, value| sum + value)
}

/// Largest of a row; -inf for an empty one.
#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
    fold(row, f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// <a, b>.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks_a, chunks_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = chunks_a.remainder().iter().zip(chunks_b.remainder());
    let rest: f32 = rest.map(|(a, b)| a * b).sum();
    for (a, b) in chunks_a.zip(chunks_b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.into_iter().sum::<f32>() + rest
}

/// Sum of a * b * c.
#[inline(always)]
pub(super) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks_a, chunks_b, chunks_c) = (
        a.chunks_exact(LANES),
        b.chunks_exact(LANES),
        c.chunks_exact(LANES),
    );
    let rest = chunks_a
        .remainder()
        .iter()
        .zip(chunks_b.remainder())
        .zip(chunks_c.remainder());
    let rest: f32 = rest.map(|((a, b), c)| a * b * c).sum();
    for ((a, b), c) in chunks_a.zip(chunks_b).zip(chunks_c) {
        for (((lane, a), b), c) in lanes.iter_mut().zip(a).zip(b).zip(c) {
            *lane += a * b * c;
        }
    }
    lanes.into_iter().sum::<f32>() + rest
}

/// y += factor * x.
#[inline(always)]
pub(in super::super) fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// Replaces each x of a row by e^(x - shift) and returns their sum.
#[inline(always)]
pub(super) fn exp_row(row: &mut [f32], shift: f32) -> f32 {
    for value in row.iter_mut() {
        *value = exp(*value - shift);
    }
    sum(row)
}

/// Multiplies a row.
#[inline(always)]
pub(super) fn scale(row: &mut [f32], factor: f32) {
    for value in row {
        *value *= factor;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_3e_7_of_the_library_and_never_infinite() {
        let mut x = EXP_LEAST;
        while x < 88.0 {
            let want = f64::from(x).exp();
            let error = ((f64::from(exp(x)) - want) / want).abs();
            assert!(error < 3e-7, "exp({x}): relative error {error}");
            x += 0.013;
        }
        assert!(exp(1e9).is_finite() && exp(-1e9) == 0.0 && exp(0.0) == 1.0);
    }

    #[test]
    fn nothing_here_makes_subnormal_numbers() {
        for x in [-1e9, -110.0, -95.0, -88.0, -60.0, -46.1, -45.9, 0.0, 95.0] {
            for y in [exp(x), sigmoid(x), sigmoid(-x)] {
                assert!(y == 0.0 || y >= 1e-20, "{x}: {y}");
            }
        }
        assert!(exp(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn folds_take_every_element_whatever_the_length() {
        for length in [0usize, 1, 7, 8, 9, 31] {
            let row: Vec<f32> = (0..length).map(|i| i as f32 - 3.0).collect();
            assert_eq!(sum(&row), row.iter().sum::<f32>());
            assert_eq!(dot(&row, &row), row.iter().map(|x| x * x).sum::<f32>());
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&row), largest);
        }
    }
}
