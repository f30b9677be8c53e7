//! How a device's memory is shared out: weights, workspace, and the K/V cache. Arithmetic only.

use std::fmt;

use super::EngineConfig;
use super::error::ConfigError;
use super::validate::{KvBudget, RuntimeConfig};
use super::values::KvDType;
use crate::types::BLOCK_TOKENS;

/// Share of the host's free memory that the K/V cache takes where nobody says how much.
const HOST_KV_SHARE: u64 = 4;
/// Most bytes of the host that it takes where nobody says how much.
const HOST_KV_MAX: u64 = 2 << 30;
/// Bytes of the host that it takes even where less seems to be free: memory is taken only as it is written.
const HOST_KV_MIN: u64 = 64 << 20;
/// Taken for free where the system does not say.
const HOST_UNKNOWN: u64 = 4 << 30;
/// What a GPU's driver takes beside what it is asked for: stacks of kernels, ends of pages.
const GPU_DRIVER: u64 = 256 << 20;

/// Most tokens of a step on a CPU: what more rows leave between ops is in no cache when it is read.
const HOST_BATCH_TOKENS: usize = 256;
/// Most tokens of a step on a GPU.
const GPU_BATCH_TOKENS: usize = 2048;

/// Memory that weights, workspace and K/V have to share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceMemory {
    /// The machine's own: bytes that this process may still take, where the system says.
    Host(Option<u64>),
    /// A GPU's.
    Gpu {
        /// All of it.
        total: u64,
        /// What nobody has taken yet.
        free: u64,
    },
}

impl DeviceMemory {
    /// What may be used; `None`: nobody knows.
    fn usable(self, gpu_share: f64) -> Option<u64> {
        match self {
            Self::Host(free) => free,
            Self::Gpu { total, free } => {
                let share = (total as f64 * gpu_share) as u64;
                Some(share.min(free.saturating_sub(GPU_DRIVER)))
            }
        }
    }

    /// Most tokens of a step, where nobody says.
    fn batch_tokens(self) -> usize {
        match self {
            Self::Host(_) => HOST_BATCH_TOKENS,
            Self::Gpu { .. } => GPU_BATCH_TOKENS,
        }
    }
}

/// What a loaded model needs of a device.
pub struct ModelFacts<'a> {
    /// Positions that the model can tell apart.
    pub context_tokens_max: usize,
    /// Bytes of one block of the K/V cache over all layers.
    pub kv_block_bytes: usize,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Bytes beside weights and K/V, when contexts have so many tokens and the cache so many blocks; grows with both.
    pub workspace_bytes: &'a dyn Fn(usize, usize) -> u64,
}

/// Who takes how much of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// What may be used; `None`: nobody knows.
    pub usable: Option<u64>,
    /// Weights.
    pub weights: u64,
    /// Buffers, lists of a step, what ops work in.
    pub workspace: u64,
    /// K/V cache.
    pub kv: u64,
    /// Tokens that it holds.
    pub kv_tokens: u64,
    /// Most tokens of a sequence.
    pub context_tokens: usize,
}

impl Budget {
    fn needed(&self) -> u64 {
        let parts = [self.weights, self.workspace, self.kv];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    fn fits(&self) -> bool {
        self.usable.is_none_or(|usable| self.needed() <= usable)
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let contexts = self.kv_tokens as f64 / self.context_tokens.max(1) as f64;
        let usable = self.usable.map_or("unknown".to_owned(), mebibytes);
        writeln!(f, "weights     {:>12}", mebibytes(self.weights))?;
        writeln!(f, "workspace   {:>12}", mebibytes(self.workspace))?;
        let kv = mebibytes(self.kv);
        let (tokens, context) = (self.kv_tokens, self.context_tokens);
        writeln!(
            f,
            "K/V cache   {kv:>12}   {tokens} tokens: {contexts:.1} contexts of {context}"
        )?;
        writeln!(f, "together    {:>12}", mebibytes(self.needed()))?;
        write!(f, "may be used {usable:>12}")
    }
}

/// MiB, so that parts can be added up by eye.
fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A setting that would make the model fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Remedy {
    /// `--max-model-len`, at most.
    MaxModelLen(usize),
    /// `--kv-dtype`.
    KvDType(KvDType),
    /// `--kv-cache-tokens`, at most.
    KvCacheTokens(u64),
    /// `--gpu-memory-utilization`, at least.
    GpuMemoryUtilization(f64),
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MaxModelLen(tokens) => write!(f, "--max-model-len {tokens}"),
            Self::KvDType(dtype) => write!(f, "--kv-dtype {}", dtype.as_str()),
            Self::KvCacheTokens(tokens) => write!(f, "--kv-cache-tokens {tokens}"),
            Self::GpuMemoryUtilization(share) => write!(f, "--gpu-memory-utilization {share:.2}"),
        }
    }
}

