//! The table of the rotary embedding, with the stretchings of Hugging Face's `rope_scaling`: one for serving and training.

use std::f64::consts::TAU;

use super::{LlamaConfig, RopeScaling};

/// (positions, head_dim), row-major: `head_dim / 2` cosines, then as many sines, of `position * frequency_i`.
///
/// Computed in f64: an angle of 8,192 has an error of 5e-4 in f32, and the table is made once.
pub fn rope_table(config: &LlamaConfig, positions: usize) -> Vec<f32> {
    let frequencies = frequencies(config, positions);
    let mut table = Vec::with_capacity(positions * config.head_dim);
    for position in 0..positions {
        let angles = frequencies
            .iter()
            .map(|frequency| position as f64 * frequency);
        table.extend(angles.clone().map(|angle| angle.cos() as f32));
        table.extend(angles.map(|angle| angle.sin() as f32));
    }
    table
}

/// (head_dim / 2) radians a position.
fn frequencies(config: &LlamaConfig, positions: usize) -> Vec<f64> {
    let size = config.head_dim as f64;
    let base = match config.rope_scaling {
        RopeScaling::Dynamic {
            factor,
            original_positions,
        } if positions > original_positions => {
            // Hugging Face grows the base with each sequence, which would make cached keys depend on what came later. One
            // base for the whole context served keeps K a function of the prefix; a context within the original is exact.
            let stretch = factor * positions as f64 / original_positions as f64 - (factor - 1.0);
            config.rope_theta * stretch.powf(size / (size - 2.0))
        }
        _ => config.rope_theta,
    };
    let plain = (0..config.head_dim / 2).map(|i| base.powf(-2.0 * i as f64 / size));
    plain
        .map(|frequency| stretched(frequency, config.rope_scaling))
        .collect()
}

fn stretched(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_positions,
        } => {
            let turns = original_positions as f64 * frequency / TAU;
            let span = high_freq_factor - low_freq_factor;
            // Both factors may be equal: then the band between is empty and the clamp decides.
            let keep = if span > 0.0 {
                ((turns - low_freq_factor) / span).clamp(0.0, 1.0)
            } else {
                f64::from(u8::from(turns > low_freq_factor))
            };
            frequency * (keep + (1.0 - keep) / factor)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(rope_scaling: RopeScaling) -> LlamaConfig {
        LlamaConfig {
            vocab_size: 8,
            hidden_size: 8,
            intermediate_size: 8,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 8,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling,
            max_position_embeddings: 64,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    fn check(scaling: RopeScaling, positions: usize, want: [f64; 4]) {
        let got = frequencies(&config(scaling), positions);
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() <= 1e-9 * want,
                "{scaling:?}: {got} is not {want}"
            );
        }
    }

    // The wanted figures are transformers' ROPE_INIT_FUNCTIONS, worked out by hand for head_dim 8, theta 10,000.
    #[test]
    fn frequencies_follow_each_scaling() {
        check(RopeScaling::None, 64, [1.0, 0.1, 0.01, 0.001]);
        check(
            RopeScaling::Linear { factor: 4.0 },
            64,
            [0.25, 0.025, 0.0025, 0.00025],
        );
        let dynamic = RopeScaling::Dynamic {
            factor: 2.0,
            original_positions: 64,
        };
        check(dynamic, 64, [1.0, 0.1, 0.01, 0.001]);
        let base = 10_000.0 * 3f64.powf(8.0 / 6.0);
        check(
            dynamic,
            128,
            [1.0, base.powf(-0.25), base.powf(-0.5), base.powf(-0.75)],
        );
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 64,
        };
        let smooth = (64.0 * 0.1 / TAU - 1.0) / 3.0;
        let between = (1.0 - smooth) * 0.1 / 8.0 + smooth * 0.1;
        check(llama3, 64, [1.0, between, 0.00125, 0.000125]);
    }

    #[test]
    fn table_holds_cosines_then_sines() {
        let table = rope_table(&config(RopeScaling::None), 3);
        assert_eq!(table.len(), 3 * 8);
        assert_eq!(&table[..8], &[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert!((table[16] - 2f32.cos()).abs() < 1e-7 && (table[20] - 2f32.sin()).abs() < 1e-7);
    }
}
