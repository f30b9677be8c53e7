//! One layer of the forward pass, and the buffers between ops.

use super::ModelOptions;
use super::collective::Rank;
use super::footprint::Store;
use super::shard::Shard;
use super::weights::LayerWeights;
use crate::backend::ops::{self, Heads};
use crate::backend::{Backend, BackendError};
use crate::checkpoint::LlamaConfig;

/// The buffers between ops, each as large as the largest step.
pub(super) struct Activations<S: Store> {
    /// (rows, d): the residual stream.
    pub x: S::Buffer,
    /// (rows, d).
    normed: S::Buffer,
    /// (rows, q + k + v).
    qkv: S::Buffer,
    /// (rows, q).
    attention: S::Buffer,
    /// (rows, 2m).
    gate_up: S::Buffer,
    /// (rows, m + w): [h ; u]; (rows, m) where ranks share m.
    hu: S::Buffer,
    /// Where ranks share m.
    apart: Option<Apart<S>>,
    /// (rows, 2L).
    pub gates: S::Buffer,
    /// (logit rows, d).
    pub head_x: S::Buffer,
    /// (logit rows, d).
    pub head_normed: S::Buffer,
    /// (logit rows, vocabulary).
    pub logits: S::Buffer,
}

/// The experts' half of a layer, apart from h.
struct Apart<S: Store> {
    /// (rows, w + 2): this rank's part of E h, then the sum.
    z: S::Buffer,
    /// (rows, w).
    u: S::Buffer,
}

impl<S: Store> Activations<S> {
    pub(super) fn new(
        store: &S,
        config: &LlamaConfig,
        options: &ModelOptions,
        expert_width: usize,
        shard: Shard,
    ) -> Result<Self, BackendError> {
        let (rows, logit_rows) = (options.rows, options.logit_rows);
        let (d, m) = (config.hidden_size, config.intermediate_size);
        let heads = heads(config);
        let behind_h = if shard.is_whole() { expert_width } else { 0 };
        let apart = (behind_h < expert_width).then(|| {
            Ok::<_, BackendError>(Apart {
                z: store.exact_buffer(rows, expert_width + 2)?,
                u: store.buffer(rows, expert_width)?,
            })
        });
        Ok(Self {
            x: store.exact_buffer(rows, d)?,
            normed: store.buffer(rows, d)?,
            qkv: store.buffer(rows, heads.qkv_width())?,
            attention: store.buffer(rows, heads.query * heads.size)?,
            gate_up: store.buffer(rows, 2 * m)?,
            hu: store.buffer(rows, m + behind_h)?,
            apart: apart.transpose()?,
            gates: store.exact_buffer(rows, 2 * config.num_layers)?,
            head_x: store.exact_buffer(logit_rows, d)?,
            head_normed: store.buffer(logit_rows, d)?,
            logits: store.exact_buffer(logit_rows, config.vocab_size)?,
        })
    }
}

/// Where in the pass a layer is.
pub(super) struct Place<'a, B: Backend> {
    /// Which layer.
    pub index: usize,
    /// n.
    pub rows: usize,
    /// This step.
    pub step: &'a B::Step,
    /// Shape and constants.
    pub config: &'a LlamaConfig,
    /// (positions, head_dim).
    pub rope: &'a B::Buffer,
}

pub(super) fn heads(config: &LlamaConfig) -> Heads {
    Heads {
        query: config.num_heads,
        kv: config.num_kv_heads,
        size: config.head_dim,
    }
}

/// x += attention(norm(x)); x += routed_mlp(norm(x)).
pub(super) fn forward<B: Backend>(
    backend: &mut B,
    layer: &LayerWeights<B>,
    place: &Place<'_, B>,
    cache: &mut B::KvCache,
    act: &mut Activations<B>,
    rank: &mut Rank<B>,
) -> Result<(), BackendError> {
    attention(backend, layer, place, cache, act, rank)?;
    routed_mlp(backend, layer, place, act, rank)
}

fn attention<B: Backend>(
    backend: &mut B,
    weights: &LayerWeights<B>,
    place: &Place<'_, B>,
    cache: &mut B::KvCache,
    act: &mut Activations<B>,
    rank: &mut Rank<B>,
) -> Result<(), BackendError> {
    let (n, layer, heads) = (place.rows, place.index, heads(place.config));
    let Activations {
        x,
        normed,
        qkv,
        attention,
        ..
    } = act;
    let eps = place.config.rms_norm_eps;
    backend.rms_norm(ops::RmsNorm {
        n,
        x,
        weight: &weights.input_norm,
        eps,
        y: normed,
    })?;
    backend.matmul(ops::MatMul {
        n,
        x: normed,
        w: &weights.qkv,
        y: qkv,
        add: false,
    })?;
    backend.rope_kv_write(ops::RopeKvWrite {
        step: place.step,
        layer,
        heads,
        rope: place.rope,
        qkv,
        cache,
    })?;
    backend.attention(ops::Attention {
        step: place.step,
        layer,
        heads,
        qkv,
        cache,
        y: attention,
    })?;
    backend.matmul(ops::MatMul {
        n,
        x: attention,
        w: &weights.output,
        y: x,
        add: rank.adds(),
    })?;
    rank.all_reduce(backend, n, &mut [x])
}

/// x += W_down h + s_s alpha(h) S(h) + s_h beta(h) H(h), h = silu(W_gate y) * W_up y, y = norm(x) (MIDPO.md 1).
fn routed_mlp<B: Backend>(
    backend: &mut B,
    weights: &LayerWeights<B>,
    place: &Place<'_, B>,
    act: &mut Activations<B>,
    rank: &mut Rank<B>,
) -> Result<(), BackendError> {
    let (n, layer, eps) = (place.rows, place.index, place.config.rms_norm_eps);
    let Activations {
        x,
        normed,
        gate_up,
        hu,
        apart,
        gates,
        ..
    } = act;
    backend.rms_norm(ops::RmsNorm {
        n,
        x,
        weight: &weights.mlp_norm,
        eps,
        y: normed,
    })?;
    backend.matmul(ops::MatMul {
        n,
        x: normed,
        w: &weights.gate_up,
        y: gate_up,
        add: false,
    })?;
    let experts = weights.experts.as_ref().map(|(e, shape)| (e, *shape));
    backend.silu_mul_expert_mix(ops::SiluMulExpertMix {
        step: place.step,
        layer,
        gate_up,
        experts,
        hu,
        gates,
        z: apart.as_mut().map(|apart| &mut apart.z),
    })?;
    backend.matmul(ops::MatMul {
        n,
        x: hu,
        w: &weights.down,
        y: x,
        add: rank.adds(),
    })?;
    match (apart, experts, &weights.lora_b) {
        (Some(Apart { z, u }), Some((_, shape)), Some(lora_b)) => {
            rank.all_reduce(backend, n, &mut [x, z])?;
            backend.expert_mix(ops::ExpertMix {
                step: place.step,
                layer,
                shape,
                z,
                u,
                gates,
            })?;
            backend.matmul(ops::MatMul {
                n,
                x: u,
                w: lora_b,
                y: x,
                add: true,
            })
        }
        _ => rank.all_reduce(backend, n, &mut [x]),
    }
}
