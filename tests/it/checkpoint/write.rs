//! Written files: read again they are the same bits, and readers that share no code with the writers agree (safetensors' own, candle's
//! reader of pickles). `.ci/train_files.py` loads them with transformers, PEFT and torch.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;

use midpo::checkpoint::{
    Checkpoint, CheckpointError, Expert, LlamaConfig, NamedTensor, Normalizer, RopeScaling,
    ScoreType, Sources, load, load_expert, load_score, write,
};
use midpo::dtype::DType;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::checkpoint::{Scratch, assert_same};
use crate::train::fixture::{fixture, load as load_fixture, router_tensors, router_tensors_of};

/// The base's tensors under Hugging Face's names.
fn base_tensors(checkpoint: &Checkpoint) -> Vec<NamedTensor> {
    let base = &checkpoint.base;
    let mut named = vec![
        ("model.embed_tokens".to_owned(), &base.embed_tokens),
        ("model.norm".to_owned(), &base.norm),
    ];
    named.extend(base.lm_head.iter().map(|head| ("lm_head".to_owned(), head)));
    for (index, layer) in base.layers.iter().enumerate() {
        for (name, tensor) in [
            ("input_layernorm", &layer.input_layernorm),
            ("self_attn.q_proj", &layer.q_proj),
            ("self_attn.k_proj", &layer.k_proj),
            ("self_attn.v_proj", &layer.v_proj),
            ("self_attn.o_proj", &layer.o_proj),
            ("post_attention_layernorm", &layer.post_attention_layernorm),
            ("mlp.gate_proj", &layer.gate_proj),
            ("mlp.up_proj", &layer.up_proj),
            ("mlp.down_proj", &layer.down_proj),
        ] {
            named.push((format!("model.layers.{index}.{name}"), tensor));
        }
    }
    let named = named.into_iter();
    named
        .map(|(name, tensor)| {
            let name = format!("{name}.weight");
            (name, tensor.shape().to_vec(), tensor.to_f32())
        })
        .collect()
}

/// Tensors of a file by name: format, axes, bytes.
fn tensors_of(file: &Path) -> Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = tensors
        .iter()
        .map(|(name, view)| {
            let (dtype, shape) = (view.dtype(), view.shape().to_vec());
            (name.to_owned(), dtype, shape, view.data().to_vec())
        })
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn all_bits(tensors: &[NamedTensor]) -> Vec<(String, Vec<usize>, Vec<u32>)> {
    let mut all: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| (name.clone(), shape.clone(), bits(values)))
        .collect();
    all.sort();
    all
}

#[test]
fn a_base_that_torch_wrote_is_the_same_when_it_is_written_again() {
    for (name, dtype) in [("tiny-routed", DType::F32), ("tiny-gqa", DType::BF16)] {
        let (scratch, directory) = (Scratch::new(), fixture(name));
        let checkpoint = load(&Sources::model(&directory)).unwrap();
        let text = write::TextFiles::read(&directory).unwrap();
        let tensors = base_tensors(&checkpoint);
        write::base(scratch.path(), &checkpoint.config, &tensors, dtype, &text).unwrap();
        let again = load(&Sources::model(scratch.path())).unwrap();
        assert_same(&checkpoint, &again);
        assert_eq!(again.base.embed_tokens.dtype(), dtype);
        if dtype == DType::F32 {
            let file = "model.safetensors";
            let written = tensors_of(&scratch.path().join(file));
            assert!(written == tensors_of(&directory.join(file)));
        }
        // Every key of ours that torch's file has says the same.
        let (ours, theirs) = (
            json(&scratch.path().join("config.json")),
            json(&directory.join("config.json")),
        );
        for (key, value) in ours.as_object().unwrap() {
            assert!(
                theirs.get(key).is_none_or(|theirs| theirs == value),
                "{key}"
            );
        }
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let read = |directory: &Path| fs::read(directory.join(file)).unwrap();
            assert_eq!(read(scratch.path()), read(&directory), "{file}");
        }
    }
}

