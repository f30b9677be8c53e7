//! Every op of every backend against `backend::reference`, within the tolerance of its contract, and the laws that hold to the
//! bit: neither the number of threads, nor who else is in the batch, nor the cutting of a prompt into chunks changes a result.
//!
//! The cases are data and the checks are generic over `Backend`: `cuda.rs` runs them on the CUDA backend.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use half::{bf16, f16};
use midpo::backend::cpu::{Cpu, CpuOptions, Isa};
use midpo::backend::ops::{self, ExpertShape, Heads};
use midpo::backend::reference::Reference;
use midpo::backend::{
    Backend, BackendError, HostMatrix, KvFormat, KvShape, StepLayout, StepLimits, StepSequence,
    WeightFormat, Workload,
};
use midpo::dtype::{BlockType, DType};
use midpo::types::{BLOCK_TOKENS, BlockId, GateOverride, GateRule, TokenId, Variant};

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

// ---------------------------------------------------------------------------------------------------------------- matmul

pub(crate) struct MatMulCase {
    pub(crate) parts: Vec<Weights>,
    pub(crate) extension: Option<Weights>,
    pub(crate) format: WeightFormat,
    pub(crate) n: usize,
    pub(crate) add: bool,
    /// y is exact, as the residual stream is.
    pub(crate) exact: bool,
    pub(crate) x: Vec<f32>,
    pub(crate) y: Vec<f32>,
}

impl MatMulCase {
    pub(crate) fn new(
        random: &mut Random,
        parts: &[(usize, DType)],
        (k, w): (usize, usize),
        n: usize,
        format: WeightFormat,
    ) -> Self {
        let o: usize = parts.iter().map(|(rows, _)| rows).sum();
        // As a model keeps its experts: f32 beside f32, else bf16.
        let extension = match (format, parts[0].1) {
            (WeightFormat::F32, _) | (WeightFormat::Stored, DType::F32) => DType::F32,
            _ => DType::BF16,
        };
        Self {
            parts: parts
                .iter()
                .map(|(rows, dtype)| Weights::random(random, *rows, k, *dtype))
                .collect(),
            extension: (w > 0).then(|| Weights::random(random, o, w, extension)),
            format,
            n,
            add: n % 2 == 1,
            exact: n.is_multiple_of(3),
            x: random.numbers(n * (k + w)),
            y: random.numbers(n * o),
        }
    }

    pub(crate) fn run<B: Backend>(&self, backend: &mut B) -> Vec<f32> {
        self.run_rows(backend, 0..self.n)
    }

    /// The rows of the result that these rows of x give when they are the whole batch.
    pub(crate) fn run_rows<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> Vec<f32> {
        let parts: Vec<_> = self.parts.iter().map(Weights::host).collect();
        let extension = self.extension.as_ref().map(Weights::host);
        let w = backend.matrix(&parts, extension, self.format).unwrap();
        let (o, n) = (
            parts.iter().map(|part| part.rows).sum::<usize>(),
            rows.len(),
        );
        let width = parts[0].cols + extension.map_or(0, |x| x.cols);
        let x = filled(
            backend,
            n,
            width,
            &self.x[rows.start * width..rows.end * width],
        );
        // A buffer may hold more rows than are used; the rest must stay.
        let before = &self.y[rows.start * o..rows.end * o];
        let mut y = match self.exact {
            true => exact(backend, n + 1, o, before),
            false => filled(backend, n + 1, o, before),
        };
        let call = ops::MatMul {
            n,
            x: &x,
            w: &w,
            y: &mut y,
            add: self.add,
        };
        backend.matmul(call).unwrap();
        let all = backend.read(&mut y, n + 1).unwrap();
        assert!(all[n * o..].iter().all(|x| *x == 0.0), "wrote past row {n}");
        all[..n * o].to_vec()
    }

    fn label(&self) -> String {
        let parts = self.parts.iter().map(|p| (p.rows, p.dtype.as_str()));
        let k = self.parts[0].cols;
        let w = self.extension.as_ref().map_or(0, |x| x.cols);
        let parts: Vec<_> = parts.collect();
        format!("n {} k {k} w {w} {:?} {parts:?}", self.n, self.format)
    }
}

