//! What was measured, beside its roof.

use std::fmt;
use std::time::{Duration, Instant};

use midpo::bench::Spread;
use serde::Serialize;

/// Time that a line is given.
const BUDGET: Duration = Duration::from_millis(400);
/// Repeats of a line at least.
const REPEATS_MIN: usize = 5;

/// What the device can do at most.
#[derive(Serialize)]
pub struct Roof {
    pub device: String,
    pub bytes_per_second: f64,
    /// What is multiplied, and operations a second.
    pub peaks: Vec<(Number, f64)>,
}

/// What a product multiplies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Number {
    Int8,
    Bf16,
    F32,
}

/// What a call moves and does.
#[derive(Serialize)]
pub struct Work {
    pub bytes: usize,
    pub operations: usize,
    pub number: Number,
}

impl Roof {
    /// Least seconds of `work`. Without the vendor's library nobody knows the peak of a GPU: then it is that of the bytes.
    fn seconds(&self, work: &Work) -> f64 {
        let peak = self.peaks.iter().find(|(number, _)| *number == work.number);
        let of_operations = match peak {
            Some((_, peak)) if *peak > 0.0 => work.operations as f64 / peak,
            _ => 0.0,
        };
        of_operations.max(work.bytes as f64 / self.bytes_per_second)
    }
}

impl fmt::Display for Roof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {:.1} GB/s",
            self.device,
            self.bytes_per_second / 1e9
        )?;
        for (number, peak) in &self.peaks {
            write!(f, ", {number:?} {:.1} Gop/s", peak / 1e9)?;
        }
        Ok(())
    }
}

/// One op at one size.
#[derive(Serialize)]
struct Line {
    name: String,
    /// Of a call.
    seconds: Spread,
    #[serde(flatten)]
    work: Work,
    /// Least seconds that the roof allows, over the median.
    share_of_roof: f64,
}

/// All lines of a run.
#[derive(Serialize)]
pub struct Lines {
    roof: Roof,
    lines: Vec<Line>,
    #[serde(skip)]
    only: Option<String>,
}

/// Seconds of one of `calls` that `work` makes, after one `work` to warm up.
pub fn time(calls: usize, mut work: impl FnMut()) -> Spread {
    work();
    let (start, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < REPEATS_MIN || start.elapsed() < BUDGET {
        let before = Instant::now();
        work();
        seconds.push(before.elapsed().as_secs_f64() / calls as f64);
    }
    Spread::of(seconds)
}

impl Lines {
    pub fn new(roof: Roof, only: Option<String>) -> Self {
        Self {
            roof,
            lines: Vec::new(),
            only,
        }
    }

    pub fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|word| name.contains(word))
    }

    /// Of a call.
    pub fn add(&mut self, name: String, work: Work, seconds: Spread) {
        let roof = self.roof.seconds(&work);
        println!(
            "{name:<52} {:>10.1} us [{:>9.1}]  {:>7.1} GB/s {:>9.1} Gop/s  {:>4.0} % of the roof [{:.0}]",
            seconds.median * 1e6,
            seconds.min * 1e6,
            work.bytes as f64 / seconds.median / 1e9,
            work.operations as f64 / seconds.median / 1e9,
            100.0 * roof / seconds.median,
            100.0 * roof / seconds.min,
        );
        self.lines.push(Line {
            name,
            share_of_roof: roof / seconds.median,
            seconds,
            work,
        });
    }
}
