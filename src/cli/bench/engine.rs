//! `midpo bench --engine`: the bare engine on a device of this machine, each figure beside the roofline measured in the same run.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::bar;
use super::machine::Machine;
use super::model::random_experts;
use super::plan::{EngineArgs, Plan};
use super::server::{Streams, compare};
use super::steps::{Cost, Group, Steps};
use super::subject::Subject;
use crate::backend::cpu::CpuOptions;
use crate::backend::cuda::CudaOptions;
use crate::backend::{self, Backend, BackendError, DeviceBytes, UseBackends, WeightFormat};
use crate::bench::{
    EngineReport, MachineFacts, Measurement, ModelFacts, RatioRow, Spread, Work, ratios,
};
use crate::checkpoint::Checkpoint;
use crate::cli::{CliError, engine};
use crate::dtype::DType;
use crate::model::RoutedLlama;
use crate::types::{GateOverride, Variant};

/// Loads the model and measures it.
///
/// # Errors
/// A flag, a file of the model, a device that is not there or without room, a failed step.
pub(super) fn run(
    model: Option<&str>,
    streams: &Streams,
    args: &EngineArgs,
) -> Result<EngineReport, CliError> {
    let subject = Subject::new(model, args, streams.seed)?;
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or_else(all);
    let cpu = CpuOptions {
        threads: Some(threads),
        ..CpuOptions::default()
    };
    let measuring = Measuring {
        subject,
        threads,
        streams,
        args,
    };
    let choice = engine::device_choice(args.device);
    let cuda = CudaOptions {
        graphs: true,
        ..CudaOptions::default()
    };
    backend::open_each(choice, cpu, cuda, measuring)
        .map_err(|error| engine::no_device(args.device, error))?
}

/// What is to be measured, before the device is known.
struct Measuring<'a> {
    subject: Subject,
    threads: usize,
    streams: &'a Streams,
    args: &'a EngineArgs,
}

impl UseBackends for Measuring<'_> {
    type Output = Result<EngineReport, CliError>;

    fn run<B: Backend>(
        self,
        open: impl Fn() -> Result<B, BackendError>,
        memory: Option<DeviceBytes>,
    ) -> Self::Output {
        let machine = match memory {
            Some(_) => Machine::Gpu(backend::device_limits()?),
            None => Machine::Cpu {
                threads: self.threads,
            },
        };
        measure(self.subject, open, &machine, self.streams, self.args)
    }
}

/// Measures `subject` on backends that `backend` makes, on `machine`: one for the routed model and one for its base.
pub(super) fn measure<B: Backend>(
    subject: Subject,
    backend: impl Fn() -> Result<B, BackendError>,
    machine: &Machine,
    streams: &Streams,
    args: &EngineArgs,
) -> Result<EngineReport, CliError> {
    let context = subject.checkpoint.config.max_position_embeddings;
    let plan = Plan::new(args, context)?;
    let progress = bar("loading");
    let (mut bench, model, subject) = Bench::new(subject, &backend, machine, streams.seed, plan)?;
    bench.progress = progress.clone();
    bench.run()?;
    // The models go here: those behind the server need their room.
    let (machine, measurements, ratios) = (bench.machine, bench.measurements, bench.ratios);
    drop((bench.routed, bench.base));
    let streams = streams.clone().within(context);
    let server = match subject.served {
        Some(served) => compare(&subject.checkpoint, served, backend, &streams, &progress)?,
        None => Vec::new(),
    };
    progress.finish_and_clear();
    Ok(EngineReport {
        version: env!("CARGO_PKG_VERSION"),
        machine,
        model,
        measurements,
        ratios,
        server,
    })
}

/// Seconds of both sides of a comparison, measured next to each other.
type Pair = (f64, f64);

/// A bench under way.
struct Bench<B: Backend> {
    routed: Steps<B>,
    base: Steps<B>,
    /// Of the routed model and of its base.
    costs: [Cost; 2],
    plan: Plan,
    machine: MachineFacts,
    measurements: Vec<Measurement>,
    ratios: Vec<RatioRow>,
    progress: ProgressBar,
}

