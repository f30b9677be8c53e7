//! Loading: good files load, every hostile one is refused by name, and no mutation of a good one does more than fail.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};

use midpo::checkpoint::{
    BaseTensors, Checkpoint, CheckpointError, GenerationDefaults, HostTensor, Overwrite,
    RopeScaling, Sources, Verify, load, load_embedded, pack,
};
use midpo::dtype::{BlockType, DType};
use midpo::types::TokenId;
use proptest::prelude::*;
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A directory of its own, removed with everything in it.
pub struct Scratch(TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// With a copy of a fixture's directory inside.
    pub fn of(fixture: &str) -> (Self, PathBuf) {
        let scratch = Self::new();
        let model = scratch.path().join("model");
        copy_directory(&fixtures().join(fixture), &model);
        (scratch, model)
    }
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The fixtures' layout: experts and router beside the base.
fn routed(model: &Path) -> Sources {
    Sources {
        safety: Some(model.join("safety")),
        helpfulness: Some(model.join("helpfulness")),
        router: Some(model.to_path_buf()),
        ..Sources::model(model)
    }
}

fn load_fixture(name: &str) -> Checkpoint {
    load(&routed(&fixtures().join(name))).unwrap()
}

pub fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(a.config, b.config);
    assert_eq!(a.generation, b.generation);
    assert_eq!(a.text.tokenizer_json, b.text.tokenizer_json);
    assert_eq!(a.text.chat_template, b.text.chat_template);
    let numbers = |checkpoint: &Checkpoint| {
        let mut all: Vec<f32> = tensors(&checkpoint.base)
            .flat_map(|(_, tensor)| tensor.to_f32())
            .collect();
        if let Some(experts) = &checkpoint.experts {
            for expert in [&experts.safety, &experts.helpfulness] {
                all.push(expert.scale);
                for layer in &expert.layers {
                    all.extend(layer.lora_a.iter().chain(&layer.lora_b));
                }
            }
            for layer in &experts.router {
                for gate in [&layer.safety, &layer.helpfulness] {
                    all.extend(&gate.weight);
                    all.push(gate.bias);
                }
            }
        }
        all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert!(numbers(a) == numbers(b), "weights differ");
}

#[test]
fn load_when_the_files_are_good_yields_what_they_say() {
    let routed = load_fixture("tiny-routed");
    let config = &routed.config;
    assert_eq!(
        (
            config.hidden_size,
            config.intermediate_size,
            config.num_layers,
            config.vocab_size
        ),
        (64, 176, 3, 512)
    );
    assert_eq!(
        (config.num_heads, config.num_kv_heads, config.head_dim),
        (4, 4, 16)
    );
    assert_eq!(config.bos_token_id, Some(TokenId(1)));
    assert_eq!(config.eos_token_ids, [TokenId(2)]);
    assert_eq!(config.rope_scaling, RopeScaling::None);
    assert!(routed.base.lm_head.is_some());
    assert_eq!(routed.base.embed_tokens.dtype(), DType::F32);
    assert_eq!(routed.base.layers[0].down_proj.shape(), [64, 176]);
    let experts = routed.experts.unwrap();
    assert_eq!((experts.safety.rank, experts.safety.scale), (16, 2.0));
    assert_eq!(experts.router.len(), 3);
    assert_eq!(routed.text.bos_token.as_deref(), Some("<s>"));
    assert_eq!(routed.text.chat_template, None);
    assert_eq!(routed.fingerprint.len(), 64);

    let gqa = load_fixture("tiny-gqa");
    assert_eq!((gqa.config.num_heads, gqa.config.num_kv_heads), (8, 2));
    assert_eq!(gqa.config.rope_theta, 500_000.0);
    assert_eq!(
        gqa.config.rope_scaling,
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 64
        }
    );
    assert_eq!(gqa.config.eos_token_ids, [TokenId(2), TokenId(4)]);
    assert!(gqa.base.lm_head.is_none());
    assert_eq!(gqa.base.embed_tokens.dtype(), DType::BF16);
    assert!(gqa.text.chat_template.unwrap().contains("<|assistant|>"));
    assert!(
        gqa.text
            .special_tokens
            .contains(&("pad_token".to_owned(), "<pad>".to_owned()))
    );
    let scale = gqa.experts.unwrap().safety.scale;
    assert!((scale - 24.0 / 8f32.sqrt()).abs() < 1e-6, "{scale}");

    assert!(load_fixture("tiny-hostile/good").experts.is_some());
}

