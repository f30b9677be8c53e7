//! The CUDA backend's host code: what is launched, with which grid, over which memory. [`Cuda`] runs over any [`Driver`]: a device's, or the
//! emulation of the same kernels on the CPU, with which `cargo test` holds it to `backend::reference`.
//!
//! Activations, weights, K and V are two bytes a number; sums, the residual stream, gates and logits are f32.

#![allow(unsafe_code)]

mod attention;
mod driver;
mod gemm;
mod graphs;
mod memory;
mod mix;
mod sample;
mod scratch;
mod staging;
mod step;
mod tiles;

use std::cell::RefCell;

pub use driver::{Arg, DeviceShape, Driver, Gemm, Kernel, Launch, Storage};
pub use memory::{Buffer, DeviceCache, DeviceMatrix};
pub use step::DeviceStep;

use super::ops::{
    self, Attention, Embed, ExpertMix, GatherRows, MatMul, RmsNorm, RopeKvWrite, SiluMulExpertMix,
    bind_read, bind_write,
};
use super::{
    Backend, BackendError, HostMatrix, KvFormat, KvShape, RecordedPass, SampleRow, Sampled,
    StepLayout, StepLimits, WeightFormat, Workload,
};
use driver::kernel;
use gemm::skinny_rooms;
use memory::{Kept, matrix_bytes};
use mix::Rooms;
use sample::{SampleRooms, SampleScratch};
use scratch::Scratch;
use staging::Staging;
use tiles::{
    EMBED_THREADS, GATHER_THREADS, HEAD_SIZE_MAX, NORM_THREADS, PREFILL_ROWS, ROPE_THREADS,
};

/// How the device is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// How activations, weights, K and V are kept.
    pub storage: Storage,
    /// Products by `kernels/gemm.cu` alone, whose order of additions does not depend on the batch.
    pub deterministic: bool,
    /// Decode steps are recorded and replayed.
    pub graphs: bool,
}

/// The backend over `D`.
pub struct Cuda<D: Driver> {
    driver: D,
    options: CudaOptions,
    /// Of silu_mul_expert_mix: partial sums of its blocks, and how many have arrived.
    mix_partials: Scratch<D>,
    mix_arrived: Scratch<D>,
    /// Of products of few rows: partial sums of splits, and how many blocks have arrived.
    skinny_partials: Scratch<D>,
    skinny_arrived: Scratch<D>,
    /// Of attention: what splits leave for the merge.
    attention_partials: Scratch<D>,
    sample: SampleScratch<D>,
    /// While weights are loaded.
    staging: RefCell<Staging<D>>,
}

impl<D: Driver> Cuda<D> {
    /// Takes the device over.
    pub fn new(driver: D, options: CudaOptions) -> Self {
        Self {
            driver,
            options,
            mix_partials: Scratch::new("partial sums of the experts"),
            mix_arrived: Scratch::new("counters of the experts"),
            skinny_partials: Scratch::new("partial sums of products"),
            skinny_arrived: Scratch::new("counters of products"),
            attention_partials: Scratch::new("partial sums of attention"),
            sample: SampleScratch::new(),
            staging: RefCell::new(Staging::EMPTY),
        }
    }

    fn activations(&self) -> Kept {
        Kept::Activations(self.options.storage)
    }

    fn launch(
        &self,
        kernel: Kernel,
        (grid, threads): ([usize; 3], usize),
        shared_bytes: usize,
        args: &[Arg],
    ) -> Result<(), BackendError> {
        let kernel = kernel.name(self.options.storage);
        let grid = dimensions(kernel, grid)?;
        let launch = Launch {
            kernel,
            grid,
            threads: threads as u32,
            shared_bytes: shared_bytes as u32,
            args,
        };
        // SAFETY: each op launches its kernel with the arguments of its declaration (the emulation checks their kinds), over operands
        // whose shapes `bind` has checked.
        unsafe { self.driver.launch(&launch) }
    }
}

