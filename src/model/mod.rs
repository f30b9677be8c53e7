//! The routed Llama over any [`Backend`], written once. Owns the weights, the K/V cache and every activation buffer, all made
//! at load: a forward pass allocates nothing.

mod error;
mod footprint;
mod layer;
mod weights;

pub use error::ModelError;
pub use footprint::{kv_block_bytes, weight_bytes, workspace_bytes};

use crate::backend::{
    Backend, BackendError, KvFormat, KvShape, SampleRow, Sampled, StepLayout, StepLimits,
    WeightFormat, ops,
};
use crate::checkpoint::{Checkpoint, LlamaConfig, rope_table};
use crate::types::TokenId;
use layer::Activations;
use weights::Weights;

/// How a model is laid out in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelOptions {
    /// Most rows (tokens) of a step.
    pub rows: usize,
    /// Most rows of a step whose logits are wanted.
    pub logit_rows: usize,
    /// Most sequences of a step.
    pub sequences: usize,
    /// Context served: prompt and answer together.
    pub positions: usize,
    /// Blocks of K/V cache.
    pub kv_blocks: usize,
    /// Storage of K and V.
    pub kv_format: KvFormat,
    /// Storage of float weights.
    pub weight_format: WeightFormat,
}

/// What a step computed.
#[derive(Clone, Copy, Debug)]
pub struct StepOutput<'a> {
    /// (logit rows, vocabulary), in the order of the layout's `logit_rows`; empty where the device has sampled from them.
    pub logits: &'a [f32],
    /// (rows, 2 * layers): alpha and beta of each layer; empty for a model without experts.
    pub gates: &'a [f32],
}

/// A Llama whose MLPs are `y = W_down h + s (alpha(h) S(h) + beta(h) H(h))` (MIDPO.md 1).
pub struct RoutedLlama<B: Backend> {
    backend: B,
    weights: Weights<B>,
    /// (positions, head_dim): see [`rope_table`].
    rope: B::Buffer,
    cache: B::KvCache,
    step: B::Step,
    activations: Activations<B>,
    config: LlamaConfig,
    kv_shape: KvShape,
    limits: StepLimits,
    routed: bool,
    fingerprint: String,
}

impl<B: Backend> RoutedLlama<B> {
    /// Repacks the weights for `backend` and makes all buffers. `checkpoint` may be dropped afterwards.
    ///
    /// # Errors
    /// When the device has no room, or a tensor breaks an op's contract.
    pub fn new(
        mut backend: B,
        checkpoint: &Checkpoint,
        options: ModelOptions,
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config.clone();
        let kv_shape = footprint::kv_shape(&config, options.kv_blocks, options.kv_format);
        let limits = footprint::limits(&config, &options);
        let weights = Weights::upload(&backend, checkpoint, options.weight_format)?;
        let mut rope = backend.exact_buffer(options.positions, config.head_dim)?;
        backend.write(&mut rope, &rope_table(&config, options.positions))?;
        backend.reserve(&footprint::workload(checkpoint, &options))?;
        let width = footprint::expert_width(checkpoint);
        Ok(Self {
            cache: backend.kv_cache(kv_shape)?,
            step: backend.step(limits)?,
            activations: Activations::new(&backend, &config, &options, width)?,
            weights,
            rope,
            kv_shape,
            limits,
            routed: checkpoint.experts.is_some(),
            fingerprint: checkpoint.fingerprint.clone(),
            config,
            backend,
        })
    }

    /// Runs one ragged batch: writes K and V of its rows, returns the logits of its `logit_rows` and the gates of all rows.
    ///
    /// # Errors
    /// A layout outside the model's limits, or a device error; the K/V of the step's rows are then undefined.
    pub fn forward(&mut self, layout: &StepLayout<'_>) -> Result<StepOutput<'_>, BackendError> {
        self.compute(layout)?;
        self.output(layout, false)
    }

    /// As [`Self::forward`], and samples a token from each of the `logit_rows` as `rows` say, where the device does that
    /// ([`Self::samples`]): then no logits come back. Says whether it did.
    ///
    /// # Errors
    /// As [`Self::forward`], and [`Backend::sample`]'s.
    pub fn forward_and_sample(
        &mut self,
        layout: &StepLayout<'_>,
        rows: &[SampleRow],
        sampled: &mut Sampled,
    ) -> Result<(StepOutput<'_>, bool), BackendError> {
        self.compute(layout)?;
        let logits = &self.activations.logits;
        let done = self.backend.sample(logits, rows, sampled)?;
        Ok((self.output(layout, done)?, done))
    }

    /// Whether the device samples.
    pub fn samples(&self) -> bool {
        self.backend.samples()
    }

    /// What the last step left.
    fn output(
        &mut self,
        layout: &StepLayout<'_>,
        sampled: bool,
    ) -> Result<StepOutput<'_>, BackendError> {
        let (backend, act) = (&self.backend, &mut self.activations);
        Ok(StepOutput {
            logits: match sampled {
                true => &[],
                false => backend.read(&mut act.logits, layout.logit_rows.len())?,
            },
            gates: match self.routed {
                true => backend.read(&mut act.gates, layout.tokens.len())?,
                false => &[],
            },
        })
    }

    /// Runs one ragged batch up to its logits.
    fn compute(&mut self, layout: &StepLayout<'_>) -> Result<(), BackendError> {
        let Self {
            backend,
            weights,
            rope,
            cache,
            step,
            activations: act,
            config,
            ..
        } = self;
        backend.load_step(layout, step)?;
        let (rows, logit_rows) = (layout.tokens.len(), layout.logit_rows.len());
        backend.embed(ops::Embed {
            step,
            table: &weights.embed,
            x: &mut act.x,
        })?;
        for (index, layer) in weights.layers.iter().enumerate() {
            let place = layer::Place {
                index,
                rows,
                config,
                rope,
            };
            layer::forward(backend, layer, &place, step, cache, act)?;
        }
        backend.gather_rows(ops::GatherRows {
            step,
            x: &act.x,
            y: &mut act.head_x,
        })?;
        backend.rms_norm(ops::RmsNorm {
            n: logit_rows,
            x: &act.head_x,
            weight: &weights.norm,
            eps: config.rms_norm_eps,
            y: &mut act.head_normed,
        })?;
        let head = weights.head.as_ref().unwrap_or(&weights.embed);
        backend.matmul(ops::MatMul {
            n: logit_rows,
            x: &act.head_normed,
            w: head,
            y: &mut act.logits,
            add: false,
        })
    }

    /// L.
    pub fn layers(&self) -> usize {
        self.config.num_layers
    }

    /// Tokens in the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.config.vocab_size
    }

    /// Whether there are experts and a router; without, only [`crate::types::Variant::Base`] makes sense.
    pub fn is_routed(&self) -> bool {
        self.routed
    }

    /// Context served.
    pub fn positions(&self) -> usize {
        self.limits.positions
    }

    /// The largest step.
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// Ends of sequence.
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.config.eos_token_ids
    }

    /// Shape of the K/V cache.
    pub fn kv_shape(&self) -> KvShape {
        self.kv_shape
    }

    /// Bytes of the weights on the device.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Bytes of the weights that every decode step reads, whatever its batch: the floor of its time.
    pub fn step_weight_bytes(&self) -> usize {
        self.weights.step_bytes()
    }

    /// Identity of the weights: keys caches.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}
