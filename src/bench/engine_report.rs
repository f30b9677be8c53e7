//! What the engine-only bench reports: each figure beside the least time that this machine allows for it.

use std::fmt::Write as _;

use serde::Serialize;

use super::stats::{Spread, digits};

/// A bench of the bare engine on this machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EngineReport {
    /// Of midpo.
    pub version: &'static str,
    /// Limits, measured in the same run.
    pub machine: MachineFacts,
    /// What was run.
    pub model: ModelFacts,
    /// Decode, prefill, contexts.
    pub measurements: Vec<Measurement>,
    /// Two things measured turn by turn.
    pub ratios: Vec<RatioRow>,
    /// The same work through model, engine and HTTP.
    pub server: Vec<ServerRow>,
}

/// What this machine can do at most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MachineFacts {
    /// The processor and the threads used, by the limits and by the backend; or the GPU.
    pub name: String,
    /// Bytes read a second from a buffer as large as the weights; on a GPU, read and written while its memory is copied.
    pub read_bytes_per_second: Spread,
    /// Peaks of arithmetic: name and operations a second (a multiply-add is two).
    pub peaks: Vec<(String, Spread)>,
    /// Which of them bounds this model's matrices.
    pub matrix_peak: String,
}

/// What was run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelFacts {
    /// File, or the embedded demo.
    pub name: String,
    /// Of most matrices, as they lie in the checkpoint.
    pub weight_format: String,
    /// Of the base's weights on the device.
    pub weight_bytes: usize,
    /// That a decode step reads.
    pub step_weight_bytes: usize,
    /// Of K and V.
    pub kv_format: String,
    /// Its own, or random ones made for the bench.
    pub experts: String,
    /// Most rows of a step: longer prompts are computed in chunks of it.
    pub step_rows: usize,
    /// From the start of loading until the base is ready for its first step.
    pub load_seconds: f64,
}

/// The least that a step must do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Tokens that it yields: rows of a prefill, sequences of a decode step.
    pub tokens: usize,
    /// Bytes of weights, K and V that it reads.
    pub bytes: f64,
    /// Operations (a multiply-add is two).
    pub ops: f64,
}

/// What holds a step's time from below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Bytes over read bandwidth.
    Bandwidth,
    /// Operations over the matrix peak.
    Compute,
}

/// One thing timed, and its roofline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// `decode`, `prefill`, ...
    pub what: String,
    /// Sequences of the step.
    pub batch: usize,
    /// Positions before the step.
    pub context: usize,
    /// What had to be done.
    pub work: Work,
    /// Of one step (decode), or of the whole prompt (prefill).
    pub seconds: Spread,
    /// Work's tokens over seconds.
    pub tokens_per_second: Spread,
    /// What the machine allows.
    pub roof_tokens_per_second: f64,
    /// By which limit.
    pub bound: Bound,
    /// Median over roof.
    pub fraction: f64,
}

/// Two things measured turn by turn.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RatioRow {
    /// `routed / base, decode`, ...
    pub what: String,
    /// Sequences.
    pub batch: usize,
    /// Seconds of the first.
    pub above: Spread,
    /// Seconds of the second.
    pub below: Spread,
    /// Of the pairs.
    pub ratio: Spread,
}

/// The same load through the model alone, the engine, and HTTP, turn by turn.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServerRow {
    /// Concurrent streams.
    pub streams: usize,
    /// Of each stream.
    pub prompt_tokens: usize,
    /// Of each stream.
    pub output_tokens: usize,
    /// Output tokens a second of forward passes alone: prefill of all, then decode of all.
    pub model: Spread,
    /// With scheduler and sampling, through the engine's handle.
    pub engine: Spread,
    /// With HTTP, JSON and server-sent events.
    pub server: Spread,
    /// Server over model, of the pairs.
    pub server_over_model: Spread,
    /// Server over engine, of the pairs.
    pub server_over_engine: Spread,
    /// Longest time that a running stream stood still, worst repeat.
    pub worst_gap_ms: f64,
}

impl Measurement {
    /// Sets `seconds` (one a repeat) beside the limits of `machine`.
    pub fn new(
        what: &str,
        (batch, context): (usize, usize),
        work: Work,
        seconds: Spread,
        machine: &MachineFacts,
    ) -> Self {
        let bandwidth = seconds_at(work.bytes, machine.read_bytes_per_second.median);
        let compute = seconds_at(work.ops, machine.matrix_ops_per_second());
        let (least, bound) = if bandwidth >= compute {
            (bandwidth, Bound::Bandwidth)
        } else {
            (compute, Bound::Compute)
        };
        let tokens_per_second = seconds.inverse(work.tokens as f64);
        let roof = Spread::of([least]).inverse(work.tokens as f64).median;
        Self {
            what: what.to_owned(),
            batch,
            context,
            work,
            seconds,
            tokens_per_second,
            roof_tokens_per_second: roof,
            bound,
            fraction: if roof > 0.0 {
                tokens_per_second.median / roof
            } else {
                0.0
            },
        }
    }
}

