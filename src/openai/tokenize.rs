//! Tokenizing and back, as vLLM's endpoints.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::chat::ChatMessage;

/// `POST /tokenize`: of a text (`prompt`) or of a chat (`messages`).
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
pub struct TokenizeRequest {
    /// Absent: the served model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// A text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// A chat, put through the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<ChatMessage>>,
    /// Whether a text gets the tokenizer's own special tokens in front; default true. A chat's template says it itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_special_tokens: Option<bool>,
    /// Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_generation_prompt: Option<bool>,
    /// Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continue_final_message: Option<bool>,
    /// More variables for the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<BTreeMap<String, Value>>,
    /// Answer with the tokens' texts too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub return_token_strs: Option<bool>,
    /// Fields that are none of these.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub unknown: BTreeMap<String, Value>,
}

/// The ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// What a request may hold, prompt and answer together.
    pub max_model_len: usize,
    /// The ids.
    pub tokens: Vec<u32>,
    /// Their texts, where asked for.
    pub token_strs: Option<Vec<String>>,
}

/// `POST /detokenize`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
pub struct DetokenizeRequest {
    /// Absent: the served model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The ids.
    pub tokens: Vec<u32>,
    /// Fields that are none of these.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub unknown: BTreeMap<String, Value>,
}

/// The text, special tokens included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct DetokenizeResponse {
    /// The text.
    pub prompt: String,
}
