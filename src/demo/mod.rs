//! The embedded demo: a small checkpoint inside the binary, laid out as `midpo convert` writes it (`demo/README.md` says what it is),
//! the [`corpus`] that it learned from, and the [`judge`] of its answers.

pub mod corpus;
pub mod judge;

use crate::checkpoint::{Checkpoint, CheckpointError, EmbeddedFiles, load_embedded};

/// Stands for the checkpoint's directory in messages.
const NAME: &str = "embedded demo";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../demo/model/", $name)).as_slice())),*]
    };
}

/// The files, by their names in `demo/model/`.
pub const FILES: EmbeddedFiles = files![
    "config.json",
    "generation_config.json",
    "helpfulness/adapter_config.json",
    "helpfulness/adapter_model.safetensors",
    "midpo.json",
    "model.safetensors",
    "router_folded.safetensors",
    "safety/adapter_config.json",
    "safety/adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The demo model, checked as any other checkpoint is.
/// # Errors
/// None in a binary whose tests passed.
pub fn load() -> Result<Checkpoint, CheckpointError> {
    load_embedded(NAME, FILES)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::path::Path;

    use super::*;

    #[test]
    fn the_demo_loads_has_experts_and_is_whole() {
        let checkpoint = load().unwrap();
        assert!(checkpoint.experts.is_some());
        assert!(checkpoint.text.chat_template.is_some());
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
        let mut folders = vec![folder.clone()];
        let mut found = 0;
        while let Some(inner) = folders.pop() {
            for entry in std::fs::read_dir(inner).unwrap().map(Result::unwrap) {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path.strip_prefix(&folder).unwrap().to_str().unwrap();
                assert!(FILES.iter().any(|(listed, _)| *listed == name), "{name}");
                found += 1;
            }
        }
        assert_eq!(found, FILES.len());
    }
}
