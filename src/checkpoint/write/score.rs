//! A reward or cost model in a directory as Safe-RLHF saves one.

use std::path::Path;

use super::base::entries;
use super::config::Score;
use super::files::Files;
use super::safetensors::{self, Entry, Numbers};
use super::{TextFiles, check};
use crate::checkpoint::score::{self as format, Normalizer};
use crate::checkpoint::{CheckpointError, LlamaConfig, NamedTensor, ScoreType, hf};
use crate::dtype::DType;

/// Writes `config.json`, `model.safetensors` and the text files of a `LlamaForScore`: what Safe-RLHF and
/// [`crate::checkpoint::load_score`] read. `tensors` are `model.*` without a head, `score_head.weight` (1, d) and perhaps
/// `score_head.bias` (1); the normaliser is written as one that has seen nothing and is off. All files appear together; on an error
/// the directory is as it was.
///
/// # Errors
/// [`CheckpointError`] names the tensor that is missing, too many, of another shape or not finite in `dtype`; or the file that cannot
/// be written.
pub fn score(
    directory: &Path,
    config: &LlamaConfig,
    tensors: &[NamedTensor],
    score_type: ScoreType,
    dtype: DType,
    text: &TextFiles,
) -> Result<(), CheckpointError> {
    let mut files = Files::new(directory)?;
    let has_bias = tensors.iter().any(|(name, _, _)| name == format::BIAS);
    let expected = format::shapes(config, has_bias);
    check(&files.path(hf::SINGLE), tensors, &expected)?;
    files.stage(hf::SINGLE, |file, out| {
        let mut entries = entries(file, tensors, dtype)?;
        let unused = Normalizer::default();
        let (mean, var, count) = ([unused.mean], [unused.var], [unused.count]);
        for (name, numbers) in [
            (format::MEAN, Numbers::F32(&mean)),
            (format::VAR, Numbers::F32(&var)),
            (format::COUNT, Numbers::I64(&count)),
        ] {
            entries.push(Entry {
                name,
                shape: &[1],
                numbers,
            });
        }
        safetensors::write(file, entries, out)
    })?;
    text.stage(&mut files)?;
    files.stage_json(hf::CONFIG, &Score::of(config, score_type, has_bias, dtype))?;
    files.remove(hf::INDEX);
    files.finish()
}