fn matmul_cases() -> Vec<MatMulCase> {
    let random = &mut Random(1);
    let mut cases = Vec::new();
    let rows = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 37];
    for (d, dtype) in DType::ALL.into_iter().enumerate() {
        let block = dtype.block_len();
        // Odd sizes for plain formats, odd numbers of blocks for the others; several blocks of 256 inputs.
        for (i, k) in [1, 2, 3, 37, 300].into_iter().enumerate() {
            let k = if block == 1 { k } else { block * (1 + k % 3) };
            let o = [1, 15, 16, 17, 100][i];
            // Each shape meets half of the counts of rows, each count half of the shapes.
            for (j, n) in rows.into_iter().enumerate().skip((d + i) % 2).step_by(2) {
                // The last crosses a block of inputs.
                let w = [0, 1, 34, 300][(i + j) % 4];
                let parts = [(o, dtype)];
                // Block formats meet x in int8, or widened.
                let format = match (block, (i + j) % 3) {
                    (1, _) | (_, 1..) => WeightFormat::Stored,
                    _ => WeightFormat::F32,
                };
                cases.push(MatMulCase::new(random, &parts, (k, w), n, format));
            }
        }
    }
    let mixed = [
        (40, DType::F32),
        (7, DType::Q4K),
        (16, DType::BF16),
        (33, DType::F16),
        (130, DType::Q6K),
    ];
    let formats = [
        WeightFormat::Stored,
        WeightFormat::F32,
        WeightFormat::BF16,
        WeightFormat::Block(BlockType::Q8_0),
        WeightFormat::Block(BlockType::Q4_1),
        WeightFormat::Block(BlockType::Q4_0),
    ];
    for format in formats {
        for n in [1, 2, 6, 29, 250] {
            cases.push(MatMulCase::new(random, &mixed, (512, 16), n, format));
        }
        // A row that is no whole number of blocks.
        let uneven = [(20, DType::F32), (3, DType::F16)];
        cases.push(MatMulCase::new(random, &uneven, (40, 3), 4, format));
        // Experts in blocks, behind whole blocks and behind some that are not.
        for (parts, k, n) in [(&mixed[..], 512, 1), (&mixed, 512, 31), (&uneven, 40, 7)] {
            for w in [32, 64] {
                cases.push(extended(random, parts, (k, w), n, format));
            }
        }
    }
    cases
}

/// With an extension in q8_0.
fn extended(
    random: &mut Random,
    parts: &[(usize, DType)],
    (k, w): (usize, usize),
    n: usize,
    format: WeightFormat,
) -> MatMulCase {
    let mut case = MatMulCase::new(random, parts, (k, w), n, format);
    let outputs = parts.iter().map(|(rows, _)| rows).sum();
    case.extension = Some(Weights::random(random, outputs, w, DType::Q8_0));
    case
}

#[test]
fn matmul_matches_the_reference_whatever_the_format_shape_threads_and_rows() {
    let mut cpus = cpus();
    for case in matmul_cases() {
        let want = case.run(&mut Reference);
        for set in &mut cpus {
            let mut first = None;
            for cpu in set {
                let got = case.run(cpu);
                let label = format!("matmul {} {}", label(cpu), case.label());
                assert_close(&label, ops::MATMUL.tolerance.f32, &got, &want);
                let first = first.get_or_insert_with(|| got.clone());
                assert_same_bits(&label, &got, first);
            }
        }
    }
}

#[test]
fn matmul_meets_block_formats_with_x_of_any_magnitude() {
    let mut cpus = cpus();
    let random = &mut Random(3);
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantised()) {
        let mut case = MatMulCase::new(random, &[(33, dtype)], (512, 0), 5, WeightFormat::Stored);
        let rows = [1e-38, 1e-29, 1e-3, 1e20];
        for (x, scale) in case.x.chunks_exact_mut(512).zip(rows) {
            x.iter_mut().for_each(|x| *x *= scale);
        }
        // The last row: one block of zeros, one of a single number, then one that must not be hidden.
        let last = &mut case.x[4 * 512..];
        last[..64].fill(0.0);
        last[40] = -7.0;
        case.y.fill(0.0);
        let want = case.run(&mut Reference);
        for cpu in cpus.iter_mut().flatten() {
            let got = case.run(cpu);
            for (row, (got, want)) in got.chunks_exact(33).zip(want.chunks_exact(33)).enumerate() {
                let label = format!("matmul {} {dtype:?} row {row}", label(cpu));
                assert_close(&label, ops::MATMUL.tolerance.f32, got, want);
            }
        }
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            case.x[3] = poison;
            for cpu in cpus.iter_mut().flatten() {
                let got = case.run(cpu);
                assert!(got[..33].iter().all(|y| y.is_nan()), "{dtype:?} {poison}");
                assert!(
                    got[33..].iter().all(|y| y.is_finite()),
                    "{dtype:?} {poison}"
                );
            }
        }
    }
}

