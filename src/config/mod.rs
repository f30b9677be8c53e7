//! Typed configuration: flags > environment > file > defaults, validated once into values that need no second look.

mod api_keys;
mod budget;
mod error;
mod load;
mod options;
pub mod reference;
pub mod train;
mod validate;
mod values;

pub use budget::{Budget, DeviceMemory, ModelFacts, Remedy, Shortfall};
pub use error::ConfigError;
pub use load::{Group, Sources, without_empty_variables};
pub use options::{
    ChatOptions, ConvertOptions, EngineOptions, HealthOptions, LimitOptions, LogOptions,
    ModelOptions, PolicyOptions, ServeOptions, ServerOptions, TalkOptions,
};
pub use validate::{DEMO_NAME, KvBudget, RuntimeConfig, ServeConfig};
pub use values::{
    ByteSize, Device, KvDType, LogFormat, Secret, TimeSpan, VariantName, WeightDType,
};

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::types::Variant;

/// What the engine is built with.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Most tokens computed in one step, prefill and decode together.
    pub batch_tokens_max: usize,
    /// Longest step that decodes, as far as fewer prompt tokens beside them can make it shorter.
    pub step_time_max: Duration,
    /// Most sequences running at once.
    pub sequences_max: usize,
    /// Most requests waiting; one more is refused.
    pub queue_max: usize,
    /// Prompt and answer together, at most.
    pub context_tokens_max: usize,
    /// Blocks of K/V cache.
    pub kv_blocks: usize,
    /// Whether requests may share blocks of equal prefixes.
    pub prefix_cache: bool,
    /// Guesses at next tokens.
    pub speculation: Speculation,
}

/// Self-speculative decoding by prompt lookup: how many tokens are guessed, and from what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speculation {
    /// Most tokens that a sequence guesses in a step; 0 is off.
    pub speculative_tokens: usize,
    /// Longest run of last tokens that is looked for; longer runs win.
    pub prompt_lookup_max: usize,
    /// Shortest, 1 to `prompt_lookup_max`.
    pub prompt_lookup_min: usize,
}

impl Speculation {
    /// No guesses.
    pub const OFF: Self = Self {
        speculative_tokens: 0,
        prompt_lookup_max: 1,
        prompt_lookup_min: 1,
    };
}

/// What the HTTP side is built with.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Name of the model in the API.
    pub served_model_name: String,
    /// Keys that clients must present; none: open to all.
    pub api_keys: Vec<ApiKey>,
    /// What a client without a key may ask for; read only where `api_keys` is empty.
    pub open_policy: Policy,
    /// Largest request body, in bytes.
    pub body_bytes_max: usize,
    /// From accept to last byte; what runs longer is ended with an error.
    pub request_timeout: Duration,
    /// Silence on a stream after which a comment is sent.
    pub keep_alive: Duration,
    /// Origins allowed by CORS; empty: CORS is off.
    pub cors_origins: Vec<String>,
    /// Log prompts and answers.
    pub log_content: bool,
    /// Bounds of a request's lists.
    pub limits: RequestLimits,
    /// Answer tokens where a request names no limit; `None`: as many as the context has room for.
    pub default_max_tokens: Option<u32>,
}

/// Bounds of what one request may ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// `n`.
    pub choices_max: u32,
    /// Stop strings.
    pub stop_strings_max: usize,
    /// Bytes of a stop string.
    pub stop_bytes_max: usize,
    /// Entries of `logit_bias`.
    pub logit_bias_max: usize,
    /// Prompts in one `/v1/completions` request.
    pub prompts_max: usize,
}

/// A client's key and what its bearer may ask for.
#[derive(Clone)]
pub struct ApiKey {
    /// For logs and metrics; never the secret.
    pub name: String,
    /// The bearer token.
    pub secret: String,
    /// What the operator allows.
    pub policy: Policy,
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey")
            .field("name", &self.name)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

/// What a client may ask of the gates (ARCHITECTURE.md "Policy"): a request may raise safety, never lower it under the floor.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Variants that may be asked for.
    pub allow_variants: Vec<Variant>,
    /// Least `safety_bias`; also applied where the request names none.
    pub min_safety_bias: f32,
    /// Least `safety_floor`; also applied where the request names none.
    pub min_safety_floor: f32,
    /// Whether a request may lower safety by `helpfulness_bias` above 0 or not at all.
    pub allow_helpfulness_bias: bool,
}

impl Policy {
    /// Everything is allowed: where no API keys are configured, unless the operator says otherwise.
    pub fn open() -> Self {
        Self {
            allow_variants: Variant::ALL.to_vec(),
            min_safety_bias: f32::NEG_INFINITY,
            min_safety_floor: 0.0,
            allow_helpfulness_bias: true,
        }
    }

    /// `routed`, `safety` and raises of safety: a key's policy where the operator names none.
    pub fn guarded() -> Self {
        Self {
            allow_variants: vec![Variant::Routed, Variant::Safety],
            min_safety_bias: 0.0,
            min_safety_floor: 0.0,
            allow_helpfulness_bias: false,
        }
    }
}

/// Where the model comes from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelSource {
    /// Directory or GGUF file; `None`: the embedded demo.
    pub model: Option<PathBuf>,
    /// Directory of both experts and the router, instead of the three below.
    pub experts: Option<PathBuf>,
    /// PEFT directory of the safety expert.
    pub safety: Option<PathBuf>,
    /// PEFT directory of the helpfulness expert.
    pub helpfulness: Option<PathBuf>,
    /// `router.pth`, `router.safetensors` or a directory with either.
    pub router: Option<PathBuf>,
}
