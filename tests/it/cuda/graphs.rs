//! Decode steps that are recorded once and replayed give the bits of the same steps kernel by kernel.

use std::cell::RefCell;
use std::sync::atomic::Ordering;

use midpo::backend::cuda::{Arg, Driver, Launch};
use midpo::backend::{Backend, BackendError, KvFormat, StepLayout, StepSequence, WeightFormat};
#[cfg(feature = "cuda")]
use midpo::backend::{
    cuda::{Cuda, CudaOptions, Storage},
    device::Device,
};
use midpo::model::{ModelOptions, RoutedLlama};
use midpo::types::{BLOCK_TOKENS, BlockId, TokenId, Variant};

use super::TestDriver;
use super::memory::counting;
use crate::golden::load;

/// What the emulation keeps instead of running it.
#[derive(Default)]
pub(crate) struct Recorder(RefCell<Option<Recording>>);

/// Launches in their order.
#[derive(Default)]
pub(crate) struct Recording(Vec<OwnLaunch>);

struct OwnLaunch {
    kernel: &'static str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    args: Vec<Arg>,
}

impl Recorder {
    pub(crate) fn begin(&self) {
        let before = self.0.replace(Some(Recording::default()));
        assert!(before.is_none(), "one recording at a time");
    }

    /// Whether the launch was kept for a recording, and is not to be done.
    pub(crate) fn keeps(&self, launch: &Launch<'_>) -> bool {
        let mut recording = self.0.borrow_mut();
        let Some(Recording(launches)) = recording.as_mut() else {
            return false;
        };
        launches.push(OwnLaunch {
            kernel: launch.kernel,
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            args: launch.args.to_vec(),
        });
        true
    }

    pub(crate) fn end(&self) -> Recording {
        self.0.take().expect("a recording was begun")
    }

    /// Nothing but launches may be asked for while it records.
    pub(crate) fn refuse_else(&self) {
        assert!(self.0.borrow().is_none(), "not while a step is recorded");
    }
}

impl Recording {
    pub(crate) unsafe fn replay(&self, driver: &TestDriver) -> Result<(), BackendError> {
        for own in &self.0 {
            let launch = Launch {
                kernel: own.kernel,
                grid: own.grid,
                threads: own.threads,
                shared_bytes: own.shared_bytes,
                args: &own.args,
            };
            // SAFETY: the caller's promise.
            unsafe { driver.launch(&launch)? };
        }
        Ok(())
    }
}

const SEQUENCES: usize = 6;
/// Past two splits of a decode's positions.
const POSITIONS: usize = 540;
const TABLE: usize = POSITIONS.div_ceil(BLOCK_TOKENS);

fn model<B: Backend>(backend: B, fixture: &str, kv_format: KvFormat) -> RoutedLlama<B> {
    let options = ModelOptions {
        rows: 300,
        logit_rows: SEQUENCES,
        sequences: SEQUENCES,
        positions: POSITIONS,
        kv_blocks: SEQUENCES * TABLE,
        kv_format,
        weight_format: WeightFormat::Stored,
    };
    RoutedLlama::new(backend, &load(fixture, true), options).unwrap()
}

/// Sequences that grow; the `i`-th has the `i`-th run of blocks and variant.
struct Sequences([usize; SEQUENCES]);

impl Sequences {
    /// `rows` more tokens of each sequence; bits of logits and gates.
    fn step<B: Backend>(
        &mut self,
        model: &mut RoutedLlama<B>,
        rows: [usize; SEQUENCES],
    ) -> Vec<u32> {
        let blocks: Vec<_> = (0..SEQUENCES * TABLE)
            .map(|i| BlockId::new(i as u32))
            .collect();
        let (mut tokens, mut sequences, mut logit_rows) = (vec![], vec![], vec![]);
        for (i, rows) in rows.into_iter().enumerate().filter(|(_, rows)| *rows > 0) {
            let start = self.0[i];
            let token = |position: usize| TokenId(((17 * i + 29 * position) % 200) as u32);
            tokens.extend((start..start + rows).map(token));
            logit_rows.push(tokens.len() - 1);
            sequences.push(StepSequence {
                rows,
                start,
                block_table: &blocks[i * TABLE..][..TABLE],
                gates: Variant::ALL[i % Variant::ALL.len()].gates(),
            });
            self.0[i] += rows;
        }
        let layout = StepLayout {
            tokens: &tokens,
            sequences: &sequences,
            logit_rows: &logit_rows,
        };
        let output = model.forward(&layout).unwrap();
        let all = output.logits.iter().chain(output.gates);
        all.map(|value| value.to_bits()).collect()
    }
}