#[test]
fn matmul_gives_a_row_the_same_bits_in_any_batch() {
    let mut cpus = cpus();
    let random = &mut Random(2);
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::Q4_1, DType::Q6K] {
        let parts = [(70, dtype), (21, dtype)];
        let case = MatMulCase::new(random, &parts, (512, 32), 260, WeightFormat::Stored);
        for set in &mut cpus {
            let whole = case.run(&mut set[0]);
            for cpu in set.iter_mut() {
                for (start, len) in [
                    (0, 1),
                    (7, 2),
                    (9, 3),
                    (20, 5),
                    (238, 6),
                    (240, 7),
                    (100, 41),
                ] {
                    let got = case.run_rows(cpu, start..start + len);
                    let label = format!("matmul {} rows {start} + {len}", label(cpu));
                    assert_same_bits(&label, &got, &whole[start * 91..(start + len) * 91]);
                }
            }
        }
    }
}

#[test]
fn matmul_with_a_zero_extension_input_is_bit_equal_to_no_extension() {
    let random = &mut Random(3);
    for n in [1, 4, 50] {
        let mut case = MatMulCase::new(
            random,
            &[(48, DType::BF16)],
            (300, 32),
            n,
            WeightFormat::Stored,
        );
        for row in case.x.chunks_exact_mut(332) {
            row[300..].fill(0.0);
        }
        let base = MatMulCase {
            parts: vec![Weights {
                bytes: case.parts[0].bytes.clone(),
                ..case.parts[0]
            }],
            extension: None,
            x: case
                .x
                .chunks_exact(332)
                .flat_map(|row| row[..300].to_vec())
                .collect(),
            y: case.y.clone(),
            ..case
        };
        for cpu in cpus().iter_mut().flatten() {
            assert_same_bits(&label(cpu), &case.run(cpu), &base.run(cpu));
        }
    }
}

// ----------------------------------------------------------------------------------------------------- embed, norm, gather

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

// ------------------------------------------------------------------------------------------- rope_kv_write and attention

/// Sequences with random q, k and v at every position, and a shuffled table of blocks each.
pub(crate) struct AttentionCase {
    pub(crate) heads: Heads,
    pub(crate) format: KvFormat,
    /// (positions, qkv width) of each sequence.
    pub(crate) qkv: Vec<Vec<f32>>,
    pub(crate) tables: Vec<Vec<BlockId>>,
    pub(crate) rope: Vec<f32>,
}

/// Which rows of which sequence a step holds.
pub(crate) type Step = Vec<(usize, std::ops::Range<usize>)>;

impl AttentionCase {
    pub(crate) fn new(
        random: &mut Random,
        heads: Heads,
        format: KvFormat,
        lengths: &[usize],
    ) -> Self {
        let mut free: Vec<u32> = (0..512).collect();
        let mut take =
            |random: &mut Random| BlockId::new(free.swap_remove(random.below(free.len())));
        let tables = lengths.iter().map(|length| {
            let blocks = length.div_ceil(BLOCK_TOKENS);
            (0..blocks).map(|_| take(random)).collect()
        });
        let tables = tables.collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let rope = (0..longest).flat_map(|position| {
            let half = heads.size / 2;
            let angle = move |i: usize| position as f32 * 0.7f32.powi(i as i32);
            let cos = (0..half).map(move |i| angle(i).cos());
            cos.chain((0..half).map(move |i| angle(i).sin()))
        });
        Self {
            heads,
            format,
            qkv: lengths
                .iter()
                .map(|length| {
                    let mut qkv = random.numbers(length * heads.qkv_width());
                    // Scores of some size, so that the softmax has something to do.
                    qkv.iter_mut().for_each(|x| *x *= 2.0);
                    qkv
                })
                .collect(),
            tables,
            rope: rope.collect(),
        }
    }

    fn cache<B: Backend>(&self, backend: &B) -> B::KvCache {
        self.try_cache(backend).unwrap()
    }

    fn try_cache<B: Backend>(&self, backend: &B) -> Result<B::KvCache, BackendError> {
        let shape = KvShape {
            layers: 2,
            blocks: 512,
            kv_heads: self.heads.kv,
            head_size: self.heads.size,
            format: self.format,
        };
        backend.kv_cache(shape)
    }

    /// Runs the steps in order; returns (positions, query width) of each sequence. `poisoned`: in a cache full of NaN.
    pub(crate) fn run<B: Backend>(
        &self,
        backend: &mut B,
        steps: &[Step],
        poisoned: bool,
    ) -> Vec<Vec<f32>> {
        let out = self.heads.query * self.heads.size;
        let mut cache = self.cache(backend);
        let mut results: Vec<_> = self
            .lengths()
            .into_iter()
            .map(|length| vec![0.0; length * out])
            .collect();
        if poisoned {
            self.run_step(backend, &mut cache, &self.whole()[0], |x| x * f32::NAN);
        }
        for rows in steps {
            let got = self.run_step(backend, &mut cache, rows, |x| x);
            let mut got = &got[..];
            for (sequence, rows) in rows {
                let (these, rest) = got.split_at(rows.len() * out);
                results[*sequence][rows.start * out..rows.end * out].copy_from_slice(these);
                got = rest;
            }
        }
        results
    }

