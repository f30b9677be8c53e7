//! An expert: a PEFT directory with a LoRA on every layer's `mlp.down_proj`, and on nothing else.

use serde_json::Value;

use super::json::Object;
use super::limits::{CONFIG_BYTES_MAX, RANK_MAX};
use super::source::Source;
use super::tensor_file::{FileTensor, TensorFile, check_finite};
use super::{CheckpointError, Expert, ExpertLayer, LlamaConfig};

/// Rank, scale, and what the LoRA is on.
pub(crate) const CONFIG: &str = "adapter_config.json";
/// Its matrices.
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";

/// Loads an expert for a base of this configuration.
///
/// # Errors
/// [`CheckpointError`] names the file, and the key or tensor.
pub(crate) fn load(source: &Source, base: &LlamaConfig) -> Result<Expert, CheckpointError> {
    let json = Object::parse(
        &source.path(CONFIG),
        &source.read(CONFIG, CONFIG_BYTES_MAX)?,
    )?;
    let (rank, scale) = rank_and_scale(&json)?;
    if !source.exists(WEIGHTS) && source.exists("adapter_model.bin") {
        let reason = "expected this file, found only adapter_model.bin: save the adapter with safe_serialization";
        return Err(CheckpointError::malformed(&source.path(WEIGHTS), reason));
    }
    let mut tensors = TensorFile::safetensors(&source.path(WEIGHTS), &source.open(WEIGHTS)?)?;
    let (d, m) = (base.hidden_size, base.intermediate_size);
    let mut taken: Vec<(FileTensor, FileTensor)> = Vec::new();
    for layer in 0..base.num_layers {
        let name = |matrix: &str| name(layer, matrix);
        let context = " (as adapter_config.json and the base say)";
        taken.push((
            tensors.take(&name("lora_A"), &[rank, m], context)?,
            tensors.take(&name("lora_B"), &[d, rank], context)?,
        ));
    }
    tensors.finish("an expert on mlp.down_proj", |_| false)?;
    check_finite(taken.iter().flat_map(|(a, b)| [a, b]))?;
    let layers = taken
        .into_iter()
        .map(|(a, b)| ExpertLayer {
            lora_a: a.tensor.to_f32(),
            lora_b: b.tensor.to_f32(),
        })
        .collect();
    Ok(Expert {
        rank,
        scale,
        layers,
    })
}

/// PEFT's name of a matrix.
pub(super) fn name(layer: usize, matrix: &str) -> String {
    format!("base_model.model.model.layers.{layer}.mlp.down_proj.{matrix}.weight")
}

/// r, and s of MIDPO.md 1; refuses every option of PEFT that makes the formula another one.
fn rank_and_scale(json: &Object) -> Result<(usize, f32), CheckpointError> {
    if json.string("peft_type")? != Some("LORA") {
        return Err(json.error("peft_type", "\"LORA\""));
    }
    check_targets(json)?;
    json.refuse("use_dora", "DoRA is another formula")?;
    json.refuse("use_qalora", "QALoRA is another formula")?;
    json.refuse("lora_bias", "an expert has no bias")?;
    json.refuse("fan_in_fan_out", "down_proj is stored as (outputs, inputs)")?;
    if !matches!(json.string("bias")?, None | Some("none")) {
        return Err(json.error("bias", "\"none\""));
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        json.refuse(key, "all layers have one rank and scale")?;
    }
    for key in [
        "modules_to_save",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "megatron_config",
    ] {
        json.refuse(key, "an expert is a plain LoRA on mlp.down_proj")?;
    }
    check_initialisation(json)?;
    let rank = json.count("r", 1..=RANK_MAX)?;
    let alpha = json.number("lora_alpha", "a number above 0 and up to 1e6", |alpha| {
        0.0 < alpha && alpha <= 1e6
    })?;
    let divisor = match json.truth("use_rslora")? {
        Some(true) => (rank as f64).sqrt(),
        Some(false) | None => rank as f64,
    };
    Ok((rank, (alpha / divisor) as f32))
}

fn check_targets(json: &Object) -> Result<(), CheckpointError> {
    let is_ours = |target: &Value| matches!(target.as_str(), Some("down_proj" | "mlp.down_proj"));
    let ours = match json.get("target_modules") {
        Some(Value::Array(targets)) => !targets.is_empty() && targets.iter().all(is_ours),
        Some(target) => is_ours(target),
        None => false,
    };
    if ours {
        Ok(())
    } else {
        Err(json.error("target_modules", "[\"down_proj\"]"))
    }
}

/// Some ways to start a LoRA also change the base's weights, so that the saved matrices fit another base than the one served.
fn check_initialisation(json: &Object) -> Result<(), CheckpointError> {
    let keeps_base = match json.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => true,
        Some(way) => matches!(way.as_str(), Some("gaussian" | "eva" | "orthogonal")),
    };
    if keeps_base {
        Ok(())
    } else {
        let expected = "a way that leaves the base as it is: true, false, \"gaussian\", \"eva\" or \"orthogonal\"";
        Err(json.error("init_lora_weights", expected))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;

    fn check(change: &str) -> Result<(usize, f32), String> {
        let text = format!(
            r#"{{"peft_type": "LORA", "target_modules": ["down_proj"], "r": 16, "lora_alpha": 32{change}}}"#
        );
        let json = Object::parse(Path::new(CONFIG), text.as_bytes()).unwrap();
        rank_and_scale(&json).map_err(|error| error.to_string())
    }

    #[test]
    fn rank_and_scale_follow_the_configuration() {
        for (change, want) in [
            ("", (16, 2.0)),
            (r#", "use_rslora": true"#, (16, 8.0)),
            (
                r#", "lora_alpha": 8.0, "target_modules": "down_proj""#,
                (16, 0.5),
            ),
            (
                r#", "r": 1, "target_modules": ["mlp.down_proj"], "rank_pattern": {}"#,
                (1, 32.0),
            ),
        ] {
            assert_eq!(check(change), Ok(want), "{change}");
        }
    }

    #[test]
    fn rank_and_scale_when_an_option_changes_the_formula_name_its_key() {
        for (change, key) in [
            (r#", "use_dora": true"#, "use_dora"),
            (r#", "lora_bias": true"#, "lora_bias"),
            (r#", "bias": "all""#, "bias"),
            (r#", "modules_to_save": ["lm_head"]"#, "modules_to_save"),
            (r#", "rank_pattern": {"down_proj": 4}"#, "rank_pattern"),
            (r#", "alpha_pattern": {"down_proj": 4}"#, "alpha_pattern"),
            (r#", "fan_in_fan_out": true"#, "fan_in_fan_out"),
            (r#", "r": 0"#, "r"),
            (r#", "r": 1e3"#, "r"),
            (r#", "lora_alpha": null"#, "lora_alpha"),
            (r#", "lora_alpha": -1"#, "lora_alpha"),
            (r#", "target_modules": []"#, "target_modules"),
            (r#", "target_modules": ".*""#, "target_modules"),
            (
                r#", "target_modules": ["down_proj", "up_proj"]"#,
                "target_modules",
            ),
            (r#", "init_lora_weights": "pissa""#, "init_lora_weights"),
            (r#", "use_rslora": 1"#, "use_rslora"),
        ] {
            let error = check(change).unwrap_err();
            assert!(error.contains(&format!("`{key}`")), "{change}: {error}");
        }
    }
}
