//! Calls against a contract, and steps outside of their limits.

use midpo::backend::cpu::{Cpu, CpuOptions, Isa};
use midpo::backend::ops::{self};
use midpo::backend::reference::Reference;
use midpo::backend::{Backend, HostMatrix, StepLayout, StepSequence, WeightFormat};
use midpo::dtype::DType;
use midpo::types::{BlockId, TokenId, Variant};

use super::{Random, Weights, cpus, limits, plain_step};

/// A call against its contract is an error that names the operand, never a panic.
pub(crate) fn check_contracts<B: Backend>(backend: &mut B) {
    let message =
        |result: Result<(), midpo::backend::BackendError>| result.unwrap_err().to_string();
    let random = &mut Random(11);
    let weights = Weights::random(random, 8, 4, DType::F32);
    let w = backend
        .matrix(&[weights.host()], None, WeightFormat::Stored)
        .unwrap();
    let (x, narrow) = (backend.buffer(3, 4).unwrap(), backend.buffer(3, 3).unwrap());
    let mut y = backend.buffer(3, 8).unwrap();
    for (x, n, operand) in [(&x, 4, "`x`"), (&narrow, 1, "`x`")] {
        let call = ops::MatMul {
            n,
            x,
            w: &w,
            y: &mut y,
            add: false,
        };
        let message = message(backend.matmul(call));
        assert!(message.contains(operand), "{message}");
    }
    let short = HostMatrix {
        bytes: &weights.bytes[1..],
        ..weights.host()
    };
    assert!(
        backend
            .matrix(&[short], None, WeightFormat::Stored)
            .is_err()
    );
    let other = Weights::random(random, 8, 5, DType::F32);
    let parts = [weights.host(), other.host()];
    assert!(backend.matrix(&parts, None, WeightFormat::Stored).is_err());
    let extension = Weights::random(random, 7, 2, DType::F32);
    let extended = backend.matrix(
        &[weights.host()],
        Some(extension.host()),
        WeightFormat::Stored,
    );
    assert!(extended.is_err());
    let quantised = Weights::random(random, 8, 32, DType::Q4_0);
    let extended = backend.matrix(
        &[weights.host()],
        Some(quantised.host()),
        WeightFormat::Stored,
    );
    assert!(extended.is_err());
    // A table smaller than the vocabulary that ids were checked against.
    let step = plain_step(backend, &[TokenId(49)], &[]);
    let mut embedded = backend.exact_buffer(1, 4).unwrap();
    let call = ops::Embed {
        step: &step,
        table: &w,
        x: &mut embedded,
    };
    assert!(message(backend.embed(call)).contains("table"));
}

/// A step outside its limits, or one that would write a block twice, is refused and leaves the step before.
pub(crate) fn check_steps<B: Backend>(backend: &mut B) {
    let blocks: Vec<_> = (0..4).map(BlockId::new).collect();
    let far = [BlockId::new(512)];
    let sequence = |rows, start, block_table| StepSequence {
        rows,
        start,
        block_table,
        gates: Variant::Routed.gates(),
    };
    let tokens = [TokenId(0); 20];
    let wrong_token = [TokenId(50)];
    let refused: [(&[TokenId], &[StepSequence<'_>], &[usize]); 8] = [
        (&tokens, &[sequence(19, 0, &blocks)], &[]),
        (&tokens, &[sequence(20, 0, &blocks[..1])], &[]),
        (&tokens, &[sequence(20, 2040, &blocks)], &[]),
        (
            &tokens,
            &[sequence(20, 0, &blocks), sequence(0, 0, &blocks)],
            &[],
        ),
        (
            &tokens,
            &[sequence(10, 0, &blocks[..1]), sequence(10, 0, &blocks[..1])],
            &[],
        ),
        (&tokens, &[sequence(20, 0, &blocks)], &[20]),
        (&tokens[..1], &[sequence(1, 0, &far)], &[]),
        (&wrong_token, &[sequence(1, 0, &blocks)], &[]),
    ];
    let mut step = backend.step(limits(20)).unwrap();
    for (i, (tokens, sequences, logit_rows)) in refused.into_iter().enumerate() {
        let layout = StepLayout {
            tokens,
            sequences,
            logit_rows,
        };
        assert!(backend.load_step(&layout, &mut step).is_err(), "layout {i}");
    }
    // Shared blocks that are only read are fine.
    let (one, two) = ([blocks[0], blocks[1]], [blocks[0], blocks[2]]);
    let layout = StepLayout {
        tokens: &tokens,
        sequences: &[sequence(10, 16, &one), sequence(10, 16, &two)],
        logit_rows: &[0, 19],
    };
    backend.load_step(&layout, &mut step).unwrap();
}

#[test]
fn calls_against_a_contract_are_errors_on_every_backend() {
    check_contracts(&mut Reference);
    check_steps(&mut Reference);
    for cpu in cpus().iter_mut().flatten() {
        check_contracts(cpu);
        check_steps(cpu);
    }
}

#[test]
fn an_instruction_set_that_is_not_there_is_an_error() {
    let foreign = if cfg!(target_arch = "x86_64") {
        Isa::Neon
    } else {
        Isa::Avx2
    };
    let options = CpuOptions {
        threads: Some(1),
        isa: Some(foreign),
    };
    assert!(Cpu::new(options).is_err());
}
