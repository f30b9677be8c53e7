//! A request's answers as they come from the engine: ids become text here, and stop strings cut it.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll};
use tokio::time::Instant;

use super::AppState;
use super::error::ApiError;
use super::limits::Plan;
use crate::engine::{Event, EventStream, GeneratedToken, Submission, TokenLogprobs};
use crate::openai::{self, Usage};
use crate::text::{TextPiece, TextStream};
use crate::types::{FinishReason, TokenId};

/// What happens to one prompt.
#[derive(Debug)]
pub enum Step {
    /// It is computed; comes once, before any piece.
    Prompt {
        /// One a prompt token (the first has none), where asked for.
        logprobs: Option<Vec<Option<TokenLogprobs>>>,
    },
    /// One of its choices goes on.
    Piece(Piece),
}

/// More of one choice.
#[derive(Debug)]
pub struct Piece {
    /// Of this prompt's choices.
    pub choice: u32,
    /// Final text; may be empty.
    pub text: String,
    /// The tokens that the text completes.
    pub tokens: Vec<GeneratedToken>,
    /// Set in the last piece of the choice.
    pub end: Option<FinishReason>,
}

/// One choice while it runs.
struct Choice {
    text: TextStream,
    /// Tokens whose text is held back.
    pending: VecDeque<GeneratedToken>,
}

impl Choice {
    fn piece(&mut self, index: u32, piece: TextPiece, end: Option<FinishReason>) -> Piece {
        let tokens = match end {
            Some(_) => self.pending.len(),
            None => piece.tokens.min(self.pending.len()),
        };
        Piece {
            choice: index,
            text: piece.text,
            tokens: self.pending.drain(..tokens).collect(),
            end,
        }
    }
}

/// The answers to one prompt. Invariant: every choice has exactly one piece with an end, and nothing follows it.
struct Answer {
    events: EventStream,
    /// `None` once ended.
    choices: Vec<Option<Choice>>,
    silent_ends: Vec<TokenId>,
    cached_tokens: usize,
    completion_tokens: usize,
}

/// What the engine's next event comes to.
enum Outcome {
    Step(Step),
    Nothing,
    Failed(ApiError),
}

impl Answer {
    fn new(events: EventStream, plan: &Plan, state: &AppState) -> Self {
        let choice = |_| {
            Some(Choice {
                text: TextStream::new(&state.model().tokenizer, &plan.text),
                pending: VecDeque::new(),
            })
        };
        Self {
            events,
            choices: (0..plan.choices).map(choice).collect(),
            silent_ends: plan.silent_ends.clone(),
            cached_tokens: 0,
            completion_tokens: 0,
        }
    }

    /// `None` after the last step. The engine's stream is read to its end even when stop strings have ended every choice:
    /// dropping it earlier would be a cancellation.
    async fn next(&mut self) -> Option<Result<Step, ApiError>> {
        loop {
            let Some(event) = self.events.next().await else {
                let running = self.choices.iter().any(Option::is_some);
                self.choices.clear();
                return running.then(|| Err(ApiError::engine_gone()));
            };
            match self.take(event) {
                Outcome::Step(step) => return Some(Ok(step)),
                Outcome::Nothing => {}
                Outcome::Failed(error) => return Some(Err(error)),
            }
        }
    }

    fn take(&mut self, event: Event) -> Outcome {
        match event {
            Event::Prompt {
                cached_tokens,
                logprobs,
                gates: _,
            } => {
                self.cached_tokens = cached_tokens;
                Outcome::Step(Step::Prompt { logprobs })
            }
            Event::Token { choice, token } => self.token(choice, token),
            Event::Finished { choice, reason } => self.finished(choice, reason),
            Event::Failed { message, .. } => Outcome::Failed(ApiError::Failed { message }),
        }
    }

    fn token(&mut self, index: u32, token: GeneratedToken) -> Outcome {
        let slot = self.choices.get_mut(index as usize);
        let Some((choice, slot)) = slot.and_then(|slot| Some((slot.take()?, slot))) else {
            return Outcome::Nothing;
        };
        let mut choice = choice;
        self.completion_tokens += 1;
        let text = if self.silent_ends.contains(&token.id) {
            choice.text.push_silent()
        } else {
            choice.text.push(token.id)
        };
        choice.pending.push_back(token);
        let end = text.stop.map(|_| FinishReason::Stop);
        if end.is_none() && text.text.is_empty() && text.tokens == 0 {
            *slot = Some(choice);
            return Outcome::Nothing;
        }
        let piece = choice.piece(index, text, end);
        match end {
            Some(_) => self.events.stop(index),
            None => *slot = Some(choice),
        }
        Outcome::Step(Step::Piece(piece))
    }

