//! What the bench of the bare engine is asked to do.

use std::path::PathBuf;

use clap::Args;

use super::model::Shape;
use crate::backend::{KvFormat, WeightFormat};
use crate::bench::BenchError;
use crate::cli::engine::weight_format;
use crate::config::{Device, WeightDType};
use crate::model::ModelOptions;
use crate::types::BLOCK_TOKENS;

/// Batches in which variants are mixed: the first always, the others up to the largest batch asked for.
const MIXED_BATCHES: [usize; 2] = [5, 32];

/// Flags of the bare engine's bench.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Bare engine")]
pub struct EngineArgs {
    /// Measure the bare engine in this process: no HTTP, no sampling. A model without experts gets random ones, since their
    /// speed does not depend on their values.
    #[arg(long)]
    pub(super) engine: bool,
    /// Where it runs, as `serve --device`.
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "DEVICE",
        requires = "engine"
    )]
    pub(super) device: Device,
    /// A model of these sizes with random weights, instead of --model: how fast it would be.
    #[arg(long, value_enum, value_name = "SIZES", requires = "engine", conflicts_with_all = ["experts", "safety", "helpfulness", "router", "with_server"])]
    pub(super) shape: Option<Shape>,
    /// Directory of both experts and the router, instead of the three flags below.
    #[arg(long, value_name = "DIR", requires = "engine")]
    pub(super) experts: Option<PathBuf>,
    /// PEFT directory of the safety expert.
    #[arg(long, value_name = "DIR", requires = "engine")]
    pub(super) safety: Option<PathBuf>,
    /// PEFT directory of the helpfulness expert.
    #[arg(long, value_name = "DIR", requires = "engine")]
    pub(super) helpfulness: Option<PathBuf>,
    /// The router: a file or a directory.
    #[arg(long, value_name = "FILE|DIR", requires = "engine")]
    pub(super) router: Option<PathBuf>,
    /// Format of weights in memory, as `serve --dtype`.
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "TYPE",
        requires = "engine"
    )]
    pub(super) dtype: WeightDType,
    /// Sequences of a decode step.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,4,8,16,32",
        value_name = "N,.."
    )]
    batch: Vec<usize>,
    /// Prompt lengths to prefill; those beyond the model's context are left out.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "128,512,2048",
        value_name = "TOKENS,.."
    )]
    prefill: Vec<usize>,
    /// Contexts at which one sequence decodes; those beyond the model's are left out.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "512,1024,2048,4096,8192",
        value_name = "TOKENS,.."
    )]
    context: Vec<usize>,
    /// Positions before a batched decode step.
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    decode_context: usize,
    /// Steps of one decode measurement.
    #[arg(long, default_value_t = 16, value_name = "N")]
    steps: usize,
    /// Repeats of each measurement, turn by turn with what it is compared to.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub(super) repeats: usize,
    /// Most rows of a step: longer prompts are computed in chunks.
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub(super) step_rows: usize,
    /// Threads; by default as many as the machine lets this process use.
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<usize>,
    /// Send the same streams through model, engine and an HTTP server in this process, too: as many at once as --concurrency
    /// says, of --prompt-tokens and --max-tokens.
    #[arg(long, requires = "engine")]
    pub(super) with_server: bool,
}

/// What the bench will do, bounded by the model's context.
pub(super) struct Plan {
    pub(super) batches: Vec<usize>,
    pub(super) prefills: Vec<usize>,
    pub(super) contexts: Vec<usize>,
    pub(super) decode_context: usize,
    pub(super) steps: usize,
    pub(super) repeats: usize,
    pub(super) rows: usize,
    pub(super) weight_format: WeightFormat,
}

impl Plan {
    pub(super) fn new(args: &EngineArgs, context_max: usize) -> Result<Self, BenchError> {
        for (flag, value) in [
            ("--steps", args.steps),
            ("--repeats", args.repeats),
            ("--step-rows", args.step_rows),
            ("--batch", args.batch.iter().copied().min().unwrap_or(0)),
        ] {
            if !(1..=1 << 16).contains(&value) {
                return Err(BenchError::Flag {
                    flag,
                    expected: "1 to 65536".to_owned(),
                    found: value.to_string(),
                });
            }
        }
        let steps = args.steps.min(context_max.saturating_sub(1)).max(1);
        let room = context_max.saturating_sub(steps);
        let fitting = |lengths: &[usize], most: usize| -> Vec<usize> {
            let mut fitting: Vec<usize> = lengths
                .iter()
                .copied()
                .filter(|n| (1..=most).contains(n))
                .collect();
            fitting.sort_unstable();
            fitting.dedup();
            fitting
        };
        Ok(Self {
            batches: fitting(&args.batch, 1 << 16),
            prefills: fitting(&args.prefill, context_max),
            contexts: fitting(&args.context, room),
            decode_context: args.decode_context.min(room),
            steps,
            repeats: args.repeats,
            rows: args.step_rows,
            weight_format: weight_format(args.dtype),
        })
    }

    pub(super) fn batch_max(&self) -> usize {
        let largest = self.batches.iter().copied().max().unwrap_or(1);
        largest.max(MIXED_BATCHES[0])
    }

    pub(super) fn mixed_batches(&self) -> impl Iterator<Item = usize> + use<> {
        let largest = self.batch_max();
        MIXED_BATCHES
            .into_iter()
            .filter(move |batch| *batch <= largest)
    }

    /// Positions of the longest sequence.
    pub(super) fn positions(&self) -> usize {
        let contexts = self.contexts.iter().map(|context| context + self.steps);
        let all = contexts.chain(self.prefills.iter().copied());
        all.chain([self.decode_context + self.steps])
            .max()
            .unwrap_or(1)
    }

    pub(super) fn model_options(&self) -> ModelOptions {
        let batched = self.decode_context + self.steps;
        let blocks = self.batch_max() * batched.div_ceil(BLOCK_TOKENS);
        ModelOptions {
            rows: self.rows.max(self.batch_max()),
            logit_rows: self.batch_max(),
            sequences: self.batch_max(),
            positions: self.positions(),
            kv_blocks: blocks.max(self.positions().div_ceil(BLOCK_TOKENS)),
            kv_format: KvFormat::BF16,
            weight_format: self.weight_format,
        }
    }
}
