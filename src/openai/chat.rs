//! Chat completions: request, response, chunk.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::generation::GenerationRequest;
use super::logprobs::ChatLogprobs;
use super::midpo::MidpoAnswer;
use super::usage::Usage;

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
pub struct ChatRequest {
    /// The turns so far, at least one.
    pub messages: Vec<ChatMessage>,
    /// Most tokens to generate; OpenAI's older name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Most tokens to generate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_completion_tokens: Option<u32>,
    /// Answer with log-probabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<bool>,
    /// And with those of this many most likely tokens, at most 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<u32>,
    /// End the prompt where the assistant's answer begins; default true (vLLM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_generation_prompt: Option<bool>,
    /// Go on with the last message instead of answering it; default false (vLLM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continue_final_message: Option<bool>,
    /// More variables for the template (vLLM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<BTreeMap<String, Value>>,
    /// What text completions take too.
    #[serde(flatten)]
    pub generation: GenerationRequest,
    /// Fields that are none of these.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub unknown: BTreeMap<String, Value>,
}

/// One turn.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    #[serde(default)]
    pub content: Option<Content>,
    /// Which of several speakers of one role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Fields that are none of these.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub unknown: BTreeMap<String, Value>,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The operator.
    System,
    /// The operator, in OpenAI's newer word.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// A tool's result: not served yet.
    Tool,
    /// A function's result: not served.
    Function,
}

impl Role {
    /// The word that chat templates know.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System | Self::Developer => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
            Self::Function => "function",
        }
    }
}

/// A string, or parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// A string.
    Text(String),
    /// Parts, of which only texts are served.
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct ContentPart {
    /// `text`; all others are refused.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

// By hand and not untagged: an untagged enum loses the place of an error.
impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct ChatResponse {
    /// `chatcmpl-` and a uuid.
    pub id: String,
    /// `chat.completion`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The model as it was asked for.
    pub model: String,
    /// This program and its version: answers to one seed are equal within it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_fingerprint: Option<String>,
    /// By index.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: Usage,
    /// Where `return_token_ids` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Below `n`.
    pub index: u32,
    /// What was said.
    pub message: ResponseMessage,
    /// Where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<String>,
    /// Where `return_token_ids` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Where `midpo.return_gates` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub midpo: Option<MidpoAnswer>,
}

/// The assistant's turn.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct ResponseMessage {
    /// `assistant`.
    pub role: String,
    /// What it said.
    pub content: Option<String>,
    /// Always null.
    pub refusal: Option<String>,
}

/// A piece of a streamed answer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct ChatChunk {
    /// The same in all chunks.
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: String,
    /// The same in all chunks.
    pub created: u64,
    /// The model as it was asked for.
    pub model: String,
    /// This program and its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_fingerprint: Option<String>,
    /// One choice; none in the chunk with the usage.
    pub choices: Vec<ChatChunkChoice>,
    /// With `stream_options.include_usage`: null but in the last chunk. The outer option is the field, the inner its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    /// In the first chunk, where `return_token_ids` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// A piece of one answer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct ChatChunkChoice {
    /// Below `n`.
    pub index: u32,
    /// What is new.
    pub delta: Delta,
    /// Of this chunk's tokens.
    pub logprobs: Option<ChatLogprobs>,
    /// In the last chunk of the choice.
    pub finish_reason: Option<String>,
    /// This chunk's tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Gates of this chunk's tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub midpo: Option<MidpoAnswer>,
}

/// What is new in a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct Delta {
    /// In the first chunk of a choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// More text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}
