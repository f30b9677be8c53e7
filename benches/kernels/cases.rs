//! Every op of the table (`backend/ops.rs`) at the sizes of a model.

use midpo::backend::ops::{self, ExpertShape, Heads};
use midpo::backend::{
    Backend, HostMatrix, KvFormat, KvShape, SampleRow, Sampled, StepLayout, StepLimits,
    StepSequence, WeightFormat, Workload,
};
use midpo::dtype::DType;
use midpo::types::{BLOCK_TOKENS, BlockId, TokenId, Variant};

use super::line::{Lines, Number, Work, time};
use super::random::Random;
use super::{Shape, WEIGHT_BYTES};

/// Calls that a GPU is given before it is waited for.
const GPU_CALLS: usize = 32;
/// Positions of the longest sequence.
const CONTEXT: usize = 8192;
/// Sequences, and rows that are sampled at once, at most.
const SAMPLED_ROWS: usize = 128;
/// w: both experts of rank 16.
const EXPERTS: ExpertShape = ExpertShape {
    safety_rank: 16,
    helpfulness_rank: 16,
    safety_bias: 0.0,
    helpfulness_bias: 0.0,
};

/// A backend, and what its ops took.
pub struct Cases<B: Backend> {
    backend: B,
    /// A row to wait at: reading it ends all ops before.
    end: B::Buffer,
    on_gpu: bool,
    lines: Lines,
}

fn host(rows: usize, cols: usize, dtype: DType, bytes: &[u8]) -> HostMatrix<'_> {
    HostMatrix {
        rows,
        cols,
        dtype,
        bytes,
    }
}

impl<B: Backend> Cases<B> {
    pub fn new(backend: B, on_gpu: bool, lines: Lines) -> Self {
        Self {
            end: backend.exact_buffer(1, 1).unwrap(),
            backend,
            on_gpu,
            lines,
        }
    }

    /// All of them.
    pub fn run(mut self, shape: Shape) -> Lines {
        match (shape, self.on_gpu) {
            (Shape::Llama7b, _) => self.llama_7b(),
            (Shape::Small, on_gpu) => self.small(on_gpu),
        }
        self.lines
    }

    /// Room for the largest of all cases.
    fn reserve(&mut self, heads: Heads, (mlp_width, vocabulary): (usize, usize), rows: usize) {
        let work = Workload {
            limits: StepLimits {
                rows,
                logit_rows: SAMPLED_ROWS,
                sequences: SAMPLED_ROWS,
                positions: CONTEXT,
                blocks: rows + CONTEXT / BLOCK_TOKENS,
                vocabulary,
            },
            heads,
            layers: 1,
            mlp_width,
            expert_width: EXPERTS.width(),
            // The widest x of a product in blocks.
            quantised_inputs: 1536,
        };
        self.backend.reserve(&work).unwrap();
    }

    fn small(&mut self, on_gpu: bool) {
        let dtypes: &[DType] = match on_gpu {
            true => &[DType::BF16],
            false => &[DType::F32, DType::BF16],
        };
        let rows = [1, 2, 4, 6, 8, 32, 512];
        for dtype in dtypes.iter().copied() {
            self.matmul((8192, 2048, 0), dtype, &rows);
            // gate and up, down with its experts, the head.
            self.matmul((3072, 576, 0), dtype, &rows);
            self.matmul((576, 1536, 0), dtype, &[1, 32, 512]);
            self.matmul((576, 1536, 32), dtype, &[1, 32, 512]);
            self.matmul((49_152, 576, 0), dtype, &[1, 32]);
        }
        for dtype in DType::ALL {
            if dtype.is_quantised() && !on_gpu {
                self.matmul((3072, 1536, 0), dtype, &[1, 4, 8, 512]);
            }
        }
        let heads = Heads {
            query: 9,
            kv: 3,
            size: 64,
        };
        self.around(heads, (576, 1536, 49_152), &[1, 32, 512]);
    }

    fn llama_7b(&mut self) {
        let rows = [1, 8, 32, 128, 512, 2048];
        self.matmul((12_288, 4096, 0), DType::BF16, &rows);
        self.matmul((4096, 4096, 0), DType::BF16, &rows);
        self.matmul((22_016, 4096, 0), DType::BF16, &rows);
        self.matmul((4096, 11_008, 0), DType::BF16, &rows);
        self.matmul((4096, 11_008, 32), DType::BF16, &rows);
        self.matmul((32_000, 4096, 0), DType::BF16, &[1, 8, 32, 128]);
        let heads = Heads {
            query: 32,
            kv: 32,
            size: 128,
        };
        self.around(heads, (4096, 11_008, 32_000), &[1, 8, 32, 128, 512, 2048]);
    }

