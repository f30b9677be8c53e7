//! Rotary scaling: what GGUF says as a vector of factors or as keys, said as `rope_scaling` of `config.json` says it.

use super::super::{CheckpointError, RopeScaling};
use super::reader::Header;

/// Where a file has Llama 3's factors and does not say for how many positions: it cannot be told from the factors, and nothing
/// depends on it but through its ratio to two wavelengths.
const ORIGINAL_POSITIONS: usize = 8192;
/// Llama 3's own band.
const LOW_HIGH_FACTORS: (f64, f64) = (1.0, 4.0);
/// Of factors kept in f32.
const FACTOR_TOLERANCE: f64 = 1e-5;
/// Scale factors beyond this are no model's.
const FACTOR_MAX: f64 = 1e6;

/// The scaling of `header`. `factors`: `rope_freqs.weight`, (head_dim / 2), by which each frequency is divided.
pub(super) fn scaling(
    header: &Header<'_>,
    theta: f64,
    head_dim: usize,
    factors: Option<&[f32]>,
) -> Result<RopeScaling, CheckpointError> {
    const TYPE: &str = "llama.rope.scaling.type";
    const FACTOR: &str = "llama.rope.scaling.factor";
    let original = header
        .optional_u64("llama.rope.scaling.original_context_length")?
        .and_then(|positions| usize::try_from(positions).ok())
        .filter(|positions| *positions > 0);
    let kind = header.optional_text(TYPE)?;
    if let Some(factors) = factors {
        if !matches!(kind, None | Some("none" | "llama3")) {
            return Err(header.value_error(
                TYPE,
                "none beside `rope_freqs.weight`".to_owned(),
                kind.unwrap_or_default().to_owned(),
            ));
        }
        return of_factors(theta, head_dim, factors, original).ok_or_else(|| {
            CheckpointError::Tensor {
                file: header.file().to_path_buf(),
                name: "rope_freqs.weight".to_owned(),
                reason: "expected Llama 3's factors (1 for short wavelengths, one factor for long ones, a smooth band between), found others".to_owned(),
            }
        });
    }
    let linear_old = header.optional_f64("llama.rope.scale_linear")?;
    let factor = header.optional_f64(FACTOR)?.or(linear_old);
    match kind {
        Some("none") => Ok(RopeScaling::None),
        None | Some("linear") => match factor {
            None | Some(0.0 | 1.0) => Ok(RopeScaling::None),
            Some(factor) if (1.0..=FACTOR_MAX).contains(&factor) => {
                Ok(RopeScaling::Linear { factor })
            }
            Some(factor) => Err(header.value_error(
                FACTOR,
                format!("a number from 1 to {FACTOR_MAX}"),
                factor.to_string(),
            )),
        },
        Some(other) => Err(header.value_error(
            TYPE,
            "`none` or `linear` (Llama 3's scaling comes as `rope_freqs.weight`)".to_owned(),
            format!("`{other}`"),
        )),
    }
}

/// Llama 3's parameters that give `factors`, if any do.
fn of_factors(
    theta: f64,
    head_dim: usize,
    factors: &[f32],
    original: Option<usize>,
) -> Option<RopeScaling> {
    let factors: Vec<f64> = factors.iter().copied().map(f64::from).collect();
    let factor = factors.iter().copied().fold(1.0, f64::max);
    if factor > FACTOR_MAX || factors.len() != head_dim / 2 {
        return None;
    }
    if factors.iter().all(|factor| is_near(*factor, 1.0)) {
        return Some(RopeScaling::None);
    }
    let original_positions = original.unwrap_or(ORIGINAL_POSITIONS);
    let with = |low_freq_factor, high_freq_factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_positions,
    };
    let (low, high) = LOW_HIGH_FACTORS;
    let usual = with(low, high);
    let band = band(theta, head_dim, &factors, factor).map(|(low, high)| {
        (
            low * original_positions as f64,
            high * original_positions as f64,
        )
    });
    [Some(usual), band.map(|(low, high)| with(low, high))]
        .into_iter()
        .flatten()
        .find(|scaling| {
            let same = |(index, factor): (usize, &f64)| {
                is_near(
                    *factor,
                    factor_of(*scaling, wavelength(theta, head_dim, index)),
                )
            };
            factors.iter().enumerate().all(same)
        })
}

fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() <= FACTOR_TOLERANCE * a.abs().max(b.abs())
}

fn wavelength(theta: f64, head_dim: usize, index: usize) -> f64 {
    std::f64::consts::TAU * theta.powf(2.0 * index as f64 / head_dim as f64)
}

/// By what `scaling` divides the frequency of `wavelength`.
fn factor_of(scaling: RopeScaling, wavelength: f64) -> f64 {
    let RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_positions,
    } = scaling
    else {
        return 1.0;
    };
    let turns = original_positions as f64 / wavelength;
    if turns < low_freq_factor {
        factor
    } else if turns > high_freq_factor {
        1.0
    } else {
        let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

/// The band's ends as 1 / wavelength. Within it 1 / factor is a straight line of 1 / wavelength: drawn through two of its points,
/// or through one and as far as its neighbours outside the band allow.
fn band(theta: f64, head_dim: usize, factors: &[f64], factor: f64) -> Option<(f64, f64)> {
    let (mut inside, mut short, mut long) = (Vec::new(), f64::INFINITY, 0.0f64);
    for (index, own) in factors.iter().enumerate() {
        let x = 1.0 / wavelength(theta, head_dim, index);
        if is_near(*own, 1.0) {
            short = short.min(x);
        } else if is_near(*own, factor) {
            long = long.max(x);
        } else {
            inside.push((x, (1.0 / own - 1.0 / factor) / (1.0 - 1.0 / factor)));
        }
    }
    match (inside.first(), inside.last()) {
        (Some((x1, s1)), Some((x2, s2))) if inside.len() > 1 => {
            let slope = (s1 - s2) / (x1 - x2);
            let low = x1 - s1 / slope;
            Some((low, low + 1.0 / slope))
        }
        (Some((x, s)), _) => {
            // The lower end as low as the unscaled neighbour allows.
            let low = if short.is_finite() {
                long.max((x - s * short) / (1.0 - s))
            } else {
                long
            };
            Some((low, low + (x - low) / s))
        }
        _ if short.is_finite() => {
            let third = (short - long) / 3.0;
            Some((long + third, short - third))
        }
        _ => None,
    }
    .filter(|(low, high)| *low >= 0.0 && high > low && high.is_finite())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn factors(scaling: RopeScaling, theta: f64, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|index| factor_of(scaling, wavelength(theta, head_dim, index)) as f32)
            .collect()
    }

    #[test]
    fn of_factors_finds_parameters_that_give_them_again() {
        for (theta, head_dim, factor, low, high, original) in [
            (5e5, 128, 8.0, 1.0, 4.0, 8192),
            (5e5, 64, 32.0, 1.0, 4.0, 8192),
            (5e5, 8, 8.0, 1.0, 4.0, 64),
            (1e4, 64, 4.0, 2.0, 8.0, 2048),
            (5e5, 16, 8.0, 1.0, 4.0, 4096),
            (5e5, 12, 8.0, 1.0, 1.5, 1000),
        ] {
            let want = RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_positions: original,
            };
            let given = factors(want, theta, head_dim);
            for said in [Some(original), None] {
                let found = of_factors(theta, head_dim, &given, said).unwrap();
                for (a, b) in factors(found, theta, head_dim).iter().zip(&given) {
                    assert!((a - b).abs() <= 1e-4 * b, "{found:?} for {want:?}");
                }
                if said.is_some() && (low, high) == LOW_HIGH_FACTORS {
                    assert_eq!(found, want);
                }
            }
        }
    }

    #[test]
    fn of_factors_when_no_parameters_give_them_is_none() {
        for given in [
            vec![1.0, 3.0, 2.0, 8.0],
            vec![8.0, 1.0, 1.0, 1.0],
            vec![1.0, f32::INFINITY, 1.0, 1.0],
        ] {
            assert_eq!(of_factors(1e4, 8, &given, None), None, "{given:?}");
        }
        let none = of_factors(1e4, 8, &[1.0; 4], None);
        assert_eq!(none, Some(RopeScaling::None));
    }
}