    /// Writes the rows' k and v and attends; returns (n, query width).
    fn run_step<B: Backend>(
        &self,
        backend: &mut B,
        cache: &mut B::KvCache,
        rows: &Step,
        change: impl Fn(f32) -> f32,
    ) -> Vec<f32> {
        let mut y = self.run_into(backend, cache, rows, change);
        let n = rows.iter().map(|(_, rows)| rows.len()).sum();
        backend.read(&mut y, n).unwrap().to_vec()
    }

    fn run_into<B: Backend>(
        &self,
        backend: &mut B,
        cache: &mut B::KvCache,
        rows: &Step,
        change: impl Fn(f32) -> f32,
    ) -> B::Buffer {
        let (layer, heads) = (1, self.heads);
        let (width, out) = (heads.qkv_width(), heads.query * heads.size);
        let positions = self.rope.len() / heads.size;
        let rope = &exact(backend, positions, heads.size, &self.rope);
        let step = &self.step(backend, rows);
        let qkv = rows.iter().flat_map(|(sequence, rows)| {
            let qkv = &self.qkv[*sequence];
            qkv[rows.start * width..rows.end * width].iter()
        });
        let qkv: Vec<f32> = qkv.map(|x| change(*x)).collect();
        let n = qkv.len() / width;
        let qkv = &mut filled(backend, n, width, &qkv);
        let write = ops::RopeKvWrite {
            step,
            layer,
            heads,
            rope,
            qkv,
            cache,
        };
        backend.rope_kv_write(write).unwrap();
        let mut y = backend.buffer(n, out).unwrap();
        let attend = ops::Attention {
            step,
            layer,
            heads,
            qkv,
            cache,
            y: &mut y,
        };
        backend.attention(attend).unwrap();
        y
    }

    fn step<B: Backend>(&self, backend: &B, rows: &Step) -> B::Step {
        let tokens = vec![TokenId(0); rows.iter().map(|(_, rows)| rows.len()).sum()];
        let sequences = rows.iter().map(|(sequence, rows)| StepSequence {
            rows: rows.len(),
            start: rows.start,
            block_table: &self.tables[*sequence],
            gates: Variant::Routed.gates(),
        });
        let layout = StepLayout {
            tokens: &tokens,
            sequences: &sequences.collect::<Vec<_>>(),
            logit_rows: &[],
        };
        let mut step = backend.step(limits(tokens.len())).unwrap();
        backend.load_step(&layout, &mut step).unwrap();
        step
    }

    fn lengths(&self) -> Vec<usize> {
        let width = self.heads.qkv_width();
        self.qkv.iter().map(|qkv| qkv.len() / width).collect()
    }

    /// All sequences whole, in one step.
    pub(crate) fn whole(&self) -> Vec<Step> {
        let rows = self.lengths().into_iter().map(|length| 0..length);
        vec![rows.enumerate().collect()]
    }

    /// Steps of random chunks of random sequences, single rows often.
    pub(crate) fn chunked(&self, random: &mut Random) -> Vec<Step> {
        let lengths = self.lengths();
        let mut done = vec![0; lengths.len()];
        let mut steps = Vec::new();
        while done != lengths {
            let mut step = Vec::new();
            for sequence in 0..lengths.len() {
                let left = lengths[sequence] - done[sequence];
                if left == 0 || random.below(3) == 0 {
                    continue;
                }
                // The last rows one by one, as decoding does.
                let rows = match left {
                    ..=4 => 1,
                    _ => 1 + random.below(left.min(90)),
                };
                step.push((sequence, done[sequence]..done[sequence] + rows));
                done[sequence] += rows;
            }
            if !step.is_empty() {
                steps.push(step);
            }
        }
        steps
    }
}

fn check_attention(case: &AttentionCase, cpus: &mut [Vec<Cpu>], random: &mut Random) {
    let want = case.run(&mut Reference, &case.whole(), false).concat();
    let tolerance = match case.format {
        KvFormat::F32 => ops::ATTENTION.tolerance.f32,
        KvFormat::BF16 | KvFormat::FP8 | KvFormat::INT8 => ops::ATTENTION.tolerance.bf16,
    };
    for set in cpus {
        let whole = case.run(&mut set[0], &case.whole(), false).concat();
        let what = format!("attention {} {:?}", label(&set[0]), case.heads);
        assert_close(&what, tolerance, &whole, &want);
        for (i, cpu) in set.iter_mut().enumerate() {
            let what = format!("attention {} {:?}", label(cpu), case.heads);
            if i > 0 {
                assert_same_bits(&what, &case.run(cpu, &case.whole(), false).concat(), &whole);
            }
            let steps = case.chunked(random);
            assert_same_bits(&what, &case.run(cpu, &steps, true).concat(), &whole);
        }
    }
}

