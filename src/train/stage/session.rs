//! What stages share: where they write, how the loop runs, what is told at the end.

use std::fs;
use std::path::{Path, PathBuf};

use super::TRACES;
use super::prepare::{Examples, Threads};
use super::stamp::{self, Stamp};
use crate::config::train::{LoopOptions, OutputOptions, SavedDType, Stage, StageOptions};
use crate::dtype::DType;
use crate::train::{
    Activations, AdamWOptions, Ended, Gradients, Job, Length, Objective, Report, RunOptions, STATE,
    Totals, TrainError, Warmup, Watch, run,
};

/// Parts that a batch is cut into where nobody says how large a part is.
const PARTS: usize = 4;
/// Items of a part in an evaluation.
const EVALUATED_AT_ONCE: usize = 8;

/// How a stage deals with what is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// Go on from a saved state.
    pub resume: bool,
    /// Replace a completed output.
    pub overwrite: bool,
}

/// A stage that runs.
pub(super) struct Session<'a, 'w> {
    pub(super) stage: Stage,
    pub(super) output: PathBuf,
    pub(super) watch: &'a mut Watch<'w>,
    how: How,
    threads: usize,
    stamp: Stamp,
    dtype: DType,
}

/// A setting that a stage cannot do without.
///
/// # Errors
/// [`TrainError::Setting`].
pub(super) fn required<'p>(
    stage: Stage,
    key: &'static str,
    path: &'p Option<PathBuf>,
    expected: &str,
) -> Result<&'p Path, TrainError> {
    path.as_deref()
        .ok_or_else(|| setting(stage, key, expected, "none"))
}

/// [`TrainError::Setting`].
pub(super) fn setting(
    stage: Stage,
    key: &'static str,
    expected: impl Into<String>,
    found: impl ToString,
) -> TrainError {
    TrainError::Setting {
        stage: stage.as_str(),
        key,
        expected: expected.into(),
        found: found.to_string(),
    }
}

/// Where a stage writes.
///
/// # Errors
/// [`TrainError::Setting`] where nobody says.
pub(super) fn output_of(stage: Stage, output: &OutputOptions) -> Result<&Path, TrainError> {
    required(stage, "output", &output.output, "where to write")
}

