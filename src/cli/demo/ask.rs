//! Answers to held-out prompts from an engine in this process: many at once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::{CliError, engine};
use crate::config::{
    Device, KvBudget, KvDType, ModelSource, RuntimeConfig, Speculation, WeightDType,
};
use crate::engine::{EngineHandle, EngineThread, Event, EventStream, GateDetail, Submission};
use crate::metrics::Metrics;
use crate::server::ServedModel;
use crate::text::{Chat, Message, TextStream, TextStreamOptions};
use crate::types::{FinishReason, SamplingParams, Variant};

/// Requests in the engine at once.
const WINDOW: usize = 256;
const SEQUENCES_MAX: usize = 64;
const BATCH_TOKENS_MAX: usize = 512;

/// How answers are drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drawing {
    pub(super) variant: Variant,
    pub(super) temperature: f32,
    pub(super) max_tokens: u32,
    pub(super) seed: u64,
}

/// An answer that has ended.
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) finish: FinishReason,
    /// (alpha, beta) at the last prompt token, means over layers; `None` without experts.
    pub(super) gates: Option<(f32, f32)>,
}

/// A model and its engine.
pub(super) struct Answerer {
    handle: EngineHandle,
    thread: EngineThread,
    model: ServedModel,
}

impl Answerer {
    pub(super) fn start(source: &ModelSource, threads: Option<usize>) -> Result<Self, CliError> {
        let runtime = RuntimeConfig {
            dtype: WeightDType::Auto,
            kv_dtype: KvDType::Bf16,
            device: Device::Cpu,
            threads: threads.filter(|threads| *threads > 0),
            context_tokens_max: None,
            kv_budget: KvBudget::Auto,
            gpu_memory_utilization: 1.0,
            deterministic: false,
            cuda_graphs: false,
            batch_tokens_max: Some(BATCH_TOKENS_MAX),
            // Nobody watches these streams.
            step_time_max: Duration::MAX,
            sequences_max: SEQUENCES_MAX,
            queue_max: WINDOW,
            prefix_cache: true,
            // Many answers at once fill a step without guesses.
            speculation: Speculation::OFF,
        };
        let metrics = Arc::new(Metrics::new("demo"));
        let running = engine::start(source, &runtime, metrics)?;
        Ok(Self {
            handle: running.handle,
            thread: running.thread,
            model: running.model,
        })
    }

    /// One answer a prompt, in their order.
    pub(super) fn answers<'a>(
        &self,
        prompts: impl Iterator<Item = &'a str>,
        drawing: &Drawing,
    ) -> Result<Vec<Answer>, CliError> {
        let mut open = VecDeque::new();
        let mut answers = Vec::new();
        for prompt in prompts {
            if open.len() == WINDOW {
                answers.extend(self.next(&mut open)?);
            }
            let submission = self.submission(prompt, drawing)?;
            let submitted = self.handle.submit(submission);
            open.push_back(submitted.map_err(|error| failed(&error))?);
        }
        while let Some(answer) = self.next(&mut open)? {
            answers.push(answer);
        }
        Ok(answers)
    }

    /// Waits for the engine's end.
    pub(super) fn stop(self) {
        self.handle.drain();
        drop(self.handle);
        self.thread.join();
    }

    fn submission(&self, prompt: &str, drawing: &Drawing) -> Result<Submission, CliError> {
        let chat = Chat {
            messages: vec![Message {
                role: "user".to_owned(),
                content: prompt.to_owned(),
                ..Message::default()
            }],
            add_generation_prompt: true,
            ..Chat::default()
        };
        let prompt = self.model.template.encode(&self.model.tokenizer, &chat)?;
        Ok(Submission {
            prompt,
            sampling: SamplingParams {
                temperature: drawing.temperature,
                seed: drawing.seed,
                max_tokens: drawing.max_tokens,
                ..SamplingParams::default()
            },
            choices: 1,
            variant: drawing.variant,
            gates: drawing.variant.gates(),
            cache_salt: None,
            prompt_logprobs: None,
            gate_detail: GateDetail::Mean,
            prompt_gates: false,
        })
    }

    fn next(&self, open: &mut VecDeque<EventStream>) -> Result<Option<Answer>, CliError> {
        let Some(mut events) = open.pop_front() else {
            return Ok(None);
        };
        let mut stream = TextStream::new(&self.model.tokenizer, &TextStreamOptions::default());
        let mut text = String::new();
        let mut gates = None;
        let finish = loop {
            match events.next_blocking().ok_or(CliError::EngineDead)? {
                Event::Prompt { .. } => {}
                Event::Token { token, .. } => {
                    if !self.model.ends.contains(&token.id) {
                        text.push_str(&stream.push(token.id).text);
                    }
                    // The first token's gates are those of the last prompt token.
                    gates = gates.or_else(|| {
                        let gates = token.gates?;
                        Some((*gates.safety.first()?, *gates.helpfulness.first()?))
                    });
                }
                Event::Finished { reason, .. } => break reason,
                Event::Failed { message, .. } => return Err(failed(&message)),
            }
        };
        text.push_str(&stream.finish().text);
        Ok(Some(Answer {
            text,
            finish,
            gates,
        }))
    }
}

fn failed(reason: &impl ToString) -> CliError {
    CliError::io("an answer")(std::io::Error::other(reason.to_string()))
}
