//! Checkpoints: what is read, refused, packed and written.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod hostile;
mod load;
mod pack;
mod write;

use std::fs;
use std::path::{Path, PathBuf};

use midpo::checkpoint::{BaseTensors, Checkpoint, HostTensor, Sources, load};
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
        copy_directory(&fixtures().join(fixture), &model, |from, to| {
            fs::copy(from, to).unwrap();
        });
        (scratch, model)
    }
}

/// The directories of `from` under `to`; `file` makes each file of the one that is there.
fn copy_directory(from: &Path, to: &Path, file: fn(&Path, &Path)) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &target, file);
        } else {
            file(&entry.path(), &target);
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
