//! What the rest of the program holds of the engine: a cloneable handle that submits, and one stream of events a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::error::SubmitError;
use crate::metrics::{Metrics, Refusal};
use crate::types::{BLOCK_TOKENS, FinishReason, GateOverride, SamplingParams, TokenId, Variant};

/// A request, as token ids.
#[derive(Clone, Debug)]
pub struct Submission {
    /// At least 1 token.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen, for every choice.
    pub sampling: SamplingParams,
    /// Answers wanted, at least 1; they share the prompt's blocks and differ in their random numbers.
    pub choices: u32,
    /// Label of `gates` in metrics and the key of caches.
    pub variant: Variant,
    /// The variant's rules after biases, floors and ceilings.
    pub gates: GateOverride,
    /// Separates prefix caches: requests with different salts never share blocks.
    pub cache_salt: Option<String>,
    /// `Some(k)`: report the log-probability of every prompt token and the k most likely there.
    pub prompt_logprobs: Option<u32>,
    /// What of the gates of generated tokens is reported.
    pub gate_detail: GateDetail,
    /// Report the gates over the whole prompt. Its blocks are then computed here and not found in the prefix cache, which keeps
    /// no gates; without experts there is nothing to report.
    pub prompt_gates: bool,
}

/// What of the gates a request wants to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GateDetail {
    /// Nothing: costs nothing.
    #[default]
    None,
    /// With each event, the mean over layers.
    Mean,
    /// With each event, every layer.
    Layers,
}

/// The gates of one token. With [`GateDetail::Mean`] both have one number, with [`GateDetail::Layers`] one a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenGates {
    /// alpha.
    pub safety: Vec<f32>,
    /// beta.
    pub helpfulness: Vec<f32>,
}

/// The gates over a prompt, one number a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptGates {
    /// At the last prompt token, where the answer's first token is decided.
    pub last: TokenGates,
    /// Mean over all prompt tokens.
    pub mean: TokenGates,
}

/// A token's log-probability under the unmodified distribution, and the most likely tokens there, most likely first.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// Of the k most likely.
    pub top: Vec<(TokenId, f32)>,
}

/// One generated token.
#[derive(Clone, Debug)]
pub struct GeneratedToken {
    /// The token; ends of sequence and stop tokens are reported too.
    pub id: TokenId,
    /// Where [`SamplingParams::logprobs`] asked for it.
    pub logprobs: Option<TokenLogprobs>,
    /// Gates of the forward pass whose logits chose this token: for the first one, those of the last prompt token.
    pub gates: Option<TokenGates>,
}

/// What happens to a request. Every choice ends with exactly one `Finished` or `Failed`, and nothing follows it.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt is computed; comes once, before any token.
    Prompt {
        /// Prompt tokens whose K and V came from the prefix cache.
        cached_tokens: usize,
        /// One a prompt token (the first has none), where asked for.
        logprobs: Option<Vec<Option<TokenLogprobs>>>,
        /// Where asked for.
        gates: Option<PromptGates>,
    },
    /// A choice has one more token.
    Token {
        /// Below `choices`.
        choice: u32,
        /// The token.
        token: GeneratedToken,
    },
    /// A choice has ended. `Stop`: its last token was an end of sequence or a stop token.
    Finished {
        /// Below `choices`.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// A choice has ended with an error.
    Failed {
        /// Below `choices`.
        choice: u32,
        /// For the client.
        message: String,
    },
}

/// The messages that the engine thread receives: all that can happen to it.
pub(super) enum Command {
    /// A new request.
    Submit(Box<Admission>),
    /// Finish what was admitted, then stop. The state says so too; this wakes an idle engine.
    Drain,
}

/// A submission on its way to the engine thread, with the engine's ends of what the client holds.
pub(super) struct Admission {
    pub submission: Submission,
    pub events: mpsc::Sender<Event>,
    pub stops: Arc<[AtomicBool]>,
    pub accepted: Instant,
    pub ticket: QueueTicket,
}

impl Admission {
    /// Ends every choice of a request that never came in.
    pub(super) fn refuse(&self, message: &str) {
        for choice in 0..self.submission.choices {
            let message = message.to_owned();
            // Closed: the client has left already.
            let _ = self.events.try_send(Event::Failed { choice, message });
        }
    }
}

/// One place in the queue, from submission until the request's first step or its end.
pub(super) struct QueueTicket(Arc<EngineShared>);

impl Drop for QueueTicket {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Submits to the engine. Cheap to clone. The engine stops when it is asked to drain, or when every handle is gone.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<EngineShared>,
    metrics: Arc<Metrics>,
}

