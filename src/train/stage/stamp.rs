//! What a stage was made from, beside what it made: a stage whose settings and inputs are the same needs no second run.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::TRACES;
use crate::config::train::StageOptions;
use crate::train::{TrainError, files};

/// The file in an output that is a directory; behind the name of an output that is a file.
const FILE: &str = "stage.json";
/// Keys that do not change what a stage makes.
const WITHOUT_EFFECT: [&str; 4] = [
    "output",
    "threads",
    "save_every",
    "activation_checkpointing",
];
/// Keys of files and directories that a stage reads: what counts is what they hold.
const INPUTS: [&str; 10] = [
    "data",
    "validation",
    "base",
    "init",
    "tokenizer",
    "reward",
    "cost",
    "safety",
    "helpfulness",
    "router",
];

/// What a stage is made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stamp {
    stage: String,
    /// Version of the program.
    version: String,
    /// All that changes the result, but for the inputs.
    settings: Map<String, Value>,
    /// SHA-256 of each input, by key.
    inputs: BTreeMap<String, String>,
    /// SHA-256 of what was made; empty before.
    output: String,
}

impl Stamp {
    /// Of a stage that is to run.
    ///
    /// # Errors
    /// [`TrainError::File`] where an input cannot be read.
    pub(super) fn of<S: StageOptions>(options: &S) -> Result<Self, TrainError> {
        // A struct of plain values: it is an object.
        let mut settings = match serde_json::to_value(options) {
            Ok(Value::Object(settings)) => settings,
            _ => Map::new(),
        };
        for key in WITHOUT_EFFECT {
            settings.remove(key);
        }
        let mut inputs = BTreeMap::new();
        for key in INPUTS {
            if let Some(Value::String(path)) = settings.remove(key) {
                inputs.insert(key.to_owned(), hash(Path::new(&path))?);
            }
        }
        Ok(Self {
            stage: S::STAGE.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            settings,
            inputs,
            output: String::new(),
        })
    }

    /// In words: what a saved state must agree with.
    pub(super) fn identity(&self) -> String {
        format!("{:?} {:?}", self.settings, self.inputs)
    }

    /// Whether `output` was made so, and is still what was made.
    pub(super) fn is_of(&self, output: &Path) -> bool {
        let stamp = fs::read(file(output)).ok();
        let made: Option<Self> = stamp.and_then(|json| serde_json::from_slice(&json).ok());
        made.is_some_and(|made| {
            let same = Self {
                output: made.output.clone(),
                ..self.clone()
            };
            made == same && hash(output).is_ok_and(|hash| hash == made.output)
        })
    }

    /// Puts it beside `output`, which is complete.
    ///
    /// # Errors
    /// [`TrainError::File`].
    pub(super) fn put(mut self, output: &Path) -> Result<(), TrainError> {
        self.output = hash(output)?;
        // Strings and numbers: it cannot fail.
        let json = serde_json::to_vec_pretty(&self).unwrap_or_default();
        files::write(&file(output), &json)
    }
}

/// Whether a stage has completed `output`.
pub(super) fn exists(output: &Path) -> bool {
    file(output).exists()
}

/// Takes the stamp off an output that is about to change.
///
/// # Errors
/// [`TrainError::File`].
pub(super) fn remove(output: &Path) -> Result<(), TrainError> {
    match fs::remove_file(file(output)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(TrainError::file(&file(output))(error))
        }
        _ => Ok(()),
    }
}

/// Where the stamp of `output` is.
fn file(output: &Path) -> PathBuf {
    let is_file = output.is_file() || (!output.is_dir() && output.extension().is_some());
    if !is_file {
        return output.join(FILE);
    }
    let mut name = output.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(FILE);
    output.with_file_name(name)
}

/// SHA-256, hex, of a file, or of all files in a directory with their names, but for stamp and traces.
fn hash(path: &Path) -> Result<String, TrainError> {
    let mut hash = Sha256::new();
    if path.is_dir() {
        let mut files = Vec::new();
        list(path, path, &mut files)?;
        files.sort();
        for file in files {
            hash.update(file.to_string_lossy().as_bytes());
            hash.update(of_file(&path.join(&file))?.as_bytes());
        }
    } else {
        hash.update(of_file(path)?.as_bytes());
    }
    Ok(hex(&hash.finalize()))
}

fn list(root: &Path, directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), TrainError> {
    for entry in fs::read_dir(directory).map_err(TrainError::file(directory))? {
        let path = entry.map_err(TrainError::file(directory))?.path();
        let name = path.strip_prefix(root).unwrap_or(&path);
        if name == Path::new(TRACES) || name == Path::new(FILE) {
            continue;
        }
        if path.is_dir() {
            list(root, &path, files)?;
        } else {
            files.push(name.to_owned());
        }
    }
    Ok(())
}

fn of_file(file: &Path) -> Result<String, TrainError> {
    let mut opened = fs::File::open(file).map_err(TrainError::file(file))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = opened.read(&mut buffer).map_err(TrainError::file(file))?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(buffer.get(..read).unwrap_or_default());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
