//! `midpo convert`: base, experts and folded router in one directory that is loaded alone.
//!
//! ```text
//! midpo.json                    names, sizes and hashes of the rest
//! config.json ... tokenizer.json model*.safetensors         a Hugging Face base, file by file; or model.gguf
//! safety/  helpfulness/         adapter_config.json, adapter_model.safetensors
//! router_folded.safetensors
//! ```

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::manifest::{self, Manifest, Part, Role};
use super::source::Source;
use super::{
    BaseFiles, BaseKind, CheckpointError, HELPFULNESS, Loaded, SAFETY, Sources, fingerprint, hf,
    load_all, peft, router, text_parts, write,
};

use crate::dtype::BlockType;

/// What to do where the directory exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// Refuse.
    #[default]
    Never,
    /// Replace a packed checkpoint or an empty directory; anything else is refused still.
    Packed,
}

/// Small files of a base that are packed where they are there.
const BASE_FILES: [(&str, Role); 6] = [
    (hf::CONFIG, Role::Config),
    (hf::GENERATION, Role::Config),
    (text_parts::TOKENIZER, Role::Text),
    (text_parts::TOKENIZER_CONFIG, Role::Text),
    (text_parts::SPECIAL_TOKENS, Role::Text),
    (text_parts::TEMPLATE, Role::Text),
];

/// Loads `sources`, which checks everything, and writes them to `directory`. Large files are linked where the file system can,
/// copied elsewhere; or the weights are written anew in blocks of `quantise`. The directory appears whole or not at all.
///
/// # Errors
/// As [`super::load`]; [`CheckpointError::Exists`]; [`CheckpointError::Io`].
pub fn pack(
    sources: &Sources,
    directory: &Path,
    overwrite: Overwrite,
    quantise: Option<BlockType>,
) -> Result<(), CheckpointError> {
    check_place(directory, overwrite)?;
    let loaded = load_all(sources)?;
    let staging = Staging::beside(directory)?;
    let mut parts = Vec::new();
    let base = match quantise {
        None => {
            write_base(&loaded, &staging, &mut parts)?;
            loaded.base.kind
        }
        Some(block) => {
            write_quantised(&loaded, block, &staging, &mut parts)?;
            BaseKind::HuggingFace
        }
    };
    write_experts(&loaded, &staging, &mut parts)?;
    let manifest = Manifest {
        base,
        experts: loaded.experts.is_some(),
        parts,
    };
    staging.write(manifest::FILE, &manifest.to_json())?;
    staging.finish(directory)
}

fn write_base(
    loaded: &Loaded,
    staging: &Staging,
    parts: &mut Vec<Part>,
) -> Result<(), CheckpointError> {
    let base = &loaded.base;
    copy_base_files(base, staging, parts)?;
    for name in &base.weights {
        let target = match base.kind {
            BaseKind::HuggingFace => name,
            BaseKind::Gguf => manifest::GGUF,
        };
        parts.push(staging.link(&base.source, name, target, Role::Weights)?);
    }
    Ok(())
}

fn copy_base_files(
    base: &BaseFiles,
    staging: &Staging,
    parts: &mut Vec<Part>,
) -> Result<(), CheckpointError> {
    // A GGUF file holds these itself.
    let held =
        |name| base.kind == BaseKind::Gguf && [hf::CONFIG, text_parts::TOKENIZER].contains(&name);
    for (name, role) in BASE_FILES {
        if base.source.exists(name) && !held(name) {
            parts.push(staging.copy(&base.source, name, name, role)?);
        }
    }
    Ok(())
}

/// A Hugging Face base whose weights are blocks. What a GGUF file holds beside its weights becomes files of its own.
fn write_quantised(
    loaded: &Loaded,
    block: BlockType,
    staging: &Staging,
    parts: &mut Vec<Part>,
) -> Result<(), CheckpointError> {
    let checkpoint = &loaded.checkpoint;
    let config = &checkpoint.config;
    match loaded.base.kind {
        BaseKind::HuggingFace => copy_base_files(&loaded.base, staging, parts)?,
        BaseKind::Gguf => {
            let text = write::TextFiles::of(&checkpoint.text, config.max_position_embeddings);
            write::base_files(&staging.path, config, &text)?;
            if loaded.base.source.exists(hf::GENERATION) {
                // Beside the file, with defaults for sampling.
                staging.remove(hf::GENERATION)?;
                staging.copy(
                    &loaded.base.source,
                    hf::GENERATION,
                    hf::GENERATION,
                    Role::Config,
                )?;
            }
            let configs = [hf::CONFIG, hf::GENERATION].map(|name| (name, Role::Config));
            for (name, role) in configs
                .into_iter()
                .chain(text.names().map(|name| (name, Role::Text)))
            {
                parts.push(staging.part(name, role)?);
            }
        }
    }
    write::quantised_weights(&staging.path, config, &checkpoint.base, block)?;
    parts.push(staging.part(hf::SINGLE, Role::Weights)?);
    Ok(())
}

