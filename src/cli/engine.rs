//! From files to a running engine: what `serve` and `chat` share.

use std::sync::Arc;
use std::time::Instant;

use super::{CliError, memory};
use crate::backend::cpu::{self, CpuOptions};
use crate::backend::cuda::CudaOptions;
use crate::backend::{
    self, Backend, BackendError, DeviceBytes, DeviceChoice, KvFormat, UseBackend, WeightFormat,
};
use crate::checkpoint::{self, BaseTensors, Checkpoint, LlamaConfig, RopeScaling, Sources, Verify};
use crate::config::{
    Budget, ConfigError, Device, DeviceMemory, EngineConfig, KvDType, ModelFacts, ModelSource,
    RuntimeConfig, WeightDType,
};
use crate::demo;
use crate::dtype::BlockType;
use crate::engine::{Engine, EngineHandle, EngineThread, model_options};
use crate::metrics::Metrics;
use crate::model::{self, RoutedLlama};
use crate::server::{SamplingDefaults, ServedModel};
use crate::text::{ChatTemplate, SpecialTokens, Tokenizer};

/// An engine on its thread, and what turns text into its ids.
pub(super) struct Running {
    pub(super) handle: EngineHandle,
    pub(super) thread: EngineThread,
    pub(super) model: ServedModel,
}

/// Loads the model and starts the engine.
/// # Errors
/// A file, a setting that does not fit the model, a device without room.
pub(super) fn start(
    source: &ModelSource,
    runtime: &RuntimeConfig,
    metrics: Arc<Metrics>,
) -> Result<Running, CliError> {
    let running = start_with(|| load(source), runtime, metrics)?;
    if source.model.is_none() {
        tracing::info!(
            "no --model: this is the embedded demo. What it knows and what it doesn't: demo/README.md"
        );
    }
    Ok(running)
}

/// As [`start`], with whatever `load` brings.
pub(super) fn start_with(
    load: impl FnOnce() -> Result<Checkpoint, CliError>,
    runtime: &RuntimeConfig,
    metrics: Arc<Metrics>,
) -> Result<Running, CliError> {
    let start = Start {
        load,
        runtime,
        metrics,
        began: Instant::now(),
    };
    on_device(runtime, start)?
}

/// Where the memory would go, without taking it.
///
/// # Errors
/// As [`start`].
pub(super) fn check(source: &ModelSource, runtime: &RuntimeConfig) -> Result<Budget, CliError> {
    on_device(runtime, Check { source, runtime })?
}

fn on_device<U: UseBackend>(runtime: &RuntimeConfig, user: U) -> Result<U::Output, CliError> {
    let choice = device_choice(runtime.device);
    let cpu = CpuOptions {
        threads: runtime.threads,
        ..CpuOptions::default()
    };
    let cuda = CudaOptions {
        deterministic: runtime.deterministic,
        graphs: runtime.cuda_graphs,
        ..CudaOptions::default()
    };
    backend::open(choice, cpu, cuda, user).map_err(|error| no_device(runtime.device, error))
}

/// The backend's name for it.
pub(super) fn device_choice(device: Device) -> DeviceChoice {
    match device {
        Device::Auto => DeviceChoice::Auto,
        Device::Cpu => DeviceChoice::Cpu,
        Device::Cuda => DeviceChoice::Cuda,
    }
}

/// Asking for a GPU where there is none is the user's to mend.
pub(super) fn no_device(device: Device, error: BackendError) -> CliError {
    match (device, error) {
        (Device::Cuda, BackendError::Unavailable { reason, .. }) => ConfigError::Value {
            origin: "--device".to_owned(),
            key: "device".to_owned(),
            expected: format!("auto or cpu ({reason})"),
            found: "cuda".to_owned(),
        }
        .into(),
        (_, error) => error.into(),
    }
}

/// What is to be started, before the device is known.
struct Start<'a, L> {
    load: L,
    runtime: &'a RuntimeConfig,
    metrics: Arc<Metrics>,
    began: Instant,
}

