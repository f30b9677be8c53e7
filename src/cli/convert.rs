//! `midpo convert`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use super::perplexity::{Form, Forms, Report};
use super::{CliError, engine, logging};
use crate::backend::WeightFormat;
use crate::checkpoint::{self, Checkpoint, Overwrite};
use crate::config::{ConfigError, ConvertOptions, ModelSource, WeightDType};
use crate::dtype::BlockType;
use crate::eval::perplexity::Windows;
use crate::text::Tokenizer;
use crate::types::Variant;

/// What `--quantize` is tried on where no text is given.
const SAMPLE: &str = "A lighthouse keeper kept a notebook of the weather. On the first page she wrote that the sea was calm, that two boats had \
    passed before noon, and that the lamp needed oil. The next morning the wind came from the north. She closed the shutters, counted the \
    barrels in the cellar, and lit a fire in the stove. \"If the storm lasts,\" she told the cat, \"we have bread for four days and books for \
    ten.\" By the evening the waves reached the lower rocks, and the light turned above them as it had every night for ninety years.";
/// Tokens of a window of it.
const WINDOW: usize = 256;

/// Packs base, experts and folded router into one directory.
pub(super) fn run(options: &ConvertOptions) -> Result<ExitCode, CliError> {
    let source = options.model.validate()?;
    logging::start(&options.log)?;
    let sources = engine::sources(&source)?.ok_or_else(|| ConfigError::Value {
        origin: "--model".to_owned(),
        key: "model".to_owned(),
        expected: "the base to pack".to_owned(),
        found: "none".to_owned(),
    })?;
    let quantize = options
        .quantize
        .map(|dtype| block(dtype).map(|block| (dtype, block)))
        .transpose()?;
    checkpoint::pack(
        &sources,
        &options.output,
        Overwrite::Never,
        quantize.map(|(_, block)| block),
    )?;
    let output = options.output.display();
    let mut said = format!("packed into {output}; serve it with: midpo serve --model {output}\n");
    if let Some((dtype, _)) = quantize {
        let report = cost(&source, dtype, options.text.as_deref())?;
        said.push_str(&format!("\n{}", report.markdown()));
    }
    write!(std::io::stdout(), "{said}").map_err(CliError::io("standard output"))?;
    Ok(ExitCode::SUCCESS)
}

fn block(dtype: WeightDType) -> Result<BlockType, ConfigError> {
    match engine::weight_format(dtype) {
        WeightFormat::Block(block) => Ok(block),
        _ => Err(ConfigError::flag(
            "quantize",
            "q8_0, q4_1 or q4_0",
            "no block format",
        )),
    }
}

/// How far the model in blocks is from what it was made from, on a text.
fn cost(source: &ModelSource, dtype: WeightDType, text: Option<&Path>) -> Result<Report, CliError> {
    let checkpoint = engine::load(source)?;
    let (name, content) = match text {
        Some(file) => {
            let name = file.display().to_string();
            let content = std::fs::read_to_string(file);
            (
                name.clone(),
                content.map_err(CliError::io(format!("--text {name}")))?,
            )
        }
        None => ("a few sentences".to_owned(), SAMPLE.to_owned()),
    };
    let tokenizer = Tokenizer::new(&checkpoint.text.tokenizer_json)?;
    let tokens = tokenizer.encode(&content, false)?;
    if tokens.len() < 2 {
        return Err(ConfigError::flag("text", "a text of at least 2 tokens", tokens.len()).into());
    }
    let bos = tokenizer.encode("", true)?.first().copied();
    let windows = Windows {
        tokens: &tokens,
        context: context(&checkpoint, tokens.len()),
        bos,
    };
    let forms = Forms {
        subject: Form::of_weights(dtype),
        against: Some(Form::of_weights(WeightDType::Auto)),
        windows_max: usize::MAX,
        threads: None,
    };
    let variant = match checkpoint.experts {
        Some(_) => Variant::Routed,
        None => Variant::Base,
    };
    forms.measure(&name, &checkpoint, variant, &windows)
}

/// Tokens of a window: what the model and the text have room for.
fn context(checkpoint: &Checkpoint, tokens: usize) -> usize {
    let room = checkpoint.config.max_position_embeddings.saturating_sub(1);
    WINDOW.min(room).min(tokens)
}
