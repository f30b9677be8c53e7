//! A run that can go on: one safetensors file with values and moments, and with all else as JSON in its header, so that the two
//! cannot be of different steps.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};

use super::adamw::Moments;
use super::objective::Parameter;
use super::{TrainError, files};

/// Key of the JSON in the file's header.
const HEADER: &str = "midpo_training";
/// Changes where older files can no longer be read.
const FORMAT: u32 = 1;

/// Where a run stands.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// What is beside the numbers.
    pub progress: Progress,
    /// In the order of the parameters.
    pub values: Vec<Vec<f32>>,
    /// In the order of the parameters.
    pub moments: Moments,
}

/// The JSON part. What f64 it holds are bits: JSON would round them, and a resumed run would not be the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    format: u32,
    /// Hash of what the run is: options, data, parameters.
    pub identity: String,
    /// Steps done.
    pub step: usize,
    /// Epoch of the next step, from 0.
    pub epoch: usize,
    /// Batches of that epoch that are done.
    pub position: usize,
    /// Of the shuffles.
    pub seed: u64,
    /// Seconds of training so far, as bits.
    pub seconds_bits: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// The smoothed loss and delta: (sum, weight) of each, as bits.
    pub smoothed_bits: [(u64, u64); 2],
}

impl Progress {
    /// Before the first step.
    pub fn new(identity: String, seed: u64) -> Self {
        Self {
            format: FORMAT,
            identity,
            step: 0,
            epoch: 0,
            position: 0,
            seed,
            seconds_bits: 0f64.to_bits(),
            tokens: 0,
            smoothed_bits: [(0, 0); 2],
        }
    }
}

impl State {
    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// [`TrainError::File`], [`TrainError::State`].
    pub fn write(&self, file: &Path, parameters: &[Parameter]) -> Result<(), TrainError> {
        let malformed = |reason: String| TrainError::State {
            file: file.to_owned(),
            reason,
        };
        let mut views = Vec::new();
        for (part, tensors) in self.parts() {
            for (parameter, numbers) in parameters.iter().zip(tensors) {
                let bytes = bytemuck::cast_slice(numbers);
                let view = TensorView::new(Dtype::F32, parameter.shape.clone(), bytes)
                    .map_err(|error| malformed(format!("`{}`: {error}", parameter.name)))?;
                views.push((format!("{part}.{}", parameter.name), view));
            }
        }
        let json = serde_json::to_string(&self.progress).map_err(|e| malformed(e.to_string()))?;
        let header = HashMap::from([(HEADER.to_owned(), json)]);
        let bytes = serialize(views, Some(header)).map_err(|e| malformed(e.to_string()))?;
        files::write(file, &bytes)
    }

    fn parts(&self) -> [(&'static str, &[Vec<f32>]); 3] {
        [
            ("value", &self.values),
            ("mean", &self.moments.mean),
            ("square", &self.moments.square),
        ]
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`TrainError::File`]; [`TrainError::State`] where it is not the state of a run with `identity` and `parameters`.
    pub fn read(file: &Path, identity: &str, parameters: &[Parameter]) -> Result<Self, TrainError> {
        let malformed = |reason: String| TrainError::State {
            file: file.to_owned(),
            reason,
        };
        let bytes = fs::read(file).map_err(TrainError::file(file))?;
        let progress = read_progress(&bytes).map_err(&malformed)?;
        if progress.identity != identity {
            let reason = "was written by a run with other settings, data or parameters; train without --resume to start anew";
            return Err(malformed(reason.to_owned()));
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| malformed(e.to_string()))?;
        let part = |part: &str| {
            let tensor = |parameter: &Parameter| numbers(&tensors, part, parameter);
            let all: Result<Vec<_>, _> = parameters.iter().map(tensor).collect();
            all.map_err(&malformed)
        };
        Ok(Self {
            progress,
            values: part("value")?,
            moments: Moments {
                mean: part("mean")?,
                square: part("square")?,
            },
        })
    }
}

fn read_progress(bytes: &[u8]) -> Result<Progress, String> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let json = header
        .metadata()
        .as_ref()
        .and_then(|header| header.get(HEADER))
        .ok_or_else(|| format!("expected `{HEADER}` in its header, found none"))?;
    let progress: Progress = serde_json::from_str(json).map_err(|error| error.to_string())?;
    if progress.format != FORMAT {
        return Err(format!(
            "expected format {FORMAT}, found {}",
            progress.format
        ));
    }
    Ok(progress)
}

fn numbers(
    tensors: &SafeTensors<'_>,
    part: &str,
    parameter: &Parameter,
) -> Result<Vec<f32>, String> {
    let name = format!("{part}.{}", parameter.name);
    let tensor = tensors
        .tensor(&name)
        .map_err(|error| format!("`{name}`: {error}"))?;
    if tensor.dtype() != Dtype::F32 || tensor.shape() != parameter.shape {
        return Err(format!(
            "`{name}`: expected F32 {:?}, found {:?} {:?}",
            parameter.shape,
            tensor.dtype(),
            tensor.shape()
        ));
    }
    let words = tensor.data().as_chunks::<4>().0;
    Ok(words
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect())
}
