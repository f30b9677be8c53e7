//! Every metric: its name, help, unit, labels and buckets. The struct is passed; it owns its registry.
//!
//! Every series is made at start and reached by a closed enum, so counting is one atomic addition, no client can add a
//! series, and a rate over a series that nothing has touched yet is 0, not absent.

mod build;
mod kinds;
mod labels;

pub use build::{MetricInfo, MetricKind};
pub use kinds::{By, Counter, Gauge, GaugeGuard, Histogram, RealGauge};
pub use labels::{BlockState, Gate, Label, Refusal, Route, Status};

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use build::Builder;
use prometheus::proto::{LabelPair, MetricFamily};
use prometheus::{IntGaugeVec, Registry, TextEncoder};

use crate::types::{BLOCK_TOKENS, FinishReason, Variant};

/// Bounds of latency histograms, in seconds: tiny models answer in under a millisecond, long answers take minutes.
const LATENCY_SECONDS: [f64; 20] = [
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0, 300.0,
];

/// Bounds of histograms of a step's size.
const STEP_SIZE: [f64; 13] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0,
];

/// Bounds of gate histograms; fine at both ends, where a trained router lives.
const GATE_RATIO: [f64; 13] = [
    0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99,
];

/// The names that routers, load testers and dashboards of the field read, and the metric of ours that each repeats.
const ALIASES: [(&str, &str); 16] = [
    ("vllm:num_requests_running", "midpo_sequences_running"),
    ("vllm:num_requests_waiting", "midpo_sequences_waiting"),
    ("vllm:kv_cache_usage_perc", "midpo_kv_cache_usage_ratio"),
    (
        "vllm:prefix_cache_queries_total",
        "midpo_prefix_cache_query_tokens_total",
    ),
    (
        "vllm:prefix_cache_hits_total",
        "midpo_prefix_cache_hit_tokens_total",
    ),
    ("vllm:prompt_tokens_total", "midpo_prompt_tokens_total"),
    (
        "vllm:generation_tokens_total",
        "midpo_generated_tokens_total",
    ),
    ("vllm:num_preemptions_total", "midpo_preemptions_total"),
    (
        "vllm:spec_decode_num_drafts_total",
        "midpo_spec_decode_drafts_total",
    ),
    (
        "vllm:spec_decode_num_draft_tokens_total",
        "midpo_spec_decode_draft_tokens_total",
    ),
    (
        "vllm:spec_decode_num_accepted_tokens_total",
        "midpo_spec_decode_accepted_tokens_total",
    ),
    (
        "vllm:request_success_total",
        "midpo_requests_finished_total",
    ),
    (
        "vllm:time_to_first_token_seconds",
        "midpo_time_to_first_token_seconds",
    ),
    (
        "vllm:inter_token_latency_seconds",
        "midpo_inter_token_latency_seconds",
    ),
    (
        "vllm:request_queue_time_seconds",
        "midpo_queue_time_seconds",
    ),
    (
        "vllm:e2e_request_latency_seconds",
        "midpo_request_duration_seconds",
    ),
];

