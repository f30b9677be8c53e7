//! `midpo pairs`: preference pairs for `midpo train` from prompts alone, answered by the base itself in several voices.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::CliError;
use super::engine::{self, Running};
use super::eval::answer_all;
use crate::config::{EngineOptions, ModelOptions};
use crate::eval::{
    Contender, Drawing, EvalError, Pairing, Pairs, Prompt, RefusalRules, Side, Voice, is_held_out,
    prompts,
};
use crate::metrics::Metrics;
use crate::types::SamplingParams;

/// Answers of a voice to a prompt at most: pairs grow with their square.
const ANSWERS_MAX: u64 = 16;

const EXAMPLES: &str = "\
Examples:
  midpo pairs --model BASE.gguf --prompts sets/ --output pairs.jsonl
  midpo pairs --model BASE --prompts mine.jsonl --output pairs.jsonl --hold-out held_out.jsonl --hold-out-share 0.25
  midpo train all --recipe recipe.toml                 with pairs = \"pairs.jsonl\"
  midpo eval --model trained/model --prompts held_out.jsonl

Prompts are read as by midpo eval: a line is {\"prompt\": \"...\", \"class\": \"harmful\"}, and sets that are known are read by their own
fields. Prompts of class harmful should be refused, all others answered; unlabelled ones are left out. Mind the licences of sets.";

/// `midpo pairs`.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PairsArgs {
    /// Files of prompts (JSON lines), directories of files, or a directory of such directories.
    #[arg(long, value_name = "FILE|DIR", required = true, num_args = 1..)]
    prompts: Vec<PathBuf>,
    /// At most so many prompts of each class of each set; drawn by the seed.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// JSONL of pairs in PKU-SafeRLHF's schema, as `midpo train` reads them.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Keep some prompts out of the pairs, and write them here for `midpo eval --prompts`.
    #[arg(long, value_name = "FILE")]
    hold_out: Option<PathBuf>,
    /// Share of the prompts that is held out.
    #[arg(
        long,
        default_value_t = 0.2,
        requires = "hold_out",
        value_name = "SHARE"
    )]
    hold_out_share: f64,
    /// Answers of each voice to each prompt.
    #[arg(long, default_value_t = 1, value_name = "N")]
    answers: u64,
    /// Most pairs of one prompt; by default every two answers whose voices are not even.
    #[arg(long, value_name = "N")]
    pairs_max: Option<usize>,
    /// The voices in which the base answers, and what their answers are worth, instead of the built-in ones.
    #[arg(long, value_name = "FILE")]
    voices: Option<PathBuf>,
    /// Patterns of refusals for the judge, instead of the built-in ones.
    #[arg(long, value_name = "FILE")]
    refusals: Option<PathBuf>,
    /// 0 always takes the likeliest token; by default what the model's files say.
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Most tokens of one answer. What is cut there loses its last sentence.
    #[arg(long, default_value_t = 96, value_name = "TOKENS")]
    max_tokens: u32,
    /// Of all that is drawn: the same seed gives the same pairs.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    engine: EngineOptions,
}

/// Prompts by what becomes of them.
#[derive(Default)]
struct Asked {
    harmful: Vec<Prompt>,
    harmless: Vec<Prompt>,
    held_out: Vec<Prompt>,
    unlabelled: usize,
    repeated: usize,
}

/// Answers all prompts, writes pairs and held-out prompts, and tells what became of the answers.
///
/// # Errors
/// A flag, a file or a line that cannot be used, before any work; a model that cannot answer; a file that cannot be written.
pub(super) fn run(args: &PairsArgs) -> Result<ExitCode, CliError> {
    check(args)?;
    let rules = match &args.refusals {
        Some(file) => RefusalRules::read(file)?,
        None => RefusalRules::built_in()?,
    };
    let voices = match &args.voices {
        Some(file) => Voice::read(file)?,
        None => Voice::built_in()?,
    };
    let asked = asked(args)?;
    let runtime = args.engine.validate()?;
    let source = args.model.validate()?;
    let running = engine::start(&source, &runtime, Arc::new(Metrics::new("pairs")))?;
    let rounds = [
        Round::new(&voices, Side::Harmful, &asked.harmful),
        Round::new(&voices, Side::Harmless, &asked.harmless),
    ];
    let pairing = Pairing {
        rules: &rules,
        most: args.pairs_max.unwrap_or(usize::MAX),
        seed: args.seed,
    };
    let pairs = pairs(args, running, &rounds, &pairing)?;
    let lines = pairs.lines.iter();
    write(
        &args.output,
        &lines.map(|line| format!("{line}\n")).collect::<String>(),
    )?;
    if let Some(file) = &args.hold_out {
        write(file, &held_out(&asked.held_out))?;
    }
    let mut stdout = std::io::stdout().lock();
    let told = stdout.write_all(summary(args, &asked, &pairs).as_bytes());
    told.and_then(|()| stdout.flush())
        .map_err(CliError::io("standard output"))?;
    Ok(ExitCode::SUCCESS)
}

/// Prompts of one side, and who answers them.
struct Round<'a> {
    voices: Vec<Voice>,
    prompts: &'a [Prompt],
}

impl<'a> Round<'a> {
    fn new(voices: &[Voice], side: Side, prompts: &'a [Prompt]) -> Self {
        let voices = voices.iter().filter(|voice| voice.prompts == side);
        Self {
            voices: voices.cloned().collect(),
            prompts,
        }
    }
}

