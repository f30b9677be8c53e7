//! The CUDA backend's host code and kernels, run by `kernels/emu` on the CPU, and on a GPU where a build has the feature and a machine
//! the device: every op against `backend::reference` over the cases of
//! `ops.rs`, at sizes around the kernels' tiles, and the laws that hold to the bit: neither the order of threads and blocks, nor who
//! else is in the batch changes a result.
//!
//! Operands are rounded to bf16 first, which both storages hold: what is left is the backend's own error.

#![allow(clippy::unwrap_used, clippy::expect_used)]
// The emulation runs what a device would: raw addresses.
#![allow(unsafe_code)]

mod copies;
mod driver;
mod engine;
mod graphs;
mod host;
mod memory;
mod sample;

use cuda_emu::Schedule;
use half::bf16;
use midpo::backend::cuda::{Cuda, CudaOptions, Storage};
#[cfg(feature = "cuda")]
use midpo::backend::device::Device;
use midpo::backend::ops::{self, Heads};
use midpo::backend::reference::Reference;
use midpo::backend::{KvFormat, WeightFormat};
use midpo::dtype::DType;
use midpo::types::{TokenId, Variant};

pub(crate) use driver::{TestDriver, TestGraph, TestHostMemory, TestMark, TestMemory};

use super::ops::{
    AttentionCase, MatMulCase, MixCase, Random, Step, Weights, assert_close, assert_same_bits,
    check_contracts, check_steps, columns, embed, gather_rows, rms_norm,
};

const STORAGES: [Storage; 2] = [Storage::BF16, Storage::F16];

fn on(driver: TestDriver, storage: Storage, deterministic: bool) -> Cuda<TestDriver> {
    let options = CudaOptions {
        storage,
        deterministic,
        graphs: false,
    };
    Cuda::new(driver, options)
}

pub(crate) fn emulated(storage: Storage, schedule: Schedule) -> Cuda<TestDriver> {
    on(TestDriver::emulated(schedule), storage, true)
}

/// A backend for each storage in two orders of threads, and for each on a GPU. What is not there is left out with a line that says why.
fn backends() -> Vec<(Storage, Cuda<TestDriver>)> {
    let mut backends = Vec::new();
    match cuda_emu::ABSENT {
        Some(reason) => eprintln!("skipped: {reason}"),
        None => {
            let schedules = [Schedule::Shuffled(3), Schedule::Descending];
            let pairs = STORAGES.into_iter().zip(schedules);
            backends.extend(pairs.map(|(storage, order)| (storage, emulated(storage, order))));
        }
    }
    #[cfg(feature = "cuda")]
    for storage in STORAGES {
        match Device::open(0) {
            Ok(gpu) => backends.push((storage, on(TestDriver::Gpu(gpu), storage, true))),
            Err(error) => eprintln!("skipped on a GPU: {error}"),
        }
    }
    backends
}

/// The same in every order of threads and blocks.
fn check_schedules<T: PartialEq + std::fmt::Debug>(run: impl Fn(&mut Cuda<TestDriver>) -> T) {
    if cuda_emu::ABSENT.is_some() {
        return;
    }
    let mut first = None;
    for schedule in Schedule::ALL {
        let got = run(&mut emulated(Storage::BF16, schedule));
        let first = first.get_or_insert_with(|| run(&mut emulated(Storage::BF16, schedule)));
        assert!(got == *first, "{schedule:?} changes the result");
    }
}

