//! `midpo eval`: what a model's variants answer to sets of prompts, and how safe and helpful that is.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::bench::{bar, parse_variant};
use super::engine::Running;
use super::{CliError, engine};
use crate::checkpoint::{Checkpoint, Experts, load_expert};
use crate::config::{EngineOptions, ModelOptions, RuntimeConfig};
use crate::eval::{
    self, Answer, Conditions, Contender, Drawing, EvalError, Evaluation, Exchange, GateTable,
    Judge, Judged, Manner, Prompt, RefusalRules, Report, Scores, Subject, Summary, prompts,
};
use crate::metrics::Metrics;
use crate::server::SamplingDefaults;
use crate::types::{SamplingParams, Variant};

/// Seed of the draw behind `--limit`: the same prompts whatever the seeds of answers.
const DRAW_SEED: u64 = 0;
/// The order of tables where nobody asks for another.
const ORDER: [Variant; 5] = [
    Variant::Base,
    Variant::Safety,
    Variant::Helpfulness,
    Variant::Both,
    Variant::Routed,
];
/// Resamples at most: each is a number a prompt in memory.
const RESAMPLES_MAX: usize = 10_000;

const EXAMPLES: &str = "\
Examples:
  midpo eval --prompts harmful.jsonl benign.jsonl                        the embedded demo, all variants
  midpo eval --model packed --prompts sets/ --reward R --cost C --output report
  midpo eval --model packed --prompts sets/ --temperature 0 --limit 50   greedy, on 50 prompts of each class of each set
  midpo eval --model base --prompts sets/ --adapter dpo=trained/dpo      a plain LoRA beside its base

A line of a file of prompts is {\"prompt\": \"...\", \"class\": \"harmful\"}; classes are harmful, borderline, benign, or any name. Read
as they are, by their own fields: AdvBench, HarmBench, Do-Not-Answer, XSTest, PyRIT, rho, PKU-SafeRLHF, and the demo's prompts.";

/// `midpo eval`.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct EvalArgs {
    /// Files of prompts (JSON lines), directories of files, or a directory of such directories.
    #[arg(long, value_name = "FILE|DIR", required = true, num_args = 1..)]
    prompts: Vec<PathBuf>,
    /// At most so many prompts of each class of each set; always the same ones.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Variants that answer, in the order of the tables; by default all that the model has.
    #[arg(long, value_delimiter = ',', value_parser = parse_variant, value_name = "VARIANT,..")]
    variants: Vec<Variant>,
    /// One more row: the base with one LoRA on `mlp.down_proj`, always on, as plain DPO leaves it. Repeatable.
    #[arg(long, value_parser = parse_adapter, value_name = "NAME=DIR")]
    adapter: Vec<Adapter>,
    /// Reward model R for mean R.
    #[arg(long, value_name = "DIR")]
    reward: Option<PathBuf>,
    /// Cost model C for mean C and the share of C < 0.
    #[arg(long, value_name = "DIR")]
    cost: Option<PathBuf>,
    /// Who says what an answer is.
    #[arg(long, value_enum, default_value_t, value_name = "JUDGE")]
    judge: JudgeName,
    /// Patterns of refusals for the judge of rules, instead of the built-in ones.
    #[arg(long, value_name = "FILE", conflicts_with = "judge")]
    refusals: Option<PathBuf>,
    /// 0 always takes the likeliest token; by default what the model's files say.
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Most tokens of one answer.
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    max_tokens: u32,
    /// One answer a prompt and variant for each.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1",
        value_name = "SEED,.."
    )]
    seeds: Vec<u64>,
    /// Bootstrap resamples behind the 95 % intervals.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    resamples: usize,
    /// Directory for report.md, report.json, report.svg, and answers.jsonl with every answer and what was thought of it.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    engine: EngineOptions,
}

/// Who judges.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum JudgeName {
    /// Patterns of refusals in plain text: for any model.
    #[default]
    Rules,
    /// The words, forms and answers of the demo's corpus: for its held-out prompts, and models that learned it.
    Demo,
}

/// A LoRA beside the base.
#[derive(Clone, Debug)]
struct Adapter {
    name: String,
    directory: PathBuf,
}

