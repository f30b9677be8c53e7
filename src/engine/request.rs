//! One request in the engine: its choices, its stream of events, and what is measured of it.
//!
//! Invariant: every choice ends once, with one last event; the request is over when none is open.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::mpsc;

use super::handle::{
    Admission, Event, GateDetail, GeneratedToken, PromptGates, QueueTicket, TokenGates,
    TokenLogprobs,
};
use super::sampler::History;
use crate::metrics::{Gate, Metrics};
use crate::types::{FinishReason, SamplingParams, SeqId, TokenId, Variant};

/// A request that is not over.
pub(super) struct Request {
    pub sampling: SamplingParams,
    pub variant: Variant,
    gate_detail: GateDetail,
    events: mpsc::Sender<Event>,
    stops: Arc<[AtomicBool]>,
    accepted: Instant,
    ticket: Option<QueueTicket>,
    prompt: PromptReport,
    choices: Vec<Choice>,
    has_token: bool,
    gravest: FinishReason,
}

/// What is said of the prompt, once, before any token.
struct PromptReport {
    sent: bool,
    tokens: usize,
    cached_tokens: usize,
    /// The k most likely tokens wanted at each position.
    top: Option<usize>,
    logprobs: Vec<Option<TokenLogprobs>>,
    /// `None` where nobody asked.
    gates: Option<GateSums>,
}

/// The gates of the prompt tokens that came so far.
#[derive(Default)]
struct GateSums {
    /// Of both gates of each layer in turn.
    sums: Vec<f64>,
    tokens: usize,
    last: Vec<f32>,
}

/// One answer.
struct Choice {
    id: SeqId,
    open: bool,
    history: History,
    last_token: Option<Instant>,
}

/// Why a choice ends.
pub(super) enum End {
    /// As it should.
    Finished(FinishReason),
    /// With an error, in words for the client.
    Failed(String),
}

impl Request {
    /// `ids`: the sequence of each choice.
    pub(super) fn new(admission: Admission, ids: Vec<SeqId>, prompt: &[TokenId]) -> Self {
        let submission = admission.submission;
        let history = History::new(&submission.sampling, prompt);
        let choice = |id| Choice {
            id,
            open: true,
            history: history.clone(),
            last_token: None,
        };
        let top = submission.prompt_logprobs.map(|top| top as usize);
        Self {
            sampling: submission.sampling,
            variant: submission.variant,
            gate_detail: submission.gate_detail,
            events: admission.events,
            stops: admission.stops,
            accepted: admission.accepted,
            ticket: Some(admission.ticket),
            prompt: PromptReport {
                sent: false,
                tokens: prompt.len(),
                cached_tokens: 0,
                top,
                // The first token has none.
                logprobs: top.map(|_| None).into_iter().collect(),
                gates: submission.prompt_gates.then(GateSums::default),
            },
            choices: ids.into_iter().map(choice).collect(),
            has_token: false,
            gravest: FinishReason::Stop,
        }
    }

    /// The client has gone.
    pub(super) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether the prompt is computed: until then all choices depend on the first.
    pub(super) fn has_prompt(&self) -> bool {
        self.prompt.sent
    }

    /// Open choices that the client has enough of.
    pub(super) fn stopped(&self) -> impl Iterator<Item = (u32, SeqId)> {
        let has_prompt = self.has_prompt();
        let asked = |choice: u32| {
            let stop = self.stops.get(choice as usize);
            stop.is_some_and(|stop| stop.load(Ordering::Acquire))
        };
        self.open()
            .filter(move |(choice, _)| has_prompt && asked(*choice))
    }

    /// Choices that have not ended.
    pub(super) fn open(&self) -> impl Iterator<Item = (u32, SeqId)> {
        (0..)
            .zip(&self.choices)
            .filter(|(_, choice)| choice.open)
            .map(|(index, choice)| (index, choice.id))
    }

    /// Whether every choice has ended.
    pub(super) fn is_over(&self) -> bool {
        self.choices.iter().all(|choice| !choice.open)
    }

    /// The first step of the request's first sequence: it waits no longer.
    pub(super) fn start(&mut self, cached_tokens: usize, now: Instant, metrics: &Metrics) {
        if self.ticket.take().is_some() {
            self.prompt.cached_tokens = cached_tokens;
            let waited = now.saturating_duration_since(self.accepted);
            metrics.queue_time.observe(waited.as_secs_f64());
        }
    }

    /// The k most likely tokens that are wanted at each prompt position.
    pub(super) fn prompt_top(&self) -> Option<usize> {
        self.prompt.top
    }

    /// One more prompt token has its log-probability.
    pub(super) fn push_prompt_logprobs(&mut self, logprobs: TokenLogprobs) {
        self.prompt.logprobs.push(Some(logprobs));
    }

    /// One more prompt token has its gates: alpha and beta of each layer in turn. Tokens come in order.
    pub(super) fn push_prompt_gates(&mut self, gates: &[f32]) {
        if let Some(sums) = &mut self.prompt.gates {
            sums.push(gates);
        }
    }

    /// A choice has computed the prompt; says so, the first time.
    pub(super) fn prompt_done(&mut self, metrics: &Metrics) {
        if std::mem::replace(&mut self.prompt.sent, true) {
            return;
        }
        let prompt_tokens = metrics.prompt_tokens.of(self.variant);
        prompt_tokens.add(self.prompt.tokens as u64);
        let logprobs = std::mem::take(&mut self.prompt.logprobs);
        let gates = self.prompt.gates.take();
        self.send(Event::Prompt {
            cached_tokens: self.prompt.cached_tokens,
            logprobs: self.prompt.top.map(|_| logprobs),
            gates: gates.and_then(|sums| sums.report()),
        });
    }

