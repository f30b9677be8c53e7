//! The loop that trains any [`Objective`]: batches, parts on threads, AdamW, a schedule, and a state to go on from.
//!
//! The result is a function of objective, items, options and seed: neither the number of threads nor an interruption changes a bit.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::adamw::{Moments, Rate, clip_factor, square_sum};
use super::batches::{Batches, parts};
use super::job::{CURVES, Ended, Job, Length, METRICS, Report, RunOptions, STATE, Watch};
use super::objective::{Gradients, Objective, Totals};
use super::progress::{MetricsFile, Record, Smoothed};
use super::schedule::Cosine;
use super::state::{Progress, State};
use super::workers::Workers;
use super::{TrainError, curves, files};

/// The watched value that `stop_delta` looks at: mean of Delta over the batch.
const DELTA: &str = "delta";
/// Steps before which `stop_delta` does nothing: the smoothed value is then that of a few batches.
const STOP_DELTA_STEPS_MIN: usize = 5;

/// Trains `objective` on `job.items`. Its values are then the last ones, and the saved state is left for whoever saves them.
///
/// # Errors
/// [`TrainError::Empty`] without items; [`TrainError::Interrupted`] after `watch.stop`, with the state saved;
/// [`TrainError::NotFinite`] where loss or gradients are; whatever the objective or a file fails with.
pub fn run<O: Objective>(
    objective: &mut O,
    job: &Job<'_, O::Item>,
    options: &RunOptions,
    watch: &mut Watch<'_>,
) -> Result<Report, TrainError> {
    let mut run = Run::new(objective, job, options)?;
    let done = run.state.progress.step;
    watch.observer.started(job.name, run.schedule.steps, done);
    let ended = run.train(watch);
    watch.observer.finished();
    let curves = curves::svg(job.name, run.metrics.records());
    files::write(&job.directory.join(CURVES), curves.as_bytes())?;
    Ok(run.report(ended?))
}

struct Run<'a, O: Objective> {
    objective: &'a mut O,
    job: &'a Job<'a, O::Item>,
    options: &'a RunOptions,
    workers: Workers,
    batches: Batches,
    schedule: Cosine,
    state: State,
    loss: Smoothed,
    delta: Smoothed,
    metrics: MetricsFile,
    /// Tokens of each item.
    lengths: Vec<usize>,
    /// Loss of the first step of all.
    first_loss: Option<f64>,
    began: Instant,
    /// Steps done before this process.
    started_at: usize,
    /// Seconds and tokens before this process.
    before: (f64, u64),
    /// The state on disk, if this run wrote or read it.
    saved: Option<PathBuf>,
}

/// One batch's outcome.
struct Step {
    gradients: Gradients,
    totals: Totals,
    norm: f64,
    learning_rate: f64,
}

impl<'a, O: Objective> Run<'a, O> {
    fn new(
        objective: &'a mut O,
        job: &'a Job<'a, O::Item>,
        options: &'a RunOptions,
    ) -> Result<Self, TrainError> {
        if job.items.is_empty() {
            let what = job.name.to_owned();
            return Err(TrainError::Empty { what });
        }
        files::make_directory(job.directory)?;
        let lengths = job.items.iter().map(|item| objective.totals(item).tokens);
        let lengths: Vec<usize> = lengths.collect();
        let batches = Batches::new(job.items.len(), options.batch_size, options.seed);
        let steps = match options.length {
            Length::Epochs(epochs) => epochs * batches.per_epoch(),
            Length::Steps(steps) => steps,
        };
        let identity = identity(objective.parameters(), job, options, &lengths);
        let file = job.directory.join(STATE);
        let saved = (job.resume && file.exists()).then_some(file);
        let state = match &saved {
            Some(file) => State::read(file, &identity, objective.parameters())?,
            None => State {
                progress: Progress::new(identity, options.seed),
                values: objective.values()?,
                moments: Moments::new(objective.parameters()),
            },
        };
        objective.set_values(&state.values)?;
        let progress = &state.progress;
        let metrics = MetricsFile::open(&job.directory.join(METRICS), progress.step)?;
        Ok(Self {
            workers: Workers::new(options.threads),
            batches,
            schedule: Cosine {
                steps,
                warmup_steps: options.warmup.steps(steps),
                final_factor: options.final_factor,
            },
            loss: Smoothed::from_bits(progress.smoothed_bits[0]),
            delta: Smoothed::from_bits(progress.smoothed_bits[1]),
            first_loss: metrics.records().first().map(|record| record.loss),
            metrics,
            lengths,
            began: Instant::now(),
            started_at: progress.step,
            before: (f64::from_bits(progress.seconds_bits), progress.tokens),
            saved,
            objective,
            job,
            options,
            state,
        })
    }

