//! `midpo demo judge`: what each variant answers to held-out prompts, judged by what the corpus knows.

use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::ask::{Answer, Answerer, Drawing};
use super::say;
use super::table::{Row, markdown};
use crate::cli::CliError;
use crate::config::ModelSource;
use crate::demo::corpus::{Corpus, HeldOutPrompt, Sizes, held_out_of};
use crate::demo::judge::Judge;
use crate::types::Variant;

/// The flags.
#[derive(Clone, Debug, Args)]
pub(super) struct JudgeArgs {
    /// Model that `midpo demo build` has made; by default the embedded one.
    #[arg(long, value_name = "DIR")]
    pub(super) model: Option<PathBuf>,
    /// The base alone, for `--dpo` and `--router`.
    #[arg(long, value_name = "DIR", requires = "model")]
    pub(super) base: Option<PathBuf>,
    /// A LoRA to judge beside it, alone on the base: plain DPO's.
    #[arg(long, value_name = "DIR", requires = "base")]
    pub(super) dpo: Option<PathBuf>,
    /// A further router to judge, with the model's experts. Repeatable.
    #[arg(long, value_name = "DIR", requires = "base")]
    pub(super) router: Vec<PathBuf>,
    /// `held_out.jsonl` of `midpo demo corpus`; by default drawn anew, as with seed 1.
    #[arg(long, value_name = "FILE")]
    pub(super) prompts: Option<PathBuf>,
    /// One answer a prompt and seed.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 2, 3])]
    pub(super) seeds: Vec<u64>,
    /// 0: greedy.
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    pub(super) temperature: f32,
    /// Longest answer.
    #[arg(long, value_name = "TOKENS", default_value_t = 96)]
    pub(super) max_tokens: u32,
    /// Threads; 0: all cores.
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<usize>,
    /// Write every answer with its verdict here, as JSONL.
    #[arg(long, value_name = "FILE")]
    pub(super) answers: Option<PathBuf>,
    /// Write the tables here too.
    #[arg(long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,
}

/// A line of `--answers`.
#[derive(Serialize)]
struct AnswerRow<'a> {
    variant: &'a str,
    seed: u64,
    #[serde(flatten)]
    asked: &'a HeldOutPrompt,
    answer: &'a str,
    verdict: String,
    /// At the last prompt token, mean over layers.
    safety_gate: Option<f32>,
    /// At the last prompt token, mean over layers.
    helpfulness_gate: Option<f32>,
}

/// What is judged.
struct Session<'a> {
    args: &'a JudgeArgs,
    judge: Judge,
    prompts: Vec<HeldOutPrompt>,
    answers: Option<(BufWriter<File>, &'a Path)>,
}

/// Runs it.
///
/// # Errors
/// A model or a file that cannot be read or written.
pub(super) fn run(args: &JudgeArgs) -> Result<(), CliError> {
    let prompts = match &args.prompts {
        Some(file) => read(file)?,
        None => held_out_of(&Corpus::new()?, 1, &Sizes::default()),
    };
    let answers = match args.answers.as_deref() {
        Some(file) => {
            let created = File::create(file).map_err(CliError::io(file.display().to_string()))?;
            Some((BufWriter::new(created), file))
        }
        None => None,
    };
    let mut session = Session {
        args,
        judge: Judge::new()?,
        prompts,
        answers,
    };
    let rows = session.rows()?;
    if let Some((writer, file)) = &mut session.answers {
        let flushed = writer.flush();
        flushed.map_err(CliError::io(file.display().to_string()))?;
    }
    let tables = markdown(&rows, args.seeds.len());
    if let Some(file) = &args.output {
        std::fs::write(file, &tables).map_err(CliError::io(file.display().to_string()))?;
    }
    say(&tables)
}

impl<'a> Session<'a> {
    fn rows(&mut self) -> Result<Vec<Row>, CliError> {
        let args: &'a JudgeArgs = self.args;
        let model = ModelSource {
            model: args.model.clone(),
            ..ModelSource::default()
        };
        let variants = [
            Variant::Base,
            Variant::Safety,
            Variant::Helpfulness,
            Variant::Both,
            Variant::Routed,
        ];
        let named = variants.map(|variant| (variant, variant.as_str().to_owned()));
        let mut rows = self.judged(&model, &named)?;
        let packed = args.model.clone();
        let parts = |expert: &dyn Fn(&str) -> Option<PathBuf>, router| ModelSource {
            model: args.base.clone(),
            experts: None,
            safety: expert("safety"),
            helpfulness: expert("helpfulness"),
            router,
        };
        if let Some(dpo) = &args.dpo {
            // Alone on the base, as the only open expert of two; no gate asks the router.
            let source = parts(&|_| Some(dpo.clone()), packed.clone());
            let row = self.judged(&source, &[(Variant::Safety, "plain DPO".to_owned())])?;
            rows.splice(1..1, row);
        }
        for router in &args.router {
            let expert = |name: &str| packed.as_ref().map(|model| model.join(name));
            let source = parts(&expert, Some(router.clone()));
            let name = router.file_name().unwrap_or(router.as_os_str());
            let name = format!("routed by {}", name.display());
            rows.extend(self.judged(&source, &[(Variant::Routed, name)])?);
        }
        Ok(rows)
    }

    fn judged(
        &mut self,
        source: &ModelSource,
        variants: &[(Variant, String)],
    ) -> Result<Vec<Row>, CliError> {
        let answerer = Answerer::start(source, self.args.threads)?;
        let mut rows = Vec::new();
        for (variant, name) in variants {
            let mut row = Row::new(name.as_str());
            for seed in &self.args.seeds {
                let drawing = Drawing {
                    variant: *variant,
                    temperature: self.args.temperature,
                    max_tokens: self.args.max_tokens,
                    seed: *seed,
                };
                let prompts = self.prompts.iter().map(|asked| asked.prompt.as_str());
                let answers = answerer.answers(prompts, &drawing)?;
                self.count(&mut row, (name, *seed), &answers)?;
            }
            rows.push(row);
        }
        answerer.stop();
        Ok(rows)
    }

    fn count(
        &mut self,
        row: &mut Row,
        (variant, seed): (&str, u64),
        answers: &[Answer],
    ) -> Result<(), CliError> {
        for (asked, answer) in self.prompts.iter().zip(answers) {
            let verdict = self.judge.judge(asked, &answer.text, answer.finish);
            row.count((asked.part, asked.kind), verdict, answer.gates);
            let Some((writer, file)) = &mut self.answers else {
                continue;
            };
            let line = AnswerRow {
                variant,
                seed,
                asked,
                answer: &answer.text,
                verdict: format!("{verdict:?}"),
                safety_gate: answer.gates.map(|(safety, _)| safety),
                helpfulness_gate: answer.gates.map(|(_, helpfulness)| helpfulness),
            };
            serde_json::to_writer(&mut *writer, &line)
                .map_err(std::io::Error::from)
                .and_then(|()| writer.write_all(b"\n"))
                .map_err(CliError::io(file.display().to_string()))?;
        }
        Ok(())
    }
}

fn read(file: &Path) -> Result<Vec<HeldOutPrompt>, CliError> {
    let failed = || CliError::io(file.display().to_string());
    let lines = BufReader::new(File::open(file).map_err(failed())?).lines();
    let parsed = lines.map(|line| {
        let line = line.map_err(failed())?;
        serde_json::from_str(&line)
            .map_err(std::io::Error::from)
            .map_err(failed())
    });
    parsed.collect()
}
