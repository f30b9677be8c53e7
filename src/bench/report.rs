//! What the load generator reports: numbers for a machine (JSON) and for a reader (Markdown).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::client::{Endpoint, RequestRecord, RequestShape};
use super::load::{Load, Run};
use super::stats::{Quantiles, digits};
use crate::types::Variant;

/// A bench of one server.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadReport {
    /// Of midpo, the client.
    pub version: &'static str,
    /// The server's address.
    pub url: String,
    /// The model asked for.
    pub model: String,
    /// What was the same at all levels.
    pub conditions: Conditions,
    /// One a concurrency or rate, in the order in which they ran.
    pub levels: Vec<Level>,
}

/// What was the same at all levels.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Conditions {
    /// The route.
    pub endpoint: Endpoint,
    /// In words: length or file.
    pub prompts: String,
    /// Of prompts and arrivals.
    pub seed: u64,
    /// Asked in turn; none: the server's default.
    pub variants: Vec<&'static str>,
    /// Requests before each level that are not counted.
    pub warmup_requests: usize,
    /// The rest of the body.
    #[serde(flatten)]
    pub shape: RequestShape,
}

/// What came of one level of load. Tokens and times are those of completed requests; gaps are those of all.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Level {
    /// What was asked.
    pub load: Load,
    /// Sent, or due.
    pub requests: usize,
    /// Answered to the end.
    pub completed: usize,
    /// The others, by kind.
    pub errors: BTreeMap<String, ErrorCount>,
    /// From the first request to the last byte.
    pub wall_seconds: f64,
    /// As the servers' `usage` counts; 0 where it sends none.
    pub prompt_tokens: u64,
    /// As `usage` counts, else one a chunk.
    pub output_tokens: u64,
    /// Chunks with text: fewer than tokens where the server joins tokens.
    pub output_chunks: u64,
    /// Output tokens over wall time.
    pub output_tokens_per_second: f64,
    /// Completed over wall time.
    pub requests_per_second: f64,
    /// From when a request was due to its first chunk with text.
    pub ttft_ms: Quantiles,
    /// Between chunks of one stream.
    pub itl_ms: Quantiles,
    /// A request's time from first to last chunk, over its tokens but one.
    pub token_ms: Quantiles,
    /// From when a request was due to its last byte.
    pub e2e_ms: Quantiles,
    /// The longest time that any running stream stood still.
    pub worst_gap_ms: f64,
    /// One a variant, where variants were asked for.
    pub variants: Vec<VariantRow>,
}

/// Failures of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ErrorCount {
    /// How many.
    pub count: usize,
    /// What the first said.
    pub example: String,
}

/// One variant's share of a level.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VariantRow {
    /// Which.
    pub variant: &'static str,
    /// Answered to the end.
    pub completed: usize,
    /// Theirs.
    pub output_tokens: u64,
    /// Theirs.
    pub ttft_ms: Quantiles,
    /// Theirs.
    pub itl_ms: Quantiles,
}

impl Level {
    /// Sums up a run.
    pub fn of(run: &Run) -> Self {
        let done: Vec<&RequestRecord> = completed(&run.records).collect();
        let wall_seconds = run.wall.as_secs_f64();
        let rate = |count: f64| {
            if wall_seconds > 0.0 {
                count / wall_seconds
            } else {
                0.0
            }
        };
        let output_tokens = done.iter().map(|record| record.output_tokens()).sum();
        let usage = done.iter().filter_map(|record| record.usage);
        Self {
            load: run.load,
            requests: run.records.len(),
            completed: done.len(),
            errors: errors(&run.records),
            wall_seconds,
            prompt_tokens: usage.map(|usage| usage.prompt_tokens).sum(),
            output_tokens,
            output_chunks: done.iter().map(|record| record.chunks.len() as u64).sum(),
            output_tokens_per_second: rate(output_tokens as f64),
            requests_per_second: rate(done.len() as f64),
            ttft_ms: Quantiles::of(done.iter().filter_map(|record| ttft_ms(record))),
            itl_ms: Quantiles::of(done.iter().flat_map(|record| gaps_ms(record))),
            token_ms: Quantiles::of(done.iter().filter_map(|record| token_ms(record))),
            e2e_ms: Quantiles::of(
                done.iter()
                    .map(|record| milliseconds(record.due, record.ended)),
            ),
            worst_gap_ms: run.records.iter().flat_map(gaps_ms).fold(0.0, f64::max),
            variants: Variant::ALL
                .into_iter()
                .filter_map(|variant| VariantRow::of(variant, &run.records))
                .collect(),
        }
    }

