//! Prompts, and prompts with one answer.

use std::path::Path;

use serde_json::{Map, Value};

use super::jsonl::{BadLines, LineError, Lines, field, read, shown, text};
use crate::text::Message;
use crate::train::TrainError;

/// A prompt and its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    /// The turns before the answer.
    pub prompt: Vec<Message>,
    /// The answer.
    pub response: String,
    /// Line of the file, from 1.
    pub line: usize,
}

/// Reads lines of `{prompt, response}` (the prompt a string, or a list of messages) or `{messages}`, whose last turn is the answer.
///
/// # Errors
/// [`TrainError::File`], [`TrainError::Line`].
pub fn read_exchanges(file: &Path, bad_lines: BadLines) -> Result<Lines<Exchange>, TrainError> {
    read(file, bad_lines, exchange)
}

fn exchange(object: Map<String, Value>, line: usize) -> Result<Exchange, LineError> {
    let Some(turns) = object.get("messages") else {
        return Ok(Exchange {
            prompt: prompt(&object)?,
            response: text(&object, "response")?,
            line,
        });
    };
    let mut turns = messages("messages", turns)?;
    let last = turns.pop().filter(|turn| turn.role == "assistant");
    let last = last.ok_or_else(|| {
        let expected = "an assistant's turn at the end";
        LineError::new("messages", expected, "another")
    })?;
    if turns.is_empty() {
        let expected = "a turn before the assistant's";
        return Err(LineError::new("messages", expected, "none"));
    }
    Ok(Exchange {
        prompt: turns,
        response: last.content,
        line,
    })
}

/// The field `prompt`: a user's words, or a list of messages.
pub(super) fn prompt(object: &Map<String, Value>) -> Result<Vec<Message>, LineError> {
    let expected = "a string or a list of {role, content}";
    match field(object, "prompt", expected, Some)? {
        Value::String(words) => Ok(vec![message("user", words)]),
        list @ Value::Array(_) => messages("prompt", list),
        other => Err(LineError::new("prompt", expected, shown(other))),
    }
}

fn messages(name: &str, value: &Value) -> Result<Vec<Message>, LineError> {
    let expected = "a list of {role, content}, both strings";
    let wrong = || LineError::new(name, expected, shown(value));
    let list = value.as_array().filter(|list| !list.is_empty());
    let turn = |turn: &Value| {
        let role = turn.get("role")?.as_str()?;
        Some(message(role, turn.get("content")?.as_str()?))
    };
    let turns = list.ok_or_else(wrong)?.iter().map(turn);
    turns.collect::<Option<Vec<_>>>().ok_or_else(wrong)
}

pub(crate) fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.to_owned(),
        content: content.to_owned(),
        ..Message::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn parse(line: Value) -> Result<Exchange, LineError> {
        exchange(line.as_object().unwrap().clone(), 1)
    }

    #[test]
    fn an_exchange_is_a_prompt_and_a_response_or_turns_of_which_the_last_answers() {
        let plain = parse(json!({"prompt": "p", "response": "r"})).unwrap();
        assert_eq!((plain.prompt.len(), plain.response.as_str()), (1, "r"));
        let turns = json!([
            {"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
        ]);
        let chat = parse(json!({"messages": turns})).unwrap();
        assert_eq!((chat.prompt.len(), chat.response.as_str()), (2, "a"));
        let several = parse(json!({"prompt": turns, "response": "r"})).unwrap();
        assert_eq!(several.prompt.len(), 3);
    }

    #[test]
    fn what_is_no_exchange_names_its_field() {
        let user = json!({"role": "user", "content": "u"});
        let assistant = json!({"role": "assistant", "content": "a"});
        for (line, field, expected) in [
            (json!({"prompt": "p"}), "response", "a string"),
            (json!({"response": "r"}), "prompt", "a string or a list"),
            (
                json!({"prompt": 3, "response": "r"}),
                "prompt",
                "a string or a list",
            ),
            (
                json!({"prompt": [3], "response": "r"}),
                "prompt",
                "a list of {role",
            ),
            (
                json!({"messages": [user]}),
                "messages",
                "an assistant's turn at the end",
            ),
            (
                json!({"messages": [assistant]}),
                "messages",
                "a turn before",
            ),
            (json!({"messages": []}), "messages", "a list of {role"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.field, field);
            assert!(error.expected.starts_with(expected), "{error:?}");
        }
    }
}
