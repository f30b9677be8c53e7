//! `midpo bench`: load on a running server, or, with `--engine`, the bare engine on this machine.

mod engine;
mod machine;
mod model;
mod plan;
mod server;
mod steps;
mod subject;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use self::plan::EngineArgs;
use self::server::Streams;
use super::CliError;
use super::engine::weight_format;
use crate::bench::{
    self, BenchError, Conditions, Endpoint, Job, Level, Load, LoadReport, PromptSource,
    RequestShape, Target,
};
use crate::types::Variant;

/// Concurrent streams at most.
const CONCURRENCY_MAX: usize = 4096;
/// Requests of one level at most.
const REQUESTS_MAX: usize = 1_000_000;
/// Requests of a level for each concurrent stream, where `--requests` does not say.
const ROUNDS: usize = 4;
/// Requests of a level of an open loop, where `--requests` does not say.
const OPEN_REQUESTS: usize = 64;
/// Answer tokens of a warm-up request at most.
const WARMUP_TOKENS: u32 = 8;

/// Measures a server, any that speaks OpenAI's API, under load; with --engine, the bare engine on this machine.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Server to measure.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Name of the model on the server; by default the first that it lists. With --engine: a directory or a GGUF file, by
    /// default the embedded demo.
    #[arg(long, value_name = "NAME|DIR|FILE.gguf")]
    model: Option<String>,
    /// Key to present.
    #[arg(
        long,
        env = "MIDPO_BENCH_API_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
    /// Route to measure.
    #[arg(long, value_enum, default_value = "chat", value_name = "ROUTE")]
    endpoint: EndpointName,
    /// Closed loop: so many clients, each sending again when its answer is complete. One level each.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,8,16,32",
        value_name = "N,.."
    )]
    concurrency: Vec<usize>,
    /// Open loop instead: so many requests a second, arriving as a Poisson process. One level each.
    #[arg(long, value_delimiter = ',', value_name = "R,..")]
    rate: Vec<f64>,
    /// Requests of a level; by default 4 for each concurrent stream, 64 in an open loop.
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Requests before each level that are not counted.
    #[arg(long, default_value_t = 2, value_name = "N")]
    warmup: usize,
    /// Length of the prompts, of random words, in tokens by the server's /tokenize; in words where it has none.
    #[arg(long, default_value_t = 98, value_name = "TOKENS")]
    prompt_tokens: usize,
    /// Prompts from a file instead: one JSON object with `prompt`, or one plain text, a line.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Answer tokens wanted.
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    max_tokens: u32,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Do not send `ignore_eos`: for servers that refuse it. Answers then differ in length.
    #[arg(long)]
    respect_eos: bool,
    /// Variants to ask a midpo server for, in turn: routed, base, safety, helpfulness, both.
    #[arg(long, value_delimiter = ',', value_parser = parse_variant, value_name = "VARIANT,..")]
    variant: Vec<Variant>,
    /// Fields for the body of every request, as a JSON object: {"cache_prompt": false}.
    #[arg(long, value_parser = parse_extra, value_name = "JSON")]
    extra: Option<Map<String, Value>>,
    /// Of prompts, arrivals, and the engine's random tokens.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Longest that a request may take, in seconds.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// Write the report as JSON, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw throughput and latency against the load, as SVG.
    #[arg(long, value_name = "FILE", conflicts_with = "engine")]
    svg: Option<PathBuf>,
    /// The bare engine's flags.
    #[command(flatten)]
    engine: EngineArgs,
}

/// Route to measure.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum EndpointName {
    Chat,
    Completions,
}

impl From<EndpointName> for Endpoint {
    fn from(name: EndpointName) -> Self {
        match name {
            EndpointName::Chat => Self::Chat,
            EndpointName::Completions => Self::Completions,
        }
    }
}

