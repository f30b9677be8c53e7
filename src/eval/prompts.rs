//! Prompts and their classes, from JSON lines of many sets.
//!
//! A set is known by its fields, and each line's class comes from the set's own label:
//!
//! | fields | set | class |
//! |---|---|---|
//! | `class` | your own | as it says |
//! | `kind` and `part` | the demo's prompts that were held out | `kind`; each `part` is a set |
//! | `label`, and `focus` or `expected_topic` | made to provoke needless refusals (XSTest, rho over-refusal) | `safe`: borderline, `unsafe`: harmful |
//! | `label` | AdvBench, HarmBench, Do-Not-Answer, PyRIT, rho | `safe`: benign, `unsafe`: harmful |
//! | `not_answered` | answers with a human's label (PyRIT) | unlabelled |
//! | `response_0` | preference pairs (PKU-SafeRLHF, HH-RLHF) | unlabelled |

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::error::EvalError;
use crate::random::SplitMix64;

/// Largest file of prompts.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// The flag that names files of prompts.
const PROMPTS: &str = "prompts";

/// What a prompt asks for, as its set says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Class(String);

impl Class {
    /// Should be refused.
    pub const HARMFUL: &str = "harmful";
    /// Sounds harmful, and should be answered.
    pub const BORDERLINE: &str = "borderline";
    /// Should be answered.
    pub const BENIGN: &str = "benign";
    /// Nobody says.
    pub const UNLABELLED: &str = "unlabelled";

    /// A class of any name.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// From what should be refused to what nobody labelled; names of the user's own stand between, by alphabet.
    fn rank(&self) -> (usize, &str) {
        let known = [Self::HARMFUL, Self::BORDERLINE, Self::BENIGN];
        let place = known.iter().position(|known| *known == self.0);
        let own = known.len() + usize::from(self.0 == Self::UNLABELLED);
        (place.unwrap_or(own), &self.0)
    }
}

impl Ord for Class {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl PartialOrd for Class {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A prompt to answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Unique in its set.
    pub id: String,
    /// Which set it is from.
    pub set: String,
    /// What it asks for.
    pub class: Class,
    /// The user's words.
    pub text: String,
    /// The whole line, for judges that know more of it.
    pub record: Map<String, Value>,
}

impl Prompt {
    /// Says nothing but what it is.
    pub fn new(set: &str, id: &str, class: &str, text: &str) -> Self {
        Self {
            id: id.to_owned(),
            set: set.to_owned(),
            class: Class::new(class),
            text: text.to_owned(),
            record: Map::new(),
        }
    }

    /// A seed for its answers: the same wherever the prompt stands, and another for every prompt, since prompts that share their
    /// random numbers are no independent sample.
    pub fn seed(&self, seed: u64) -> u64 {
        let mut mixed = seed;
        for byte in self.text.bytes() {
            mixed = SplitMix64::new(mixed, u64::from(byte)).next_u64();
        }
        mixed
    }
}

/// All prompts of files and directories (of one set, or of a directory a set).
///
/// # Errors
/// A path that cannot be read or holds no `.jsonl` file; a line that is no object of a known set names file, line and field.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Prompt>, EvalError> {
    let mut prompts = Vec::new();
    for path in paths {
        let files = files(path)?;
        if files.is_empty() {
            return Err(EvalError::Nothing {
                flag: PROMPTS,
                file: path.clone(),
                expected: "files that end in .jsonl".to_owned(),
            });
        }
        for file in files {
            let set = set_name(&file);
            for line in lines(PROMPTS, &file)? {
                prompts.push(line.prompt(&set)?);
            }
        }
    }
    Ok(prompts)
}

/// At most `limit` prompts of each class of each set, drawn by `seed`; the order stays.
pub fn sample(prompts: Vec<Prompt>, limit: usize, seed: u64) -> Vec<Prompt> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    SplitMix64::new(seed, 0).shuffle(&mut order);
    let mut counts = std::collections::HashMap::new();
    let mut keep = vec![false; prompts.len()];
    for index in order {
        let prompt = &prompts[index];
        let count = counts.entry((&prompt.set, &prompt.class)).or_insert(0);
        keep[index] = *count < limit;
        *count += 1;
    }
    let kept = prompts.into_iter().zip(keep);
    kept.filter(|(_, keep)| *keep)
        .map(|(prompt, _)| prompt)
        .collect()
}

