//! An expert in a PEFT directory.

use std::path::Path;

use serde::Serialize;

use super::files::Files;
use super::safetensors::{self, Entry};
use super::{check_len, numbers};
use crate::checkpoint::{CheckpointError, Expert, peft};
use crate::dtype::DType;

/// `adapter_config.json`: the keys that PEFT has had since experts were first trained.
#[derive(Serialize)]
struct Config<'a> {
    peft_type: &'static str,
    task_type: &'static str,
    base_model_name_or_path: &'a str,
    inference_mode: bool,
    r: usize,
    lora_alpha: Alpha,
    lora_dropout: f32,
    target_modules: [&'static str; 1],
    bias: &'static str,
    fan_in_fan_out: bool,
    init_lora_weights: bool,
    modules_to_save: Option<()>,
    use_dora: bool,
    use_rslora: bool,
}

/// PEFT's is an integer wherever it can be.
#[derive(Serialize)]
#[serde(untagged)]
enum Alpha {
    Whole(u64),
    Real(f64),
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` (f32 or bf16): what PEFT's `from_pretrained` and
/// [`crate::checkpoint::load`] read. `base_name` is the base's directory or name, for PEFT alone. Both files appear together; on an
/// error the directory is as it was.
///
/// # Errors
/// [`CheckpointError`] names the matrix that does not fit rank and widths or is not finite in `dtype`; or the file that cannot be
/// written.
pub fn expert(
    directory: &Path,
    base_name: &str,
    expert: &Expert,
    dtype: DType,
) -> Result<(), CheckpointError> {
    let mut files = Files::new(directory)?;
    files.stage(peft::WEIGHTS, |file, out| {
        let named = named(file, expert)?;
        let mut entries = Vec::with_capacity(named.len());
        for (name, shape, values) in &named {
            entries.push(Entry {
                name,
                shape,
                numbers: numbers(file, values, dtype)?,
            });
        }
        safetensors::write(file, entries, out)
    })?;
    files.stage_json(peft::CONFIG, &config(base_name, expert))?;
    files.finish()
}

fn config<'a>(base_name: &'a str, expert: &Expert) -> Config<'a> {
    // Exact in f64: a scale has 24 bits and a rank 12, so that dividing again gives the same scale.
    let alpha = f64::from(expert.scale) * expert.rank as f64;
    Config {
        peft_type: "LORA",
        task_type: "CAUSAL_LM",
        base_model_name_or_path: base_name,
        inference_mode: true,
        r: expert.rank,
        lora_alpha: if alpha.fract() == 0.0 {
            Alpha::Whole(alpha as u64)
        } else {
            Alpha::Real(alpha)
        },
        lora_dropout: 0.0,
        target_modules: ["down_proj"],
        bias: "none",
        fan_in_fan_out: false,
        init_lora_weights: true,
        modules_to_save: None,
        use_dora: false,
        use_rslora: false,
    }
}

/// A matrix: name, axes, numbers.
type Named<'a> = (String, [usize; 2], &'a [f32]);

/// The matrices by PEFT's names, with shapes that all layers share.
fn named<'a>(file: &Path, expert: &'a Expert) -> Result<Vec<Named<'a>>, CheckpointError> {
    let rank = expert.rank;
    let first = expert.layers.first();
    let columns = |values: &[f32]| values.len() / rank.max(1);
    let m = first.map_or(0, |layer| columns(&layer.lora_a));
    let d = first.map_or(0, |layer| columns(&layer.lora_b));
    let mut named = Vec::new();
    for (index, layer) in expert.layers.iter().enumerate() {
        for (matrix, shape, values) in [
            ("lora_A", [rank, m], &layer.lora_a),
            ("lora_B", [d, rank], &layer.lora_b),
        ] {
            let name = peft::name(index, matrix);
            check_len(file, &name, &shape, values)?;
            named.push((name, shape, values.as_slice()));
        }
    }
    Ok(named)
}
