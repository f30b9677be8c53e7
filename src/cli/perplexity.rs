//! `midpo perplexity`: what a format, a variant or an expert costs, told by a text.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::bench::bar;
use super::engine::{self, kv_format, weight_format};
use super::{CliError, logging};
use crate::backend::cpu::{Cpu, CpuOptions};
use crate::checkpoint::Checkpoint;
use crate::config::{self, ConfigError, KvDType, LogOptions, VariantName, WeightDType};
use crate::eval::perplexity::{Distance, Perplexity, Reader, Windows};
use crate::model::RoutedLlama;
use crate::text::Tokenizer;
use crate::types::{TokenId, Variant};

/// Flags of `midpo perplexity`.
#[derive(Clone, Debug, Args)]
pub(super) struct PerplexityArgs {
    /// Text to foretell (UTF-8).
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Which model.
    #[command(flatten)]
    model: config::ModelOptions,
    /// Variant that foretells; a model without experts has `base` alone.
    #[arg(long, value_name = "VARIANT")]
    variant: Option<VariantName>,
    /// Format of weights in memory, as `serve --dtype`.
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    dtype: WeightDType,
    /// Format of K and V, as `serve --kv-dtype`; f32 leaves the weights' error alone.
    #[arg(long, value_enum, default_value = "f32", value_name = "TYPE")]
    kv_dtype: KvDType,
    /// Another format of the same model, with K and V in f32, to measure this one against: relative error of logits, divergence, equal
    /// first choices.
    #[arg(long, value_enum, value_name = "TYPE")]
    against: Option<WeightDType>,
    /// Tokens of a window; the second half of each counts. Windows lie side by side.
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    context: usize,
    /// Read this many windows at most.
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Threads of the CPU backend; by default as many as the machine lets this process use.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Also write the figures here, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What is logged.
    #[command(flatten)]
    log: LogOptions,
}

/// Measures and prints.
///
/// # Errors
/// A flag, the model's files, a text that is too short or not UTF-8.
pub(super) fn run(args: &PerplexityArgs) -> Result<ExitCode, CliError> {
    logging::start(&args.log)?;
    let checkpoint = engine::load(&args.model.validate()?)?;
    let variant = variant(args, &checkpoint)?;
    let text = std::fs::read_to_string(&args.text)
        .map_err(CliError::io(format!("--text {}", args.text.display())))?;
    let tokenizer = Tokenizer::new(&checkpoint.text.tokenizer_json)?;
    let tokens = tokenizer.encode(&text, false)?;
    let windows = windows(args, &checkpoint, &tokenizer, &tokens)?;
    let forms = Forms {
        subject: Form {
            dtype: args.dtype,
            kv: args.kv_dtype,
        },
        against: args.against.map(Form::of_weights),
        windows_max: args.windows.unwrap_or(usize::MAX),
        threads: args.threads,
    };
    let report = forms.measure(
        &args.text.display().to_string(),
        &checkpoint,
        variant,
        &windows,
    )?;
    write!(std::io::stdout(), "{}", report.markdown()).map_err(CliError::io("standard output"))?;
    if let Some(file) = &args.json {
        std::fs::write(file, format!("{:#}\n", report.json()))
            .map_err(CliError::io(format!("--json {}", file.display())))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn variant(args: &PerplexityArgs, checkpoint: &Checkpoint) -> Result<Variant, ConfigError> {
    let routed = checkpoint.experts.is_some();
    match args.variant.map(|name| name.0) {
        Some(variant) if !routed && variant != Variant::Base => Err(ConfigError::flag(
            "variant",
            "`base`: the model has no experts",
            variant.as_str(),
        )),
        Some(variant) => Ok(variant),
        None if routed => Ok(Variant::Routed),
        None => Ok(Variant::Base),
    }
}

fn windows<'a>(
    args: &PerplexityArgs,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    tokens: &'a [TokenId],
) -> Result<Windows<'a>, CliError> {
    let bos = tokenizer.encode("", true)?.first().copied();
    let most = checkpoint.config.max_position_embeddings - usize::from(bos.is_some());
    if !(2..=most).contains(&args.context) {
        let expected = format!("2 to {most}, what the model was made for");
        return Err(ConfigError::flag("context", expected, args.context).into());
    }
    let windows = Windows {
        tokens,
        context: args.context,
        bos,
    };
    if windows.count() == 0 {
        let expected = format!("a text of at least {} tokens (--context)", args.context);
        return Err(ConfigError::flag("text", expected, tokens.len()).into());
    }
    Ok(windows)
}

/// In which formats a model reads.
#[derive(Clone, Copy)]
pub(super) struct Form {
    dtype: WeightDType,
    kv: KvDType,
}

impl Form {
    /// Weights as `dtype` says, K and V exact.
    pub(super) fn of_weights(dtype: WeightDType) -> Self {
        Self {
            dtype,
            kv: KvDType::F32,
        }
    }