/// The files of `path`: itself, those in it, or those in the directories in it. Sorted.
fn files(path: &Path) -> Result<Vec<PathBuf>, EvalError> {
    let io = |source| EvalError::Io {
        flag: PROMPTS,
        file: path.to_owned(),
        source,
    };
    if !fs::metadata(path).map_err(io)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(path).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.is_dir() {
            folders.push(path);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "jsonl")
        {
            files.push(path);
        }
    }
    if files.is_empty() {
        for folder in folders {
            let inner = fs::read_dir(&folder).map_err(io)?;
            let inner = inner.filter_map(|entry| Some(entry.ok()?.path()));
            files.extend(inner.filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "jsonl")
            }));
        }
    }
    files.sort();
    Ok(files)
}

/// The file's own name, or its directory's where that is what tells sets apart.
fn set_name(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default();
    let folder = file.parent().and_then(Path::file_name);
    let name = match folder {
        Some(folder) if stem == "data" => folder,
        _ => stem,
    };
    name.to_string_lossy().into_owned()
}

/// An object of a file of JSON lines, which knows where it stands.
struct Line {
    flag: &'static str,
    file: PathBuf,
    number: usize,
    record: Map<String, Value>,
}

/// The objects of `file`; empty lines are passed over.
fn lines(flag: &'static str, file: &Path) -> Result<Vec<Line>, EvalError> {
    let io = |source| EvalError::Io {
        flag,
        file: file.to_owned(),
        source,
    };
    let size = fs::metadata(file).map_err(io)?.len();
    if size > FILE_BYTES_MAX {
        let found =
            std::io::Error::other(format!("{size} bytes: at most {FILE_BYTES_MAX} are read"));
        return Err(io(found));
    }
    let text = fs::read_to_string(file).map_err(io)?;
    let mut lines = Vec::new();
    for (index, text) in text.lines().enumerate() {
        if text.trim().is_empty() {
            continue;
        }
        let mut line = Line {
            flag,
            file: file.to_owned(),
            number: index + 1,
            record: Map::new(),
        };
        match serde_json::from_str(text) {
            Ok(Value::Object(record)) => line.record = record,
            Ok(_) => return Err(line.wrong("line", "a JSON object", "another JSON value")),
            Err(error) => return Err(line.wrong("line", "a JSON object", &error.to_string())),
        }
        lines.push(line);
    }
    Ok(lines)
}

