//! `config.json` of a Llama: what it says is checked before anything is reserved for it.

use crate::checkpoint::json::Object;
use crate::checkpoint::limits::{
    CONFIG_BYTES_MAX, EOS_MAX, HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCAB_MAX,
    WIDTH_MAX,
};
use crate::checkpoint::source::Source;
use crate::checkpoint::{CheckpointError, LlamaConfig, RopeScaling};
use crate::types::TokenId;

/// The file.
pub(crate) const FILE: &str = "config.json";

// What transformers' `LlamaConfig` takes where the file says nothing.
const DEFAULT_RMS_NORM_EPS: f64 = 1e-6;
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
const DEFAULT_POSITIONS: usize = 2048;

/// Reads and checks it. Ends of sequence are those of this file alone.
pub(in crate::checkpoint) fn read(source: &Source) -> Result<LlamaConfig, CheckpointError> {
    let json = Object::parse(&source.path(FILE), &source.read(FILE, CONFIG_BYTES_MAX)?)?;
    check_architecture(&json)?;
    let vocab_size = json.count("vocab_size", 1..=VOCAB_MAX)?;
    let hidden_size = json.count("hidden_size", 1..=WIDTH_MAX)?;
    let num_heads = json.count("num_attention_heads", 1..=HEADS_MAX)?;
    let num_kv_heads = json
        .count_optional("num_key_value_heads", 1..=num_heads)?
        .unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        let expected = format!("a divisor of num_attention_heads {num_heads}");
        return Err(json.error("num_key_value_heads", expected));
    }
    let max_position_embeddings = json
        .count_optional("max_position_embeddings", 1..=POSITIONS_MAX)?
        .unwrap_or(DEFAULT_POSITIONS);
    let (rope_theta, rope_scaling) = rope(&json, max_position_embeddings)?;
    Ok(LlamaConfig {
        vocab_size,
        hidden_size,
        intermediate_size: json.count("intermediate_size", 1..=WIDTH_MAX)?,
        num_layers: json.count("num_hidden_layers", 1..=LAYERS_MAX)?,
        num_heads,
        num_kv_heads,
        head_dim: head_dim(&json, hidden_size, num_heads)?,
        rms_norm_eps: json
            .number_optional("rms_norm_eps", "a number between 0 and 1", |eps| {
                0.0 < eps && eps < 1.0 && eps as f32 > 0.0
            })?
            .unwrap_or(DEFAULT_RMS_NORM_EPS) as f32,
        rope_theta,
        rope_scaling,
        max_position_embeddings,
        tie_word_embeddings: json.truth("tie_word_embeddings")?.unwrap_or(false),
        bos_token_id: token_ids(&json, "bos_token_id", vocab_size)?
            .first()
            .copied(),
        eos_token_ids: token_ids(&json, "eos_token_id", vocab_size)?,
    })
}

/// Only what the forward pass computes: a Llama with SiLU and no biases, not quantised by one of transformers' schemes.
fn check_architecture(json: &Object) -> Result<(), CheckpointError> {
    if json.string("model_type")? != Some("llama") {
        return Err(json.error("model_type", "\"llama\""));
    }
    if !matches!(json.string("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(json.error("hidden_act", "\"silu\""));
    }
    json.refuse("attention_bias", "biases are not supported")?;
    json.refuse("mlp_bias", "biases are not supported")?;
    let scheme = "weights must be F32, F16 or BF16 (or a GGUF file)";
    json.refuse("quantization_config", scheme)
}

/// Stated, or an equal share of the hidden size; even, since rotation pairs its halves.
fn head_dim(json: &Object, hidden_size: usize, num_heads: usize) -> Result<usize, CheckpointError> {
    let head_dim = match json.count_optional("head_dim", 1..=HEAD_DIM_MAX)? {
        Some(head_dim) if head_dim.is_multiple_of(2) => head_dim,
        Some(_) => return Err(json.error("head_dim", "an even number")),
        None if !hidden_size.is_multiple_of(num_heads) => {
            let expected = format!("a divisor of hidden_size {hidden_size}");
            return Err(json.error("num_attention_heads", expected));
        }
        None => hidden_size / num_heads,
    };
    if !head_dim.is_multiple_of(2) || head_dim > HEAD_DIM_MAX || head_dim * num_heads > WIDTH_MAX {
        let expected = format!(
            "heads of an even size of at most {HEAD_DIM_MAX} and together at most {WIDTH_MAX} wide, not of {head_dim}"
        );
        return Err(json.error("num_attention_heads", expected));
    }
    Ok(head_dim)
}

/// Base and stretching: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`, which holds both.
fn rope(json: &Object, positions: usize) -> Result<(f64, RopeScaling), CheckpointError> {
    let parameters = json.object("rope_parameters")?;
    let scaling = json.object("rope_scaling")?;
    let theta = |json: &Object| {
        json.number_optional("rope_theta", "a number from 1 to 1e15", |theta| {
            (1.0..=1e15).contains(&theta)
        })
    };
    let inner_theta = match &parameters {
        Some(parameters) => theta(parameters)?,
        None => None,
    };
    let rope_theta = match inner_theta {
        Some(inner) => inner,
        None => theta(json)?.unwrap_or(DEFAULT_ROPE_THETA),
    };
    let scaling = match (parameters, scaling) {
        (Some(parameters), _) => rope_scaling(&parameters, positions)?,
        (None, Some(scaling)) if rope_type(&scaling)?.is_none() => {
            return Err(scaling.error("rope_type", ROPE_TYPES));
        }
        (None, Some(scaling)) => rope_scaling(&scaling, positions)?,
        (None, None) => RopeScaling::None,
    };
    Ok((rope_theta, scaling))
}