    /// The load as a word: `8`, or `2.5/s`.
    pub fn label(&self) -> String {
        match self.load {
            Load::Concurrency(clients) => clients.to_string(),
            Load::Rate(rate) => format!("{rate}/s"),
        }
    }
}

impl VariantRow {
    /// `None` where no request asked for it.
    fn of(variant: Variant, records: &[RequestRecord]) -> Option<Self> {
        let asked = |record: &&RequestRecord| record.variant == Some(variant);
        records.iter().find(asked)?;
        let done: Vec<&RequestRecord> = completed(records).filter(asked).collect();
        Some(Self {
            variant: variant.as_str(),
            completed: done.len(),
            output_tokens: done.iter().map(|record| record.output_tokens()).sum(),
            ttft_ms: Quantiles::of(done.iter().filter_map(|record| ttft_ms(record))),
            itl_ms: Quantiles::of(done.iter().flat_map(|record| gaps_ms(record))),
        })
    }
}

fn completed(records: &[RequestRecord]) -> impl Iterator<Item = &RequestRecord> {
    records.iter().filter(|record| record.outcome.is_ok())
}

fn errors(records: &[RequestRecord]) -> BTreeMap<String, ErrorCount> {
    let mut errors = BTreeMap::new();
    for failure in records
        .iter()
        .filter_map(|record| record.outcome.as_ref().err())
    {
        let first = || ErrorCount {
            count: 0,
            example: failure.to_string(),
        };
        errors.entry(failure.kind()).or_insert_with(first).count += 1;
    }
    errors
}

fn milliseconds(from: std::time::Duration, to: std::time::Duration) -> f64 {
    to.saturating_sub(from).as_secs_f64() * 1e3
}

fn ttft_ms(record: &RequestRecord) -> Option<f64> {
    let first = record.chunks.first()?;
    Some(milliseconds(record.due, *first))
}

fn gaps_ms(record: &RequestRecord) -> impl Iterator<Item = f64> {
    let after = record.chunks.iter().skip(1);
    record
        .chunks
        .iter()
        .zip(after)
        .map(|(a, b)| milliseconds(*a, *b))
}

fn token_ms(record: &RequestRecord) -> Option<f64> {
    let (first, last) = (record.chunks.first()?, record.chunks.last()?);
    let steps = record.output_tokens().checked_sub(1).filter(|n| *n > 0)?;
    Some(milliseconds(*first, *last) / steps as f64)
}

impl LoadReport {
    /// For a machine.
    pub fn to_json(&self) -> String {
        // Every field is a number, a string or a map of strings: it always has a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// For a reader: conditions, one row a level, errors and variants where there are any.
    pub fn to_markdown(&self) -> String {
        let mut out = self.conditions_line();
        let load = match self.levels.first().map(|level| level.load) {
            Some(Load::Rate(_)) => "arrivals",
            _ => "streams",
        };
        let _ = writeln!(
            out,
            "| {load} | done | failed | output tok/s | req/s | TTFT ms | ITL ms | end to end s | worst gap ms |\n\
             | --: | --: | --: | --: | --: | --: | --: | --: | --: |"
        );
        for level in &self.levels {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                level.label(),
                level.completed,
                level.requests - level.completed,
                digits(level.output_tokens_per_second),
                digits(level.requests_per_second),
                quantiles(&level.ttft_ms, 1.0),
                quantiles(&level.itl_ms, 1.0),
                quantiles(&level.e2e_ms, 1e-3),
                digits(level.worst_gap_ms),
            );
        }
        out.push_str("\nLatencies: p50 / p90 / p99 / max.\n");
        self.append_errors(&mut out);
        self.append_variants(&mut out);
        out
    }

