//! The arithmetic of a model's memory against what it really takes, and that all of it is taken before the first step.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cuda_emu::Schedule;
use midpo::backend::cpu::{Cpu, CpuOptions};
use midpo::backend::cuda::{Cuda, CudaOptions, DeviceShape, Driver, Gemm, Launch, Storage};
use midpo::backend::{Backend, BackendError, KvFormat, StepLayout, StepSequence, WeightFormat};
use midpo::dtype::BlockType;
use midpo::model::{self, ModelOptions, RoutedLlama};
use midpo::types::{BLOCK_TOKENS, BlockId, TokenId, Variant};

use super::{TestDriver, TestGraph, TestHostMemory, TestMark, TestMemory};
use crate::golden::load;

const FIXTURES: [(&str, bool); 3] = [
    ("tiny-routed", true),
    ("tiny-routed", false),
    ("tiny-gqa", true),
];

/// The emulation, with all that is allocated and all launches of `sample` counted.
pub(super) struct Counting {
    inner: TestDriver,
    counts: Counts,
}

#[derive(Clone, Default)]
pub(super) struct Counts {
    pub(super) bytes: Arc<AtomicUsize>,
    pub(super) samples: Arc<AtomicUsize>,
    pub(super) recordings: Arc<AtomicUsize>,
    pub(super) replays: Arc<AtomicUsize>,
}

pub(super) fn counting(graphs: bool) -> (Cuda<Counting>, Counts) {
    let counts = Counts::default();
    let driver = Counting {
        inner: TestDriver::emulated(Schedule::Descending),
        counts: counts.clone(),
    };
    let options = CudaOptions {
        storage: Storage::BF16,
        deterministic: true,
        graphs,
    };
    (Cuda::new(driver, options), counts)
}

impl Driver for Counting {
    type Memory = TestMemory;
    type HostMemory = TestHostMemory;
    type Mark = TestMark;
    type Graph = TestGraph;

    fn shape(&self) -> DeviceShape {
        DeviceShape {
            multiprocessors: 3,
            shared_bytes: 227 << 10,
        }
    }

    fn allocate(&self, what: &str, bytes: usize) -> Result<TestMemory, BackendError> {
        self.counts.bytes.fetch_add(bytes, Ordering::SeqCst);
        self.inner.allocate(what, bytes)
    }

    fn occupied(&self, bytes: usize) -> usize {
        bytes
    }

    fn address(&self, memory: &TestMemory) -> u64 {
        self.inner.address(memory)
    }

    fn zero(&self, memory: &mut TestMemory) -> Result<(), BackendError> {
        self.inner.zero(memory)
    }

    fn upload(
        &self,
        memory: &mut TestMemory,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        self.inner.upload(memory, offset, bytes)
    }

    fn host_memory(&self, bytes: usize) -> Result<TestHostMemory, BackendError> {
        self.inner.host_memory(bytes)
    }

    unsafe fn fetch(
        &self,
        from: &TestMemory,
        into: &mut TestHostMemory,
        bytes: usize,
    ) -> Result<(), BackendError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.fetch(from, into, bytes) }
    }

    fn wait(&self) -> Result<(), BackendError> {
        self.inner.wait()
    }

    unsafe fn push(
        &self,
        to: &mut TestMemory,
        offset: usize,
        from: &TestHostMemory,
        bytes: usize,
    ) -> Result<TestMark, BackendError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.push(to, offset, from, bytes) }
    }

    fn reached(&self, mark: &TestMark) -> Result<(), BackendError> {
        self.inner.reached(mark)
    }

    fn join(&self) -> Result<(), BackendError> {
        self.inner.join()
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), BackendError> {
        if launch.kernel == "sample" {
            self.counts.samples.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch(launch) }
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<bool, BackendError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.gemm(gemm) }
    }

    fn begin_recording(&self) -> Result<(), BackendError> {
        self.inner.begin_recording()
    }

    fn end_recording(&self) -> Result<TestGraph, BackendError> {
        self.counts.recordings.fetch_add(1, Ordering::SeqCst);
        self.inner.end_recording()
    }

    unsafe fn replay(&self, graph: &TestGraph) -> Result<(), BackendError> {
        self.counts.replays.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise.
        unsafe { self.inner.replay(graph) }
    }
}

fn options(kv_format: KvFormat, weight_format: WeightFormat) -> ModelOptions {
    ModelOptions {
        rows: 80,
        logit_rows: 7,
        sequences: 5,
        positions: 300,
        kv_blocks: 40,
        kv_format,
        weight_format,
    }
}

