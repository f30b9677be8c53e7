//! `generation_config.json`: what a request that says nothing gets, and further ends of sequence.

use super::config;
use crate::checkpoint::json::Object;
use crate::checkpoint::limits::CONFIG_BYTES_MAX;
use crate::checkpoint::source::Source;
use crate::checkpoint::{CheckpointError, GenerationDefaults, LlamaConfig};

/// The file, which a directory need not have.
pub(crate) const FILE: &str = "generation_config.json";

/// Reads it, and adds its ends of sequence to those of `config`.
///
/// # Errors
/// Names the file and the key.
pub(crate) fn read(
    source: &Source,
    config: &mut LlamaConfig,
) -> Result<GenerationDefaults, CheckpointError> {
    let Some(bytes) = source.read_optional(FILE, CONFIG_BYTES_MAX)? else {
        return Ok(GenerationDefaults::default());
    };
    let json = Object::parse(&source.path(FILE), &bytes)?;
    for id in config::token_ids(&json, "eos_token_id", config.vocab_size)? {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    if config.bos_token_id.is_none() {
        config.bos_token_id = config::token_ids(&json, "bos_token_id", config.vocab_size)?
            .first()
            .copied();
    }
    let number = |key, expected, legal: fn(f64) -> bool| {
        let number = json.number_optional(key, expected, legal)?;
        Ok::<_, CheckpointError>(number.map(|number| number as f32))
    };
    let temperature = number("temperature", "a number from 0 to 100", |x| {
        (0.0..=100.0).contains(&x)
    })?;
    Ok(GenerationDefaults {
        // transformers ignores the temperature of a greedy default; files often keep one.
        temperature: match json.truth("do_sample")? {
            Some(false) => Some(0.0),
            Some(true) | None => temperature,
        },
        top_k: json
            .count_optional("top_k", 0..=u32::MAX as usize)?
            .and_then(|k| u32::try_from(k).ok()),
        top_p: number("top_p", "a number above 0 and up to 1", |x| {
            0.0 < x && x <= 1.0
        })?,
        min_p: number("min_p", "a number from 0 to 1", |x| {
            (0.0..=1.0).contains(&x)
        })?,
        repetition_penalty: number("repetition_penalty", "a number from 0.001 to 100", |x| {
            (1e-3..=100.0).contains(&x)
        })?,
    })
}