    fn conditions_line(&self) -> String {
        let Conditions {
            endpoint,
            prompts,
            variants,
            shape,
            ..
        } = &self.conditions;
        let endpoint = match endpoint {
            Endpoint::Chat => "chat completions",
            Endpoint::Completions => "completions",
        };
        let eos = if shape.ignore_eos {
            ", end of sequence ignored"
        } else {
            ""
        };
        let mix = if variants.is_empty() {
            String::new()
        } else {
            format!(", variants {}", variants.join(", "))
        };
        format!(
            "`{}` at {}: streamed {endpoint}, {prompts}, {} output tokens{eos}, temperature {}{mix}; midpo {}.\n\n",
            self.model, self.url, shape.max_tokens, shape.temperature, self.version
        )
    }

    fn append_errors(&self, out: &mut String) {
        let errors = self.levels.iter().flat_map(|level| {
            let label = level.label();
            let row = move |(kind, error): (&String, &ErrorCount)| {
                format!(
                    "| {label} | {kind} | {} | {} |\n",
                    error.count,
                    cell(&error.example)
                )
            };
            level.errors.iter().map(row)
        });
        let rows: String = errors.collect();
        if !rows.is_empty() {
            let _ = write!(
                out,
                "\n| load | failure | count | first |\n| --: | --- | --: | --- |\n{rows}"
            );
        }
    }

    fn append_variants(&self, out: &mut String) {
        let rows: String = self
            .levels
            .iter()
            .flat_map(|level| level.variants.iter().map(move |row| (level.label(), row)))
            .map(|(label, row)| {
                let (ttft, itl) = (quantiles(&row.ttft_ms, 1.0), quantiles(&row.itl_ms, 1.0));
                let (variant, done, tokens) = (row.variant, row.completed, row.output_tokens);
                format!("| {label} | {variant} | {done} | {tokens} | {ttft} | {itl} |\n")
            })
            .collect();
        if !rows.is_empty() {
            let _ = write!(
                out,
                "\n| load | variant | done | output tokens | TTFT ms | ITL ms |\n\
                 | --: | --- | --: | --: | --: | --: |\n{rows}"
            );
        }
    }
}

fn quantiles(of: &Quantiles, unit: f64) -> String {
    if of.count == 0 {
        return "-".to_owned();
    }
    [of.p50, of.p90, of.p99, of.max]
        .map(|value| digits(value * unit))
        .join(" / ")
}

