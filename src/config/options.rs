//! What a user may write: one struct a group of settings, one a subcommand. The doc comments here are `--help`, the comments
//! of `config/midpo.toml` and the README's table; each key is a flag, `MIDPO_` and the key an environment variable.

use std::path::PathBuf;

use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};

use super::values::{
    ByteSize, Device, KvDType, LogFormat, Secret, TimeSpan, VariantName, WeightDType,
};

/// `midpo serve`.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct ServeOptions {
    /// Which model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// How it runs.
    #[command(flatten)]
    pub engine: EngineOptions,
    /// How it is reached.
    #[command(flatten)]
    pub server: ServerOptions,
    /// What one request may ask for.
    #[command(flatten)]
    pub limits: LimitOptions,
    /// What clients may do to the gates.
    #[command(flatten)]
    pub policy: PolicyOptions,
    /// What is logged.
    #[command(flatten)]
    pub log: LogOptions,
    /// Do not serve: read the model's files, print how much memory it takes, and exit; with an error where it does not fit.
    #[arg(long)]
    pub check: bool,
}

/// `midpo chat`.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct ChatOptions {
    /// The conversation.
    #[command(flatten)]
    pub chat: TalkOptions,
    /// Which model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// How it runs.
    #[command(flatten)]
    pub engine: EngineOptions,
    /// What is logged.
    #[command(flatten)]
    pub log: LogOptions,
}

/// `midpo convert`.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct ConvertOptions {
    /// Which model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// Directory to write; made if it is not there, and must be empty.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Write the base anew in blocks of 8 or 4 bits (embedding and head in 8), and say what that costs. Served, it is bit-equal to the
    /// base under `serve --quantize`, and half or a third of its size.
    #[arg(long, value_enum, value_name = "TYPE")]
    pub quantize: Option<WeightDType>,
    /// Text (UTF-8) on which --quantize says its cost; by default a few sentences.
    #[arg(long, value_name = "FILE", requires = "quantize")]
    pub text: Option<PathBuf>,
    /// What is logged.
    #[command(flatten)]
    pub log: LogOptions,
}

/// `midpo health`.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct HealthOptions {
    /// Server to ask; `/ready` is read from it.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Give up after this long.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub timeout: TimeSpan,
}

/// Which model.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub struct ModelOptions {
    /// Model to serve: a Hugging Face directory, a directory that `midpo convert` wrote, or a GGUF file. Without it, the
    /// embedded demo is served.
    #[arg(long, env = "MIDPO_MODEL", value_name = "DIR|FILE.gguf")]
    pub model: Option<PathBuf>,
    /// Directory of both experts and the router: `safety`, `helpfulness`, and a router there or in `router`, as `midpo train all`
    /// leaves them. Instead of the three settings below.
    #[arg(long, env = "MIDPO_EXPERTS", value_name = "DIR")]
    pub experts: Option<PathBuf>,
    /// PEFT directory of the safety expert. Needs --helpfulness and --router.
    #[arg(long, env = "MIDPO_SAFETY", value_name = "DIR")]
    pub safety: Option<PathBuf>,
    /// PEFT directory of the helpfulness expert. Needs --safety and --router.
    #[arg(long, env = "MIDPO_HELPFULNESS", value_name = "DIR")]
    pub helpfulness: Option<PathBuf>,
    /// The router: `router.pth`, `router.safetensors`, or a directory with either. Needs --safety and --helpfulness.
    #[arg(long, env = "MIDPO_ROUTER", value_name = "FILE|DIR")]
    pub router: Option<PathBuf>,
}

