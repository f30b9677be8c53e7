//! The routed Llama over any [`Backend`], written once. Owns the weights, the K/V cache and every activation buffer, all made
//! at load: a forward pass allocates nothing.

mod collective;
mod error;
mod footprint;
mod in_process;
mod layer;
mod pass;
mod shard;
mod weights;

pub use collective::Collective;
pub use error::ModelError;
pub use footprint::{kv_block_bytes, weight_bytes, workspace_bytes};
pub use in_process::InProcess;
pub use shard::Shard;

use crate::backend::{
    Backend, BackendError, KvFormat, KvShape, SampleRow, Sampled, StepLayout, StepLimits,
    WeightFormat,
};
use crate::checkpoint::{Checkpoint, LlamaConfig, rope_table};
use crate::types::TokenId;
use collective::Rank;
use layer::Activations;
use pass::Pass;
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
    /// Whether the device has sampled.
    pub sampled: bool,
}

/// A batch that a device was asked for: [`RoutedLlama::collect`] takes what comes of it.
#[derive(Debug)]
#[must_use]
pub struct Submitted {
    rows: usize,
    logit_rows: usize,
    sampled: bool,
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
    /// Of this rank's part.
    config: LlamaConfig,
    rank: Rank<B>,
    kv_shape: KvShape,
    limits: StepLimits,
    routed: bool,
    fingerprint: String,
    recorded: usize,
    replays: bool,
}

impl<B: Backend> RoutedLlama<B> {
    /// Repacks the weights for `backend` and makes all buffers. `checkpoint` may be dropped afterwards.
    ///
    /// # Errors
    /// When the device has no room, or a tensor breaks an op's contract.
    pub fn new(
        backend: B,
        checkpoint: &Checkpoint,
        options: ModelOptions,
    ) -> Result<Self, ModelError> {
        Self::build(backend, checkpoint, options, Rank(None))
    }

    /// As [`Self::new`], of the part that is this rank's. All ranks must then be given the same steps; each computes all logits and gates.
    ///
    /// # Errors
    /// As [`Self::new`], and heads, widths or blocks that ranks cannot share evenly.
    pub fn sharded(
        backend: B,
        checkpoint: &Checkpoint,
        options: ModelOptions,
        ranks: Box<dyn Collective<B>>,
    ) -> Result<Self, ModelError> {
        Self::build(backend, checkpoint, options, Rank(Some(ranks)))
    }

    fn build(
        mut backend: B,
        checkpoint: &Checkpoint,
        options: ModelOptions,
        rank: Rank<B>,
    ) -> Result<Self, ModelError> {
        let shard = rank.shard();
        let config = shard.config(&checkpoint.config)?;
        let kv_shape = footprint::kv_shape(&config, options.kv_blocks, options.kv_format);
        let limits = footprint::limits(&config, &options);
        let weights = Weights::upload(&backend, checkpoint, options.weight_format, shard)?;
        let mut rope = backend.exact_buffer(options.positions, config.head_dim)?;
        backend.write(&mut rope, &rope_table(&config, options.positions))?;
        backend.reserve(&footprint::workload(checkpoint, &config, &options))?;
        let width = footprint::expert_width(checkpoint);
        let mut model = Self {
            cache: backend.kv_cache(kv_shape)?,
            step: backend.step(limits)?,
            activations: Activations::new(&backend, &config, &options, width, shard)?,
            weights,
            rope,
            kv_shape,
            limits,
            routed: checkpoint.experts.is_some(),
            fingerprint: checkpoint.fingerprint.clone(),
            recorded: 0,
            replays: true,
            config,
            rank,
            backend,
        };
        // Ranks meet outside of what a device can record.
        if shard.is_whole() {
            model.record()?;
        }
        Ok(model)
    }