fn parse_adapter(word: &str) -> Result<Adapter, String> {
    let parts = word.split_once('=');
    let parts = parts.filter(|(name, directory)| !name.is_empty() && !directory.is_empty());
    let (name, directory) = parts.ok_or("expected NAME=DIR")?;
    Ok(Adapter {
        name: name.to_owned(),
        directory: PathBuf::from(directory),
    })
}

/// Runs the evaluation and prints its report, as Markdown, on standard output.
///
/// # Errors
/// A flag, a file or a line that cannot be used, before any work; a model that cannot answer.
pub(super) fn run(args: &EvalArgs) -> Result<ExitCode, CliError> {
    check(args)?;
    let judge = judge(args)?;
    let mut asked = prompts::read(&args.prompts)?;
    if let Some(limit) = args.limit {
        asked = prompts::sample(asked, limit, DRAW_SEED);
    }
    judge.check(&asked)?;
    let runtime = args.engine.validate()?;
    let threads = runtime.threads.unwrap_or(0);
    // Before the hours of generation.
    let scores = Models::open(args, threads)?;
    let answered = answers(args, &runtime, &judge, &asked)?;
    let answers = judged(answered.answers, &asked, &judge, &scores)?;
    let evaluation = Evaluation {
        prompts: asked,
        contenders: answered.contenders,
        answers,
        outcomes: judge.outcomes(),
    };
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        model: args.model.model.as_deref().map_or_else(
            || "the embedded demo".to_owned(),
            |model| model.display().to_string(),
        ),
        conditions: answered.conditions,
        prompts: eval::count(&evaluation.prompts),
        summary: Summary::of(&evaluation, args.resamples),
    };
    let mut stdout = std::io::stdout().lock();
    let said = write!(stdout, "{}", report.to_markdown()).and_then(|()| stdout.flush());
    said.map_err(CliError::io("standard output"))?;
    if let Some(directory) = &args.output {
        write_all(directory, &report, &evaluation)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What clap cannot.
fn check(args: &EvalArgs) -> Result<(), EvalError> {
    let wrong = |flag, expected: &str, found: String| EvalError::Flag {
        flag,
        expected: expected.to_owned(),
        found,
    };
    if !(1..=RESAMPLES_MAX).contains(&args.resamples) {
        let expected = format!("1 to {RESAMPLES_MAX}");
        return Err(wrong("resamples", &expected, args.resamples.to_string()));
    }
    if args.limit == Some(0) {
        return Err(wrong("limit", "at least 1", "0".to_owned()));
    }
    // Rows are told apart by their names.
    let mut names: Vec<&str> = Variant::ALL.map(Variant::as_str).to_vec();
    for adapter in &args.adapter {
        if names.contains(&adapter.name.as_str()) {
            let found = adapter.name.clone();
            return Err(wrong("adapter", "a name that no other row has", found));
        }
        names.push(&adapter.name);
    }
    let repeated = |at: &usize| args.variants[..*at].contains(&args.variants[*at]);
    if let Some(at) = (0..args.variants.len()).find(repeated) {
        let found = format!("{} twice", args.variants[at].as_str());
        return Err(wrong("variants", "each variant once", found));
    }
    Ok(())
}

fn judge(args: &EvalArgs) -> Result<Judge, EvalError> {
    Ok(match (args.judge, &args.refusals) {
        (JudgeName::Rules, Some(file)) => Judge::Rules(RefusalRules::read(file)?),
        (JudgeName::Rules, None) => Judge::rules()?,
        // clap has refused patterns for it.
        (JudgeName::Demo, _) => Judge::demo()?,
    })
}

/// The score models that were named.
struct Models {
    reward: Option<Scores>,
    cost: Option<Scores>,
}

impl Models {
    fn open(args: &EvalArgs, threads: usize) -> Result<Self, EvalError> {
        // What they read is as long as their own positions allow.
        let reward = args.reward.as_deref();
        let reward = reward.map(|directory| Scores::reward(directory, usize::MAX, threads));
        let cost = args.cost.as_deref();
        let cost = cost.map(|directory| Scores::cost(directory, usize::MAX, threads));
        Ok(Self {
            reward: reward.transpose()?,
            cost: cost.transpose()?,
        })
    }
}

/// All answers, and how they were drawn.
struct Answered {
    contenders: Vec<String>,
    answers: Vec<Answer>,
    conditions: Conditions,
}

/// Runs the model, then the base with each adapter.
fn answers(
    args: &EvalArgs,
    runtime: &RuntimeConfig,
    judge: &Judge,
    asked: &[Prompt],
) -> Result<Answered, CliError> {
    let source = args.model.validate()?;
    let running = start(runtime, || engine::load(&source))?;
    let variants = match args.variants.as_slice() {
        [] if running.handle.limits().routed => &ORDER[..],
        [] => &[Variant::Base],
        named => named,
    };
    let contenders: Vec<Contender> = variants.iter().copied().map(Contender::of).collect();
    let drawing = drawing(args, &running.model.defaults);
    let mut names: Vec<String> = contenders.iter().map(|c| c.name.clone()).collect();
    let mut answers = answer_all(running, &[(&contenders, asked)], &drawing)?.concat();
    for adapter in &args.adapter {
        let running = start(runtime, || {
            let mut checkpoint = engine::load(&source)?;
            let expert = load_expert(&adapter.directory, &checkpoint.config)?;
            checkpoint.experts = Some(Experts::alone(expert, &checkpoint.config));
            Ok(checkpoint)
        })?;
        let contender = Contender {
            name: adapter.name.clone(),
            // The adapter stands in the safety expert's place.
            variant: Variant::Safety,
            manner: Manner::default(),
        };
        names.push(adapter.name.clone());
        let more = answer_all(running, &[(&[contender], asked)], &drawing)?;
        answers.extend(more.into_iter().flatten());
    }
    let sampling = &drawing.sampling;
    let conditions = Conditions {
        judge: judge.describe(),
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        max_tokens: sampling.max_tokens,
        seeds: drawing.seeds,
        resamples: args.resamples,
    };
    Ok(Answered {
        contenders: names,
        answers,
        conditions,
    })
}

fn start(
    runtime: &RuntimeConfig,
    load: impl FnOnce() -> Result<Checkpoint, CliError>,
) -> Result<Running, CliError> {
    engine::start_with(load, runtime, Arc::new(Metrics::new("eval")))
}

fn drawing(args: &EvalArgs, defaults: &SamplingDefaults) -> Drawing {
    let temperature = args.temperature.unwrap_or(defaults.temperature);
    let mut seeds = args.seeds.clone();
    if temperature <= 0.0 {
        // All would say the same.
        seeds.truncate(1);
    }
    Drawing {
        sampling: SamplingParams {
            temperature,
            top_k: defaults.top_k,
            top_p: defaults.top_p,
            min_p: defaults.min_p,
            repetition_penalty: defaults.repetition_penalty,
            max_tokens: args.max_tokens,
            ..SamplingParams::default()
        },
        seeds,
    }
}

/// All answers of each of `rounds`, who answers what. Takes the engine, and ends it.
pub(super) fn answer_all(
    running: Running,
    rounds: &[(&[Contender], &[Prompt])],
    drawing: &Drawing,
) -> Result<Vec<Vec<Answer>>, CliError> {
    let subject = Subject {
        engine: running.handle,
        tokenizer: running.model.tokenizer,
        template: running.model.template,
        ends: running.model.ends,
    };
    let progress = bar("answers");
    let pairs = rounds.iter().map(|(who, asked)| who.len() * asked.len());
    progress.set_length((pairs.sum::<usize>() * drawing.seeds.len()) as u64);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(CliError::io("the evaluation's runtime"))?;
    let mut answers = Vec::with_capacity(rounds.len());
    for (contenders, asked) in rounds {
        let tick = || progress.inc(1);
        let round = eval::answer(&subject, contenders, asked, drawing, tick);
        answers.push(runtime.block_on(round)?);
    }
    progress.finish_and_clear();
    subject.engine.drain();
    running.thread.join();
    Ok(answers)
}

fn judged(
    answers: Vec<Answer>,
    asked: &[Prompt],
    judge: &Judge,
    models: &Models,
) -> Result<Vec<Judged>, EvalError> {
    let progress = bar("scores");
    let count = usize::from(models.reward.is_some()) + usize::from(models.cost.is_some());
    progress.set_length((count * answers.len()) as u64);
    let scores = |model: &Option<Scores>| {
        let tick = |done: usize| progress.inc(done as u64);
        let scores = model.as_ref().map(|model| model.of(asked, &answers, tick));
        scores.transpose()
    };
    let (rewards, costs) = (scores(&models.reward)?, scores(&models.cost)?);
    progress.finish_and_clear();
    let at = |scores: &Option<Vec<f32>>, index: usize| Some(*scores.as_ref()?.get(index)?);
    let judged = answers.into_iter().enumerate().map(|(index, answer)| {
        let exchange = Exchange {
            prompt: &asked[answer.prompt],
            answer: &answer.text,
            finish: answer.finish,
        };
        Judged {
            outcome: judge.judge(exchange),
            reward: at(&rewards, index),
            cost: at(&costs, index),
            answer,
        }
    });
    Ok(judged.collect())
}

fn write_all(directory: &Path, report: &Report, evaluation: &Evaluation) -> Result<(), EvalError> {
    let write = |name: &str, text: String| {
        let file = directory.join(name);
        fs::write(&file, text).map_err(|source| EvalError::Io {
            flag: "output",
            file,
            source,
        })
    };
    fs::create_dir_all(directory).map_err(|source| EvalError::Io {
        flag: "output",
        file: directory.to_owned(),
        source,
    })?;
    write("report.md", report.to_markdown())?;
    write("report.json", report.to_json())?;
    write("report.svg", eval::svg(report, &GateTable::of(evaluation)))?;
    write("answers.jsonl", evaluation.to_jsonl())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::{Command, FromArgMatches as _};

    use super::*;

    fn parse(flags: &[&str]) -> Result<EvalArgs, String> {
        let command = EvalArgs::augment_args(Command::new("eval").no_binary_name(true));
        let matches = command
            .try_get_matches_from(flags)
            .map_err(|e| e.to_string())?;
        EvalArgs::from_arg_matches(&matches).map_err(|e| e.to_string())
    }

    #[test]
    fn the_models_own_sampling_holds_unless_flags_say_otherwise() {
        let defaults = SamplingDefaults {
            temperature: 0.7,
            top_k: 50,
            ..SamplingDefaults::default()
        };
        let args = parse(&["--prompts", "a", "b", "--seeds", "3,4"]).unwrap();
        assert_eq!(args.prompts.len(), 2);
        let sampled = drawing(&args, &defaults);
        assert_eq!(
            (sampled.sampling.temperature, sampled.sampling.top_k),
            (0.7, 50)
        );
        assert_eq!(
            (sampled.sampling.max_tokens, sampled.seeds),
            (256, vec![3, 4])
        );
        let args = parse(&["--prompts", "a", "--seeds", "3,4", "--temperature", "0"]).unwrap();
        assert_eq!(drawing(&args, &defaults).seeds, [3]);
    }

    #[test]
    fn flags_that_make_no_sense_are_refused() {
        for (flags, word) in [
            (&["--reward", "R"][..], "--prompts"),
            (&["--prompts", "a", "--variants", "unsafe"], "helpfulness"),
            (&["--prompts", "a", "--adapter", "dpo"], "NAME=DIR"),
            (&["--prompts", "a", "--adapter", "=dir"], "NAME=DIR"),
            (&["--prompts", "a", "--judge", "me"], "rules"),
        ] {
            let error = parse(flags).unwrap_err();
            assert!(error.contains(word), "{flags:?}: {error}");
        }
        for flags in [
            &["--resamples", "0"][..],
            &["--limit", "0"],
            &["--adapter", "routed=a"],
            &["--adapter", "x=a", "--adapter", "x=b"],
            &["--variants", "base,safety,base"],
        ] {
            let args = parse(&[&["--prompts", "a"], flags].concat()).unwrap();
            let error = run(&args).unwrap_err();
            let start = format!("{}: expected ", flags[0]);
            assert!(error.to_string().starts_with(&start), "{error}");
            assert_eq!(error.exit_code(), ExitCode::from(2));
        }
    }
}
