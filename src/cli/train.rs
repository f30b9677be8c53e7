//! `midpo train`: one stage of the method, or a whole recipe.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{ArgMatches, Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use super::CliError;
use crate::backend::cpu;
use crate::config::train::{
    AllFlags, CostStage, DpoStage, DualStage, HelpfulnessStage, Recipe, RecipeOverrides,
    RewardStage, RouterStage, RunFlags, SafetyStage, SftStage, StageOptions,
};
use crate::train::stage::{self, AllOptions, How};
use crate::train::{Observer, Record, TrainError, Watch};

/// Lines of progress of a stage where no bar can be drawn.
const LINES: usize = 10;
/// What is watched, and the word and digits that the bar shows it with.
const WATCHED: [(&str, &str, usize); 5] = [
    ("delta", "Delta", 2),
    ("margin", "margin", 2),
    ("accuracy", "accuracy", 2),
    ("alpha_last", "alpha", 2),
    ("beta_last", "beta", 2),
];

const EXAMPLES: &str = "\
Examples:
  midpo train all --recipe recipe.toml                 every stage of a pipeline, in order; what is current is skipped
  midpo train sft --base DIR --data sft.jsonl --output base
  midpo train cost --base base --data pairs.jsonl --output cost
  midpo train safety --base base --cost cost --data pairs.jsonl --output safety
  midpo train safety --recipe recipe.toml --rank 8 --overwrite";

/// `midpo train`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct TrainArgs {
    #[command(subcommand)]
    command: TrainCommand,
}

#[derive(Debug, Subcommand)]
enum TrainCommand {
    /// Train a base on prompts and answers, from another base or from random weights.
    Sft(Box<StageArgs<SftStage>>),
    /// Train the reward model R: which response is better.
    Reward(Box<StageArgs<RewardStage>>),
    /// Train the cost model C: which response is safer, and which are safe.
    Cost(Box<StageArgs<CostStage>>),
    /// Train the safety expert by SPE-DPO, on pairs of which exactly one response is safe.
    Safety(Box<StageArgs<SafetyStage>>),
    /// Train the helpfulness expert by SPE-DPO, on all pairs.
    Helpfulness(Box<StageArgs<HelpfulnessStage>>),
    /// Train one LoRA by plain DPO on both preferences, as a baseline.
    Dpo(Box<StageArgs<DpoStage>>),
    /// Build D_dual, the pairs of the router: both responses safe, one of them better on both preferences.
    Dual(Box<StageArgs<DualStage>>),
    /// Train the router on D_dual; prints what fixed gates are worth there first.
    Router(Box<StageArgs<RouterStage>>),
    /// Run the stages of a recipe, but for those whose outputs are current.
    All(AllFlags),
}

/// A stage's settings, and flags that are no settings.
#[derive(Debug, Args)]
struct StageArgs<S: Args> {
    #[command(flatten)]
    stage: S,
    #[command(flatten)]
    run: RunFlags,
}