impl<'a, 'w> Session<'a, 'w> {
    /// Takes the place that the stage writes to.
    ///
    /// # Errors
    /// [`TrainError::Exists`], [`TrainError::Setting`], an input that cannot be read.
    pub(super) fn begin<S: StageOptions>(
        options: &S,
        how: How,
        watch: &'a mut Watch<'w>,
    ) -> Result<Self, TrainError> {
        let output = output_of(S::STAGE, options.output())?.to_owned();
        let interrupted = how.resume && output.join(TRACES).join(STATE).exists();
        let there = stamp::exists(&output) || output.is_file();
        if there && !how.overwrite && !interrupted {
            return Err(TrainError::Exists { output });
        }
        let stamp = Stamp::of(options)?;
        stamp::remove(&output)?;
        let threads = match options.output().threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        };
        Ok(Self {
            stage: S::STAGE,
            output,
            watch,
            how,
            threads,
            stamp,
            dtype: match options.output().dtype {
                SavedDType::Bf16 => DType::BF16,
                SavedDType::F32 => DType::F32,
            },
        })
    }

    /// Format of the weights to write.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// As many as the user wants.
    pub(super) fn threads(&self) -> Threads<'w> {
        Threads::new(self.stage.as_str(), self.threads, self.watch.stop)
    }

    /// Tells the user something.
    pub(super) fn note(&mut self, text: &str) {
        let stage = self.stage;
        self.watch.observer.note(&format!("{stage}: {text}"));
    }

    /// Trains, and tells what it came to.
    ///
    /// # Errors
    /// As [`run`]; [`TrainError::Setting`].
    pub(super) fn train<O: Objective>(
        &mut self,
        objective: &mut O,
        examples: &Examples<O::Item>,
        options: &LoopOptions,
        rules: Rules,
    ) -> Result<Report, TrainError> {
        let options = self.run_options(options, rules)?;
        let identity = self.stamp.identity();
        let directory = self.output.join(TRACES);
        let job = Job {
            name: self.stage.as_str(),
            items: &examples.items,
            lines: &examples.lines,
            identity: &identity,
            directory: &directory,
            resume: self.how.resume,
        };
        let report = run(objective, &job, &options, self.watch)?;
        self.note(&summary(&report));
        Ok(report)
    }

    /// Loss and what is watched, over examples that were not trained on.
    ///
    /// # Errors
    /// Where the engine fails.
    pub(super) fn validate<O: Objective>(
        &mut self,
        objective: &O,
        examples: &Examples<O::Item>,
    ) -> Result<Gradients, TrainError> {
        let items: Vec<&O::Item> = examples.items.iter().collect();
        let totals = items
            .iter()
            .map(|item| objective.totals(item))
            .fold(Totals::default(), std::ops::Add::add);
        let parts: Vec<&[&O::Item]> = items.chunks(EVALUATED_AT_ONCE).collect();
        let shares = self
            .threads()
            .map(&parts, |part| objective.evaluate(part, totals))?;
        let mut sum = Gradients {
            values: Vec::new(),
            loss: 0.0,
            watched: Vec::new(),
        };
        for share in shares {
            sum.loss += share.loss;
            if sum.watched.is_empty() {
                sum.watched = share.watched;
                continue;
            }
            for ((_, all), (_, value)) in sum.watched.iter_mut().zip(share.watched) {
                *all += value;
            }
        }
        let watched = sum.watched.iter();
        let watched = watched.map(|(name, value)| format!(", {name} {value:.3}"));
        let text = format!(
            "validation: loss {:.4}{}",
            sum.loss,
            watched.collect::<String>()
        );
        self.note(&text);
        Ok(sum)
    }

    /// The output is complete.
    ///
    /// # Errors
    /// [`TrainError::File`].
    pub(super) fn finish(mut self) -> Result<(), TrainError> {
        let state = self.output.join(TRACES).join(STATE);
        if state.exists() {
            fs::remove_file(&state).map_err(TrainError::file(&state))?;
        }
        self.stamp.clone().put(&self.output)?;
        let text = format!("written to {}", self.output.display());
        self.note(&text);
        Ok(())
    }

    fn run_options(&self, options: &LoopOptions, rules: Rules) -> Result<RunOptions, TrainError> {
        let stage = self.stage;
        let at_least_one = |key, value: usize| match value {
            0 => Err(setting(stage, key, "at least 1", 0)),
            value => Ok(value),
        };
        let in_range = |key, value: f64, max: f64| {
            let legal = (0.0..=max).contains(&value);
            let expected = format!("a number from 0 to {max}");
            legal
                .then_some(value)
                .ok_or_else(|| setting(stage, key, expected, value))
        };
        let batch_size = at_least_one("batch_size", options.batch_size)?;
        Ok(RunOptions {
            length: match options.steps {
                Some(steps) => Length::Steps(at_least_one("steps", steps)?),
                None => Length::Epochs(at_least_one("epochs", options.epochs)?),
            },
            batch_size,
            part_size: match options.micro_batch {
                Some(size) => at_least_one("micro_batch", size)?,
                None => batch_size.div_ceil(PARTS),
            },
            activations: match options.activation_checkpointing {
                true => Activations::Checkpointed,
                false => Activations::Kept,
            },
            threads: self.threads,
            learning_rate: in_range("learning_rate", options.learning_rate, 1.0)?,
            warmup: match options.warmup_steps {
                Some(steps) => Warmup::Steps(steps),
                None => Warmup::Share(in_range("warmup_share", options.warmup_share, 1.0)?),
            },
            final_factor: in_range("final_rate_share", options.final_rate_share, 1.0)?,
            adamw: AdamWOptions {
                betas: (
                    in_range("beta1", options.beta1, BETA_MAX)?,
                    in_range("beta2", options.beta2, BETA_MAX)?,
                ),
                weight_decay: in_range(
                    "weight_decay",
                    options.weight_decay.unwrap_or(rules.weight_decay),
                    1.0,
                )?,
                ..AdamWOptions::default()
            },
            clip: match options.clip {
                0.0 => None,
                clip => Some(in_range("clip", clip, f64::MAX)?),
            },
            seed: options.seed,
            save_every: options.save_every,
            stop_delta: rules.stop_delta,
        })
    }
}

/// AdamW divides by 1 - beta.
const BETA_MAX: f64 = 0.999_999;

/// What differs between stages in how they train.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rules {
    /// Where the user does not say.
    pub(super) weight_decay: f64,
    /// Where Delta ends the run.
    pub(super) stop_delta: Option<f64>,
}

fn summary(report: &Report) -> String {
    let ended = match report.ended {
        Ended::Length => "",
        Ended::Delta => ", ended by --stop-delta",
    };
    let delta = report.delta;
    let delta = delta.map_or_else(String::new, |delta| format!(", mean Delta {delta:.2}"));
    format!(
        "loss {:.4} -> {:.4}{delta} in {} steps{ended}; {} tokens in {:.0} s, {:.0} a second",
        report.first_loss,
        report.last_loss,
        report.steps,
        report.tokens,
        report.seconds,
        report.tokens as f64 / report.seconds.max(1e-9)
    )
}