    /// All steps, up to the end or to whatever ends it before.
    fn train(&mut self, watch: &mut Watch<'_>) -> Result<Ended, TrainError> {
        while self.state.progress.step < self.schedule.steps {
            if watch.stop.load(Ordering::Relaxed) {
                return Err(self.interrupted()?);
            }
            let step = self.step()?;
            let record = self.record(&step);
            watch.observer.step(&record);
            self.metrics.push(record)?;
            if self.overshoots() {
                return Ok(Ended::Delta);
            }
            let done = self.state.progress.step;
            if self
                .options
                .save_every
                .is_some_and(|every| done.is_multiple_of(every.max(1)))
            {
                self.save()?;
            }
        }
        Ok(Ended::Length)
    }

    /// One batch: gradients of its parts, added in the order of the parts, and a step of the optimiser.
    fn step(&mut self) -> Result<Step, TrainError> {
        let step = self.state.progress.step;
        let batch = self.batches.at(step).to_vec();
        let items = self.job.items;
        let totals = batch
            .iter()
            .filter_map(|item| items.get(*item))
            .map(|item| self.objective.totals(item))
            .fold(Totals::default(), std::ops::Add::add);
        let length = |item: usize| self.lengths.get(item).copied().unwrap_or_default();
        let parts = parts(&batch, self.options.part_size, length);
        let objective: &O = self.objective;
        let activations = self.options.activations;
        let of_parts = self.workers.map(parts, |part| {
            let part: Vec<&O::Item> = part.iter().filter_map(|item| items.get(*item)).collect();
            objective.gradients(&part, totals, activations)
        })?;
        let (gradients, norm) = sum(of_parts, &self.workers)?;
        if !gradients.loss.is_finite() || !norm.is_finite() {
            return Err(self.not_finite(&batch, gradients.loss, norm));
        }
        let learning_rate = self.options.learning_rate * self.schedule.factor(step);
        let rate = Rate {
            learning_rate,
            clip: clip_factor(norm, self.options.clip),
        };
        let State {
            values,
            moments,
            progress,
        } = &mut self.state;
        let parameters = self.objective.parameters();
        moments.update(
            values,
            &gradients.values,
            parameters,
            (step, rate),
            &self.options.adamw,
            &self.workers,
        )?;
        self.objective.set_values(values)?;
        progress.step += 1;
        progress.epoch = progress.step / self.batches.per_epoch();
        progress.position = progress.step % self.batches.per_epoch();
        progress.tokens += totals.tokens as u64;
        Ok(Step {
            gradients,
            totals,
            norm,
            learning_rate,
        })
    }

    fn record(&mut self, step: &Step) -> Record {
        let progress = &self.state.progress;
        let seconds = self.began.elapsed().as_secs_f64();
        let (seconds_before, tokens_before) = self.before;
        let tokens = progress.tokens - tokens_before;
        let done_here = progress.step - self.started_at;
        let left = self.schedule.steps - progress.step;
        let mut watched = Map::new();
        for (name, value) in &step.gradients.watched {
            watched.insert((*name).to_owned(), Value::from(*value));
            if *name == DELTA {
                self.delta.push(*value);
            }
        }
        self.first_loss.get_or_insert(step.gradients.loss);
        Record {
            step: progress.step,
            steps: self.schedule.steps,
            epoch: progress.step as f64 / self.batches.per_epoch() as f64,
            loss: step.gradients.loss,
            loss_smoothed: self.loss.push(step.gradients.loss),
            learning_rate: step.learning_rate,
            gradient_norm: step.norm,
            tokens: step.totals.tokens,
            tokens_per_second: tokens as f64 / seconds,
            seconds: seconds_before + seconds,
            seconds_left: seconds / done_here as f64 * left as f64,
            watched,
        }
    }