/// What both sides may read at any time.
pub(super) struct EngineShared {
    limits: EngineLimits,
    started: Instant,
    /// Milliseconds from `started` to the last progress: the end of a step, or the end of an idle wait.
    progress_ms: AtomicU64,
    busy: AtomicBool,
    /// Requests that have not had their first step.
    waiting: AtomicUsize,
    state: watch::Sender<EngineState>,
}

/// What the engine can take, for errors and for `/v1/models`.
#[derive(Clone, Copy, Debug)]
pub struct EngineLimits {
    /// Prompt and answer together.
    pub context_tokens_max: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Whether there are experts: without, only [`Variant::Base`] can be served.
    pub routed: bool,
    /// Layers, for per-layer gates.
    pub layers: usize,
    /// Requests waiting at most.
    pub queue_max: usize,
    /// Blocks of the K/V cache.
    pub kv_blocks: usize,
}

/// The engine's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineState {
    /// Takes requests.
    Running,
    /// Finishes what it has.
    Draining,
    /// The thread has ended as asked.
    Stopped,
    /// The thread died; nothing will be answered any more.
    Dead,
}

/// Whether the step loop is advancing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineHealth {
    /// Where the engine is in its life.
    pub state: EngineState,
    /// `None`: there is no work. Else the time since the loop last advanced.
    pub stalled: Option<Duration>,
}

impl EngineHandle {
    /// A handle, and the engine's end of it.
    pub(super) fn new(limits: EngineLimits, metrics: Arc<Metrics>) -> (Self, EngineInbox) {
        // One place more than requests may wait: for `Drain`.
        let (sender, receiver) = mpsc::channel(limits.queue_max.saturating_add(1));
        let shared = Arc::new(EngineShared {
            limits,
            started: Instant::now(),
            progress_ms: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            state: watch::Sender::new(EngineState::Running),
        });
        let inbox = EngineInbox {
            commands: receiver,
            shared: Arc::clone(&shared),
        };
        let handle = Self {
            commands: sender,
            shared,
            metrics,
        };
        (handle, inbox)
    }

    /// Queues a request. Never blocks.
    ///
    /// # Errors
    /// Says why the request can never be served, or not now; then nothing was queued.
    pub fn submit(&self, submission: Submission) -> Result<EventStream, SubmitError> {
        let result = self.try_submit(submission);
        if let Err(error) = &result {
            let refusal = match error {
                SubmitError::QueueFull { .. } => Refusal::QueueFull,
                SubmitError::Draining => Refusal::Draining,
                SubmitError::EngineGone => Refusal::EngineGone,
                _ => Refusal::Invalid,
            };
            self.metrics.refusals.of(refusal).increment();
        }
        result
    }

    fn try_submit(&self, mut submission: Submission) -> Result<EventStream, SubmitError> {
        match self.state() {
            EngineState::Running => {}
            EngineState::Draining | EngineState::Stopped => return Err(SubmitError::Draining),
            EngineState::Dead => return Err(SubmitError::EngineGone),
        }
        submission.choices = submission.choices.max(1);
        self.shared.limits.check(&submission)?;
        let ticket = self.shared.take_ticket()?;
        let (events, receiver) = mpsc::channel(events_max(&submission));
        let stops: Arc<[AtomicBool]> = (0..submission.choices)
            .map(|_| AtomicBool::new(false))
            .collect();
        let admission = Admission {
            submission,
            events,
            stops: Arc::clone(&stops),
            accepted: Instant::now(),
            ticket,
        };
        match self.commands.try_send(Command::Submit(Box::new(admission))) {
            Ok(()) => Ok(EventStream {
                events: receiver,
                stops,
            }),
            Err(mpsc::error::TrySendError::Full(_)) => Err(SubmitError::QueueFull {
                limit: self.shared.limits.queue_max,
            }),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(match self.state() {
                EngineState::Draining | EngineState::Stopped => SubmitError::Draining,
                EngineState::Running | EngineState::Dead => SubmitError::EngineGone,
            }),
        }
    }

    /// What the engine can take.
    pub fn limits(&self) -> &EngineLimits {
        &self.shared.limits
    }

    /// Where the engine is in its life.
    pub fn state(&self) -> EngineState {
        *self.shared.state.borrow()
    }

