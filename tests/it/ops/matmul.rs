//! matmul.

use midpo::backend::ops::{self};
use midpo::backend::reference::Reference;
use midpo::backend::{Backend, WeightFormat};
use midpo::dtype::{BlockType, DType};

use super::{Random, Weights, assert_close, assert_same_bits, cpus, exact, filled, label};

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