/// Text that cannot break a table's row.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::super::client::{Failure, Usage};
    use super::*;

    fn at(milliseconds: &[u64]) -> Vec<Duration> {
        milliseconds
            .iter()
            .copied()
            .map(Duration::from_millis)
            .collect()
    }

    fn record(variant: Variant, due: u64, chunks: &[u64], ended: u64) -> RequestRecord {
        RequestRecord {
            variant: Some(variant),
            due: Duration::from_millis(due),
            chunks: at(chunks),
            ended: Duration::from_millis(ended),
            usage: Some(Usage {
                prompt_tokens: 10,
                completion_tokens: 3,
            }),
            outcome: Ok(()),
        }
    }

    /// Two levels with every kind of thing in them.
    pub(in crate::bench) fn report() -> LoadReport {
        let mut broken = record(Variant::Base, 0, &[500, 1500], 1600);
        broken.outcome = Err(Failure::Cut("a | b\nc".to_owned()));
        let first = Run {
            load: Load::Concurrency(1),
            records: vec![record(Variant::Routed, 0, &[100, 120, 140], 150)],
            wall: Duration::from_millis(150),
        };
        let second = Run {
            load: Load::Concurrency(2),
            records: vec![
                record(Variant::Routed, 0, &[200, 250, 300], 300),
                record(Variant::Base, 100, &[400, 500, 600], 600),
                broken,
            ],
            wall: Duration::from_secs(2),
        };
        LoadReport {
            version: "0.0.0",
            url: "http://127.0.0.1:1/".to_owned(),
            model: "tiny".to_owned(),
            conditions: Conditions {
                endpoint: Endpoint::Chat,
                prompts: "prompts of 10 tokens".to_owned(),
                seed: 1,
                variants: vec!["routed", "base"],
                warmup_requests: 1,
                shape: RequestShape {
                    max_tokens: 3,
                    temperature: 0.0,
                    ignore_eos: true,
                    extra: serde_json::Map::new(),
                },
            },
            levels: vec![Level::of(&first), Level::of(&second)],
        }
    }

    #[test]
    fn markdown_is_as_agreed() {
        let want = "\
`tiny` at http://127.0.0.1:1/: streamed chat completions, prompts of 10 tokens, 3 output tokens, end of sequence ignored, temperature 0, variants routed, base; midpo 0.0.0.

| streams | done | failed | output tok/s | req/s | TTFT ms | ITL ms | end to end s | worst gap ms |
| --: | --: | --: | --: | --: | --: | --: | --: | --: |
| 1 | 1 | 0 | 20.0 | 6.67 | 100 / 100 / 100 / 100 | 20.0 / 20.0 / 20.0 / 20.0 | 0.150 / 0.150 / 0.150 / 0.150 | 20.0 |
| 2 | 2 | 1 | 3.00 | 1.00 | 250 / 290 / 299 / 300 | 75.0 / 100 / 100 / 100 | 0.400 / 0.480 / 0.498 / 0.500 | 1000 |

Latencies: p50 / p90 / p99 / max.

| load | failure | count | first |
| --: | --- | --: | --- |
| 2 | cut | 1 | the stream broke off: a \\| b c |

| load | variant | done | output tokens | TTFT ms | ITL ms |
| --: | --- | --: | --: | --: | --: |
| 1 | routed | 1 | 3 | 100 / 100 / 100 / 100 | 20.0 / 20.0 / 20.0 / 20.0 |
| 2 | routed | 1 | 3 | 200 / 200 / 200 / 200 | 50.0 / 50.0 / 50.0 / 50.0 |
| 2 | base | 1 | 3 | 300 / 300 / 300 / 300 | 100 / 100 / 100 / 100 |
";
        assert_eq!(report().to_markdown(), want);
    }

    #[test]
    fn json_has_every_number_under_its_name() {
        let json: serde_json::Value = serde_json::from_str(&report().to_json()).unwrap();
        let second = &json["levels"][1];
        assert_eq!(second["load"]["concurrency"], 2);
        assert_eq!(
            (&second["requests"], &second["completed"]),
            (&3.into(), &2.into())
        );
        assert_eq!(second["errors"]["cut"]["count"], 1);
        assert_eq!(second["output_tokens"], 6);
        assert_eq!(second["output_chunks"], 6);
        assert_eq!(second["prompt_tokens"], 20);
        assert_eq!(second["output_tokens_per_second"], 3.0);
        assert_eq!(second["token_ms"]["p50"], 75.0);
        assert_eq!(second["worst_gap_ms"], 1000.0);
        assert_eq!(second["variants"][1]["variant"], "base");
        assert_eq!(json["conditions"]["max_tokens"], 3);
        assert_eq!(json["conditions"]["endpoint"], "chat");
    }

    #[test]
    fn level_of_nothing_is_all_zero() {
        let level = Level::of(&Run {
            load: Load::Rate(2.5),
            records: Vec::new(),
            wall: Duration::ZERO,
        });
        assert_eq!((level.requests, level.output_tokens_per_second), (0, 0.0));
        assert_eq!(level.label(), "2.5/s");
    }
}
