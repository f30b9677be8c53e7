//! Every op of every backend against `backend::reference`, within the tolerance of its contract, and the laws that hold to the
//! bit: neither the number of threads, nor who else is in the batch, nor the cutting of a prompt into chunks changes a result.
//!
//! The cases are data and the checks are generic over `Backend`: `cuda.rs` runs them on the CUDA backend.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod attention;
mod contracts;
mod matmul;
mod mix;

use half::{bf16, f16};
use midpo::backend::cpu::{Cpu, CpuOptions, Isa};
use midpo::backend::ops::{self};
use midpo::backend::reference::Reference;
use midpo::backend::{Backend, HostMatrix, StepLayout, StepLimits, StepSequence, WeightFormat};
use midpo::dtype::DType;
use midpo::types::{BlockId, TokenId, Variant};

pub(crate) use attention::{AttentionCase, Step};
pub(crate) use contracts::{check_contracts, check_steps};
pub(crate) use matmul::MatMulCase;
pub(crate) use mix::{MixCase, columns};

const THREADS: [usize; 4] = [1, 2, 3, 7];
/// Plain Rust is slow in the dev profile, and its chunks are the others'.
const SCALAR_THREADS: [usize; 2] = [1, 3];

/// One CPU backend per instruction set that runs here and number of threads; the first of each set has one thread.
fn cpus() -> Vec<Vec<Cpu>> {
    let with = |isa, threads| {
        let options = CpuOptions {
            threads: Some(threads),
            isa: Some(isa),
        };
        Cpu::new(options).ok()
    };
    let sets = Isa::ALL.into_iter().map(|isa| {
        let threads: &[usize] = match isa {
            Isa::Scalar => &SCALAR_THREADS,
            _ => &THREADS,
        };
        threads.iter().filter_map(|n| with(isa, *n)).collect()
    });
    sets.filter(|set: &Vec<Cpu>| !set.is_empty()).collect()
}

fn label(cpu: &Cpu) -> String {
    format!("{} x {}", cpu.isa().as_str(), cpu.threads())
}

/// SplitMix64: the same cases everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In (-1, 1).
    pub(crate) fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.number()).collect()
    }
}

/// A matrix of random weights of order 1.
pub(crate) struct Weights {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) dtype: DType,
    pub(crate) bytes: Vec<u8>,
}

impl Weights {
    pub(crate) fn random(random: &mut Random, rows: usize, cols: usize, dtype: DType) -> Self {
        let numbers = |random: &mut Random| random.numbers(rows * cols).into_iter();
        let bytes = match dtype {
            DType::F32 => numbers(random).flat_map(f32::to_le_bytes).collect(),
            DType::F16 => numbers(random)
                .flat_map(|x| f16::from_f32(x).to_le_bytes())
                .collect(),
            DType::BF16 => numbers(random)
                .flat_map(|x| bf16::from_f32(x).to_le_bytes())
                .collect(),
            _ => {
                let blocks = rows * cols / dtype.block_len();
                (0..blocks).flat_map(|_| block(random, dtype)).collect()
            }
        };
        Self {
            rows,
            cols,
            dtype,
            bytes,
        }
    }

    /// Widened, and rounded to bf16.
    pub(crate) fn rounded(&self) -> Self {
        let mut widened = vec![0.0; self.cols];
        let rows = (0..self.rows).flat_map(|row| {
            self.host().widen_row(row, &mut widened);
            let bytes = widened
                .iter()
                .flat_map(|x| bf16::from_f32(*x).to_le_bytes());
            bytes.collect::<Vec<_>>()
        });
        Self {
            bytes: rows.collect(),
            dtype: DType::BF16,
            ..*self
        }
    }

    pub(crate) fn host(&self) -> HostMatrix<'_> {
        HostMatrix {
            rows: self.rows,
            cols: self.cols,
            dtype: self.dtype,
            bytes: &self.bytes,
        }
    }
}

/// A random block whose f16 scales make weights of order 1.
fn block(random: &mut Random, dtype: DType) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..dtype.block_bytes())
        .map(|_| random.next() as u8)
        .collect();
    let scale = match dtype {
        DType::Q8_0 => 1.0 / 128.0,
        DType::Q4_0 | DType::Q4_1 => 1.0 / 8.0,
        DType::Q5_0 | DType::Q5_1 => 1.0 / 16.0,
        DType::Q4K => 1.0 / 512.0,
        DType::Q5K => 1.0 / 1024.0,
        _ => 1.0 / 4096.0,
    };
    let halves: &[usize] = match dtype {
        DType::Q6K => &[208],
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        _ => &[0],
    };
    for at in halves {
        let half = f16::from_f32(scale * (1.0 + 0.5 * random.number()));
        bytes[*at..at + 2].copy_from_slice(&half.to_le_bytes());
    }
    bytes
}

pub(crate) fn assert_close(what: &str, tolerance: f32, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(
            error <= tolerance * largest,
            "{what}: element {i}: {got} is not {want} (off by {error}, largest {largest})"
        );
    }
}

pub(crate) fn assert_same_bits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
    if let Some(i) = got.iter().zip(want).position(differs) {
        panic!("{what}: element {i}: {} is not {}", got[i], want[i]);
    }
}

