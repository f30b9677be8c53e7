//! Answers from an engine in this process.

use std::sync::Arc;

use super::{Answer, Turn, TurnError};
use crate::cli::{CliError, engine};
use crate::config::{ChatOptions, DEMO_NAME};
use crate::engine::{EngineHandle, Event, GateDetail, Submission, TokenGates};
use crate::metrics::Metrics;
use crate::openai::{GateStatistics, GateSummary};
use crate::server::ServedModel;
use crate::text::{Chat, TextStream, TextStreamOptions};
use crate::types::{FinishReason, SamplingParams, Variant};

/// A model and its engine.
pub(super) struct Embedded {
    engine: EngineHandle,
    model: ServedModel,
}

impl Embedded {
    pub(super) fn start(options: &ChatOptions) -> Result<Self, CliError> {
        let source = options.model.validate()?;
        let runtime = options.engine.validate()?;
        let metrics = Arc::new(Metrics::new(DEMO_NAME));
        let running = engine::start(&source, &runtime, metrics)?;
        Ok(Self {
            engine: running.handle,
            model: running.model,
        })
    }

    pub(super) async fn answer(
        &self,
        turn: &Turn<'_>,
        on_text: &mut impl FnMut(&str),
    ) -> Result<Answer, TurnError> {
        let submission = self.submission(turn)?;
        let mut events = self.engine.submit(submission).map_err(TurnError::new)?;
        let mut stream = TextStream::new(&self.model.tokenizer, &TextStreamOptions::default());
        let mut text = String::new();
        let mut gates = Vec::new();
        let mut show = |piece: &str| {
            text.push_str(piece);
            on_text(piece);
        };
        let finish_reason = loop {
            let event = events.next().await;
            match event.ok_or_else(|| TurnError::new("the engine has died"))? {
                Event::Prompt { .. } => {}
                Event::Token { token, .. } => {
                    // An end of sequence leaves no text, special token or not.
                    if !self.model.ends.contains(&token.id) {
                        show(&stream.push(token.id).text);
                    }
                    gates.extend(token.gates);
                }
                Event::Finished { reason, .. } => break reason,
                Event::Failed { message, .. } => return Err(TurnError(message)),
            }
        };
        show(&stream.finish().text);
        Ok(Answer {
            text,
            gates: summary(&gates),
            finish_reason: match finish_reason {
                FinishReason::Length => "length",
                _ => "stop",
            }
            .to_owned(),
        })
    }

    fn submission(&self, turn: &Turn<'_>) -> Result<Submission, TurnError> {
        let chat = Chat {
            messages: turn.messages.to_vec(),
            add_generation_prompt: true,
            ..Chat::default()
        };
        let template = &self.model.template;
        let prompt = template
            .encode(&self.model.tokenizer, &chat)
            .map_err(TurnError::new)?;
        let limits = self.engine.limits();
        let room = limits.context_tokens_max.saturating_sub(prompt.len());
        let unsaid = if limits.routed {
            Variant::Routed
        } else {
            Variant::Base
        };
        let variant = turn.variant.unwrap_or(unsaid);
        let defaults = &self.model.defaults;
        Ok(Submission {
            sampling: SamplingParams {
                temperature: turn.temperature.unwrap_or(defaults.temperature),
                top_k: defaults.top_k,
                top_p: defaults.top_p,
                min_p: defaults.min_p,
                repetition_penalty: defaults.repetition_penalty,
                seed: turn.seed.unwrap_or_else(clock_seed),
                max_tokens: turn
                    .max_tokens
                    .min(u32::try_from(room.max(1)).unwrap_or(u32::MAX)),
                ..SamplingParams::default()
            },
            prompt,
            choices: 1,
            variant,
            gates: variant.gates(),
            cache_salt: None,
            prompt_logprobs: None,
            gate_detail: if turn.gates && limits.routed {
                GateDetail::Mean
            } else {
                GateDetail::None
            },
            prompt_gates: false,
        })
    }
}

/// For a user who names no seed and wants another answer each time.
fn clock_seed() -> u64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since_epoch.map_or(0, |since| since.as_nanos() as u64)
}

fn summary(gates: &[TokenGates]) -> Option<GateSummary> {
    let series = |pick: fn(&TokenGates) -> &[f32]| -> Vec<f32> {
        let means = gates.iter().map(|token| mean(pick(token)));
        means.collect()
    };
    Some(GateSummary {
        safety: statistics(&series(|token| &token.safety))?,
        helpfulness: statistics(&series(|token| &token.helpfulness))?,
    })
}

/// `None` without a token.
fn statistics(gates: &[f32]) -> Option<GateStatistics> {
    Some(GateStatistics {
        // The first token's gates are those of the last prompt token.
        prompt_last: *gates.first()?,
        mean: mean(gates),
        min: gates.iter().copied().fold(f32::INFINITY, f32::min),
        max: gates.iter().copied().fold(f32::NEG_INFINITY, f32::max),
    })
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len().max(1) as f32
}
