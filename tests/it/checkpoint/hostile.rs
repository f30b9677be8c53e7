//! Every hostile file is refused by name, and no mutation of a good one does more than fail.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};

use midpo::checkpoint::load;
use proptest::prelude::*;

use super::{Scratch, copy_directory, fixtures, routed};

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
        copy_directory(directory, &model, |from, to| {
            if fs::hard_link(from, to).is_err() {
                fs::copy(from, to).unwrap();
            }
        });
        let file = model.join(replaced);
        fs::remove_file(&file).unwrap();
        fs::write(&file, bytes).unwrap();
        (scratch, model)
    }
}