    /// Whether the smoothed Delta has passed its limit.
    fn overshoots(&self) -> bool {
        let limit = self.options.stop_delta;
        self.state.progress.step >= STOP_DELTA_STEPS_MIN
            && limit.is_some_and(|limit| self.delta.mean() > limit)
    }

    fn save(&mut self) -> Result<PathBuf, TrainError> {
        let progress = &mut self.state.progress;
        let seconds = self.before.0 + self.began.elapsed().as_secs_f64();
        progress.seconds_bits = seconds.to_bits();
        progress.smoothed_bits = [self.loss.to_bits(), self.delta.to_bits()];
        let file = self.job.directory.join(STATE);
        self.state.write(&file, self.objective.parameters())?;
        self.saved = Some(file.clone());
        Ok(file)
    }

    fn interrupted(&mut self) -> Result<TrainError, TrainError> {
        Ok(TrainError::Interrupted {
            stage: self.job.name.to_owned(),
            step: self.state.progress.step,
            steps: self.schedule.steps,
            state: self.save()?,
        })
    }

    fn not_finite(&self, batch: &[usize], loss: f64, norm: f64) -> TrainError {
        let line = |item: &usize| self.job.lines.get(*item).copied();
        TrainError::NotFinite {
            stage: self.job.name.to_owned(),
            step: self.state.progress.step + 1,
            loss,
            norm,
            lines: batch.iter().filter_map(line).collect(),
            state: self.saved.clone(),
        }
    }

    fn report(self, ended: Ended) -> Report {
        let watches_delta = !self.delta.mean().is_nan();
        Report {
            steps: self.state.progress.step,
            first_loss: self.first_loss.unwrap_or(f64::NAN),
            last_loss: self.loss.mean(),
            delta: watches_delta.then(|| self.delta.mean()),
            tokens: self.state.progress.tokens,
            seconds: self.before.0 + self.began.elapsed().as_secs_f64(),
            ended,
        }
    }
}

/// The gradients of a batch, those of its parts added from the first to the last, and their Euclidean norm.
fn sum(parts: Vec<Gradients>, workers: &Workers) -> Result<(Gradients, f64), TrainError> {
    let mut parts = parts.into_iter();
    let none = || Gradients {
        values: Vec::new(),
        loss: 0.0,
        watched: Vec::new(),
    };
    let mut all = parts.next().unwrap_or_else(none);
    let rest: Vec<Gradients> = parts.collect();
    let squares = workers.map(all.values.iter_mut().enumerate(), |(index, sum)| {
        for values in rest.iter().filter_map(|part| part.values.get(index)) {
            for (sum, value) in sum.iter_mut().zip(values) {
                *sum += value;
            }
        }
        Ok(square_sum(sum))
    })?;
    for part in &rest {
        all.loss += part.loss;
        for ((_, sum), (_, value)) in all.watched.iter_mut().zip(&part.watched) {
            *sum += value;
        }
    }
    Ok((all, squares.into_iter().sum::<f64>().sqrt()))
}

