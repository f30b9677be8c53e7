//! Files that lie.

use candle_core::quantized::GgmlDType;
use midpo::text::Tokenizer;
use proptest::prelude::*;

use super::convert::routed;
use super::load_path;
use crate::gguf_file::{GgufFile, Meta, Tensor, Written};

fn error(name: &str, bytes: &[u8]) -> String {
    let written = Written::new(name, bytes);
    load_path(written.path()).map(drop).unwrap_err().to_string()
}

proptest! {
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