#[test]
fn load_without_experts_is_a_plain_llama_and_with_some_of_them_is_refused() {
    let model = fixtures().join("tiny-routed");
    assert!(load(&Sources::model(&model)).unwrap().experts.is_none());
    for (missing, word) in [(0, "safety"), (1, "helpfulness"), (2, "router")] {
        let mut sources = routed(&model);
        match missing {
            0 => sources.safety = None,
            1 => sources.helpfulness = None,
            _ => sources.router = None,
        }
        let error = load(&sources).unwrap_err();
        assert!(
            matches!(error, CheckpointError::PartialExperts { missing, .. } if missing.contains(word))
        );
    }
}

#[test]
fn experts_of_one_directory_are_found_and_what_is_missing_is_named() {
    let (scratch, model) = Scratch::of("tiny-hostile/good");
    let base = fixtures().join("tiny-hostile/good");
    let named = load(&routed(&base)).unwrap();
    let experts = || Sources::model(&base).with_experts(&model);
    assert_same(&named, &load(&experts().unwrap()).unwrap());

    // The router in its own directory, as training leaves it.
    fs::create_dir(model.join("router")).unwrap();
    let (router, moved) = ("router.safetensors", "router/router.safetensors");
    fs::rename(model.join(router), model.join(moved)).unwrap();
    assert_same(&named, &load(&experts().unwrap()).unwrap());

    fs::remove_dir_all(model.join("router")).unwrap();
    fs::remove_file(model.join("helpfulness/adapter_config.json")).unwrap();
    let error = experts().unwrap_err().to_string();
    for word in [
        "model: ",
        "missing: helpfulness/adapter_config.json, a router",
        "router.pth",
    ] {
        assert!(error.contains(word), "`{word}` not in: {error}");
    }
    let nowhere = Sources::model(&base).with_experts(&scratch.path().join("none"));
    assert!(
        nowhere
            .unwrap_err()
            .to_string()
            .contains("safety/adapter_config.json")
    );
}

#[test]
fn folded_router_equals_the_golden_one_from_every_file_that_it_comes_in() {
    for (fixture, router) in [("tiny-routed", "router.pth"), ("tiny-gqa", "router.pth")] {
        let model = fixtures().join(fixture);
        let sources = Sources {
            router: Some(model.join(router)),
            ..routed(&model)
        };
        let golden = fs::read(model.join("golden/folded_router_f64.safetensors")).unwrap();
        let golden = safetensors::SafeTensors::deserialize(&golden).unwrap();
        let values = |name: String| {
            let tensor = golden.tensor(&name).unwrap();
            assert_eq!(tensor.dtype(), safetensors::Dtype::F64);
            let chunks = tensor.data().as_chunks::<8>().0;
            chunks
                .iter()
                .map(|b| f64::from_le_bytes(*b))
                .collect::<Vec<_>>()
        };
        let experts = load(&sources).unwrap().experts.unwrap();
        for (index, layer) in experts.router.iter().enumerate() {
            for (word, gate) in [("alpha", &layer.safety), ("beta", &layer.helpfulness)] {
                let weight = values(format!("layer_{index}_{word}.weight"));
                let bias = values(format!("layer_{index}_{word}.bias"));
                assert_eq!(gate.weight.len(), weight.len());
                let found = gate.weight.iter().chain([&gate.bias]);
                for (found, want) in found.zip(weight.iter().chain(&bias)) {
                    // Folded in f64 on both sides: what is left is the rounding to f32.
                    let error = (f64::from(*found) - want).abs();
                    assert!(
                        error <= 2e-6 * want.abs().max(1e-3),
                        "{fixture} {index} {word}: {found} {want}"
                    );
                }
            }
        }
    }
}

