//! A model that ranks share is the model: ranks are threads of this process, each with a part of the heads and of the MLP's width.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use midpo::backend::cpu::{Cpu, CpuOptions};
use midpo::backend::reference::Reference;
use midpo::backend::{Backend, BackendError, StepLayout, StepSequence, WeightFormat};
use midpo::checkpoint::Checkpoint;
use midpo::dtype::BlockType;
use midpo::model::{Collective, InProcess, ModelError, RoutedLlama, Shard};
use midpo::types::{BlockId, TokenId, Variant};

use super::golden::{Goldens, Pass, Runner, assert_close, check_runner, load, options};

const RANKS: usize = 2;

fn cpu() -> Cpu {
    let options = CpuOptions {
        threads: Some(1),
        isa: None,
    };
    Cpu::new(options).unwrap()
}

fn runner<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    format: WeightFormat,
    rank: impl Collective<B> + 'static,
) -> Runner<B> {
    let rank = Box::new(rank);
    Runner::of(RoutedLlama::sharded(backend, checkpoint, options(format), rank).unwrap())
}

/// What `work` makes of each rank, all at once.
fn on_all<T: Send>(ranks: usize, work: impl Fn(InProcess) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads = InProcess::ranks(ranks).into_iter();
        let threads: Vec<_> = threads.map(|rank| scope.spawn(|| work(rank))).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect()
    })
}

#[test]
fn ranks_give_the_authors_numbers() {
    for model in ["tiny-routed", "tiny-gqa"] {
        let checkpoint = load(model, true);
        for chunk in [320, 13] {
            on_all(RANKS, |rank| {
                check_runner(
                    model,
                    runner(cpu(), &checkpoint, WeightFormat::F32, rank),
                    chunk,
                );
            });
        }
        on_all(RANKS, |rank| {
            check_runner(
                model,
                runner(Reference, &checkpoint, WeightFormat::F32, rank),
                320,
            );
        });
    }
    // As many as there are heads, with 44 numbers of h each.
    let checkpoint = load("tiny-routed", true);
    on_all(4, |rank| {
        check_runner(
            "tiny-routed",
            runner(cpu(), &checkpoint, WeightFormat::F32, rank),
            320,
        );
    });
}

fn bits(pass: &Pass) -> (Vec<u32>, Vec<u32>) {
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect();
    (bits(&pass.logits), bits(&pass.gates))
}

/// All ranks hold the same bits, whatever the chunks; and those of a model that is whole but for the order of sums.
#[test]
fn every_rank_has_the_bits_of_the_others_whatever_the_batch() {
    let goldens = Goldens::open("tiny-gqa");
    let ids = goldens.ids("chat");
    for (experts, format) in [
        (true, WeightFormat::Stored),
        (true, WeightFormat::BF16),
        (false, WeightFormat::F32),
        (true, WeightFormat::Block(BlockType::Q8_0)),
    ] {
        let checkpoint = load("tiny-gqa", experts);
        let gates = match experts {
            true => Variant::Routed.gates(),
            false => Variant::Base.gates(),
        };
        let whole = RoutedLlama::new(cpu(), &checkpoint, options(format)).unwrap();
        let whole = Runner::of(whole).extend(&ids, 0, gates, 320);
        let mut first = None;
        for chunk in [320, 5] {
            let passes = on_all(RANKS, |rank| {
                runner(cpu(), &checkpoint, format, rank).extend(&ids, 0, gates, chunk)
            });
            for pass in &passes {
                // Sums of another order, once in a while rounded to the other side where weights or h are.
                assert_close("logits", &pass.logits, &whole.logits, 2e-2);
                assert_close("gates", &pass.gates, &whole.gates, 2e-3);
                assert_eq!(&bits(pass), first.get_or_insert_with(|| bits(pass)));
            }
        }
    }
}