fn write_experts(
    loaded: &Loaded,
    staging: &Staging,
    parts: &mut Vec<Part>,
) -> Result<(), CheckpointError> {
    let (Some(files), Some(experts)) = (&loaded.experts, &loaded.checkpoint.experts) else {
        return Ok(());
    };
    for (directory, source) in [(SAFETY, &files.safety), (HELPFULNESS, &files.helpfulness)] {
        staging.make_directory(directory)?;
        for name in [peft::CONFIG, peft::WEIGHTS] {
            let target = format!("{directory}/{name}");
            parts.push(staging.copy(source, name, &target, Role::Expert)?);
        }
    }
    staging.write(router::FOLDED, &write::folded(&experts.router)?)?;
    parts.push(staging.part(router::FOLDED, Role::Router)?);
    Ok(())
}

/// Whether something may be written to `directory`.
fn check_place(directory: &Path, overwrite: Overwrite) -> Result<(), CheckpointError> {
    // Not `exists`: a dangling link is something too.
    if fs::symlink_metadata(directory).is_err() {
        return Ok(());
    }
    let exists = |hint| CheckpointError::Exists {
        directory: directory.to_path_buf(),
        hint,
    };
    let is_ours = directory.join(manifest::FILE).is_file()
        || fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none());
    match overwrite {
        Overwrite::Packed if is_ours => Ok(()),
        Overwrite::Packed => Err(exists(", and is no packed checkpoint: remove it first")),
        Overwrite::Never => Err(exists("")),
    }
}

/// A directory beside the final one, which it becomes by renaming. Removed when it is dropped before.
struct Staging {
    path: PathBuf,
}

impl Staging {
    /// Names tried before giving up: others may be packing to the same place.
    const TRIES: u32 = 100;

    fn beside(directory: &Path) -> Result<Self, CheckpointError> {
        let name = directory.file_name().ok_or_else(|| {
            CheckpointError::malformed(directory, "expected the name of a directory")
        })?;
        let parent = directory.parent().unwrap_or(Path::new(""));
        let mut last = None;
        for attempt in 0..Self::TRIES {
            let name = format!(
                ".{}.{}-{attempt}.partial",
                name.to_string_lossy(),
                std::process::id()
            );
            let path = parent.join(name);
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    last = Some(error);
                }
                Err(error) => return Err(CheckpointError::io(&path, error)),
            }
        }
        let error = last.unwrap_or_else(|| std::io::ErrorKind::AlreadyExists.into());
        Err(CheckpointError::io(directory, error))
    }

    fn make_directory(&self, name: &str) -> Result<(), CheckpointError> {
        let path = self.path.join(name);
        fs::create_dir(&path).map_err(|error| CheckpointError::io(&path, error))
    }

    /// Writes a file, to the disk and not only to the system's memory.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let path = self.path.join(name);
        let write = || {
            let mut file = fs::File::create_new(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|error| CheckpointError::io(&path, error))
    }

    fn remove(&self, name: &str) -> Result<(), CheckpointError> {
        let path = self.path.join(name);
        fs::remove_file(&path).map_err(|error| CheckpointError::io(&path, error))
    }

    fn part(&self, name: &str, role: Role) -> Result<Part, CheckpointError> {
        let (bytes, sha256) = fingerprint::of_path(&self.path.join(name))?;
        Ok(Part {
            file: name.to_owned(),
            role,
            bytes,
            sha256,
        })
    }

    fn copy(
        &self,
        source: &Source,
        name: &str,
        target: &str,
        role: Role,
    ) -> Result<Part, CheckpointError> {
        self.write(target, source.open(name)?.as_slice())?;
        self.part(target, role)
    }

    /// As [`Staging::copy`], sharing the bytes on disk where that is possible.
    fn link(
        &self,
        source: &Source,
        name: &str,
        target: &str,
        role: Role,
    ) -> Result<Part, CheckpointError> {
        // Through links: Hugging Face's cache is made of relative ones, which would lead nowhere from here.
        let linked = fs::canonicalize(source.path(name))
            .and_then(|file| fs::hard_link(file, self.path.join(target)));
        match linked {
            Ok(()) => self.part(target, role),
            Err(_) => self.copy(source, name, target, role),
        }
    }

    /// Becomes `directory`; what was there is removed only afterwards.
    fn finish(mut self, directory: &Path) -> Result<(), CheckpointError> {
        let io = |error| CheckpointError::io(directory, error);
        let old = self.path.with_extension("old");
        let replaces = fs::symlink_metadata(directory).is_ok();
        if replaces {
            fs::rename(directory, &old).map_err(io)?;
        }
        if let Err(error) = fs::rename(&self.path, directory) {
            if replaces {
                // Whether or not this works, the first error is the one to tell.
                let _ = fs::rename(&old, directory);
            }
            return Err(io(error));
        }
        self.path = PathBuf::new();
        if replaces {
            fs::remove_dir_all(&old).map_err(|error| CheckpointError::io(&old, error))?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.path != Path::new("") {
            // Nothing more can be done about a directory that stays.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
