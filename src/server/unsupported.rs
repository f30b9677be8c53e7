//! Fields of OpenAI's API, and of vLLM's, that this server does not honour. They are refused unless their value asks for nothing:
//! a client that asks for tools and gets prose would be misled. Fields that nobody knows are ignored, and named in the log.

use std::collections::BTreeMap;

use serde_json::Value;

use super::error::ApiError;

/// The values with which a field asks for nothing, beside null.
#[derive(Clone, Copy)]
enum Neutral {
    /// None but null.
    Null,
    /// An empty list, object or string.
    Empty,
    /// `false`.
    False,
    /// `true`.
    True,
    /// This number.
    Number(i64),
    /// One of these words.
    Words(&'static [&'static str]),
    /// `{"type": "text"}`.
    TextFormat,
    /// `["text"]`.
    TextOnly,
    /// Every value: a hint that changes no answer.
    Any,
}

impl Neutral {
    fn covers(self, value: &Value) -> bool {
        let neutral = match self {
            Self::Null => false,
            Self::Any => true,
            Self::Empty => match value {
                Value::String(text) => text.is_empty(),
                Value::Array(list) => list.is_empty(),
                Value::Object(object) => object.is_empty(),
                _ => false,
            },
            Self::False => value == &Value::Bool(false),
            Self::True => value == &Value::Bool(true),
            Self::Number(number) => value.as_f64() == Some(number as f64),
            Self::Words(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Self::TextFormat => value.get("type").and_then(Value::as_str) == Some("text"),
            Self::TextOnly => value
                .as_array()
                .is_some_and(|list| list.iter().all(|item| item == "text")),
        };
        neutral || value.is_null()
    }

    fn hint(self) -> &'static str {
        match self {
            Self::Null | Self::Any => "",
            Self::Empty => "leave it out or empty",
            Self::False => "only false is",
            Self::True => "only true is",
            Self::Number(0) => "only 0 is",
            Self::Number(_) => "only 1 is",
            Self::Words(_) => "leave it out",
            Self::TextFormat => "only {\"type\": \"text\"} is",
            Self::TextOnly => "only [\"text\"] is",
        }
    }
}

const KNOWN: &[(&str, Neutral)] = &[
    // OpenAI
    ("audio", Neutral::Null),
    ("best_of", Neutral::Number(1)),
    ("function_call", Neutral::Words(&["none"])),
    ("functions", Neutral::Empty),
    ("metadata", Neutral::Empty),
    ("modalities", Neutral::TextOnly),
    ("moderation", Neutral::Null),
    ("parallel_tool_calls", Neutral::Null),
    ("prediction", Neutral::Null),
    ("prompt_cache_key", Neutral::Any),
    (
        "prompt_cache_retention",
        Neutral::Words(&["in-memory", "in_memory"]),
    ),
    ("reasoning_effort", Neutral::Words(&["none"])),
    ("response_format", Neutral::TextFormat),
    ("safety_identifier", Neutral::Any),
    ("service_tier", Neutral::Words(&["auto", "default"])),
    ("store", Neutral::False),
    ("suffix", Neutral::Empty),
    ("tool_choice", Neutral::Words(&["none"])),
    ("tools", Neutral::Empty),
    ("verbosity", Neutral::Null),
    ("web_search_options", Neutral::Null),
    // vLLM
    ("allowed_token_ids", Neutral::Null),
    ("bad_words", Neutral::Empty),
    ("chat_template", Neutral::Null),
    ("documents", Neutral::Empty),
    ("guided_choice", Neutral::Null),
    ("guided_decoding_backend", Neutral::Null),
    ("guided_grammar", Neutral::Null),
    ("guided_json", Neutral::Null),
    ("guided_regex", Neutral::Null),
    ("guided_whitespace_pattern", Neutral::Null),
    ("kv_transfer_params", Neutral::Null),
    ("length_penalty", Neutral::Number(1)),
    ("logits_processors", Neutral::Empty),
    ("mm_processor_kwargs", Neutral::Null),
    ("priority", Neutral::Number(0)),
    ("prompt_embeds", Neutral::Null),
    ("prompt_logprobs", Neutral::Null),
    ("repetition_detection", Neutral::Null),
    ("return_tokens_as_token_ids", Neutral::False),
    ("spaces_between_special_tokens", Neutral::True),
    ("structured_outputs", Neutral::Null),
    ("thinking_token_budget", Neutral::Null),
    ("truncate_prompt_tokens", Neutral::Null),
    ("use_beam_search", Neutral::False),
    // Of the other kind of completion: a chat has no `echo` and no `prompt`, a text no `messages`.
    ("add_generation_prompt", Neutral::Null),
    ("chat_template_kwargs", Neutral::Null),
    ("continue_final_message", Neutral::Null),
    ("add_special_tokens", Neutral::False),
    ("echo", Neutral::False),
    ("max_completion_tokens", Neutral::Null),
    ("messages", Neutral::Null),
    ("prompt", Neutral::Null),
    ("top_logprobs", Neutral::Null),
];