/// The case's checkpoint: good/ with one file replaced, as the manifest says how.
fn build_case(case: &serde_json::Value) -> (Scratch, PathBuf, String) {
    let (scratch, model) = Scratch::of("tiny-hostile/good");
    let replaces = case["replaces"].as_str().unwrap();
    let file = fixtures()
        .join("tiny-hostile")
        .join(case["file"].as_str().unwrap());
    match replaces {
        "model.safetensors.index.json" => fs::remove_file(model.join("model.safetensors")).unwrap(),
        "router.pth" => fs::remove_file(model.join("router.safetensors")).unwrap(),
        _ => {}
    }
    fs::copy(file, model.join(replaces)).unwrap();
    (scratch, model, replaces.to_owned())
}

#[test]
fn load_when_a_file_is_hostile_names_it_and_what_is_wrong() {
    let manifest = fs::read(fixtures().join("tiny-hostile/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    assert!(cases.len() >= 40);
    for case in cases {
        let name = case["case"].as_str().unwrap();
        let (_scratch, model, replaces) = build_case(case);
        let error = load(&routed(&model)).expect_err(name).to_string();
        // Of two files that disagree the error names the one at fault, which for `layers-mismatch` is told by both.
        assert!(
            error.contains(&replaces),
            "{name}: `{replaces}` not in: {error}"
        );
        for word in case["error_should_mention"].as_array().unwrap() {
            let word = word.as_str().unwrap();
            assert!(error.contains(word), "{name}: `{word}` not in: {error}");
        }
    }
}

#[test]
fn load_when_a_tensor_would_be_left_out_refuses() {
    let (_scratch, model) = Scratch::of("tiny-hostile/good");
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    for (from, to, word) in [
        (
            "\"num_hidden_layers\": 2",
            "\"num_hidden_layers\": 1",
            "model.layers.1.",
        ),
        (
            "\"attention_bias\": false",
            "\"attention_bias\": true",
            "attention_bias",
        ),
        (
            "\"hidden_act\": \"silu\"",
            "\"hidden_act\": \"gelu\"",
            "hidden_act",
        ),
        (
            "\"eos_token_id\": 2",
            "\"eos_token_id\": 512",
            "eos_token_id",
        ),
        (
            "\"num_key_value_heads\": 2",
            "\"num_key_value_heads\": 3",
            "num_key_value_heads",
        ),
        (
            "\"rms_norm_eps\": 1e-06",
            "\"rms_norm_eps\": 0",
            "rms_norm_eps",
        ),
        (
            "\"hidden_size\": 8",
            "\"hidden_size\": 16",
            "model.embed_tokens.weight",
        ),
        (
            "\"use_cache\": true",
            "\"quantization_config\": {\"bits\": 4}",
            "quantization_config",
        ),
    ] {
        assert!(config.contains(from), "{from}");
        fs::write(model.join("config.json"), config.replace(from, to)).unwrap();
        let error = load(&routed(&model)).unwrap_err().to_string();
        assert!(error.contains(word), "{to}: {error}");
    }
}

#[test]
fn generation_config_gives_defaults_and_further_ends() {
    let (_scratch, model) = Scratch::of("tiny-hostile/good");
    for (text, temperature, top_k, ends) in [
        (r#"{}"#, None, None, vec![TokenId(2)]),
        (
            r#"{"do_sample": true, "temperature": 0.5, "top_k": 7, "eos_token_id": [2, 9]}"#,
            Some(0.5),
            Some(7),
            vec![TokenId(2), TokenId(9)],
        ),
        (
            r#"{"do_sample": false, "temperature": 0.5}"#,
            Some(0.0),
            None,
            vec![TokenId(2)],
        ),
    ] {
        fs::write(model.join("generation_config.json"), text).unwrap();
        let checkpoint = load(&Sources::model(&model)).unwrap();
        assert_eq!(checkpoint.generation.temperature, temperature, "{text}");
        assert_eq!(checkpoint.generation.top_k, top_k, "{text}");
        assert_eq!(checkpoint.config.eos_token_ids, ends, "{text}");
    }
    for (text, key) in [
        (r#"{"temperature": -1}"#, "temperature"),
        (r#"{"top_p": 0}"#, "top_p"),
        (r#"{"top_k": 1.5}"#, "top_k"),
        (r#"{"eos_token_id": [-1]}"#, "eos_token_id"),
    ] {
        fs::write(model.join("generation_config.json"), text).unwrap();
        let error = load(&Sources::model(&model)).unwrap_err().to_string();
        assert!(
            error.contains("generation_config.json") && error.contains(key),
            "{error}"
        );
    }
}

#[test]
fn template_and_special_tokens_come_from_the_first_file_that_has_them() {
    let (_scratch, model) = Scratch::of("tiny-hostile/good");
    let read = || load(&Sources::model(&model)).map(|checkpoint| checkpoint.text);
    let config = model.join("tokenizer_config.json");
    for (text, want) in [
        (r#"{"chat_template": "one"}"#, Some("one")),
        (
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#,
            Some("d"),
        ),
        (
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}]}"#,
            Some("t"),
        ),
        (r#"{"chat_template": null}"#, None),
    ] {
        fs::write(&config, text).unwrap();
        assert_eq!(read().unwrap().chat_template.as_deref(), want, "{text}");
    }
    fs::write(
        &config,
        r#"{"chat_template": "one", "eos_token": {"content": "</s>", "lstrip": false}}"#,
    )
    .unwrap();
    fs::write(
        model.join("special_tokens_map.json"),
        r#"{"bos_token": "<b>", "eos_token": "<other>"}"#,
    )
    .unwrap();
    fs::write(model.join("chat_template.jinja"), "file").unwrap();
    let text = read().unwrap();
    assert_eq!(text.chat_template.as_deref(), Some("file"));
    assert_eq!(text.eos_token.as_deref(), Some("</s>"));
    assert_eq!(text.bos_token.as_deref(), Some("<b>"));
    for (content, word) in [
        (r#"{"chat_template": 1}"#, "chat_template"),
        (r#"{"bos_token": ["x"]}"#, "bos_token"),
        ("[]", "tokenizer_config.json"),
    ] {
        fs::remove_file(model.join("chat_template.jinja")).ok();
        fs::write(&config, content).unwrap();
        let error = read().unwrap_err().to_string();
        assert!(error.contains(word), "{content}: {error}");
    }
}

#[test]
fn pack_then_load_gives_the_same_checkpoint_and_tampering_is_refused() {
    for fixture in ["tiny-routed", "tiny-gqa"] {
        let scratch = Scratch::new();
        let packed = scratch.path().join("packed");
        let sources = routed(&fixtures().join(fixture));
        pack(&sources, &packed, Overwrite::Never, None).unwrap();
        let original = load(&sources).unwrap();
        let all = Sources {
            verify: Verify::All,
            ..Sources::model(&packed)
        };
        let loaded = load(&all).unwrap();
        assert_same(&original, &loaded);
        assert_eq!(original.fingerprint, loaded.fingerprint);

        assert!(matches!(
            pack(&sources, &packed, Overwrite::Never, None),
            Err(CheckpointError::Exists { .. })
        ));
        // From itself over itself: sources are read before anything is replaced.
        pack(&Sources::model(&packed), &packed, Overwrite::Packed, None).unwrap();
        assert_same(&original, &load(&all).unwrap());
        let left: Vec<_> = fs::read_dir(scratch.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        check_tampering(&packed, &all);
    }
}

#[test]
fn pack_in_blocks_holds_the_bytes_that_quantising_at_load_would_make() {
    let scratch = Scratch::new();
    let gguf = scratch.path().join("base.gguf");
    let bytes = crate::gguf::routed(candle_core::quantized::GgmlDType::F32).bytes();
    fs::write(&gguf, bytes).unwrap();
    let from_gguf = Sources {
        model: gguf,
        ..routed(&fixtures().join("tiny-routed"))
    };
    for (index, sources) in [routed(&fixtures().join("tiny-gqa")), from_gguf]
        .iter()
        .enumerate()
    {
        let original = load(sources).unwrap();
        for block in [BlockType::Q8_0, BlockType::Q4_1, BlockType::Q4_0] {
            let packed = scratch
                .path()
                .join(format!("{index}-{}", block.dtype().as_str()));
            pack(sources, &packed, Overwrite::Never, Some(block)).unwrap();
            let all = Sources {
                verify: Verify::All,
                ..Sources::model(&packed)
            };
            let loaded = load(&all).unwrap();
            assert_eq!(loaded.config, original.config);
            let text = |checkpoint: &Checkpoint| checkpoint.text.tokenizer_json.clone();
            assert_eq!(text(&loaded), text(&original));
            assert_eq!(loaded.text.chat_template, original.text.chat_template);
            assert_eq!(loaded.generation, original.generation);
            let (mut blocks, mut outer) = (0, 0);
            for ((name, was), (_, is)) in tensors(&original.base).zip(tensors(&loaded.base)) {
                let block = match name {
                    "embed" | "head" => block.outer(),
                    _ => block,
                };
                let kept = block.kept(was.shape()[was.shape().len() - 1]);
                assert_eq!(is.shape(), was.shape(), "{name}");
                if was.shape().len() == 1 {
                    assert_eq!(
                        (is.dtype(), is.bytes()),
                        (was.dtype(), was.bytes()),
                        "{name}"
                    );
                    continue;
                }
                assert_eq!(is.dtype(), kept, "{name}");
                if kept.is_quantised() {
                    assert_eq!(is.bytes(), block.quantise(&was.to_f32()), "{name}");
                    blocks += 1;
                }
                outer += usize::from(kept.is_quantised() && name == "embed");
            }
            assert!(blocks > outer && outer == 1, "{blocks} matrices in blocks");
            check_blocks_metadata(&packed, block);
        }
    }
}

/// A name in the metadata that is no format, or belongs to no matrix of bytes, is an error that says so.
fn check_blocks_metadata(packed: &Path, block: BlockType) {
    let file = packed.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let word = block.dtype().as_str();
    let change = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes
            .windows(from.len())
            .position(|window| window == from.as_bytes());
        let mut changed = bytes.clone();
        changed[at.unwrap()..][..to.len()].copy_from_slice(to.as_bytes());
        fs::remove_file(&file).unwrap();
        fs::write(&file, changed).unwrap();
        load(&Sources::model(packed)).unwrap_err().to_string()
    };
    let unknown = change(word, &"q9_9"[..word.len()]);
    assert!(
        unknown.contains("midpo.blocks") && unknown.contains("q9_9"),
        "{unknown}"
    );
    let nowhere = change("model.embed_tokens", "model.embad_tokens");
    assert!(
        nowhere.contains("midpo.blocks") && nowhere.contains("embad"),
        "{nowhere}"
    );
    let no_json = change("midpo.blocks\":\"{", "midpo.blocks\":\"[");
    assert!(no_json.contains("midpo.blocks"), "{no_json}");
    fs::write(&file, bytes).unwrap();
}

fn tensors(base: &BaseTensors) -> impl Iterator<Item = (&'static str, &HostTensor)> {
    let layers = base.layers.iter().flat_map(|layer| {
        [
            ("input_layernorm", &layer.input_layernorm),
            ("q_proj", &layer.q_proj),
            ("k_proj", &layer.k_proj),
            ("v_proj", &layer.v_proj),
            ("o_proj", &layer.o_proj),
            ("post_attention_layernorm", &layer.post_attention_layernorm),
            ("gate_proj", &layer.gate_proj),
            ("up_proj", &layer.up_proj),
            ("down_proj", &layer.down_proj),
        ]
    });
    [("embed", &base.embed_tokens), ("norm", &base.norm)]
        .into_iter()
        .chain(layers)
        .chain(base.lm_head.as_ref().map(|head| ("head", head)))
}

#[test]
fn pack_when_the_base_is_a_gguf_file_keeps_it_and_loads_alone() {
    let scratch = Scratch::new();
    let gguf = scratch.path().join("any name.gguf");
    let bytes = crate::gguf::routed(candle_core::quantized::GgmlDType::F32).bytes();
    fs::write(&gguf, &bytes).unwrap();
    let sources = Sources {
        model: gguf,
        ..routed(&fixtures().join("tiny-routed"))
    };
    let packed = scratch.path().join("packed");
    pack(&sources, &packed, Overwrite::Never, None).unwrap();
    assert_eq!(fs::read(packed.join("model.gguf")).unwrap(), bytes);
    let loaded = load(&Sources::model(&packed)).unwrap();
    assert_same(&load(&sources).unwrap(), &loaded);
    assert!(loaded.experts.is_some());
    // The base is hashed when asked to, and only then.
    fs::remove_file(packed.join("model.gguf")).unwrap();
    let mut changed = bytes.clone();
    let last = changed.len() - 4;
    changed[last] ^= 1;
    fs::write(packed.join("model.gguf"), &changed).unwrap();
    load(&Sources::model(&packed)).unwrap();
    let all = Sources {
        verify: Verify::All,
        ..Sources::model(&packed)
    };
    assert!(matches!(load(&all), Err(CheckpointError::Hash { .. })));
}

#[test]
fn files_beside_a_gguf_file_say_what_its_metadata_leave_open_and_are_packed_with_it() {
    let scratch = Scratch::new();
    let directory = scratch.path().join("model");
    fs::create_dir(&directory).unwrap();
    let mut file = crate::gguf::routed(candle_core::quantized::GgmlDType::F32);
    file.remove("tokenizer.chat_template");
    fs::write(directory.join("base.gguf"), file.bytes()).unwrap();
    let alone = load(&Sources::model(directory.join("base.gguf"))).unwrap();
    assert_eq!(alone.generation, GenerationDefaults::default());
    assert_eq!(alone.text.chat_template, None);

    let generation = r#"{"eos_token_id": [2, 7], "temperature": 0.3, "top_k": 9}"#;
    fs::write(directory.join("generation_config.json"), generation).unwrap();
    let tokens = r#"{"chat_template": "beside", "eos_token": "none", "pad_token": "<pad>"}"#;
    fs::write(directory.join("tokenizer_config.json"), tokens).unwrap();
    // Neither is the file's business: both are in the GGUF file.
    fs::write(directory.join("tokenizer.json"), "no JSON").unwrap();
    // A directory stands for the one GGUF file in it.
    for model in [directory.clone(), directory.join("base.gguf")] {
        let loaded = load(&Sources::model(model)).unwrap();
        let ids: Vec<u32> = loaded.config.eos_token_ids.iter().map(|id| id.0).collect();
        assert_eq!(ids, [2, 7]);
        assert_eq!(loaded.generation.temperature, Some(0.3));
        assert_eq!(loaded.generation.top_k, Some(9));
        assert_eq!(loaded.text.chat_template.as_deref(), Some("beside"));
        assert_eq!(loaded.text.eos_token, alone.text.eos_token);
        let pad = ("pad_token".to_owned(), "<pad>".to_owned());
        assert!(loaded.text.special_tokens.contains(&pad));
    }
    let packed = scratch.path().join("packed");
    let sources = Sources::model(&directory);
    pack(&sources, &packed, Overwrite::Never, None).unwrap();
    let loaded = load(&Sources::model(&packed)).unwrap();
    assert_same(&load(&sources).unwrap(), &loaded);
    assert_eq!(loaded.text.chat_template.as_deref(), Some("beside"));
    assert!(!packed.join("tokenizer.json").exists());

    fs::write(directory.join("generation_config.json"), r#"{"top_p": 2}"#).unwrap();
    let error = load(&sources).unwrap_err().to_string();
    assert!(
        error.contains("generation_config.json") && error.contains("top_p"),
        "{error}"
    );
}

#[test]
fn a_directory_with_several_gguf_files_is_refused_with_their_names() {
    let scratch = Scratch::new();
    for name in ["b.Q8_0.gguf", "a.Q4_0.gguf", "notes.txt"] {
        fs::write(scratch.path().join(name), "GGUF").unwrap();
    }
    let error = load(&Sources::model(scratch.path()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("a.Q4_0.gguf, b.Q8_0.gguf"), "{error}");
    // With a configuration it is a Hugging Face directory, whatever else lies there.
    fs::write(scratch.path().join("config.json"), "{}").unwrap();
    let error = load(&Sources::model(scratch.path()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("config.json"), "{error}");
}

fn check_tampering(packed: &Path, all: &Sources) {
    let manifest = fs::read_to_string(packed.join("midpo.json")).unwrap();
    for (name, in_quick_too) in [
        ("config.json", true),
        ("tokenizer.json", true),
        ("safety/adapter_model.safetensors", true),
        ("router_folded.safetensors", true),
        ("model.safetensors", false),
        ("model-00001-of-00002.safetensors", false),
    ] {
        let file = packed.join(name);
        let Ok(good) = fs::read(&file) else { continue };
        let mut bad = good.clone();
        // A digit, or the low byte of a number: still well-formed, so only the hash tells.
        let at = bad.len() - if name.ends_with(".json") { 20 } else { 4 };
        bad[at] ^= 1;
        // Replaced, not rewritten: the file may be a link to the fixture.
        fs::remove_file(&file).unwrap();
        fs::write(&file, &bad).unwrap();
        assert!(
            matches!(load(all), Err(CheckpointError::Hash { .. })),
            "{name}"
        );
        if in_quick_too {
            assert!(load(&Sources::model(packed)).is_err(), "{name}");
        }
        fs::write(&file, &bad[..bad.len() - 1]).unwrap();
        assert!(load(&Sources::model(packed)).is_err(), "{name}");
        fs::write(&file, &good).unwrap();
    }
    // A file that is not listed is not there.
    fs::write(packed.join("chat_template.jinja"), "intruder").unwrap();
    let template = load(all).unwrap().text.chat_template;
    assert_ne!(template.as_deref(), Some("intruder"));
    for (from, to) in [
        ("\"config.json\"", "\"../config.json\""),
        ("\"config.json\"", "\"/etc/hostname\""),
        ("\"version\": 1", "\"version\": 2"),
        ("\"midpo-checkpoint\"", "\"other\""),
    ] {
        assert!(manifest.contains(from), "{from}");
        fs::write(packed.join("midpo.json"), manifest.replacen(from, to, 1)).unwrap();
        let error = load(&Sources::model(packed)).unwrap_err().to_string();
        assert!(error.contains("midpo.json"), "{to}: {error}");
    }
    fs::write(packed.join("midpo.json"), &manifest).unwrap();
    load(all).unwrap();
}

#[test]
fn pack_over_a_directory_that_is_no_checkpoint_is_refused() {
    let scratch = Scratch::new();
    let target = scratch.path().join("precious");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("thesis.txt"), "years of work").unwrap();
    let sources = Sources::model(fixtures().join("tiny-routed"));
    let refused = pack(&sources, &target, Overwrite::Packed, None);
    assert!(matches!(refused, Err(CheckpointError::Exists { .. })));
    assert!(target.join("thesis.txt").is_file());
    // A bad source leaves nothing behind.
    let target = scratch.path().join("new");
    assert!(
        pack(
            &Sources::model(scratch.path()),
            &target,
            Overwrite::Never,
            None
        )
        .is_err()
    );
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
}

#[test]
fn load_embedded_equals_loading_the_same_files_from_disk() {
    macro_rules! file {
        ($name:literal) => {
            (
                $name,
                include_bytes!(concat!("../fixtures/tiny-routed/", $name)).as_slice(),
            )
        };
    }
    const FILES: &[(&str, &[u8])] = &[
        file!("config.json"),
        file!("generation_config.json"),
        file!("model.safetensors"),
        file!("tokenizer.json"),
        file!("tokenizer_config.json"),
        file!("safety/adapter_config.json"),
        file!("safety/adapter_model.safetensors"),
        file!("helpfulness/adapter_config.json"),
        file!("helpfulness/adapter_model.safetensors"),
        file!("router.pth"),
    ];
    let embedded = load_embedded("demo", FILES).unwrap();
    let loaded = load_fixture("tiny-routed");
    assert_same(&embedded, &loaded);
    assert_eq!(embedded.fingerprint, loaded.fingerprint);
    let error = load_embedded("demo", &FILES[1..]).unwrap_err().to_string();
    assert!(error.contains("demo/config.json"), "{error}");
}

#[test]
fn fingerprint_when_any_number_of_an_expert_changes_is_another() {
    let (_scratch, model) = Scratch::of("tiny-hostile/good");
    let before = load(&routed(&model)).unwrap().fingerprint;
    assert_eq!(before, load(&routed(&model)).unwrap().fingerprint);
    assert_ne!(before, load(&Sources::model(&model)).unwrap().fingerprint);
    for name in ["safety/adapter_model.safetensors", "model.safetensors"] {
        let file = model.join(name);
        let good = fs::read(&file).unwrap();
        let mut changed = good.clone();
        let last = changed.len() - 4;
        changed[last] ^= 1;
        fs::write(&file, changed).unwrap();
        assert_ne!(before, load(&routed(&model)).unwrap().fingerprint, "{name}");
        fs::write(&file, good).unwrap();
    }
}

/// The files that are mutated, by fixture.
const MUTATED: [(&str, &str); 14] = [
    ("tiny-hostile/good", "config.json"),
    ("tiny-hostile/good", "generation_config.json"),
    ("tiny-hostile/good", "model.safetensors"),
    ("tiny-hostile/good", "tokenizer.json"),
    ("tiny-hostile/good", "tokenizer_config.json"),
    ("tiny-hostile/good", "safety/adapter_config.json"),
    ("tiny-hostile/good", "safety/adapter_model.safetensors"),
    ("tiny-hostile/good", "router.safetensors"),
    ("tiny-gqa", "config.json"),
    ("tiny-gqa", "model.safetensors.index.json"),
    ("tiny-gqa", "model-00002-of-00002.safetensors"),
    ("tiny-gqa", "tokenizer_config.json"),
    ("tiny-gqa", "router.pth"),
    ("tiny-routed", "safety/adapter_model.safetensors"),
];

#[derive(Clone, Debug)]
enum Mutation {
    /// A byte somewhere, or (most of a file is numbers) among the first or last.
    Flip(Place, u8),
    /// A byte set.
    Set(Place, u8),
    /// The file ends here.
    Cut(Place),
    /// A piece written once more over another place.
    Copy(Place, Place, usize),
}

#[derive(Clone, Debug)]
enum Place {
    Any(prop::sample::Index),
    FromStart(usize),
    FromEnd(usize),
}

impl Place {
    fn within(&self, len: usize) -> usize {
        match self {
            Self::Any(index) => index.index(len.max(1)),
            Self::FromStart(at) => (*at).min(len.saturating_sub(1)),
            Self::FromEnd(at) => len.saturating_sub(1 + at),
        }
    }
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let len = bytes.len();
        if len == 0 {
            return;
        }
        match self {
            Self::Flip(place, bits) => bytes[place.within(len)] ^= bits,
            Self::Set(place, byte) => bytes[place.within(len)] = *byte,
            Self::Cut(place) => bytes.truncate(place.within(len)),
            Self::Copy(from, to, count) => {
                let (from, to) = (from.within(len), to.within(len));
                let count = (*count).min(len - from).min(len - to);
                bytes.copy_within(from..from + count, to);
            }
        }
    }
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        any::<prop::sample::Index>().prop_map(Place::Any),
        (0usize..600).prop_map(Place::FromStart),
        (0usize..8000).prop_map(Place::FromEnd),
    ]
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        4 => (place(), 1u8..).prop_map(|(place, bits)| Mutation::Flip(place, bits)),
        4 => (place(), prop_oneof![any::<u8>(), Just(b'0'), Just(b'9'), Just(b'"'), Just(b'-'), Just(0), Just(255)])
            .prop_map(|(place, byte)| Mutation::Set(place, byte)),
        1 => place().prop_map(Mutation::Cut),
        1 => (place(), place(), 1usize..64).prop_map(|(from, to, count)| Mutation::Copy(from, to, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn load_when_good_files_are_mutated_succeeds_or_fails_but_never_panics(
        (fixture, file) in prop::sample::select(MUTATED.to_vec()),
        mutations in prop::collection::vec(mutation(), 1..4),
    ) {
        let directory = fixtures().join(fixture);
        let mut bytes = fs::read(directory.join(file)).unwrap();
        for mutation in &mutations {
            mutation.apply(&mut bytes);
        }
        let (_scratch, model) = Scratch::of_links(&directory, file, &bytes);
        if let Err(error) = load(&routed(&model)) {
            // Whatever it is, it points at a file of this model.
            prop_assert!(error.to_string().contains(model.to_str().unwrap()), "{error}");
        }
    }
}

impl Scratch {
    /// A fixture with one file replaced; the others are links, which are cheaper than copies.
    fn of_links(directory: &Path, replaced: &str, bytes: &[u8]) -> (Self, PathBuf) {
        let scratch = Self::new();
        let model = scratch.path().join("model");
        link_directory(directory, &model);
        let file = model.join(replaced);
        fs::remove_file(&file).unwrap();
        fs::write(&file, bytes).unwrap();
        (scratch, model)
    }
}

fn link_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            link_directory(&entry.path(), &target);
        } else if fs::hard_link(entry.path(), &target).is_err() {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}