impl<B: Backend> Bench<B> {
    /// Both models and the limits of the machine. The subject comes back with the experts that the routed model has.
    fn new(
        mut subject: Subject,
        backend: &impl Fn() -> Result<B, BackendError>,
        machine: &Machine,
        seed: u64,
        plan: Plan,
    ) -> Result<(Self, ModelFacts, Subject), CliError> {
        let (begun, options) = (Instant::now(), plan.model_options());
        let rows = options.rows;
        let own = subject.checkpoint.experts.take();
        let origin = if own.is_some() { "its own" } else { "random" };
        let base = RoutedLlama::new(backend()?, &subject.checkpoint, options)?;
        let load_seconds = subject.read_seconds + begun.elapsed().as_secs_f64();
        let experts = own.unwrap_or_else(|| random_experts(&subject.checkpoint.config, seed));
        let width = experts.width();
        subject.checkpoint.experts = Some(experts);
        let routed = RoutedLlama::new(backend()?, &subject.checkpoint, options)?;
        let dtype = weight_dtype(&subject.checkpoint, plan.weight_format);
        let peak = match plan.weight_format {
            WeightFormat::F32 => "f32",
            _ => peak_of(dtype),
        };
        let machine = machine
            .facts(base.step_weight_bytes(), peak)
            .map_err(CliError::io("memory for the read rate"))?;
        let model = ModelFacts {
            name: subject.name.clone(),
            weight_format: dtype.as_str().to_owned(),
            weight_bytes: base.weight_bytes(),
            step_weight_bytes: base.step_weight_bytes(),
            kv_format: format!("{:?}", options.kv_format).to_lowercase(),
            experts: format!("{origin}, w = {width}"),
            step_rows: rows,
            load_seconds,
        };
        let config = &subject.checkpoint.config;
        let bench = Self {
            costs: [
                Cost::new(config, width, &routed, rows),
                Cost::new(config, 0, &base, rows),
            ],
            routed: Steps::new(routed, rows, seed),
            base: Steps::new(base, rows, seed),
            plan,
            machine,
            measurements: Vec::new(),
            ratios: Vec::new(),
            progress: ProgressBar::hidden(),
        };
        Ok((bench, model, subject))
    }

    fn run(&mut self) -> Result<(), BackendError> {
        let plan = &self.plan;
        let rounds = plan.batches.len()
            + plan.mixed_batches().count()
            + plan.prefills.len()
            + plan.contexts.len();
        self.progress.set_length(rounds as u64);
        self.fill_cache()?;
        for batch in self.plan.batches.clone() {
            self.decode(batch)?;
            self.progress.inc(1);
        }
        for batch in self.plan.mixed_batches() {
            self.mixed(batch)?;
            self.progress.inc(1);
        }
        for tokens in self.plan.prefills.clone() {
            self.prefill(tokens)?;
            self.progress.inc(1);
        }
        self.contexts()
    }

    /// `batch` sequences of one variant, with room for a batched decode.
    fn group(&self, batch: usize, gates: impl Fn(usize) -> GateOverride) -> Group {
        Group {
            gates: (0..batch).map(gates).collect(),
            positions: self.plan.decode_context + self.plan.steps,
        }
    }

    /// K and V of all sequences up to the context at which they decode, once for all batches.
    fn fill_cache(&mut self) -> Result<(), BackendError> {
        self.progress.set_message("filling the K/V cache");
        let group = self.group(self.plan.batch_max(), |_| Variant::Routed.gates());
        self.routed.prefill(&group, 0..self.plan.decode_context)?;
        self.base.prefill(&group, 0..self.plan.decode_context)?;
        Ok(())
    }

    fn decode(&mut self, batch: usize) -> Result<(), BackendError> {
        self.progress.set_message(format!("decode, batch {batch}"));
        let group = self.group(batch, |_| Variant::Routed.gates());
        let (at, steps) = (self.plan.decode_context, self.plan.steps);
        let mut turn = |bench: &mut Self| -> Result<Pair, BackendError> {
            let routed = bench.routed.decode(&group, at, steps)?;
            let base = bench.base.decode(&group, at, steps)?;
            Ok((per(routed, steps), per(base, steps)))
        };
        let pairs = self.turns(&mut turn)?;
        let middle = at as f64 + (steps - 1) as f64 / 2.0;
        let works = self.costs.map(|cost| cost.decode(batch, middle));
        self.record("decode", (batch, at), works, &pairs);
        self.graphs(batch, &group)
    }

