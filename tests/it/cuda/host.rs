//! The host code alone, over a driver that does nothing: what it asks for, and what it takes from the allocator while it asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use midpo::backend::cuda::{Cuda, CudaOptions, DeviceShape, Driver, Gemm, Launch, Storage};
use midpo::backend::{
    BackendError, KvFormat, SampleRow, Sampled, StepLayout, StepSequence, WeightFormat,
};
use midpo::model::{ModelOptions, RoutedLlama};
use midpo::types::{BLOCK_TOKENS, BlockId, TokenId, Variant};

use crate::golden::load;

/// How often a driver was asked for work.
#[derive(Clone, Default)]
struct Asked {
    launches: Arc<AtomicUsize>,
    vendor_products: Arc<AtomicUsize>,
    replays: Arc<AtomicUsize>,
    fetches: Arc<AtomicUsize>,
    waits: Arc<AtomicUsize>,
    refuses_to_record: bool,
}

impl Asked {
    fn take(&self) -> [usize; 3] {
        [&self.launches, &self.vendor_products, &self.replays]
            .map(|count| count.swap(0, Ordering::SeqCst))
    }

    /// Copies back, and waits.
    fn take_copies(&self) -> [usize; 2] {
        [&self.fetches, &self.waits].map(|count| count.swap(0, Ordering::SeqCst))
    }
}

/// Addresses without memory.
struct Nowhere(Asked);

impl Driver for Nowhere {
    type Memory = ();
    type HostMemory = Vec<u8>;
    type Mark = ();
    type Graph = ();

    fn shape(&self) -> DeviceShape {
        DeviceShape {
            multiprocessors: 132,
            shared_bytes: 227 << 10,
        }
    }

    fn allocate(&self, _: &str, _: usize) -> Result<(), BackendError> {
        Ok(())
    }

    fn occupied(&self, bytes: usize) -> usize {
        bytes
    }

    fn address(&self, (): &()) -> u64 {
        256
    }

    fn zero(&self, (): &mut ()) -> Result<(), BackendError> {
        Ok(())
    }

    fn upload(&self, (): &mut (), _: usize, _: &[u8]) -> Result<(), BackendError> {
        Ok(())
    }

    fn host_memory(&self, bytes: usize) -> Result<Vec<u8>, BackendError> {
        Ok(vec![0; bytes])
    }