    fn name(self) -> String {
        let dtype = self.dtype.to_possible_value();
        let dtype = dtype.map_or_else(String::new, |value| value.get_name().to_owned());
        match self.kv {
            KvDType::F32 => dtype,
            kv => format!("{dtype}, K/V in {}", kv.as_str()),
        }
    }
}

/// Which forms of a model read.
pub(super) struct Forms {
    /// The one that is measured.
    pub subject: Form,
    /// What it is measured against.
    pub against: Option<Form>,
    /// Windows to read at most.
    pub windows_max: usize,
    /// Of the CPU backend.
    pub threads: Option<usize>,
}

impl Forms {
    /// Reads the windows of the text named `text`.
    ///
    /// # Errors
    /// A device without room, a failed step.
    pub(super) fn measure(
        &self,
        text: &str,
        checkpoint: &Checkpoint,
        variant: Variant,
        windows: &Windows<'_>,
    ) -> Result<Report, CliError> {
        let reader = |form: Form| -> Result<Reader<Cpu>, CliError> {
            let cpu = Cpu::new(CpuOptions {
                threads: self.threads,
                ..CpuOptions::default()
            })?;
            let options = windows.model_options(kv_format(form.kv), weight_format(form.dtype));
            let model = RoutedLlama::new(cpu, checkpoint, options)?;
            Ok(Reader::new(model, variant.gates()))
        };
        let mut subject = reader(self.subject)?;
        let mut reference = self.against.map(reader).transpose()?;
        let mut distance = Distance::default();
        let count = windows.count().min(self.windows_max);
        let progress = bar("windows");
        progress.set_length(count as u64);
        for index in 0..count {
            let row = subject.read(windows, index)?;
            if let Some(reference) = &mut reference {
                distance.add(reference.read(windows, index)?.logits, row);
            }
            progress.inc(1);
            progress.set_message(format!("perplexity {:.3}", subject.perplexity.value()));
        }
        progress.finish_and_clear();
        let reference = self.against.zip(reference);
        Ok(Report {
            text: text.to_owned(),
            variant,
            windows: count,
            context: windows.context,
            subject: (self.subject, subject.perplexity),
            reference: reference.map(|(form, read)| (form, read.perplexity, distance)),
        })
    }
}

/// Figures of one text.
pub(super) struct Report {
    text: String,
    variant: Variant,
    windows: usize,
    context: usize,
    subject: (Form, Perplexity),
    reference: Option<(Form, Perplexity, Distance)>,
}

impl Report {
    /// As tables.
    pub(super) fn markdown(&self) -> String {
        let (subject, perplexity) = self.subject;
        let mut text = format!(
            "{}: {} windows of {} tokens, {} tokens foretold by {}\n\n| weights | perplexity | standard error |\n| --- | --: | --: |\n",
            self.text,
            self.windows,
            self.context,
            perplexity.surprise.count(),
            self.variant.as_str(),
        );
        let row = |form: Form, perplexity: Perplexity| {
            let (value, error) = (perplexity.value(), perplexity.standard_error());
            format!("| {} | {value:.4} | {error:.4} |\n", form.name())
        };
        text.push_str(&row(subject, perplexity));
        let Some((against, reference, distance)) = &self.reference else {
            return text;
        };
        text.push_str(&row(*against, *reference));
        let Distance {
            relative_error,
            divergence,
            same_top,
        } = distance;
        text + &format!(
            "\n| {} against {} | |\n| --- | --: |\n| perplexity, ratio | {:.5} |\n| relative error of logits, mean | {:.2e} |\n\
             | relative error of logits, most | {:.2e} |\n| KL divergence, mean, nats | {:.2e} |\n| KL divergence, most, nats | {:.2e} |\n\
             | same most likely token | {:.2} % |\n",
            subject.name(),
            against.name(),
            perplexity.value() / reference.value(),
            relative_error.mean(),
            relative_error.most(),
            divergence.mean(),
            divergence.most(),
            100.0 * same_top.mean(),
        )
    }

    fn json(&self) -> serde_json::Value {
        let perplexity = |form: Form, perplexity: &Perplexity| {
            json!({
                "weights": form.dtype,
                "kv": form.kv,
                "perplexity": perplexity.value(),
                "standard_error": perplexity.standard_error(),
            })
        };
        json!({
            "text": self.text,
            "variant": self.variant.as_str(),
            "windows": self.windows,
            "context": self.context,
            "tokens": self.subject.1.surprise.count(),
            "subject": perplexity(self.subject.0, &self.subject.1),
            "reference": self.reference.as_ref().map(|(form, reference, distance)| json!({
                "model": perplexity(*form, reference),
                "perplexity_ratio": self.subject.1.value() / reference.value(),
                "logits_relative_error_mean": distance.relative_error.mean(),
                "logits_relative_error_max": distance.relative_error.most(),
                "kl_divergence_mean": distance.divergence.mean(),
                "kl_divergence_max": distance.divergence.most(),
                "same_top_share": distance.same_top.mean(),
            })),
        })
    }
}