    /// Requests that wait for their first step.
    pub fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Acquire)
    }

    /// Whether the step loop is advancing.
    pub fn health(&self) -> EngineHealth {
        let progress = Duration::from_millis(self.shared.progress_ms.load(Ordering::Acquire));
        let busy = self.shared.busy.load(Ordering::Acquire);
        EngineHealth {
            state: self.state(),
            stalled: busy.then(|| self.shared.started.elapsed().saturating_sub(progress)),
        }
    }

    /// Refuses new requests from now on; the engine finishes what it has, then stops.
    pub fn drain(&self) {
        self.shared.advance_state(EngineState::Draining);
        // A full queue needs no wake-up: the engine is at work, and reads the state when it is done.
        let _ = self.commands.try_send(Command::Drain);
    }

    /// Waits until the engine has ended: [`EngineState::Stopped`] or [`EngineState::Dead`].
    pub async fn ended(&self) -> EngineState {
        let mut state = self.shared.state.subscribe();
        let ended = |state: &EngineState| matches!(state, EngineState::Stopped | EngineState::Dead);
        match state.wait_for(ended).await {
            Ok(state) => *state,
            // Unreachable while `self` holds the sender.
            Err(_) => EngineState::Dead,
        }
    }
}

impl EngineLimits {
    fn check(&self, submission: &Submission) -> Result<(), SubmitError> {
        let prompt = submission.prompt.len();
        let max_tokens = submission.sampling.max_tokens as usize;
        if prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if !self.routed && submission.variant != Variant::Base {
            let variant = submission.variant.as_str();
            return Err(SubmitError::NoExperts { variant });
        }
        let outside = |token: &&TokenId| token.index() >= self.vocabulary;
        if let Some(token) = submission.prompt.iter().find(outside) {
            return Err(SubmitError::TokenOutOfRange {
                found: token.0,
                vocabulary: self.vocabulary,
            });
        }
        if prompt.saturating_add(max_tokens) > self.context_tokens_max {
            return Err(SubmitError::ContextLength {
                limit: self.context_tokens_max,
                prompt,
                max_tokens,
            });
        }
        // The last token is sampled, never computed.
        let positions = prompt + max_tokens.saturating_sub(1);
        let needed = positions.div_ceil(BLOCK_TOKENS);
        if needed > self.kv_blocks {
            return Err(SubmitError::CacheTooSmall {
                needed,
                blocks: self.kv_blocks,
            });
        }
        Ok(())
    }
}

impl EngineShared {
    fn take_ticket(self: &Arc<Self>) -> Result<QueueTicket, SubmitError> {
        let limit = self.limits.queue_max;
        self.waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |waiting| {
                (waiting < limit).then_some(waiting + 1)
            })
            .map(|_| QueueTicket(Arc::clone(self)))
            .map_err(|_| SubmitError::QueueFull { limit })
    }

    /// Life goes one way only.
    fn advance_state(&self, next: EngineState) {
        self.state.send_if_modified(|state| {
            let later = (*state as u8) < (next as u8);
            if later {
                *state = next;
            }
            later
        });
    }
}

/// Events that a request can produce: so many fit its channel, and the engine never waits for a client.
fn events_max(submission: &Submission) -> usize {
    let per_choice = submission.sampling.max_tokens as usize + 1;
    let all = per_choice.saturating_mul(submission.choices as usize) + 1;
    all.min(tokio::sync::Semaphore::MAX_PERMITS)
}

/// The engine's end of its handles.
pub(super) struct EngineInbox {
    commands: mpsc::Receiver<Command>,
    shared: Arc<EngineShared>,
}

/// What the engine finds in its inbox.
pub(super) enum Received {
    /// A request.
    Submit(Box<Admission>),
    /// Nothing now.
    Nothing,
    /// Nothing, and nothing will come.
    Closed,
}

impl EngineInbox {
    /// The next request, if there is one. Never blocks.
    pub(super) fn poll(&mut self) -> Received {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Submit(admission)) => return Received::Submit(admission),
                Ok(Command::Drain) => {}
                // No request comes in any more; one that was on its way is met on the next turn.
                Err(mpsc::error::TryRecvError::Empty) if self.draining() => self.commands.close(),
                Err(mpsc::error::TryRecvError::Empty) => return Received::Nothing,
                Err(mpsc::error::TryRecvError::Disconnected) => return Received::Closed,
            }
        }
    }

    /// Waits for a request.
    pub(super) fn wait(&mut self) -> Received {
        loop {
            if self.draining() {
                return self.poll();
            }
            match self.commands.blocking_recv() {
                Some(Command::Submit(admission)) => return Received::Submit(admission),
                Some(Command::Drain) => {}
                None => return Received::Closed,
            }
        }
    }

    /// Takes no more requests; returns those that were still queued.
    pub(super) fn close(&mut self) -> Vec<Admission> {
        self.commands.close();
        let mut left = Vec::new();
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(admission) = command {
                left.push(*admission);
            }
        }
        left
    }

    /// Ends the engine's life, for all who wait for it.
    pub(super) fn end(&mut self, state: EngineState) {
        self.set_busy(false);
        self.shared.advance_state(state);
    }

    /// Whether the engine was asked to finish.
    fn draining(&self) -> bool {
        *self.shared.state.borrow() != EngineState::Running
    }

    /// Says whether there is work, as of now.
    pub(super) fn set_busy(&self, busy: bool) {
        self.progress();
        self.shared.busy.store(busy, Ordering::Release);
    }

    /// The loop has advanced.
    pub(super) fn progress(&self) {
        let now = self.shared.started.elapsed().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        self.shared.progress_ms.store(now, Ordering::Release);
    }
}