#[test]
fn a_configuration_is_the_same_when_it_is_read_again() {
    let (scratch, directory) = (Scratch::new(), fixture("tiny-gqa"));
    let checkpoint = load(&Sources::model(&directory)).unwrap();
    let tensors = base_tensors(&checkpoint);
    // Made of parts, as for a GGUF base or a new tokenizer.
    let text = write::TextFiles::of(&checkpoint.text, 512);
    for rope_scaling in [
        RopeScaling::None,
        RopeScaling::Linear { factor: 2.5 },
        RopeScaling::Dynamic {
            factor: 4.0,
            original_positions: 64,
        },
        checkpoint.config.rope_scaling,
    ] {
        for (eps, ends) in [(1e-5, 0..0), (1e-6, 0..1), (3.3e-7, 0..2)] {
            let config = LlamaConfig {
                rope_scaling,
                rms_norm_eps: eps,
                eos_token_ids: checkpoint.config.eos_token_ids[ends].to_vec(),
                ..checkpoint.config.clone()
            };
            write::base(scratch.path(), &config, &tensors, DType::BF16, &text).unwrap();
            let again = load(&Sources::model(scratch.path())).unwrap();
            assert_eq!(again.config, config);
            assert_eq!(again.text.tokenizer_json, checkpoint.text.tokenizer_json);
            assert_eq!(again.text.chat_template, checkpoint.text.chat_template);
            assert_eq!(again.text.bos_token, checkpoint.text.bos_token);
            assert_eq!(again.text.eos_token, checkpoint.text.eos_token);
            assert_eq!(again.text.special_tokens, checkpoint.text.special_tokens);
        }
    }
}

#[test]
fn an_expert_that_peft_wrote_is_the_same_when_it_is_written_again() {
    for name in ["tiny-routed", "tiny-gqa"] {
        let (scratch, directory) = (Scratch::new(), fixture(name).join("safety"));
        let checkpoint = load_fixture(name);
        let expert = &checkpoint.experts.unwrap().safety;
        write::expert(scratch.path(), name, expert, DType::F32).unwrap();
        let again = load_expert(scratch.path(), &checkpoint.config).unwrap();
        assert_eq!((again.rank, again.scale), (expert.rank, expert.scale));
        let file = "adapter_model.safetensors";
        assert!(
            tensors_of(&scratch.path().join(file)) == tensors_of(&directory.join(file)),
            "{name}"
        );
        let (ours, theirs) = (
            json(&scratch.path().join("adapter_config.json")),
            json(&directory.join("adapter_config.json")),
        );
        for key in [
            "peft_type",
            "task_type",
            "r",
            "target_modules",
            "bias",
            "base_model_name_or_path",
        ] {
            assert_eq!(ours[key], theirs[key], "{name} {key}");
        }
        if name == "tiny-routed" {
            assert_eq!(ours["lora_alpha"], 32);
        }
    }
}

#[test]
fn an_expert_in_bf16_is_rounded_to_nearest() {
    let scratch = Scratch::new();
    let checkpoint = load_fixture("tiny-routed");
    let expert = &checkpoint.experts.unwrap().helpfulness;
    write::expert(scratch.path(), "base", expert, DType::BF16).unwrap();
    let again = load_expert(scratch.path(), &checkpoint.config).unwrap();
    for (layer, rounded) in expert.layers.iter().zip(&again.layers) {
        let pairs = [
            (&layer.lora_a, &rounded.lora_a),
            (&layer.lora_b, &rounded.lora_b),
        ];
        for (exact, found) in pairs.into_iter().flat_map(|(a, b)| a.iter().zip(b)) {
            assert_eq!(half::bf16::from_f32(*exact).to_f32(), *found);
        }
    }
}

