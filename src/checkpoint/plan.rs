//! Parts of a model that training starts from: a shape without weights, an expert without its router.

use std::path::Path;

use super::source::Source;
use super::{
    CheckpointError, Expert, LlamaConfig, TextParts, hf, parent_and_name, peft, text_parts,
};

/// The shape of a base that is still to be trained, of `config` (a `config.json`), and the text side of the directory `tokenizer`,
/// whose `generation_config.json` may name more ends of sequence.
///
/// # Errors
/// [`CheckpointError`] names the file and the key.
pub fn plan(config: &Path, tokenizer: &Path) -> Result<(LlamaConfig, TextParts), CheckpointError> {
    let (directory, name) = parent_and_name(config)?;
    if name != hf::CONFIG {
        let reason = format!("expected a file named {}", hf::CONFIG);
        return Err(CheckpointError::malformed(config, reason));
    }
    let mut config = hf::read_config(&directory)?;
    let text = Source::directory(tokenizer);
    hf::generation::read(&text, &mut config)?;
    Ok((config, text_parts::read(&text)?))
}

/// One expert of a base, from its PEFT directory.
///
/// # Errors
/// [`CheckpointError`] names the file, and the key or tensor.
pub fn load_expert(directory: &Path, base: &LlamaConfig) -> Result<Expert, CheckpointError> {
    peft::load(&Source::directory(directory), base)
}