    /// All but the products.
    fn around(&mut self, heads: Heads, (d, m, vocabulary): (usize, usize, usize), rows: &[usize]) {
        let most = rows.iter().copied().max().unwrap();
        self.reserve(heads, (m, vocabulary), most);
        let formats: &[KvFormat] = match self.on_gpu {
            true => &[KvFormat::BF16, KvFormat::FP8],
            false => &[KvFormat::BF16, KvFormat::F32, KvFormat::INT8],
        };
        for format in formats.iter().copied() {
            for shape in [
                (1, 1, 512),
                (1, 1, CONTEXT),
                (32, 1, 512),
                (1, 512, 512),
                (1, 512, 2048),
            ] {
                self.attention(heads, format, shape);
            }
            self.rope_kv_write(heads, format, rows);
        }
        for n in rows.iter().copied() {
            self.silu_mul_expert_mix(m, n, false);
            self.silu_mul_expert_mix(m, n, true);
            self.expert_mix(n);
            self.rms_norm(d, n);
            self.embed((d, vocabulary), n);
            self.gather_rows(d, n);
        }
        for n in rows.iter().copied().filter(|n| *n <= SAMPLED_ROWS) {
            self.sample(vocabulary, n);
        }
    }

    /// Bytes of an activation that is not exact.
    fn activation(&self) -> usize {
        if self.on_gpu { 2 } else { 4 }
    }

    /// Times a call that moves `bytes` and does `operations` on what activations are of.
    fn line(&mut self, name: String, bytes: usize, operations: usize, call: impl FnMut(&mut B)) {
        let number = if self.on_gpu {
            Number::Bf16
        } else {
            Number::F32
        };
        let work = Work {
            bytes,
            operations,
            number,
        };
        self.timed(name, work, call);
    }

    fn timed(&mut self, name: String, work: Work, mut call: impl FnMut(&mut B)) {
        if !self.lines.wants(&name) {
            return;
        }
        let calls = if self.on_gpu { GPU_CALLS } else { 1 };
        let (backend, end) = (&mut self.backend, &mut self.end);
        let seconds = time(calls, || {
            for _ in 0..calls {
                call(backend);
            }
            backend.read(end, 1).unwrap();
        });
        self.lines.add(name, work, seconds);
    }

    /// What a product with weights of `dtype` multiplies.
    fn number(&self, dtype: DType) -> Number {
        match (self.on_gpu, dtype.is_quantised()) {
            (true, _) => Number::Bf16,
            (false, true) => Number::Int8,
            (false, false) => Number::F32,
        }
    }

    fn filled(&self, rows: usize, width: usize, exact: bool) -> B::Buffer {
        let mut buffer = match exact {
            true => self.backend.exact_buffer(rows, width).unwrap(),
            false => self.backend.buffer(rows, width).unwrap(),
        };
        let values = Random(2).numbers(rows * width);
        self.backend.write(&mut buffer, &values).unwrap();
        buffer
    }

    /// Several matrices of one shape in turn: together larger than any cache.
    fn matmul(&mut self, (o, k, w): (usize, usize, usize), dtype: DType, rows: &[usize]) {
        let name = format!("matmul {} {o} x {k}+{w}", dtype.as_str());
        let name_of = |n: usize| format!("{name} n {n}");
        if !rows.iter().any(|n| self.lines.wants(&name_of(*n))) {
            return;
        }
        let random = &mut Random(1);
        let bytes = random.weights(o * k, dtype);
        let tail = random.weights(o * w, DType::BF16);
        // Twice the second-level cache of a GPU at least.
        let count = (WEIGHT_BYTES / bytes.len()).clamp(2, 64);
        let matrices: Vec<_> = (0..count)
            .map(|_| {
                let extension = (w > 0).then(|| host(o, w, DType::BF16, &tail));
                let parts = [host(o, k, dtype, &bytes)];
                let matrix = self.backend.matrix(&parts, extension, WeightFormat::Stored);
                matrix.unwrap()
            })
            .collect();
        for n in rows.iter().copied() {
            let x = self.filled(n, k + w, false);
            let mut y = self.backend.buffer(n, o).unwrap();
            let work = Work {
                bytes: bytes.len() + tail.len() + self.activation() * n * (k + w + o),
                operations: 2 * n * o * (k + w),
                number: self.number(dtype),
            };
            let mut turn = matrices.iter().cycle();
            self.timed(name_of(n), work, |backend| {
                let call = ops::MatMul {
                    n,
                    x: &x,
                    w: turn.next().unwrap(),
                    y: &mut y,
                    add: false,
                };
                backend.matmul(call).unwrap();
            });
        }
    }

