//! The fixtures as llama.cpp would convert them.

use std::collections::HashMap;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor as CandleTensor};
use midpo::dtype::DType;
use serde_json::Value;

use crate::gguf_file::{GgufFile, Meta, Tensor};

pub(super) fn fixture(path: &str) -> Vec<u8> {
    let path = format!("{}/tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A checkpoint's tensors, widened.
pub(super) fn tensors(directory: &str, files: &[&str]) -> HashMap<String, (Vec<usize>, Vec<f32>)> {
    let mut tensors = HashMap::new();
    for file in files {
        let bytes = fixture(&format!("{directory}/{file}"));
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in parsed.tensors() {
            let dtype = match view.dtype() {
                safetensors::Dtype::F32 => DType::F32,
                safetensors::Dtype::BF16 => DType::BF16,
                other => panic!("{other:?}"),
            };
            let mut values = vec![0.0; view.shape().iter().product()];
            dtype.widen(view.data(), &mut values);
            tensors.insert(name.clone(), (view.shape().to_vec(), values));
        }
    }
    tensors
}

/// llama.cpp's order of rows of q and k.
pub(super) fn interleave(values: &[f32], heads: usize, cols: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = values.chunks(cols).collect();
    let head_rows = rows.len() / heads;
    let mut ordered = Vec::new();
    for head in rows.chunks(head_rows) {
        for i in 0..head_rows / 2 {
            ordered.extend_from_slice(head[i]);
            ordered.extend_from_slice(head[i + head_rows / 2]);
        }
    }
    ordered
}

pub(super) const NAMES: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The number, bytes and exact values of `values` in a format.
pub(super) fn encode(
    values: &[f32],
    shape: &[usize],
    format: GgmlDType,
) -> (u32, Vec<u8>, Vec<f32>) {
    let tensor = CandleTensor::from_slice(values, shape, &Device::Cpu).unwrap();
    let quantised = QTensor::quantize(&tensor, format).unwrap();
    let widened = quantised.dequantize(&Device::Cpu).unwrap();
    let widened = widened.flatten_all().unwrap().to_vec1().unwrap();
    let number = match format {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::BF16 => 30,
        other => panic!("{other:?}"),
    };
    (number, quantised.data().unwrap().into_owned(), widened)
}

/// A fixture as llama.cpp would convert it, matrices in `format` where their rows are whole blocks.
fn converted(directory: &str, files: &[&str], format: GgmlDType) -> GgufFile {
    let config: Value =
        serde_json::from_slice(&fixture(&format!("{directory}/config.json"))).unwrap();
    let number = |key: &str| u32::try_from(config[key].as_u64().unwrap()).unwrap();
    let (heads, kv_heads) = (number("num_attention_heads"), number("num_key_value_heads"));
    let head_dim = number("hidden_size") / heads;
    let tensors = tensors(directory, files);
    let mut meta: Vec<(String, Meta)> = vec![
        ("general.architecture".into(), Meta::Text("llama".into())),
        (
            "llama.block_count".into(),
            Meta::U32(number("num_hidden_layers")),
        ),
        (
            "llama.context_length".into(),
            Meta::U32(number("max_position_embeddings")),
        ),
        (
            "llama.embedding_length".into(),
            Meta::U32(number("hidden_size")),
        ),
        (
            "llama.feed_forward_length".into(),
            Meta::U32(number("intermediate_size")),
        ),
        ("llama.attention.head_count".into(), Meta::U32(heads)),
        ("llama.attention.head_count_kv".into(), Meta::U32(kv_heads)),
        (
            "llama.attention.layer_norm_rms_epsilon".into(),
            Meta::F32(config["rms_norm_eps"].as_f64().unwrap() as f32),
        ),
        (
            "llama.rope.freq_base".into(),
            Meta::F32(config["rope_theta"].as_f64().unwrap() as f32),
        ),
        ("llama.rope.dimension_count".into(), Meta::U32(head_dim)),
    ];
    meta.extend(byte_level_meta(directory));
    let mut file = GgufFile {
        version: 3,
        meta,
        tensors: Vec::new(),
    };
    let mut add = |name: String, source: &str, heads: Option<u32>| {
        let (shape, values) = &tensors[source];
        let cols = *shape.last().unwrap();
        let values = match heads {
            Some(heads) => interleave(values, heads as usize, cols),
            None => values.clone(),
        };
        let blocks = matches!(format, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)
            || cols.is_multiple_of(format.block_size());
        let format = if shape.len() == 2 && blocks {
            format
        } else {
            GgmlDType::F32
        };
        let (format, bytes, _) = encode(&values, shape, format);
        file.tensors.push(Tensor {
            name,
            shape: shape.clone(),
            format,
            bytes,
        });
    };
    add(
        "token_embd.weight".into(),
        "model.embed_tokens.weight",
        None,
    );
    add("output_norm.weight".into(), "model.norm.weight", None);
    if tensors.contains_key("lm_head.weight") {
        add("output.weight".into(), "lm_head.weight", None);
    }
    for layer in 0..number("num_hidden_layers") {
        for (ggml, hf) in NAMES {
            let heads = match ggml {
                "attn_q" => Some(heads),
                "attn_k" => Some(kv_heads),
                _ => None,
            };
            add(
                format!("blk.{layer}.{ggml}.weight"),
                &format!("model.layers.{layer}.{hf}.weight"),
                heads,
            );
        }
    }
    file
}

/// `tokenizer.ggml.*` of a byte-level `tokenizer.json`.
fn byte_level_meta(directory: &str) -> Vec<(String, Meta)> {
    let json: Value =
        serde_json::from_slice(&fixture(&format!("{directory}/tokenizer.json"))).unwrap();
    let mut tokens: Vec<(u64, String, i32)> = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(text, id)| (id.as_u64().unwrap(), text.clone(), 1))
        .collect();
    for added in json["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap();
        tokens.retain(|(known, ..)| *known != id);
        tokens.push((id, added["content"].as_str().unwrap().to_owned(), 3));
    }
    tokens.sort();
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|pair| {
        format!(
            "{} {}",
            pair[0].as_str().unwrap(),
            pair[1].as_str().unwrap()
        )
    });
    vec![
        ("tokenizer.ggml.model".into(), Meta::Text("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Meta::Text("gpt-2".into())),
        (
            "tokenizer.ggml.tokens".into(),
            Meta::Texts(tokens.iter().map(|(_, text, _)| text.clone()).collect()),
        ),
        (
            "tokenizer.ggml.token_type".into(),
            Meta::I32s(tokens.iter().map(|(_, _, kind)| *kind).collect()),
        ),
        (
            "tokenizer.ggml.merges".into(),
            Meta::Texts(merges.collect()),
        ),
        ("tokenizer.ggml.bos_token_id".into(), Meta::U32(1)),
        ("tokenizer.ggml.eos_token_id".into(), Meta::U32(2)),
        ("tokenizer.ggml.add_bos_token".into(), Meta::Bool(true)),
    ]
}

pub(crate) fn routed(format: GgmlDType) -> GgufFile {
    converted("tiny-routed", &["model.safetensors"], format)
}

pub(super) const GQA_FILES: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

/// With Llama 3's factors, as llama.cpp writes them.
pub(super) fn gqa() -> GgufFile {
    let mut file = converted("tiny-gqa", &GQA_FILES, GgmlDType::BF16);
    file.set("llama.rope.scaling.original_context_length", Meta::U32(64));
    file.set("tokenizer.ggml.eot_token_id", Meta::U32(4));
    let factors = (0..4).map(|i| {
        let wavelength = std::f64::consts::TAU * 5e5f64.powf(f64::from(i) / 4.0);
        let turns = 64.0 / wavelength;
        let smooth = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
        (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32
    });
    file.tensors.push(Tensor {
        name: "rope_freqs.weight".into(),
        shape: vec![4],
        format: 0,
        bytes: factors.flat_map(f32::to_le_bytes).collect(),
    });
    file
}