/// Rows of each sequence in each step: prompts to around the ends of splits, decodes of one to all, a prompt beside them, decodes again.
const STEPS: [[usize; SEQUENCES]; 12] = [
    [255, 3, 0, 0, 0, 0],
    [0, 0, 254, 20, 1, 0],
    [1, 1, 1, 1, 1, 0],
    [1, 0, 1, 0, 0, 0],
    [0, 0, 1, 0, 0, 0],
    [0, 1, 0, 0, 0, 0],
    [255, 1, 0, 0, 0, 30],
    [1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 1],
    [1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 0, 1],
    [0, 0, 0, 0, 1, 0],
];
/// Those in which every sequence has one row.
const DECODES: usize = 9;

fn check<B: Backend>(launched: B, replayed: B, fixture: &str, kv_format: KvFormat) -> usize {
    let mut launched = model(launched, fixture, kv_format);
    let mut replayed = model(replayed, fixture, kv_format);
    assert_eq!(launched.recorded(), 0);
    let (mut one, mut other) = (Sequences([0; SEQUENCES]), Sequences([0; SEQUENCES]));
    for (i, rows) in STEPS.into_iter().enumerate() {
        let want = one.step(&mut launched, rows);
        let got = other.step(&mut replayed, rows);
        assert!(!want.is_empty() && got == want, "{fixture}, step {i}");
    }
    replayed.recorded()
}

#[test]
fn replayed_steps_have_the_bits_of_launched_ones() {
    if let Some(reason) = cuda_emu::ABSENT {
        eprintln!("skipped: {reason}");
        return;
    }
    for (fixture, kv_format) in [("tiny-routed", KvFormat::BF16), ("tiny-gqa", KvFormat::FP8)] {
        let (recording, counts) = counting(true);
        let recorded = check(counting(false).0, recording, fixture, kv_format);
        let count = |of: &std::sync::atomic::AtomicUsize| of.load(Ordering::SeqCst);
        // 1, 2, 4 and 6 rows, each of 1, 2 and 3 splits.
        assert_eq!((recorded, count(&counts.recordings)), (12, 12));
        assert_eq!(count(&counts.replays), DECODES);
    }
}

/// What was recorded is not forgotten by steps that are launched, and the other way round.
#[test]
fn a_model_can_be_told_to_launch_what_it_could_replay() {
    if cuda_emu::ABSENT.is_some() {
        return;
    }
    let (cuda, counts) = counting(true);
    let mut model = model(cuda, "tiny-gqa", KvFormat::BF16);
    let mut sequences = Sequences([0; SEQUENCES]);
    let mut bits = Vec::new();
    for (replays, want) in [(true, 1), (false, 1), (true, 2)] {
        model.set_replays(replays);
        // The same step anew: K and V are written again where they were.
        sequences.0 = [0; SEQUENCES];
        bits.push(sequences.step(&mut model, [1; SEQUENCES]));
        assert_eq!(counts.replays.load(Ordering::SeqCst), want);
    }
    assert!(bits[0] == bits[1] && bits[1] == bits[2]);
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_replays_what_it_would_launch() {
    let open = |graphs| {
        let options = CudaOptions {
            storage: Storage::BF16,
            deterministic: true,
            graphs,
        };
        Device::open(0).map(|gpu| Cuda::new(gpu, options))
    };
    match (open(false), open(true)) {
        (Ok(launched), Ok(replayed)) => {
            let recorded = check(launched, replayed, "tiny-routed", KvFormat::BF16);
            assert_eq!(recorded, 12);
        }
        (Err(error), _) | (_, Err(error)) => eprintln!("skipped on a GPU: {error}"),
    }
}