/// A model that the memory is too small for.
#[derive(Debug, PartialEq)]
pub struct Shortfall {
    /// The least that was asked for.
    pub budget: Budget,
    /// Settings each of which would do.
    pub remedies: Vec<Remedy>,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let budget = &self.budget;
        let usable = budget.usable.unwrap_or_default();
        let [weights, workspace, kv, needed, usable] = [
            budget.weights,
            budget.workspace,
            budget.kv,
            budget.needed(),
            usable,
        ]
        .map(mebibytes);
        let tokens = budget.kv_tokens;
        write!(
            f,
            "weights ({weights}), workspace ({workspace}) and K/V cache ({kv} for {tokens} tokens) need {needed}; {usable} may be used"
        )?;
        let remedies: Vec<_> = self.remedies.iter().map(Remedy::to_string).collect();
        match remedies.is_empty() {
            true => f.write_str("; no shorter context and no smaller cache fits"),
            false => write!(f, "; what fits: {}", remedies.join(", or ")),
        }
    }
}

/// What is being shared out.
struct Plan<'a> {
    runtime: &'a RuntimeConfig,
    model: &'a ModelFacts<'a>,
    memory: DeviceMemory,
    usable: Option<u64>,
}

impl RuntimeConfig {
    /// The engine's configuration for a model on a device with this memory, and where that goes.
    ///
    /// # Errors
    /// A context longer than the model's, a cache of less than one block, or [`ConfigError::Memory`].
    pub fn engine(
        &self,
        model: &ModelFacts<'_>,
        memory: DeviceMemory,
    ) -> Result<(EngineConfig, Budget), ConfigError> {
        let context_tokens_max = self.context(model)?;
        let plan = Plan {
            runtime: self,
            model,
            memory,
            usable: memory.usable(self.gpu_memory_utilization),
        };
        let least = plan.least(context_tokens_max, plan.block_bytes());
        if !least.fits() {
            return Err(ConfigError::Memory(Box::new(plan.shortfall(least))));
        }
        let kv_blocks = plan.blocks(context_tokens_max)?;
        let budget = plan.budget(context_tokens_max, kv_blocks as u64, plan.block_bytes());
        Ok((self.sized(memory, context_tokens_max, kv_blocks), budget))
    }

    /// The engine's configuration for contexts and a cache of this size, in such memory.
    pub fn sized(
        &self,
        memory: DeviceMemory,
        context_tokens_max: usize,
        kv_blocks: usize,
    ) -> EngineConfig {
        let batch_tokens = self.batch_tokens_max;
        EngineConfig {
            batch_tokens_max: batch_tokens.unwrap_or_else(|| memory.batch_tokens()),
            step_time_max: self.step_time_max,
            sequences_max: self.sequences_max,
            queue_max: self.queue_max,
            context_tokens_max,
            kv_blocks,
            prefix_cache: self.prefix_cache,
            speculation: self.speculation,
        }
    }

    fn context(&self, model: &ModelFacts<'_>) -> Result<usize, ConfigError> {
        let own = model.context_tokens_max;
        let context = self.context_tokens_max.unwrap_or(own);
        if context > own {
            let expected = format!("at most the model's own {own} tokens");
            return Err(ConfigError::flag("max_model_len", expected, context));
        }
        Ok(context)
    }
}