fn dimensions(kernel: &'static str, grid: [usize; 3]) -> Result<[u32; 3], BackendError> {
    // The second and third may not pass 65,535.
    let fits = grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16;
    match fits {
        true => Ok(grid.map(|blocks| blocks as u32)),
        false => Err(BackendError::Contract {
            op: kernel,
            operand: "grid",
            expected: "below 2^31, 2^16, 2^16".to_owned(),
            found: format!("{grid:?}"),
        }),
    }
}

/// An `int` argument. Sizes come from shapes that fit memory; none that a kernel counts in passes 2^31.
fn int(value: usize) -> Arg {
    Arg::I32(i32::try_from(value).unwrap_or(i32::MAX))
}

fn unsupported(
    op: &'static str,
    operand: &'static str,
    expected: &str,
    found: String,
) -> BackendError {
    BackendError::Contract {
        op,
        operand,
        expected: expected.to_owned(),
        found,
    }
}

fn bind_weight_format(format: WeightFormat) -> Result<(), BackendError> {
    if matches!(format, WeightFormat::Stored | WeightFormat::BF16) {
        return Ok(());
    }
    let expected = "Stored or BF16: a GPU keeps weights in two bytes";
    Err(unsupported(
        "matrix",
        "format",
        expected,
        format!("{format:?}"),
    ))
}

fn bind_kv_format(shape: KvShape) -> Result<(), BackendError> {
    if matches!(shape.format, KvFormat::BF16 | KvFormat::FP8) {
        return Ok(());
    }
    let found = format!("{:?}", shape.format);
    let expected = "BF16 or FP8: a GPU keeps K and V in two bytes or one";
    Err(unsupported("kv_cache", "format", expected, found))
}

/// Heads that the kernels know: sizes in packs of eight up to `HEAD_SIZE_MAX`, groups that fit a tile of rows.
fn bind_heads(op: &'static str, heads: ops::Heads) -> Result<(), BackendError> {
    if !heads.size.is_multiple_of(8) || heads.size > HEAD_SIZE_MAX {
        return Err(unsupported(
            op,
            "heads.size",
            "a multiple of 8, at most 128",
            heads.size.to_string(),
        ));
    }
    let group = heads.query / heads.kv.max(1);
    if group > PREFILL_ROWS {
        return Err(unsupported(
            op,
            "heads.query / heads.kv",
            "at most 64",
            group.to_string(),
        ));
    }
    Ok(())
}

impl<D: Driver> Backend for Cuda<D> {
    type Buffer = Buffer<D>;
    type Matrix = DeviceMatrix<D>;
    type KvCache = DeviceCache<D>;
    type Step = DeviceStep<D>;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn quantises(&self) -> bool {
        false
    }

