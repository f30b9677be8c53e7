//! GGUF files: the fixtures rewritten as llama.cpp would, every block format, and files that lie.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor as CandleTensor};
use midpo::checkpoint::{
    BaseTensors, CheckpointError, HostTensor, LlamaConfig, RopeScaling, Sources, TextParts, Verify,
};
use midpo::dtype::DType;
use midpo::text::{Chat, ChatTemplate, Message, SpecialTokens, Tokenizer};
use midpo::types::TokenId;
use proptest::prelude::*;
use serde_json::Value;

use crate::gguf_file::{GgufFile, Meta, Tensor, Written};

fn fixture(path: &str) -> Vec<u8> {
    let path = format!("{}/tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A checkpoint's tensors, widened.
fn tensors(directory: &str, files: &[&str]) -> HashMap<String, (Vec<usize>, Vec<f32>)> {
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
fn interleave(values: &[f32], heads: usize, cols: usize) -> Vec<f32> {
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

const NAMES: [(&str, &str); 9] = [
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
fn encode(values: &[f32], shape: &[usize], format: GgmlDType) -> (u32, Vec<u8>, Vec<f32>) {
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

pub(super) fn routed(format: GgmlDType) -> GgufFile {
    converted("tiny-routed", &["model.safetensors"], format)
}

const GQA_FILES: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

/// With Llama 3's factors, as llama.cpp writes them.
fn gqa() -> GgufFile {
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

fn load(name: &str, file: &GgufFile) -> Parts {
    let written = file.write(name);
    load_path(written.path()).unwrap()
}

type Parts = (LlamaConfig, BaseTensors, TextParts);

fn load_path(path: &Path) -> Result<Parts, CheckpointError> {
    let sources = Sources {
        model: path.to_owned(),
        safety: None,
        helpfulness: None,
        router: None,
        verify: Verify::default(),
    };
    let checkpoint = midpo::checkpoint::load(&sources)?;
    assert!(checkpoint.experts.is_none());
    Ok((checkpoint.config, checkpoint.base, checkpoint.text))
}

fn error(name: &str, bytes: &[u8]) -> String {
    let written = Written::new(name, bytes);
    load_path(written.path()).map(drop).unwrap_err().to_string()
}

/// Every tensor of `base`, by Hugging Face's name.
fn named(base: &BaseTensors) -> Vec<(String, &HostTensor)> {
    let mut named = vec![
        ("model.embed_tokens.weight".to_owned(), &base.embed_tokens),
        ("model.norm.weight".to_owned(), &base.norm),
    ];
    named.extend(
        base.lm_head
            .iter()
            .map(|head| ("lm_head.weight".to_owned(), head)),
    );
    for (index, layer) in base.layers.iter().enumerate() {
        let parts = [
            &layer.input_layernorm,
            &layer.q_proj,
            &layer.k_proj,
            &layer.v_proj,
            &layer.o_proj,
            &layer.post_attention_layernorm,
            &layer.gate_proj,
            &layer.up_proj,
            &layer.down_proj,
        ];
        for ((_, hf), tensor) in NAMES.iter().zip(parts) {
            named.push((format!("model.layers.{index}.{hf}.weight"), tensor));
        }
    }
    named
}

#[test]
fn load_gives_the_tensors_and_config_of_the_fixture_that_was_converted() {
    for (directory, files, file, tied) in [
        (
            "tiny-routed",
            &["model.safetensors"][..],
            routed(GgmlDType::F32),
            false,
        ),
        ("tiny-gqa", &GQA_FILES[..], gqa(), true),
    ] {
        let (config, base, _) = load(directory, &file);
        let want = tensors(directory, files);
        let found = named(&base);
        assert_eq!(found.len(), want.len());
        for (name, tensor) in found {
            let (shape, values) = &want[&name];
            assert_eq!(tensor.shape(), shape, "{name}");
            assert_eq!(&tensor.to_f32(), values, "{name}");
        }
        assert_eq!(config.tie_word_embeddings, tied);
        assert_eq!(config.vocab_size, 512);
        assert_eq!(config.bos_token_id, Some(TokenId(1)));
    }
    let (config, ..) = load("config", &gqa());
    assert_eq!(config.eos_token_ids, [TokenId(2), TokenId(4)]);
    assert_eq!(
        (config.num_heads, config.num_kv_heads, config.head_dim),
        (8, 2, 8)
    );
    assert_eq!(config.rope_theta, 500_000.0);
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_positions: 64,
    };
    assert_eq!(config.rope_scaling, llama3);
}

#[test]
fn load_keeps_block_formats_and_moves_their_rows_whole() {
    let formats = [
        (GgmlDType::F16, DType::F16),
        (GgmlDType::BF16, DType::BF16),
        (GgmlDType::Q8_0, DType::Q8_0),
        (GgmlDType::Q4_0, DType::Q4_0),
        (GgmlDType::Q4_1, DType::Q4_1),
        (GgmlDType::Q5_0, DType::Q5_0),
        (GgmlDType::Q5_1, DType::Q5_1),
    ];
    let originals = tensors("tiny-routed", &["model.safetensors"]);
    for (format, dtype) in formats {
        let (_, base, _) = load(dtype.as_str(), &routed(format));
        for (name, tensor) in named(&base) {
            let (shape, values) = &originals[&name];
            let blocks = shape.len() == 2 && shape[1].is_multiple_of(dtype.block_len());
            if !blocks {
                assert_eq!(tensor.dtype(), DType::F32, "{name}");
                continue;
            }
            assert_eq!(tensor.dtype(), dtype, "{name}");
            // Rows are quantised one by one, so their order does not change them.
            let (_, _, widened) = encode(values, shape, format);
            assert_eq!(tensor.to_f32(), widened, "{name} {}", dtype.as_str());
        }
    }
}

/// A model of one layer that is wide enough for blocks of 256.
fn wide(format: GgmlDType) -> (GgufFile, HashMap<String, Vec<f32>>) {
    let mut file = routed(GgmlDType::F32);
    for (key, value) in [
        ("llama.block_count", 1),
        ("llama.embedding_length", 256),
        ("llama.feed_forward_length", 512),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.rope.dimension_count", 64),
    ] {
        file.set(key, Meta::U32(value));
    }
    file.tensors.clear();
    let mut values = HashMap::new();
    let mut add = |name: &str, shape: &[usize], heads: Option<usize>| {
        let count: usize = shape.iter().product();
        let seed = name.len() + count;
        let original: Vec<f32> = (0..count)
            .map(|i| (((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0) * 0.3)
            .collect();
        let ordered = match heads {
            Some(heads) => interleave(&original, heads, shape[1]),
            None => original.clone(),
        };
        let format = if shape.len() == 2 {
            format
        } else {
            GgmlDType::F32
        };
        let (number, bytes, _) = encode(&ordered, shape, format);
        let (_, _, widened) = encode(&original, shape, format);
        file.tensors.push(Tensor {
            name: name.into(),
            shape: shape.into(),
            format: number,
            bytes,
        });
        values.insert(name.to_owned(), widened);
    };
    add("token_embd.weight", &[512, 256], None);
    add("output_norm.weight", &[256], None);
    add("blk.0.attn_norm.weight", &[256], None);
    add("blk.0.attn_q.weight", &[256, 256], Some(4));
    add("blk.0.attn_k.weight", &[128, 256], Some(2));
    add("blk.0.attn_v.weight", &[128, 256], None);
    add("blk.0.attn_output.weight", &[256, 256], None);
    add("blk.0.ffn_norm.weight", &[256], None);
    add("blk.0.ffn_gate.weight", &[512, 256], None);
    add("blk.0.ffn_up.weight", &[512, 256], None);
    add("blk.0.ffn_down.weight", &[256, 512], None);
    (file, values)
}

#[test]
fn load_keeps_k_quants_and_moves_their_rows_whole() {
    for (format, dtype) in [
        (GgmlDType::Q4K, DType::Q4K),
        (GgmlDType::Q5K, DType::Q5K),
        (GgmlDType::Q6K, DType::Q6K),
    ] {
        let (file, values) = wide(format);
        let (_, base, _) = load(dtype.as_str(), &file);
        let layer = &base.layers[0];
        for (name, tensor) in [
            ("token_embd.weight", &base.embed_tokens),
            ("blk.0.attn_q.weight", &layer.q_proj),
            ("blk.0.attn_k.weight", &layer.k_proj),
            ("blk.0.ffn_down.weight", &layer.down_proj),
        ] {
            assert_eq!(tensor.dtype(), dtype);
            assert_eq!(tensor.to_f32(), values[name], "{name}");
        }
        assert!(base.lm_head.is_none());
    }
}

fn tokenizer(text: &TextParts) -> Tokenizer {
    Tokenizer::new(&text.tokenizer_json).unwrap()
}

#[test]
fn byte_level_tokenizer_gives_the_golden_ids() {
    for (directory, file) in [("tiny-routed", routed(GgmlDType::F32)), ("tiny-gqa", gqa())] {
        let (_, _, text) = load(&format!("{directory}-tokenizer"), &file);
        assert_eq!(text.bos_token.as_deref(), Some("<s>"));
        assert_eq!(text.eos_token.as_deref(), Some("</s>"));
        let tokenizer = tokenizer(&text);
        let golden: Value =
            serde_json::from_slice(&fixture(&format!("{directory}/golden/tokenizer.json")))
                .unwrap();
        for case in golden["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            for (key, bos) in [("ids", false), ("ids_with_bos", true)] {
                let found: Vec<u32> = tokenizer
                    .encode_trusted(text, bos)
                    .unwrap()
                    .iter()
                    .map(|id| id.0)
                    .collect();
                assert_eq!(serde_json::json!(found), case[key], "{text}");
            }
        }
    }
}

/// A SentencePiece vocabulary small enough to work out by hand. Later words have lower scores.
fn sentence_piece() -> GgufFile {
    let mut tokens: Vec<(String, i32)> =
        vec![("<unk>".into(), 2), ("<s>".into(), 3), ("</s>".into(), 3)];
    tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    let words = [
        "▁t", "he", "▁the", "▁h", "▁he", "ll", "▁hell", "o", "▁hello", "▁", "h", "e", "l", "t",
    ];
    tokens.extend(words.map(|word| (word.to_owned(), 1)));
    tokens.push(("<think>".into(), 4));
    // Words that would make `</s>` if control tokens were words.
    tokens.extend(["</", "s>", "<", "/", "s", ">"].map(|word| (word.to_owned(), 1)));
    tokens.resize_with(512, || (String::new(), 5));
    let mut file = routed(GgmlDType::F32);
    for key in ["pre", "merges", "add_bos_token"] {
        file.remove(&format!("tokenizer.ggml.{key}"));
    }
    file.set("tokenizer.ggml.model", Meta::Text("llama".into()));
    file.set(
        "tokenizer.ggml.scores",
        Meta::F32s((0..512).map(|id| -(id as f32)).collect()),
    );
    file.set(
        "tokenizer.ggml.tokens",
        Meta::Texts(tokens.iter().map(|(text, _)| text.clone()).collect()),
    );
    file.set(
        "tokenizer.ggml.token_type",
        Meta::I32s(tokens.iter().map(|(_, kind)| *kind).collect()),
    );
    file
}

#[test]
fn sentence_piece_tokenizer_merges_by_score_and_falls_back_on_bytes() {
    let (_, _, text) = load("sentence-piece", &sentence_piece());
    let tokenizer = tokenizer(&text);
    let texts = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, false).unwrap();
        ids.iter().map(|id| tokenizer.token_text(*id)).collect()
    };
    assert_eq!(texts("the hello"), [" the", " hello"]);
    // The user's `</s>` stays words, though its halves are words.
    assert_eq!(texts("the</s>"), [" the", "</", "s>"]);
    let ids = |text: &str| tokenizer.encode(text, true).unwrap();
    let byte = |byte: u8| TokenId(3 + u32::from(byte));
    let space = tokenizer.id_of("▁").unwrap();
    assert_eq!(ids("é"), [TokenId(1), space, byte(0xc3), byte(0xa9)]);
    assert_eq!(tokenizer.token_bytes(byte(0xc3)), [0xc3]);
    let think = tokenizer.id_of("<think>").unwrap();
    assert!(ids("the <think>").contains(&think) && !tokenizer.is_special(think));
    for text in ["the hello", " the", "é hello\n", ""] {
        assert_eq!(tokenizer.decode(&ids(text), true), text);
    }
    let trusted = tokenizer.encode_trusted("the</s>the", false).unwrap();
    let the = tokenizer.id_of("▁the").unwrap();
    assert_eq!(trusted, [the, TokenId(2), the]);
}

proptest! {
    #[test]
    fn sentence_piece_decodes_as_the_library_does_one_id_at_a_time(
        ids in prop::collection::vec(prop_oneof![0..290u32, 0..3u32, 260..262u32], 0..24),
        skip: bool,
        ){
        use midpo::text::{Detokenizer, Start};
        let (_, _, text) = load("sentence-piece-decode", &sentence_piece());
        let library = tokenizers::Tokenizer::from_bytes(&text.tokenizer_json).unwrap();
        let tokenizer = tokenizer(&text);
        let mut detokenizer = Detokenizer::new(&tokenizer, Start::Text, skip);
        let mut pieces = String::new();
        for id in &ids {
            pieces.push_str(&detokenizer.push(TokenId(*id)));
        }
        pieces.push_str(&detokenizer.finish());
        prop_assert_eq!(pieces, library.decode(&ids, skip).unwrap());
    }

    #[test]
    fn load_never_panics_on_a_file_with_flipped_bytes(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (bytes, header) = small();
        let mut bytes = bytes;
        for (at, value, in_header) in flips {
            let at = at.index(if in_header { header } else { bytes.len() });
            bytes[at] ^= value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let written = Written::new("flipped", &bytes);
        if let Ok((_, _, text)) = load_path(written.path()) {
            let _ = Tokenizer::new(&text.tokenizer_json);
        }
    }
}

/// A file with few tokens, so that flips hit lengths and kinds; and the length of its header.
fn small() -> (Vec<u8>, usize) {
    let mut file = routed(GgmlDType::F32);
    let few = |values: &[&str]| Meta::Texts(values.iter().map(|text| (*text).to_owned()).collect());
    file.set(
        "tokenizer.ggml.tokens",
        few(&["<unk>", "<s>", "</s>", "a", "b", "ab"]),
    );
    file.set(
        "tokenizer.ggml.token_type",
        Meta::I32s(vec![3, 3, 3, 1, 1, 1]),
    );
    file.set("tokenizer.ggml.merges", few(&["a b"]));
    let data: usize = file
        .tensors
        .iter()
        .map(|t| t.bytes.len().next_multiple_of(32))
        .sum();
    let bytes = file.bytes();
    let header = bytes.len() - data;
    (bytes, header)
}

/// Changes a good file, and what the error must say.
type Lie = (&'static str, fn(&mut GgufFile), &'static [&'static str]);

const LIES: &[Lie] = &[
    ("version", |f| f.version = 4, &["version 2 or 3", "4"]),
    ("big-endian", |f| f.version = 3 << 24, &["big-endian"]),
    (
        "architecture",
        |f| f.set("general.architecture", Meta::Text("qwen2".into())),
        &["general.architecture", "`llama`", "`qwen2`"],
    ),
    (
        "no-layers",
        |f| f.remove("llama.block_count"),
        &["llama.block_count", "nothing"],
    ),
    (
        "many-layers",
        |f| f.set("llama.block_count", Meta::U32(u32::MAX)),
        &["llama.block_count", "1 to", "4294967295"],
    ),
    (
        "one-layer-less",
        |f| f.set("llama.block_count", Meta::U32(2)),
        &["blk.2.", "beside"],
    ),
    (
        "one-layer-more",
        |f| f.set("llama.block_count", Meta::U32(4)),
        &["blk.3.attn_norm.weight", "found none"],
    ),
    (
        "experts",
        |f| f.set("llama.expert_count", Meta::U32(8)),
        &["llama.expert_count", "8"],
    ),
    (
        "rope-part",
        |f| f.set("llama.rope.dimension_count", Meta::U32(8)),
        &["llama.rope.dimension_count", "16", "8"],
    ),
    (
        "yarn",
        |f| f.set("llama.rope.scaling.type", Meta::Text("yarn".into())),
        &["llama.rope.scaling.type", "`linear`", "`yarn`"],
    ),
    (
        "heads",
        |f| f.set("llama.attention.head_count", Meta::U32(3)),
        &["head_count", "3"],
    ),
    (
        "kv-heads",
        |f| f.set("llama.attention.head_count_kv", Meta::U32(3)),
        &["head_count_kv", "divisor", "3"],
    ),
    (
        "bias",
        |f| {
            f.tensors.push(Tensor {
                name: "blk.0.attn_q.bias".into(),
                shape: vec![64],
                format: 0,
                bytes: vec![0; 256],
            });
        },
        &["blk.0.attn_q.bias", "beside"],
    ),
    (
        "format",
        |f| f.tensor("output.weight").format = 10,
        &["output.weight", "q6_K", "10"],
    ),
    (
        "shape",
        |f| f.tensor("blk.1.ffn_up.weight").shape = vec![88, 128],
        &["blk.1.ffn_up.weight", "[176, 64]", "[88, 128]"],
    ),
    (
        "axes",
        |f| f.tensor("output_norm.weight").shape = vec![1; 9],
        &["output_norm.weight", "1 to 4 axes", "9"],
    ),
    (
        "axis-absurd",
        |f| f.tensor("output.weight").shape = vec![1 << 62, 64],
        &["output.weight"],
    ),
    (
        "nan",
        |f| f.tensor("blk.2.attn_v.weight").bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes()),
        &["blk.2.attn_v.weight", "finite", "element 1"],
    ),
    (
        "cut",
        |f| {
            let last = f.tensors.last_mut().unwrap();
            last.bytes.truncate(last.bytes.len() - 1);
        },
        &["blk.2.ffn_down.weight", "the end of the file"],
    ),
    (
        "twice",
        |f| {
            let tensor = f.tensors[1].clone();
            f.tensors.push(tensor);
        },
        &["output_norm.weight", "found two"],
    ),
    (
        "key-twice",
        |f| f.meta.push(("llama.block_count".into(), Meta::U32(3))),
        &["llama.block_count", "twice"],
    ),
    (
        "tokenizer",
        |f| f.set("tokenizer.ggml.model", Meta::Text("bert".into())),
        &["tokenizer.ggml.model", "`gpt2` or `llama`", "`bert`"],
    ),
    (
        "pre",
        |f| f.set("tokenizer.ggml.pre", Meta::Text("klingon".into())),
        &["tokenizer.ggml.pre", "llama-bpe", "`klingon`"],
    ),
    (
        "eos",
        |f| f.set("tokenizer.ggml.eos_token_id", Meta::U32(512)),
        &["tokenizer.ggml.eos_token_id", "512"],
    ),
    (
        "merge",
        |f| f.set("tokenizer.ggml.merges", Meta::Texts(vec!["zz qq".into()])),
        &["tokenizer.ggml.merges[0]", "zz qq"],
    ),
    (
        "token-type",
        |f| f.set("tokenizer.ggml.token_type", Meta::I32s(vec![1])),
        &["tokenizer.ggml.token_type", "512", "1"],
    ),
    (
        "alignment",
        |f| f.set("general.alignment", Meta::U32(0)),
        &["general.alignment", "multiple of 8", "0"],
    ),
];

#[test]
fn load_when_the_file_lies_says_which_key_or_tensor_and_what_was_expected() {
    for (name, lie, says) in LIES {
        let mut file = routed(GgmlDType::F32);
        lie(&mut file);
        let message = error(name, &file.bytes());
        assert!(message.contains(".gguf"), "{name}: {message}");
        for part in *says {
            assert!(message.contains(part), "{name}: {message}: {part}");
        }
    }
    for (name, bytes, part) in [
        ("empty", &b""[..], "empty"),
        ("magic", b"GGML rest of the file", "GGUF"),
        ("ends", b"GGUF\x03\0\0\0", "number of tensors"),
    ] {
        let message = error(name, bytes);
        assert!(message.contains(part), "{name}: {message}");
    }
}

#[test]
fn parse_when_lengths_are_absurd_ends_before_anything_is_reserved() {
    let head = |tensors: u64, keys: u64| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        bytes
    };
    let mut array = head(0, 1);
    array.extend(1u64.to_le_bytes());
    array.extend(b"k");
    array.extend(9u32.to_le_bytes());
    let with = |kind: u32, len: u64| {
        let mut bytes = array.clone();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes
    };
    let mut key = head(0, 1);
    key.extend(u64::MAX.to_le_bytes());
    for (name, bytes, part) in [
        ("tensors-absurd", head(u64::MAX, 0), "tensors"),
        ("keys-absurd", head(0, u64::MAX), "keys"),
        ("key-absurd", key, "a key"),
        ("array-absurd", with(6, u64::MAX), "elements of `k`"),
        ("texts-absurd", with(8, u64::MAX), "elements of `k`"),
        ("nested", with(9, 1), "array of arrays"),
        ("kind-unknown", with(13, 1), "0 to 12"),
    ] {
        let message = error(name, &bytes);
        assert!(message.contains(part), "{name}: {message}");
    }
}

/// A real file, where one is at hand: `.ci/run` names it.
#[test]
fn real_file_gives_the_golden_prompt_ids() {
    let Some(path) = std::env::var_os("MIDPO_TEST_GGUF") else {
        println!("MIDPO_TEST_GGUF names no file: nothing to test");
        return;
    };
    let (config, base, text) = load_path(Path::new(&path)).unwrap();
    assert_eq!(
        (config.num_layers, config.hidden_size, config.vocab_size),
        (30, 576, 49_152)
    );
    assert!(config.tie_word_embeddings && base.lm_head.is_none());
    assert_eq!(base.layers[0].q_proj.dtype(), DType::Q4_1);
    assert_eq!(base.embed_tokens.dtype(), DType::Q8_0);
    let special = SpecialTokens {
        bos_token: text.bos_token.clone(),
        eos_token: text.eos_token.clone(),
        others: text.special_tokens.clone(),
    };
    let template = ChatTemplate::new(text.chat_template.as_deref(), special).unwrap();
    let tokenizer = tokenizer(&text);
    let golden: Value = serde_json::from_slice(&fixture("smollm2/golden.json")).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let chat = Chat {
            messages: vec![Message {
                role: "user".into(),
                content: case["prompt"].as_str().unwrap().into(),
                ..Message::default()
            }],
            add_generation_prompt: true,
            ..Chat::default()
        };
        assert_eq!(
            template.render(&chat).unwrap(),
            case["rendered"].as_str().unwrap()
        );
        let ids: Vec<u32> = template
            .encode(&tokenizer, &chat)
            .unwrap()
            .iter()
            .map(|id| id.0)
            .collect();
        assert_eq!(serde_json::json!(ids), case["prompt_ids"]);
        let greedy = case["greedy_ids"].as_array().unwrap().iter();
        let greedy: Vec<TokenId> = greedy
            .map(|id| TokenId(u32::try_from(id.as_u64().unwrap()).unwrap()))
            .collect();
        assert_eq!(
            tokenizer.decode(&greedy, true),
            case["greedy_text"].as_str().unwrap()
        );
    }
}
