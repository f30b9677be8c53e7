//! The same streams through the model alone, through the engine, and over HTTP, turn by turn: what scheduling, sampling, JSON and
//! server-sent events cost (`midpo bench --engine --with-server`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use indicatif::ProgressBar;
use serde_json::Map;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::steps::{Group, Steps};
use crate::backend::{Backend, BackendError, KvFormat, WeightFormat};
use crate::bench::{
    self, BenchError, Endpoint, Job, Level, Load, PromptSource, RequestShape, ServerRow, Spread,
    Target, ratios,
};
use crate::checkpoint::Checkpoint;
use crate::cli::CliError;
use crate::config::{EngineConfig, Policy, RequestLimits, ServerConfig, Speculation};
use crate::engine::{Engine, EngineHandle, Event, GateDetail, Submission, model_options};
use crate::metrics::Metrics;
use crate::model::RoutedLlama;
use crate::random::SplitMix64;
use crate::server::{self, AppState, ServedModel};
use crate::types::{BLOCK_TOKENS, SamplingParams, TokenId, Variant};

/// Name of the model on the server.
const NAME: &str = "bench";
/// Room for what a chat template adds to a prompt.
const TEMPLATE_TOKENS: usize = 160;
/// Longest that one request may take.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Longest that the server may take to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The streams.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    /// How many at once; one row each.
    pub counts: Vec<usize>,
    /// Of each stream, before the chat template.
    pub prompt_tokens: usize,
    /// Of each stream.
    pub output_tokens: usize,
    /// Turns of each row.
    pub repeats: usize,
    /// Most tokens of a step.
    pub step_rows: usize,
    /// Of prompts.
    pub seed: u64,
    /// How both models keep their weights.
    pub weight_format: WeightFormat,
}

impl Streams {
    /// The same, with prompts and answers that fit a context.
    pub(super) fn within(mut self, context: usize) -> Self {
        self.output_tokens = self.output_tokens.min(context / 4).max(2);
        let template = TEMPLATE_TOKENS.min(context / 4);
        let room = context.saturating_sub(self.output_tokens + template);
        self.prompt_tokens = self.prompt_tokens.min(room).max(1);
        self
    }

    fn positions(&self, context: usize) -> usize {
        context.min(self.prompt_tokens + self.output_tokens + TEMPLATE_TOKENS)
    }

    fn config(&self, context: usize) -> EngineConfig {
        let sequences_max = self.counts.iter().copied().max().unwrap_or(1);
        let positions = self.positions(context);
        EngineConfig {
            batch_tokens_max: self.step_rows.max(sequences_max),
            // As the model alone: whole prompts.
            step_time_max: Duration::MAX,
            sequences_max,
            queue_max: sequences_max.max(64),
            context_tokens_max: positions,
            kv_blocks: sequences_max * positions.div_ceil(BLOCK_TOKENS),
            // A cached prompt would leave out the prefill that the model alone does.
            prefix_cache: false,
            // Guesses that come true would leave out forward passes.
            speculation: Speculation::OFF,
        }
    }
}

/// Runs the rows. `backend` makes two: one for the model alone, one for the engine behind the server.
pub(super) fn compare<B: Backend>(
    checkpoint: &Checkpoint,
    served: ServedModel,
    backend: impl Fn() -> Result<B, BackendError>,
    streams: &Streams,
    progress: &ProgressBar,
) -> Result<Vec<ServerRow>, CliError> {
    let config = streams.config(checkpoint.config.max_position_embeddings);
    let options = model_options(&config, KvFormat::BF16, streams.weight_format);
    let bare = RoutedLlama::new(backend()?, checkpoint, options)?;
    let bare = Steps::new(bare, config.batch_tokens_max, streams.seed);
    let model = RoutedLlama::new(backend()?, checkpoint, options)?;
    let variant = if model.is_routed() {
        Variant::Routed
    } else {
        Variant::Base
    };
    let metrics = Arc::new(Metrics::new(NAME));
    let spawned = Engine::spawn(model, &config, Arc::clone(&metrics));
    let (handle, thread) = spawned.map_err(CliError::io("the server's start"))?;
    let state = AppState::new(handle.clone(), served, server_config(), metrics);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("the server's start"))?;
    let rows = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.map_err(CliError::io("the server's start"))?;
        let address = listener
            .local_addr()
            .map_err(CliError::io("the server's start"))?;
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            let _ = stopped.await;
        };
        let server = tokio::spawn(server::serve(listener, state, stopped, DRAIN_TIMEOUT));
        let url = format!("http://{address}");
        let mut turns = Turns {
            bare,
            target: Target::new(&url, NAME, None, Endpoint::Chat, TIMEOUT)?,
            handle,
            shape: shape(streams),
            variant,
            prompt_tokens: streams.prompt_tokens,
            streams,
        };
        let rows = turns.rows(progress).await;
        let _ = stop.send(());
        let _ = server.await;
        rows
    });
    thread.join();
    rows
}

fn shape(streams: &Streams) -> RequestShape {
    RequestShape {
        max_tokens: u32::try_from(streams.output_tokens).unwrap_or(u32::MAX),
        temperature: 0.0,
        ignore_eos: true,
        extra: Map::new(),
    }
}

fn server_config() -> ServerConfig {
    ServerConfig {
        served_model_name: NAME.to_owned(),
        api_keys: Vec::new(),
        open_policy: Policy::open(),
        body_bytes_max: 4 << 20,
        request_timeout: TIMEOUT,
        keep_alive: Duration::from_secs(15),
        cors_origins: Vec::new(),
        log_content: false,
        limits: RequestLimits {
            choices_max: 1,
            stop_strings_max: 1,
            stop_bytes_max: 64,
            logit_bias_max: 1,
            prompts_max: 1,
        },
        default_max_tokens: None,
    }
}

