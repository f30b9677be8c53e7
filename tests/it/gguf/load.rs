//! Tensors and configuration, in every format.

use std::collections::HashMap;

use candle_core::quantized::GgmlDType;
use midpo::checkpoint::{BaseTensors, HostTensor, RopeScaling};
use midpo::dtype::DType;
use midpo::types::TokenId;

use super::convert::{GQA_FILES, NAMES, encode, gqa, interleave, routed, tensors};
use super::load;
use crate::gguf_file::{GgufFile, Meta, Tensor};

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