    /// Steps that the device has recorded against the same steps kernel by kernel.
    fn graphs(&mut self, batch: usize, group: &Group) -> Result<(), BackendError> {
        if self.routed.recorded() == 0 {
            return Ok(());
        }
        let (at, steps) = (self.plan.decode_context, self.plan.steps);
        let mut turn = |bench: &mut Self| -> Result<Pair, BackendError> {
            bench.routed.set_replays(false);
            let launched = bench.routed.decode(group, at, steps);
            bench.routed.set_replays(true);
            let replayed = bench.routed.decode(group, at, steps)?;
            Ok((per(launched?, steps), per(replayed, steps)))
        };
        let pairs = self.turns(&mut turn)?;
        let what = "kernel by kernel / CUDA graphs, decode";
        self.ratios.push(ratio(what, batch, &pairs));
        Ok(())
    }

    /// All five variants in one batch against one variant in all of it.
    fn mixed(&mut self, batch: usize) -> Result<(), BackendError> {
        self.progress
            .set_message(format!("five variants in a batch of {batch}"));
        let one = self.group(batch, |_| Variant::Routed.gates());
        let all = Variant::ALL;
        let five = self.group(batch, |sequence| all[sequence % all.len()].gates());
        let (at, steps) = (self.plan.decode_context, self.plan.steps);
        let mut turn = |bench: &mut Self| -> Result<Pair, BackendError> {
            let mixed = bench.routed.decode(&five, at, steps)?;
            let routed = bench.routed.decode(&one, at, steps)?;
            Ok((per(mixed, steps), per(routed, steps)))
        };
        let pairs = self.turns(&mut turn)?;
        self.ratios.push(ratio(
            "five variants mixed / all routed, decode",
            batch,
            &pairs,
        ));
        Ok(())
    }

    fn prefill(&mut self, tokens: usize) -> Result<(), BackendError> {
        self.progress.set_message(format!("prefill {tokens}"));
        let group = Group {
            gates: vec![Variant::Routed.gates()],
            positions: tokens,
        };
        let mut turn = |bench: &mut Self| -> Result<Pair, BackendError> {
            let routed = bench.routed.prefill(&group, 0..tokens)?;
            let base = bench.base.prefill(&group, 0..tokens)?;
            Ok((routed.as_secs_f64(), base.as_secs_f64()))
        };
        let pairs = self.turns(&mut turn)?;
        let works = self.costs.map(|cost| cost.prefill(tokens));
        self.record(&format!("prefill {tokens}"), (1, 0), works, &pairs);
        Ok(())
    }

    /// One sequence that grows from context to context, decoding a few steps at each.
    fn contexts(&mut self) -> Result<(), BackendError> {
        let steps = self.plan.steps;
        let group = Group {
            gates: vec![Variant::Routed.gates()],
            positions: self.plan.positions(),
        };
        let mut filled = 0;
        for context in self.plan.contexts.clone() {
            self.progress.set_message(format!("context {context}"));
            self.routed.prefill(&group, filled..context)?;
            self.base.prefill(&group, filled..context)?;
            filled = context;
            let mut turn = |bench: &mut Self| -> Result<Pair, BackendError> {
                let routed = bench.routed.decode(&group, context, steps)?;
                let base = bench.base.decode(&group, context, steps)?;
                Ok((per(routed, steps), per(base, steps)))
            };
            let pairs = self.turns(&mut turn)?;
            let middle = context as f64 + (steps - 1) as f64 / 2.0;
            let works = self.costs.map(|cost| cost.decode(1, middle));
            self.record("decode, long context", (1, context), works, &pairs);
            self.progress.inc(1);
        }
        Ok(())
    }

    /// One turn that is not counted, then the repeats.
    fn turns(
        &mut self,
        turn: &mut dyn FnMut(&mut Self) -> Result<Pair, BackendError>,
    ) -> Result<Vec<Pair>, BackendError> {
        turn(self)?;
        (0..self.plan.repeats).map(|_| turn(self)).collect()
    }

    /// Both models' rows, and the ratio of the routed one to its base.
    fn record(&mut self, what: &str, place: (usize, usize), works: [Work; 2], pairs: &[Pair]) {
        let [routed, base] = works;
        let (above, below) = spreads(pairs);
        let row = |kind: &str, work, seconds| {
            let what = format!("{what}, {kind}");
            Measurement::new(&what, place, work, seconds, &self.machine)
        };
        let rows = [row("routed", routed, above), row("base", base, below)];
        self.measurements.extend(rows);
        self.ratios
            .push(ratio(&format!("routed / base, {what}"), place.0, pairs));
    }
}

