//! One run of the loop: how, on what, who watches, and what it came to.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::adamw::AdamWOptions;
use super::objective::Activations;
use super::progress::Observer;
use super::schedule::Warmup;

/// How an objective is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct RunOptions {
    /// How long.
    pub length: Length,
    /// Items of a batch.
    pub batch_size: usize,
    /// Items that are computed at once, as one padded part of the batch; gradients of the parts are added up. Smaller is less
    /// memory. It changes the order of sums, so it is no function of the number of threads.
    pub part_size: usize,
    /// What passes back find of passes forward.
    pub activations: Activations,
    /// Threads, each with a part of its own.
    pub threads: usize,
    /// Before the schedule.
    pub learning_rate: f64,
    /// At the start.
    pub warmup: Warmup,
    /// What the cosine falls to, as a share of the learning rate.
    pub final_factor: f64,
    /// Constants of the optimiser.
    pub adamw: AdamWOptions,
    /// Largest norm of a batch's gradient; `None`: any.
    pub clip: Option<f64>,
    /// Of the order of the items.
    pub seed: u64,
    /// Steps between two saved states; `None`: only an interruption saves one.
    pub save_every: Option<usize>,
    /// Ends the run when the smoothed mean Delta is above this.
    pub stop_delta: Option<f64>,
}

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Times through the items.
    Epochs(usize),
    /// Steps.
    Steps(usize),
}

/// One run: what is trained on, and where it leaves its traces.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a, I> {
    /// For whoever watches.
    pub name: &'a str,
    /// What is trained on.
    pub items: &'a [I],
    /// Where each item came from: line of its data file, from 1.
    pub lines: &'a [usize],
    /// Settings of the objective, in words: a state is resumed only by a run with the same.
    pub identity: &'a str,
    /// Directory of `state.safetensors`, `metrics.jsonl` and `curves.svg`.
    pub directory: &'a Path,
    /// Go on from `state.safetensors` where there is one.
    pub resume: bool,
}

/// Who watches a run, and who may end it.
pub struct Watch<'a> {
    /// Hears of every step.
    pub observer: &'a mut dyn Observer,
    /// Set from outside: save and stop after the step that runs.
    pub stop: &'a AtomicBool,
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Steps done, of all.
    pub steps: usize,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Smoothed loss at the end.
    pub last_loss: f64,
    /// Smoothed mean Delta at the end, where the objective watches it.
    pub delta: Option<f64>,
    /// Tokens that are not padding.
    pub tokens: u64,
    /// Of training, over all resumed runs.
    pub seconds: f64,
    /// Why it ended.
    pub ended: Ended,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All steps are done.
    Length,
    /// Delta passed `stop_delta`.
    Delta,
}

/// The file of a run's state in its directory.
pub const STATE: &str = "state.safetensors";
/// The file of a run's metrics in its directory.
pub const METRICS: &str = "metrics.jsonl";
/// The file of a run's curves in its directory.
pub const CURVES: &str = "curves.svg";