/// What clap cannot.
fn check(args: &PairsArgs) -> Result<(), EvalError> {
    let wrong = |flag, expected: &str, found: String| EvalError::Flag {
        flag,
        expected: expected.to_owned(),
        found,
    };
    let share = args.hold_out_share;
    if !(share > 0.0 && share < 1.0) {
        let expected = "a number between 0 and 1";
        return Err(wrong("hold-out-share", expected, share.to_string()));
    }
    if !(1..=ANSWERS_MAX).contains(&args.answers) {
        let expected = format!("1 to {ANSWERS_MAX}");
        return Err(wrong("answers", &expected, args.answers.to_string()));
    }
    for (flag, value) in [("limit", args.limit), ("pairs-max", args.pairs_max)] {
        if value == Some(0) {
            return Err(wrong(flag, "at least 1", "0".to_owned()));
        }
    }
    Ok(())
}

/// Prompts to answer and to keep; each text once.
fn asked(args: &PairsArgs) -> Result<Asked, EvalError> {
    let mut read = prompts::read(&args.prompts)?;
    if let Some(limit) = args.limit {
        read = prompts::sample(read, limit, args.seed);
    }
    let mut asked = Asked::default();
    let mut seen = HashSet::new();
    for prompt in read {
        let Some(side) = Side::of(&prompt.class) else {
            asked.unlabelled += 1;
            continue;
        };
        if !seen.insert(prompt.text.clone()) {
            asked.repeated += 1;
        } else if args.hold_out.is_some() && is_held_out(&prompt, args.hold_out_share, args.seed) {
            asked.held_out.push(prompt);
        } else {
            match side {
                Side::Harmful => asked.harmful.push(prompt),
                Side::Harmless => asked.harmless.push(prompt),
            }
        }
    }
    if asked.harmful.is_empty() && asked.harmless.is_empty() {
        return Err(EvalError::Nothing {
            flag: "prompts",
            file: args.prompts.first().cloned().unwrap_or_default(),
            expected: "prompts with a class".to_owned(),
        });
    }
    Ok(asked)
}

fn pairs(
    args: &PairsArgs,
    running: Running,
    rounds: &[Round<'_>],
    pairing: &Pairing<'_>,
) -> Result<Pairs, CliError> {
    let defaults = &running.model.defaults;
    let drawing = Drawing {
        sampling: SamplingParams {
            temperature: args.temperature.unwrap_or(defaults.temperature),
            top_k: defaults.top_k,
            top_p: defaults.top_p,
            min_p: defaults.min_p,
            repetition_penalty: defaults.repetition_penalty,
            max_tokens: args.max_tokens,
            ..SamplingParams::default()
        },
        // Answers of other seeds are other answers.
        seeds: (0..args.answers)
            .map(|draw| args.seed.wrapping_add(draw))
            .collect(),
    };
    let contenders: Vec<Vec<Contender>> = rounds
        .iter()
        .map(|round| round.voices.iter().map(Voice::contender).collect())
        .collect();
    let asked: Vec<(&[Contender], &[Prompt])> = contenders
        .iter()
        .zip(rounds)
        .map(|(contenders, round)| (contenders.as_slice(), round.prompts))
        .collect();
    let answers = answer_all(running, &asked, &drawing)?;
    let mut pairs = Pairs::default();
    for (round, answers) in rounds.iter().zip(&answers) {
        pairs.add(round.prompts, &round.voices, answers, pairing);
    }
    pairs.shuffle(args.seed);
    Ok(pairs)
}

/// As `midpo eval` reads them; `part` is what it calls a set.
fn held_out(prompts: &[Prompt]) -> String {
    let lines = prompts.iter().map(|prompt| {
        let (set, class) = (&prompt.set, prompt.class.as_str());
        json!({ "id": prompt.id, "part": set, "class": class, "prompt": prompt.text })
    });
    lines.map(|line| format!("{line}\n")).collect()
}

fn write(file: &Path, text: &str) -> Result<(), EvalError> {
    let flag = "output";
    let mut part = file.as_os_str().to_owned();
    part.push(".part");
    let written = fs::write(&part, text).and_then(|()| fs::rename(&part, file));
    written.map_err(|source| EvalError::Io {
        flag,
        file: file.to_owned(),
        source,
    })
}

/// What was asked, what became of the answers, and which pairs they make.
fn summary(args: &PairsArgs, asked: &Asked, pairs: &Pairs) -> String {
    let mut text = format!(
        "{} harmful and {} harmless prompts answered; {} held out, {} without a class and {} repeated left out\n",
        asked.harmful.len(),
        asked.harmless.len(),
        asked.held_out.len(),
        asked.unlabelled,
        asked.repeated
    );
    // Writing to a string cannot fail.
    for (voice, kept) in &pairs.voices {
        let _ = write!(text, "  answers of {voice}: {} used", kept.used);
        for (reason, count) in &kept.dropped {
            let _ = write!(text, "; {count} left out, {reason}");
        }
        text.push('\n');
    }
    let _ = writeln!(
        text,
        "{} pairs in {}",
        pairs.lines.len(),
        args.output.display()
    );
    for (kind, count) in &pairs.kinds {
        let _ = writeln!(text, "  {kind}: {count}");
    }
    text
}
