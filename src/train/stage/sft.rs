//! The base, by supervised training.

use std::path::Path;

use super::models::{base, copy_generation, text_files};
use super::prepare::{Examples, Outcome, bad_lines, examples};
use super::session::{How, Rules, Session, required, setting};
use crate::checkpoint::write::{self, TextFiles};
use crate::checkpoint::{self, TextParts};
use crate::config::train::{SftStage, Stage};
use crate::train::autograd::{Sft, SftOptions};
use crate::train::data::{Encoder, read_exchanges};
use crate::train::{Report, Sequence, TrainError, Watch};

/// What the stage starts from.
struct Start<'p> {
    model: Sft,
    text: TextParts,
    files: TextFiles,
    /// Where tokenizer and generation settings come from.
    directory: &'p Path,
}

/// Trains a base on prompts and answers, and writes it as a Hugging Face directory.
///
/// # Errors
/// [`TrainError`] names the setting, file, line or step.
pub fn sft(options: &SftStage, how: How, watch: &mut Watch<'_>) -> Result<Report, TrainError> {
    let data = required(
        Stage::Sft,
        "data",
        &options.data.data,
        "a JSONL file of {prompt, response}",
    )?;
    let mut session = Session::begin(options, how, watch)?;
    let Start {
        mut model,
        text,
        files,
        directory,
    } = start(options)?;
    let encoder = Encoder::new(&text, model.config(), options.data.max_length)?;
    let read = |file: &Path, session: &Session<'_, '_>| -> Result<Examples<Sequence>, TrainError> {
        let lines = read_exchanges(file, bad_lines(&options.data))?;
        let threads = session.threads();
        examples(file, &lines, &options.data, &threads, |line| {
            let (sequence, cut) = encoder.sequence(&line.prompt, &line.response)?;
            Ok(Outcome::Examples(vec![sequence], cut))
        })
    };
    let trained_on = read(data, &session)?;
    session.note(&trained_on.summary("examples", data));
    let validated_on = match &options.training.validation {
        Some(file) => Some(read(file, &session)?),
        None => None,
    };
    let report = session.train(&mut model, &trained_on, &options.training, Rules::default())?;
    if let Some(examples) = validated_on {
        session.validate(&model, &examples)?;
    }
    let (output, dtype) = (session.output.clone(), session.dtype());
    write::base(&output, model.config(), &model.export(), dtype, &files)?;
    copy_generation(directory, &output)?;
    session.finish()?;
    Ok(report)
}

fn start(options: &SftStage) -> Result<Start<'_>, TrainError> {
    let rules = SftOptions {
        prompt_weight: prompt_weight(options.sft.prompt_weight)?,
    };
    if let Some(config) = &options.sft.init {
        let expected = "the directory of the tokenizer of a base that starts from random weights";
        let directory = required(Stage::Sft, "tokenizer", &options.sft.tokenizer, expected)?;
        let (config, text) = checkpoint::plan(config, directory)?;
        return Ok(Start {
            model: Sft::random(config, options.training.seed, rules)?,
            text,
            files: TextFiles::read(directory)?,
            directory,
        });
    }
    let expected = "a base to go on from, or `init` and `tokenizer` for random weights";
    let path = required(Stage::Sft, "base", &options.base.base, expected)?;
    let checkpoint = base(Stage::Sft, Some(path))?;
    Ok(Start {
        model: Sft::from_checkpoint(&checkpoint, rules)?,
        files: text_files(path, &checkpoint)?,
        text: checkpoint.text,
        directory: path,
    })
}

fn prompt_weight(weight: f32) -> Result<f32, TrainError> {
    let legal = (0.0..=1.0).contains(&weight);
    legal
        .then_some(weight)
        .ok_or_else(|| setting(Stage::Sft, "prompt_weight", "a number from 0 to 1", weight))
}