/// A prompt in one step, then a token of it and one of another sequence.
fn run<B: Backend>(model: &mut RoutedLlama<B>) {
    let tokens: Vec<_> = (0..80).map(|i| TokenId(i % 50)).collect();
    let blocks: Vec<_> = (0..40).map(BlockId::new).collect();
    let gates = Variant::Routed.gates();
    let (first, second) = blocks.split_at(20);
    let sequence = |rows, start, block_table| StepSequence {
        rows,
        start,
        block_table,
        gates,
    };
    let steps = [
        vec![sequence(70, 0, first)],
        vec![sequence(1, 70, first), sequence(60, 0, second)],
        vec![sequence(1, 71, first), sequence(1, 60, second)],
    ];
    for sequences in steps {
        let rows = sequences.iter().map(|sequence| sequence.rows).sum();
        let layout = StepLayout {
            tokens: &tokens[..rows],
            sequences: &sequences,
            logit_rows: &[rows - 1],
        };
        model.forward(&layout).unwrap();
    }
}

#[test]
fn cuda_takes_what_the_budget_says_and_nothing_more_when_it_runs() {
    if let Some(reason) = cuda_emu::ABSENT {
        eprintln!("skipped: {reason}");
        return;
    }
    for (name, experts) in FIXTURES {
        let checkpoint = load(name, experts);
        let options = options(KvFormat::BF16, WeightFormat::Stored);
        let (cuda, Counts { bytes, .. }) = counting(false);
        let weights = model::weight_bytes(&cuda, &checkpoint, options.weight_format).unwrap();
        let workspace = model::workspace_bytes(&cuda, &checkpoint, &options).unwrap();
        let block = model::kv_block_bytes(&cuda, &checkpoint.config, options.kv_format).unwrap();
        assert_eq!(bytes.load(Ordering::SeqCst), 0, "arithmetic takes nothing");
        let want = weights + workspace + (block * options.kv_blocks) as u64;
        let mut model = RoutedLlama::new(cuda, &checkpoint, options).unwrap();
        assert_eq!(bytes.load(Ordering::SeqCst) as u64, want, "{name}");
        run(&mut model);
        assert_eq!(
            bytes.load(Ordering::SeqCst) as u64,
            want,
            "{name}, after steps"
        );
    }
}

#[test]
fn cuda_refuses_formats_that_it_does_not_have_before_it_takes_memory() {
    let cuda = super::emulated(Storage::BF16, Schedule::Descending);
    let checkpoint = load("tiny-routed", true);
    for format in [WeightFormat::F32, WeightFormat::Block(BlockType::Q4_0)] {
        assert!(model::weight_bytes(&cuda, &checkpoint, format).is_err());
    }
    assert!(model::kv_block_bytes(&cuda, &checkpoint.config, KvFormat::F32).is_err());
}

/// Norms and the rounding of each piece to a cache line are all that a model's own count leaves out.
#[test]
fn cpu_weights_take_what_the_budget_says() {
    let cpu = || {
        let options = CpuOptions {
            threads: Some(2),
            ..CpuOptions::default()
        };
        Cpu::new(options).unwrap()
    };
    for (name, experts) in FIXTURES {
        let checkpoint = load(name, experts);
        for format in [
            WeightFormat::Stored,
            WeightFormat::BF16,
            WeightFormat::Block(BlockType::Q8_0),
            WeightFormat::Block(BlockType::Q4_0),
        ] {
            let options = options(KvFormat::F32, format);
            let weights = model::weight_bytes(&cpu(), &checkpoint, format).unwrap();
            let mut model = RoutedLlama::new(cpu(), &checkpoint, options).unwrap();
            let config = &checkpoint.config;
            let norms = (2 * config.num_layers + 1) * (4 * config.hidden_size).next_multiple_of(64);
            let rest = weights - (model.weight_bytes() + norms) as u64;
            let matrices = 2 + 5 * config.num_layers;
            assert!(rest < 64 * matrices as u64, "{name} {format:?}: {rest}");
            // What ops work in is there before the first step.
            let taken = allocation_counter::measure(|| run(&mut model)).count_total;
            assert_eq!(taken, ALLOCATIONS_OF_RUN, "{name} {format:?}");
        }
    }
}

/// The lists of `run` itself.
const ALLOCATIONS_OF_RUN: u64 = 5;

#[test]
fn a_block_of_the_cache_is_the_same_everywhere() {
    let checkpoint = load("tiny-gqa", true);
    let config = &checkpoint.config;
    let cpu = Cpu::new(CpuOptions::default()).unwrap();
    for (format, bytes) in [(KvFormat::BF16, 2), (KvFormat::F32, 4)] {
        let numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * BLOCK_TOKENS;
        let block = model::kv_block_bytes(&cpu, config, format).unwrap();
        assert_eq!(block, numbers * bytes);
    }
}
