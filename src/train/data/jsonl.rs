//! Files with one JSON object a line.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;

use serde_json::{Map, Value};

use crate::train::TrainError;

/// A line: the longest prompts and answers together are a thousandth of this.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// Characters of a wrong value that a message shows.
const SHOWN_MAX: usize = 60;

/// What to do about a line that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadLines {
    /// Stop.
    Refuse,
    /// Count it.
    Skip,
}

/// Why a line cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineError {
    /// The field; empty: the line as a whole.
    pub field: String,
    /// What is legal.
    pub expected: String,
    /// What came.
    pub found: String,
}

impl LineError {
    /// About a field.
    pub fn new(field: &str, expected: &str, found: impl Into<String>) -> Self {
        Self {
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.into(),
        }
    }

    fn at(self, file: &Path, line: usize) -> TrainError {
        TrainError::Line {
            file: file.to_owned(),
            line,
            field: self.field,
            expected: self.expected,
            found: self.found,
        }
    }
}

/// The lines of a file that can be used.
#[derive(Clone, Debug)]
pub struct Lines<T> {
    /// In the order of the file.
    pub items: Vec<T>,
    /// Lines that could not be used.
    pub bad: usize,
}

/// Reads every line of `file` with `parse`, which gets the object and the line's number, from 1. Empty lines are passed over.
///
/// # Errors
/// [`TrainError::File`]; [`TrainError::Line`] of the first bad line, unless they are skipped.
pub(super) fn read<T>(
    file: &Path,
    bad_lines: BadLines,
    parse: impl Fn(Map<String, Value>, usize) -> Result<T, LineError>,
) -> Result<Lines<T>, TrainError> {
    let opened = File::open(file).map_err(TrainError::file(file))?;
    let mut reader = BufReader::new(opened);
    let mut lines = Lines {
        items: Vec::new(),
        bad: 0,
    };
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        let read = reader
            .by_ref()
            .take(LINE_BYTES_MAX + 1)
            .read_until(b'\n', &mut bytes);
        if read.map_err(TrainError::file(file))? == 0 {
            break;
        }
        if bytes.len() as u64 > LINE_BYTES_MAX {
            // What follows is the rest of this line: there is no next one to go on with.
            let expected = format!("at most {LINE_BYTES_MAX} bytes");
            return Err(LineError::new("", &expected, "more").at(file, number));
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match object(&bytes).and_then(|object| parse(object, number)) {
            Ok(item) => lines.items.push(item),
            Err(_) if bad_lines == BadLines::Skip => lines.bad += 1,
            Err(error) => return Err(error.at(file, number)),
        }
    }
    Ok(lines)
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, LineError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(LineError::new("", "a JSON object", shown(&other))),
        Err(error) => {
            let found = format!("no JSON ({error})");
            Err(LineError::new("", "a JSON object", found))
        }
    }
}

/// A value as a message shows it.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((at, _)) => format!("{}...", text.get(..at).unwrap_or_default()),
        None => text,
    }
}

/// The value of a field, read by `get`.
pub(super) fn field<'a, T>(
    object: &'a Map<String, Value>,
    name: &str,
    expected: &str,
    get: impl FnOnce(&'a Value) -> Option<T>,
) -> Result<T, LineError> {
    let value = object
        .get(name)
        .ok_or_else(|| LineError::new(name, expected, "none"))?;
    get(value).ok_or_else(|| LineError::new(name, expected, shown(value)))
}

/// A field that is text.
pub(super) fn text(object: &Map<String, Value>, name: &str) -> Result<String, LineError> {
    field(object, name, "a string", Value::as_str).map(str::to_owned)
}