    fn matrix(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<DeviceMatrix<D>, BackendError> {
        bind_weight_format(format)?;
        let staging = &mut *self.staging.borrow_mut();
        DeviceMatrix::new(
            (&self.driver, staging),
            parts,
            extension,
            self.options.storage,
        )
    }

    fn experts(
        &self,
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
    ) -> Result<DeviceMatrix<D>, BackendError> {
        let staging = &mut *self.staging.borrow_mut();
        DeviceMatrix::experts((&self.driver, staging), lora_a, gates, self.options.storage)
    }

    fn matrix_bytes(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<usize, BackendError> {
        bind_weight_format(format)?;
        ops::bind_parts(parts, extension.as_ref())?;
        let bytes = matrix_bytes(parts, extension.as_ref(), self.activations());
        Ok(self.driver.occupied(bytes))
    }

    fn experts_bytes(
        &self,
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
    ) -> Result<usize, BackendError> {
        let a = matrix_bytes(&[lora_a], None, self.activations());
        let exact = matrix_bytes(&[gates], None, Kept::Exact);
        Ok(self.driver.occupied(a) + self.driver.occupied(exact))
    }

    fn buffer_bytes(&self, rows: usize, width: usize) -> usize {
        let bytes = Buffer::<D>::bytes(rows, width, self.activations());
        self.driver.occupied(bytes)
    }

    fn exact_buffer_bytes(&self, rows: usize, width: usize) -> usize {
        let bytes = Buffer::<D>::bytes(rows, width, Kept::Exact);
        self.driver.occupied(bytes)
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Buffer<D>, BackendError> {
        Buffer::new(&self.driver, rows, width, self.activations())
    }

    fn exact_buffer(&self, rows: usize, width: usize) -> Result<Buffer<D>, BackendError> {
        Buffer::new(&self.driver, rows, width, Kept::Exact)
    }

    fn write(&self, buffer: &mut Buffer<D>, values: &[f32]) -> Result<(), BackendError> {
        bind_write(buffer, values)?;
        buffer.write(&self.driver, values)
    }

    fn fetch(&self, buffer: &mut Buffer<D>, rows: usize) -> Result<(), BackendError> {
        bind_read(buffer, rows)?;
        buffer.fetch(&self.driver, rows)
    }

    fn read<'a>(
        &'a self,
        buffer: &'a mut Buffer<D>,
        rows: usize,
    ) -> Result<&'a [f32], BackendError> {
        bind_read(buffer, rows)?;
        buffer.read(&self.driver, rows)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<DeviceCache<D>, BackendError> {
        bind_kv_format(shape)?;
        DeviceCache::new(&self.driver, shape)
    }

    fn kv_block_bytes(&self, shape: KvShape) -> Result<usize, BackendError> {
        bind_kv_format(shape)?;
        Ok(shape.block_bytes())
    }

    fn reserve(&mut self, work: &Workload) -> Result<(), BackendError> {
        *self.staging.borrow_mut() = Staging::EMPTY;
        let Rooms { partials, arrived } = Rooms::of(work);
        let [skinny_partials, skinny_arrived] = skinny_rooms(self.driver.shape());
        let scratches = [
            (&mut self.skinny_partials, skinny_partials),
            (&mut self.skinny_arrived, skinny_arrived),
            (&mut self.mix_partials, partials),
            (&mut self.mix_arrived, arrived),
            (
                &mut self.attention_partials,
                attention::partial_bytes(&work.limits, work.heads),
            ),
        ];
        for (scratch, bytes) in scratches {
            scratch.reserve(&self.driver, bytes)?;
        }
        let sample = SampleRooms::new(&work.limits);
        self.sample.reserve(&self.driver, &sample)
    }

    fn workspace_bytes(&self, work: &Workload) -> usize {
        let Rooms { partials, arrived } = Rooms::of(work);
        let splits = attention::partial_bytes(&work.limits, work.heads);
        let sample = SampleRooms::new(&work.limits).all();
        let rooms = [partials, arrived, splits].into_iter();
        let skinny = skinny_rooms(self.driver.shape());
        let rooms = rooms.chain(skinny).chain(sample);
        let rooms = rooms.map(|bytes| self.driver.occupied(bytes));
        let graphs = match self.options.graphs {
            true => graphs::bytes(work),
            false => 0,
        };
        DeviceStep::bytes(&self.driver, &work.limits) + rooms.sum::<usize>() + graphs
    }

    fn step(&self, limits: StepLimits) -> Result<DeviceStep<D>, BackendError> {
        DeviceStep::new(&self.driver, limits)
    }

    fn load_step(
        &self,
        layout: &StepLayout<'_>,
        step: &mut DeviceStep<D>,
    ) -> Result<(), BackendError> {
        step.load(&self.driver, layout)
    }

    fn record(
        &mut self,
        step: &mut DeviceStep<D>,
        pass: &mut RecordedPass<'_, Self>,
    ) -> Result<usize, BackendError> {
        match self.options.graphs {
            true => graphs::record(self, step, pass),
            false => Ok(0),
        }
    }

    fn replay(&mut self, step: &DeviceStep<D>) -> Result<bool, BackendError> {
        step.replay(&self.driver)
    }

    fn embed(&mut self, args: Embed<'_, Self>) -> Result<(), BackendError> {
        let (driver, host) = (&self.driver, args.step.host());
        args.bind(host.rows(), host.limits().vocabulary)?;
        if host.rows() == 0 {
            return Ok(());
        }
        let list = [
            Arg::Pointer(args.x.exact(driver, "embed", "x")?),
            Arg::Pointer(args.table.address(driver)),
            Arg::Pointer(args.step.tokens(driver)),
            int(args.table.stride()),
        ];
        let grid = ([host.rows(), 1, 1], EMBED_THREADS);
        self.launch(kernel!("embed"), grid, 0, &list)
    }

    fn rms_norm(&mut self, args: RmsNorm<'_, Self>) -> Result<(), BackendError> {
        let driver = &self.driver;
        let d = args.bind()?;
        if args.n == 0 {
            return Ok(());
        }
        let list = [
            Arg::Pointer(args.y.activations(driver, "rms_norm", "y")?),
            Arg::Pointer(args.x.exact(driver, "rms_norm", "x")?),
            Arg::Pointer(args.weight.exact(driver, "rms_norm", "weight")?),
            int(d),
            int(args.x.stride()),
            Arg::F32(args.eps),
        ];
        let grid = ([args.n, 1, 1], NORM_THREADS);
        self.launch(kernel!("rms_norm"), grid, 0, &list)
    }

    fn matmul(&mut self, args: MatMul<'_, Self>) -> Result<(), BackendError> {
        gemm::matmul(self, &args)
    }

    fn rope_kv_write(&mut self, args: RopeKvWrite<'_, Self>) -> Result<(), BackendError> {
        let (driver, host, heads) = (&self.driver, args.step.host(), args.heads);
        args.bind(host, args.cache.shape())?;
        bind_heads("rope_kv_write", heads)?;
        let all = heads.query + 2 * heads.kv;
        if host.rows() == 0 || all * heads.size == 0 {
            return Ok(());
        }
        // All threads of a head are in one block.
        let blocks = all.div_ceil(ROPE_THREADS / (heads.size / 8));
        let kernel = match args.cache.shape().format {
            KvFormat::FP8 => kernel!("rope_kv_write_fp8"),
            KvFormat::BF16 | KvFormat::F32 | KvFormat::INT8 => kernel!("rope_kv_write"),
        };
        let (k, v) = args.cache.layer(driver, args.layer);
        let list = [
            Arg::Pointer(args.qkv.activations(driver, "rope_kv_write", "qkv")?),
            Arg::Pointer(args.rope.exact(driver, "rope_kv_write", "rope")?),
            Arg::Pointer(args.step.positions(driver)),
            Arg::Pointer(args.step.slots(driver)),
            Arg::Pointer(k),
            Arg::Pointer(v),
            int(heads.query),
            int(heads.kv),
            int(heads.size),
            int(args.qkv.stride()),
        ];
        let grid = ([host.rows(), blocks, 1], ROPE_THREADS);
        self.launch(kernel, grid, 0, &list)
    }

    fn attention(&mut self, args: Attention<'_, Self>) -> Result<(), BackendError> {
        attention::attention(self, &args)
    }

    fn silu_mul_expert_mix(
        &mut self,
        args: SiluMulExpertMix<'_, Self>,
    ) -> Result<(), BackendError> {
        mix::silu_mul_expert_mix(self, &args)
    }

    fn expert_mix(&mut self, args: ExpertMix<'_, Self>) -> Result<(), BackendError> {
        mix::expert_mix(self, &args)
    }

    fn gather_rows(&mut self, args: GatherRows<'_, Self>) -> Result<(), BackendError> {
        let (driver, host) = (&self.driver, args.step.host());
        let wanted = host.logit_rows().len();
        args.bind(host.rows(), wanted)?;
        if wanted == 0 {
            return Ok(());
        }
        let list = [
            Arg::Pointer(args.y.exact(driver, "gather_rows", "y")?),
            Arg::Pointer(args.x.exact(driver, "gather_rows", "x")?),
            Arg::Pointer(args.step.logit_rows(driver)),
            int(args.x.stride()),
        ];
        let grid = ([wanted, 1, 1], GATHER_THREADS);
        self.launch(Kernel::exact("gather_rows"), grid, 0, &list)
    }
    fn samples(&self) -> bool {
        true
    }

    fn sample(&mut self, logits: &Buffer<D>, rows: &[SampleRow]) -> Result<bool, BackendError> {
        self.sample_rows(logits, rows)
    }

    fn sampled(&mut self, rows: &[SampleRow], sampled: &mut Sampled) -> Result<(), BackendError> {
        self.sampled_rows(rows, sampled)
    }
}