    /// `sequences` with `rows` new rows each, at positions that end at `length`, and logits of each row.
    fn step(&self, sequences: usize, rows: usize, length: usize) -> B::Step {
        let blocks = length.div_ceil(BLOCK_TOKENS);
        let n = sequences * rows;
        let limits = StepLimits {
            rows: n,
            logit_rows: n,
            sequences,
            positions: length,
            blocks: sequences * blocks,
            vocabulary: 1,
        };
        let block = |s: usize, b: usize| BlockId::new((s * blocks + b) as u32);
        let tables: Vec<Vec<_>> = (0..sequences)
            .map(|s| (0..blocks).map(|b| block(s, b)).collect())
            .collect();
        let placed: Vec<_> = tables
            .iter()
            .map(|table| StepSequence {
                rows,
                start: length - rows,
                block_table: table,
                gates: Variant::Routed.gates(),
            })
            .collect();
        let mut step = self.backend.step(limits).unwrap();
        let layout = StepLayout {
            tokens: &vec![TokenId(0); n],
            sequences: &placed,
            logit_rows: &(0..n).collect::<Vec<_>>(),
        };
        self.backend.load_step(&layout, &mut step).unwrap();
        step
    }

    fn cache(&self, heads: Heads, format: KvFormat, blocks: usize) -> B::KvCache {
        let shape = KvShape {
            layers: 1,
            blocks,
            kv_heads: heads.kv,
            head_size: heads.size,
            format,
        };
        self.backend.kv_cache(shape).unwrap()
    }

    fn attention(&mut self, heads: Heads, format: KvFormat, shape: (usize, usize, usize)) {
        let (sequences, rows, length) = shape;
        let name = format!("attention {format:?} {sequences} x {rows} of {length}");
        if !self.lines.wants(&name) {
            return;
        }
        let step = self.step(sequences, rows, length);
        let n = sequences * rows;
        let cache = self.cache(heads, format, sequences * length.div_ceil(BLOCK_TOKENS));
        let qkv = self.filled(n, heads.qkv_width(), false);
        let out = heads.query * heads.size;
        let mut y = self.backend.buffer(n, out).unwrap();
        // A row sees the positions up to its own.
        let seen: usize = (length - rows + 1..=length).sum();
        let kv = sequences * length * 2 * heads.kv * format.head_bytes(heads.size);
        let bytes = kv + 2 * self.activation() * n * out;
        self.line(name, bytes, 4 * sequences * seen * out, |backend| {
            let call = ops::Attention {
                step: &step,
                layer: 0,
                heads,
                qkv: &qkv,
                cache: &cache,
                y: &mut y,
            };
            backend.attention(call).unwrap();
        });
    }

    fn rope_kv_write(&mut self, heads: Heads, format: KvFormat, rows: &[usize]) {
        for n in rows.iter().copied() {
            let step = self.step(n, 1, 1);
            let mut cache = self.cache(heads, format, n);
            let mut qkv = self.filled(n, heads.qkv_width(), false);
            // A rotation: by any other row the numbers would shrink from call to call, to where the processor is slow.
            let mut rope = self.backend.exact_buffer(1, heads.size).unwrap();
            let turn = [0.8, 0.6].map(|x| vec![x; heads.size / 2]).concat();
            self.backend.write(&mut rope, &turn).unwrap();
            let (read, q) = (heads.qkv_width(), heads.query + heads.kv);
            let kv = 2 * heads.kv * format.head_bytes(heads.size);
            let bytes = n * (self.activation() * (read + q * heads.size) + kv);
            let name = format!("rope_kv_write {format:?} n {n}");
            self.line(name, bytes, 3 * n * q * heads.size, |backend| {
                let call = ops::RopeKvWrite {
                    step: &step,
                    layer: 0,
                    heads,
                    rope: &rope,
                    qkv: &mut qkv,
                    cache: &mut cache,
                };
                backend.rope_kv_write(call).unwrap();
            });
        }
    }