const ROPE_TYPES: &str = "\"default\", \"linear\", \"dynamic\" or \"llama3\"";

/// Under its new key, or under its old one.
fn rope_type(json: &Object) -> Result<Option<&str>, CheckpointError> {
    match json.string("rope_type")? {
        Some(name) => Ok(Some(name)),
        None => json.string("type"),
    }
}

fn rope_scaling(json: &Object, positions: usize) -> Result<RopeScaling, CheckpointError> {
    let factor = || {
        json.number("factor", "a number from 1 to 1e6", |x| {
            (1.0..=1e6).contains(&x)
        })
    };
    let original = |default: Option<usize>| {
        let key = "original_max_position_embeddings";
        match (json.count_optional(key, 1..=POSITIONS_MAX)?, default) {
            (Some(positions), _) | (None, Some(positions)) => Ok(positions),
            (None, None) => json.count(key, 1..=POSITIONS_MAX),
        }
    };
    json.number_optional("partial_rotary_factor", "1", |x| x == 1.0)?;
    match rope_type(json)?.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "dynamic" => Ok(RopeScaling::Dynamic {
            factor: factor()?,
            original_positions: original(Some(positions))?,
        }),
        "llama3" => {
            let positive = |x: f64| 0.0 < x && x <= 1e6;
            let expected = "a number above 0 and up to 1e6";
            let low_freq_factor = json.number("low_freq_factor", expected, positive)?;
            let high_freq_factor = json.number(
                "high_freq_factor",
                "a number above low_freq_factor and up to 1e6",
                |x| low_freq_factor < x && x <= 1e6,
            )?;
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor,
                high_freq_factor,
                original_positions: original(None)?,
            })
        }
        _ => {
            let key = if json.get("rope_type").is_some() {
                "rope_type"
            } else {
                "type"
            };
            Err(json.error(key, ROPE_TYPES))
        }
    }
}

/// A token id, a list of them, or none; each within the vocabulary, none twice.
pub(super) fn token_ids(
    json: &Object,
    key: &str,
    vocab_size: usize,
) -> Result<Vec<TokenId>, CheckpointError> {
    let Some(value) = json.get(key) else {
        return Ok(Vec::new());
    };
    let values = value
        .as_array()
        .map_or(std::slice::from_ref(value), Vec::as_slice);
    let expected =
        || format!("up to {EOS_MAX} token ids below vocab_size {vocab_size}, or one of them");
    if values.len() > EOS_MAX {
        return Err(json.error(key, expected()));
    }
    let mut ids = Vec::new();
    for value in values {
        let id = value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .map(TokenId)
            .filter(|id| id.index() < vocab_size)
            .ok_or_else(|| json.error(key, expected()))?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;

    fn scaling(text: &str) -> Result<(f64, RopeScaling), String> {
        let json = Object::parse(Path::new("config.json"), text.as_bytes()).unwrap();
        rope(&json, 4096).map_err(|error| error.to_string())
    }

    #[test]
    fn rope_when_spelled_in_any_of_transformers_ways_is_the_same() {
        let linear = RopeScaling::Linear { factor: 2.0 };
        let dynamic = |original_positions| RopeScaling::Dynamic {
            factor: 4.0,
            original_positions,
        };
        for (text, theta, want) in [
            ("{}", 1e4, RopeScaling::None),
            (
                r#"{"rope_scaling": null, "rope_theta": 5e5}"#,
                5e5,
                RopeScaling::None,
            ),
            (
                r#"{"rope_scaling": {"type": "linear", "factor": 2.0}}"#,
                1e4,
                linear,
            ),
            (
                r#"{"rope_scaling": {"rope_type": "linear", "factor": 2}}"#,
                1e4,
                linear,
            ),
            (
                r#"{"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2}}"#,
                1e4,
                linear,
            ),
            (
                r#"{"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 7.0}}"#,
                7.0,
                linear,
            ),
            (
                r#"{"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}"#,
                7.0,
                RopeScaling::None,
            ),
            (
                r#"{"rope_scaling": {"type": "dynamic", "factor": 4}}"#,
                1e4,
                dynamic(4096),
            ),
            (
                r#"{"rope_scaling": {"type": "dynamic", "factor": 4, "original_max_position_embeddings": 64}}"#,
                1e4,
                dynamic(64),
            ),
        ] {
            assert_eq!(scaling(text), Ok((theta, want)), "{text}");
        }
    }

    #[test]
    fn rope_when_it_cannot_be_computed_names_the_key() {
        for (text, key) in [
            (
                r#"{"rope_scaling": {"factor": 2}}"#,
                "rope_scaling.rope_type",
            ),
            (
                r#"{"rope_scaling": {"type": "yarn", "factor": 2}}"#,
                "rope_scaling.type",
            ),
            (
                r#"{"rope_scaling": {"rope_type": "longrope"}}"#,
                "rope_scaling.rope_type",
            ),
            (
                r#"{"rope_scaling": {"type": "linear"}}"#,
                "rope_scaling.factor",
            ),
            (
                r#"{"rope_scaling": {"type": "linear", "factor": 0}}"#,
                "rope_scaling.factor",
            ),
            (r#"{"rope_scaling": "linear"}"#, "rope_scaling"),
            (r#"{"rope_theta": 0}"#, "rope_theta"),
            (
                r#"{"rope_parameters": {"rope_theta": "x"}}"#,
                "rope_parameters.rope_theta",
            ),
            (
                r#"{"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}"#,
                "rope_scaling.high_freq_factor",
            ),
            (
                r#"{"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}}"#,
                "rope_scaling.original_max_position_embeddings",
            ),
        ] {
            let error = scaling(text).unwrap_err();
            assert!(error.contains(&format!("`{key}`")), "{text}: {error}");
        }
    }
}