    /// What penalties look at.
    pub(super) fn history(&self, choice: u32) -> Option<&History> {
        Some(&self.choices.get(choice as usize)?.history)
    }

    /// A choice has one more token. `gates`: alpha and beta of each layer in turn, or nothing.
    pub(super) fn token(
        &mut self,
        choice: u32,
        (id, logprobs): (TokenId, Option<TokenLogprobs>),
        gates: &[f32],
        now: Instant,
        metrics: &Metrics,
    ) {
        self.measure_token(choice, now, metrics);
        if !gates.is_empty() {
            for (gate, offset) in [(Gate::Safety, 0), (Gate::Helpfulness, 1)] {
                let histogram = metrics.gates.of(gate).of(self.variant);
                histogram.observe(f64::from(mean_gate(gates, offset)));
            }
        }
        if let Some(choice) = self.choices.get_mut(choice as usize) {
            choice.history.push(id);
        }
        let token = GeneratedToken {
            id,
            logprobs,
            gates: token_gates(self.gate_detail, gates),
        };
        self.send(Event::Token { choice, token });
    }

    fn measure_token(&mut self, choice: u32, now: Instant, metrics: &Metrics) {
        metrics.generated_tokens.of(self.variant).increment();
        if !std::mem::replace(&mut self.has_token, true) {
            let waited = now.saturating_duration_since(self.accepted);
            metrics.time_to_first_token.observe(waited.as_secs_f64());
        }
        let choice = self.choices.get_mut(choice as usize);
        if let Some(last) = choice.and_then(|choice| choice.last_token.replace(now)) {
            let gap = now.saturating_duration_since(last);
            metrics.inter_token_latency.observe(gap.as_secs_f64());
        }
    }

    /// A choice ends; after the last one, the request is counted.
    pub(super) fn end(&mut self, choice: u32, end: End, now: Instant, metrics: &Metrics) {
        let Some(open) = self.choices.get_mut(choice as usize) else {
            return;
        };
        if !std::mem::replace(&mut open.open, false) {
            return;
        }
        let (reason, event) = match end {
            End::Finished(reason) => (reason, Event::Finished { choice, reason }),
            End::Failed(message) => (FinishReason::Failed, Event::Failed { choice, message }),
        };
        if gravity(reason) > gravity(self.gravest) {
            self.gravest = reason;
        }
        let finished = metrics.sequences_finished.of(self.variant);
        finished.of(reason).increment();
        if self.is_over() {
            let finished = metrics.requests_finished.of(self.variant);
            finished.of(self.gravest).increment();
            if self.gravest == FinishReason::Cancelled {
                metrics.cancellations.increment();
            }
            let lasted = now.saturating_duration_since(self.accepted);
            metrics.request_duration.observe(lasted.as_secs_f64());
        }
        self.send(event);
    }

    fn send(&self, event: Event) {
        // The channel holds all that the request can produce; closed means cancelled, which the next step sees.
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event) {
            unreachable!("a request's channel holds all its events");
        }
    }
}

impl GateSums {
    fn push(&mut self, gates: &[f32]) {
        self.sums.resize(gates.len(), 0.0);
        for (sum, gate) in self.sums.iter_mut().zip(gates) {
            *sum += f64::from(*gate);
        }
        self.tokens += 1;
        self.last.clear();
        self.last.extend_from_slice(gates);
    }

    /// `None` without experts.
    fn report(&self) -> Option<PromptGates> {
        let tokens = self.tokens.max(1) as f64;
        let mean: Vec<f32> = self.sums.iter().map(|sum| (sum / tokens) as f32).collect();
        Some(PromptGates {
            last: token_gates(GateDetail::Layers, &self.last)?,
            mean: token_gates(GateDetail::Layers, &mean)?,
        })
    }
}

fn gravity(reason: FinishReason) -> u8 {
    match reason {
        FinishReason::Stop => 0,
        FinishReason::Length => 1,
        FinishReason::Cancelled => 2,
        FinishReason::Failed => 3,
    }
}

/// One gate of all layers: `offset` 0 is alpha, 1 is beta.
fn one_gate(gates: &[f32], offset: usize) -> impl Iterator<Item = f32> {
    gates.iter().skip(offset).step_by(2).copied()
}

fn mean_gate(gates: &[f32], offset: usize) -> f32 {
    let layers = gates.len() / 2;
    one_gate(gates, offset).sum::<f32>() / layers as f32
}

fn token_gates(detail: GateDetail, gates: &[f32]) -> Option<TokenGates> {
    if gates.is_empty() {
        return None;
    }
    let report = |offset| match detail {
        GateDetail::Layers => one_gate(gates, offset).collect(),
        _ => vec![mean_gate(gates, offset)],
    };
    (detail != GateDetail::None).then(|| TokenGates {
        safety: report(0),
        helpfulness: report(1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_told_as_asked() {
        let gates = [0.25, 1.0, 0.75, 0.0];
        assert_eq!(token_gates(GateDetail::None, &gates), None);
        assert_eq!(token_gates(GateDetail::Layers, &[]), None);
        for (detail, safety, helpfulness) in [
            (GateDetail::Mean, vec![0.5], vec![0.5]),
            (GateDetail::Layers, vec![0.25, 0.75], vec![1.0, 0.0]),
        ] {
            let want = TokenGates {
                safety,
                helpfulness,
            };
            assert_eq!(token_gates(detail, &gates), Some(want));
        }
    }
}