    fn silu_mul_expert_mix(&mut self, m: usize, n: usize, routed: bool) {
        let (width, rows) = if routed {
            (EXPERTS.width(), EXPERTS.width() + 2)
        } else {
            (0, 0)
        };
        let name = match routed {
            true => format!("silu_mul_expert_mix m {m} n {n}"),
            false => format!("silu_mul m {m} n {n}"),
        };
        let random = &mut Random(3);
        let lora_a = random.weights(width * m, DType::BF16);
        let gates = random.weights(2 * m, DType::F32);
        let e = routed.then(|| {
            let parts = (
                host(width, m, DType::BF16, &lora_a),
                host(2, m, DType::F32, &gates),
            );
            self.backend.experts(parts.0, parts.1).unwrap()
        });
        let gate_up = self.filled(n, 2 * m, false);
        let mut hu = self.backend.buffer(n, m + width).unwrap();
        let mut gates = self.backend.exact_buffer(n, 2).unwrap();
        let step = self.step(n, 1, 1);
        let weights = if routed { lora_a.len() + 8 * m } else { 0 };
        let moved = weights + self.activation() * n * (3 * m + width);
        self.line(name, moved, 2 * n * rows * m, |backend| {
            let call = ops::SiluMulExpertMix {
                step: &step,
                layer: 0,
                gate_up: &gate_up,
                experts: e.as_ref().map(|e| (e, EXPERTS)),
                hu: &mut hu,
                gates: &mut gates,
                z: None,
            };
            backend.silu_mul_expert_mix(call).unwrap();
        });
    }

    fn expert_mix(&mut self, n: usize) {
        let w = EXPERTS.width();
        let z = self.filled(n, w + 2, true);
        let mut u = self.backend.buffer(n, w).unwrap();
        let mut gates = self.backend.exact_buffer(n, 2).unwrap();
        let step = self.step(n, 1, 1);
        let bytes = n * (4 * (w + 4) + self.activation() * w);
        self.line(format!("expert_mix n {n}"), bytes, n * w, |backend| {
            let call = ops::ExpertMix {
                step: &step,
                layer: 0,
                shape: EXPERTS,
                z: &z,
                u: &mut u,
                gates: &mut gates,
            };
            backend.expert_mix(call).unwrap();
        });
    }

    fn rms_norm(&mut self, d: usize, n: usize) {
        let (x, weight) = (self.filled(n, d, true), self.filled(1, d, true));
        let mut y = self.backend.buffer(n, d).unwrap();
        let bytes = n * d * (4 + self.activation());
        self.line(
            format!("rms_norm d {d} n {n}"),
            bytes,
            4 * n * d,
            |backend| {
                let call = ops::RmsNorm {
                    n,
                    x: &x,
                    weight: &weight,
                    eps: 1e-5,
                    y: &mut y,
                };
                backend.rms_norm(call).unwrap();
            },
        );
    }

    fn embed(&mut self, (d, vocabulary): (usize, usize), n: usize) {
        let name = format!("embed d {d} n {n}");
        if !self.lines.wants(&name) {
            return;
        }
        let bytes = Random(4).weights(vocabulary * d, DType::BF16);
        let table = [host(vocabulary, d, DType::BF16, &bytes)];
        let table = self.backend.matrix(&table, None, WeightFormat::Stored);
        let table = table.unwrap();
        let mut x = self.backend.exact_buffer(n, d).unwrap();
        let step = self.step(n, 1, 1);
        self.line(name, 6 * n * d, 0, |backend| {
            let call = ops::Embed {
                step: &step,
                table: &table,
                x: &mut x,
            };
            backend.embed(call).unwrap();
        });
    }

    fn gather_rows(&mut self, d: usize, n: usize) {
        let x = self.filled(n, d, true);
        let mut y = self.backend.exact_buffer(n, d).unwrap();
        let step = self.step(n, 1, 1);
        self.line(
            format!("gather_rows d {d} n {n}"),
            8 * n * d,
            0,
            |backend| {
                let call = ops::GatherRows {
                    step: &step,
                    x: &x,
                    y: &mut y,
                };
                backend.gather_rows(call).unwrap();
            },
        );
    }

    /// Where the device samples; its answer is waited for each time, as a step does.
    fn sample(&mut self, vocabulary: usize, n: usize) {
        if !self.backend.samples() {
            return;
        }
        let logits = self.filled(n, vocabulary, true);
        let rows = vec![
            SampleRow {
                random: 0.5,
                scale: 1.0,
                least: f32::NEG_INFINITY,
                top_k: 50,
                top_p: 0.9,
                repetition_penalty: 1.0,
                ..SampleRow::default()
            };
            n
        ];
        let mut sampled = Sampled::default();
        let name = format!("sample v {vocabulary} n {n}");
        self.line(name, 4 * n * vocabulary, 0, |backend| {
            let done = backend.sample(&logits, &rows).unwrap();
            assert!(done, "the device has no room to sample");
            backend.sampled(&rows, &mut sampled).unwrap();
        });
    }
}
