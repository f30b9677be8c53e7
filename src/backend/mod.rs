//! Devices: what a backend can do ([`Backend`], contracts in [`ops`]), what that means ([`mod@reference`]), and the real ones.

pub mod cpu;
pub mod cuda;
#[cfg(feature = "cuda")]
pub mod device;
mod e4m3;
mod error;
mod open;
pub mod ops;
pub mod reference;
mod sample;
mod step;

pub use error::BackendError;
pub use open::{
    DeviceBytes, DeviceChoice, DeviceLimits, UseBackend, UseBackends, device_limits, open,
    open_each,
};
pub use sample::{SampleFault, SampleRow, Sampled};
pub use step::{HostSequence, HostStep, StepLayout, StepLimits, StepSequence, Workload};

use half::bf16;

use crate::dtype::{BlockType, DType};

/// Rows of equal width.
pub trait Shaped {
    /// Rows that fit.
    fn rows(&self) -> usize;
    /// Numbers in a row.
    fn width(&self) -> usize;
}

/// A linear map in a backend's own layout: W (o, k), and an optional extension X (o, w).
pub trait Matrix {
    /// o.
    fn outputs(&self) -> usize;
    /// k.
    fn inputs(&self) -> usize;
    /// w, or 0.
    fn extension_inputs(&self) -> usize;
    /// Bytes on the device.
    fn bytes(&self) -> usize;
}

/// A matrix on the host: row-major (rows, cols), each row a whole number of blocks of `dtype`.
#[derive(Clone, Copy, Debug)]
pub struct HostMatrix<'a> {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Format of the elements.
    pub dtype: DType,
    /// `rows * dtype.bytes_of(cols)` bytes.
    pub bytes: &'a [u8],
}

impl HostMatrix<'_> {
    /// Row `i`, widened into `out` (cols).
    ///
    /// # Panics
    /// When the matrix was not checked (`ops::bind_parts`) or `i` is not below its rows.
    pub fn widen_row(&self, i: usize, out: &mut [f32]) {
        self.dtype.widen(self.row_bytes(i), out);
    }

    /// Row `i` as stored.
    ///
    /// # Panics
    /// As [`Self::widen_row`].
    pub fn row_bytes(&self, i: usize) -> &[u8] {
        let row = self.bytes.len() / self.rows;
        &self.bytes[i * row..][..row]
    }
}

/// In which format a backend keeps weights. What block formats are multiplied by differs ([`ops::MATMUL`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// As stored in the file.
    #[default]
    Stored,
    /// Floats widened to f32. Block formats are widened too, exactly, as they are used, and meet x in f32.
    F32,
    /// Floats rounded to bf16 (to nearest, ties to even); block formats as they are.
    BF16,
    /// Everything quantised into a block format, from whatever it was; bf16 where a row is no whole number of blocks.
    Block(BlockType),
}

impl WeightFormat {
    /// In which format rows of `cols` numbers stored as `dtype` are kept.
    pub fn kept(self, dtype: DType, cols: usize) -> DType {
        match self {
            Self::Block(block) => block.kept(cols),
            _ if dtype.is_quantised() => dtype,
            Self::Stored => dtype,
            Self::F32 => DType::F32,
            Self::BF16 => DType::BF16,
        }
    }
}

/// Storage of K and V.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvFormat {
    /// Half the bytes; K and V rounded to nearest even.
    #[default]
    BF16,
    /// Exact.
    F32,
    /// A byte a number and a scale a head: [`ops::quantise_head`].
    FP8,
    /// A byte a number and a scale a head: [`ops::HeadScale`].
    INT8,
}

impl KvFormat {
    /// Bytes of one position's K or V of a head of `size` numbers.
    pub fn head_bytes(self, size: usize) -> usize {
        match self {
            Self::BF16 => 2 * size,
            Self::F32 => 4 * size,
            Self::FP8 => size + size_of::<f32>(),
            Self::INT8 => size + size_of::<bf16>(),
        }
    }
}

/// Shape of a K/V cache: `blocks` blocks of [`crate::types::BLOCK_TOKENS`] positions in each layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// Blocks in each layer.
    pub blocks: usize,
    /// K/V heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_size: usize,
    /// Storage.
    pub format: KvFormat,
}

