//! Bytes to a request, or an error that names the field.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::chat::ChatRequest;
use super::completions::CompletionRequest;
use super::generation::GenerationRequest;
use super::tokenize::{DetokenizeRequest, TokenizeRequest};

/// Why bytes are no request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Not JSON.
    #[error("the body is not JSON: {message}")]
    Syntax {
        /// What the parser says, with line and column.
        message: String,
    },
    /// JSON of another kind.
    #[error("the body must be a JSON object, found {found}")]
    NotAnObject {
        /// The kind of value.
        found: &'static str,
    },
    /// A field that is missing or of the wrong type.
    #[error("{}{message}", prefix(.param))]
    Field {
        /// Its path, as `messages[0].role`; `None` when the object itself is at fault.
        param: Option<String>,
        /// What was expected and found.
        message: String,
    },
}

fn prefix(param: &Option<String>) -> String {
    param
        .as_ref()
        .map(|param| format!("`{param}`: "))
        .unwrap_or_default()
}

/// A request body.
pub trait Request: DeserializeOwned {
    /// Whether [`GenerationRequest`] is part of it.
    const GENERATES: bool;

    /// The fields that it does not know.
    fn unknown(&self) -> &BTreeMap<String, Value>;
}

impl Request for ChatRequest {
    const GENERATES: bool = true;
    fn unknown(&self) -> &BTreeMap<String, Value> {
        &self.unknown
    }
}

impl Request for CompletionRequest {
    const GENERATES: bool = true;
    fn unknown(&self) -> &BTreeMap<String, Value> {
        &self.unknown
    }
}

impl Request for TokenizeRequest {
    const GENERATES: bool = false;
    fn unknown(&self) -> &BTreeMap<String, Value> {
        &self.unknown
    }
}

impl Request for DetokenizeRequest {
    const GENERATES: bool = false;
    fn unknown(&self) -> &BTreeMap<String, Value> {
        &self.unknown
    }
}

/// Reads a request body.
/// # Errors
/// [`ReadError`] names the field at fault.
pub fn read<T: Request>(body: &[u8]) -> Result<T, ReadError> {
    let value: Value = serde_json::from_slice(body).map_err(|error| ReadError::Syntax {
        message: error.to_string(),
    })?;
    if !value.is_object() {
        return Err(ReadError::NotAnObject {
            found: kind(&value),
        });
    }
    if T::GENERATES {
        // A flattened struct is read from a buffer in which paths are lost, so it is read once by itself: for its errors only.
        at_path::<GenerationRequest>(&value)?;
    }
    at_path(&value)
}

fn at_path<'de, T: Deserialize<'de>>(value: &'de Value) -> Result<T, ReadError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner().to_string();
        let object = Some(path).filter(|path| path != "." && !path.is_empty());
        let param = match (object, missing_field(&message)) {
            (Some(object), Some(field)) => Some(format!("{object}.{field}")),
            (object, field) => object.or(field),
        };
        ReadError::Field { param, message }
    })
}