#[test]
fn a_router_that_torch_wrote_is_the_same_when_it_is_written_again() {
    for name in ["tiny-routed", "tiny-gqa"] {
        let scratch = Scratch::new();
        let checkpoint = load_fixture(name);
        let layers = checkpoint.config.num_layers;
        let tensors = router_tensors(name, layers);
        write::router(scratch.path(), &tensors).unwrap();
        // candle's reader of pickles, which knows nothing of how ours were made.
        let pth = router_tensors_of(&scratch.path().join("router.pth"), layers);
        assert!(all_bits(&pth) == all_bits(&tensors), "{name}: router.pth");
        let flat = tensors_of(&scratch.path().join("router.safetensors"));
        assert_eq!(flat.len(), 12 * layers);
        let flat: Vec<NamedTensor> = flat
            .into_iter()
            .map(|(name, _, shape, bytes)| {
                let values = bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes);
                (name, shape, values.collect())
            })
            .collect();
        assert!(
            all_bits(&flat) == all_bits(&tensors),
            "{name}: router.safetensors"
        );
        for file in [
            "router.pth",
            "router.safetensors",
            "router_folded.safetensors",
        ] {
            let sources = Sources {
                safety: Some(fixture(name).join("safety")),
                helpfulness: Some(fixture(name).join("helpfulness")),
                router: Some(scratch.path().join(file)),
                ..Sources::model(fixture(name))
            };
            assert_same(&checkpoint, &load(&sources).unwrap());
        }
    }
}

#[test]
fn a_score_model_that_torch_wrote_is_the_same_when_it_is_written_again() {
    for (name, score_type) in [("reward", ScoreType::Reward), ("cost", ScoreType::Cost)] {
        let (scratch, directory) = (Scratch::new(), fixture("tiny-routed/training").join(name));
        let score = load_score(&directory).unwrap();
        assert_eq!(score.score_type, score_type);
        assert!(score.text.is_none());
        let text = write::TextFiles::read(&fixture("tiny-routed")).unwrap();
        let (config, tensors) = (&score.config, &score.tensors);
        write::score(
            scratch.path(),
            config,
            tensors,
            score_type,
            DType::F32,
            &text,
        )
        .unwrap();
        let again = load_score(scratch.path()).unwrap();
        assert_eq!(again.config, score.config);
        assert_eq!(again.score_type, score_type);
        assert_eq!(again.normalizer, Normalizer::default());
        assert!(again.text.is_some());
        assert!(all_bits(&again.tensors) == all_bits(&score.tensors));
        let outline = |directory: &Path| {
            let tensors = tensors_of(&directory.join("model.safetensors")).into_iter();
            let tensors = tensors.map(|(name, dtype, shape, _)| (name, dtype, shape));
            tensors.collect::<Vec<_>>()
        };
        assert_eq!(outline(scratch.path()), outline(&directory));
        let (ours, theirs) = (
            json(&scratch.path().join("config.json")),
            json(&directory.join("config.json")),
        );
        for (key, value) in ours.as_object().unwrap() {
            assert_eq!(theirs.get(key), Some(value), "{name}: {key}");
        }
    }
}

#[test]
fn a_normaliser_is_read_and_centres_rewards_only() {
    let (scratch, directory) = (Scratch::new(), fixture("tiny-routed/training/cost"));
    fs::copy(
        directory.join("model.safetensors"),
        scratch.path().join("model.safetensors"),
    )
    .unwrap();
    let mut config = json(&directory.join("config.json"));
    config["do_normalize"] = true.into();
    fs::write(scratch.path().join("config.json"), config.to_string()).unwrap();
    let read = load_score(scratch.path()).unwrap().normalizer;
    assert!(read.is_on);
    let normalizer = Normalizer {
        mean: 3.0,
        var: 4.0,
        ..read
    };
    assert_eq!(normalizer.apply(ScoreType::Reward, 7.0), 2.0);
    assert_eq!(normalizer.apply(ScoreType::Cost, 7.0), 3.5);
    config["score_type"] = "price".into();
    fs::write(scratch.path().join("config.json"), config.to_string()).unwrap();
    let error = load_score(scratch.path()).unwrap_err().to_string();
    assert!(
        error.contains("`score_type`") && error.contains("price"),
        "{error}"
    );
}

