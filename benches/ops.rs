//! Single ops of the CPU backend beside what the machine can do: bytes read and multiply-adds a second, measured in the same
//! run. `cargo bench --bench ops [-- WORD [ISA]]` runs the ops whose line contains WORD, on an instruction set.
//!
//! Inputs are random. A figure is the median of its repeats, with the fastest in brackets; on a shared machine read the fractions.

#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use midpo::backend::cpu::limits::{ReadBuffer, peaks};
use midpo::backend::cpu::{Cpu, CpuOptions, Isa};
use midpo::backend::ops::{self, ExpertShape, Heads};
use midpo::backend::{
    Backend, HostMatrix, KvFormat, KvShape, StepLayout, StepLimits, StepSequence, WeightFormat,
};
use midpo::dtype::DType;
use midpo::types::{BLOCK_TOKENS, BlockId, TokenId, Variant};

/// Time that a line is given.
const BUDGET: Duration = Duration::from_millis(400);
/// Repeats of a line at least.
const REPEATS_MIN: usize = 5;
/// Bytes of weights that are read in turn, so that they come from memory and not from a cache.
const WEIGHT_BYTES: usize = 96 << 20;

/// What the machine can do on all threads.
struct Machine {
    cpu: Cpu,
    bytes_per_second: f64,
    ops_per_second: f64,
    filter: Option<String>,
}

