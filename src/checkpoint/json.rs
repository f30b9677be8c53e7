//! JSON objects whose every value is asked for by key, with its bounds: what does not fit is an error that names file and key.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::CheckpointError;

/// Characters of a bad value that an error repeats.
const SHOWN_MAX: usize = 80;

/// A JSON object of a file. `null` is as good as absent.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    file: PathBuf,
    /// Of the keys in messages: empty, or `outer.`.
    prefix: String,
    map: Map<String, Value>,
}

impl Object {
    /// Parses a file whose top is an object.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] when it is not JSON, or something else.
    pub(crate) fn parse(file: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let malformed = |reason: String| CheckpointError::malformed(file, reason);
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Self {
                file: file.to_path_buf(),
                prefix: String::new(),
                map,
            }),
            Ok(other) => Err(malformed(format!(
                "expected a JSON object, found {}",
                show(&other)
            ))),
            Err(error) => Err(malformed(format!("expected JSON: {error}"))),
        }
    }

    /// The value of `key`, unless absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// All keys and values.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    /// The error that `key` is not what was `expected`.
    pub(crate) fn error(&self, key: &str, expected: impl Into<String>) -> CheckpointError {
        CheckpointError::Value {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            found: self.get(key).map_or("nothing".to_owned(), show),
        }
    }

    /// A nested object; absent is `None`.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                file: self.file.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
            })),
            Some(_) => Err(self.error(key, "an object")),
        }
    }

    /// A whole number within `bounds`; absent is `None`.
    pub(crate) fn count_optional(
        &self,
        key: &str,
        bounds: RangeInclusive<usize>,
    ) -> Result<Option<usize>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .filter(|count| bounds.contains(count))
            .map(Some)
            .ok_or_else(|| self.error(key, count_bounds(&bounds)))
    }

    /// A whole number within `bounds`, which must be there.
    pub(crate) fn count(
        &self,
        key: &str,
        bounds: RangeInclusive<usize>,
    ) -> Result<usize, CheckpointError> {
        self.count_optional(key, bounds.clone())?
            .ok_or_else(|| self.error(key, count_bounds(&bounds)))
    }

    /// A number for which `legal` holds, which `expected` describes; absent is `None`.
    pub(crate) fn number_optional(
        &self,
        key: &str,
        expected: &str,
        legal: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .filter(|number| number.is_finite() && legal(*number))
            .map(Some)
            .ok_or_else(|| self.error(key, expected))
    }

    /// As [`Object::number_optional`], and must be there.
    pub(crate) fn number(
        &self,
        key: &str,
        expected: &str,
        legal: impl Fn(f64) -> bool,
    ) -> Result<f64, CheckpointError> {
        self.number_optional(key, expected, legal)?
            .ok_or_else(|| self.error(key, expected))
    }

    /// True or false; absent is `None`.
    pub(crate) fn truth(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(truth)) => Ok(Some(*truth)),
            Some(_) => Err(self.error(key, "true or false")),
        }
    }

    /// A string; absent is `None`.
    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(string)) => Ok(Some(string)),
            Some(_) => Err(self.error(key, "a string")),
        }
    }

    /// Refuses what turns on arithmetic that this server does not compute: anything but absent, null, false, or empty.
    pub(crate) fn refuse(&self, key: &str, why: &str) -> Result<(), CheckpointError> {
        let off = match self.get(key) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if off {
            Ok(())
        } else {
            Err(self.error(key, format!("none, since {why}")))
        }
    }
}

fn count_bounds(bounds: &RangeInclusive<usize>) -> String {
    format!("a whole number from {} to {}", bounds.start(), bounds.end())
}

/// A value as an error repeats it.
pub(crate) fn show(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
