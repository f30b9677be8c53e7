//! Preference pairs, in PKU-SafeRLHF's schema (MIDPO.md 3).

use std::path::Path;

use serde_json::{Map, Value};

use super::jsonl::{BadLines, LineError, Lines, field, read, text};
use super::prompts::prompt;
use crate::text::Message;
use crate::train::TrainError;

/// Two responses to one prompt, and what was said about them.
#[derive(Clone, Debug, PartialEq)]
pub struct PairLine {
    /// The turns before the response.
    pub prompt: Vec<Message>,
    /// `response_0`, `response_1`.
    pub responses: [String; 2],
    /// `is_response_0_safe`, `is_response_1_safe`.
    pub safe: [bool; 2],
    /// `better_response_id`.
    pub better: usize,
    /// `safer_response_id`.
    pub safer: usize,
    /// `kind`, where the line says one: what tables group pairs by.
    pub kind: Option<String>,
    /// Line of the file, from 1.
    pub line: usize,
    /// The whole line.
    pub fields: Map<String, Value>,
}

impl PairLine {
    /// The response that is safe, where exactly one is.
    pub fn only_safe(&self) -> Option<usize> {
        match self.safe {
            [true, false] => Some(0),
            [false, true] => Some(1),
            _ => None,
        }
    }
}

/// Reads pairs.
///
/// # Errors
/// [`TrainError::File`], [`TrainError::Line`].
pub fn read_pairs(file: &Path, bad_lines: BadLines) -> Result<Lines<PairLine>, TrainError> {
    read(file, bad_lines, pair)
}

fn pair(fields: Map<String, Value>, line: usize) -> Result<PairLine, LineError> {
    let safe = |name| field(&fields, name, "true or false", Value::as_bool);
    let id = |name| {
        field(&fields, name, "0 or 1", |value| match value.as_u64() {
            Some(0) => Some(0),
            Some(1) => Some(1),
            _ => None,
        })
    };
    let kind = match fields.get("kind") {
        None | Some(Value::Null) => None,
        Some(_) => Some(text(&fields, "kind")?),
    };
    Ok(PairLine {
        prompt: prompt(&fields)?,
        responses: [text(&fields, "response_0")?, text(&fields, "response_1")?],
        safe: [safe("is_response_0_safe")?, safe("is_response_1_safe")?],
        better: id("better_response_id")?,
        safer: id("safer_response_id")?,
        kind,
        line,
        fields,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const GOOD: &str = r#"{"prompt": "p", "response_0": "a", "response_1": "b", "is_response_0_safe": false,
        "is_response_1_safe": true, "better_response_id": 0, "safer_response_id": 1, "kind": "k"}"#;

    fn with<T>(text: &str, get: impl FnOnce(&Path) -> T) -> T {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pairs.jsonl");
        std::fs::write(&file, text).unwrap();
        get(&file)
    }

    fn one_line(text: &str) -> String {
        text.replace('\n', " ")
    }

    #[test]
    fn a_pair_is_read_as_it_stands() {
        let lines = with(&format!("\n{}\n", one_line(GOOD)), |file| {
            read_pairs(file, BadLines::Refuse).unwrap()
        });
        let [pair] = lines.items.as_slice() else {
            panic!("{lines:?}");
        };
        assert_eq!((pair.line, pair.better, pair.safer), (2, 0, 1));
        assert_eq!(pair.only_safe(), Some(1));
        assert_eq!(pair.kind.as_deref(), Some("k"));
        assert_eq!(pair.prompt[0].role, "user");
    }

    #[test]
    fn a_bad_line_names_file_line_field_expected_and_found_or_is_counted() {
        for (from, to, words) in [
            ("\"prompt\": \"p\", ", "", "`prompt`: expected a string"),
            ("\"a\"", "7", "`response_0`: expected a string, found 7"),
            (
                "\"is_response_0_safe\": false",
                "\"is_response_0_safe\": \"no\"",
                "`is_response_0_safe`: expected true or false, found \"no\"",
            ),
            (
                "\"safer_response_id\": 1",
                "\"safer_response_id\": 2",
                "`safer_response_id`: expected 0 or 1, found 2",
            ),
            ("\"k\"}", "\"k\"", "expected a JSON object, found no JSON"),
            ("\"k\"", "[]", "`kind`: expected a string, found []"),
        ] {
            let good = one_line(GOOD);
            let text = format!("{good}\n{}\n", good.replace(from, to));
            with(&text, |file| {
                let error = read_pairs(file, BadLines::Refuse).unwrap_err().to_string();
                let place = format!("{}: line 2: ", file.display());
                assert!(
                    error.starts_with(&place) && error.contains(words),
                    "{error}"
                );
                let skipped = read_pairs(file, BadLines::Skip).unwrap();
                assert_eq!((skipped.items.len(), skipped.bad), (1, 1), "{words}");
            });
        }
    }
}
