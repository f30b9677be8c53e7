//! The forward pass of a Llama over sequences laid end to end, without padding, with whatever is mixed into its MLPs.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::ops::{self, Heads};
use crate::checkpoint::{LlamaConfig, rope_table};

/// What all models of a configuration share.
pub(super) struct Shape {
    /// As in the checkpoint.
    pub config: LlamaConfig,
    /// (positions, head_dim).
    rope: Arc<[f32]>,
}

impl Shape {
    /// Positions as the model was made for, so that stretched tables are those that it is served with.
    pub(super) fn new(config: LlamaConfig) -> Arc<Self> {
        let rope = Arc::from(rope_table(&config, config.max_position_embeddings));
        Arc::new(Self { config, rope })
    }

    fn heads(&self) -> Heads {
        Heads {
            query: self.config.num_heads,
            kv: self.config.num_kv_heads,
            size: self.config.head_dim,
        }
    }
}

/// Weights of a trunk. Those that are variables are trained; cloning copies none.
#[derive(Clone)]
pub(super) struct Llama {
    /// Configuration and rope.
    pub shape: Arc<Shape>,
    /// (vocabulary, d).
    pub embedding: Tensor,
    /// One a layer.
    pub layers: Vec<Layer>,
    /// (d).
    pub norm: Tensor,
}

/// Weights of a layer.
#[derive(Clone)]
pub(super) struct Layer {
    qkv: Tensor,
    output: Tensor,
    gate_up: Tensor,
    /// (d, m).
    pub down: Tensor,
    input_norm: Tensor,
    mlp_norm: Tensor,
}

/// What is added to `W_down h`.
pub(super) enum Mixture {
    /// Nothing.
    Base,
    /// s B A h of one expert, its gate 1.
    Expert {
        /// (A (r, m), B (d, r)), one a layer.
        layers: Vec<(Tensor, Tensor)>,
        /// s.
        scale: f64,
    },
    /// Both experts, each weighed by its gate.
    Routed(Vec<RoutedLayer>),
}

/// Both experts of a layer and their gates.
pub(super) struct RoutedLayer {
    /// [A_s ; A_h]: (2r, m).
    pub low: Tensor,
    /// [s B_s | s B_h]: (d, 2r).
    pub high: Tensor,
    /// Where the gates come from.
    pub gating: Gating,
}

/// Where gates come from.
pub(super) enum Gating {
    /// The folded router: weight (2, m), bias (2).
    Learned {
        /// a and b.
        weight: Tensor,
        /// a0 and b0.
        bias: Tensor,
    },
    /// The same for every token: alpha, beta.
    Fixed([f32; 2]),
}

/// What a forward pass leaves.
pub(super) struct Hidden {
    /// (n, d): the residual stream before the last norm.
    pub x: Tensor,
    /// (n, 2) a layer; empty where there is no router.
    pub gates: Vec<Tensor>,
}

impl Llama {
    /// Takes the tensors of `weights::Weights::trunk`, in its order; `None` when there are too few. The rest is the caller's.
    pub(super) fn take(
        shape: &Arc<Shape>,
        tensors: &mut impl Iterator<Item = Tensor>,
    ) -> Option<Self> {
        let embedding = tensors.next()?;
        let mut layers = Vec::with_capacity(shape.config.num_layers);
        for _ in 0..shape.config.num_layers {
            layers.push(Layer {
                qkv: tensors.next()?,
                output: tensors.next()?,
                gate_up: tensors.next()?,
                down: tensors.next()?,
                input_norm: tensors.next()?,
                mlp_norm: tensors.next()?,
            });
        }
        Some(Self {
            shape: Arc::clone(shape),
            embedding,
            layers,
            norm: tensors.next()?,
        })
    }

    /// Sequences of `lengths` tokens, their `ids` end to end.
    pub(super) fn forward(
        &self,
        ids: &[usize],
        lengths: &[usize],
        mixture: &Mixture,
    ) -> Result<Hidden> {
        let eps = self.shape.config.rms_norm_eps;
        let mut x = ops::select_rows(&self.embedding, ids.to_vec())?;
        let mut gates = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = ops::rms_norm(&x, &layer.input_norm, eps)?;
            let qkv = ops::linear(&normed, &layer.qkv)?;
            let rope = Arc::clone(&self.shape.rope);
            let attended = ops::attention(&qkv, self.shape.heads(), rope, lengths)?;
            x = (x + ops::linear(&attended, &layer.output)?)?;
            let normed = ops::rms_norm(&x, &layer.mlp_norm, eps)?;
            let h = ops::silu_mul(&ops::linear(&normed, &layer.gate_up)?)?;
            x = (x + ops::linear(&h, &layer.down)?)?;
            if let Some(mixed) = mixture.layer(index, &h, &mut gates)? {
                x = (x + mixed)?;
            }
        }
        Ok(Hidden { x, gates })
    }

    /// The last norm of some rows.
    pub(super) fn normed_rows(&self, x: &Tensor, rows: Vec<usize>) -> Result<Tensor> {
        let rows = ops::select_rows(x, rows)?;
        ops::rms_norm(&rows, &self.norm, self.shape.config.rms_norm_eps)
    }
}

impl Mixture {
    /// What layer `index` adds, (n, d), of h (n, m).
    fn layer(&self, index: usize, h: &Tensor, gates: &mut Vec<Tensor>) -> Result<Option<Tensor>> {
        match self {
            Self::Base => Ok(None),
            Self::Expert { layers, scale } => {
                let Some((a, b)) = layers.get(index) else {
                    return Ok(None);
                };
                let low = ops::linear(h, a)?.affine(*scale, 0.0)?;
                ops::linear(&low, b).map(Some)
            }
            Self::Routed(layers) => {
                let Some(layer) = layers.get(index) else {
                    return Ok(None);
                };
                let gate = layer.gating.gates(h)?;
                let u = ops::mix(&ops::linear(h, &layer.low)?, &gate)?;
                gates.push(gate);
                ops::linear(&u, &layer.high).map(Some)
            }
        }
    }
}

impl Gating {
    /// (n, 2) of h (n, m).
    fn gates(&self, h: &Tensor) -> Result<Tensor> {
        match self {
            Self::Learned { weight, bias } => ops::gates(&ops::linear(h, weight)?, bias),
            Self::Fixed(gates) => {
                let gates = Tensor::new(gates, h.device())?.unsqueeze(0)?;
                gates.broadcast_as((h.dim(0)?, 2))?.contiguous()
            }
        }
    }
}