/// What a run is, but for its threads and where it saves: a state goes on only with the same.
fn identity<I>(
    parameters: &[super::Parameter],
    job: &Job<'_, I>,
    options: &RunOptions,
    lengths: &[usize],
) -> String {
    let same = RunOptions {
        threads: 0,
        save_every: None,
        ..options.clone()
    };
    let text = format!(
        "{} {same:?} {parameters:?} {:?} {lengths:?}",
        job.identity, job.lines
    );
    let hash = Sha256::digest(text.as_bytes());
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;
    use std::sync::atomic::AtomicBool;

    use tempfile::tempdir;

    use super::*;
    use crate::random::SplitMix64;
    use crate::train::{Activations, AdamWOptions, Observer, Parameter, Pass, Unwatched, Warmup};

    /// Least squares: loss = mean of (<w, x> - y)^2.
    struct Line {
        parameters: Vec<Parameter>,
        weights: Vec<Vec<f32>>,
    }

    struct Point {
        x: Vec<f32>,
        y: f32,
    }

    impl Line {
        const AXES: usize = 5;

        fn new() -> Self {
            Self {
                parameters: vec![Parameter {
                    name: "w".to_owned(),
                    shape: vec![Self::AXES],
                    decay: true,
                }],
                weights: vec![vec![0.0; Self::AXES]],
            }
        }
    }

    impl Objective for Line {
        type Item = Point;

        fn parameters(&self) -> &[Parameter] {
            &self.parameters
        }

        fn values(&self) -> Result<Vec<Vec<f32>>, TrainError> {
            Ok(self.weights.clone())
        }

        fn set_values(&mut self, values: &[Vec<f32>]) -> Result<(), TrainError> {
            self.weights = values.to_vec();
            Ok(())
        }

        fn totals(&self, item: &Point) -> Totals {
            Totals {
                items: 1,
                tokens: item.x.iter().filter(|x| **x != 0.0).count(),
                weight: 1.0,
            }
        }

        fn shares(
            &self,
            items: &[&Point],
            batch: Totals,
            pass: Pass,
        ) -> Result<Gradients, TrainError> {
            let mut gradient = vec![0.0; Self::AXES];
            let mut loss = 0.0;
            for point in items {
                let products = self.weights[0].iter().zip(&point.x).map(|(w, x)| w * x);
                let error = products.sum::<f32>() - point.y;
                loss += f64::from(error * error) / batch.items as f64;
                for (sum, x) in gradient.iter_mut().zip(&point.x) {
                    *sum += 2.0 * error * x / batch.items as f32;
                }
            }
            Ok(Gradients {
                values: match pass {
                    Pass::Back(_) => vec![gradient],
                    Pass::Forward => Vec::new(),
                },
                loss,
                watched: vec![(
                    DELTA,
                    f64::from(self.weights[0][0]) * items.len() as f64 / batch.items as f64,
                )],
            })
        }
    }

    fn points() -> Vec<Point> {
        let mut random = SplitMix64::new(1, 0);
        let point = |_| {
            let x: Vec<f32> = (0..Line::AXES).map(|_| random.normal() as f32).collect();
            let y = 3.0 * x[0] - 2.0 * x[4] + 0.1 * random.normal() as f32;
            Point { x, y }
        };
        (0..50).map(point).collect()
    }

    fn options() -> RunOptions {
        RunOptions {
            length: Length::Epochs(10),
            batch_size: 8,
            part_size: 3,
            activations: Activations::Kept,
            threads: 1,
            learning_rate: 0.1,
            warmup: Warmup::Steps(2),
            final_factor: 0.1,
            adamw: AdamWOptions::default(),
            clip: Some(10.0),
            seed: 9,
            save_every: None,
            stop_delta: None,
        }
    }

    /// Trains in `directory`; `stop_at`: as if the user had pressed Ctrl-C during that step.
    fn train(
        points: &[Point],
        options: &RunOptions,
        directory: &Path,
        stop_at: Option<usize>,
    ) -> (Result<Report, TrainError>, Vec<f32>) {
        struct Stopping<'a>(&'a AtomicBool, Option<usize>);
        impl Observer for Stopping<'_> {
            fn started(&mut self, _: &str, _: usize, _: usize) {}
            fn step(&mut self, record: &Record) {
                self.0.store(Some(record.step) == self.1, Ordering::Relaxed);
            }
            fn finished(&mut self) {}
            fn note(&mut self, _: &str) {}
        }
        let stop = AtomicBool::new(false);
        let lines: Vec<usize> = (1..=points.len()).collect();
        let job = Job {
            name: "line",
            items: points,
            lines: &lines,
            identity: "",
            directory,
            resume: true,
        };
        let mut watch = Watch {
            observer: &mut Stopping(&stop, stop_at),
            stop: &stop,
        };
        let mut line = Line::new();
        let report = run(&mut line, &job, options, &mut watch);
        (report, line.weights.remove(0))
    }

    #[test]
    fn a_run_finds_the_line_and_reports_what_it_did() {
        let (scratch, points) = (tempdir().unwrap(), points());
        let (report, weights) = train(&points, &options(), scratch.path(), None);
        let report = report.unwrap();
        assert_eq!((report.steps, report.ended), (70, Ended::Length));
        assert!(
            report.first_loss > 5.0 && report.last_loss < 0.2,
            "{report:?}"
        );
        assert!(
            (weights[0] - 3.0).abs() < 0.2 && (weights[4] + 2.0).abs() < 0.2,
            "{weights:?}"
        );
        assert_eq!(report.tokens, 50 * 5 * 10);
        let metrics = std::fs::read_to_string(scratch.path().join(METRICS)).unwrap();
        let last: Record = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        assert_eq!((metrics.lines().count(), last.step), (70, 70));
        assert_eq!(last.watched(DELTA).map(|delta| delta > 2.0), Some(true));
    }

    #[test]
    fn neither_threads_nor_an_interruption_change_a_bit() {
        let points = points();
        let (_, want) = train(&points, &options(), tempdir().unwrap().path(), None);
        for threads in [2, 3] {
            let options = RunOptions {
                threads,
                ..options()
            };
            let (_, weights) = train(&points, &options, tempdir().unwrap().path(), None);
            assert_eq!(weights, want, "{threads} threads");
        }
        for save_every in [None, Some(5)] {
            let scratch = tempdir().unwrap();
            let options = RunOptions {
                save_every,
                ..options()
            };
            let (stopped, halfway) = train(&points, &options, scratch.path(), Some(33));
            let error = stopped.unwrap_err().to_string();
            assert!(
                error.contains("after step 33 of 70") && error.contains("--resume"),
                "{error}"
            );
            assert_ne!(halfway, want);
            let (report, weights) = train(&points, &options, scratch.path(), None);
            assert_eq!(report.unwrap().tokens, 50 * 5 * 10);
            assert_eq!(weights, want, "resumed");
            let metrics = std::fs::read_to_string(scratch.path().join(METRICS)).unwrap();
            assert_eq!(metrics.lines().count(), 70);
        }
    }

    #[test]
    fn a_run_killed_after_a_saved_state_computes_the_lost_steps_again() {
        let (points, scratch) = (points(), tempdir().unwrap());
        let options = RunOptions {
            save_every: Some(20),
            ..options()
        };
        let (_, want) = train(&points, &options, scratch.path(), None);
        // The state of step 60 is the last one: as if the process had died in step 70.
        let (report, weights) = train(&points, &options, scratch.path(), None);
        assert_eq!(report.unwrap().steps, 70);
        assert_eq!(weights, want);
    }

    #[test]
    fn a_state_of_another_run_is_refused() {
        let (points, scratch) = (points(), tempdir().unwrap());
        let (stopped, _) = train(&points, &options(), scratch.path(), Some(3));
        assert!(stopped.is_err());
        let other = RunOptions {
            learning_rate: 0.2,
            ..options()
        };
        let error = train(&points, &other, scratch.path(), None).0.unwrap_err();
        assert!(error.to_string().contains("other settings"), "{error}");
    }

    #[test]
    fn what_is_not_finite_stops_the_run_and_names_step_lines_and_state() {
        let (mut points, scratch) = (points(), tempdir().unwrap());
        points[17].y = f32::NAN;
        let options = RunOptions {
            save_every: Some(1),
            ..options()
        };
        let (report, weights) = train(&points, &options, scratch.path(), None);
        let error = report.unwrap_err();
        let TrainError::NotFinite { step, lines, .. } = &error else {
            panic!("{error}");
        };
        assert!(
            (1..=7).contains(step) && lines.contains(&18) && lines.len() <= 8,
            "{error}"
        );
        assert!(weights.iter().all(|w| w.is_finite()));
        let saved = error.to_string().contains(STATE);
        assert_eq!(saved, *step > 1, "{error}");
    }

    #[test]
    fn stop_delta_ends_a_run_that_overshoots() {
        let (points, scratch) = (points(), tempdir().unwrap());
        let options = RunOptions {
            stop_delta: Some(1.0),
            ..options()
        };
        let report = train(&points, &options, scratch.path(), None).0.unwrap();
        assert_eq!(report.ended, Ended::Delta);
        assert!(
            report.steps < 70 && report.delta.unwrap() > 1.0,
            "{report:?}"
        );
    }

    #[test]
    fn nothing_to_train_on_is_an_error() {
        let scratch = tempdir().unwrap();
        let mut watch = Watch {
            observer: &mut Unwatched,
            stop: &AtomicBool::new(false),
        };
        let job = Job {
            name: "line",
            items: &[],
            lines: &[],
            identity: "",
            directory: scratch.path(),
            resume: false,
        };
        let report = run(&mut Line::new(), &job, &options(), &mut watch);
        assert!(matches!(report, Err(TrainError::Empty { .. })));
    }
}
