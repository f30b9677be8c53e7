//! Text completions: request, response (chunks have the same shape).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::generation::GenerationRequest;
use super::midpo::MidpoAnswer;
use super::usage::Usage;

/// `POST /v1/completions`.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct CompletionRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens to generate; default 16; 0 with `echo` only reads the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Answer with log-probabilities of this many most likely tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// Put the prompt in front of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub echo: Option<bool>,
    /// Whether a text gets the tokenizer's own special tokens in front; default true (vLLM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_special_tokens: Option<bool>,
    /// What chat completions take too.
    #[serde(flatten)]
    pub generation: GenerationRequest,
    /// Fields that are none of these.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub unknown: BTreeMap<String, Value>,
}

/// One prompt or several, as texts or as token ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Token ids.
    Ids(Vec<u32>),
    /// Several lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PromptItem {
    /// A text.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

impl Prompt {
    /// As a list.
    pub fn into_items(self) -> Vec<PromptItem> {
        match self {
            Self::Text(text) => vec![PromptItem::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(PromptItem::Text).collect(),
            Self::Ids(ids) => vec![PromptItem::Ids(ids)],
            Self::IdLists(lists) => lists.into_iter().map(PromptItem::Ids).collect(),
        }
    }
}

/// An element of a prompt that is a list.
enum Element {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Element, E> {
                u32::try_from(id)
                    .map(Element::Id)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(id), &self))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(Element::Ids(ids))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, or a list of strings, of token ids or of lists of token ids")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                let Some(first) = seq.next_element()? else {
                    return Ok(Prompt::Ids(Vec::new()));
                };
                let mut prompt = match first {
                    Element::Text(text) => Prompt::Texts(vec![text]),
                    Element::Id(id) => Prompt::Ids(vec![id]),
                    Element::Ids(ids) => Prompt::IdLists(vec![ids]),
                };
                while let Some(element) = seq.next_element()? {
                    match (&mut prompt, element) {
                        (Prompt::Texts(texts), Element::Text(text)) => texts.push(text),
                        (Prompt::Ids(ids), Element::Id(id)) => ids.push(id),
                        (Prompt::IdLists(lists), Element::Ids(ids)) => lists.push(ids),
                        _ => {
                            return Err(de::Error::custom(
                                "a list of prompts must be all strings, all token ids or all lists of token ids",
                            ));
                        }
                    }
                }
                Ok(prompt)
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

/// A whole answer, or a piece of a streamed one.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct Completion {
    /// `cmpl-` and a uuid, the same in all chunks.
    pub id: String,
    /// `text_completion`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The model as it was asked for.
    pub model: String,
    /// This program and its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_fingerprint: Option<String>,
    /// Choice `c` of prompt `p` has index `p * n + c`.
    pub choices: Vec<CompletionChoice>,
    /// In chunks only with `stream_options.include_usage`, then null but in the last. The outer option is the field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

/// One answer, or a piece of it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Which.
    pub index: u32,
    /// The text.
    pub text: String,
    /// Where asked for.
    pub logprobs: Option<TextLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<String>,
    /// Where `return_token_ids` asked for it; in a stream in the choice's first chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Where `return_token_ids` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Where `midpo.return_gates` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub midpo: Option<MidpoAnswer>,
}

/// Log-probabilities in the style of text completions: four lists of one length.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct TextLogprobs {
    /// Texts of the tokens.
    pub tokens: Vec<String>,
    /// Of the tokens; the first of an echoed prompt has none.
    pub token_logprobs: Vec<Option<f32>>,
    /// Text to log-probability of the most likely tokens, and of the token itself.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Characters before each token, counted from the start of the choice's text.
    pub text_offset: Vec<usize>,
}