/// The table of metrics. A row: help, which is also the field's documentation; field and type; how it is made, name, buckets.
macro_rules! metrics {
    ($(#[doc = $help:literal] $field:ident: $type:ty = $make:ident($name:literal $(, $buckets:expr)?);)+) => {
        /// All metrics of the process. Shared by an `Arc`; every field may be written from any thread without a lock.
        pub struct Metrics {
            /// What is known of the process beside its counts.
            process: Process,
            $(#[doc = $help] pub $field: $type),+
        }

        impl Metrics {
            fn build(mut build: Builder, process: impl FnOnce(Builder) -> Process) -> Self {
                Self {
                    $($field: build.$make($name, $help.trim_ascii(), $($buckets)?),)+
                    process: process(build),
                }
            }
        }
    };
}

metrics! {
    /// HTTP responses, by route and status.
    http_requests: By<Route, By<Status, Counter>> = counters_by_two("midpo_http_requests_total");
    /// HTTP requests being answered.
    http_requests_in_flight: Gauge = gauge("midpo_http_requests_in_flight");
    /// From a request's head to the last byte of its response.
    http_request_duration: By<Route, Histogram> = histograms_by("midpo_http_request_duration_seconds", &LATENCY_SECONDS);

    /// Requests that the engine took, by variant.
    requests: By<Variant, Counter> = counters_by("midpo_requests_total");
    // At rest they add up to `requests`.
    /// Requests that ended, by variant and the gravest reason of their choices.
    requests_finished: By<Variant, By<FinishReason, Counter>> = counters_by_two("midpo_requests_finished_total");
    /// Choices that ended, by variant and reason.
    sequences_finished: By<Variant, By<FinishReason, Counter>> = counters_by_two("midpo_sequences_finished_total");
    /// Submissions that the engine refused.
    refusals: By<Refusal, Counter> = counters_by("midpo_refused_requests_total");
    /// Requests that the client left before their end.
    cancellations: Counter = counter("midpo_cancellations_total");
    /// Sequences in the batch.
    sequences_running: Gauge = gauge("midpo_sequences_running");
    /// Sequences that wait for a place in the batch, preempted ones too.
    sequences_waiting: Gauge = gauge("midpo_sequences_waiting");
    /// Sequences put back to be computed again, for want of K/V blocks.
    preemptions: Counter = counter("midpo_preemptions_total");

    /// Prompt tokens of requests whose prompt is computed, by variant.
    prompt_tokens: By<Variant, Counter> = counters_by("midpo_prompt_tokens_total");
    /// Tokens sampled, by variant.
    generated_tokens: By<Variant, Counter> = counters_by("midpo_generated_tokens_total");
    // One observation for each request with a token.
    /// From accept to a request's first token.
    time_to_first_token: Histogram = histogram("midpo_time_to_first_token_seconds", &LATENCY_SECONDS);
    /// Between two tokens of a choice.
    inter_token_latency: Histogram = histogram("midpo_inter_token_latency_seconds", &LATENCY_SECONDS);
    /// From accept to a request's first step.
    queue_time: Histogram = histogram("midpo_queue_time_seconds", &LATENCY_SECONDS);
    /// From accept to the end of a request's last choice.
    request_duration: Histogram = histogram("midpo_request_duration_seconds", &LATENCY_SECONDS);
    /// A gate of a generated token, mean over layers, by gate and variant.
    gates: By<Gate, By<Variant, Histogram>> = histograms_by_two("midpo_gate_ratio", &GATE_RATIO);

    /// Share of the K/V blocks that sequences hold, 0 to 1.
    kv_cache_usage: RealGauge = real_gauge("midpo_kv_cache_usage_ratio");
    /// K/V blocks, by state.
    kv_blocks: By<BlockState, Gauge> = gauges_by("midpo_kv_blocks");
    /// Prompt tokens looked up in the prefix cache.
    prefix_cache_query_tokens: Counter = counter("midpo_prefix_cache_query_tokens_total");
    /// Prompt tokens found in the prefix cache.
    prefix_cache_hit_tokens: Counter = counter("midpo_prefix_cache_hit_tokens_total");

    /// Times that a sequence guessed its next tokens.
    spec_decode_drafts: Counter = counter("midpo_spec_decode_drafts_total");
    /// Tokens guessed ahead.
    spec_decode_draft_tokens: Counter = counter("midpo_spec_decode_draft_tokens_total");
    /// Tokens guessed ahead that were right.
    spec_decode_accepted_tokens: Counter = counter("midpo_spec_decode_accepted_tokens_total");

    /// From plan to commit of a step.
    step_duration: Histogram = histogram("midpo_step_duration_seconds", &LATENCY_SECONDS);
    /// Tokens computed in a step, prefill and decode together.
    step_tokens: Histogram = histogram("midpo_step_tokens", &STEP_SIZE);
    /// Sequences in a step.
    step_sequences: Histogram = histogram("midpo_step_sequences", &STEP_SIZE);
    /// Steps that the backend could not compute.
    step_failures: Counter = counter("midpo_step_failures_total");
}

/// What is known of the process beside its counts.
struct Process {
    registry: Registry,
    infos: Vec<MetricInfo>,
    model_name: String,
    started: Instant,
    /// Microseconds from `started` to the end of the last step, plus 1; 0: there was none.
    last_step: AtomicU64,
    last_step_age: RealGauge,
    cache_config: IntGaugeVec,
}

impl Metrics {
    /// All metrics at 0. `model_name` is a label of the aliases (routers group replicas by it).
    ///
    /// Panics if two metrics have one name or a name is malformed: a mistake of this file, which every test would meet.
    pub fn new(model_name: &str) -> Self {
        let mut build = Builder::default();
        build
            .gauge_vec(
                "midpo_build_info",
                "Version of the server; always 1.",
                &["version"],
            )
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        let cache_config = build.gauge_vec(
            "vllm:cache_config_info",
            "Shape of the K/V cache; always 1.",
            &["block_size", "num_gpu_blocks"],
        );
        let last_step_age = build.real_gauge(
            "midpo_last_step_age_seconds",
            "Since the end of the last step; grows while there is nothing to do.",
        );
        Self::build(build, |build| Process {
            registry: build.registry,
            infos: build.infos,
            model_name: model_name.to_owned(),
            started: Instant::now(),
            last_step: AtomicU64::new(0),
            last_step_age,
            cache_config,
        })
    }

    /// Publishes the size of the K/V cache; once, when the model is loaded.
    pub fn set_kv_blocks(&self, blocks: usize) {
        self.process
            .cache_config
            .with_label_values(&[&BLOCK_TOKENS.to_string(), &blocks.to_string()])
            .set(1);
        self.kv_blocks.of(BlockState::Free).set(blocks);
    }

    /// A step ended at `now`.
    pub fn set_last_step(&self, now: Instant) {
        let micros = now
            .saturating_duration_since(self.process.started)
            .as_micros();
        let micros = u64::try_from(micros).unwrap_or(u64::MAX - 1);
        self.process.last_step.store(micros + 1, Ordering::Relaxed);
    }

    /// The text exposition format (`text/plain; version=0.0.4`).
    pub fn render(&self) -> String {
        self.process
            .last_step_age
            .set(self.last_step_age(Instant::now()));
        let mut families = self.process.registry.gather();
        let aliases: Vec<MetricFamily> = ALIASES
            .iter()
            .filter_map(|(alias, original)| {
                let family = families.iter().find(|family| family.name() == *original)?;
                Some(self.alias(alias, family.clone()))
            })
            .collect();
        families.extend(aliases);
        let mut text = String::with_capacity(64 * 1024);
        // Fails only on a family without samples, which `gather` leaves out.
        if let Err(error) = TextEncoder::new().encode_utf8(&families, &mut text) {
            tracing::error!(%error, "metrics cannot be rendered");
        }
        text
    }

    /// Every metric, aliases last.
    pub fn infos(&self) -> Vec<MetricInfo> {
        let alias = |(name, original): &(&str, &str)| {
            let info = self
                .process
                .infos
                .iter()
                .find(|info| info.name == *original)?;
            let mut info = info.clone();
            info.name = (*name).to_owned();
            info.labels.push("model_name");
            Some(info)
        };
        let mut infos = self.process.infos.clone();
        infos.extend(ALIASES.iter().filter_map(alias));
        infos
    }

    fn last_step_age(&self, now: Instant) -> f64 {
        match self.process.last_step.load(Ordering::Relaxed) {
            0 => 0.0,
            micros => {
                let age = now
                    .saturating_duration_since(self.process.started)
                    .as_secs_f64();
                (age - (micros - 1) as f64 * 1e-6).max(0.0)
            }
        }
    }

    fn alias(&self, name: &str, mut family: MetricFamily) -> MetricFamily {
        family.set_name(name.to_owned());
        for metric in family.mut_metric() {
            let mut model = LabelPair::default();
            model.set_name("model_name".to_owned());
            model.set_value(self.process.model_name.clone());
            let mut labels = metric.take_label();
            labels.push(model);
            metric.set_label(labels);
        }
        family
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::time::Duration;

    use super::*;

    /// Units that a name may end in, before `_total`.
    const UNITS: [&str; 3] = ["_seconds", "_bytes", "_ratio"];

    #[test]
    fn names_follow_the_conventions() {
        let metrics = Metrics::new("m");
        for info in metrics.infos() {
            let ours = info.name.starts_with("midpo_");
            assert!(ours || info.name.starts_with("vllm:"), "{}", info.name);
            assert!(!info.help.is_empty() && info.help.ends_with('.'));
            if ours {
                let total = info.name.ends_with("_total");
                assert_eq!(total, info.kind == MetricKind::Counter, "{}", info.name);
                let base = info.name.trim_end_matches("_total");
                let timed = ["duration", "time", "latency", "age"]
                    .iter()
                    .any(|word| base.split('_').any(|part| part == *word));
                assert!(!timed || UNITS.iter().any(|unit| base.ends_with(unit)));
            }
        }
    }

    #[test]
    fn aliases_equal_their_originals() {
        let metrics = Metrics::new("model \"a\"");
        metrics.sequences_running.set(3);
        metrics.kv_cache_usage.set(0.25);
        metrics.generated_tokens.of(Variant::Safety).add(7);
        metrics.time_to_first_token.observe(0.002);
        let text = metrics.render();
        for (alias, original) in ALIASES {
            check_alias(&text, alias, original);
        }
        assert!(text.contains(r#"vllm:num_requests_running{model_name="model \"a\""} 3"#));
    }

    /// The samples of both, without the label that only aliases have.
    fn check_alias(text: &str, alias: &str, original: &str) {
        let samples = |name: &str| -> Vec<String> {
            text.lines()
                .filter_map(|line| line.strip_prefix(name))
                .filter(|rest| rest.starts_with(['{', ' ', '_']))
                .map(|rest| {
                    rest.replace(r#",model_name="model \"a\"""#, "")
                        .replace(r#"model_name="model \"a\"","#, "")
                        .replace(r#"{model_name="model \"a\""}"#, "")
                })
                .collect()
        };
        let expected = samples(original);
        assert!(!expected.is_empty(), "{original}");
        assert_eq!(samples(alias), expected, "{alias}");
    }

    #[test]
    fn every_listed_metric_is_rendered() {
        let metrics = Metrics::new("m");
        metrics.set_kv_blocks(8);
        let text = metrics.render();
        for info in metrics.infos() {
            let kind = format!("# TYPE {} {}\n", info.name, info.kind.as_str());
            assert!(text.contains(&kind), "{kind}");
        }
        assert!(text.contains(r#"vllm:cache_config_info{block_size="16",num_gpu_blocks="8"} 1"#));
    }

    #[test]
    fn latencies_below_ten_milliseconds_are_told_apart() {
        assert!(
            LATENCY_SECONDS
                .iter()
                .filter(|bound| **bound < 0.01)
                .count()
                >= 3
        );
    }

    #[test]
    fn status_of_an_unlisted_code_is_other() {
        for (code, want) in [(200, "200"), (429, "429"), (418, "other"), (0, "other")] {
            assert_eq!(Status::of(code).as_str(), want);
        }
    }

    #[test]
    fn last_step_age_counts_from_the_last_step() {
        let metrics = Metrics::new("m");
        let later = metrics.process.started + Duration::from_secs(5);
        assert_eq!(metrics.last_step_age(later), 0.0);
        metrics.set_last_step(metrics.process.started + Duration::from_secs(2));
        assert!((metrics.last_step_age(later) - 3.0).abs() < 1e-5);
    }

    #[test]
    fn held_gauges_fall_when_the_guard_is_dropped() {
        let metrics = Metrics::new("m");
        let guard = metrics.http_requests_in_flight.hold();
        assert_eq!(metrics.http_requests_in_flight.get(), 1);
        drop(guard);
        assert_eq!(metrics.http_requests_in_flight.get(), 0);
    }
}