fn filled<B: Backend>(backend: &B, rows: usize, width: usize, values: &[f32]) -> B::Buffer {
    let mut buffer = backend.buffer(rows, width).unwrap();
    backend.write(&mut buffer, values).unwrap();
    buffer
}

fn exact<B: Backend>(backend: &B, rows: usize, width: usize, values: &[f32]) -> B::Buffer {
    let mut buffer = backend.exact_buffer(rows, width).unwrap();
    backend.write(&mut buffer, values).unwrap();
    buffer
}

fn limits(rows: usize) -> StepLimits {
    StepLimits {
        rows,
        logit_rows: rows,
        sequences: 64,
        positions: 2048,
        blocks: 512,
        vocabulary: 50,
    }
}

/// A step of one sequence from position 0 on.
fn plain_step<B: Backend>(backend: &B, tokens: &[TokenId], logit_rows: &[usize]) -> B::Step {
    let blocks: Vec<_> = (0..128).map(BlockId::new).collect();
    let mut step = backend.step(limits(tokens.len())).unwrap();
    let sequence = StepSequence {
        rows: tokens.len(),
        start: 0,
        block_table: &blocks,
        gates: Variant::Routed.gates(),
    };
    let sequences = [sequence];
    let layout = StepLayout {
        tokens,
        sequences: if tokens.is_empty() { &[] } else { &sequences },
        logit_rows,
    };
    backend.load_step(&layout, &mut step).unwrap();
    step
}

pub(crate) fn embed<B: Backend>(backend: &mut B, table: &Weights, tokens: &[TokenId]) -> Vec<f32> {
    let step = plain_step(backend, tokens, &[]);
    let matrix = backend
        .matrix(&[table.host()], None, WeightFormat::Stored)
        .unwrap();
    let mut x = backend.exact_buffer(tokens.len() + 2, table.cols).unwrap();
    let call = ops::Embed {
        step: &step,
        table: &matrix,
        x: &mut x,
    };
    backend.embed(call).unwrap();
    backend.read(&mut x, tokens.len()).unwrap().to_vec()
}

#[test]
fn embed_widens_every_format_exactly() {
    let random = &mut Random(4);
    for dtype in DType::ALL {
        for (vocabulary, n) in [(50, 0), (50, 1), (53, 37), (64, 200)] {
            let d = dtype.block_len() * if dtype.is_quantised() { 2 } else { 37 };
            let table = Weights::random(random, vocabulary, d, dtype);
            let tokens: Vec<_> = (0..n).map(|_| TokenId(random.below(50) as u32)).collect();
            let want = embed(&mut Reference, &table, &tokens);
            for cpu in cpus().iter_mut().flatten() {
                let label = format!("{} {dtype:?} n {n}", label(cpu));
                assert_same_bits(&label, &embed(cpu, &table, &tokens), &want);
            }
        }
    }
}

pub(crate) fn rms_norm<B: Backend>(
    backend: &mut B,
    n: usize,
    x: &[f32],
    weight: &[f32],
) -> Vec<f32> {
    let d = weight.len();
    let (x, weight) = (exact(backend, n, d, x), exact(backend, 1, d, weight));
    let mut y = backend.buffer(n, d).unwrap();
    let call = ops::RmsNorm {
        n,
        x: &x,
        weight: &weight,
        eps: 1e-5,
        y: &mut y,
    };
    backend.rms_norm(call).unwrap();
    backend.read(&mut y, n).unwrap().to_vec()
}

#[test]
fn rms_norm_matches_the_reference_and_each_row_stands_alone() {
    let random = &mut Random(5);
    for d in [1, 8, 16, 37, 64, 300, 576] {
        for n in [0, 1, 16, 37, 150] {
            let (x, weight) = (random.numbers(n * d), random.numbers(d));
            let want = rms_norm(&mut Reference, n, &x, &weight);
            for cpu in cpus().iter_mut().flatten() {
                let label = format!("rms_norm {} n {n} d {d}", label(cpu));
                let got = rms_norm(cpu, n, &x, &weight);
                assert_close(&label, ops::RMS_NORM.tolerance.f32, &got, &want);
                for i in (0..n).step_by(5) {
                    let alone = rms_norm(cpu, 1, &x[i * d..][..d], &weight);
                    assert_same_bits(&label, &alone, &got[i * d..][..d]);
                }
            }
        }
    }
}

pub(crate) fn gather_rows<B: Backend>(
    backend: &mut B,
    n: usize,
    x: &[f32],
    rows: &[usize],
) -> Vec<f32> {
    let tokens = vec![TokenId(0); n];
    let step = plain_step(backend, &tokens, rows);
    let x = exact(backend, n, 5, x);
    let mut y = backend.exact_buffer(rows.len(), 5).unwrap();
    let call = ops::GatherRows {
        step: &step,
        x: &x,
        y: &mut y,
    };
    backend.gather_rows(call).unwrap();
    backend.read(&mut y, rows.len()).unwrap().to_vec()
}

#[test]
fn gather_rows_copies_the_rows_in_their_order() {
    let x = Random(6).numbers(37 * 5);
    for rows in [vec![], vec![36], vec![3, 3, 0, 36]] {
        let want = gather_rows(&mut Reference, 37, &x, &rows);
        for cpu in cpus().iter_mut().flatten() {
            assert_same_bits(&label(cpu), &gather_rows(cpu, 37, &x, &rows), &want);
        }
    }
}
