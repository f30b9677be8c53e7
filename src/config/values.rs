//! The values that flags, environment and file write as words: lengths of time, sizes, closed sets.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::types::Variant;

/// A length of time: `30s`, `1m 30s`, `500ms`, or a number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeSpan(pub Duration);

impl FromStr for TimeSpan {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let expected = || format!("expected a time such as `30s`, `500ms` or `2m`, found `{word}`");
        let span = if word
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.')
        {
            let seconds: f64 = word.parse().map_err(|_| expected())?;
            Duration::try_from_secs_f64(seconds).map_err(|_| expected())?
        } else {
            let signed: jiff::SignedDuration = word.parse().map_err(|_| expected())?;
            Duration::try_from(signed).map_err(|_| expected())?
        };
        Ok(Self(span))
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.subsec_millis() {
            0 => write!(f, "{}s", self.0.as_secs()),
            _ => write!(f, "{}ms", self.0.as_millis()),
        }
    }
}

/// A size in bytes: `512MiB`, `4GiB`, `100kB`, or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl ByteSize {
    const UNITS: [(&'static str, u64); 9] = [
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
        ("GB", 1_000_000_000),
        ("MB", 1_000_000),
        ("kB", 1_000),
        ("TiB", 1 << 40),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let expected = || {
            format!("expected a size such as `512MiB`, `4GiB` or a number of bytes, found `{word}`")
        };
        let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = word.get(digits.len()..).unwrap_or_default();
        let factor = if unit.is_empty() {
            1
        } else {
            let known = |(name, _): &&(&str, u64)| name.eq_ignore_ascii_case(unit);
            Self::UNITS.iter().find(known).ok_or_else(expected)?.1
        };
        let number: u64 = digits.trim_end().parse().map_err(|_| expected())?;
        number.checked_mul(factor).map(Self).ok_or_else(expected)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, factor) in &Self::UNITS[..3] {
            if self.0 != 0 && self.0.is_multiple_of(*factor) {
                return write!(f, "{}{name}", self.0 / factor);
            }
        }
        self.0.fmt(f)
    }
}

/// A variant by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VariantName(pub Variant);

impl FromStr for VariantName {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Variant::parse(word).map(Self).ok_or_else(|| {
            let names = Variant::ALL.map(Variant::as_str).join(", ");
            format!("expected one of {names}, found `{word}`")
        })
    }
}

impl fmt::Display for VariantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// A key that a client presents. Its `Debug` shows nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl FromStr for Secret {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let printable = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_graphic());
        // The key itself is not repeated: error messages end in logs.
        let expected = "expected a key of printable ASCII characters without spaces";
        printable
            .then(|| Self(word.to_owned()))
            .ok_or_else(|| expected.to_owned())
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Serde by way of `FromStr` and `Display`, so that a file and a flag read a value alike. A file may write it as a number.
macro_rules! serde_as_text {
    ($($name:ty),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Text(std::marker::PhantomData))
            }
        }
    )*};
}

serde_as_text!(TimeSpan, ByteSize, VariantName, Secret);

struct Text<T>(std::marker::PhantomData<T>);

impl<T: FromStr<Err = String>> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a number")
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<T, E> {
        word.parse().map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

/// In which format weights are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightDType {
    /// As stored in the files.
    #[default]
    Auto,
    /// Widened to f32; quantised weights stay quantised.
    F32,
    /// Rounded to bf16; quantised weights stay quantised.
    Bf16,
    /// Quantised to 8 bits (8.5 with scales) in blocks of 32, whatever they were.
    #[serde(rename = "q8_0")]
    #[value(name = "q8_0")]
    Q8_0,
    /// Quantised to 4 bits (5 with scales and minima), embedding and head to 8.
    #[serde(rename = "q4_1")]
    #[value(name = "q4_1")]
    Q4_1,
    /// Quantised to 4 bits (4.5 with scales), embedding and head to 8: fastest, least exact.
    #[serde(rename = "q4_0")]
    #[value(name = "q4_0")]
    Q4_0,
}

/// In which format K and V are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDType {
    /// Half the memory.
    #[default]
    Bf16,
    /// Exact. On a CPU only.
    F32,
    /// A quarter: a byte a number (e4m3), a scale a head. On a GPU only.
    Fp8,
    /// A quarter: a byte a number (an integer), a scale a head. On a CPU only.
    Int8,
}

impl KvDType {
    /// As it is written in settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
        }
    }
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The best one that this build and machine have.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_spans_read_units_and_plain_seconds() {
        for (word, millis) in [
            ("30s", Some(30_000)),
            ("500ms", Some(500)),
            ("2m", Some(120_000)),
            ("1m 30s", Some(90_000)),
            ("1.5", Some(1_500)),
            ("0", Some(0)),
            ("-1s", None),
            ("", None),
            ("soon", None),
            ("99999999999999999999999", None),
        ] {
            let span = word.parse::<TimeSpan>().ok();
            assert_eq!(span.map(|span| span.0.as_millis()), millis, "{word}");
        }
    }

    #[test]
    fn sizes_read_units_and_are_written_in_the_largest_that_divides() {
        for (word, bytes) in [
            ("4GiB", Some(4 << 30)),
            ("512 MiB", Some(512 << 20)),
            ("1mb", Some(1_000_000)),
            ("17", Some(17)),
            ("GiB", None),
            ("1.5GiB", None),
            ("99999999999GiB", None),
            ("-1", None),
        ] {
            assert_eq!(
                word.parse::<ByteSize>().ok().map(|size| size.0),
                bytes,
                "{word}"
            );
        }
        for (bytes, word) in [
            (4 << 30, "4GiB"),
            (1536 << 20, "1536MiB"),
            (17, "17"),
            (0, "0"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), word);
        }
    }

    #[test]
    fn secrets_are_never_shown() {
        assert_eq!(format!("{:?}", Secret("sk-1".into())), "Secret");
        let error = "two words".parse::<Secret>().err();
        assert!(error.is_some_and(|error| !error.contains("two")));
    }
}
