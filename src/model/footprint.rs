//! What a model takes on a device, by arithmetic alone: the code that fills the device, run over a [`Ledger`] instead.

use std::cell::Cell;

use super::layer::{Activations, heads};
use super::shard::Shard;
use super::weights::Weights;
use super::{ModelError, ModelOptions};
use crate::backend::{
    Backend, BackendError, HostMatrix, KvFormat, KvShape, StepLimits, WeightFormat, Workload,
};
use crate::checkpoint::{Checkpoint, Experts, HostTensor, LlamaConfig};

/// Where weights and buffers go: to a backend, or into a [`Ledger`].
pub(super) trait Store {
    type Matrix;
    type Buffer;

    /// As [`Backend::quantises`].
    fn quantises(&self) -> bool;

    /// As [`Backend::matrix`].
    fn matrix(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<Self::Matrix, BackendError>;

    /// As [`Backend::experts`].
    fn experts(
        &self,
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
    ) -> Result<Self::Matrix, BackendError>;

    /// As [`Backend::buffer`].
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer, BackendError>;

    /// As [`Backend::exact_buffer`].
    fn exact_buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer, BackendError>;

    /// Fills an exact buffer.
    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]) -> Result<(), BackendError>;
}

impl<B: Backend> Store for B {
    type Matrix = B::Matrix;
    type Buffer = B::Buffer;

    fn quantises(&self) -> bool {
        Backend::quantises(self)
    }

    fn matrix(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<B::Matrix, BackendError> {
        Backend::matrix(self, parts, extension, format)
    }

    fn experts(
        &self,
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
    ) -> Result<B::Matrix, BackendError> {
        Backend::experts(self, lora_a, gates)
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<B::Buffer, BackendError> {
        Backend::buffer(self, rows, width)
    }

    fn exact_buffer(&self, rows: usize, width: usize) -> Result<B::Buffer, BackendError> {
        Backend::exact_buffer(self, rows, width)
    }

    fn write(&self, buffer: &mut B::Buffer, values: &[f32]) -> Result<(), BackendError> {
        Backend::write(self, buffer, values)
    }
}

/// Counts the bytes that `backend` would take.
struct Ledger<'a, B> {
    backend: &'a B,
    bytes: Cell<u64>,
}

impl<'a, B> Ledger<'a, B> {
    fn new(backend: &'a B) -> Self {
        Self {
            backend,
            bytes: Cell::new(0),
        }
    }

    fn add(&self, bytes: usize) {
        self.bytes
            .set(self.bytes.get().saturating_add(bytes as u64));
    }
}

impl<B: Backend> Store for Ledger<'_, B> {
    type Matrix = ();
    type Buffer = ();

    fn quantises(&self) -> bool {
        self.backend.quantises()
    }

    fn matrix(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<(), BackendError> {
        self.add(self.backend.matrix_bytes(parts, extension, format)?);
        Ok(())
    }

    fn experts(&self, lora_a: HostMatrix<'_>, gates: HostMatrix<'_>) -> Result<(), BackendError> {
        self.add(self.backend.experts_bytes(lora_a, gates)?);
        Ok(())
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<(), BackendError> {
        self.add(self.backend.buffer_bytes(rows, width));
        Ok(())
    }

    fn exact_buffer(&self, rows: usize, width: usize) -> Result<(), BackendError> {
        self.add(self.backend.exact_buffer_bytes(rows, width));
        Ok(())
    }

    fn write(&self, (): &mut (), _: &[f32]) -> Result<(), BackendError> {
        Ok(())
    }
}

/// Bytes of the weights of `checkpoint`, norms too.
///
/// # Errors
/// What loading it would say of its tensors or of `format`.
pub fn weight_bytes<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    format: WeightFormat,
) -> Result<u64, ModelError> {
    let ledger = Ledger::new(backend);
    Weights::upload(&ledger, checkpoint, format, Shard::WHOLE)?;
    Ok(ledger.bytes.get())
}

/// Bytes of all that is neither weights nor K/V: buffers between ops, the table of rotations, a step's lists, what ops work in.
///
/// # Errors
/// None that a backend knows now.
pub fn workspace_bytes<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    options: &ModelOptions,
) -> Result<u64, ModelError> {
    let ledger = Ledger::new(backend);
    let config = &checkpoint.config;
    Activations::new(
        &ledger,
        config,
        options,
        expert_width(checkpoint),
        Shard::WHOLE,
    )?;
    ledger.exact_buffer(options.positions, config.head_dim)?;
    ledger.add(backend.workspace_bytes(&workload(checkpoint, config, options)));
    Ok(ledger.bytes.get())
}

/// Bytes of a block of the K/V cache over all layers.
///
/// # Errors
/// A `format` that the backend does not have.
pub fn kv_block_bytes<B: Backend>(
    backend: &B,
    config: &LlamaConfig,
    format: KvFormat,
) -> Result<usize, BackendError> {
    backend.kv_block_bytes(kv_shape(config, 1, format))
}

pub(super) fn kv_shape(config: &LlamaConfig, blocks: usize, format: KvFormat) -> KvShape {
    KvShape {
        layers: config.num_layers,
        blocks,
        kv_heads: config.num_kv_heads,
        head_size: config.head_dim,
        format,
    }
}

/// w: both ranks together, 0 without experts.
pub(super) fn expert_width(checkpoint: &Checkpoint) -> usize {
    checkpoint.experts.as_ref().map_or(0, Experts::width)
}

pub(super) fn limits(config: &LlamaConfig, options: &ModelOptions) -> StepLimits {
    StepLimits {
        rows: options.rows,
        logit_rows: options.logit_rows,
        sequences: options.sequences,
        positions: options.positions,
        blocks: options.kv_blocks,
        vocabulary: config.vocab_size,
    }
}

/// What the ops of this model work on at most; `config` is of this rank's part.
pub(super) fn workload(
    checkpoint: &Checkpoint,
    config: &LlamaConfig,
    options: &ModelOptions,
) -> Workload {
    Workload {
        limits: limits(config, options),
        layers: config.num_layers,
        heads: heads(config),
        mlp_width: config.intermediate_size,
        expert_width: expert_width(checkpoint),
        quantised_inputs: quantised_inputs(checkpoint, options.weight_format),
    }
}

/// Most inputs of a matrix of which a part is kept in a block format that meets x in int8, an extension's among them.
fn quantised_inputs(checkpoint: &Checkpoint, format: WeightFormat) -> usize {
    if format == WeightFormat::F32 {
        return 0;
    }
    let inputs = |tensor: &HostTensor| tensor.shape()[1];
    let quantised =
        |tensor: &&HostTensor| format.kept(tensor.dtype(), inputs(tensor)).is_quantised();
    let matrices = checkpoint.base.matrices().filter(quantised);
    let most = matrices.map(inputs).max();
    most.map_or(0, |most| most + expert_width(checkpoint))
}