/// The events of one request. Dropping it cancels the request: the next step frees its blocks.
pub struct EventStream {
    events: mpsc::Receiver<Event>,
    stops: Arc<[AtomicBool]>,
}

impl EventStream {
    /// The next event; `None` after the last, or at once when the engine died.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// As [`Self::next`], for callers outside an async runtime.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// The next event, if it is there already.
    pub fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// Ends one choice, because a stop string was found in its text. It finishes with [`FinishReason::Stop`] before its
    /// next token; tokens already on their way still come. Unlike dropping the stream this counts as an answer given.
    pub fn stop(&self, choice: u32) {
        if let Some(stop) = self.stops.get(choice as usize) {
            stop.store(true, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn pair(queue_max: usize) -> (EngineHandle, EngineInbox) {
        let limits = EngineLimits {
            context_tokens_max: 100,
            vocabulary: 10,
            routed: true,
            layers: 1,
            queue_max,
            kv_blocks: 100,
        };
        EngineHandle::new(limits, Arc::new(Metrics::new("m")))
    }

    fn submission() -> Submission {
        Submission {
            prompt: vec![TokenId(1)],
            sampling: SamplingParams::default(),
            choices: 2,
            variant: Variant::Routed,
            gates: Variant::Routed.gates(),
            cache_salt: None,
            prompt_logprobs: None,
            gate_detail: GateDetail::None,
            prompt_gates: false,
        }
    }

    fn received(inbox: &mut EngineInbox) -> Option<Admission> {
        match inbox.poll() {
            Received::Submit(admission) => Some(*admission),
            Received::Nothing | Received::Closed => None,
        }
    }

    #[test]
    fn a_place_in_the_queue_is_kept_until_the_first_step() {
        let (handle, mut inbox) = pair(1);
        let _stream = handle.submit(submission()).unwrap();
        let admission = received(&mut inbox).unwrap();
        let full = SubmitError::QueueFull { limit: 1 };
        assert_eq!(handle.submit(submission()).err(), Some(full));
        drop(admission.ticket);
        assert!(handle.submit(submission()).is_ok());
    }

    #[test]
    fn a_channel_holds_all_that_its_request_can_say() {
        let (handle, mut inbox) = pair(1);
        let _stream = handle.submit(submission()).unwrap();
        let admission = received(&mut inbox).unwrap();
        // The prompt, and for each of two choices 16 tokens and an end.
        assert_eq!(admission.events.max_capacity(), 1 + 2 * 17);
        let endless = Submission {
            choices: u32::MAX,
            ..submission()
        };
        assert!(events_max(&endless) <= tokio::sync::Semaphore::MAX_PERMITS);
    }

    #[test]
    fn what_was_sent_before_the_drain_is_received() {
        let (handle, mut inbox) = pair(2);
        let _first = handle.submit(submission()).unwrap();
        handle.drain();
        assert_eq!(
            handle.submit(submission()).err(),
            Some(SubmitError::Draining)
        );
        assert!(matches!(inbox.wait(), Received::Submit(_)));
        assert!(matches!(inbox.wait(), Received::Closed));
    }

    #[test]
    fn life_goes_one_way() {
        let (handle, mut inbox) = pair(1);
        inbox.close();
        let gone = handle.submit(submission()).err();
        assert_eq!(gone, Some(SubmitError::EngineGone));
        inbox.end(EngineState::Dead);
        handle.drain();
        assert_eq!(handle.state(), EngineState::Dead);
    }

    #[test]
    fn health_tells_a_stall_only_while_there_is_work() {
        let (handle, inbox) = pair(1);
        assert_eq!(handle.health().stalled, None);
        inbox.set_busy(true);
        assert!(handle.health().stalled.is_some());
        inbox.set_busy(false);
        assert_eq!(handle.health().stalled, None);
    }

    #[test]
    fn a_refused_request_hears_of_every_choice() {
        let (handle, mut inbox) = pair(1);
        let mut stream = handle.submit(submission()).unwrap();
        received(&mut inbox).unwrap().refuse("gone");
        for want in 0..2 {
            let event = stream.try_next();
            assert!(matches!(event, Some(Event::Failed { choice, .. }) if choice == want));
        }
        assert_eq!(handle.waiting(), 0);
    }
}