/// Runs the bench and prints its report, as Markdown, on standard output.
///
/// # Errors
/// A flag that makes no sense, a server that cannot be reached before the load starts, a file that cannot be read or written.
pub(super) fn run(args: &BenchArgs) -> Result<(), CliError> {
    let (markdown, json, svg) = if args.engine.engine {
        let report = engine::run(args.model.as_deref(), &streams(args), &args.engine)?;
        (report.to_markdown(), report.to_json(), None)
    } else {
        // One thread: the client should take as little as it can of a machine that it may share with the server.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(CliError::io("the client's runtime"))?;
        let report = runtime.block_on(load(args))?;
        let svg = args
            .svg
            .as_ref()
            .map(|file| (file, bench::sweep_svg(&report)));
        (report.to_markdown(), report.to_json(), svg)
    };
    let mut stdout = std::io::stdout().lock();
    let said = write!(stdout, "{markdown}").and_then(|()| stdout.flush());
    said.map_err(CliError::io("standard output"))?;
    let json = args.json.as_ref().map(|file| (file, json));
    for (file, text) in [json, svg].into_iter().flatten() {
        write(file, &text)?;
    }
    Ok(())
}

/// What `--with-server` sends: the flags of the load, on this process.
fn streams(args: &BenchArgs) -> Streams {
    Streams {
        counts: args.concurrency.clone(),
        prompt_tokens: args.prompt_tokens,
        output_tokens: args.max_tokens as usize,
        repeats: args.engine.repeats,
        step_rows: args.engine.step_rows,
        seed: args.seed,
        weight_format: weight_format(args.engine.dtype),
    }
}

async fn load(args: &BenchArgs) -> Result<LoadReport, BenchError> {
    let loads = loads(args)?;
    let target = target(args).await?;
    let source = match &args.prompts {
        Some(file) => PromptSource::File(file.clone()),
        None => PromptSource::Words {
            tokens: args.prompt_tokens,
            seed: args.seed,
        },
    };
    let counts: Vec<usize> = loads.iter().map(|load| requests(args, *load)).collect();
    let total = counts.iter().map(|count| count + args.warmup).sum();
    let progress = bar("prompts");
    // All prompts are different, also between levels: what one level left in a cache helps no other.
    let prompts = bench::prepare(&source, &target, total).await?;
    progress.set_length(total as u64);
    let shape = shape(args);
    let (mut levels, mut rest) = (Vec::with_capacity(loads.len()), prompts.as_slice());
    for (load, count) in loads.into_iter().zip(counts) {
        let (warmup, behind) = rest.split_at(args.warmup.min(rest.len()));
        let (measured, behind) = behind.split_at(count.min(behind.len()));
        rest = behind;
        let job = |prompts, shape| Job {
            prompts,
            shape,
            variants: &args.variant,
            seed: args.seed,
        };
        progress.set_message("warm-up");
        let short = RequestShape {
            max_tokens: shape.max_tokens.min(WARMUP_TOKENS),
            ..shape.clone()
        };
        let few = Load::Concurrency(args.warmup.max(1));
        bench::run(&target, job(warmup, &short), few, &progress).await;
        progress.set_message(format!("{load:?}"));
        let run = bench::run(&target, job(measured, &shape), load, &progress).await;
        levels.push(Level::of(&run));
    }
    progress.finish_and_clear();
    Ok(LoadReport {
        version: env!("CARGO_PKG_VERSION"),
        url: target.url().to_owned(),
        model: target.model().to_owned(),
        conditions: Conditions {
            endpoint: target.endpoint(),
            prompts: describe(&source),
            seed: args.seed,
            variants: args.variant.iter().map(|v| v.as_str()).collect(),
            warmup_requests: args.warmup,
            shape,
        },
        levels,
    })
}

async fn target(args: &BenchArgs) -> Result<Target, BenchError> {
    let target = Target::new(
        &args.url,
        args.model.as_deref().unwrap_or_default(),
        args.api_key.clone(),
        args.endpoint.into(),
        Duration::from_secs(args.timeout),
    )?;
    match args.model {
        Some(_) => Ok(target),
        None => target.with_first_model().await,
    }
}

fn shape(args: &BenchArgs) -> RequestShape {
    RequestShape {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        ignore_eos: !args.respect_eos,
        extra: args.extra.clone().unwrap_or_default(),
    }
}

fn describe(source: &PromptSource) -> String {
    match source {
        PromptSource::Words { tokens, .. } => format!("prompts of {tokens} tokens"),
        PromptSource::File(file) => {
            let name = file.file_name().unwrap_or_default();
            format!("prompts of {}", name.to_string_lossy())
        }
    }
}