#[test]
fn what_ranks_cannot_share_is_named() {
    let checkpoint = load("tiny-gqa", true);
    let refused = |checkpoint: &Checkpoint, ranks: usize| -> String {
        let rank = InProcess::ranks(ranks).remove(0);
        let made = RoutedLlama::sharded(
            cpu(),
            checkpoint,
            options(WeightFormat::Stored),
            Box::new(rank),
        );
        let error: ModelError = made.err().unwrap();
        error.to_string()
    };
    let message = refused(&checkpoint, 4);
    assert!(message.contains("num_key_value_heads"), "{message}");
    assert!(message.contains("a multiple of 4"), "{message}");
    assert!(message.contains("found 2"), "{message}");
    let message = refused(&checkpoint, 5);
    assert!(message.contains("num_attention_heads"), "{message}");
}

/// Fails as a rank would in the middle of a pass.
struct Failing {
    inner: InProcess,
    left: usize,
}

impl<B: Backend> Collective<B> for Failing {
    fn shard(&self) -> Shard {
        Collective::<B>::shard(&self.inner)
    }

    fn all_reduce(
        &mut self,
        backend: &mut B,
        rows: usize,
        buffers: &mut [&mut B::Buffer],
    ) -> Result<(), BackendError> {
        if self.left == 0 {
            return Err(BackendError::Unavailable {
                device: "test",
                reason: "the test asked for an error".to_owned(),
            });
        }
        self.left -= 1;
        self.inner.all_reduce(backend, rows, buffers)
    }

    fn abort(&mut self) {
        Collective::<B>::abort(&mut self.inner);
    }
}

/// The error of a step of `tokens` tokens.
fn step<B: Backend>(model: &mut RoutedLlama<B>, tokens: usize) -> Option<String> {
    let block_table: Vec<_> = (0..20).map(BlockId::new).collect();
    let sequences = [StepSequence {
        rows: tokens,
        start: 0,
        block_table: &block_table,
        gates: Variant::Routed.gates(),
    }];
    let layout = StepLayout {
        tokens: &vec![TokenId(1); tokens],
        sequences: &sequences,
        logit_rows: &[],
    };
    model.forward(&layout).err().map(|error| error.to_string())
}

#[test]
fn a_rank_that_fails_keeps_nobody_waiting() {
    let checkpoint = load("tiny-routed", true);
    let build = |rank: Box<dyn Collective<Cpu>>| {
        RoutedLlama::sharded(cpu(), &checkpoint, options(WeightFormat::Stored), rank).unwrap()
    };
    let errors = on_all(RANKS, |inner| {
        let fails = Collective::<Cpu>::shard(&inner).rank() == 1;
        // The third meeting is in the second layer.
        let left = if fails { 3 } else { usize::MAX };
        let mut model = build(Box::new(Failing { inner, left }));
        [step(&mut model, 7), step(&mut model, 7)].map(Option::unwrap)
    });
    for message in &errors[0] {
        assert!(message.contains("rank 1 has failed"), "{message}");
    }
    assert!(errors[1][0].contains("the test asked for an error"));
}

#[test]
fn ranks_that_disagree_or_leave_are_an_error_on_each() {
    let checkpoint = load("tiny-routed", true);
    let build = |rank: InProcess| {
        let options = options(WeightFormat::Stored);
        RoutedLlama::sharded(cpu(), &checkpoint, options, Box::new(rank)).unwrap()
    };
    let errors = on_all(RANKS, |rank| {
        let tokens = 5 + Collective::<Cpu>::shard(&rank).rank();
        step(&mut build(rank), tokens).unwrap()
    });
    for message in errors {
        assert!(
            message.contains("rank 1 brought 384 numbers, rank 0 320"),
            "{message}"
        );
    }
    let errors = on_all(RANKS, |rank| {
        if Collective::<Cpu>::shard(&rank).rank() == 1 {
            return None;
        }
        step(&mut build(rank), 5)
    });
    let message = errors[0].as_ref().unwrap();
    assert!(message.contains("rank 1 has left"), "{message}");
}