/// The three ways, and what goes through them.
struct Turns<'a, B: Backend> {
    bare: Steps<B>,
    target: Target,
    handle: EngineHandle,
    shape: RequestShape,
    variant: Variant,
    /// With the chat template, as the server counts them.
    prompt_tokens: usize,
    streams: &'a Streams,
}

impl<B: Backend> Turns<'_, B> {
    async fn rows(&mut self, progress: &ProgressBar) -> Result<Vec<ServerRow>, CliError> {
        let counts = self.streams.counts.clone();
        // One turn of each row is not counted; all prompts are different.
        let total: usize = counts.iter().map(|n| n * (self.streams.repeats + 1)).sum();
        let source = PromptSource::Words {
            tokens: self.streams.prompt_tokens,
            seed: self.streams.seed,
        };
        let prompts = bench::prepare(&source, &self.target, total + 1).await?;
        let (first, mut rest) = prompts.split_at(1);
        let asked = self.server(first, 1).await?;
        self.prompt_tokens = usize::try_from(asked.prompt_tokens).unwrap_or(usize::MAX);
        let mut rows = Vec::with_capacity(counts.len());
        for count in counts {
            progress.set_message(format!("model, engine and server, {count} streams"));
            let (mut turns, mut gap) = (Vec::new(), 0.0f64);
            for turn in 0..=self.streams.repeats {
                let (now, behind) = rest.split_at(count);
                rest = behind;
                let model = self.model(count)?;
                let engine = self.engine(count).await?;
                let level = self.server(now, count).await?;
                if turn > 0 {
                    gap = gap.max(level.worst_gap_ms);
                    turns.push((model, engine, level.output_tokens_per_second));
                }
            }
            rows.push(self.row(count, &turns, gap));
        }
        Ok(rows)
    }

    fn row(&self, streams: usize, turns: &[(f64, f64, f64)], worst_gap_ms: f64) -> ServerRow {
        let over = |below: fn(&(f64, f64, f64)) -> f64| {
            let pairs: Vec<_> = turns.iter().map(|turn| (turn.2, below(turn))).collect();
            ratios(&pairs)
        };
        ServerRow {
            streams,
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.streams.output_tokens,
            model: Spread::of(turns.iter().map(|turn| turn.0)),
            engine: Spread::of(turns.iter().map(|turn| turn.1)),
            server: Spread::of(turns.iter().map(|turn| turn.2)),
            server_over_model: over(|turn| turn.0),
            server_over_engine: over(|turn| turn.1),
            worst_gap_ms,
        }
    }

    /// Output tokens a second of forward passes alone. The last token needs none: it is sampled from the pass before.
    fn model(&mut self, count: usize) -> Result<f64, CliError> {
        let (prompt, output) = (self.prompt_tokens, self.streams.output_tokens);
        let group = Group {
            gates: vec![self.variant.gates(); count],
            positions: prompt + output,
        };
        let prefill = self.bare.prefill(&group, 0..prompt)?;
        let decode = self.bare.decode(&group, prompt, output.saturating_sub(1))?;
        Ok(rate(count * output, prefill + decode))
    }

    /// Output tokens a second through the engine's handle, all streams submitted at once.
    async fn engine(&self, count: usize) -> Result<f64, CliError> {
        let begun = Instant::now();
        let streams = (0..count as u64).map(|stream| self.answer(stream));
        let answers = join_all(streams).await;
        let tokens = answers.into_iter().sum::<Result<usize, CliError>>()?;
        Ok(rate(tokens, begun.elapsed()))
    }

    async fn answer(&self, stream: u64) -> Result<usize, CliError> {
        let mut random = SplitMix64::new(self.streams.seed, stream);
        let vocabulary = self.handle.limits().vocabulary;
        let token = |_| TokenId(random.below(vocabulary) as u32);
        let submission = Submission {
            prompt: (0..self.prompt_tokens).map(token).collect(),
            sampling: SamplingParams {
                temperature: 0.0,
                max_tokens: self.shape.max_tokens,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            choices: 1,
            variant: self.variant,
            gates: self.variant.gates(),
            cache_salt: None,
            prompt_logprobs: None,
            gate_detail: GateDetail::None,
            prompt_gates: false,
        };
        let mut events = self
            .handle
            .submit(submission)
            .map_err(|e| failed(e.to_string()))?;
        let mut tokens = 0;
        while let Some(event) = events.next().await {
            match event {
                Event::Token { .. } => tokens += 1,
                Event::Failed { message, .. } => return Err(failed(message)),
                Event::Prompt { .. } | Event::Finished { .. } => {}
            }
        }
        Ok(tokens)
    }

    /// Over HTTP: one request a prompt, all at once.
    async fn server(&self, prompts: &[String], count: usize) -> Result<Level, CliError> {
        let job = Job {
            prompts,
            shape: &self.shape,
            variants: &[],
            seed: self.streams.seed,
        };
        let load = Load::Concurrency(count);
        let run = bench::run(&self.target, job, load, &ProgressBar::hidden()).await;
        let level = Level::of(&run);
        match level.errors.values().next() {
            None => Ok(level),
            Some(error) => Err(failed(error.example.clone())),
        }
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

fn failed(reason: String) -> CliError {
    CliError::Bench(BenchError::Server {
        url: "engine and server in this process".to_owned(),
        what: "the streams",
        reason,
    })
}
