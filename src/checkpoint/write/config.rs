//! `config.json` and `generation_config.json` as transformers and [`crate::checkpoint::hf`] read them.

use serde::Serialize;

use crate::checkpoint::{LlamaConfig, RopeScaling, ScoreType};
use crate::dtype::DType;
use crate::types::TokenId;

/// Start and ends of sequence: all of `generation_config.json`.
#[derive(Serialize)]
pub(super) struct Generation {
    bos_token_id: Option<u32>,
    eos_token_id: Option<Ends>,
}

/// One end of sequence is a number, several are a list.
#[derive(Serialize)]
#[serde(untagged)]
enum Ends {
    One(u32),
    Several(Vec<u32>),
}

/// `config.json` of a `LlamaForCausalLM`.
#[derive(Serialize)]
pub(super) struct Llama {
    architectures: [&'static str; 1],
    model_type: &'static str,
    torch_dtype: &'static str,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    hidden_act: &'static str,
    rms_norm_eps: f32,
    rope_theta: f64,
    rope_scaling: Option<Rope>,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
    attention_dropout: f32,
    initializer_range: f32,
    use_cache: bool,
    #[serde(flatten)]
    generation: Generation,
}

/// Under the keys that transformers of every version reads: `rope_parameters` came only with 5.
#[derive(Serialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
enum Rope {
    Linear {
        factor: f64,
    },
    Dynamic {
        factor: f64,
        original_max_position_embeddings: usize,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
}

/// `config.json` of Safe-RLHF's `LlamaForScore`.
#[derive(Serialize)]
pub(super) struct Score {
    #[serde(flatten)]
    llama: Llama,
    score_type: &'static str,
    score_dim: usize,
    score_bias: bool,
    do_normalize: bool,
    normalizer_type: &'static str,
    momentum: f32,
}

impl Generation {
    pub(super) fn of(config: &LlamaConfig) -> Self {
        let ends: Vec<u32> = config.eos_token_ids.iter().map(|id| id.0).collect();
        Self {
            bos_token_id: config.bos_token_id.map(|TokenId(id)| id),
            eos_token_id: match ends.as_slice() {
                [] => None,
                [one] => Some(Ends::One(*one)),
                _ => Some(Ends::Several(ends)),
            },
        }
    }
}

impl Llama {
    /// A model whose weights are stored as `dtype`.
    pub(super) fn of(config: &LlamaConfig, dtype: DType) -> Self {
        Self {
            architectures: ["LlamaForCausalLM"],
            model_type: "llama",
            torch_dtype: match dtype {
                DType::BF16 => "bfloat16",
                _ => "float32",
            },
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_layers,
            num_attention_heads: config.num_heads,
            num_key_value_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            hidden_act: "silu",
            rms_norm_eps: config.rms_norm_eps,
            rope_theta: config.rope_theta,
            rope_scaling: rope(config.rope_scaling),
            max_position_embeddings: config.max_position_embeddings,
            tie_word_embeddings: config.tie_word_embeddings,
            attention_bias: false,
            mlp_bias: false,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            use_cache: true,
            generation: Generation::of(config),
        }
    }
}

impl Score {
    /// A model that does not normalise its scores.
    pub(super) fn of(
        config: &LlamaConfig,
        score_type: ScoreType,
        has_bias: bool,
        dtype: DType,
    ) -> Self {
        Self {
            llama: Llama {
                architectures: ["LlamaForScore"],
                ..Llama::of(config, dtype)
            },
            score_type: score_type.as_str(),
            score_dim: 1,
            score_bias: has_bias,
            do_normalize: false,
            normalizer_type: "ExponentialMovingAverage",
            momentum: 0.9,
        }
    }
}

fn rope(scaling: RopeScaling) -> Option<Rope> {
    match scaling {
        RopeScaling::None => None,
        RopeScaling::Linear { factor } => Some(Rope::Linear { factor }),
        RopeScaling::Dynamic {
            factor,
            original_positions,
        } => Some(Rope::Dynamic {
            factor,
            original_max_position_embeddings: original_positions,
        }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_positions,
        } => Some(Rope::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original_positions,
        }),
    }
}
