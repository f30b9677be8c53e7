//! What the rest of the program holds of the engine: a cloneable handle that submits, and one stream of events a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use super::error::SubmitError;
use crate::types::{FinishReason, GateOverride, SamplingParams, TokenId, Variant};

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
    /// What of the gates is reported.
    pub gate_detail: GateDetail,
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
pub enum Command {
    /// A new request.
    Submit(Box<Submission>, mpsc::Sender<Event>),
    /// Finish what was admitted, then stop.
    Drain,
}

/// Submits to the engine. Cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<EngineShared>,
}

/// What both sides may read at any time.
pub struct EngineShared {
    /// Limits that a submission is checked against.
    pub limits: EngineLimits,
    /// Milliseconds since `started` at the end of the last step or idle wait.
    last_progress_ms: AtomicU64,
    started: std::time::Instant,
    state: AtomicU64,
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

/// The events of one request. Dropping it cancels the request: the next step frees its blocks.
pub struct EventStream {
    events: mpsc::Receiver<Event>,
}

impl EventStream {
    /// The next event; `None` after the last, or at once when the engine died.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}
