//! What `midpo convert` packs: the same checkpoint again, and what was tampered with is refused.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;

use midpo::checkpoint::{
    Checkpoint, CheckpointError, GenerationDefaults, Overwrite, Sources, Verify, load, pack,
};
use midpo::dtype::BlockType;

use super::{Scratch, assert_same, fixtures, routed, tensors};

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