/// Of a message.
const KNOWN_OF_MESSAGES: &[(&str, Neutral)] = &[
    ("annotations", Neutral::Empty),
    ("audio", Neutral::Null),
    ("function_call", Neutral::Null),
    ("refusal", Neutral::Null),
    ("tool_call_id", Neutral::Null),
    ("tool_calls", Neutral::Empty),
];

/// # Errors
/// [`ApiError::Unsupported`] names the first field that would have to be honoured.
pub fn refuse(unknown: &BTreeMap<String, Value>) -> Result<(), ApiError> {
    check(KNOWN, unknown, "")?;
    let ignored = others(KNOWN, unknown);
    if !ignored.is_empty() {
        tracing::debug!(fields = ?ignored, "unknown fields are ignored");
    }
    Ok(())
}

/// As [`refuse`], for the message at `at`.
/// # Errors
/// [`ApiError::Unsupported`].
pub fn refuse_in_message(at: usize, unknown: &BTreeMap<String, Value>) -> Result<(), ApiError> {
    check(KNOWN_OF_MESSAGES, unknown, &format!("messages[{at}]."))
}

/// The fields of a message that a chat template may look at.
pub fn template_fields(unknown: BTreeMap<String, Value>) -> impl Iterator<Item = (String, Value)> {
    unknown
        .into_iter()
        .filter(|(name, _)| find(KNOWN_OF_MESSAGES, name).is_none())
}

fn find(known: &[(&str, Neutral)], name: &str) -> Option<Neutral> {
    let entry = known.iter().find(|(known, _)| *known == name);
    entry.map(|(_, neutral)| *neutral)
}

fn check(
    known: &[(&str, Neutral)],
    fields: &BTreeMap<String, Value>,
    prefix: &str,
) -> Result<(), ApiError> {
    for (name, value) in fields {
        if let Some(neutral) = find(known, name).filter(|neutral| !neutral.covers(value)) {
            return Err(ApiError::unsupported(
                format!("{prefix}{name}"),
                neutral.hint(),
            ));
        }
    }
    Ok(())
}

/// Names only: the values are the client's own.
fn others(known: &[(&str, Neutral)], fields: &BTreeMap<String, Value>) -> Vec<String> {
    /// Names that one request can put in the log.
    const LOGGED_MAX: usize = 32;
    let unknown = fields.keys().filter(|name| find(known, name).is_none());
    unknown
        .take(LOGGED_MAX)
        .map(|name| super::error::echo(name))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn fields(json: &str) -> BTreeMap<String, Value> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn fields_that_ask_for_something_are_refused_by_name() {
        for (json, param) in [
            (r#"{"tools":[{"type":"function"}]}"#, "tools"),
            (r#"{"tool_choice":"auto"}"#, "tool_choice"),
            (
                r#"{"response_format":{"type":"json_object"}}"#,
                "response_format",
            ),
            (r#"{"modalities":["text","audio"]}"#, "modalities"),
            (r#"{"audio":{}}"#, "audio"),
            (r#"{"prediction":{"type":"content"}}"#, "prediction"),
            (r#"{"best_of":3}"#, "best_of"),
            (r#"{"store":true}"#, "store"),
            (r#"{"guided_json":{}}"#, "guided_json"),
        ] {
            let error = refuse(&fields(json)).unwrap_err();
            assert_eq!(error.body().error.param.as_deref(), Some(param), "{json}");
        }
    }

    #[test]
    fn fields_that_ask_for_nothing_pass() {
        for json in [
            r#"{"tools":[],"tool_choice":"none","functions":null,"response_format":{"type":"text"}}"#,
            r#"{"modalities":["text"],"store":false,"best_of":1,"service_tier":"auto","suffix":""}"#,
            r#"{"nobody":{"knows":["this"]}}"#,
            r#"{"audio":null,"prompt_cache_key":"k","length_penalty":1.0}"#,
        ] {
            assert!(refuse(&fields(json)).is_ok(), "{json}");
        }
        assert_eq!(
            others(KNOWN, &fields(r#"{"a":1,"tools":[],"b":2}"#)),
            ["a", "b"]
        );
    }

    #[test]
    fn tool_calls_of_a_message_are_refused_at_their_place() {
        let error = refuse_in_message(3, &fields(r#"{"tool_calls":[{}]}"#)).unwrap_err();
        let param = error.body().error.param;
        assert_eq!(param.as_deref(), Some("messages[3].tool_calls"));
        let kept = template_fields(fields(r#"{"tool_calls":[],"reasoning_content":"x"}"#));
        assert_eq!(
            kept.map(|(name, _)| name).collect::<Vec<_>>(),
            ["reasoning_content"]
        );
    }
}