impl<L: FnOnce() -> Result<Checkpoint, CliError>> UseBackend for Start<'_, L> {
    type Output = Result<Running, CliError>;

    fn run<B: Backend>(self, backend: B, memory: Option<DeviceBytes>) -> Result<Running, CliError> {
        let runtime = self.runtime;
        let checkpoint = (self.load)()?;
        let model = served_model(&checkpoint)?;
        let formats = ModelFormats::of(runtime);
        warn_of_second_rounding(&checkpoint.base, formats.weights);
        let (config, budget) = lay_out(&backend, memory, &checkpoint, runtime)?;
        let options = model_options(&config, formats.kv, formats.weights);
        let routed = RoutedLlama::new(backend, &checkpoint, options)?;
        say_what_is_loaded(&checkpoint, &config, &budget, routed.recorded(), self.began);
        drop(checkpoint);
        cpu::trim_heap();
        let spawned = Engine::spawn(routed, &config, self.metrics);
        let (handle, thread) = spawned.map_err(CliError::io("the engine's thread"))?;
        Ok(Running {
            handle,
            thread,
            model,
        })
    }
}

/// What is to be checked, before the device is known.
struct Check<'a> {
    source: &'a ModelSource,
    runtime: &'a RuntimeConfig,
}

impl UseBackend for Check<'_> {
    type Output = Result<Budget, CliError>;

    fn run<B: Backend>(self, backend: B, memory: Option<DeviceBytes>) -> Result<Budget, CliError> {
        let checkpoint = load(self.source)?;
        served_model(&checkpoint)?;
        let (_, budget) = lay_out(&backend, memory, &checkpoint, self.runtime)?;
        Ok(budget)
    }
}

/// In which formats the device keeps the model.
struct ModelFormats {
    weights: WeightFormat,
    kv: KvFormat,
}

impl ModelFormats {
    fn of(runtime: &RuntimeConfig) -> Self {
        Self {
            weights: weight_format(runtime.dtype),
            kv: kv_format(runtime.kv_dtype),
        }
    }
}

/// What `--kv-dtype` means to a backend.
pub(super) fn kv_format(dtype: KvDType) -> KvFormat {
    match dtype {
        KvDType::Bf16 => KvFormat::BF16,
        KvDType::F32 => KvFormat::F32,
        KvDType::Fp8 => KvFormat::FP8,
        KvDType::Int8 => KvFormat::INT8,
    }
}

/// Shares the device's memory out, before any of it is taken.
fn lay_out<B: Backend>(
    backend: &B,
    memory: Option<DeviceBytes>,
    checkpoint: &Checkpoint,
    runtime: &RuntimeConfig,
) -> Result<(EngineConfig, Budget), CliError> {
    let ModelFormats { weights, kv } = ModelFormats::of(runtime);
    let memory = match memory {
        Some(DeviceBytes { total, free }) => DeviceMemory::Gpu { total, free },
        None => DeviceMemory::Host(memory::free_bytes()),
    };
    let workspace = |positions, blocks| {
        let sized = runtime.sized(memory, positions, blocks);
        let options = model_options(&sized, kv, weights);
        // What cannot be counted cannot be had.
        model::workspace_bytes(backend, checkpoint, &options).unwrap_or(u64::MAX)
    };
    let facts = ModelFacts {
        context_tokens_max: context_tokens_max(&checkpoint.config),
        kv_block_bytes: model::kv_block_bytes(backend, &checkpoint.config, kv)?,
        weight_bytes: model::weight_bytes(backend, checkpoint, weights)?,
        workspace_bytes: &workspace,
    };
    let (config, budget) = runtime.engine(&facts, memory)?;
    tracing::info!(
        weight_bytes = budget.weights,
        workspace_bytes = budget.workspace,
        kv_bytes = budget.kv,
        usable_bytes = budget.usable,
        "memory"
    );
    Ok((config, budget))
}

/// The files of `source`, read and checked.
pub(super) fn load(source: &ModelSource) -> Result<Checkpoint, CliError> {
    Ok(match sources(source)? {
        Some(sources) => checkpoint::load(&sources)?,
        None => demo::load()?,
    })
}