/// Median and least seconds of a call, after one to warm up.
fn time(mut call: impl FnMut()) -> (f64, f64) {
    call();
    let (start, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < REPEATS_MIN || start.elapsed() < BUDGET {
        let before = Instant::now();
        call();
        seconds.push(before.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    (seconds[seconds.len() / 2], seconds[0])
}

/// Runs `part(i)` on every thread at once.
fn on_all(threads: usize, part: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for i in 1..threads {
            let part = &part;
            scope.spawn(move || part(i));
        }
        part(0);
    });
}

impl Machine {
    fn measure(filter: Option<String>, isa: Option<&str>) -> Self {
        let isa = isa.map(|name| {
            let mut all = Isa::ALL.into_iter();
            all.find(|isa| isa.as_str() == name).unwrap()
        });
        let options = CpuOptions { isa, threads: None };
        let cpu = Cpu::new(options).unwrap();
        let threads = cpu.threads();
        let buffer = ReadBuffer::new(WEIGHT_BYTES).unwrap();
        let (_, least) = time(|| on_all(threads, |i| buffer.read_part(i, threads)));
        let bytes_per_second = buffer.bytes() as f64 / least;
        let peak = peaks().into_iter().find(|peak| peak.name == "f32").unwrap();
        const ROUNDS: usize = 1 << 20;
        let (_, least) = time(|| on_all(threads, |_| peak.run(ROUNDS)));
        let ops_per_second = (threads * ROUNDS * peak.ops_per_round) as f64 / least;
        println!(
            "{} threads, {}: read {:.1} GB/s, f32 {:.1} GFLOP/s\n",
            threads,
            cpu.isa().as_str(),
            bytes_per_second / 1e9,
            ops_per_second / 1e9
        );
        Self {
            cpu,
            bytes_per_second,
            ops_per_second,
            filter,
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|word| name.contains(word))
    }

    /// Times a call that moves `bytes` and does `operations`, and prints it beside the roof.
    fn line(
        &mut self,
        name: &str,
        bytes: usize,
        operations: usize,
        mut call: impl FnMut(&mut Cpu),
    ) {
        if !self.wants(name) {
            return;
        }
        let (median, least) = time(|| call(&mut self.cpu));
        let (bytes, operations) = (bytes as f64, operations as f64);
        let roof = (bytes / self.bytes_per_second).max(operations / self.ops_per_second);
        println!(
            "{name:<44} {:>10.1} us [{:>9.1}]  {:>6.1} GB/s {:>7.1} GFLOP/s  {:>4.0} % of the roof [{:.0}]",
            median * 1e6,
            least * 1e6,
            bytes / median / 1e9,
            operations / median / 1e9,
            100.0 * roof / median,
            100.0 * roof / least,
        );
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn numbers(&mut self, len: usize) -> Vec<f32> {
        let number = |x: u64| (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..len).map(|_| number(self.next())).collect()
    }
}

fn weights(random: &mut Random, len: usize, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => random
            .numbers(len)
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect(),
        DType::BF16 => {
            let numbers = random.numbers(len).into_iter();
            numbers
                .flat_map(|x| bf16::from_f32(x).to_le_bytes())
                .collect()
        }
        // Small scales: the high bits of every f16 are clear, whatever else the bytes say.
        _ => (0..dtype.bytes_of(len).unwrap())
            .map(|_| random.next() as u8 & 0x3b)
            .collect(),
    }
}

fn filled(cpu: &Cpu, rows: usize, width: usize, values: &[f32]) -> <Cpu as Backend>::Buffer {
    let mut buffer = cpu.buffer(rows, width).unwrap();
    cpu.write(&mut buffer, values).unwrap();
    buffer
}

/// Several matrices of one shape in turn: together larger than any cache.
fn matmul(machine: &mut Machine, (o, k, w): (usize, usize, usize), dtype: DType, rows: &[usize]) {
    let name = format!("matmul {} {o} x {k}+{w}", dtype.as_str());
    if !rows.iter().any(|n| machine.wants(&format!("{name} n {n}"))) {
        return;
    }
    let random = &mut Random(1);
    let bytes = weights(random, o * k, dtype);
    let tail = weights(random, o * w, DType::F32);
    let host = |rows, cols, dtype, bytes| HostMatrix {
        rows,
        cols,
        dtype,
        bytes,
    };
    let count = (WEIGHT_BYTES / bytes.len()).clamp(1, 64);
    let matrices: Vec<_> = (0..count)
        .map(|_| {
            let extension = (w > 0).then(|| host(o, w, DType::F32, &tail[..]));
            let parts = [host(o, k, dtype, &bytes[..])];
            machine
                .cpu
                .matrix(&parts, extension, WeightFormat::Stored)
                .unwrap()
        })
        .collect();
    for n in rows.iter().copied() {
        let x = filled(&machine.cpu, n, k + w, &random.numbers(n * (k + w)));
        let mut y = machine.cpu.buffer(n, o).unwrap();
        let moved = bytes.len() + tail.len() + 4 * n * (k + w + o);
        let mut turn = matrices.iter().cycle();
        machine.line(
            &format!("{name} n {n}"),
            moved,
            2 * n * o * (k + w),
            |cpu| {
                let call = ops::MatMul {
                    n,
                    x: &x,
                    w: turn.next().unwrap(),
                    y: &mut y,
                    add: false,
                };
                cpu.matmul(call).unwrap();
                black_box(cpu.read(&mut y, n).unwrap());
            },
        );
    }
}

/// `sequences` with `rows` new rows each, at positions that end at `length`.
fn step(cpu: &Cpu, sequences: usize, rows: usize, length: usize) -> <Cpu as Backend>::Step {
    let blocks = length.div_ceil(BLOCK_TOKENS);
    let limits = StepLimits {
        rows: sequences * rows,
        logit_rows: 1,
        sequences,
        positions: length,
        blocks: sequences * blocks,
        vocabulary: 1,
    };
    let tables: Vec<Vec<_>> = (0..sequences)
        .map(|s| {
            (0..blocks)
                .map(|b| BlockId::new((s * blocks + b) as u32))
                .collect()
        })
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
    let mut step = cpu.step(limits).unwrap();
    let layout = StepLayout {
        tokens: &vec![TokenId(0); sequences * rows],
        sequences: &placed,
        logit_rows: &[],
    };
    cpu.load_step(&layout, &mut step).unwrap();
    step
}

fn attention(machine: &mut Machine, heads: Heads, format: KvFormat, shape: (usize, usize, usize)) {
    let (sequences, rows, length) = shape;
    let name = format!("attention {format:?} {sequences} x {rows} of {length}");
    if !machine.wants(&name) {
        return;
    }
    let step = step(&machine.cpu, sequences, rows, length);
    let (n, width) = (sequences * rows, heads.qkv_width());
    let blocks = sequences * length.div_ceil(BLOCK_TOKENS);
    let cache = KvShape {
        layers: 1,
        blocks,
        kv_heads: heads.kv,
        head_size: heads.size,
        format,
    };
    let cache = machine.cpu.kv_cache(cache).unwrap();
    let qkv = filled(&machine.cpu, n, width, &Random(2).numbers(n * width));
    let out = heads.query * heads.size;
    let mut y = machine.cpu.buffer(n, out).unwrap();
    // A row sees the positions up to its own.
    let seen: usize = (length - rows + 1..=length).sum();
    let bytes = sequences * length * 2 * heads.kv * format.head_bytes(heads.size);
    machine.line(&name, bytes, 4 * sequences * seen * out, |cpu| {
        let call = ops::Attention {
            step: &step,
            layer: 0,
            heads,
            qkv: &qkv,
            cache: &cache,
            y: &mut y,
        };
        cpu.attention(call).unwrap();
    });
}

fn expert_mix(machine: &mut Machine, m: usize, n: usize, routed: bool) {
    let name = format!(
        "silu_mul{} m {m} n {n}",
        if routed { "_expert_mix" } else { "" }
    );
    if !machine.wants(&name) {
        return;
    }
    let random = &mut Random(3);
    let shape = ExpertShape {
        safety_rank: 16,
        helpfulness_rank: 16,
        safety_bias: 0.0,
        helpfulness_bias: 0.0,
    };
    let (w, outputs) = if routed {
        (shape.width(), shape.width() + 2)
    } else {
        (0, 0)
    };
    let bytes = weights(random, outputs * m, DType::F32);
    let e = HostMatrix {
        rows: outputs,
        cols: m,
        dtype: DType::F32,
        bytes: &bytes,
    };
    let e = routed.then(|| {
        machine
            .cpu
            .matrix(&[e], None, WeightFormat::Stored)
            .unwrap()
    });
    let gate_up = filled(&machine.cpu, n, 2 * m, &random.numbers(n * 2 * m));
    let mut hu = machine.cpu.buffer(n, m + w).unwrap();
    let mut gates = machine.cpu.buffer(n, 2).unwrap();
    let step = step(&machine.cpu, n, 1, 1);
    let moved = bytes.len() + 4 * n * (3 * m + w);
    machine.line(&name, moved, 2 * n * outputs * m, |cpu| {
        let call = ops::SiluMulExpertMix {
            step: &step,
            layer: 0,
            gate_up: &gate_up,
            experts: e.as_ref().map(|e| (e, shape)),
            hu: &mut hu,
            gates: &mut gates,
            z: None,
        };
        cpu.silu_mul_expert_mix(call).unwrap();
    });
}

fn rms_norm(machine: &mut Machine, d: usize, n: usize) {
    let random = &mut Random(4);
    let x = filled(&machine.cpu, n, d, &random.numbers(n * d));
    let weight = filled(&machine.cpu, 1, d, &random.numbers(d));
    let mut y = machine.cpu.buffer(n, d).unwrap();
    machine.line(
        &format!("rms_norm d {d} n {n}"),
        8 * n * d,
        4 * n * d,
        |cpu| {
            let call = ops::RmsNorm {
                n,
                x: &x,
                weight: &weight,
                eps: 1e-5,
                y: &mut y,
            };
            cpu.rms_norm(call).unwrap();
        },
    );
}

fn main() {
    // `cargo bench` passes `--bench`.
    let mut words = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'));
    let (filter, isa) = (words.next(), words.next());
    let machine = &mut Machine::measure(filter, isa.as_deref());
    let rows = [1, 2, 4, 6, 8, 32, 512];
    for dtype in [DType::F32, DType::BF16] {
        matmul(machine, (8192, 2048, 0), dtype, &rows);
        // The matrices of a 135 M model: gate and up, down with its experts, the head.
        matmul(machine, (3072, 576, 0), dtype, &rows);
        matmul(machine, (576, 1536, 0), dtype, &[1, 32, 512]);
        matmul(machine, (576, 1536, 32), dtype, &[1, 32, 512]);
        matmul(machine, (49_152, 576, 0), dtype, &[1, 32]);
    }
    for dtype in DType::ALL {
        if dtype.is_quantised() {
            matmul(machine, (3072, 1536, 0), dtype, &[1, 4, 8, 512]);
        }
    }
    let heads = Heads {
        query: 9,
        kv: 3,
        size: 64,
    };
    for format in [KvFormat::BF16, KvFormat::F32] {
        for shape in [
            (1, 1, 512),
            (1, 1, 8192),
            (32, 1, 512),
            (1, 512, 512),
            (1, 512, 2048),
        ] {
            attention(machine, heads, format, shape);
        }
    }
    for n in [1, 4, 32, 512] {
        expert_mix(machine, 1536, n, false);
        expert_mix(machine, 1536, n, true);
    }
    for n in [1, 32, 512] {
        rms_norm(machine, 576, n);
    }
}