/// How the model runs.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Engine")]
pub struct EngineOptions {
    /// Format of weights in memory; a block format quantises them at load. Activations meet block formats in int8, with f32 exactly.
    #[arg(
        long,
        visible_alias = "quantize",
        env = "MIDPO_DTYPE",
        value_enum,
        default_value_t,
        value_name = "TYPE"
    )]
    pub dtype: WeightDType,
    /// Format of the K/V cache: bf16 is half the memory of f32, which is exact (CPU only); a quarter are fp8 (GPU only) and int8 (CPU only).
    #[arg(
        long,
        env = "MIDPO_KV_DTYPE",
        value_enum,
        default_value_t,
        value_name = "TYPE"
    )]
    pub kv_dtype: KvDType,
    /// Device to run on.
    #[arg(
        long,
        env = "MIDPO_DEVICE",
        value_enum,
        default_value_t,
        value_name = "DEVICE"
    )]
    pub device: Device,
    /// Threads of the CPU backend; by default as many as the machine lets this process use.
    #[arg(long, env = "MIDPO_THREADS", value_name = "N")]
    pub threads: Option<u32>,
    /// Most tokens of prompt and answer together; by default what the model was made for. Shorter saves K/V cache.
    #[arg(long, env = "MIDPO_MAX_MODEL_LEN", value_name = "TOKENS")]
    pub max_model_len: Option<u32>,
    /// Size of the K/V cache in tokens, over all sequences. By default it is taken from the memory that is free at start: a quarter,
    /// 2 GiB at most; on a GPU all that weights and workspace leave.
    #[arg(long, env = "MIDPO_KV_CACHE_TOKENS", value_name = "TOKENS")]
    pub kv_cache_tokens: Option<u64>,
    /// Size of the K/V cache in bytes, instead of in tokens.
    #[arg(long, env = "MIDPO_KV_CACHE_BYTES", value_name = "BYTES")]
    pub kv_cache_bytes: Option<ByteSize>,
    /// Share of a GPU's memory to use, over 0 up to 1: weights and workspace first, the K/V cache all the rest.
    #[arg(
        long,
        env = "MIDPO_GPU_MEMORY_UTILIZATION",
        default_value_t = 0.9,
        value_name = "SHARE"
    )]
    pub gpu_memory_utilization: f64,
    /// On a GPU, multiply by this program's own kernels alone: slower, but each product adds in one order and is the same to the bit in
    /// every batch. The processor always computes so.
    #[arg(long, env = "MIDPO_DETERMINISTIC", value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub deterministic: bool,
    /// On a GPU, start every kernel of a decode step by itself instead of replaying recorded CUDA graphs: for finding faults, and for
    /// the memory that recordings take.
    #[arg(long, env = "MIDPO_NO_CUDA_GRAPHS", value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub no_cuda_graphs: bool,
    /// Most tokens computed in one step, prefill and decode together. More is faster overall, slower to the next token, and takes more
    /// memory; by default 256 on a CPU, whose caches hold what so many rows leave, 2048 on a GPU.
    #[arg(long, env = "MIDPO_BATCH_TOKENS_MAX", value_name = "TOKENS")]
    pub batch_tokens_max: Option<u32>,
    /// Longest step while answers are generated, and so the longest pause that new prompts cause in a stream: beside decodes, as
    /// many prompt tokens are computed as fit by the time of the steps before. Longer is faster to the first token.
    #[arg(
        long,
        env = "MIDPO_STEP_TIME_MAX",
        default_value = "150ms",
        value_name = "TIME"
    )]
    pub step_time_max: TimeSpan,
    /// Most sequences running at once.
    #[arg(
        long,
        env = "MIDPO_SEQUENCES_MAX",
        default_value_t = 64,
        value_name = "N"
    )]
    pub sequences_max: u32,
    /// Most requests waiting; one more is refused with 429.
    #[arg(long, env = "MIDPO_QUEUE_MAX", default_value_t = 256, value_name = "N")]
    pub queue_max: u32,
    /// Compute every prompt anew instead of reusing the K and V of equal prefixes.
    #[arg(long, env = "MIDPO_NO_PREFIX_CACHE", value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub no_prefix_cache: bool,
    /// Most tokens that a sequence guesses ahead in a step and checks in the same pass; the answer is the same to the bit. 0 is off.
    #[arg(
        long,
        env = "MIDPO_SPECULATIVE_TOKENS",
        default_value_t = 3,
        value_name = "TOKENS"
    )]
    pub speculative_tokens: u32,
    /// Guesses copy what followed an earlier run of tokens that equals the last ones: the longest such run to look for.
    #[arg(
        long,
        env = "MIDPO_PROMPT_LOOKUP_MAX",
        default_value_t = 5,
        value_name = "TOKENS"
    )]
    pub prompt_lookup_max: u32,
    /// The shortest such run. Shorter finds more, and more that is wrong.
    #[arg(
        long,
        env = "MIDPO_PROMPT_LOOKUP_MIN",
        default_value_t = 2,
        value_name = "TOKENS"
    )]
    pub prompt_lookup_min: u32,
}