impl KvShape {
    /// Bytes of one block over all layers, K and V together.
    pub fn block_bytes(&self) -> usize {
        let head = self.format.head_bytes(self.head_size);
        2 * self.layers * self.kv_heads * crate::types::BLOCK_TOKENS * head
    }
}

/// Asks a backend for all ops of a step of so many rows.
pub type RecordedPass<'a, B> =
    dyn FnMut(&mut B, &<B as Backend>::Step, usize) -> Result<(), BackendError> + 'a;

/// A device that holds weights and buffers and runs the ops of [`ops`].
///
/// Every op writes into buffers made beforehand: a step allocates nothing. What each of them takes is arithmetic, so that a device's
/// memory can be shared out before anything is made: `NAME_bytes` is what `NAME` takes for the same arguments. An op's result for a row depends on that row's
/// inputs alone, to the bit, whatever else is in the batch (batch invariance).
pub trait Backend: Sized + Send + 'static {
    /// Activations, `rows` x `width`; f32 as seen from the host.
    type Buffer: Shaped + Send;
    /// A linear map in this backend's layout.
    type Matrix: Matrix + Send;
    /// K and V of all layers.
    type KvCache: Send;
    /// What the ops must know of the current step, on the device.
    type Step: Send;

    /// The word used in flags and logs.
    fn name(&self) -> &'static str;

    /// Whether block formats meet x in int8 here ([`ops::MATMUL`]); elsewhere they are widened once, and small matrices lose by them.
    fn quantises(&self) -> bool {
        true
    }

    /// Stacks `parts` (equal cols, any formats) along their rows into one matrix, with `extension` (same rows in all) behind
    /// its columns. Parts are kept as `format` says; the extension as it comes, f32, bf16 or q8_0.
    fn matrix(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<Self::Matrix, BackendError>;

    /// E of [`ops::SILU_MUL_EXPERT_MIX`]: A_s and A_h (w, m) over the rows of both gates (2, m), which every backend keeps in f32.
    fn experts(
        &self,
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
    ) -> Result<Self::Matrix, BackendError> {
        self.matrix(&[lora_a, gates], None, WeightFormat::Stored)
    }

    /// Of [`Self::matrix`], which refuses the same.
    fn matrix_bytes(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<usize, BackendError>;

    /// Of [`Self::experts`].
    fn experts_bytes(
        &self,
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
    ) -> Result<usize, BackendError> {
        self.matrix_bytes(&[lora_a, gates], None, WeightFormat::Stored)
    }

    /// A zeroed buffer of activations, which a backend may keep in two bytes a number.
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer, BackendError>;

    /// A zeroed buffer of f32 on every device: what each op says is `exact` (residual stream, weights of norms, tables, gates, logits).
    fn exact_buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer, BackendError> {
        self.buffer(rows, width)
    }

    /// Of [`Self::buffer`].
    fn buffer_bytes(&self, rows: usize, width: usize) -> usize;

    /// Of [`Self::exact_buffer`].
    fn exact_buffer_bytes(&self, rows: usize, width: usize) -> usize {
        self.buffer_bytes(rows, width)
    }

    /// Overwrites the first rows of `buffer` with `values` (whole rows).
    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]) -> Result<(), BackendError>;

    /// Starts the way of the first `rows` rows to the host behind what was asked for so far, where that takes time: the next
    /// [`Self::read`] of as many gives them as they are then.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn fetch(&self, buffer: &mut Self::Buffer, rows: usize) -> Result<(), BackendError> {
        let _ = (buffer, rows);
        Ok(())
    }

    /// The first `rows` rows of `buffer`, after all ops so far.
    fn read<'a>(
        &'a self,
        buffer: &'a mut Self::Buffer,
        rows: usize,
    ) -> Result<&'a [f32], BackendError>;

    /// A cache for K and V. No op reads a position before it was written, so a block may hold anything, NaN too, when it changes
    /// hands.
    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache, BackendError>;

    /// Of each block of [`Self::kv_cache`], which refuses the same; beside its blocks a cache takes no more than rounds it up.
    fn kv_block_bytes(&self, shape: KvShape) -> Result<usize, BackendError> {
        Ok(shape.block_bytes())
    }

    /// Room for steps within `limits`.
    fn step(&self, limits: StepLimits) -> Result<Self::Step, BackendError>;

    /// Makes what ops need beside their operands, for all steps of `work`: none of them allocates afterwards. Without it they
    /// make it as they need it.
    fn reserve(&mut self, work: &Workload) -> Result<(), BackendError>;

    /// Of [`Self::step`] and [`Self::reserve`] together.
    fn workspace_bytes(&self, work: &Workload) -> usize;

    /// Checks `layout` against the limits of `step` and makes it the current one.
    fn load_step(&self, layout: &StepLayout<'_>, step: &mut Self::Step)
    -> Result<(), BackendError>;

    /// Records what `pass(backend, step, rows)` asks for, where steps are replayed faster than they are asked for: all ops of a step of
    /// so many rows with logits of each. [`Self::replay`] then does steps in which every sequence has one row. The buffers that `pass`
    /// gives to ops must live as long as `step` is loaded with steps. Returns how many shapes were recorded: none where a device has no use for it.
    ///
    /// # Errors
    /// Those of `pass`. A device that refuses to record is no error.
    fn record(
        &mut self,
        step: &mut Self::Step,
        pass: &mut RecordedPass<'_, Self>,
    ) -> Result<usize, BackendError> {
        let _ = (step, pass);
        Ok(0)
    }

    /// Does all ops of the loaded step, as they were recorded. `false`: none of the recordings fits it; ask for each.
    ///
    /// # Errors
    /// The device.
    fn replay(&mut self, step: &Self::Step) -> Result<bool, BackendError> {
        let _ = step;
        Ok(false)
    }

    /// [`ops::EMBED`].
    fn embed(&mut self, args: ops::Embed<'_, Self>) -> Result<(), BackendError>;
    /// [`ops::RMS_NORM`].
    fn rms_norm(&mut self, args: ops::RmsNorm<'_, Self>) -> Result<(), BackendError>;
    /// [`ops::MATMUL`].
    fn matmul(&mut self, args: ops::MatMul<'_, Self>) -> Result<(), BackendError>;
    /// [`ops::ROPE_KV_WRITE`].
    fn rope_kv_write(&mut self, args: ops::RopeKvWrite<'_, Self>) -> Result<(), BackendError>;
    /// [`ops::ATTENTION`].
    fn attention(&mut self, args: ops::Attention<'_, Self>) -> Result<(), BackendError>;
    /// [`ops::SILU_MUL_EXPERT_MIX`].
    fn silu_mul_expert_mix(
        &mut self,
        args: ops::SiluMulExpertMix<'_, Self>,
    ) -> Result<(), BackendError>;
    /// [`ops::EXPERT_MIX`].
    fn expert_mix(&mut self, args: ops::ExpertMix<'_, Self>) -> Result<(), BackendError>;
    /// [`ops::GATHER_ROWS`].
    fn gather_rows(&mut self, args: ops::GatherRows<'_, Self>) -> Result<(), BackendError>;

    /// Whether it is worth asking [`Self::sample`].
    fn samples(&self) -> bool {
        false
    }

    /// Samples a token from each of the first rows of `logits` (r, vocabulary), as `rows` (r) say, for [`Self::sampled`] to tell. The tokens are
    /// those of the engine's sampler, to the bit. `false`: not here, or not as much as [`Self::reserve`] made room for; nothing was done.
    ///
    /// # Errors
    /// Fewer or inexact logits; more than 20 most likely tokens; fewer bits of a grammar than tokens; the device.
    fn sample(&mut self, logits: &Self::Buffer, rows: &[SampleRow]) -> Result<bool, BackendError> {
        let _ = (logits, rows);
        Ok(false)
    }

    /// What the last [`Self::sample`], of the same `rows`, drew; waits for it. `sampled` keeps its room.
    ///
    /// # Errors
    /// Other rows than were sampled; the device.
    fn sampled(&mut self, rows: &[SampleRow], sampled: &mut Sampled) -> Result<(), BackendError> {
        let _ = (rows, sampled);
        Ok(())
    }
}