fn seconds_at(amount: f64, rate: f64) -> f64 {
    if rate > 0.0 { amount / rate } else { 0.0 }
}

impl MachineFacts {
    /// Median of the peak that bounds the model's matrices; 0 where it was not measured.
    pub fn matrix_ops_per_second(&self) -> f64 {
        let named = self
            .peaks
            .iter()
            .find(|(name, _)| *name == self.matrix_peak);
        named.map_or(0.0, |(_, peak)| peak.median)
    }
}

impl EngineReport {
    /// For a machine.
    pub fn to_json(&self) -> String {
        // Every field is a number, a string or a list of them: it always has a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// For a reader.
    pub fn to_markdown(&self) -> String {
        let mut out = self.conditions();
        self.append_measurements(&mut out);
        self.append_ratios(&mut out);
        self.append_server(&mut out);
        out
    }

    fn conditions(&self) -> String {
        let (machine, model) = (&self.machine, &self.model);
        let peaks: Vec<String> = machine
            .peaks
            .iter()
            .map(|(name, peak)| format!("{name} {} Gop/s", scaled(peak, 1e-9)))
            .collect();
        format!(
            "{}: {} weights, {} MB ({} MB a decode step), K/V {}, experts: {}, at most {} rows a step, ready in {} s. \
             {}; limits measured in this run, median (least to most): read {} GB/s, {}. \
             Rooflines: that read rate and the {} peak; midpo {}.\n",
            model.name,
            model.weight_format,
            digits(model.weight_bytes as f64 / 1e6),
            digits(model.step_weight_bytes as f64 / 1e6),
            model.kv_format,
            model.experts,
            model.step_rows,
            digits(model.load_seconds),
            machine.name,
            scaled(&machine.read_bytes_per_second, 1e-9),
            peaks.join(", "),
            machine.matrix_peak,
            self.version,
        )
    }

    fn append_measurements(&self, out: &mut String) {
        out.push_str(
            "\n| what | batch | context | tok/s | ms | roof tok/s | bound | of roof | MB | Mop |\n\
             | --- | --: | --: | --: | --: | --: | --- | --: | --: | --: |\n",
        );
        for row in &self.measurements {
            let bound = match row.bound {
                Bound::Bandwidth => "bandwidth",
                Bound::Compute => "compute",
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {bound} | {:.0} % | {} | {} |",
                row.what,
                row.batch,
                row.context,
                row.tokens_per_second,
                scaled(&row.seconds, 1e3),
                digits(row.roof_tokens_per_second),
                row.fraction * 100.0,
                digits(row.work.bytes * 1e-6),
                digits(row.work.ops * 1e-6),
            );
        }
    }

    fn append_ratios(&self, out: &mut String) {
        if self.ratios.is_empty() {
            return;
        }
        out.push_str(
            "\n| ratio of times, turn by turn | batch | first ms | second ms | ratio |\n\
             | --- | --: | --: | --: | --: |\n",
        );
        for row in &self.ratios {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} |",
                row.what,
                row.batch,
                scaled(&row.above, 1e3),
                scaled(&row.below, 1e3),
                fine(&row.ratio),
            );
        }
    }

    fn append_server(&self, out: &mut String) {
        if self.server.is_empty() {
            return;
        }
        out.push_str(
            "\n| streams | prompt + output | model tok/s | engine tok/s | server tok/s | server / model | server / engine | worst gap ms |\n\
             | --: | --: | --: | --: | --: | --: | --: | --: |\n",
        );
        for row in &self.server {
            let _ = writeln!(
                out,
                "| {} | {} + {} | {} | {} | {} | {} | {} | {} |",
                row.streams,
                row.prompt_tokens,
                row.output_tokens,
                row.model,
                row.engine,
                row.server,
                fine(&row.server_over_model),
                fine(&row.server_over_engine),
                digits(row.worst_gap_ms),
            );
        }
    }
}

fn scaled(spread: &Spread, unit: f64) -> String {
    let Spread {
        repeats,
        min,
        median,
        max,
    } = *spread;
    Spread {
        repeats,
        min: min * unit,
        median: median * unit,
        max: max * unit,
    }
    .to_string()
}

