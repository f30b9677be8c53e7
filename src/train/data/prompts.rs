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
    let value = field(object, "prompt", "a string or a list of messages", Some)?;
    match value {
        Value::String(words) => Ok(vec![message("user", words)]),
        other => messages("prompt", other),
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