    unsafe fn fetch(&self, (): &(), _: &mut Vec<u8>, _: usize) -> Result<(), BackendError> {
        self.0.fetches.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn wait(&self) -> Result<(), BackendError> {
        self.0.waits.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    unsafe fn push(
        &self,
        (): &mut (),
        _: usize,
        _: &Vec<u8>,
        _: usize,
    ) -> Result<(), BackendError> {
        Ok(())
    }

    fn reached(&self, (): &()) -> Result<(), BackendError> {
        Ok(())
    }

    fn join(&self) -> Result<(), BackendError> {
        Ok(())
    }

    unsafe fn launch(&self, _: &Launch<'_>) -> Result<(), BackendError> {
        self.0.launches.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    unsafe fn gemm(&self, _: &Gemm) -> Result<bool, BackendError> {
        self.0.vendor_products.fetch_add(1, Ordering::SeqCst);
        Ok(true)
    }

    fn begin_recording(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn end_recording(&self) -> Result<(), BackendError> {
        match self.0.refuses_to_record {
            true => Err(BackendError::Unavailable {
                device: "nowhere",
                reason: "no room for a recording".to_owned(),
            }),
            false => Ok(()),
        }
    }

    unsafe fn replay(&self, (): &()) -> Result<(), BackendError> {
        self.0.replays.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

const SEQUENCES: usize = 3;
const POSITIONS: usize = 600;

fn model(deterministic: bool, graphs: bool) -> (RoutedLlama<Cuda<Nowhere>>, Asked) {
    model_on(Asked::default(), deterministic, graphs)
}

fn model_on(
    asked: Asked,
    deterministic: bool,
    graphs: bool,
) -> (RoutedLlama<Cuda<Nowhere>>, Asked) {
    let options = CudaOptions {
        storage: Storage::BF16,
        deterministic,
        graphs,
    };
    let cuda = Cuda::new(Nowhere(asked.clone()), options);
    let options = ModelOptions {
        rows: 64,
        logit_rows: SEQUENCES,
        sequences: SEQUENCES,
        positions: POSITIONS,
        kv_blocks: SEQUENCES * POSITIONS.div_ceil(BLOCK_TOKENS),
        kv_format: KvFormat::BF16,
        weight_format: WeightFormat::Stored,
    };
    let model = RoutedLlama::new(cuda, &load("tiny-routed", true), options).unwrap();
    (model, asked)
}

/// `work` on a step of `rows` tokens a sequence from `start` on, each with logits.
fn on_step<R>(
    model: &mut RoutedLlama<Cuda<Nowhere>>,
    rows: [usize; SEQUENCES],
    start: usize,
    work: impl FnOnce(&mut RoutedLlama<Cuda<Nowhere>>, &StepLayout<'_>) -> R,
) -> R {
    let blocks: Vec<_> = (0..model.kv_shape().blocks as u32)
        .map(BlockId::new)
        .collect();
    let tables = blocks.chunks_exact(POSITIONS.div_ceil(BLOCK_TOKENS));
    let sequences: Vec<_> = tables
        .zip(rows)
        .map(|(block_table, rows)| StepSequence {
            rows,
            start,
            block_table,
            gates: Variant::Routed.gates(),
        })
        .collect();
    let layout = StepLayout {
        tokens: &vec![TokenId(3); rows.iter().sum()],
        sequences: &sequences,
        logit_rows: &[0, 1, 2],
    };
    work(model, &layout)
}

/// What such steps take from the allocator.
fn allocations(
    model: &mut RoutedLlama<Cuda<Nowhere>>,
    rows: [usize; SEQUENCES],
    start: usize,
) -> u64 {
    on_step(model, rows, start, |model, layout| {
        let rows = vec![SampleRow::default(); SEQUENCES];
        let mut sampled = Sampled::default();
        let mut sample = || {
            let submitted = model.submit(layout, &rows).unwrap();
            let output = model.collect(submitted, &rows, &mut sampled).unwrap();
            assert!(output.sampled);
        };
        // The client's own lists find their room.
        sample();
        let sampling = allocation_counter::measure(sample).count_total;
        let reading = allocation_counter::measure(|| {
            model.forward(layout).unwrap();
        });
        sampling + reading.count_total
    })
}

#[test]
fn a_step_is_asked_for_without_waiting_and_its_results_come_back_behind_it() {
    let (mut model, asked) = model(false, true);
    let rows = vec![SampleRow::default(); SEQUENCES];
    // Tokens and gates; without tokens, logits and gates.
    for rows in [&rows[..], &[]] {
        asked.take_copies();
        on_step(&mut model, [1, 1, 1], 7, |model, layout| {
            let submitted = model.submit(layout, rows).unwrap();
            assert_eq!(asked.take_copies(), [2, 0]);
            let mut sampled = Sampled::default();
            let output = model.collect(submitted, rows, &mut sampled).unwrap();
            assert_eq!(output.sampled, !rows.is_empty());
        });
        let [fetches, waits] = asked.take_copies();
        assert!(fetches == 0 && waits > 0, "{fetches} {waits}");
    }
}

#[test]
fn a_step_takes_nothing_from_the_allocator_once_its_results_have_been_read_at_that_size() {
    for graphs in [false, true] {
        check_allocations(graphs);
    }
}

fn check_allocations(graphs: bool) {
    let (mut model, asked) = model(false, graphs);
    // The largest step: what is read back finds its room.
    allocations(&mut model, [40, 23, 1], 0);
    asked.take();
    // Prompts, prompts beside decodes, decodes within one split of the cache and over several.
    for (rows, start) in [
        ([40, 23, 1], 64),
        ([62, 1, 1], 128),
        ([1, 1, 1], 190),
        ([1, 1, 1], 590),
    ] {
        assert_eq!(
            allocations(&mut model, rows, start),
            0,
            "{rows:?} at {start}"
        );
        let [launches, products, replays] = asked.take();
        // Of the three steps that `allocations` makes, two sample.
        if graphs && rows == [1, 1, 1] {
            assert_eq!((launches, products, replays), (2, 0, 3));
            continue;
        }
        assert!(launches > 0 && replays == 0);
        // Few rows have a kernel of our own; the head's are few in every step.
        let many = rows.iter().sum::<usize>() > 32;
        assert_eq!(products > 0, many, "{rows:?}");
    }
}

#[test]
fn a_device_that_refuses_to_record_gets_its_launches_one_by_one() {
    let refusing = Asked {
        refuses_to_record: true,
        ..Asked::default()
    };
    let (mut model, asked) = model_on(refusing, false, true);
    assert_eq!(model.recorded(), 0);
    asked.take();
    allocations(&mut model, [1, 1, 1], 7);
    let [launches, _, replays] = asked.take();
    assert!(launches > 3 && replays == 0);
}

#[test]
fn deterministic_multiplies_by_its_own_kernels_alone() {
    let work = |deterministic| {
        let (mut model, asked) = model(deterministic, false);
        allocations(&mut model, [40, 1, 1], 5);
        asked.take()
    };
    let ([launches, products, _], [own_launches, none, _]) = (work(false), work(true));
    assert_eq!(none, 0);
    assert_eq!(own_launches, launches + products);
}
