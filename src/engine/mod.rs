//! The engine: one thread that owns model, blocks and sequences.
//!
//! Ids in, ids out: no text, no HTTP. It never waits for a client, and it ends in one of two ways: [`EngineState::Stopped`] as
//! asked, or [`EngineState::Dead`], after telling every open request.

mod batch;
mod draft;
mod error;
mod handle;
mod pace;
pub mod pool;
pub mod prefix;
mod request;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
mod sessions;
mod thread;

pub use error::SubmitError;
pub use handle::{
    EngineHandle, EngineHealth, EngineLimits, EngineState, Event, EventStream, GateDetail,
    GeneratedToken, PromptGates, Submission, TokenGates, TokenLogprobs,
};
pub use thread::EngineThread;

use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Backend, BackendError, KvFormat, StepLayout, WeightFormat};
use crate::config::EngineConfig;
use crate::metrics::Metrics;
use crate::model::{ModelOptions, RoutedLlama};
use handle::{EngineInbox, Received};
use sessions::Sessions;

/// Steps that may fail in a row before the device is given up.
const STEP_FAILURES_MAX: u32 = 3;

/// Rows with logits that a step has at least, so that log-probabilities of prompts come in chunks of some size.
const LOGIT_ROWS_MIN: usize = 64;

/// How a model must be laid out to serve `config`.
pub fn model_options(
    config: &EngineConfig,
    kv_format: KvFormat,
    weight_format: WeightFormat,
) -> ModelOptions {
    ModelOptions {
        rows: config.batch_tokens_max,
        logit_rows: config.sequences_max.max(LOGIT_ROWS_MIN),
        sequences: config.sequences_max,
        positions: config.context_tokens_max,
        kv_blocks: config.kv_blocks,
        kv_format,
        weight_format,
    }
}

/// Model, blocks and sequences, and the step that moves them on.
pub struct Engine<B: Backend> {
    model: RoutedLlama<B>,
    sessions: Sessions,
    inbox: EngineInbox,
    /// No request can come any more.
    closed: bool,
    failures: u32,
    metrics: Arc<Metrics>,
}

impl<B: Backend> Engine<B> {
    /// An engine that nobody runs yet, and the first handle to it.
    pub fn new(
        model: RoutedLlama<B>,
        config: &EngineConfig,
        metrics: Arc<Metrics>,
    ) -> (EngineHandle, Self) {
        let limits = EngineLimits {
            context_tokens_max: config.context_tokens_max.min(model.positions()),
            vocabulary: model.vocabulary(),
            routed: model.is_routed(),
            layers: model.layers(),
            queue_max: config.queue_max.max(1),
            kv_blocks: model.kv_shape().blocks,
        };
        metrics.set_kv_blocks(limits.kv_blocks);
        let (handle, inbox) = EngineHandle::new(limits, Arc::clone(&metrics));
        let engine = Self {
            sessions: Sessions::new(&model, config, Arc::clone(&metrics)),
            model,
            inbox,
            closed: false,
            failures: 0,
            metrics,
        };
        (handle, engine)
    }

    /// Runs until the engine is asked to stop and has nothing left to do.
    fn serve(&mut self) -> Result<(), BackendError> {
        loop {
            if self.sessions.is_idle() {
                self.inbox.set_busy(false);
                match self.inbox.wait() {
                    Received::Submit(admission) => self.sessions.admit(*admission),
                    Received::Nothing => {}
                    Received::Closed => return Ok(()),
                }
                self.inbox.set_busy(true);
            }
            self.step()?;
        }
    }

    /// One step: takes in new requests and lost clients, computes one batch, tells everyone. Does not wait; does nothing where
    /// there is nothing to do.
    ///
    /// # Errors
    /// When the device has failed so often in a row that it is given up. A single failure ends the requests of its step with
    /// an error, and the engine goes on.
    pub fn step(&mut self) -> Result<(), BackendError> {
        let started = Instant::now();
        self.receive();
        self.sessions.drop_ended(started);
        let result = if self.sessions.plan(started) {
            self.compute(started)
        } else {
            Ok(())
        };
        self.sessions.publish_levels();
        self.inbox.progress();
        result
    }

    fn receive(&mut self) {
        while !self.closed {
            match self.inbox.poll() {
                Received::Submit(admission) => self.sessions.admit(*admission),
                Received::Nothing => return,
                Received::Closed => self.closed = true,
            }
        }
    }

    fn compute(&mut self, started: Instant) -> Result<(), BackendError> {
        if self.model.samples() {
            self.sessions.describe_samples();
        }
        let (sequences, batch) = self.sessions.batch();
        let layout = StepLayout {
            tokens: &batch.tokens,
            sequences: &sequences,
            logit_rows: &batch.logit_rows,
        };
        let (rows, count) = (layout.tokens.len(), layout.sequences.len());
        let submitted = self.model.submit(&layout, batch.samples());
        let room = batch::emptied(sequences);
        self.sessions.keep_room(room);
        // While a device works by itself.
        self.receive();
        let computed = submitted.and_then(|submitted| {
            let (rows, sampled) = self.sessions.samples();
            self.model.collect(submitted, rows, sampled)
        });
        let now = Instant::now();
        match computed {
            Ok(output) => {
                self.failures = 0;
                self.sessions.commit(output, now);
            }
            Err(error) => {
                self.metrics.step_failures.increment();
                tracing::error!(%error, rows, sequences = count, "a step failed");
                self.sessions.fail_planned(now);
                self.failures += 1;
                if self.failures >= STEP_FAILURES_MAX {
                    return Err(error);
                }
            }
        }
        let done = Instant::now();
        let metrics = &self.metrics;
        metrics.set_last_step(done);
        let lasted = done.saturating_duration_since(started);
        self.sessions.observe_step(lasted);
        metrics.step_duration.observe(lasted.as_secs_f64());
        metrics.step_tokens.observe(rows as f64);
        metrics.step_sequences.observe(count as f64);
        Ok(())
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.sessions.is_idle()
    }

    /// Sequences and blocks, to look at.
    pub fn scheduler(&self) -> &scheduler::Scheduler {
        self.sessions.scheduler()
    }
}