/// Runs it. `matches` are those of `train`.
///
/// # Errors
/// A setting, a file or a line that cannot be used; a run that was stopped or came to NaN.
pub(super) fn run(args: &TrainArgs, matches: &ArgMatches) -> Result<ExitCode, CliError> {
    // clap has refused a command line without a stage.
    let matches = matches.subcommand().map_or(matches, |(_, inner)| inner);
    watched(|watch| stages(args, matches, watch))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs a whole recipe: what `midpo train all` does.
///
/// # Errors
/// As [`run`].
pub(super) fn run_all(flags: &AllFlags) -> Result<(), CliError> {
    watched(|watch| all(flags, watch))
}

/// With progress on the terminal, until a signal.
fn watched(train: impl FnOnce(&mut Watch<'_>) -> Result<(), CliError>) -> Result<(), CliError> {
    // A step takes and frees the same tens of megabytes as the one before it.
    cpu::keep_heap();
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop)?;
    let mut progress = Progress::default();
    train(&mut Watch {
        observer: &mut progress,
        stop: &stop,
    })
}

fn stages(args: &TrainArgs, matches: &ArgMatches, watch: &mut Watch<'_>) -> Result<(), CliError> {
    match &args.command {
        TrainCommand::Sft(args) => one(args, matches, watch, stage::sft)?,
        TrainCommand::Reward(args) => one(args, matches, watch, stage::reward)?,
        TrainCommand::Cost(args) => one(args, matches, watch, stage::cost)?,
        TrainCommand::Safety(args) => one(args, matches, watch, stage::safety)?,
        TrainCommand::Helpfulness(args) => one(args, matches, watch, stage::helpfulness)?,
        TrainCommand::Dpo(args) => one(args, matches, watch, stage::dpo)?,
        TrainCommand::Dual(args) => one(args, matches, watch, stage::dual)?,
        TrainCommand::Router(args) => one(args, matches, watch, stage::router)?,
        TrainCommand::All(flags) => all(flags, watch)?,
    }
    Ok(())
}

fn one<S: StageOptions, R>(
    args: &StageArgs<S>,
    matches: &ArgMatches,
    watch: &mut Watch<'_>,
    stage: impl FnOnce(&S, How, &mut Watch<'_>) -> Result<R, TrainError>,
) -> Result<(), CliError> {
    let how = How {
        resume: args.run.resume,
        overwrite: args.run.overwrite,
    };
    let from_recipe: S;
    let options = match &args.run.recipe {
        Some(file) => {
            let recipe = Recipe::load(file, &RecipeOverrides::default())?;
            from_recipe = recipe.stage_with(matches)?;
            &from_recipe
        }
        None => &args.stage,
    };
    stage(options, how, watch)?;
    Ok(())
}

fn all(flags: &AllFlags, watch: &mut Watch<'_>) -> Result<(), CliError> {
    let overrides = RecipeOverrides {
        output: flags.output.clone(),
        threads: flags.threads,
    };
    let recipe = Recipe::load(&flags.recipe, &overrides)?;
    let resume = flags.resume;
    stage::all(&recipe, AllOptions { resume }, watch)?;
    Ok(())
}

/// The first SIGINT or SIGTERM asks the run to save and stop; a second one ends the program at once.
fn stop_on_signals(stop: &Arc<AtomicBool>) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(CliError::io("the listener for signals"))?;
    let stop = Arc::clone(stop);
    let listen = move || {
        runtime.block_on(async move {
            loop {
                if next_signal().await.is_err() {
                    return;
                }
                if stop.swap(true, Ordering::Relaxed) {
                    std::process::exit(i32::from(INTERRUPTED));
                }
                let _ = writeln!(
                    std::io::stderr(),
                    "stopping after this step; once more to stop at once"
                );
            }
        });
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(listen)
        .map_err(CliError::io("the thread that listens for signals"))?;
    Ok(())
}

/// As shells call a program that SIGINT ended.
pub(super) const INTERRUPTED: u8 = 130;

async fn next_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

/// Progress on the terminal: a bar on standard error (a line now and then where that is none), notes on standard output.
#[derive(Default)]
pub(super) struct Progress {
    stage: String,
    bar: Option<ProgressBar>,
}

impl Observer for Progress {
    fn started(&mut self, stage: &str, steps: usize, done: usize) {
        stage.clone_into(&mut self.stage);
        if !std::io::stderr().is_terminal() {
            return;
        }
        let bar = ProgressBar::new(steps as u64).with_position(done as u64);
        let template = format!("{stage} [{{bar:24}}] {{pos}}/{{len}} {{wide_msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        self.bar = Some(bar);
    }

    fn step(&mut self, record: &Record) {
        let text = described(record);
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            bar.set_position(record.step as u64);
            return;
        }
        let tenth = |step: usize| step * LINES / record.steps.max(1);
        if tenth(record.step) > tenth(record.step.saturating_sub(1)) {
            let (stage, step, steps) = (&self.stage, record.step, record.steps);
            let _ = writeln!(std::io::stderr(), "{stage} {step}/{steps} {text}");
        }
    }

    fn finished(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn note(&mut self, text: &str) {
        let say = || {
            let _ = writeln!(std::io::stdout(), "{text}");
        };
        match &self.bar {
            Some(bar) => bar.suspend(say),
            None => say(),
        }
    }
}

fn described(record: &Record) -> String {
    let mut text = format!("loss {:.4}", record.loss_smoothed);
    for (name, word, digits) in WATCHED {
        if let Some(value) = record.watched(name) {
            text += &format!(" {word} {value:.digits$}");
        }
    }
    let (speed, left) = (record.tokens_per_second, record.seconds_left);
    text + &format!(" {speed:.0} tok/s {} left", minutes(left))
}

fn minutes(seconds: f64) -> String {
    // A run of more than u64 seconds will not be waited for.
    let seconds = seconds.max(0.0) as u64;
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::{Command, FromArgMatches as _};

    use super::*;

    fn parse(flags: &[&str]) -> Result<TrainArgs, String> {
        let command = TrainArgs::augment_args(Command::new("train").no_binary_name(true));
        let matches = command
            .try_get_matches_from(flags)
            .map_err(|e| e.to_string())?;
        TrainArgs::from_arg_matches(&matches).map_err(|e| e.to_string())
    }

    #[test]
    fn a_stage_without_flags_has_the_authors_settings() {
        let TrainCommand::Safety(args) = parse(&["safety"]).unwrap().command else {
            panic!("safety");
        };
        let SafetyStage {
            data,
            training,
            expert,
            margin,
            ..
        } = &args.stage;
        assert_eq!(
            (data.max_length, training.epochs, training.batch_size),
            (512, 3, 4)
        );
        assert_eq!(
            (training.learning_rate, training.warmup_share),
            (1e-5, 0.03)
        );
        assert_eq!(
            (training.beta1, training.beta2, training.seed),
            (0.9, 0.95, 42)
        );
        assert_eq!(
            (expert.rank, expert.alpha, expert.beta_dpo),
            (16, 32.0, 0.1)
        );
        assert_eq!((margin.margin_scale, expert.anchor), (1.0, 0.0));
    }

    #[test]
    fn progress_is_told_in_one_line() {
        let record = serde_json::json!({
            "step": 3, "steps": 80, "epoch": 0.1, "loss": 0.7, "loss_smoothed": 0.69, "learning_rate": 1e-3, "gradient_norm": 1.0,
            "tokens": 100, "tokens_per_second": 1234.4, "seconds": 2.0, "seconds_left": 75.0, "delta": 1.5, "accuracy": 0.75
        });
        let text = described(&serde_json::from_value(record).unwrap());
        assert_eq!(
            text,
            "loss 0.6900 Delta 1.50 accuracy 0.75 1234 tok/s 1:15 left"
        );
    }
}