impl Line {
    /// The error of a field.
    fn wrong(&self, field: &str, expected: &str, found: &str) -> EvalError {
        EvalError::Line {
            flag: self.flag,
            file: self.file.clone(),
            line: self.number,
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }

    /// The value of a field as it is written, for errors.
    fn found(&self, field: &str) -> String {
        match self.record.get(field) {
            None => "nothing".to_owned(),
            Some(value) => value.to_string().chars().take(80).collect(),
        }
    }

    /// A field that must be text, and not empty.
    fn text(&self, field: &str) -> Result<&str, EvalError> {
        let text = self.record.get(field).and_then(Value::as_str);
        let text = text.filter(|text| !text.trim().is_empty());
        text.ok_or_else(|| self.wrong(field, "a text that is not empty", &self.found(field)))
    }

    fn class(&self) -> Result<Class, EvalError> {
        let has = |field: &str| self.record.contains_key(field);
        if has("class") {
            return Ok(Class::new(self.text("class")?));
        }
        if has("kind") && has("part") {
            return Ok(Class::new(self.text("kind")?));
        }
        if has("label") {
            let provoking = has("focus") || has("expected_topic");
            return Ok(Class::new(match self.text("label")? {
                "unsafe" => Class::HARMFUL,
                "safe" if provoking => Class::BORDERLINE,
                "safe" => Class::BENIGN,
                _ => return Err(self.wrong("label", "`safe` or `unsafe`", &self.found("label"))),
            }));
        }
        if has("not_answered") || has("response_0") {
            return Ok(Class::new(Class::UNLABELLED));
        }
        let expected = "a class, as in {\"prompt\": \"...\", \"class\": \"harmful\"}, or the label of a set that is known";
        Err(self.wrong("class", expected, "nothing"))
    }

    fn prompt(self, set: &str) -> Result<Prompt, EvalError> {
        let id = match self.record.get("id") {
            None => self.number.to_string(),
            Some(Value::String(id)) => id.clone(),
            Some(Value::Number(id)) => id.to_string(),
            Some(_) => return Err(self.wrong("id", "a text or a number", &self.found("id"))),
        };
        let set = match self.record.contains_key("part") {
            true => self.text("part")?,
            false => set,
        };
        Ok(Prompt {
            id,
            set: set.to_owned(),
            class: self.class()?,
            text: self.text("prompt")?.to_owned(),
            record: self.record,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    /// Files of one test, gone with it.
    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let file = self.0.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, text).unwrap();
            file
        }
    }

    /// One line of each schema that is read, in words of our own.
    const SCHEMAS: [(&str, &str); 13] = [
        (
            r#"{"prompt": "P", "categories": ["A"], "label": "unsafe"}"#,
            "harmful",
        ),
        (
            r#"{"prompt": "P", "category": "c", "label": "unsafe"}"#,
            "harmful",
        ),
        (r#"{"prompt": "P", "label": "unsafe"}"#, "harmful"),
        (
            r#"{"id": "r_1", "prompt": "P", "domain": "d", "label": "unsafe"}"#,
            "harmful",
        ),
        (
            r#"{"prompt": "P", "category": "normal_instructions", "label": "safe"}"#,
            "benign",
        ),
        (
            r#"{"id": "r_2", "prompt": "P", "response": "R", "domain": "d", "label": "safe"}"#,
            "benign",
        ),
        (
            r#"{"id": "o_1", "prompt": "P", "category": "c", "expected_topic": "t", "label": "safe"}"#,
            "borderline",
        ),
        (
            r#"{"id": 1, "prompt": "P", "type": "homonyms", "label": "safe", "focus": "f", "note": ""}"#,
            "borderline",
        ),
        (
            r#"{"id": 2, "prompt": "P", "type": "contrast_homonyms", "label": "unsafe", "focus": "f", "note": ""}"#,
            "harmful",
        ),
        (
            r#"{"prompt": "P", "response": "R", "not_answered": 1, "file": "f"}"#,
            "unlabelled",
        ),
        (
            r#"{"prompt": "P", "response_0": "A", "response_1": "B", "better_response_id": null, "safer_response_id": 0}"#,
            "unlabelled",
        ),
        (
            r#"{"prompt": "P", "kind": "fact", "part": "frames", "answers": ["A"]}"#,
            "fact",
        ),
        (r#"{"prompt": "P", "class": "plain", "id": "own"}"#, "plain"),
    ];

    #[test]
    fn every_schema_is_read_with_the_class_of_its_own_label() {
        let folder = Folder::new();
        for (line, class) in SCHEMAS {
            let file = folder.write("s.jsonl", &format!("\n{line}\n"));
            let prompts = read(&[file]).unwrap();
            assert_eq!(prompts.len(), 1);
            let prompt = &prompts[0];
            assert_eq!(
                (prompt.text.as_str(), prompt.class.as_str()),
                ("P", class),
                "{line}"
            );
            let id = serde_json::from_str::<Value>(line).unwrap()["id"].clone();
            // Without an id, the number of the line.
            let want = if id.is_null() {
                "2".to_owned()
            } else {
                id.to_string().replace('"', "")
            };
            assert_eq!(prompt.id, want);
            let set = if line.contains("frames") {
                "frames"
            } else {
                "s"
            };
            assert_eq!(prompt.set, set);
        }
    }

    #[test]
    fn a_directory_is_one_set_or_a_directory_of_sets() {
        let folder = Folder::new();
        let line = r#"{"prompt": "P", "label": "safe"}"#;
        folder.write("b/data.jsonl", line);
        folder.write("a/data.jsonl", &format!("{line}\n{line}"));
        folder.write("a/README.md", "not a prompt");
        let sets = |paths: &[PathBuf]| -> Vec<String> {
            let prompts = read(paths).unwrap();
            prompts.into_iter().map(|prompt| prompt.set).collect()
        };
        assert_eq!(sets(&[folder.0.path().to_owned()]), ["a", "a", "b"]);
        assert_eq!(
            sets(&[
                folder.0.path().join("b"),
                folder.0.path().join("a/data.jsonl")
            ]),
            ["b", "a", "a"]
        );
        let own = folder.write("c/mine.jsonl", line);
        assert_eq!(sets(&[own]), ["mine"]);
    }

    #[test]
    fn errors_name_flag_file_line_and_field() {
        let folder = Folder::new();
        for (line, words) in [
            (
                "{\"prompt\": 3, \"label\": \"safe\"}",
                &["`prompt`", "text", "found 3"][..],
            ),
            ("{\"label\": \"safe\"}", &["`prompt`", "found nothing"]),
            ("{\"prompt\": \" \", \"label\": \"safe\"}", &["`prompt`"]),
            (
                "{\"prompt\": \"P\"}",
                &["`class`", "\"class\": \"harmful\""],
            ),
            (
                "{\"prompt\": \"P\", \"label\": \"maybe\"}",
                &["`label`", "`unsafe`", "maybe"],
            ),
            (
                "{\"prompt\": \"P\", \"class\": \"x\", \"id\": []}",
                &["`id`", "[]"],
            ),
            ("[1]", &["JSON object", "another"]),
            ("{\"prompt\": ", &["JSON object", "EOF"]),
        ] {
            let file = folder.write("s.jsonl", &format!("{}\n{line}", SCHEMAS[0].0));
            let error = read(&[file]).unwrap_err().to_string();
            for word in words.iter().chain(&["--prompts", "s.jsonl, line 2"]) {
                assert!(error.contains(word), "{line}: {error}");
            }
        }
        let error = read(&[folder.0.path().join("none")])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("--prompts") && error.contains("none"),
            "{error}"
        );
        fs::create_dir(folder.0.path().join("empty")).unwrap();
        let error = read(&[folder.0.path().join("empty")])
            .unwrap_err()
            .to_string();
        assert!(error.contains(".jsonl"), "{error}");
    }

    #[test]
    fn a_sample_is_the_same_by_seed_and_even_over_sets_and_classes() {
        let prompts: Vec<Prompt> = (0..60)
            .map(|i| {
                let (set, class) = ([("a"), ("b")][i % 2], ["harmful", "benign"][i / 2 % 2]);
                Prompt::new(set, &i.to_string(), class, "P")
            })
            .collect();
        let few = sample(prompts.clone(), 4, 1);
        assert_eq!(few, sample(prompts.clone(), 4, 1));
        assert_ne!(few, sample(prompts.clone(), 4, 2));
        assert_eq!(few.len(), 16);
        let of = few
            .iter()
            .filter(|p| p.set == "a" && p.class.as_str() == "benign");
        assert_eq!(of.count(), 4);
        assert_eq!(sample(prompts.clone(), 100, 1), prompts);
    }

    #[test]
    fn seeds_differ_by_prompt_and_by_seed_alone() {
        let prompt = |text| Prompt::new("s", "1", "c", text);
        let mut elsewhere = prompt("P");
        elsewhere.id = "2".to_owned();
        assert_eq!(prompt("P").seed(1), elsewhere.seed(1));
        assert_ne!(prompt("P").seed(1), prompt("P").seed(2));
        assert_ne!(prompt("P").seed(1), prompt("Q").seed(1));
    }

    #[test]
    fn classes_stand_in_the_order_of_harm() {
        let mut classes = [
            "unlabelled",
            "plain",
            "benign",
            "chat",
            "harmful",
            "borderline",
        ]
        .map(Class::new);
        classes.sort();
        let names = classes.each_ref().map(Class::as_str);
        assert_eq!(
            names,
            [
                "harmful",
                "borderline",
                "benign",
                "chat",
                "plain",
                "unlabelled"
            ]
        );
    }
}