/// Ratios near 1 need their third digit after the point.
fn fine(spread: &Spread) -> String {
    format!(
        "{:.3} ({:.3} to {:.3})",
        spread.median, spread.min, spread.max
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn machine() -> MachineFacts {
        MachineFacts {
            name: "a CPU, 2 threads".to_owned(),
            read_bytes_per_second: Spread::of([40e9, 50e9, 60e9]),
            peaks: vec![
                ("f32".to_owned(), Spread::of([200e9])),
                ("int8".to_owned(), Spread::of([800e9])),
            ],
            matrix_peak: "int8".to_owned(),
        }
    }

    fn report() -> EngineReport {
        let decode = Work {
            tokens: 4,
            bytes: 100e6,
            ops: 1e9,
        };
        let prefill = Work {
            tokens: 512,
            bytes: 100e6,
            ops: 160e9,
        };
        let machine = machine();
        EngineReport {
            version: "0.0.0",
            model: ModelFacts {
                name: "tiny".to_owned(),
                weight_format: "Q4_0".to_owned(),
                weight_bytes: 100_000_000,
                step_weight_bytes: 90_000_000,
                kv_format: "bf16".to_owned(),
                experts: "own, rank 16".to_owned(),
                step_rows: 512,
                load_seconds: 0.25,
            },
            measurements: vec![
                Measurement::new(
                    "decode",
                    (4, 128),
                    decode,
                    Spread::of([0.004, 0.005, 0.004]),
                    &machine,
                ),
                Measurement::new("prefill", (1, 0), prefill, Spread::of([0.4]), &machine),
            ],
            ratios: vec![RatioRow {
                what: "routed / base, decode".to_owned(),
                batch: 4,
                above: Spread::of([0.00404]),
                below: Spread::of([0.004]),
                ratio: Spread::of([1.01]),
            }],
            server: vec![ServerRow {
                streams: 32,
                prompt_tokens: 96,
                output_tokens: 64,
                model: Spread::of([1000.0]),
                engine: Spread::of([990.0]),
                server: Spread::of([960.0]),
                server_over_model: Spread::of([0.96]),
                server_over_engine: Spread::of([0.9697]),
                worst_gap_ms: 120.0,
            }],
            machine,
        }
    }

    #[test]
    fn roofline_is_the_slower_of_bytes_and_operations() {
        let report = report();
        let [decode, prefill] = report.measurements.as_slice() else {
            panic!("two measurements");
        };
        // 100 MB at 50 GB/s are 2 ms, 1 Gop at 800 Gop/s 1.25 ms: 4 tokens in 2 ms.
        assert_eq!(
            (decode.bound, decode.roof_tokens_per_second),
            (Bound::Bandwidth, 2000.0)
        );
        assert!((decode.fraction - 0.5).abs() < 1e-12);
        assert_eq!(
            (prefill.bound, prefill.roof_tokens_per_second),
            (Bound::Compute, 2560.0)
        );
        assert!((prefill.fraction - 0.5).abs() < 1e-12);
    }

    #[test]
    fn markdown_is_as_agreed() {
        let want = "\
tiny: Q4_0 weights, 100 MB (90.0 MB a decode step), K/V bf16, experts: own, rank 16, at most 512 rows a step, ready in 0.250 s. \
a CPU, 2 threads; limits measured in this run, median (least to most): read 50.0 (40.0 to 60.0) GB/s, f32 200 (200 to 200) Gop/s, int8 800 (800 to 800) Gop/s. \
Rooflines: that read rate and the int8 peak; midpo 0.0.0.

| what | batch | context | tok/s | ms | roof tok/s | bound | of roof | MB | Mop |
| --- | --: | --: | --: | --: | --: | --- | --: | --: | --: |
| decode | 4 | 128 | 1000 (800 to 1000) | 4.00 (4.00 to 5.00) | 2000 | bandwidth | 50 % | 100 | 1000 |
| prefill | 1 | 0 | 1280 (1280 to 1280) | 400 (400 to 400) | 2560 | compute | 50 % | 100 | 160000 |

| ratio of times, turn by turn | batch | first ms | second ms | ratio |
| --- | --: | --: | --: | --: |
| routed / base, decode | 4 | 4.04 (4.04 to 4.04) | 4.00 (4.00 to 4.00) | 1.010 (1.010 to 1.010) |

| streams | prompt + output | model tok/s | engine tok/s | server tok/s | server / model | server / engine | worst gap ms |
| --: | --: | --: | --: | --: | --: | --: | --: |
| 32 | 96 + 64 | 1000 (1000 to 1000) | 990 (990 to 990) | 960 (960 to 960) | 0.960 (0.960 to 0.960) | 0.970 (0.970 to 0.970) | 120 |
";
        assert_eq!(report().to_markdown(), want);
    }

    #[test]
    fn json_has_the_roofline_beside_each_figure() {
        let json: serde_json::Value = serde_json::from_str(&report().to_json()).unwrap();
        let decode = &json["measurements"][0];
        assert_eq!(
            (&decode["what"], &decode["bound"]),
            (&"decode".into(), &"bandwidth".into())
        );
        assert_eq!(decode["roof_tokens_per_second"], 2000.0);
        assert_eq!(json["ratios"][0]["ratio"]["median"], 1.01);
        assert_eq!(json["server"][0]["streams"], 32);
        assert_eq!(json["machine"]["peaks"][1][0], "int8");
    }
}