#[test]
fn attention_matches_the_reference_and_chunks_match_the_whole_for_all_heads() {
    let (random, mut cpus) = (&mut Random(7), cpus());
    for size in [8, 16, 64, 80, 96, 128] {
        for (query, kv) in [(1, 1), (3, 3), (6, 2), (4, 1), (8, 1)] {
            let heads = Heads { query, kv, size };
            for format in [KvFormat::F32, KvFormat::BF16, KvFormat::INT8] {
                let case = AttentionCase::new(random, heads, format, &[1, 17, 40]);
                check_attention(&case, &mut cpus, random);
            }
        }
    }
}

/// The only row sees itself alone: it gives back v as the cache keeps it. Calls `check` with v, what came back, and the largest of v's head.
fn check_kept(case: &AttentionCase, backend: &mut impl Backend, check: impl Fn(f32, f32, f32)) {
    let heads = case.heads;
    let v = &case.qkv[0][2 * heads.kv * heads.size..];
    let got = case.run(backend, &case.whole(), false).concat();
    for (got, v) in got.chunks_exact(heads.size).zip(v.chunks_exact(heads.size)) {
        let most = v.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        v.iter().zip(got).for_each(|(v, got)| check(*v, *got, most));
    }
}

/// One row, with a head of nothing and one of numbers far below its largest.
fn uneven_heads(format: KvFormat) -> AttentionCase {
    let heads = Heads {
        query: 3,
        kv: 3,
        size: 40,
    };
    let mut case = AttentionCase::new(&mut Random(16), heads, format, &[1]);
    let v = &mut case.qkv[0][2 * 3 * 40..];
    v[..40].fill(0.0);
    v[41..80].iter_mut().for_each(|x| *x *= 1e-3);
    case
}

#[test]
fn eight_bits_of_k_and_v_are_within_a_sixteenth_of_each_number() {
    let case = uneven_heads(KvFormat::FP8);
    check_kept(&case, &mut Reference, |v, got, most| {
        let bound = (v.abs() / 16.0).max(most / 448.0 / 1024.0) * 1.000_01;
        assert!((got - v).abs() <= bound, "{got} for {v}");
    });
    let refused = match Cpu::new(CpuOptions::default()) {
        Ok(cpu) => case.try_cache(&cpu).err(),
        Err(error) => panic!("{error}"),
    };
    let message = refused.unwrap().to_string();
    assert!(
        message.contains("format") && message.contains("FP8"),
        "{message}"
    );
}

#[test]
fn integers_of_k_and_v_are_within_half_a_step_of_each_number() {
    let case = uneven_heads(KvFormat::INT8);
    let check = |v: f32, got: f32, most: f32| {
        // The scale is rounded to eight bits.
        let bound = most / 127.0 / 2.0 * (1.0 + 1.0 / 128.0);
        assert!((got - v).abs() <= bound, "{got} for {v}");
    };
    check_kept(&case, &mut Reference, check);
    for cpu in cpus().iter_mut().flatten() {
        check_kept(&case, cpu, check);
    }
}