    fn finished(&mut self, index: u32, reason: FinishReason) -> Outcome {
        let slot = self.choices.get_mut(index as usize);
        let Some(mut choice) = slot.and_then(Option::take) else {
            return Outcome::Nothing;
        };
        let rest = choice.text.clone().finish();
        let reason = if rest.stop.is_some() {
            FinishReason::Stop
        } else {
            reason
        };
        if openai::finish_reason(reason).is_none() {
            // Nobody but us drops the stream, and then nobody reads this.
            return Outcome::Failed(ApiError::Failed {
                message: "the request was cancelled".to_owned(),
            });
        }
        Outcome::Step(Step::Piece(choice.piece(index, rest, Some(reason))))
    }
}

/// One step of one prompt.
pub struct Progress {
    /// Which prompt.
    pub prompt: usize,
    /// What happened.
    pub step: Step,
}

/// Whether a request is answered, for the log.
enum Outlook {
    Open,
    Complete,
    Failed,
}

/// The answers to all prompts of one request, in the order in which they come. Dropping it cancels what still runs.
pub struct Answers {
    merged: SelectAll<BoxStream<'static, Message>>,
    deadline: Instant,
    timeout: Duration,
    usage: Usage,
    outlook: Outlook,
    finish_reason: Option<FinishReason>,
    span: tracing::Span,
}

/// From one [`Answer`].
struct Message {
    prompt: usize,
    result: Result<Step, ApiError>,
    /// Of its answer so far.
    cached_tokens: usize,
    completion_tokens: usize,
}

impl Answers {
    /// Submits every prompt; `param` is the field that holds them.
    /// # Errors
    /// [`ApiError::Submit`]; then those submitted before are cancelled.
    pub fn submit(
        state: &AppState,
        plan: &Plan,
        prompts: &[Vec<TokenId>],
        prompt_logprobs: Option<u32>,
        param: &'static str,
        accepted: Instant,
    ) -> Result<Self, ApiError> {
        let mut merged = SelectAll::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let submission = Submission {
                prompt: prompt.clone(),
                sampling: plan.sampling.clone(),
                choices: plan.choices,
                variant: plan.gates.variant,
                gates: plan.gates.rules,
                cache_salt: plan.cache_salt.clone(),
                prompt_logprobs,
                gate_detail: plan.gates.report.detail(),
                prompt_gates: false,
            };
            let events = state
                .engine()
                .submit(submission)
                .map_err(|source| ApiError::Submit { param, source })?;
            merged.push(messages(index, Answer::new(events, plan, state)));
        }
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let timeout = state.config().request_timeout;
        let span = tracing::Span::current();
        span.record("variant", plan.gates.variant.as_str());
        span.record("prompt_tokens", prompt_tokens);
        Ok(Self {
            merged,
            deadline: accepted + timeout,
            timeout,
            usage: Usage::new(prompt_tokens, 0, 0),
            outlook: Outlook::Open,
            finish_reason: None,
            span,
        })
    }

    /// `None` after the last. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Progress, ApiError>> {
        if !matches!(self.outlook, Outlook::Open) {
            return None;
        }
        let Ok(message) = tokio::time::timeout_at(self.deadline, self.merged.next()).await else {
            return self.fail(ApiError::Timeout {
                seconds: self.timeout.as_secs(),
            });
        };
        let Some(message) = message else {
            self.outlook = Outlook::Complete;
            return None;
        };
        let details = self.usage.prompt_tokens_details.unwrap_or_default();
        self.usage = Usage::new(
            self.usage.prompt_tokens,
            self.usage.completion_tokens + message.completion_tokens,
            details.cached_tokens + message.cached_tokens,
        );
        match message.result {
            Err(error) => self.fail(error),
            Ok(step) => {
                if let Step::Piece(piece) = &step {
                    self.finish_reason = piece.end.or(self.finish_reason);
                }
                Some(Ok(Progress {
                    prompt: message.prompt,
                    step,
                }))
            }
        }
    }

    fn fail(&mut self, error: ApiError) -> Option<Result<Progress, ApiError>> {
        self.outlook = Outlook::Failed;
        self.merged.clear();
        Some(Err(error))
    }

    /// Token counts so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }
}

/// What one answer says, each message with the counts that are new since the one before.
fn messages(prompt: usize, answer: Answer) -> BoxStream<'static, Message> {
    let stream = stream::unfold(
        (answer, 0, 0),
        move |(mut answer, cached, completed)| async move {
            let result = answer.next().await?;
            let message = Message {
                prompt,
                result,
                cached_tokens: answer.cached_tokens - cached,
                completion_tokens: answer.completion_tokens - completed,
            };
            let counts = (answer.cached_tokens, answer.completion_tokens);
            Some((message, (answer, counts.0, counts.1)))
        },
    );
    stream.boxed()
}

impl Drop for Answers {
    fn drop(&mut self) {
        let outcome = match (&self.outlook, self.finish_reason) {
            (Outlook::Complete, Some(reason)) => openai::finish_reason(reason).unwrap_or("failed"),
            (Outlook::Failed, _) => "failed",
            _ => "cancelled",
        };
        self.span
            .record("completion_tokens", self.usage.completion_tokens);
        self.span.record("finish_reason", outcome);
        self.span.in_scope(|| tracing::debug!("answered"));
    }
}