fn per(time: Duration, steps: usize) -> f64 {
    time.as_secs_f64() / steps.max(1) as f64
}

fn spreads(pairs: &[Pair]) -> (Spread, Spread) {
    (
        Spread::of(pairs.iter().map(|pair| pair.0)),
        Spread::of(pairs.iter().map(|pair| pair.1)),
    )
}

fn ratio(what: &str, batch: usize, pairs: &[Pair]) -> RatioRow {
    let (above, below) = spreads(pairs);
    RatioRow {
        what: what.to_owned(),
        batch,
        above,
        below,
        ratio: ratios(pairs),
    }
}

/// Format of most matrices.
fn weight_dtype(checkpoint: &Checkpoint, format: WeightFormat) -> DType {
    let first = checkpoint.base.layers.first();
    let cols = checkpoint.config.hidden_size;
    first.map_or(DType::F32, |layer| {
        format.kept(layer.gate_proj.dtype(), cols)
    })
}

/// Which peak of arithmetic bounds matrices of a format: block formats are multiplied in int8.
fn peak_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F16 | DType::BF16 => "bf16",
        _ => "int8",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use clap::{Args as _, FromArgMatches as _};

    use super::super::model::{self, Shape};
    use super::*;
    use crate::backend::reference::Reference;
    use crate::checkpoint::{LlamaConfig, Sources, Verify, load};
    use crate::server::ServedModel;

    const CONTEXT: usize = 64;

    /// A plain Llama of random weights: d 16, m 24, 2 layers, 4 heads on 2.
    fn checkpoint() -> Checkpoint {
        let config = LlamaConfig {
            vocab_size: 40,
            hidden_size: 16,
            intermediate_size: 24,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 4,
            max_position_embeddings: CONTEXT,
            tie_word_embeddings: true,
            ..Shape::Llama7B.config()
        };
        model::checkpoint(config, 5)
    }

    fn args(flags: &[&str]) -> EngineArgs {
        let command = EngineArgs::augment_args(clap::Command::new("bench"));
        let words = ["bench", "--engine"].iter().chain(flags);
        let matches = command.try_get_matches_from(words).unwrap();
        EngineArgs::from_arg_matches(&matches).unwrap()
    }

    fn streams() -> Streams {
        Streams {
            counts: vec![1, 3],
            prompt_tokens: 20,
            output_tokens: 4,
            repeats: 2,
            step_rows: 16,
            seed: 1,
            weight_format: WeightFormat::Stored,
        }
    }

    fn subject(checkpoint: Checkpoint, served: Option<ServedModel>) -> Subject {
        Subject {
            name: "tiny".to_owned(),
            checkpoint,
            served,
            read_seconds: 0.0,
        }
    }

    #[test]
    fn measure_with_a_server_sends_the_same_streams_through_all_three() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-routed");
        let checkpoint = load(&Sources {
            safety: Some(fixtures.join("safety")),
            helpfulness: Some(fixtures.join("helpfulness")),
            router: Some(fixtures.join("router.pth")),
            model: fixtures,
            verify: Verify::default(),
        });
        let checkpoint = checkpoint.unwrap();
        let served = engine::served_model(&checkpoint).unwrap();
        let flags = [
            "--steps",
            "1",
            "--repeats",
            "1",
            "--batch",
            "1",
            "--prefill",
            "8",
            "--context",
            "8",
            "--decode-context",
            "4",
        ];
        let subject = subject(checkpoint, Some(served));
        let report = measure(
            subject,
            || Ok(Reference),
            &Machine::Cpu { threads: 1 },
            &streams(),
            &args(&flags),
        )
        .unwrap();
        assert_eq!(report.model.experts, "its own, w = 32");
        let counts: Vec<_> = report.server.iter().map(|row| row.streams).collect();
        assert_eq!(counts, [1, 3]);
        for row in &report.server {
            // The paper's template adds its words to the prompt.
            assert!(row.prompt_tokens > 20 && row.output_tokens == 4, "{row:?}");
            for figure in [row.model, row.engine, row.server, row.server_over_model] {
                assert!(figure.repeats == 2 && figure.min > 0.0, "{row:?}");
            }
        }
    }

    #[test]
    fn measure_reports_every_figure_that_fits_the_context() {
        let flags = [
            "--steps",
            "2",
            "--repeats",
            "3",
            "--decode-context",
            "8",
            "--step-rows",
            "7",
            "--batch",
            "4,1",
            "--prefill",
            "20,9999",
            "--context",
            "16,62,63",
        ];
        let subject = subject(checkpoint(), None);
        let report = measure(
            subject,
            || Ok(Reference),
            &Machine::Cpu { threads: 2 },
            &streams(),
            &args(&flags),
        )
        .unwrap();
        let found: Vec<_> = report
            .measurements
            .iter()
            .map(|row| (row.what.as_str(), row.batch, row.context))
            .collect();
        let want = [
            ("decode, routed", 1, 8),
            ("decode, base", 1, 8),
            ("decode, routed", 4, 8),
            ("decode, base", 4, 8),
            ("prefill 20, routed", 1, 0),
            ("prefill 20, base", 1, 0),
            ("decode, long context, routed", 1, 16),
            ("decode, long context, base", 1, 16),
            ("decode, long context, routed", 1, 62),
            ("decode, long context, base", 1, 62),
        ];
        assert_eq!(found, want);
        for row in &report.measurements {
            assert!(row.tokens_per_second.median > 0.0 && row.roof_tokens_per_second > 0.0);
            assert_eq!(row.seconds.repeats, 3);
        }
        let ratios: Vec<_> = report.ratios.iter().map(|row| row.batch).collect();
        assert_eq!(ratios, [1, 4, 5, 1, 1, 1]);
        assert_eq!(report.model.experts, "random, w = 32");
        assert!(
            report
                .to_markdown()
                .contains("| routed / base, decode | 4 |")
        );
    }

    #[test]
    fn cost_counts_the_weights_once_a_step_and_each_row_through_all_matrices() {
        let options = Plan::new(&args(&["--context", "16"]), CONTEXT)
            .unwrap()
            .model_options();
        let model = RoutedLlama::new(Reference, &checkpoint(), options).unwrap();
        let cost = Cost::new(&checkpoint().config, 0, &model, 8);
        // Two layers of q, k, v (16 x 32), output (16 x 16), gate, up and down (3 x 16 x 24); the head is 40 x 16.
        let (row, head) = (2.0 * 1920.0, 640.0);
        let weights = 4.0 * (row + head);
        assert_eq!(model.step_weight_bytes() as f64, weights);
        let (kv_position, attention_position) = (64.0, 2.0 * 2.0 * 16.0);
        let decode = cost.decode(3, 9.0);
        assert_eq!(decode.bytes, weights + 30.0 * kv_position);
        assert_eq!(
            decode.ops,
            2.0 * (3.0 * (row + head) + 30.0 * attention_position)
        );
        // 20 tokens in chunks of 8: three steps, which read 8, 16 and 20 positions.
        let prefill = cost.prefill(20);
        assert_eq!(prefill.bytes, 3.0 * weights + 44.0 * kv_position);
        assert_eq!(
            prefill.ops,
            2.0 * (20.0 * row + head + 210.0 * attention_position)
        );
        let exact = cost.prefill(16);
        assert_eq!(exact.bytes, 2.0 * weights + 24.0 * kv_position);
    }

    #[test]
    fn run_takes_a_shape_or_a_model_not_both() {
        let args = args(&["--shape", "llama-135m", "--device", "cpu"]);
        let error = run(Some("a.gguf"), &streams(), &args).err().unwrap();
        let message = error.to_string();
        assert!(
            message.contains("--shape") && message.contains("llama-135m and a.gguf"),
            "{message}"
        );
    }

    #[test]
    fn plan_refuses_what_makes_no_sense() {
        for flags in [
            ["--steps", "0"],
            ["--repeats", "0"],
            ["--batch", "0"],
            ["--step-rows", "0"],
        ] {
            let error = Plan::new(&args(&flags), CONTEXT).err().unwrap().to_string();
            assert!(error.starts_with(flags[0]), "{error}");
        }
        let plan = Plan::new(&args(&["--decode-context", "9999"]), CONTEXT).unwrap();
        assert!(plan.decode_context + plan.steps <= CONTEXT && plan.positions() <= CONTEXT);
    }
}
