//! The CPU backend: repacked weights, kernels over sixteen lanes chosen at run time, a fork-join pool.
//!
//! An op checks its call (`bind`), cuts itself into chunks, and the pool's threads run them as kernels of the processor's
//! instruction set. Chunks differ with the number of threads; the arithmetic of an output does not.

#![allow(unsafe_code)]

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod experts;
mod gemm;
mod int8;
mod kv;
pub mod limits;
mod memory;
#[cfg(target_arch = "aarch64")]
mod neon;
mod norm;
mod pack;
mod pool;
mod quant;
mod rooms;
mod scalar;
mod simd;

use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ops::{
    Attention, Embed, ExpertMix, GatherRows, INT8_BLOCK, MatMul, MatMulAxes, RmsNorm, RopeKvWrite,
    SiluMulExpertMix, bind_read, bind_write,
};
use super::{
    Backend, BackendError, HostMatrix, HostStep, KvShape, Matrix, Shaped, StepLayout, StepLimits,
    WeightFormat, Workload,
};
use gemm::{FEW_ROWS, Multiply, Product};
use memory::{Arena, Memory, occupied};
use pool::{Parts, Pool};
use rooms::{Quantised, Rooms, Shared};
use simd::Level;

pub use kv::KvMemory;
pub use memory::{keep_heap, trim_heap};
pub use pack::PackedMatrix;
pub use simd::Isa;

/// How the CPU is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads, the engine's own among them; `None`: as many as the process may use.
    pub threads: Option<usize>,
    /// Instruction set; `None`: the best one. For tests and comparisons.
    pub isa: Option<Isa>,
}

/// The backend.
pub struct Cpu {
    pool: Pool,
    level: Level,
    arena: RefCell<Arena>,
    scratch: Vec<Mutex<Scratch>>,
    shared: Shared,
}

/// What one thread needs beside its operands.
struct Scratch {
    gemm: Box<gemm::Scratch>,
    attention: attention::Scratch,
    experts: experts::Scratch,
}

/// Multiply-adds, or numbers touched, that are not worth waking another thread.
const INLINE_WORK: usize = 32 << 10;
/// Chunks a thread, so that one that is late can be helped.
const CHUNKS_A_THREAD: usize = 4;
/// Bytes of weights in a chunk at least.
const CHUNK_BYTES: usize = 32 << 10;
/// Rows in a chunk at least, when a product with many rows must be cut along them.
const CHUNK_ROWS: usize = 24;

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`BackendError::Unavailable`] when the processor lacks the instruction set, or the system refuses threads.
    pub fn new(options: CpuOptions) -> Result<Self, BackendError> {
        let unavailable = |reason: String| BackendError::Unavailable {
            device: "cpu",
            reason,
        };
        let level = match options.isa {
            None => Level::best(),
            Some(isa) => Level::of(isa)
                .ok_or_else(|| unavailable(format!("the processor has no {}", isa.as_str())))?,
        };
        let pool = Pool::new(options.threads).map_err(|error| unavailable(error.to_string()))?;
        let scratch = (0..pool.threads())
            .map(|_| {
                Mutex::new(Scratch {
                    gemm: gemm::Scratch::boxed(),
                    attention: attention::Scratch::default(),
                    experts: experts::Scratch::default(),
                })
            })
            .collect();
        Ok(Self {
            pool,
            level,
            arena: RefCell::new(Arena::default()),
            scratch,
            shared: Shared::default(),
        })
    }

    /// The first `inputs` of each row of x as block formats meet them, in the shared blocks.
    fn quantise(&mut self, x: &[f32], axes: &MatMulAxes, inputs: usize) -> int8::Blocks {
        let (n, width, stride) = (axes.n, axes.k + axes.w, inputs / INT8_BLOCK);
        let made = self.shared.quantised.take();
        let blocks = &mut self.shared.blocks;
        if let Some(made) = made
            && made.x == x.as_ptr().addr()
            && made.rows >= n
            && made.stride >= stride
        {
            return made.blocks(blocks);
        }
        let made = Quantised {
            x: x.as_ptr().addr(),
            rows: n,
            stride,
        };
        let out = made.blocks(blocks);
        split_rows(&self.pool, n, n * inputs, &|rows| {
            // A row is one chunk's: the contract of `Blocks`.
            self.level.run(int8::Quantise {
                x,
                width,
                rows,
                out,
            });
        });
        out
    }

    /// Where silu_mul_expert_mix leaves hu (n, m + w) in blocks.
    fn blocks_behind_mix(
        &mut self,
        args: &SiluMulExpertMix<'_, Self>,
        n: usize,
        m: usize,
    ) -> int8::Blocks {
        let hu = &args.hu.values;
        match args.experts {
            // E meets h in them too. u follows h if it is whole blocks; else the next product, whose extension is then of floats, needs
            // none of it.
            Some((e, _)) if e.integer_inputs() > 0 => {
                let stride = m / INT8_BLOCK + (args.hu.width - m) / INT8_BLOCK;
                self.shared.blocks_of(hu, n, stride)
            }
            _ => self.shared.behind(hu, n, m),
        }
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Instruction set in use.
    pub fn isa(&self) -> Isa {
        self.level.isa()
    }
}