/// What `write` says, and that it left nothing in a directory that was empty.
fn refused(write: impl FnOnce(&Path) -> Result<(), CheckpointError>) -> String {
    let scratch = Scratch::new();
    let error = write(scratch.path()).unwrap_err().to_string();
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "{error}");
    error
}

#[test]
fn what_cannot_be_read_again_is_not_written() {
    let directory = fixture("tiny-routed");
    let checkpoint = load_fixture("tiny-routed");
    let text = write::TextFiles::read(&directory).unwrap();
    let good = base_tensors(&checkpoint);
    let changed = |change: &dyn Fn(&mut Vec<NamedTensor>)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        tensors
    };
    for (tensors, dtype, words) in [
        (
            changed(&|t| t.truncate(t.len() - 1)),
            DType::F32,
            ["layers.2.mlp.down_proj", "found none"],
        ),
        (
            changed(&|t| t[1].1 = vec![63]),
            DType::F32,
            ["model.norm", "[63]"],
        ),
        (
            changed(&|t| t[1].2.truncate(63)),
            DType::F32,
            ["model.norm", "63"],
        ),
        (
            changed(&|t| t.push(t[0].clone())),
            DType::F32,
            ["embed_tokens", "twice"],
        ),
        (
            changed(&|t| t[0].2[5] = f32::NAN),
            DType::F32,
            ["embed_tokens", "NaN"],
        ),
        (
            changed(&|t| t[0].2[5] = f32::MAX),
            DType::BF16,
            ["embed_tokens", "bf16"],
        ),
        (
            good.clone(),
            DType::Q8_0,
            ["model.safetensors", "f32 or bf16"],
        ),
    ] {
        let config = &checkpoint.config;
        let error = refused(|place| write::base(place, config, &tensors, dtype, &text));
        for word in words {
            assert!(error.contains(word), "`{word}` not in: {error}");
        }
    }

    let experts = checkpoint.experts.as_ref().unwrap();
    let mut expert: Expert = experts.safety.clone();
    expert.layers[1].lora_b.pop();
    let error = refused(|place| write::expert(place, "base", &expert, DType::F32));
    assert!(error.contains("layers.1.mlp.down_proj.lora_B"), "{error}");

    let good = router_tensors("tiny-routed", 3);
    let at = |name: &str| good.iter().position(|tensor| tensor.0 == name).unwrap();
    let bias = at("layer_1_beta.linear_2.bias");
    let mut missing = good.clone();
    missing.remove(bias);
    let mut infinite = good.clone();
    infinite[bias].2[0] = f32::INFINITY;
    for tensors in [missing, infinite, Vec::new()] {
        let error = refused(|place| write::router(place, &tensors));
        let name = if tensors.is_empty() {
            "layer_0_alpha.linear_0.weight"
        } else {
            "layer_1_beta.linear_2.bias"
        };
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn writing_again_takes_the_place_of_other_text_files_and_shards() {
    let (_scratch, model) = Scratch::of("tiny-gqa");
    fs::write(model.join("chat_template.jinja"), "of another tokenizer").unwrap();
    let checkpoint = load_fixture("tiny-gqa");
    let text = write::TextFiles::of(&checkpoint.text, 512);
    let tensors = base_tensors(&checkpoint);
    write::base(&model, &checkpoint.config, &tensors, DType::F32, &text).unwrap();
    let again = load(&Sources::model(&model)).unwrap();
    assert_eq!(again.text.chat_template, checkpoint.text.chat_template);
    assert!(!model.join("model.safetensors.index.json").exists());
}