/// `None`: the embedded demo.
///
/// # Errors
/// A directory of experts that lacks one.
pub(super) fn sources(source: &ModelSource) -> Result<Option<Sources>, CliError> {
    let Some(model) = source.model.clone() else {
        return Ok(None);
    };
    let sources = Sources {
        model,
        safety: source.safety.clone(),
        helpfulness: source.helpfulness.clone(),
        router: source.router.clone(),
        verify: Verify::default(),
    };
    Ok(Some(match &source.experts {
        Some(directory) => sources.with_experts(directory)?,
        None => sources,
    }))
}

/// The text side of a checkpoint, for a server.
pub(super) fn served_model(checkpoint: &Checkpoint) -> Result<ServedModel, CliError> {
    let text = &checkpoint.text;
    let special = SpecialTokens {
        bos_token: text.bos_token.clone(),
        eos_token: text.eos_token.clone(),
        others: text.special_tokens.clone(),
    };
    let generation = &checkpoint.generation;
    let openai = SamplingDefaults::default();
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Ok(ServedModel {
        tokenizer: Tokenizer::new(&text.tokenizer_json)?,
        template: ChatTemplate::new(text.chat_template.as_deref(), special)?,
        ends: checkpoint.config.eos_token_ids.clone(),
        defaults: SamplingDefaults {
            temperature: generation.temperature.unwrap_or(openai.temperature),
            top_k: generation.top_k.unwrap_or(openai.top_k),
            top_p: generation.top_p.unwrap_or(openai.top_p),
            min_p: generation.min_p.unwrap_or(openai.min_p),
            repetition_penalty: generation
                .repetition_penalty
                .unwrap_or(openai.repetition_penalty),
        },
        created: since_epoch.map_or(0, |since| since.as_secs()),
        fingerprint: checkpoint.fingerprint.clone(),
    })
}

fn context_tokens_max(config: &LlamaConfig) -> usize {
    let positions = config.max_position_embeddings;
    match config.rope_scaling {
        // Made to be stretched when a context passes the trained one.
        RopeScaling::Dynamic { factor, .. } => (positions as f64 * factor) as usize,
        _ => positions,
    }
}

/// What a flag means to a backend.
pub(super) fn weight_format(dtype: WeightDType) -> WeightFormat {
    match dtype {
        WeightDType::Auto => WeightFormat::Stored,
        WeightDType::F32 => WeightFormat::F32,
        WeightDType::Bf16 => WeightFormat::BF16,
        WeightDType::Q8_0 => WeightFormat::Block(BlockType::Q8_0),
        WeightDType::Q4_1 => WeightFormat::Block(BlockType::Q4_1),
        WeightDType::Q4_0 => WeightFormat::Block(BlockType::Q4_0),
    }
}

fn warn_of_second_rounding(base: &BaseTensors, format: WeightFormat) {
    let Some(stored) = base.layers.first().map(|layer| layer.down_proj.dtype()) else {
        return;
    };
    if let WeightFormat::Block(block) = format
        && stored.is_quantised()
        && stored != block.dtype()
    {
        tracing::warn!(
            "--dtype {} rounds weights that are {} already: quantise from floats, or see what it costs with midpo perplexity",
            block.dtype().as_str(),
            stored.as_str(),
        );
    }
}

fn say_what_is_loaded(
    checkpoint: &Checkpoint,
    config: &EngineConfig,
    budget: &Budget,
    recorded_steps: usize,
    began: Instant,
) {
    tracing::info!(
        layers = checkpoint.config.num_layers,
        experts = checkpoint.experts.is_some(),
        recorded_steps,
        context_tokens = config.context_tokens_max,
        load_seconds = began.elapsed().as_secs_f32(),
        fingerprint = checkpoint.fingerprint,
        "model loaded"
    );
    tracing::info!(
        kv_tokens = budget.kv_tokens,
        kv_blocks = config.kv_blocks,
        sequences_max = config.sequences_max,
        batch_tokens_max = config.batch_tokens_max,
        prefix_cache = config.prefix_cache,
        speculative_tokens = config.speculation.speculative_tokens,
        "K/V cache"
    );
    if budget.kv_tokens < config.context_tokens_max as u64 {
        tracing::warn!(
            kv_tokens = budget.kv_tokens,
            context_tokens = config.context_tokens_max,
            "the K/V cache is smaller than one full context: longer requests are refused; see kv_cache_tokens"
        );
    }
}
