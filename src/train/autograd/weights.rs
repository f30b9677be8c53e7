//! The weights of a Llama by Hugging Face's names and in the order of its state dict, from wherever they come.

use std::collections::HashMap;

use super::blocks::{Block, check_one};
use crate::checkpoint::{Checkpoint, HostTensor, LlamaConfig};
use crate::random::SplitMix64;
use crate::train::{Parameter, TrainError};

/// Standard deviation of random weights; those that write into the residual stream get 1 / sqrt(2 L) of it, so that the stream of a
/// deep model starts as small as that of a shallow one (GPT-2).
const STD: f64 = 0.02;

/// Where weights come from.
pub(super) enum Weights<'a> {
    /// A base.
    Checkpoint(HashMap<String, &'a HostTensor>),
    /// Named tensors.
    Named(HashMap<&'a str, &'a [f32]>),
    /// Drawn: normal, norms 1.
    Random {
        /// Of everything.
        seed: u64,
        /// L.
        layers: usize,
    },
}

impl<'a> Weights<'a> {
    /// Those of a base.
    pub(super) fn of(checkpoint: &'a Checkpoint) -> Self {
        let base = &checkpoint.base;
        let mut named = HashMap::new();
        named.insert(EMBEDDING.to_owned(), &base.embed_tokens);
        named.insert(NORM.to_owned(), &base.norm);
        if let Some(head) = &base.lm_head {
            named.insert(HEAD.to_owned(), head);
        }
        for (index, layer) in base.layers.iter().enumerate() {
            for (name, tensor) in [
                ("self_attn.q_proj", &layer.q_proj),
                ("self_attn.k_proj", &layer.k_proj),
                ("self_attn.v_proj", &layer.v_proj),
                ("self_attn.o_proj", &layer.o_proj),
                ("mlp.gate_proj", &layer.gate_proj),
                ("mlp.up_proj", &layer.up_proj),
                ("mlp.down_proj", &layer.down_proj),
                ("input_layernorm", &layer.input_layernorm),
                ("post_attention_layernorm", &layer.post_attention_layernorm),
            ] {
                named.insert(in_layer(index, name), tensor);
            }
        }
        Self::Checkpoint(named)
    }

    /// Numbers of one parameter.
    fn values(&self, parameter: &Parameter) -> Result<Vec<f32>, TrainError> {
        let missing = || TrainError::Shape {
            name: parameter.name.clone(),
            expected: parameter.shape.iter().product(),
            found: 0,
        };
        let values = match self {
            Self::Checkpoint(named) => {
                let tensor = named.get(&parameter.name).ok_or_else(missing)?;
                tensor.to_f32()
            }
            Self::Named(named) => {
                let values = named.get(parameter.name.as_str()).ok_or_else(missing)?;
                values.to_vec()
            }
            Self::Random { seed, layers } => random(parameter, *seed, *layers),
        };
        check_one(parameter, &values)?;
        Ok(values)
    }

    /// A block of matrices below each other, or of one vector.
    pub(super) fn block(&self, parts: Vec<Parameter>) -> Result<Block, TrainError> {
        let mut values = Vec::new();
        for part in &parts {
            values.extend(self.values(part)?);
        }
        Ok(Block { values, parts })
    }

    /// The trunk: embedding, layers and last norm.
    pub(super) fn trunk(&self, config: &LlamaConfig) -> Result<Vec<Block>, TrainError> {
        let (d, m) = (config.hidden_size, config.intermediate_size);
        let heads = config.num_heads * config.head_dim;
        let kv_heads = config.num_kv_heads * config.head_dim;
        let mut blocks = vec![self.block(vec![matrix(EMBEDDING, config.vocab_size, d)])?];
        for layer in 0..config.num_layers {
            let matrix = |name: &str, rows, columns| matrix(&in_layer(layer, name), rows, columns);
            blocks.push(self.block(vec![
                matrix("self_attn.q_proj", heads, d),
                matrix("self_attn.k_proj", kv_heads, d),
                matrix("self_attn.v_proj", kv_heads, d),
            ])?);
            blocks.push(self.block(vec![matrix("self_attn.o_proj", d, heads)])?);
            let gate_up = vec![matrix("mlp.gate_proj", m, d), matrix("mlp.up_proj", m, d)];
            blocks.push(self.block(gate_up)?);
            blocks.push(self.block(vec![matrix("mlp.down_proj", d, m)])?);
            for name in ["input_layernorm", "post_attention_layernorm"] {
                blocks.push(self.block(vec![vector(&in_layer(layer, name), d)])?);
            }
        }
        blocks.push(self.block(vec![vector(NORM, d)])?);
        Ok(blocks)
    }

    /// The head, where it is not the embedding.
    pub(super) fn head(&self, config: &LlamaConfig) -> Result<Option<Block>, TrainError> {
        if config.tie_word_embeddings {
            return Ok(None);
        }
        let head = matrix(HEAD, config.vocab_size, config.hidden_size);
        self.block(vec![head]).map(Some)
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

fn in_layer(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}.weight")
}

/// A matrix as a parameter: it decays.
pub(super) fn matrix(name: &str, rows: usize, columns: usize) -> Parameter {
    Parameter {
        name: name.to_owned(),
        shape: vec![rows, columns],
        decay: true,
    }
}

/// A norm or a bias as a parameter: it does not decay.
pub(super) fn vector(name: &str, size: usize) -> Parameter {
    Parameter {
        name: name.to_owned(),
        shape: vec![size],
        decay: false,
    }
}

/// One stream of numbers a name, so that a tensor's draws do not depend on which others there are.
fn random(parameter: &Parameter, seed: u64, layers: usize) -> Vec<f32> {
    let size = parameter.shape.iter().product();
    if parameter.shape.len() == 1 {
        return vec![1.0; size];
    }
    let writes =
        parameter.name.ends_with("o_proj.weight") || parameter.name.ends_with("down_proj.weight");
    let std = if writes {
        STD / ((2 * layers) as f64).sqrt()
    } else {
        STD
    };
    let mut stream = SplitMix64::new(seed, name_hash(&parameter.name));
    (0..size).map(|_| (std * stream.normal()) as f32).collect()
}

/// FNV-1a: a stream of random numbers for a name.
pub(super) fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}
