//! The wire: what OpenAI's API says in JSON, as types with serde and a schema. No logic but that of reading.
//!
//! Fields that we do not know are kept aside (`unknown`), so that the server can list them and refuse those of OpenAI's that it
//! cannot honour. [`read`] turns bytes into a request and names the field that is wrong.

mod chat;
mod completions;
mod error;
mod generation;
mod logprobs;
mod midpo;
mod models;
mod read;
mod tokenize;
mod usage;

pub use chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatMessage, ChatRequest, ChatResponse, Content,
    ContentPart, Delta, ResponseMessage, Role,
};
pub use completions::{
    Completion, CompletionChoice, CompletionRequest, Prompt, PromptItem, TextLogprobs,
};
pub use error::{ErrorBody, ErrorDetail};
pub use generation::{GenerationRequest, Stop, StreamOptions};
pub use logprobs::{ChatLogprobs, TokenLogprob, TopLogprob};
pub use midpo::{
    GateLayers, GateStatistics, GateSummary, MidpoAnswer, MidpoRequest, ReturnGates, TokenGates,
};
pub use models::{Model, ModelList, Version};
pub use read::{ReadError, Request, read};
pub use tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
pub use usage::{PromptTokensDetails, Usage};

use crate::types::FinishReason;

/// The wire's word for an end, `None` for those that a client never sees as a finish reason.
pub fn finish_reason(reason: FinishReason) -> Option<&'static str> {
    match reason {
        FinishReason::Stop => Some("stop"),
        FinishReason::Length => Some("length"),
        FinishReason::Cancelled | FinishReason::Failed => None,
    }
}
