//! What a checkpoint says about its model's shape. Every value is checked where it is read (`hf`, `gguf`).

use crate::types::TokenId;

/// Shape and constants of a Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// d.
    pub hidden_size: usize,
    /// m.
    pub intermediate_size: usize,
    /// L.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// K/V heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Size of a head, even.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Stretching of the rotary embedding.
    pub rope_scaling: RopeScaling,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Start of sequence.
    pub bos_token_id: Option<TokenId>,
    /// Ends of sequence, from `config.json` and `generation_config.json` together.
    pub eos_token_ids: Vec<TokenId>,
}

/// `rope_scaling` of `config.json`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// NTK: the base grows with the length served beyond `original_positions`.
    Dynamic {
        /// At least 1.
        factor: f64,
        /// Positions of the unscaled model.
        original_positions: usize,
    },
    /// Llama 3: low frequencies divided by `factor`, a smooth band between, high ones as they are.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths above `original_positions / low_freq_factor` are scaled.
        low_freq_factor: f64,
        /// Wavelengths below `original_positions / high_freq_factor` are not.
        high_freq_factor: f64,
        /// Positions of the unscaled model.
        original_positions: usize,
    },
}

/// `generation_config.json`: what a request that says nothing gets. `None`: the file says nothing either.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// 0 where `do_sample` is false.
    pub temperature: Option<f32>,
    /// Keep the k most likely tokens.
    pub top_k: Option<u32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Relative floor.
    pub min_p: Option<f32>,
    /// 1 is off.
    pub repetition_penalty: Option<f32>,
}
