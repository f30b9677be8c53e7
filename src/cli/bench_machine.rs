//! Times the limits of this machine: read rate and arithmetic peaks on as many threads as the backend uses.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::backend::cpu::limits::{Peak, ReadBuffer, peaks};
use crate::bench::{MachineFacts, Spread};

/// Time of one repeat, about: long against starting threads, short against what else runs on the machine.
const REPEAT: Duration = Duration::from_millis(40);
/// Repeats of each limit.
const REPEATS: usize = 9;
/// Least and most bytes of the buffer that is read.
const READ_BYTES: (usize, usize) = (2 << 20, 1 << 30);

/// Measures read rate over `bytes` (of the weights, so that what fits a cache is measured in it) and the peaks.
///
/// # Errors
/// When the system has no memory for the buffer.
pub(super) fn measure(
    threads: usize,
    bytes: usize,
    matrix_kind: &str,
) -> std::io::Result<MachineFacts> {
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
        cpu: cpu_name(),
        threads,
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
    fn measure_finds_a_read_rate_and_the_peak_asked_for() {
        let facts = measure(2, 1, "f32").unwrap();
        assert!(facts.read_bytes_per_second.median > 0.0);
        assert!(facts.matrix_peak.starts_with("f32"));
        assert!(facts.matrix_ops_per_second() > 0.0);
        assert!(!facts.cpu.is_empty());
    }
}