/// A thread's scratch: its own, so the lock is free.
fn scratch_of(scratch: &[Mutex<Scratch>], thread: usize) -> MutexGuard<'_, Scratch> {
    scratch[thread]
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Calls `task` with ranges of `step` that cover `0..len`: on the caller alone if `work` is small.
fn split_rows(
    pool: &Pool,
    len: usize,
    work: usize,
    task: &(dyn Fn(std::ops::Range<usize>) + Sync),
) {
    let chunks = match work {
        0..INLINE_WORK => 1,
        _ => len.min(pool.threads() * CHUNKS_A_THREAD),
    };
    let step = len.div_ceil(chunks.max(1)).max(1);
    pool.for_each(len.div_ceil(step), &|_, chunk| {
        task(chunk * step..len.min((chunk + 1) * step));
    });
}

/// (rows, width) f32 in the arena.
pub struct Buffer {
    rows: usize,
    width: usize,
    values: Memory<f32>,
}

impl Shaped for Buffer {
    fn rows(&self) -> usize {
        self.rows
    }

    fn width(&self) -> usize {
        self.width
    }
}

/// How a product is cut: panels in a chunk, rows in a chunk.
fn matmul_chunks(pool: &Pool, w: &PackedMatrix, n: usize) -> (usize, usize) {
    let panels = w.panels().len();
    let work = n * w.outputs() * (w.inputs() + w.extension_inputs());
    if pool.threads() == 1 || work < INLINE_WORK {
        return (panels.max(1), n.max(1));
    }
    let chunks = pool.threads() * CHUNKS_A_THREAD;
    // Whole tiles of panels: at most eight, at least one.
    let mut by = panels.div_ceil(chunks);
    if n <= FEW_ROWS {
        let panel_bytes = (w.bytes() / panels.max(1)).max(1);
        by = by.max(CHUNK_BYTES / panel_bytes).next_multiple_of(4);
        by = by.min(panels.div_ceil(pool.threads()));
        return (by.max(1), n);
    }
    let by = by.next_multiple_of(2).min(panels.max(1));
    let row_chunks = chunks
        .div_ceil(panels.div_ceil(by))
        .min(n.div_ceil(CHUNK_ROWS));
    let rows = n.div_ceil(row_chunks.max(1));
    (by, rows.next_multiple_of(2 * FEW_ROWS))
}