    /// Runs one ragged batch: writes K and V of its rows, returns the logits of its `logit_rows` and the gates of all rows.
    ///
    /// # Errors
    /// A layout outside the model's limits, or a device error; the K/V of the step's rows are then undefined.
    pub fn forward(&mut self, layout: &StepLayout<'_>) -> Result<StepOutput<'_>, BackendError> {
        let submitted = self.submit(layout, &[])?;
        self.collect(submitted, &[], &mut Sampled::default())
    }

    /// Asks the device for one ragged batch, and to sample a token from each of its `logit_rows` as `rows` say, if there are any and the
    /// device does that ([`Self::samples`]): then no logits come back. Where the device works by itself, this returns before it is done;
    /// [`Self::collect`] comes before the next batch.
    ///
    /// # Errors
    /// As [`Self::forward`], and [`Backend::sample`]'s.
    pub fn submit(
        &mut self,
        layout: &StepLayout<'_>,
        rows: &[SampleRow],
    ) -> Result<Submitted, BackendError> {
        self.compute(layout)?;
        let (backend, act) = (&mut self.backend, &mut self.activations);
        let submitted = Submitted {
            rows: layout.tokens.len(),
            logit_rows: layout.logit_rows.len(),
            sampled: !rows.is_empty() && backend.sample(&act.logits, rows)?,
        };
        if !submitted.sampled {
            backend.fetch(&mut act.logits, submitted.logit_rows)?;
        }
        if self.routed {
            backend.fetch(&mut act.gates, submitted.rows)?;
        }
        Ok(submitted)
    }

    /// Waits for a batch, which was given the same `rows`, and takes what came of it.
    ///
    /// # Errors
    /// A device error; the K/V of the step's rows are then undefined.
    pub fn collect(
        &mut self,
        submitted: Submitted,
        rows: &[SampleRow],
        sampled: &mut Sampled,
    ) -> Result<StepOutput<'_>, BackendError> {
        if submitted.sampled {
            self.backend.sampled(rows, sampled)?;
        }
        let (backend, act) = (&self.backend, &mut self.activations);
        Ok(StepOutput {
            logits: match submitted.sampled {
                true => &[],
                false => backend.read(&mut act.logits, submitted.logit_rows)?,
            },
            gates: match self.routed {
                true => backend.read(&mut act.gates, submitted.rows)?,
                false => &[],
            },
            sampled: submitted.sampled,
        })
    }

    /// Whether the device samples.
    pub fn samples(&self) -> bool {
        self.backend.samples()
    }

    /// Runs one ragged batch up to its logits.
    fn compute(&mut self, layout: &StepLayout<'_>) -> Result<(), BackendError> {
        self.backend.load_step(layout, &mut self.step)?;
        if self.replays && self.backend.replay(&self.step)? {
            return Ok(());
        }
        let rows = (layout.tokens.len(), layout.logit_rows.len());
        let (mut pass, backend, step) = self.pass();
        let done = pass.run(backend, step, rows);
        if done.is_err() {
            self.rank.abort();
        }
        done
    }

    /// Has the backend record the steps that it replays.
    fn record(&mut self) -> Result<(), BackendError> {
        let (mut pass, backend, step) = self.pass();
        let mut run = |backend: &mut B, step: &B::Step, rows| pass.run(backend, step, (rows, rows));
        self.recorded = backend.record(step, &mut run)?;
        Ok(())
    }

    fn pass(&mut self) -> (Pass<'_, B>, &mut B, &mut B::Step) {
        let pass = Pass {
            weights: &self.weights,
            rope: &self.rope,
            cache: &mut self.cache,
            activations: &mut self.activations,
            config: &self.config,
            rank: &mut self.rank,
        };
        (pass, &mut self.backend, &mut self.step)
    }

    /// Shapes of decode steps that the backend has recorded.
    pub fn recorded(&self) -> usize {
        self.recorded
    }

    /// Whether steps that fit a recording are replayed, which is the default, or all are asked for op by op.
    pub fn set_replays(&mut self, replays: bool) {
        self.replays = replays;
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
