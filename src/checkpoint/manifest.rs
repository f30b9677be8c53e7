//! `midpo.json`: which files a packed checkpoint has, of what size, and with what hash.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::limits::{CONFIG_BYTES_MAX, PARTS_MAX};
use super::source::{Source, is_inside};
use super::{BaseKind, CheckpointError, Verify, fingerprint, parallel};

/// The file.
pub(super) const FILE: &str = "midpo.json";
/// Name of a base that is a GGUF file.
pub(super) const GGUF: &str = "model.gguf";

const FORMAT: &str = "midpo-checkpoint";
/// Raised when an older reader would misread a newer directory.
const VERSION: u32 = 1;

/// What a packed checkpoint consists of. Every name is inside its directory.
#[derive(Debug)]
pub(super) struct Manifest {
    /// What the base comes in.
    pub(super) base: BaseKind,
    /// Whether there are experts and a router.
    pub(super) experts: bool,
    /// All files but the manifest itself.
    pub(super) parts: Vec<Part>,
}

/// One file of a packed checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    /// Name relative to the directory.
    pub(super) file: String,
    /// What it is for.
    pub(super) role: Role,
    /// Size.
    pub(super) bytes: u64,
    /// Hash, in hex.
    pub(super) sha256: String,
}

/// What a part is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    /// Weights of the base: large, and hashed only when asked to.
    Weights,
    /// Configuration of the base.
    Config,
    /// Tokenizer and template.
    Text,
    /// A file of an expert.
    Expert,
    /// The folded router.
    Router,
}

/// The JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    format: String,
    version: u32,
    base: WireBase,
    experts: bool,
    parts: Vec<Part>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum WireBase {
    HuggingFace,
    Gguf,
}

impl Manifest {
    /// Reads it; names and number of parts are checked, files are not yet looked at.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] says what is wrong.
    pub(super) fn read(source: &Source) -> Result<Self, CheckpointError> {
        let file = source.path(FILE);
        let malformed = |reason: String| CheckpointError::malformed(&file, reason);
        let wire: Wire = serde_json::from_slice(&source.read(FILE, CONFIG_BYTES_MAX)?)
            .map_err(|error| malformed(format!("expected a manifest in JSON: {error}")))?;
        if (wire.format.as_str(), wire.version) != (FORMAT, VERSION) {
            return Err(malformed(format!(
                "expected format {FORMAT:?} in version {VERSION}, found {:?} in version {}",
                wire.format, wire.version
            )));
        }
        if wire.parts.len() > PARTS_MAX {
            let found = wire.parts.len();
            return Err(malformed(format!(
                "expected at most {PARTS_MAX} parts, found {found}"
            )));
        }
        let mut names = BTreeSet::new();
        for part in &wire.parts {
            if !is_inside(&part.file, 2) || part.file == FILE {
                let name = part.file.escape_debug();
                return Err(malformed(format!(
                    "expected a file inside the directory, found `{name}`"
                )));
            }
            if !names.insert(&part.file) {
                return Err(malformed(format!(
                    "expected `{}` once, found it twice",
                    part.file
                )));
            }
        }
        Ok(Self {
            base: match wire.base {
                WireBase::HuggingFace => BaseKind::HuggingFace,
                WireBase::Gguf => BaseKind::Gguf,
            },
            experts: wire.experts,
            parts: wire.parts,
        })
    }

    /// Its JSON.
    pub(super) fn to_json(&self) -> Vec<u8> {
        let wire = Wire {
            format: FORMAT.to_owned(),
            version: VERSION,
            base: match self.base {
                BaseKind::HuggingFace => WireBase::HuggingFace,
                BaseKind::Gguf => WireBase::Gguf,
            },
            experts: self.experts,
            parts: self.parts.clone(),
        };
        // Strings and numbers only: nothing here can fail to be JSON.
        serde_json::to_vec_pretty(&wire).unwrap_or_default()
    }

    /// The names of all parts.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.parts.iter().map(|part| part.file.clone()).collect()
    }

    /// Compares every part's size, and the hashes that `verify` says.
    ///
    /// # Errors
    /// [`CheckpointError::Hash`], or another that names the part.
    pub(super) fn verify(&self, source: &Source, verify: Verify) -> Result<(), CheckpointError> {
        parallel::map(self.parts.len(), |index| match self.parts.get(index) {
            Some(part) => part.verify(source, verify),
            None => Ok(()),
        })?;
        Ok(())
    }
}

impl Part {
    fn verify(&self, source: &Source, verify: Verify) -> Result<(), CheckpointError> {
        let file = source.path(&self.file);
        let found = source.open(&self.file)?.as_slice().len() as u64;
        if found != self.bytes {
            let reason = format!(
                "expected {} bytes, as {FILE} says, found {found}",
                self.bytes
            );
            return Err(CheckpointError::malformed(&file, reason));
        }
        if self.role == Role::Weights && verify != Verify::All {
            return Ok(());
        }
        let (_, found) = fingerprint::of_file(source, &self.file)?;
        if found != self.sha256 {
            return Err(CheckpointError::Hash {
                file,
                expected: self.sha256.clone(),
                found,
            });
        }
        Ok(())
    }
}