fn round(values: &mut [f32]) {
    values
        .iter_mut()
        .for_each(|x| *x = bf16::from_f32(*x).to_f32());
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

// ----------------------------------------------------------------------------------------------------- embed, norm, gather

/// More than the host has room for at once (`Staging`): a piece that changed before it was copied would show.
#[test]
fn weights_of_many_pieces_arrive_whole() {
    let table = Weights::random(&mut Random(21), 50, 300_000, DType::BF16);
    let tokens = [0, 12, 13, 26, 27, 39, 49].map(TokenId);
    let want = embed(&mut Reference, &table, &tokens);
    for (storage, cuda) in &mut backends() {
        if *storage == Storage::BF16 {
            assert_same_bits("embed", &embed(cuda, &table, &tokens), &want);
        }
    }
}

#[test]
fn embed_widens_the_table_exactly() {
    let random = &mut Random(21);
    for (_, cuda) in &mut backends() {
        for (d, n) in [(1, 1), (37, 0), (64, 3), (1032, 2)] {
            let table = Weights::random(random, 50, d, DType::BF16);
            let tokens: Vec<_> = (0..n).map(|_| TokenId(random.below(50) as u32)).collect();
            let want = embed(&mut Reference, &table, &tokens);
            assert_same_bits(
                &format!("d {d} n {n}"),
                &embed(cuda, &table, &tokens),
                &want,
            );
        }
        for dtype in [DType::Q4_0, DType::Q6K] {
            let table = Weights::random(random, 50, 2 * dtype.block_len(), dtype);
            let want = embed(&mut Reference, &table.rounded(), &[TokenId(7), TokenId(49)]);
            let got = embed(cuda, &table, &[TokenId(7), TokenId(49)]);
            // f16 keeps three bits more than the bf16 it is compared with.
            assert_close(&format!("{dtype:?}"), 4e-3, &got, &want);
        }
    }
}

#[test]
fn rms_norm_matches_the_reference_and_each_row_stands_alone() {
    let random = &mut Random(22);
    for (_, cuda) in &mut backends() {
        for d in [1, 8, 37, 256, 2048, 2056] {
            for n in [0, 1, 5] {
                let (x, weight) = (random.numbers(n * d), random.numbers(d));
                let want = rms_norm(&mut Reference, n, &x, &weight);
                let got = rms_norm(cuda, n, &x, &weight);
                let label = format!("rms_norm n {n} d {d}");
                assert_close(&label, ops::RMS_NORM.tolerance.bf16, &got, &want);
                if n > 0 {
                    let alone = rms_norm(cuda, 1, &x[(n - 1) * d..], &weight);
                    assert_same_bits(&label, &alone, &got[(n - 1) * d..]);
                }
            }
        }
    }
    let (x, weight) = (random.numbers(3 * 777), random.numbers(777));
    check_schedules(|cuda| bits(&rms_norm(cuda, 3, &x, &weight)));
}

#[test]
fn gather_rows_copies_the_rows_in_their_order() {
    let x = Random(23).numbers(37 * 5);
    for rows in [vec![], vec![36], vec![3, 3, 0, 36]] {
        let want = gather_rows(&mut Reference, 37, &x, &rows);
        for (_, cuda) in &mut backends() {
            assert_same_bits("gather_rows", &gather_rows(cuda, 37, &x, &rows), &want);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------- matmul

/// As [`backends`], with the products that are not the same in every batch: few rows by `gemm_skinny`.
fn fast_backends() -> Vec<(Storage, Cuda<TestDriver>)> {
    let mut backends = Vec::new();
    if cuda_emu::ABSENT.is_none() {
        let schedules = [Schedule::Shuffled(5), Schedule::Descending];
        let pairs = STORAGES.into_iter().zip(schedules);
        let fast = |storage, order| on(TestDriver::emulated(order), storage, false);
        backends.extend(pairs.map(|(storage, order)| (storage, fast(storage, order))));
    }
    #[cfg(feature = "cuda")]
    for storage in STORAGES {
        if let Ok(gpu) = Device::open(0) {
            backends.push((storage, on(TestDriver::Gpu(gpu), storage, false)));
        }
    }
    backends
}

fn matmul_case(
    random: &mut Random,
    parts: &[(usize, DType)],
    k: (usize, usize),
    n: usize,
) -> MatMulCase {
    let mut case = MatMulCase::new(random, parts, k, n, WeightFormat::BF16);
    round(&mut case.x);
    round(&mut case.y);
    case
}

/// f32 where y is exact, ten times over: products of bf16 are exact in f32, but tensor cores cut what they add to fewer bits.
fn matmul_tolerance(case: &MatMulCase) -> f32 {
    match case.exact {
        true => 10.0 * ops::MATMUL.tolerance.f32,
        false => ops::MATMUL.tolerance.bf16,
    }
}

#[test]
fn matmul_matches_the_reference_around_the_sizes_of_tiles() {
    let random = &mut Random(24);
    for (storage, cuda) in &mut backends() {
        let rows = [0, 1, 3, 15, 16, 17, 40, 128, 129];
        for (i, n) in rows.into_iter().enumerate() {
            let o = [1, 63, 64, 65, 127, 129][i % 6];
            let k = [1, 37, 64, 65, 200][i % 5];
            let w = [0, 5, 32, 70][i % 4];
            let parts = [(o, DType::BF16), (o, DType::F32)];
            let mut case = matmul_case(random, &parts, (k, w), n);
            if *storage == Storage::F16 {
                // f16 would keep more of an f32 than the reference, which rounds to bf16.
                case.parts = case.parts.iter().map(Weights::rounded).collect();
            }
            for exact in [false, true] {
                case.exact = exact;
                let want = case.run(&mut Reference);
                let label = format!("matmul o {o} k {k} w {w} n {n} exact {exact}");
                assert_close(&label, matmul_tolerance(&case), &case.run(cuda), &want);
            }
        }
    }
}

#[test]
fn matmul_of_few_rows_matches_the_reference_whoever_shares_a_tile() {
    let random = &mut Random(34);
    for (storage, cuda) in &mut fast_backends() {
        // Units of 64 columns x 256 k among five blocks: one for all, fewer than blocks, tiles that several share, several a block.
        for (i, (o, k)) in [(1, 8), (64, 264), (65, 1000), (130, 520), (700, 40)]
            .into_iter()
            .enumerate()
        {
            for n in [1, 3, 8, 9, 16, 17, 32] {
                let w = [0, 5, 32][(i + n) % 3];
                let mut case = matmul_case(random, &[(o, DType::BF16)], (k, w), n);
                if *storage == Storage::F16 {
                    case.parts = case.parts.iter().map(Weights::rounded).collect();
                }
                for exact in [false, true] {
                    case.exact = exact;
                    let want = case.run(&mut Reference);
                    let label = format!("skinny o {o} k {k} w {w} n {n} exact {exact}");
                    assert_close(&label, matmul_tolerance(&case), &case.run(cuda), &want);
                }
            }
        }
    }
}

#[test]
fn matmul_of_few_rows_gives_a_row_the_same_bits_in_any_small_batch_and_order() {
    let random = &mut Random(35);
    let case = matmul_case(random, &[(140, DType::BF16)], (1200, 32), 32);
    for (_, cuda) in &mut fast_backends() {
        let whole = case.run(cuda);
        for (start, len) in [(0, 1), (7, 8), (10, 16), (31, 1)] {
            let got = case.run_rows(cuda, start..start + len);
            let label = format!("rows {start} + {len}");
            assert_same_bits(&label, &got, &whole[start * 140..(start + len) * 140]);
        }
    }
    if cuda_emu::ABSENT.is_some() {
        return;
    }
    let run = |order| {
        let cuda = &mut on(TestDriver::emulated(order), Storage::BF16, false);
        bits(&case.run_rows(cuda, 0..20))
    };
    let first = run(Schedule::Shuffled(1));
    for order in Schedule::ALL {
        assert!(run(order) == first, "{order:?} changes the result");
    }
}

/// cublasLt gives what our own kernels give.
#[cfg(feature = "cuda")]
#[test]
fn matmul_by_the_vendors_library_matches_the_reference() {
    let random = &mut Random(33);
    let gpu = match Device::open(0) {
        Ok(gpu) if gpu.has_cublaslt() => gpu,
        Ok(_) => return eprintln!("skipped: no cublasLt"),
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let cuda = &mut on(TestDriver::Gpu(gpu), Storage::BF16, false);
    for (n, o, k, w) in [(1, 64, 128, 32), (33, 130, 200, 5), (300, 512, 1024, 32)] {
        let mut case = matmul_case(random, &[(o, DType::BF16)], (k, w), n);
        for exact in [false, true] {
            case.exact = exact;
            let label = format!("cublasLt n {n} o {o} k {k} w {w} exact {exact}");
            let want = case.run(&mut Reference);
            assert_close(&label, matmul_tolerance(&case), &case.run(cuda), &want);
        }
    }
}

#[test]
fn matmul_widens_block_formats() {
    let random = &mut Random(25);
    for (_, cuda) in &mut backends() {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantised()) {
            let mut case =
                MatMulCase::new(random, &[(20, dtype)], (512, 0), 2, WeightFormat::Stored);
            round(&mut case.x);
            let got = case.run(cuda);
            let rounded = case.parts.iter().map(Weights::rounded).collect();
            let case = MatMulCase {
                parts: rounded,
                ..case
            };
            let tolerance = ops::MATMUL.tolerance.bf16;
            assert_close(dtype.as_str(), tolerance, &got, &case.run(&mut Reference));
        }
    }
}

#[test]
fn matmul_gives_a_row_the_same_bits_in_any_batch_and_order() {
    let random = &mut Random(26);
    let case = matmul_case(random, &[(140, DType::BF16)], (136, 32), 131);
    for (_, cuda) in &mut backends() {
        let whole = case.run(cuda);
        for (start, len) in [(0, 1), (7, 16), (100, 31), (130, 1)] {
            let got = case.run_rows(cuda, start..start + len);
            let label = format!("rows {start} + {len}");
            assert_same_bits(&label, &got, &whole[start * 140..(start + len) * 140]);
        }
    }
    check_schedules(|cuda| bits(&case.run_rows(cuda, 0..20)));
}

#[test]
fn matmul_with_a_zero_extension_input_is_bit_equal_to_no_extension() {
    let random = &mut Random(27);
    for n in [1, 20] {
        let mut case = matmul_case(random, &[(48, DType::BF16)], (104, 32), n);
        for row in case.x.chunks_exact_mut(136) {
            row[104..].fill(0.0);
        }
        let base = MatMulCase {
            parts: vec![case.parts[0].rounded()],
            extension: None,
            x: columns(&case.x, 136, 0..104),
            y: case.y.clone(),
            ..case
        };
        for (_, cuda) in &mut backends() {
            assert_same_bits("matmul", &case.run(cuda), &base.run(cuda));
        }
    }
}

// ------------------------------------------------------------------------------------------- rope_kv_write and attention

fn attention_case(
    random: &mut Random,
    heads: Heads,
    format: KvFormat,
    lengths: &[usize],
) -> AttentionCase {
    let mut case = AttentionCase::new(random, heads, format, lengths);
    case.qkv.iter_mut().for_each(|qkv| round(qkv));
    case
}

/// Whole prompts, and chunks with single rows in a cache that was full of NaN: both kernels, and both within one step.
fn check_attention(case: &AttentionCase, cuda: &mut Cuda<TestDriver>, random: &mut Random) {
    let tolerance = ops::ATTENTION.tolerance.bf16;
    let want = case.run(&mut Reference, &case.whole(), false).concat();
    let label = format!("attention {:?}", case.heads);
    let got = case.run(cuda, &case.whole(), false).concat();
    assert_close(&label, tolerance, &got, &want);
    let steps = case.chunked(random);
    let got = case.run(cuda, &steps, true).concat();
    assert_close(&format!("{label} in chunks"), tolerance, &got, &want);
}

#[test]
fn attention_matches_the_reference_for_all_heads() {
    let random = &mut Random(28);
    let ratios = [(1, 1), (6, 2), (4, 1), (3, 3), (8, 1), (20, 1)];
    for (at, (_, cuda)) in backends().iter_mut().enumerate() {
        for (i, size) in [8, 16, 32, 40, 64, 80, 96, 128].into_iter().enumerate() {
            // Every size and every ratio, not each with each: emulated threads cost.
            let (query, kv) = ratios[(i + 2 * at) % ratios.len()];
            let heads = Heads { query, kv, size };
            for format in [KvFormat::BF16, KvFormat::FP8] {
                let case = attention_case(random, heads, format, &[1, 17, 40]);
                check_attention(&case, cuda, random);
            }
        }
    }
}

#[test]
fn attention_crosses_blocks_tiles_and_splits_without_a_seam() {
    let random = &mut Random(29);
    let heads = Heads {
        query: 2,
        kv: 1,
        size: 16,
    };
    for (_, cuda) in &mut backends() {
        for (i, lengths) in [&[15, 16, 255][..], &[257, 3], &[530, 64, 65], &[257, 33]]
            .into_iter()
            .enumerate()
        {
            let format = [KvFormat::BF16, KvFormat::FP8][i % 2];
            let case = attention_case(random, heads, format, lengths);
            check_attention(&case, cuda, random);
        }
    }
}

/// The last row of each sequence on its own, after all others in one step.
fn last_rows(lengths: &[usize], which: &[usize]) -> Vec<Step> {
    let all = lengths.iter().enumerate();
    let prompts = all.map(|(i, length)| (i, 0..length - 1)).collect();
    let last = which.iter().map(|i| (*i, lengths[*i] - 1..lengths[*i]));
    vec![prompts, last.collect()]
}

#[test]
fn attention_gives_a_row_the_same_bits_in_any_batch_and_order() {
    let random = &mut Random(30);
    let heads = Heads {
        query: 4,
        kv: 2,
        size: 16,
    };
    let lengths = [300, 18, 257];
    for format in [KvFormat::BF16, KvFormat::FP8] {
        let case = attention_case(random, heads, format, &lengths);
        check_any_batch(&case, &lengths);
    }
}

fn check_any_batch(case: &AttentionCase, lengths: &[usize]) {
    let heads = case.heads;
    let width = heads.query * heads.size;
    let run = |cuda: &mut Cuda<TestDriver>, which: &[usize]| {
        let results = case.run(cuda, &last_rows(lengths, which), false);
        let last = |i: &usize| bits(&results[*i][(lengths[*i] - 1) * width..]);
        which.iter().map(last).collect::<Vec<_>>()
    };
    for (_, cuda) in &mut backends() {
        let together = run(cuda, &[0, 1, 2]);
        for (i, want) in together.iter().enumerate() {
            assert_eq!(run(cuda, &[i])[0], *want, "sequence {i} alone");
        }
    }
    check_schedules(|cuda| run(cuda, &[2, 0, 1]));
}

// ---------------------------------------------------------------------------------------------------- silu_mul_expert_mix

fn mix_case(random: &mut Random, size: (usize, usize), ranks: (usize, usize)) -> MixCase {
    let mut case = MixCase::new(random, size, ranks, DType::BF16);
    round(&mut case.gate_up);
    case
}

fn check_mix(case: &MixCase, cuda: &mut Cuda<TestDriver>) {
    let (m, n) = (case.m, case.n);
    let (want, want_gates) = case.run(&mut Reference, 0..n);
    let (got, got_gates) = case.run(cuda, 0..n);
    let width = m + case.experts.as_ref().map_or(0, |(_, shape)| shape.width());
    let label = format!("mix m {m} n {n} width {width}");
    let tolerance = ops::SILU_MUL_EXPERT_MIX.tolerance;
    // One scale for h and u: u is made of products of h as it is stored, so an h that is off by half a bit in eight shows in u.
    assert_close(&label, tolerance.bf16, &got, &want);
    // The gates' rows of E meet h in f32.
    assert_close(&label, tolerance.f32, &got_gates, &want_gates);
    if case.experts.is_some() {
        let (hu, gates) = case.run_apart(cuda, 0..n);
        assert_same_bits(&label, &hu, &got);
        assert_same_bits(&label, &gates, &got_gates);
    }
    for (i, rule) in case.gates.iter().enumerate().step_by(5) {
        let alone = case.run(cuda, i..i + 1);
        assert_same_bits(&label, &alone.0, &got[i * width..][..width]);
        assert_same_bits(&label, &alone.1, &got_gates[i * 6..][..6]);
        if case.experts.is_some() && *rule == Variant::Base.gates() {
            assert_eq!(alone.1[2..4], [0.0, 0.0], "{label}: gates of base");
            assert!(alone.0[m..].iter().all(|u| *u == 0.0), "{label}: u of base");
        }
    }
}

#[test]
fn silu_mul_expert_mix_matches_the_reference_for_all_rules_and_sizes() {
    let random = &mut Random(31);
    for (_, cuda) in &mut backends() {
        for (i, m) in [8, 16, 248, 256, 264, 1096].into_iter().enumerate() {
            for n in [0, 1, 15, 16, 17, 33] {
                let ranks = [(16, 16), (3, 5), (1, 40), (64, 64)][(i + n) % 4];
                check_mix(&mix_case(random, (m, n), ranks), cuda);
            }
        }
    }
    let case = mix_case(random, (520, 18), (16, 16));
    check_schedules(|cuda| {
        let (hu, gates) = case.run(cuda, 0..18);
        (bits(&hu), bits(&gates))
    });
}

#[test]
fn silu_mul_without_experts_leaves_the_gates_alone_and_h_as_with_them() {
    let random = &mut Random(32);
    for n in [1, 18] {
        let with = mix_case(random, (304, n), (16, 16));
        let without = MixCase {
            experts: None,
            gates: with.gates.clone(),
            gate_up: with.gate_up.clone(),
            ..with
        };
        for (_, cuda) in &mut backends() {
            check_mix(&without, cuda);
            let (h, gates) = without.run(cuda, 0..n);
            assert!(gates.iter().all(|gate| *gate == 9.0));
            let (hu, _) = with.run(cuda, 0..n);
            assert_same_bits("h", &h, &columns(&hu, 336, 0..304));
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- contracts

#[test]
fn calls_against_a_contract_are_errors() {
    for (_, cuda) in &mut backends() {
        check_contracts(cuda);
        check_steps(cuda);
    }
}
