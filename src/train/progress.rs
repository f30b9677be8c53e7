//! What a run says while it goes on: to whoever watches, and to a file.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{TrainError, files};

/// Whoever watches: a progress bar, a test.
pub trait Observer {
    /// A run begins, at `done` of `steps` steps.
    fn started(&mut self, stage: &str, steps: usize, done: usize);

    /// A step is done.
    fn step(&mut self, record: &Record);

    /// A run has ended.
    fn finished(&mut self);

    /// Something that the user wants to read: counts, tables, where a file went.
    fn note(&mut self, text: &str);
}

/// Nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Observer for Unwatched {
    fn started(&mut self, _: &str, _: usize, _: usize) {}
    fn step(&mut self, _: &Record) {}
    fn finished(&mut self) {}
    fn note(&mut self, _: &str) {}
}

/// A step, as a line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps done, this one included.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Epochs done, with the share of the one that goes on.
    pub epoch: f64,
    /// Of this batch.
    pub loss: f64,
    /// Over about the last ten steps.
    pub loss_smoothed: f64,
    /// After the schedule.
    pub learning_rate: f64,
    /// Before clipping.
    pub gradient_norm: f64,
    /// Tokens of this batch that are not padding.
    pub tokens: usize,
    /// Since the run began.
    pub tokens_per_second: f64,
    /// Of training, over all runs that were resumed.
    pub seconds: f64,
    /// Estimated until the last step.
    pub seconds_left: f64,
    /// What the objective watches: accuracy, delta, margin, gates, ...
    #[serde(flatten)]
    pub watched: Map<String, Value>,
}

impl Record {
    /// One of the watched values.
    pub fn watched(&self, name: &str) -> Option<f64> {
        self.watched.get(name).and_then(Value::as_f64)
    }
}

/// `metrics.jsonl` of a run, and the records in it.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: fs::File,
    records: Vec<Record>,
}

impl MetricsFile {
    /// Opens it. Of what is there the first `keep` steps stay: a resumed run goes on from there.
    ///
    /// # Errors
    /// [`TrainError::File`].
    pub fn open(path: &Path, keep: usize) -> Result<Self, TrainError> {
        let mut records: Vec<Record> = Vec::new();
        if keep > 0 && path.exists() {
            let text = fs::read_to_string(path).map_err(TrainError::file(path))?;
            // A crash may have cut the last line; the steps that it knew are computed again.
            let lines = text
                .lines()
                .map_while(|line| serde_json::from_str(line).ok());
            records.extend(lines.take_while(|record: &Record| record.step <= keep));
        }
        let mut text = String::new();
        for record in &records {
            text += &line(record);
        }
        files::write(path, text.as_bytes())?;
        let file = fs::OpenOptions::new().append(true).open(path);
        Ok(Self {
            path: path.to_owned(),
            file: file.map_err(TrainError::file(path))?,
            records,
        })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// [`TrainError::File`].
    pub fn push(&mut self, record: Record) -> Result<(), TrainError> {
        let written = self.file.write_all(line(&record).as_bytes());
        written.map_err(TrainError::file(&self.path))?;
        self.records.push(record);
        Ok(())
    }

    /// All steps so far.
    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

fn line(record: &Record) -> String {
    // Numbers and strings: it cannot fail.
    let mut line = serde_json::to_string(record).unwrap_or_default();
    line.push('\n');
    line
}

/// A mean that forgets: each value weighs [`Smoothed::KEEP`] times what the next one does.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Smoothed {
    sum: f64,
    weight: f64,
}

impl Smoothed {
    const KEEP: f64 = 0.9;

    /// Takes a value in; the mean with it.
    pub fn push(&mut self, value: f64) -> f64 {
        self.sum = Self::KEEP * self.sum + value;
        self.weight = Self::KEEP * self.weight + 1.0;
        self.mean()
    }

    /// NaN before the first value.
    pub fn mean(self) -> f64 {
        self.sum / self.weight
    }

    /// For a file.
    pub fn to_bits(self) -> (u64, u64) {
        (self.sum.to_bits(), self.weight.to_bits())
    }

    /// From a file.
    pub fn from_bits((sum, weight): (u64, u64)) -> Self {
        Self {
            sum: f64::from_bits(sum),
            weight: f64::from_bits(weight),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothed_is_a_mean_from_the_first_value_on() {
        let mut smoothed = Smoothed::default();
        assert!(smoothed.mean().is_nan());
        assert_eq!(smoothed.push(3.0), 3.0);
        assert!((smoothed.push(1.0) - (0.9 * 3.0 + 1.0) / 1.9).abs() < 1e-12);
        assert_eq!(Smoothed::from_bits(smoothed.to_bits()), smoothed);
    }
}
