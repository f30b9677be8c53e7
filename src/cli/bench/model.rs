//! Models of given sizes with random weights, for a bench: speed does not depend on what they say.

use std::sync::Arc;

use clap::ValueEnum;

use crate::checkpoint::{
    BaseTensors, Checkpoint, Expert, ExpertLayer, Experts, FoldedGate, GenerationDefaults,
    HostTensor, LayerTensors, LlamaConfig, RopeScaling, RouterLayer, TensorBytes, TextParts,
};
use crate::dtype::DType;
use crate::random::SplitMix64;

/// Rank of the experts that are made for a model without: the paper's.
const RANK: usize = 16;
/// Random numbers that are repeated: as long as drawing takes no time.
const PATTERN: usize = 1 << 20;

/// Sizes of a known model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// LLaMA 7B: d 4096, m 11008, 32 layers, 32 heads; the paper's.
    #[value(name = "llama-7b")]
    Llama7B,
    /// Llama 3 8B: d 4096, m 14336, 32 layers, 32 heads on 8.
    #[value(name = "llama-3-8b")]
    Llama8B,
    /// SmolLM2 135M: d 576, m 1536, 30 layers, 9 heads on 3.
    #[value(name = "llama-135m")]
    Llama135M,
}

impl Shape {
    /// As its users call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama7B => "llama-7b",
            Self::Llama8B => "llama-3-8b",
            Self::Llama135M => "llama-135m",
        }
    }

    /// Its `config.json`.
    pub(super) fn config(self) -> LlamaConfig {
        let (d, m, layers, heads, vocabulary) = match self {
            Self::Llama7B => (4096, 11_008, 32, (32, 32), 32_000),
            Self::Llama8B => (4096, 14_336, 32, (32, 8), 128_256),
            Self::Llama135M => (576, 1536, 30, (9, 3), 49_152),
        };
        LlamaConfig {
            vocab_size: vocabulary,
            hidden_size: d,
            intermediate_size: m,
            num_layers: layers,
            num_heads: heads.0,
            num_kv_heads: heads.1,
            head_dim: d / heads.0,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            max_position_embeddings: 16_384,
            tie_word_embeddings: self == Self::Llama135M,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }
}

/// A plain Llama of random weights in bf16. They all lie in one piece as large as the largest of them, so that host memory does not grow
/// with the layers.
pub(super) fn checkpoint(config: LlamaConfig, seed: u64) -> Checkpoint {
    let weights = Weights::new(&config, seed);
    let (d, m) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    );
    let layer = |_| LayerTensors {
        input_layernorm: weights.ones(d),
        q_proj: weights.matrix(q, d),
        k_proj: weights.matrix(kv, d),
        v_proj: weights.matrix(kv, d),
        o_proj: weights.matrix(d, q),
        post_attention_layernorm: weights.ones(d),
        gate_proj: weights.matrix(m, d),
        up_proj: weights.matrix(m, d),
        down_proj: weights.matrix(d, m),
    };
    let head = (!config.tie_word_embeddings).then(|| weights.matrix(config.vocab_size, d));
    Checkpoint {
        base: BaseTensors {
            embed_tokens: weights.matrix(config.vocab_size, d),
            layers: (0..config.num_layers).map(layer).collect(),
            norm: weights.ones(d),
            lm_head: head,
        },
        config,
        experts: None,
        text: TextParts {
            tokenizer_json: Vec::new(),
            chat_template: None,
            bos_token: None,
            eos_token: None,
            special_tokens: Vec::new(),
        },
        generation: GenerationDefaults::default(),
        fingerprint: "random".to_owned(),
    }
}

/// What all tensors are windows of.
struct Weights {
    matrices: Arc<[u8]>,
    ones: Arc<[u8]>,
}

impl Weights {
    fn new(config: &LlamaConfig, seed: u64) -> Self {
        let (d, m) = (config.hidden_size, config.intermediate_size);
        let largest = d * config.vocab_size.max(m).max(d);
        let mut random = SplitMix64::new(seed, u64::MAX - 1);
        // bf16 of both signs from 1/64 to 1/32.
        let number = |_| 0x3C80 | (random.below(1 << 16) as u16 & 0x807F);
        let pattern: Vec<u16> = (0..PATTERN.min(largest)).map(number).collect();
        let mut matrices = Vec::with_capacity(largest);
        while matrices.len() < largest {
            let left = largest - matrices.len();
            matrices.extend_from_slice(&pattern[..left.min(pattern.len())]);
        }
        Self {
            matrices: bytemuck::cast_slice(&matrices).into(),
            ones: bytemuck::cast_slice(&vec![0x3F80u16; d]).into(),
        }
    }

    fn matrix(&self, rows: usize, cols: usize) -> HostTensor {
        window(&self.matrices, vec![rows, cols])
    }

    fn ones(&self, count: usize) -> HostTensor {
        window(&self.ones, vec![count])
    }
}

fn window(bytes: &Arc<[u8]>, shape: Vec<usize>) -> HostTensor {
    let length = 2 * shape.iter().product::<usize>();
    let bytes = TensorBytes::Shared(Arc::clone(bytes), 0..length);
    // The piece is as large as its largest tensor, and bf16 has no blocks: it is never None.
    HostTensor::new(shape, DType::BF16, bytes).unwrap_or_else(|| unreachable!("a window fits"))
}

/// Experts and a router of the paper's shape, random and small: what they cost, not what they say.
pub(super) fn random_experts(config: &LlamaConfig, seed: u64) -> Experts {
    let (d, m) = (config.hidden_size, config.intermediate_size);
    let mut random = SplitMix64::new(seed, u64::MAX);
    let mut uniform = |count: usize, scale: f32| -> Vec<f32> {
        (0..count)
            .map(|_| (random.unit() as f32 * 2.0 - 1.0) * scale)
            .collect()
    };
    let small = 1.0 / (m as f32).sqrt();
    let mut expert = || Expert {
        rank: RANK,
        scale: 2.0,
        layers: (0..config.num_layers)
            .map(|_| ExpertLayer {
                lora_a: uniform(RANK * m, small),
                lora_b: uniform(d * RANK, 0.01),
            })
            .collect(),
    };
    let (safety, helpfulness) = (expert(), expert());
    let mut gate = || FoldedGate {
        weight: uniform(m, small),
        bias: 0.0,
    };
    let router = (0..config.num_layers)
        .map(|_| RouterLayer {
            safety: gate(),
            helpfulness: gate(),
        })
        .collect();
    Experts {
        safety,
        helpfulness,
        router,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_has_all_tensors_of_the_shape_in_one_piece_of_memory() {
        let made = checkpoint(Shape::Llama135M.config(), 3);
        assert_eq!(made.base.layers.len(), 30);
        assert!(made.base.lm_head.is_none());
        assert_eq!(made.base.embed_tokens.shape(), [49_152, 576]);
        assert_eq!(made.base.layers[0].k_proj.shape(), [192, 576]);
        let all = &made.base.embed_tokens;
        let part = &made.base.layers[29].down_proj;
        assert_eq!(all.bytes().as_ptr(), part.bytes().as_ptr());
        assert!(part.bytes().iter().any(|byte| *byte != part.bytes()[0]));
        let other = checkpoint(Shape::Llama135M.config(), 4);
        assert_ne!(all.bytes(), other.base.embed_tokens.bytes());
    }
}
