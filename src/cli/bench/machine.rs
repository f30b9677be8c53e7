//! The limits of what the bench runs on. Those of a processor are timed here: read rate and arithmetic peaks on as many threads as the
//! backend uses; a GPU's are measured by its backend.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::backend::DeviceLimits;
use crate::backend::cpu::limits::{Peak, ReadBuffer, peaks};
use crate::bench::{MachineFacts, Spread};

/// Time of one repeat, about: long against starting threads, short against what else runs on the machine.
const REPEAT: Duration = Duration::from_millis(40);
/// Repeats of each limit.
const REPEATS: usize = 9;
/// Least and most bytes of the buffer that is read.
const READ_BYTES: (usize, usize) = (2 << 20, 1 << 30);

/// What the bench runs on.
pub(super) enum Machine {
    /// So many threads of the processor.
    Cpu {
        /// As the backend uses.
        threads: usize,
    },
    /// A GPU, and what it can do.
    Gpu(DeviceLimits),
}

impl Machine {
    /// Limits for a model whose step reads `bytes` of weights, most of them multiplied as `matrix_kind`.
    ///
    /// # Errors
    /// When the system has no memory for the buffer.
    pub(super) fn facts(&self, bytes: usize, matrix_kind: &str) -> std::io::Result<MachineFacts> {
        match self {
            Self::Cpu { threads } => measure(*threads, bytes, matrix_kind),
            Self::Gpu(limits) => Ok(gpu_facts(limits)),
        }
    }
}

fn gpu_facts(limits: &DeviceLimits) -> MachineFacts {
    let spread = |rates: &[f64]| Spread::of(rates.iter().copied());
    let peak = "bf16 (cublasLt)".to_owned();
    let peaks = match limits.bf16_ops_per_second.as_slice() {
        [] => Vec::new(),
        rates => vec![(peak.clone(), spread(rates))],
    };
    MachineFacts {
        name: limits.name.clone(),
        read_bytes_per_second: spread(&limits.copy_bytes_per_second),
        peaks,
        matrix_peak: peak,
    }
}

/// Measures read rate over `bytes` (of the weights, so that what fits a cache is measured in it) and the peaks.
///
/// # Errors
/// When the system has no memory for the buffer.
fn measure(threads: usize, bytes: usize, matrix_kind: &str) -> std::io::Result<MachineFacts> {
    let buffer = ReadBuffer::new(bytes.clamp(READ_BYTES.0, READ_BYTES.1))?;
    let read = timed(threads, &|thread, rounds| {
        for _ in 0..rounds {
            buffer.read_part(thread, threads);
        }
    });
    let peaks: Vec<(String, Spread)> = peaks()
        .iter()
        .map(|peak| {
            (
                format!("{} ({})", peak.name, peak.instruction),
                rate(threads, peak),
            )
        })
        .collect();
    let kind = |wanted: &str| {
        let named = peaks.iter().find(|(name, _)| name.starts_with(wanted));
        named.map(|(name, _)| name.clone())
    };
    Ok(MachineFacts {
        name: format!("{}, {threads} threads", cpu_name()),
        read_bytes_per_second: read.inverse(buffer.bytes() as f64),
        // Without instructions for the kind, its matrices are computed in f32.
        matrix_peak: kind(matrix_kind)
            .or_else(|| kind("f32"))
            .unwrap_or_default(),
        peaks,
    })
}

fn rate(threads: usize, peak: &Peak) -> Spread {
    let seconds = timed(threads, &|_, rounds| peak.run(rounds));
    seconds.inverse((threads * peak.ops_per_round) as f64)
}

/// Seconds of one round of `work(thread, rounds)` on all threads at once, over the repeats.
fn timed(threads: usize, work: &(dyn Fn(usize, usize) + Sync)) -> Spread {
    let (mut rounds, mut seconds) = (1usize, once(threads, 1, work));
    while seconds < REPEAT.as_secs_f64() / 4.0 && rounds < usize::MAX / 8 {
        rounds *= 4;
        seconds = once(threads, rounds, work);
    }
    let wanted = (rounds as f64 * REPEAT.as_secs_f64() / seconds.max(1e-9)).max(1.0);
    let rounds = wanted as usize;
    Spread::of((0..REPEATS).map(|_| once(threads, rounds, work) / rounds as f64))
}

/// Seconds from when all threads stand ready until the last is done.
fn once(threads: usize, rounds: usize, work: &(dyn Fn(usize, usize) + Sync)) -> f64 {
    let barrier = &Barrier::new(threads.max(1));
    let begun = std::thread::scope(|scope| {
        for thread in 1..threads {
            scope.spawn(move || {
                barrier.wait();
                work(thread, rounds);
            });
        }
        barrier.wait();
        let begun = Instant::now();
        work(0, rounds);
        begun
    });
    begun.elapsed().as_secs_f64()
}

fn cpu_name() -> String {
    let facts = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = facts.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    match (value("model name"), value("cpu family"), value("model\t")) {
        (Some(name), Some(family), Some(model)) => format!("{name}, family {family} model {model}"),
        (Some(name), ..) => name,
        _ => std::env::consts::ARCH.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn facts_of_a_gpu_are_what_it_measured() {
        let mut limits = DeviceLimits {
            name: "a GPU".to_owned(),
            copy_bytes_per_second: vec![3e12, 1e12, 2e12],
            bf16_ops_per_second: vec![7e14],
        };
        let facts = Machine::Gpu(limits.clone()).facts(1, "f32").unwrap();
        assert_eq!(facts.read_bytes_per_second.median, 2e12);
        assert_eq!(facts.matrix_ops_per_second(), 7e14);
        limits.bf16_ops_per_second.clear();
        let facts = Machine::Gpu(limits).facts(1, "f32").unwrap();
        assert_eq!(facts.matrix_ops_per_second(), 0.0);
    }

    #[test]
    fn measure_finds_a_read_rate_and_the_peak_asked_for() {
        let facts = measure(2, 1, "f32").unwrap();
        assert!(facts.read_bytes_per_second.median > 0.0);
        assert!(facts.matrix_peak.starts_with("f32"));
        assert!(facts.matrix_ops_per_second() > 0.0);
        assert!(facts.name.ends_with(", 2 threads"), "{}", facts.name);
    }
}