/// The levels, checked: rates where there are any, else concurrencies.
fn loads(args: &BenchArgs) -> Result<Vec<Load>, BenchError> {
    let flag = |flag, expected: String, found: String| BenchError::Flag {
        flag,
        expected,
        found,
    };
    let in_range = |count: &usize| (1..=REQUESTS_MAX).contains(count);
    if let Some(requests) = args.requests.filter(|requests| !in_range(requests)) {
        let expected = format!("1 to {REQUESTS_MAX}");
        return Err(flag("--requests", expected, requests.to_string()));
    }
    if let Some(rate) = args
        .rate
        .iter()
        .find(|rate| !(rate.is_finite() && **rate > 0.0))
    {
        return Err(flag(
            "--rate",
            "a number above 0".to_owned(),
            rate.to_string(),
        ));
    }
    let legal = |clients: &usize| (1..=CONCURRENCY_MAX).contains(clients);
    if let Some(clients) = args.concurrency.iter().find(|clients| !legal(clients)) {
        let expected = format!("1 to {CONCURRENCY_MAX}");
        return Err(flag("--concurrency", expected, clients.to_string()));
    }
    Ok(if args.rate.is_empty() {
        args.concurrency
            .iter()
            .copied()
            .map(Load::Concurrency)
            .collect()
    } else {
        args.rate.iter().copied().map(Load::Rate).collect()
    })
}

fn requests(args: &BenchArgs, load: Load) -> usize {
    args.requests.unwrap_or(match load {
        Load::Concurrency(clients) => clients * ROUNDS,
        Load::Rate(_) => OPEN_REQUESTS,
    })
}

/// A bar of unknown length, on standard error; nothing where that is no terminal.
pub(super) fn bar(message: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_message(message);
    if let Ok(style) = ProgressStyle::with_template("{elapsed} [{bar:30}] {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar
}

fn write(file: &Path, text: &str) -> Result<(), BenchError> {
    fs::write(file, text).map_err(|source| BenchError::File {
        file: file.to_owned(),
        source,
    })
}

pub(super) fn parse_variant(word: &str) -> Result<Variant, String> {
    let names = || Variant::ALL.map(Variant::as_str).join(", ");
    Variant::parse(word).ok_or_else(|| format!("expected one of {}", names()))
}

fn parse_extra(text: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err("expected a JSON object".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    fn parse(flags: &[&str]) -> Result<BenchArgs, String> {
        let command = BenchArgs::augment_args(clap::Command::new("bench"));
        let words = ["bench"].iter().chain(flags);
        let matches = command
            .try_get_matches_from(words)
            .map_err(|e| e.to_string())?;
        BenchArgs::from_arg_matches(&matches).map_err(|e| e.to_string())
    }

    #[test]
    fn loads_are_a_sweep_unless_rates_are_given() {
        let sweep = parse(&[]).unwrap();
        let want = [1, 8, 16, 32].map(Load::Concurrency);
        assert_eq!(loads(&sweep).unwrap(), want);
        assert_eq!(requests(&sweep, want[3]), 128);
        let open = parse(&["--rate", "0.5,2", "--requests", "7"]).unwrap();
        assert_eq!(loads(&open).unwrap(), [0.5, 2.0].map(Load::Rate));
        assert_eq!(requests(&open, Load::Rate(2.0)), 7);
    }

    #[test]
    fn flags_out_of_range_name_themselves() {
        for (flag, value) in [
            ("--concurrency", "0"),
            ("--concurrency", "5000"),
            ("--rate", "0"),
            ("--rate", "inf"),
            ("--requests", "0"),
        ] {
            let error = loads(&parse(&[flag, value]).unwrap()).unwrap_err();
            let start = format!("{flag}: expected ");
            assert!(error.to_string().starts_with(&start), "{error}");
        }
        assert!(
            parse(&["--variant", "unsafe"])
                .unwrap_err()
                .contains("helpfulness")
        );
        assert!(
            parse(&["--extra", "[1]"])
                .unwrap_err()
                .contains("JSON object")
        );
        let mixed = parse(&["--variant", "routed,base"]).unwrap();
        assert_eq!(mixed.variant, [Variant::Routed, Variant::Base]);
    }
}
