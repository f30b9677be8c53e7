//! Every op of a backend beside what its device can do: bytes moved and operations a second, both measured in the same run.
//!
//! `cargo bench --bench kernels [-- --only WORD] [--isa ISA] [--json FILE]` on the processor, at the sizes of a model of 135 M parameters;
//! with `--features cuda` and `--device cuda` on a GPU, at those of LLaMA-7B (`--shape` takes the other). Inputs are random. A figure is the
//! median of its repeats, with the fastest in brackets; on a shared machine read the fractions.

#![allow(clippy::unwrap_used, missing_docs)]

mod cases;
mod line;
mod random;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use midpo::backend::cpu::limits::{ReadBuffer, peaks};
use midpo::backend::cpu::{CpuOptions, Isa};
use midpo::backend::cuda::CudaOptions;
use midpo::backend::{self, Backend, DeviceBytes, DeviceChoice, UseBackend};

use cases::Cases;
use line::{Lines, Number, Roof, time};

/// Bytes of weights that are read in turn, so that they come from memory and not from a cache.
pub const WEIGHT_BYTES: usize = 96 << 20;

#[derive(Clone, Copy, ValueEnum)]
enum Target {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Shape {
    /// SmolLM2 of 135 M parameters.
    Small,
    /// LLaMA-7B.
    #[value(name = "llama-7b")]
    Llama7b,
}

#[derive(Parser)]
struct Args {
    /// Where ops run.
    #[arg(long, default_value = "cpu")]
    device: Target,
    /// Sizes; by default those of a small model on the processor, of LLaMA-7B on a GPU.
    #[arg(long)]
    shape: Option<Shape>,
    /// Only lines that contain this.
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Instruction set of the processor.
    #[arg(long)]
    isa: Option<String>,
    /// Where to write all of it as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
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

fn processor(threads: usize, isa: Isa) -> Roof {
    let buffer = ReadBuffer::new(WEIGHT_BYTES).unwrap();
    let read = time(1, || on_all(threads, |i| buffer.read_part(i, threads)));
    const ROUNDS: usize = 1 << 20;
    let peak = |number: Number, name: &str| {
        let peak = peaks().into_iter().find(|peak| peak.name == name)?;
        let run = time(1, || on_all(threads, |_| peak.run(ROUNDS)));
        let operations = threads * ROUNDS * peak.ops_per_round;
        Some((number, operations as f64 / run.min))
    };
    let peaks = [peak(Number::F32, "f32"), peak(Number::Int8, "int8")];
    Roof {
        device: format!("{threads} threads, {}", isa.as_str()),
        bytes_per_second: buffer.bytes() as f64 / read.min,
        peaks: peaks.into_iter().flatten().collect(),
    }
}

fn gpu() -> Roof {
    let limits = backend::device_limits().unwrap();
    let most = |rates: &[f64]| rates.iter().copied().fold(0.0, f64::max);
    Roof {
        bytes_per_second: most(&limits.copy_bytes_per_second),
        peaks: vec![(Number::Bf16, most(&limits.bf16_ops_per_second))],
        device: limits.name,
    }
}

/// The device is known, the backend not yet.
struct Run<'a> {
    args: &'a Args,
    roof: Roof,
}

impl UseBackend for Run<'_> {
    type Output = Lines;

    fn run<B: Backend>(self, backend: B, memory: Option<DeviceBytes>) -> Lines {
        let on_gpu = memory.is_some();
        let shape = match (self.args.shape, on_gpu) {
            (Some(shape), _) => shape,
            (None, true) => Shape::Llama7b,
            (None, false) => Shape::Small,
        };
        let lines = Lines::new(self.roof, self.args.only.clone());
        Cases::new(backend, on_gpu, lines).run(shape)
    }
}

fn main() {
    let args = Args::parse();
    let isa = args.isa.as_deref().map(|name| {
        let mut all = Isa::ALL.into_iter();
        all.find(|isa| isa.as_str() == name)
            .unwrap_or_else(|| panic!("--isa: there is no `{name}`"))
    });
    let cpu = CpuOptions { isa, threads: None };
    let (choice, roof) = match args.device {
        Target::Cpu => {
            let opened = backend::cpu::Cpu::new(cpu).unwrap();
            (DeviceChoice::Cpu, processor(opened.threads(), opened.isa()))
        }
        Target::Cuda => (DeviceChoice::Cuda, gpu()),
    };
    println!("{roof}\n");
    let run = Run { args: &args, roof };
    let lines = backend::open(choice, cpu, CudaOptions::default(), run).unwrap();
    if let Some(file) = &args.json {
        std::fs::write(file, serde_json::to_vec_pretty(&lines).unwrap()).unwrap();
    }
}
