//! Good files load, and say what they say.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;

use midpo::checkpoint::{CheckpointError, RopeScaling, Sources, load, load_embedded};
use midpo::dtype::DType;
use midpo::types::TokenId;

use super::{Scratch, assert_same, fixtures, load_fixture, routed};

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
fn load_embedded_equals_loading_the_same_files_from_disk() {
    macro_rules! file {
        ($name:literal) => {
            (
                $name,
                include_bytes!(concat!("../../fixtures/tiny-routed/", $name)).as_slice(),
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