/// serde reports a missing field at the object that lacks it: its name is in the message alone.
fn missing_field(message: &str) -> Option<String> {
    let name = message.strip_prefix("missing field `")?.strip_suffix('`')?;
    Some(name.to_owned())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::openai::{Content, Prompt, Role, Stop};

    fn chat(body: &str) -> Result<ChatRequest, ReadError> {
        read(body.as_bytes())
    }

    fn text(body: &str) -> Result<CompletionRequest, ReadError> {
        read(body.as_bytes())
    }

    #[test]
    fn read_when_the_body_is_whole_keeps_every_field_in_its_place() {
        let request = chat(
            r#"{"model":"m","messages":[{"role":"developer","content":[{"type":"text","text":"hi"}]},
                {"role":"user","content":"x","color":1}],"temperature":0.5,"stop":"a","midpo":{"variant":"base"},
                "chat_template_kwargs":{"a":1},"frobnicate":true}"#,
        )
        .unwrap();
        assert_eq!(request.generation.model.as_deref(), Some("m"));
        assert_eq!(request.messages[0].role, Role::Developer);
        assert!(
            matches!(request.messages[0].content, Some(Content::Parts(ref parts)) if parts.len() == 1)
        );
        assert_eq!(
            request.messages[1].unknown.keys().collect::<Vec<_>>(),
            ["color"]
        );
        assert_eq!(request.generation.stop, Some(Stop::One("a".to_owned())));
        assert_eq!(request.unknown.keys().collect::<Vec<_>>(), ["frobnicate"]);
    }

    #[test]
    fn read_when_a_field_is_wrong_names_it() {
        let cases = [
            (r#"{}"#, "messages"),
            (r#"{"messages":3}"#, "messages"),
            (r#"{"messages":[{"content":"x"}]}"#, "messages[0].role"),
            (
                r#"{"messages":[{"role":"king","content":"x"}]}"#,
                "messages[0].role",
            ),
            (
                r#"{"messages":[{"role":"user","content":5}]}"#,
                "messages[0].content",
            ),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"text","text":7}]}]}"#,
                "messages[0].content[0].text",
            ),
            (r#"{"messages":[],"temperature":"hot"}"#, "temperature"),
            (r#"{"messages":[],"n":-1}"#, "n"),
            (r#"{"messages":[],"stop":["a",3]}"#, "stop[1]"),
            (r#"{"messages":[],"logit_bias":{"5":"x"}}"#, "logit_bias.5"),
            (
                r#"{"messages":[],"stream_options":{"include_usage":3}}"#,
                "stream_options.include_usage",
            ),
            (r#"{"messages":[],"midpo":{"colour":1}}"#, "midpo.colour"),
            (
                r#"{"messages":[],"midpo":{"return_gates":"all"}}"#,
                "midpo.return_gates",
            ),
            (
                r#"{"messages":[],"midpo":{"gate_layers":[0,-1]}}"#,
                "midpo.gate_layers[1]",
            ),
            (r#"{"messages":[],"max_tokens":1.5}"#, "max_tokens"),
        ];
        for (body, want) in cases {
            match chat(body) {
                Err(ReadError::Field { param, .. }) => {
                    assert_eq!(param.as_deref(), Some(want), "{body}");
                }
                other => panic!("{body}: {other:?}"),
            }
        }
    }

    #[test]
    fn read_when_it_is_no_object_says_what_it_is() {
        assert!(matches!(chat("{\"a\":"), Err(ReadError::Syntax { .. })));
        assert!(matches!(chat("\u{0}"), Err(ReadError::Syntax { .. })));
        assert_eq!(
            chat("[1]").unwrap_err(),
            ReadError::NotAnObject { found: "a list" }
        );
        let deep = "[".repeat(100_000);
        assert!(matches!(chat(&deep), Err(ReadError::Syntax { .. })));
    }

    #[test]
    fn prompt_takes_texts_ids_and_lists_of_them_and_no_mixture() {
        let cases = [
            (r#""a""#, Prompt::Text("a".to_owned())),
            (
                r#"["a","b"]"#,
                Prompt::Texts(vec!["a".to_owned(), "b".to_owned()]),
            ),
            ("[1,2]", Prompt::Ids(vec![1, 2])),
            ("[[1],[2,3]]", Prompt::IdLists(vec![vec![1], vec![2, 3]])),
            ("[]", Prompt::Ids(vec![])),
        ];
        for (json, want) in cases {
            let request = text(&format!("{{\"prompt\":{json}}}")).unwrap();
            assert_eq!(request.prompt, want);
        }
        for (json, param) in [
            ("null", "prompt"),
            (r#"["a",1]"#, "prompt"),
            ("[-1]", "prompt[0]"),
            ("[[1,\"x\"]]", "prompt[0][1]"),
            ("[99999999999]", "prompt[0]"),
        ] {
            match text(&format!("{{\"prompt\":{json}}}")) {
                Err(ReadError::Field { param: found, .. }) => {
                    assert_eq!(found.as_deref(), Some(param), "{json}");
                }
                other => panic!("{json}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_written_request_reads_back() {
        let request = chat(r#"{"messages":[{"role":"user","content":"x"}],"top_k":-1,"midpo":{"safety_bias":1.5}}"#)
            .unwrap();
        let again: ChatRequest = read(&serde_json::to_vec(&request).unwrap()).unwrap();
        assert_eq!(
            serde_json::to_value(&again).unwrap(),
            serde_json::to_value(&request).unwrap()
        );
    }
}