/// How the server is reached.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Server")]
pub struct ServerOptions {
    /// Address to listen on. 0.0.0.0 is every interface: configure API keys first.
    #[arg(
        long,
        env = "MIDPO_HOST",
        default_value = "127.0.0.1",
        value_name = "HOST"
    )]
    pub host: String,
    /// Port to listen on; 0 lets the system choose. The first line on standard output says which.
    #[arg(long, env = "MIDPO_PORT", default_value_t = 8000, value_name = "PORT")]
    pub port: u16,
    /// Name of the model in the API; by default the last part of --model. The variants are NAME:base, NAME:safety and so on.
    #[arg(long, env = "MIDPO_SERVED_MODEL_NAME", value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// A key that clients must present as `Authorization: Bearer KEY`; repeatable, or separated by commas. Without any key
    /// the API is open.
    #[arg(
        long,
        env = "MIDPO_API_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub api_key: Vec<Secret>,
    /// File of keys: one a line, or TOML whose `[[key]]` tables have `name`, `secret`, and optionally `allow_variants`,
    /// `min_safety_bias`, `min_safety_floor` and `allow_helpfulness_bias`.
    #[arg(long, env = "MIDPO_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// An origin whose pages may call the API from a browser, or `*`; repeatable, or separated by commas. Without any, CORS
    /// is off.
    #[arg(
        long,
        env = "MIDPO_CORS_ORIGIN",
        value_name = "ORIGIN",
        value_delimiter = ','
    )]
    pub cors_origin: Vec<String>,
    /// Longest time from accepting a request to its last byte; what runs longer is ended with an error.
    #[arg(
        long,
        env = "MIDPO_REQUEST_TIMEOUT",
        default_value = "10m",
        value_name = "TIME"
    )]
    pub request_timeout: TimeSpan,
    /// Silence on a stream after which a comment is sent, so that proxies keep it open.
    #[arg(
        long,
        env = "MIDPO_KEEP_ALIVE",
        default_value = "15s",
        value_name = "TIME"
    )]
    pub keep_alive: TimeSpan,
    /// After SIGTERM or SIGINT: refuse new requests, let those that run finish for this long, then exit.
    #[arg(
        long,
        env = "MIDPO_DRAIN_TIMEOUT",
        default_value = "30s",
        value_name = "TIME"
    )]
    pub drain_timeout: TimeSpan,
}

/// What one request may ask for.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Limits of a request")]
pub struct LimitOptions {
    /// Answer tokens where a request names no limit; by default as many as the context has room for.
    #[arg(long, env = "MIDPO_DEFAULT_MAX_TOKENS", value_name = "TOKENS")]
    pub default_max_tokens: Option<u32>,
    /// Largest request body.
    #[arg(
        long,
        env = "MIDPO_BODY_BYTES_MAX",
        default_value = "4MiB",
        value_name = "BYTES"
    )]
    pub body_bytes_max: ByteSize,
    /// Most choices, `n`.
    #[arg(
        long,
        env = "MIDPO_CHOICES_MAX",
        default_value_t = 16,
        value_name = "N"
    )]
    pub choices_max: u32,
    /// Most prompts in one `/v1/completions` request.
    #[arg(
        long,
        env = "MIDPO_PROMPTS_MAX",
        default_value_t = 64,
        value_name = "N"
    )]
    pub prompts_max: u32,
    /// Most stop strings.
    #[arg(
        long,
        env = "MIDPO_STOP_STRINGS_MAX",
        default_value_t = 16,
        value_name = "N"
    )]
    pub stop_strings_max: u32,
    /// Longest stop string, in bytes.
    #[arg(
        long,
        env = "MIDPO_STOP_BYTES_MAX",
        default_value_t = 256,
        value_name = "BYTES"
    )]
    pub stop_bytes_max: u32,
    /// Most entries of `logit_bias`.
    #[arg(
        long,
        env = "MIDPO_LOGIT_BIAS_MAX",
        default_value_t = 1024,
        value_name = "N"
    )]
    pub logit_bias_max: u32,
}