impl Plan<'_> {
    fn block_bytes(&self) -> u64 {
        self.model.kv_block_bytes.max(1) as u64
    }

    /// Blocks that so many full contexts take.
    fn full(&self, context: usize, sequences: usize) -> u64 {
        (context.div_ceil(BLOCK_TOKENS) as u64).saturating_mul(sequences as u64)
    }

    /// Blocks of the cache where somebody says how many.
    fn asked(&self, block_bytes: u64) -> Option<u64> {
        match self.runtime.kv_budget {
            KvBudget::Auto => None,
            KvBudget::Tokens(tokens) => Some(tokens / BLOCK_TOKENS as u64),
            KvBudget::Bytes(bytes) => Some(bytes / block_bytes),
        }
    }

    /// With the smallest cache that will do: what is asked for; else one full context, or on the host, where memory is taken only as
    /// it is written, none.
    fn least(&self, context: usize, block_bytes: u64) -> Budget {
        let blocks = self.asked(block_bytes).unwrap_or(match self.memory {
            DeviceMemory::Host(_) => 0,
            DeviceMemory::Gpu { .. } => self.full(context, 1),
        });
        self.budget(context, blocks, block_bytes)
    }

    fn budget(&self, context: usize, blocks: u64, block_bytes: u64) -> Budget {
        let in_memory = usize::try_from(blocks).unwrap_or(usize::MAX);
        Budget {
            usable: self.usable,
            weights: self.model.weight_bytes,
            workspace: (self.model.workspace_bytes)(context, in_memory),
            kv: blocks.saturating_mul(block_bytes),
            kv_tokens: blocks.saturating_mul(BLOCK_TOKENS as u64),
            context_tokens: context,
        }
    }

    /// Blocks of the cache: as many as asked for; else on a GPU all that fit, on the host a share; and no more than all sequences fill.
    fn blocks(&self, context: usize) -> Result<usize, ConfigError> {
        let block_bytes = self.block_bytes();
        let most = self.full(context, self.runtime.sequences_max);
        let blocks = self.asked(block_bytes).unwrap_or_else(|| {
            let none = self.budget(context, most, 0);
            let rest = self.usable.unwrap_or(HOST_UNKNOWN);
            let rest = rest.saturating_sub(none.needed());
            let bytes = match self.memory {
                DeviceMemory::Host(_) => (rest / HOST_KV_SHARE).clamp(HOST_KV_MIN, HOST_KV_MAX),
                DeviceMemory::Gpu { .. } => rest,
            };
            (bytes / block_bytes).min(most)
        });
        if blocks == 0 {
            let expected =
                format!("at least one block of {BLOCK_TOKENS} tokens, {block_bytes} bytes");
            let found = format!("{:?}", self.runtime.kv_budget);
            return Err(ConfigError::flag("kv_cache_bytes", expected, found));
        }
        // Ids of blocks have 32 bits.
        u32::try_from(blocks)
            .map(|blocks| blocks as usize)
            .map_err(|_| {
                let expected = format!("at most {} blocks", u32::MAX);
                ConfigError::flag("kv_cache_tokens", expected, blocks)
            })
    }

    fn shortfall(&self, least: Budget) -> Shortfall {
        let remedies = [
            self.shorter(least.context_tokens),
            self.narrower(least.context_tokens),
            self.smaller(&least),
            self.larger_share(&least),
        ];
        Shortfall {
            budget: least,
            remedies: remedies.into_iter().flatten().collect(),
        }
    }

    /// The longest context that fits, by bisection: what a context needs grows with it.
    fn shorter(&self, context: usize) -> Option<Remedy> {
        let fits = |tokens: usize| self.least(tokens, self.block_bytes()).fits();
        let (mut fitting, mut failing) = (BLOCK_TOKENS, context);
        if fitting >= failing || !fits(fitting) {
            return None;
        }
        while failing - fitting > 1 {
            let middle = fitting + (failing - fitting) / 2;
            match fits(middle) {
                true => fitting = middle,
                false => failing = middle,
            }
        }
        Some(Remedy::MaxModelLen(fitting))
    }

    fn narrower(&self, context: usize) -> Option<Remedy> {
        let (dtype, block_bytes) = match (self.runtime.kv_dtype, self.memory) {
            (KvDType::F32, _) => (KvDType::Bf16, self.block_bytes() / 2),
            (KvDType::Bf16, memory) => {
                let eight_bits = match memory {
                    DeviceMemory::Gpu { .. } => KvDType::Fp8,
                    DeviceMemory::Host(_) => KvDType::Int8,
                };
                // With the scales of heads of 16 numbers or more.
                (eight_bits, self.block_bytes() / 8 * 5)
            }
            (KvDType::Fp8 | KvDType::Int8, _) => return None,
        };
        let fits = self.least(context, block_bytes).fits();
        fits.then_some(Remedy::KvDType(dtype))
    }

    /// The largest cache that fits, where a larger one is asked for.
    fn smaller(&self, least: &Budget) -> Option<Remedy> {
        self.asked(self.block_bytes())?;
        let beside = least.weights.saturating_add(least.workspace);
        let blocks = self.usable?.saturating_sub(beside) / self.block_bytes();
        (blocks > 0).then_some(Remedy::KvCacheTokens(blocks * BLOCK_TOKENS as u64))
    }

    fn larger_share(&self, least: &Budget) -> Option<Remedy> {
        let DeviceMemory::Gpu { total, .. } = self.memory else {
            return None;
        };
        let share = (least.needed() as f64 / total as f64 * 100.0).ceil() / 100.0;
        let fits = share <= 1.0 && self.memory.usable(share)? >= least.needed();
        fits.then_some(Remedy::GpuMemoryUtilization(share))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::time::Duration;

    use super::super::values::{Device, WeightDType};
    use super::*;

    const GIB: u64 = 1 << 30;
    const GPU: DeviceMemory = DeviceMemory::Gpu {
        total: 80 * GIB,
        free: 79 * GIB,
    };

    fn runtime() -> RuntimeConfig {
        RuntimeConfig {
            dtype: WeightDType::Auto,
            kv_dtype: KvDType::Bf16,
            device: Device::Auto,
            threads: None,
            context_tokens_max: None,
            kv_budget: KvBudget::Auto,
            gpu_memory_utilization: 0.9,
            deterministic: false,
            cuda_graphs: true,
            batch_tokens_max: None,
            step_time_max: Duration::from_millis(200),
            sequences_max: 64,
            queue_max: 256,
            prefix_cache: true,
            speculation: crate::config::Speculation::OFF,
        }
    }

    fn with(kv_budget: KvBudget) -> RuntimeConfig {
        RuntimeConfig {
            kv_budget,
            ..runtime()
        }
    }

    /// Contexts of 4096 tokens, 1 MiB a block, workspace of 100 MiB and 100 KiB a token of context; these weights.
    fn engine(
        runtime: &RuntimeConfig,
        weight_bytes: u64,
        memory: DeviceMemory,
    ) -> Result<(EngineConfig, Budget), ConfigError> {
        let facts = ModelFacts {
            context_tokens_max: 4096,
            kv_block_bytes: 1 << 20,
            weight_bytes,
            workspace_bytes: &|positions, _| (100 << 20) + positions as u64 * (100 << 10),
        };
        runtime.engine(&facts, memory)
    }

    fn shortfall(runtime: &RuntimeConfig, weight_bytes: u64, memory: DeviceMemory) -> Shortfall {
        match engine(runtime, weight_bytes, memory) {
            Err(ConfigError::Memory(shortfall)) => *shortfall,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn on_the_host_the_cache_is_a_share_of_free_memory_unless_it_is_told_otherwise() {
        let one = RuntimeConfig {
            sequences_max: 1,
            ..runtime()
        };
        let workspace = 500 << 20;
        for (runtime, free, blocks) in [
            (&runtime(), Some(4 * GIB + workspace), Some(1024)),
            (&runtime(), Some(1 << 40), Some(2048)),
            (&runtime(), None, Some((4 * GIB - workspace) >> 22)),
            (&one, Some(1 << 40), Some(256)),
            (&with(KvBudget::Tokens(100)), Some(GIB), Some(6)),
            (&with(KvBudget::Bytes(10 << 20)), None, Some(10)),
            (&with(KvBudget::Bytes(1)), Some(1 << 40), None),
            // Memory is taken only as it is written.
            (&runtime(), Some(workspace + 1), Some(64)),
        ] {
            let found = engine(runtime, 0, DeviceMemory::Host(free)).ok();
            let found = found.map(|(engine, _)| engine.kv_blocks as u64);
            assert_eq!(found, blocks, "{runtime:?} {free:?}");
        }
    }

    #[test]
    fn on_a_gpu_the_cache_is_all_that_weights_and_workspace_leave_of_the_share() {
        let workspace = 500 << 20;
        for (share, sequences_max, weights, free, kv) in [
            (0.9, 1024, 13 * GIB, 79 * GIB, 59 * GIB - workspace),
            (0.5, 1024, 13 * GIB, 79 * GIB, 27 * GIB - workspace),
            // Others have taken half of it.
            (
                0.9,
                1024,
                13 * GIB,
                40 * GIB,
                27 * GIB - workspace - GPU_DRIVER,
            ),
            // No more than 64 full contexts: the rest would never be used.
            (1.0, 64, GIB, 79 * GIB, 16 * GIB),
        ] {
            let runtime = RuntimeConfig {
                gpu_memory_utilization: share,
                sequences_max,
                ..runtime()
            };
            let memory = DeviceMemory::Gpu {
                total: 80 * GIB,
                free,
            };
            let (engine, budget) = engine(&runtime, weights, memory).unwrap();
            assert_eq!(budget.kv, kv);
            assert_eq!(engine.kv_blocks as u64, kv >> 20);
            assert_eq!(budget.kv_tokens, (kv >> 20) * BLOCK_TOKENS as u64);
            assert!(budget.fits());
        }
    }

    #[test]
    fn what_does_not_fit_a_gpu_is_told_what_would() {
        let exact = RuntimeConfig {
            kv_dtype: KvDType::F32,
            ..runtime()
        };
        // 72 GiB may be used; a full context needs 500 MiB of workspace and 256 MiB of cache.
        let weights = 72 * GIB - (700 << 20);
        let found = shortfall(&exact, weights, GPU);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        assert_eq!(mib(found.budget.needed() - 72 * GIB), 56.0);
        let [
            Remedy::MaxModelLen(tokens),
            Remedy::KvDType(KvDType::Bf16),
            Remedy::GpuMemoryUtilization(share),
        ] = found.remedies[..]
        else {
            panic!("{found:?}");
        };
        assert_eq!(share, 0.91);
        for (tokens, fits) in [(tokens, true), (tokens + 1, false)] {
            let shorter = RuntimeConfig {
                context_tokens_max: Some(tokens),
                ..exact.clone()
            };
            assert_eq!(engine(&shorter, weights, GPU).is_ok(), fits, "{tokens}");
        }
        let text = found.to_string();
        for words in [
            "--max-model-len",
            "--kv-dtype bf16",
            "--gpu-memory-utilization 0.91",
        ] {
            assert!(text.contains(words), "{text}");
        }
        let hopeless = shortfall(&runtime(), 81 * GIB, GPU);
        assert_eq!(hopeless.remedies, []);
    }

    #[test]
    fn a_cache_that_is_asked_for_is_granted_or_refused_with_the_largest_that_fits() {
        let free = DeviceMemory::Host(Some(2 * GIB));
        let left = (2 * GIB - (500 << 20)) >> 20;
        let found = shortfall(&with(KvBudget::Bytes(3 * GIB)), 0, free);
        let most = left * BLOCK_TOKENS as u64;
        assert_eq!(found.remedies, [Remedy::KvCacheTokens(most)]);
        assert!(engine(&with(KvBudget::Tokens(most)), 0, free).is_ok());
        assert!(engine(&with(KvBudget::Tokens(most + 16)), 0, free).is_err());
        for (kv_dtype, narrower) in [(KvDType::Bf16, true), (KvDType::Int8, false)] {
            let runtime = RuntimeConfig {
                kv_dtype,
                ..with(KvBudget::Tokens(most + 16))
            };
            let remedies = shortfall(&runtime, 0, free).remedies;
            let int8 = remedies.contains(&Remedy::KvDType(KvDType::Int8));
            assert_eq!(int8, narrower, "{remedies:?}");
        }
    }

    #[test]
    fn a_step_has_as_many_tokens_as_the_device_likes_where_nobody_says() {
        let host = DeviceMemory::Host(None);
        let said = RuntimeConfig {
            batch_tokens_max: Some(7),
            ..runtime()
        };
        for (runtime, memory, tokens) in [
            (runtime(), host, 256),
            (runtime(), GPU, 2048),
            (said.clone(), host, 7),
            (said, GPU, 7),
        ] {
            let (engine, _) = engine(&runtime, 0, memory).unwrap();
            assert_eq!(engine.batch_tokens_max, tokens);
        }
    }

    #[test]
    fn a_context_longer_than_the_models_is_an_error() {
        let longer = RuntimeConfig {
            context_tokens_max: Some(4097),
            ..runtime()
        };
        let error = engine(&longer, 0, GPU).unwrap_err().to_string();
        assert!(error.contains("--max-model-len"), "{error}");
    }
}