impl Backend for Cpu {
    type Buffer = Buffer;
    type Matrix = PackedMatrix;
    type KvCache = KvMemory;
    type Step = HostStep;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn matrix(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<PackedMatrix, BackendError> {
        let mut arena = self.arena.borrow_mut();
        PackedMatrix::pack(&self.pool, &mut arena, parts, extension, format)
    }

    /// The gates' rows apart, so that each lies as it came ([`experts`]).
    fn experts(
        &self,
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
    ) -> Result<PackedMatrix, BackendError> {
        let [a, b] = experts::rows_of(gates)?;
        self.matrix(&[lora_a, a, b], None, WeightFormat::Stored)
    }

    fn experts_bytes(
        &self,
        lora_a: HostMatrix<'_>,
        gates: HostMatrix<'_>,
    ) -> Result<usize, BackendError> {
        let [a, b] = experts::rows_of(gates)?;
        self.matrix_bytes(&[lora_a, a, b], None, WeightFormat::Stored)
    }

    fn matrix_bytes(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<usize, BackendError> {
        PackedMatrix::bytes_of(parts, extension, format).map(occupied)
    }

    fn buffer_bytes(&self, rows: usize, width: usize) -> usize {
        let bytes = rows.saturating_mul(width).saturating_mul(size_of::<f32>());
        occupied(bytes)
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Buffer, BackendError> {
        let len = rows.saturating_mul(width);
        self.shared.quantised.take();
        Ok(Buffer {
            rows,
            width,
            values: self.arena.borrow_mut().zeroed("buffer", len)?,
        })
    }

    fn write(&self, buffer: &mut Buffer, values: &[f32]) -> Result<(), BackendError> {
        bind_write(buffer, values)?;
        self.shared.quantised.take();
        buffer.values[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read<'a>(&'a self, buffer: &'a mut Buffer, rows: usize) -> Result<&'a [f32], BackendError> {
        bind_read(buffer, rows)?;
        Ok(&buffer.values[..rows * buffer.width])
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvMemory, BackendError> {
        KvMemory::new(&mut self.arena.borrow_mut(), shape)
    }

    fn kv_block_bytes(&self, shape: KvShape) -> Result<usize, BackendError> {
        kv::check(shape.format)?;
        Ok(shape.block_bytes())
    }

    fn reserve(&mut self, work: &Workload) -> Result<(), BackendError> {
        let rooms = Rooms::new(work, self.pool.threads());
        for scratch in &mut self.scratch {
            let scratch = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
            scratch.attention.reserve(work.heads);
            scratch.experts.reserve(rooms.expert_outputs);
        }
        self.shared.reserve(&rooms, work.quantised_inputs);
        Ok(())
    }

    fn workspace_bytes(&self, work: &Workload) -> usize {
        let rooms = Rooms::new(work, self.pool.threads());
        HostStep::bytes(&work.limits) + rooms.bytes()
    }

    fn step(&self, limits: StepLimits) -> Result<HostStep, BackendError> {
        Ok(HostStep::new(limits))
    }

    fn load_step(&self, layout: &StepLayout<'_>, step: &mut HostStep) -> Result<(), BackendError> {
        step.load(layout)
    }

    fn embed(&mut self, args: Embed<'_, Self>) -> Result<(), BackendError> {
        self.shared.quantised.take();
        let n = args.step.rows();
        let d = args.bind(n, args.step.limits().vocabulary)?;
        let x = Parts::new(&mut args.x.values);
        split_rows(&self.pool, n, n * d, &|rows| {
            for row in rows {
                let token = args.step.tokens()[row].index();
                // SAFETY: a row is one chunk's.
                args.table.row(token, unsafe { x.slice(row * d, d) });
            }
        });
        Ok(())
    }

    fn rms_norm(&mut self, args: RmsNorm<'_, Self>) -> Result<(), BackendError> {
        self.shared.quantised.take();
        let d = args.bind()?;
        if d == 0 {
            return Ok(());
        }
        let blocks = self.shared.behind(&args.y.values, args.n, d);
        let y = Parts::new(&mut args.y.values);
        split_rows(&self.pool, args.n, args.n * d, &|rows| {
            let kernel = norm::RmsNormRows {
                x: &args.x.values[rows.start * d..rows.end * d],
                weight: &args.weight.values[..d],
                eps: args.eps,
                // SAFETY: a row is one chunk's.
                y: unsafe { y.slice(rows.start * d, rows.len() * d) },
                first: rows.start,
                blocks,
            };
            self.level.run(kernel);
        });
        Ok(())
    }

    fn matmul(&mut self, args: MatMul<'_, Self>) -> Result<(), BackendError> {
        let axes = args.bind()?;
        let panels = args.w.panels().len();
        let blocks = self.quantise(&args.x.values, &axes, args.w.integer_inputs());
        let (by_panels, by_rows) = matmul_chunks(&self.pool, args.w, axes.n);
        let whole = Product {
            matrix: args.w,
            panels: 0..panels,
            inputs: 0..axes.k,
            extension: axes.w > 0,
            rows: 0..axes.n,
            x: args.x.values.as_ptr(),
            x_stride: axes.k + axes.w,
            y: args.y.values.as_mut_ptr(),
            y_stride: axes.o,
            add: args.add,
            blocks,
        };
        let row_chunks = axes.n.div_ceil(by_rows);
        let (level, scratch) = (self.level, &self.scratch);
        self.pool
            .for_each(panels.div_ceil(by_panels) * row_chunks, &|thread, chunk| {
                // Neighbours share panels, which then come from the cache.
                let (panel, row) = (chunk / row_chunks * by_panels, chunk % row_chunks * by_rows);
                let product = Product {
                    panels: panel..panels.min(panel + by_panels),
                    rows: row..axes.n.min(row + by_rows),
                    ..whole.clone()
                };
                // `bind` proved the shapes, and chunks cut y into tiles that do not overlap: the contract of `multiply`.
                level.run(Multiply(product, &mut scratch_of(scratch, thread).gemm));
            });
        Ok(())
    }

    fn rope_kv_write(&mut self, args: RopeKvWrite<'_, Self>) -> Result<(), BackendError> {
        self.shared.quantised.take();
        args.bind(args.step, args.cache.shape())?;
        let n = args.step.rows();
        let qkv = Parts::new(&mut args.qkv.values);
        let cache = args.cache.layer_mut(args.layer);
        split_rows(&self.pool, n, n * args.heads.qkv_width(), &|rows| {
            self.level.run(norm::RopeRows {
                step: args.step,
                rows,
                heads: args.heads,
                rope: &args.rope.values,
                qkv: &qkv,
                cache: &cache,
            });
        });
        Ok(())
    }

    fn attention(&mut self, args: Attention<'_, Self>) -> Result<(), BackendError> {
        self.shared.quantised.take();
        args.bind(args.step, args.cache.shape())?;
        let (n, width) = (args.step.rows(), args.heads.query * args.heads.size);
        let blocks = match args.heads.size.is_multiple_of(INT8_BLOCK) {
            true => self.shared.behind(&args.y.values, n, width),
            false => int8::Blocks::NONE,
        };
        let Shared { units, parts, .. } = &mut self.shared;
        attention::units(args.step, args.heads, units);
        for scratch in &mut self.scratch {
            let scratch = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
            scratch.attention.reserve(args.heads);
        }
        let y = Parts::new(&mut args.y.values);
        let context = attention::Context {
            step: args.step,
            layer: args.layer,
            heads: args.heads,
            qkv: &args.qkv.values,
            cache: args.cache,
            y: &y,
            blocks,
        };
        let (level, scratch) = (self.level, &self.scratch);
        let run = |thread, job| {
            let scratch = &mut scratch_of(scratch, thread).attention;
            level.run(attention::Attend(context, job, scratch));
        };
        let splits = units.iter().map(|unit| unit.splits).max().unwrap_or(0);
        if units.len() >= 2 * self.pool.threads() || splits == 1 || self.pool.threads() == 1 {
            self.pool.for_each(units.len(), &|thread, i| {
                run(thread, attention::Job::Unit(units[i]));
            });
            return Ok(());
        }
        // Few long sequences: threads share the splits of a unit.
        let len = attention::partial_len(args.heads);
        grow(parts, units.len() * splits * len, 0.0);
        let shared = Parts::new(parts);
        self.pool.for_each(units.len() * splits, &|thread, i| {
            let (unit, split) = (units[i / splits], i % splits);
            if split < unit.splits {
                // SAFETY: each split of each unit has its own part.
                let partial = unsafe { shared.slice(i * len, len) };
                run(thread, attention::Job::Split(unit, split, partial));
            }
        });
        self.pool.for_each(units.len(), &|thread, i| {
            // SAFETY: the splits are done; each unit reads its own.
            let partials = unsafe { shared.slice(i * splits * len, splits * len) };
            run(thread, attention::Job::Merge(units[i], partials));
        });
        Ok(())
    }

    fn silu_mul_expert_mix(
        &mut self,
        args: SiluMulExpertMix<'_, Self>,
    ) -> Result<(), BackendError> {
        let n = args.step.rows();
        let m = args.bind(n)?;
        let outputs = args.experts.as_ref().map_or(0, |(e, _)| e.outputs());
        for scratch in &mut self.scratch {
            let scratch = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
            scratch.experts.reserve(outputs);
        }
        let (hu_width, gates_width) = (args.hu.width, args.gates.width);
        let blocks = self.blocks_behind_mix(&args, n, m);
        let hu = Parts::new(&mut args.hu.values);
        let gates = Parts::new(&mut args.gates.values);
        let z = args.z.map(|z| Parts::new(&mut z.values));
        let context = experts::Context {
            step: args.step,
            layer: args.layer,
            m,
            gate_up: &args.gate_up.values,
            experts: args.experts,
            hu: &hu,
            hu_width,
            gates: &gates,
            gates_width,
            z: z.as_ref(),
            blocks,
        };
        let (level, scratch) = (self.level, &self.scratch);
        let groups = n.div_ceil(experts::ROWS);
        let rows = |group: usize| group * experts::ROWS..n.min((group + 1) * experts::ROWS);
        // silu is worth about sixteen multiply-adds.
        let inline = n * m * (16 + outputs) < INLINE_WORK;
        if groups >= 2 * self.pool.threads() || self.pool.threads() == 1 || inline {
            self.pool.for_each(
                groups.min(if inline { 1 } else { groups }),
                &|thread, group| {
                    let rows = if inline { 0..n } else { rows(group) };
                    mix(level, scratch, thread, context, experts::Job::Rows(rows));
                },
            );
            return Ok(());
        }
        // Few rows: threads share the splits of a row.
        let splits = context.splits();
        grow(&mut self.shared.parts, n * splits * outputs, 0.0);
        let parts = Parts::new(&mut self.shared.parts);
        self.pool.for_each(groups * splits, &|thread, i| {
            let job = experts::Job::Split(rows(i / splits), i % splits, &parts);
            mix(level, scratch, thread, context, job);
        });
        if outputs > 0 {
            let job = experts::Job::Finish(0..n, &self.shared.parts);
            mix(level, scratch, 0, context, job);
        }
        Ok(())
    }

    fn expert_mix(&mut self, args: ExpertMix<'_, Self>) -> Result<(), BackendError> {
        self.shared.quantised.take();
        args.bind(args.step.rows())?;
        let (z_width, u_width, gates_width) = (args.z.width, args.u.width, args.gates.width);
        for sequence in args.step.sequences() {
            for (row, _) in sequence.placed_rows() {
                let z = &args.z.values[row * z_width..][..z_width];
                let u = &mut args.u.values[row * u_width..][..u_width];
                let gates = &mut args.gates.values[row * gates_width + 2 * args.layer..][..2];
                experts::mixed(z, &args.shape, sequence.gates, (u, gates));
            }
        }
        Ok(())
    }

    fn gather_rows(&mut self, args: GatherRows<'_, Self>) -> Result<(), BackendError> {
        self.shared.quantised.take();
        let rows = args.step.logit_rows();
        let d = args.bind(args.step.rows(), rows.len())?;
        for (i, row) in rows.iter().enumerate() {
            let from = &args.x.values[row * d..][..d];
            args.y.values[i * d..][..d].copy_from_slice(from);
        }
        Ok(())
    }
}

/// One chunk of `silu_mul_expert_mix` on `thread`.
fn mix(
    level: Level,
    scratch: &[Mutex<Scratch>],
    thread: usize,
    context: experts::Context<'_>,
    job: experts::Job<'_>,
) {
    let scratch = &mut *scratch_of(scratch, thread);
    let (own, widened) = (&mut scratch.experts, &mut *scratch.gemm);
    level.run(experts::Mix(context, job, own, widened));
}

fn grow<T: Copy>(room: &mut Vec<T>, len: usize, value: T) {
    if room.len() < len {
        room.resize(len, value);
    }
}
