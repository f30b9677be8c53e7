//! The model that the bare engine is measured with.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::model::{self, Shape};
use super::plan::EngineArgs;
use crate::bench::BenchError;
use crate::checkpoint::Checkpoint;
use crate::cli::{CliError, engine};
use crate::config;
use crate::server::ServedModel;

/// A model to measure, and what it is called.
pub(super) struct Subject {
    /// In the report.
    pub name: String,
    /// Read and checked.
    pub checkpoint: Checkpoint,
    /// Its text side; `None`: no server is measured.
    pub served: Option<ServedModel>,
    /// Time that reading took.
    pub read_seconds: f64,
}

impl Subject {
    /// `model`, the embedded demo, or random weights of a known shape, drawn by `seed`.
    ///
    /// # Errors
    /// A model and a shape at once; a file that is not there or not what it should be.
    pub(super) fn new(model: Option<&str>, args: &EngineArgs, seed: u64) -> Result<Self, CliError> {
        match (args.shape, model) {
            (Some(shape), None) => Ok(Self::random(shape, seed)),
            (Some(shape), Some(model)) => Err(two_models(shape, model).into()),
            (None, _) => Self::loaded(model, args),
        }
    }

    fn random(shape: Shape, seed: u64) -> Self {
        let begun = Instant::now();
        Self {
            name: format!("{} of random weights", shape.name()),
            checkpoint: model::checkpoint(shape.config(), seed),
            served: None,
            read_seconds: begun.elapsed().as_secs_f64(),
        }
    }

    fn loaded(model: Option<&str>, args: &EngineArgs) -> Result<Self, CliError> {
        let begun = Instant::now();
        let source = config::ModelOptions {
            model: model.map(PathBuf::from),
            experts: args.experts.clone(),
            safety: args.safety.clone(),
            helpfulness: args.helpfulness.clone(),
            router: args.router.clone(),
        };
        let checkpoint = engine::load(&source.validate()?)?;
        let read_seconds = begun.elapsed().as_secs_f64();
        let served = args.with_server.then(|| engine::served_model(&checkpoint));
        Ok(Self {
            name: model_name(model),
            served: served.transpose()?,
            checkpoint,
            read_seconds,
        })
    }
}

fn two_models(shape: Shape, model: &str) -> BenchError {
    BenchError::Flag {
        flag: "--shape",
        expected: "no --model beside it".to_owned(),
        found: format!("{} and {model}", shape.name()),
    }
}

/// The name of a model in a report: the file's, never its folder's.
fn model_name(model: Option<&str>) -> String {
    let file = model.and_then(|model| Path::new(model).file_name());
    file.map_or("the embedded demo".to_owned(), |name| {
        name.to_string_lossy().into_owned()
    })
}