#[test]
fn attention_crosses_blocks_and_splits_without_a_seam() {
    let (random, mut cpus) = (&mut Random(8), cpus());
    let heads = Heads {
        query: 2,
        kv: 1,
        size: 16,
    };
    for lengths in [&[15, 16, 255][..], &[257, 3], &[530]] {
        for format in [KvFormat::F32, KvFormat::BF16, KvFormat::INT8] {
            let case = AttentionCase::new(random, heads, format, lengths);
            check_attention(&case, &mut cpus, random);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- silu_mul_expert_mix

pub(crate) struct MixCase {
    pub(crate) m: usize,
    pub(crate) n: usize,
    /// A_s and A_h, the rows of both gates.
    pub(crate) experts: Option<([Weights; 2], ExpertShape)>,
    pub(crate) gates: Vec<GateOverride>,
    pub(crate) gate_up: Vec<f32>,
}

impl MixCase {
    pub(crate) fn new(
        random: &mut Random,
        (m, n): (usize, usize),
        ranks: (usize, usize),
        dtype: DType,
    ) -> Self {
        let shape = ExpertShape {
            safety_rank: ranks.0,
            helpfulness_rank: ranks.1,
            safety_bias: 0.3,
            helpfulness_bias: -0.2,
        };
        let lora_a = Weights::random(random, shape.width(), m, dtype);
        let gate_rows = Weights::random(random, 2, m, DType::F32);
        let mut gate_up = random.numbers(n * 2 * m);
        gate_up.iter_mut().for_each(|x| *x *= 4.0);
        Self {
            m,
            n,
            experts: Some(([lora_a, gate_rows], shape)),
            gates: (0..n).map(|_| gates(random)).collect(),
            gate_up,
        }
    }

    /// (n, m + w) and (n, 6): layer 1 of 3.
    pub(crate) fn run<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> (Vec<f32>, Vec<f32>) {
        let n = rows.len();
        let (mut hu, mut gates) = self.run_into(backend, rows);
        let hu = backend.read(&mut hu, n).unwrap().to_vec();
        (hu, backend.read(&mut gates, n).unwrap().to_vec())
    }

    fn run_into<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> (B::Buffer, B::Buffer) {
        let n = rows.len();
        let (step, gate_up, experts) = self.operands(backend, rows);
        let mut hu = backend.buffer(n, self.m + self.width()).unwrap();
        let mut gates = exact(backend, n, 6, &vec![9.0; n * 6]);
        let call = ops::SiluMulExpertMix {
            step: &step,
            layer: 1,
            gate_up: &gate_up,
            experts: experts.as_ref().map(|(e, shape)| (e, *shape)),
            hu: &mut hu,
            gates: &mut gates,
            z: None,
        };
        backend.silu_mul_expert_mix(call).unwrap();
        (hu, gates)
    }

    /// As [`Self::run`], with z on its way through memory.
    pub(crate) fn run_apart<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> (Vec<f32>, Vec<f32>) {
        let (n, m, w) = (rows.len(), self.m, self.width());
        let (step, gate_up, experts) = self.operands(backend, rows);
        let mut h = backend.buffer(n, m).unwrap();
        let mut z = exact(backend, n, w + 2, &vec![9.0; n * (w + 2)]);
        let mut gates = exact(backend, n, 6, &vec![9.0; n * 6]);
        let (e, shape) = experts.unwrap();
        let call = ops::SiluMulExpertMix {
            step: &step,
            layer: 1,
            gate_up: &gate_up,
            experts: Some((&e, shape)),
            hu: &mut h,
            gates: &mut gates,
            z: Some(&mut z),
        };
        backend.silu_mul_expert_mix(call).unwrap();
        let untouched = backend.read(&mut gates, n).unwrap();
        assert!(untouched.iter().all(|gate| *gate == 9.0));
        let mut u = backend.buffer(n, w).unwrap();
        let call = ops::ExpertMix {
            step: &step,
            layer: 1,
            shape,
            z: &z,
            u: &mut u,
            gates: &mut gates,
        };
        backend.expert_mix(call).unwrap();
        let h = backend.read(&mut h, n).unwrap().to_vec();
        let u = backend.read(&mut u, n).unwrap().to_vec();
        let hu = (0..n).flat_map(|i| [&h[i * m..][..m], &u[i * w..][..w]].concat());
        (hu.collect(), backend.read(&mut gates, n).unwrap().to_vec())
    }

    fn width(&self) -> usize {
        self.experts.as_ref().map_or(0, |(_, shape)| shape.width())
    }

    #[allow(clippy::type_complexity)]
    fn operands<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> (B::Step, B::Buffer, Option<(B::Matrix, ExpertShape)>) {
        let n = rows.len();
        let tokens = vec![TokenId(0); n];
        // Each row a sequence of its own, so that each has its own rule.
        let tables: Vec<_> = (0..n).map(|i| [BlockId::new(i as u32)]).collect();
        let sequences: Vec<_> = rows
            .clone()
            .zip(&tables)
            .map(|(row, table)| StepSequence {
                rows: 1,
                start: 0,
                block_table: table,
                gates: self.gates[row],
            })
            .collect();
        let mut step = backend.step(limits(n)).unwrap();
        let layout = StepLayout {
            tokens: &tokens,
            sequences: &sequences,
            logit_rows: &[],
        };
        backend.load_step(&layout, &mut step).unwrap();
        let experts = self.experts.as_ref().map(|(e, shape)| {
            let [lora_a, gates] = e.each_ref().map(Weights::host);
            (backend.experts(lora_a, gates).unwrap(), *shape)
        });
        let m = self.m;
        let values = &self.gate_up[rows.start * 2 * m..rows.end * 2 * m];
        (step, filled(backend, n, 2 * m, values), experts)
    }
}

/// A variant as it is, or a rule with bias, floor and ceiling.
fn gates(random: &mut Random) -> GateOverride {
    if random.below(2) == 0 {
        return Variant::ALL[random.below(5)].gates();
    }
    let mut rule =
        |floor: f32, ceiling: f32| GateRule::new(random.number() * 2.0, floor, ceiling).unwrap();
    GateOverride {
        safety: rule(0.4, 1.0),
        helpfulness: rule(0.0, 0.6),
    }
}

pub(crate) fn columns(values: &[f32], width: usize, columns: std::ops::Range<usize>) -> Vec<f32> {
    let rows = values.chunks_exact(width);
    rows.flat_map(|row| row[columns.clone()].to_vec()).collect()
}

fn check_mix(case: &MixCase, cpus: &mut [Vec<Cpu>]) {
    let (want, want_gates) = case.run(&mut Reference, 0..case.n);
    let (m, n) = (case.m, case.n);
    let width = m + case.experts.as_ref().map_or(0, |(_, shape)| shape.width());
    let tolerance = ops::SILU_MUL_EXPERT_MIX.tolerance.f32;
    for set in cpus {
        let mut first = None;
        for cpu in set {
            let what = format!("mix {} m {m} n {n} width {width}", label(cpu));
            let (got, got_gates) = case.run(cpu, 0..n);
            for part in [0..m, m..width] {
                let (got, want) = (
                    columns(&got, width, part.clone()),
                    columns(&want, width, part),
                );
                assert_close(&what, tolerance, &got, &want);
            }
            assert_close(&what, tolerance, &got_gates, &want_gates);
            if case.experts.is_some() {
                let (hu, gates) = case.run_apart(cpu, 0..n);
                assert_same_bits(&what, &hu, &got);
                assert_same_bits(&what, &gates, &got_gates);
            }
            for (i, rule) in case.gates.iter().enumerate().step_by(7) {
                let alone = case.run(cpu, i..i + 1);
                assert_same_bits(&what, &alone.0, &got[i * width..][..width]);
                assert_same_bits(&what, &alone.1, &got_gates[i * 6..][..6]);
                if case.experts.is_some() && *rule == Variant::Base.gates() {
                    assert_eq!(alone.1[2..4], [0.0, 0.0], "{what}: gates of base");
                    assert!(alone.0[m..].iter().all(|u| *u == 0.0), "{what}: u of base");
                }
            }
            let first = first.get_or_insert_with(|| (got.clone(), got_gates.clone()));
            assert_same_bits(&what, &got, &first.0);
            assert_same_bits(&what, &got_gates, &first.1);
        }
    }
}

#[test]
fn silu_mul_expert_mix_matches_the_reference_for_all_rules_and_sizes() {
    let (random, mut cpus) = (&mut Random(9), cpus());
    for m in [1, 16, 37, 255, 256, 257, 1100] {
        for n in [0, 1, 2, 5, 6, 7, 37] {
            let ranks = [(16, 16), (3, 5), (1, 40)][(m + n) % 3];
            let dtype = [DType::F32, DType::BF16][n % 2];
            check_mix(&MixCase::new(random, (m, n), ranks, dtype), &mut cpus);
        }
    }
    for m in [32, 256, 288, 1120] {
        for n in [1, 3, 12, 37] {
            let ranks = [(16, 16), (3, 5)][n % 2];
            let case = MixCase::new(random, (m, n), ranks, DType::Q8_0);
            check_mix(&case, &mut cpus);
        }
    }
}

type CpuBuffer = <Cpu as Backend>::Buffer;

/// Into `y`, which was made before `x` was written: making a buffer forgets what was kept of the last one.
fn product(
    cpu: &mut Cpu,
    w: &<Cpu as Backend>::Matrix,
    (x, y): (&CpuBuffer, &mut CpuBuffer),
    n: usize,
) -> Vec<f32> {
    let call = ops::MatMul {
        n,
        x,
        w,
        y,
        add: false,
    };
    cpu.matmul(call).unwrap();
    cpu.read(y, n).unwrap().to_vec()
}

/// What an op left in `x` (n, width), read by a product behind it, and by one that nothing was kept for.
fn check_product_behind(
    cpu: &mut Cpu,
    (mut x, y): (CpuBuffer, &mut CpuBuffer),
    (n, width): (usize, usize),
) {
    let w = Weights::random(&mut Random(18), 50, width, DType::Q4_0);
    let matrix = cpu.matrix(&[w.host()], None, WeightFormat::Stored).unwrap();
    let behind = product(cpu, &matrix, (&x, &mut *y), n);
    let values = cpu.read(&mut x, n).unwrap().to_vec();
    let alone = filled(cpu, n, width, &values);
    let what = format!("{} {n} x {width}", label(cpu));
    assert_same_bits(&what, &behind, &product(cpu, &matrix, (&alone, y), n));
}

/// As of the mix below, of all others that products follow, on a backend that was told how wide products are.
#[test]
fn a_product_behind_a_norm_attention_or_silu_has_the_bits_of_one_that_met_its_input_alone() {
    let (random, mut cpus) = (&mut Random(17), cpus());
    for cpu in cpus.iter_mut().flatten() {
        for (n, size, inputs) in [
            (1, 32, 320),
            (7, 64, 320),
            (45, 96, 288),
            (6, 48, 320),
            (9, 64, 64),
        ] {
            let heads = Heads {
                query: 3,
                kv: 1,
                size,
            };
            let work = Workload {
                limits: limits(n),
                heads,
                layers: 1,
                mlp_width: 320,
                expert_width: 0,
                quantised_inputs: inputs,
            };
            cpu.reserve(&work).unwrap();
            let mut out = cpu.buffer(n, 50).unwrap();
            let (x, weight) = (random.numbers(n * 288), random.numbers(288));
            let (x, weight) = (exact(cpu, n, 288, &x), exact(cpu, 1, 288, &weight));
            let mut y = cpu.buffer(n, 288).unwrap();
            let norm = ops::RmsNorm {
                n,
                x: &x,
                weight: &weight,
                eps: 1e-5,
                y: &mut y,
            };
            cpu.rms_norm(norm).unwrap();
            check_product_behind(cpu, (y, &mut out), (n, 288));
            let case = AttentionCase::new(random, heads, KvFormat::BF16, &[n]);
            let mut cache = case.cache(cpu);
            let y = case.run_into(cpu, &mut cache, &case.whole()[0], |x| x);
            if (3 * size).is_multiple_of(32) {
                check_product_behind(cpu, (y, &mut out), (n, 3 * size));
            }
            let silu = MixCase {
                experts: None,
                ..MixCase::new(random, (320, n), (4, 4), DType::F32)
            };
            let (hu, _) = silu.run_into(cpu, 0..n);
            check_product_behind(cpu, (hu, &mut out), (n, 320));
        }
    }
}

/// A mix whose hu a product reads next: what the mix kept of hu for it must be what the product would make of it.
#[test]
fn a_product_behind_the_mix_has_the_bits_of_one_that_met_hu_alone() {
    let (random, mut cpus) = (&mut Random(15), cpus());
    for (n, ranks, extension) in [
        (1, (16, 16), DType::Q8_0),
        (5, (16, 16), DType::BF16),
        (40, (16, 16), DType::Q8_0),
        (7, (3, 5), DType::BF16),
    ] {
        let mix = MixCase::new(random, (288, n), ranks, DType::Q8_0);
        let w = ranks.0 + ranks.1;
        let down = Weights::random(random, 50, 288, DType::Q4_0);
        let extension = Weights::random(random, 50, w, extension);
        for cpu in cpus.iter_mut().flatten() {
            let matrix = cpu
                .matrix(&[down.host()], Some(extension.host()), WeightFormat::Stored)
                .unwrap();
            let mut y = cpu.buffer(n, 50).unwrap();
            let mut product = |cpu: &mut Cpu, hu: &_| product(cpu, &matrix, (hu, &mut y), n);
            let (mut hu, _) = mix.run_into(cpu, 0..n);
            let behind = product(cpu, &hu);
            let values = cpu.read(&mut hu, n).unwrap().to_vec();
            let alone = filled(cpu, n, 288 + w, &values);
            assert_same_bits(&label(cpu), &behind, &product(cpu, &alone));
            // What wrote over hu since is not forgotten.
            let (mut hu, _) = mix.run_into(cpu, 0..n);
            let zeros = filled(cpu, n, 288 + w, &vec![0.0; n * (288 + w)]);
            let weight = exact(cpu, 1, 288 + w, &vec![1.0; 288 + w]);
            let norm = ops::RmsNorm {
                n,
                x: &zeros,
                weight: &weight,
                eps: 1.0,
                y: &mut hu,
            };
            cpu.rms_norm(norm).unwrap();
            assert!(product(cpu, &hu).iter().all(|y| *y == 0.0));
        }
    }
}

#[test]
fn silu_mul_without_experts_leaves_the_gates_alone_and_h_as_with_them() {
    let (random, mut cpus) = (&mut Random(10), cpus());
    for n in [1, 13, 60] {
        let with = MixCase::new(random, (300, n), (16, 16), DType::BF16);
        let without = MixCase {
            experts: None,
            gates: with.gates.clone(),
            gate_up: with.gate_up.clone(),
            ..with
        };
        check_mix(&without, &mut cpus);
        for cpu in cpus.iter_mut().flatten() {
            let (h, gates) = without.run(cpu, 0..n);
            assert!(gates.iter().all(|gate| *gate == 9.0));
            let (hu, _) = with.run(cpu, 0..n);
            assert_same_bits(&label(cpu), &h, &columns(&hu, 332, 0..300));
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- contracts

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
