//! GGUF files: the fixtures rewritten as llama.cpp would, every block format, and files that lie.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod convert;
mod hostile;
mod load;
mod tokenizer;

pub(crate) use convert::routed;

use std::path::Path;

use midpo::checkpoint::{BaseTensors, CheckpointError, LlamaConfig, Sources, TextParts, Verify};

use crate::gguf_file::GgufFile;

type Parts = (LlamaConfig, BaseTensors, TextParts);

fn load(name: &str, file: &GgufFile) -> Parts {
    let written = file.write(name);
    load_path(written.path()).unwrap()
}

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
