//! What is asked: random words of a wanted length in tokens, or the lines of a file.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::client::Target;
use super::error::BenchError;
use crate::random::SplitMix64;

/// Largest file of prompts.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Corrections of a prompt's length at most; most are right after one.
const CORRECTIONS_MAX: usize = 4;
/// Words counted to learn how many tokens a word is.
const SAMPLE_WORDS: usize = 400;

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PromptSource {
    /// Random words, all prompts different, so that no prefix cache helps.
    Words {
        /// Wanted length; in words where the server cannot count.
        tokens: usize,
        /// Of the words.
        seed: u64,
    },
    /// One JSON object with `prompt` a line, or plain text, one prompt a line; taken again from the start when they run out.
    File(PathBuf),
}

/// `count` prompts. Lengths are held to the server's own `/tokenize` where it has one.
///
/// # Errors
/// A file that cannot be read, is too large, has no prompt, or has an object without `prompt`.
pub async fn prepare(
    source: &PromptSource,
    target: &Target,
    count: usize,
) -> Result<Vec<String>, BenchError> {
    match source {
        PromptSource::File(file) => Ok(from_file(file)?.into_iter().cycle().take(count).collect()),
        PromptSource::Words { tokens, seed } => Ok(of_length(target, *tokens, *seed, count).await),
    }
}

async fn of_length(target: &Target, tokens: usize, seed: u64, count: usize) -> Vec<String> {
    let sample = words(seed, u64::MAX, SAMPLE_WORDS);
    let Some(counted) = target.count_tokens(&sample).await.filter(|n| *n > 0) else {
        return (0..count as u64)
            .map(|index| words(seed, index, tokens.max(1)))
            .collect();
    };
    let ratio = counted as f64 / SAMPLE_WORDS as f64;
    let mut prompts = Vec::with_capacity(count);
    for index in 0..count as u64 {
        let mut length = ((tokens as f64 / ratio).round() as usize).max(1);
        // Words of several tokens step over some lengths: the closest found is taken.
        let (mut best, mut off) = (length, usize::MAX);
        for _ in 0..CORRECTIONS_MAX {
            let Some(found) = target.count_tokens(&words(seed, index, length)).await else {
                break;
            };
            if found.abs_diff(tokens) < off {
                (best, off) = (length, found.abs_diff(tokens));
            }
            if off == 0 {
                break;
            }
            let change = (tokens as f64 - found as f64) / ratio;
            // At least one word in the right direction: less than one token a word rounds to none.
            let change = change.abs().max(1.0).round().copysign(change);
            length = length.saturating_add_signed(change as isize).max(1);
        }
        prompts.push(words(seed, index, best));
    }
    prompts
}

/// `count` words that depend on (seed, index) alone; a shorter text is a prefix of a longer one.
fn words(seed: u64, index: u64, count: usize) -> String {
    let mut random = SplitMix64::new(seed, index);
    let word = |_| WORDS[random.below(WORDS.len())];
    (0..count).map(word).collect::<Vec<_>>().join(" ")
}

fn from_file(file: &Path) -> Result<Vec<String>, BenchError> {
    let io = |source| BenchError::File {
        file: file.to_owned(),
        source,
    };
    let bad = |line, expected, found| BenchError::Prompts {
        file: file.to_owned(),
        line,
        expected,
        found,
    };
    let bytes = std::fs::metadata(file).map_err(io)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(bad(0, "at most 256 MiB", format!("{bytes} bytes")));
    }
    let text = std::fs::read_to_string(file).map_err(io)?;
    let prompts: Vec<String> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            from_line(line).ok_or_else(|| {
                let found = "an object without it".to_owned();
                bad(
                    index + 1,
                    "text, or an object with a string `prompt`",
                    found,
                )
            })
        })
        .collect::<Result<_, _>>()?;
    if prompts.is_empty() {
        return Err(bad(0, "at least one prompt", "none".to_owned()));
    }
    Ok(prompts)
}

/// `None`: a JSON object without a string `prompt`. What is no JSON object is a prompt as it stands.
fn from_line(line: &str) -> Option<String> {
    match serde_json::from_str(line) {
        Ok(Value::Object(object)) => object.get("prompt")?.as_str().map(str::to_owned),
        _ => Some(line.to_owned()),
    }
}

/// Common words: one token each in most vocabularies, in any order no sense.
const WORDS: [&str; 96] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part", "place",
    "case", "week", "company", "system", "program", "question", "work", "number", "night", "point",
    "home", "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right",
    "study", "book", "eye", "job", "word", "business", "issue", "side", "kind", "head", "house",
    "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law", "car",
    "city", "name", "team", "minute", "idea", "kid", "body", "back", "parent", "face", "level",
    "office", "door", "health", "person", "art", "war", "history", "party", "result", "change",
    "morning", "reason", "research", "girl", "guy", "moment", "air", "teacher", "force", "foot",
    "boy",
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn words_depend_on_seed_and_index_alone_and_grow_at_the_end() {
        assert_eq!(words(1, 2, 9), words(1, 2, 9));
        assert_ne!(words(1, 2, 9), words(1, 3, 9));
        assert!(words(1, 2, 9).starts_with(&words(1, 2, 8)));
        assert_eq!(words(1, 2, 9).split(' ').count(), 9);
    }

    #[test]
    fn from_line_takes_objects_with_a_prompt_and_plain_text() {
        for (line, want) in [
            (r#"{"prompt": "a\nb", "n": 1}"#, Some("a\nb")),
            (r#"{"text": "a"}"#, None),
            (r#"{"prompt": 3}"#, None),
            ("What is this?", Some("What is this?")),
            ("{not json", Some("{not json")),
            ("42", Some("42")),
        ] {
            assert_eq!(from_line(line).as_deref(), want, "{line}");
        }
    }

    #[test]
    fn from_file_names_the_line_that_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.jsonl");
        std::fs::write(&file, "one\n\n{\"prompt\":\"two\"}\n").unwrap();
        assert_eq!(from_file(&file).unwrap(), ["one", "two"]);
        std::fs::write(&file, "one\n{\"x\":1}\n").unwrap();
        let error = from_file(&file).unwrap_err().to_string();
        assert!(error.contains("prompts.jsonl:2: expected text"), "{error}");
        std::fs::write(&file, "\n").unwrap();
        assert!(from_file(&file).is_err());
        folder.close().unwrap();
        assert!(matches!(from_file(&file), Err(BenchError::File { .. })));
    }
}