/// What clients may do to the gates: a client that may ask for `base` can switch the safety expert off.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Policy")]
pub struct PolicyOptions {
    /// Variants that clients may ask for, separated by commas: routed, base, safety, helpfulness, both. By default all
    /// without API keys, `routed,safety` with them.
    #[arg(
        long,
        env = "MIDPO_ALLOW_VARIANTS",
        value_name = "VARIANTS",
        value_delimiter = ','
    )]
    pub allow_variants: Vec<VariantName>,
    /// Least `safety_bias` of every request, also of those that name none. By default 0 with API keys, no bound without.
    #[arg(
        long,
        env = "MIDPO_MIN_SAFETY_BIAS",
        value_name = "BIAS",
        allow_negative_numbers = true
    )]
    pub min_safety_bias: Option<f32>,
    /// Least `safety_floor` of every request, 0 to 1, also of those that name none. By default 0.
    #[arg(long, env = "MIDPO_MIN_SAFETY_FLOOR", value_name = "GATE")]
    pub min_safety_floor: Option<f32>,
    /// Whether clients may set a `helpfulness_bias` above 0. By default only without API keys.
    #[arg(long, env = "MIDPO_ALLOW_HELPFULNESS_BIAS", value_name = "BOOL", num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    pub allow_helpfulness_bias: Option<bool>,
}

/// What is logged. Logs go to standard error.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Logs")]
pub struct LogOptions {
    /// Least level that is logged: error, warn, info, debug or trace; or one a module, as in `info,midpo::engine=debug`.
    #[arg(
        long,
        env = "MIDPO_LOG_LEVEL",
        default_value = "info",
        value_name = "LEVEL"
    )]
    pub log_level: String,
    /// How log lines look.
    #[arg(
        long,
        env = "MIDPO_LOG_FORMAT",
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    pub log_format: LogFormat,
    /// Log prompts and answers too. Off, nothing that a user wrote is logged.
    #[arg(long, env = "MIDPO_LOG_CONTENT", value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub log_content: bool,
}

/// A conversation in the terminal. In the file these keys are in the table `[chat]`.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Conversation")]
pub struct TalkOptions {
    /// Talk to the OpenAI-compatible server at this address instead of loading a model.
    #[arg(long, env = "MIDPO_CHAT_URL", value_name = "URL")]
    pub url: Option<String>,
    /// Key for that server.
    #[arg(
        long,
        env = "MIDPO_CHAT_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    pub key: Option<Secret>,
    /// Model to ask for on that server; by default the first that it lists.
    #[arg(long, env = "MIDPO_CHAT_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// Which mixture answers: routed, base, safety, helpfulness or both. By default routed where the model has experts.
    #[arg(long, env = "MIDPO_CHAT_VARIANT", value_name = "VARIANT")]
    pub variant: Option<VariantName>,
    /// Show the gates of each answer.
    #[arg(long, env = "MIDPO_CHAT_GATES", value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub gates: bool,
    /// System turn that opens the conversation.
    #[arg(long, env = "MIDPO_CHAT_SYSTEM", value_name = "TEXT")]
    pub system: Option<String>,
    /// 0 always takes the likeliest token; by default what the model's files say.
    #[arg(long, env = "MIDPO_CHAT_TEMPERATURE", value_name = "T")]
    pub temperature: Option<f32>,
    /// Most tokens of one answer.
    #[arg(
        long,
        env = "MIDPO_CHAT_MAX_TOKENS",
        default_value_t = 512,
        value_name = "TOKENS"
    )]
    pub max_tokens: u32,
    /// Makes answers repeatable.
    #[arg(long, env = "MIDPO_CHAT_SEED", value_name = "N")]
    pub seed: Option<u64>,
}
