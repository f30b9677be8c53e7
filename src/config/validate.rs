//! From what a user wrote to what the program is built with. Every value is checked here, wherever it was written.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use super::api_keys::{api_keys, open_policy};
use super::error::ConfigError;
use super::options::{EngineOptions, ModelOptions, ServeOptions};
use super::values::{Device, KvDType, TimeSpan, WeightDType};
use super::{ModelSource, RequestLimits, ServerConfig, Speculation};
use crate::types::BLOCK_TOKENS;

/// Name of the embedded demo in the API.
pub const DEMO_NAME: &str = "midpo-demo";
/// Most tokens that one sequence may guess in a step.
const SPECULATIVE_TOKENS_MAX: u32 = 64;
/// Longest run of tokens that may be looked for.
const PROMPT_LOOKUP_MAX: u32 = 64;
/// Longest time that a flag may name: a month.
const TIME_MAX: Duration = Duration::from_secs(31 * 24 * 3600);

/// `midpo serve`, ready to be built.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// Which model.
    pub model: ModelSource,
    /// How it runs.
    pub runtime: RuntimeConfig,
    /// The HTTP side.
    pub server: ServerConfig,
    /// Where to listen: an address or a name.
    pub host: String,
    /// 0: the system's choice.
    pub port: u16,
    /// How long running requests may go on after a signal.
    pub drain_timeout: Duration,
}

/// How a model runs, before the model is known.
#[derive(Clone, Debug, PartialEq)]
pub struct RuntimeConfig {
    /// Format of float weights.
    pub dtype: WeightDType,
    /// Format of the K/V cache.
    pub kv_dtype: KvDType,
    /// Where it runs.
    pub device: Device,
    /// Threads of the CPU backend; `None`: as many as there are.
    pub threads: Option<usize>,
    /// Prompt and answer together; `None`: the model's own.
    pub context_tokens_max: Option<usize>,
    /// Size of the K/V cache.
    pub kv_budget: KvBudget,
    /// Share of a GPU's memory to use.
    pub gpu_memory_utilization: f64,
    /// On a GPU, products whose bits do not depend on the batch.
    pub deterministic: bool,
    /// On a GPU, recorded decode steps.
    pub cuda_graphs: bool,
    /// Most tokens in a step; `None`: as the device likes.
    pub batch_tokens_max: Option<usize>,
    /// Longest step that decodes.
    pub step_time_max: Duration,
    /// Most sequences at once.
    pub sequences_max: usize,
    /// Most requests waiting.
    pub queue_max: usize,
    /// Whether equal prefixes share blocks.
    pub prefix_cache: bool,
    /// Guesses at next tokens.
    pub speculation: Speculation,
}

/// How large the K/V cache is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvBudget {
    /// A share of what is free.
    Auto,
    /// Tokens.
    Tokens(u64),
    /// Bytes.
    Bytes(u64),
}

impl ServeOptions {
    /// # Errors
    /// Names the first value that cannot be used, and what is legal.
    pub fn validate(&self) -> Result<ServeConfig, ConfigError> {
        let limits = &self.limits;
        let server = &self.server;
        let body_bytes_max = at_least("body_bytes_max", limits.body_bytes_max.0, 1)?;
        Ok(ServeConfig {
            model: self.model.validate()?,
            runtime: self.engine.validate()?,
            server: ServerConfig {
                served_model_name: self.served_model_name()?,
                api_keys: api_keys(server, &self.policy)?,
                open_policy: open_policy(&self.policy)?,
                body_bytes_max: usize::try_from(body_bytes_max).unwrap_or(usize::MAX),
                request_timeout: time("request_timeout", server.request_timeout)?,
                keep_alive: time("keep_alive", server.keep_alive)?,
                cors_origins: cors_origins(&server.cors_origin)?,
                log_content: self.log.log_content,
                limits: RequestLimits {
                    choices_max: at_least("choices_max", limits.choices_max, 1)?,
                    stop_strings_max: limits.stop_strings_max as usize,
                    stop_bytes_max: limits.stop_bytes_max as usize,
                    logit_bias_max: limits.logit_bias_max as usize,
                    prompts_max: at_least("prompts_max", limits.prompts_max, 1)? as usize,
                },
                default_max_tokens: limits
                    .default_max_tokens
                    .map(|tokens| at_least("default_max_tokens", tokens, 1))
                    .transpose()?,
            },
            host: host(&server.host)?,
            port: server.port,
            drain_timeout: span("drain_timeout", server.drain_timeout, Duration::ZERO)?,
        })
    }

    fn served_model_name(&self) -> Result<String, ConfigError> {
        if let Some(name) = &self.server.served_model_name {
            // A colon separates a model from its variant.
            let legal = !name.is_empty()
                && name.len() <= 256
                && !name.contains(':')
                && name.bytes().all(|byte| byte.is_ascii_graphic());
            let expected = "1 to 256 printable characters without spaces and colons";
            return legal
                .then(|| name.clone())
                .ok_or_else(|| ConfigError::flag("served_model_name", expected, name));
        }
        Ok(self
            .model
            .model
            .as_deref()
            .map_or(DEMO_NAME.to_owned(), name_of))
    }
}

impl ModelOptions {
    /// # Errors
    /// Experts without a router, a router without experts, experts without a base, or experts named in both ways.
    pub fn validate(&self) -> Result<ModelSource, ConfigError> {
        let parts = [
            ("safety", &self.safety),
            ("helpfulness", &self.helpfulness),
            ("router", &self.router),
        ];
        let given: Vec<_> = parts.iter().filter(|(_, part)| part.is_some()).collect();
        if let Some((missing, _)) = parts.iter().find(|(_, part)| part.is_none())
            && let Some((given, _)) = given.first()
        {
            let expected = format!(
                "a path too, because --{given} is set: --safety, --helpfulness and --router belong together"
            );
            return Err(ConfigError::flag(missing, expected, "none"));
        }
        if let (Some(_), Some((given, _))) = (&self.experts, given.first()) {
            let expected =
                format!("none, because --{given} is set: one names all parts, the other each");
            return Err(ConfigError::flag("experts", expected, "both"));
        }
        if self.model.is_none() && (self.experts.is_some() || !given.is_empty()) {
            let expected = "the base that the experts belong to";
            return Err(ConfigError::flag("model", expected, "none"));
        }
        Ok(ModelSource {
            model: self.model.clone(),
            experts: self.experts.clone(),
            safety: self.safety.clone(),
            helpfulness: self.helpfulness.clone(),
            router: self.router.clone(),
        })
    }
}

impl EngineOptions {
    /// # Errors
    /// Names the first value that cannot be used, and what is legal.
    pub fn validate(&self) -> Result<RuntimeConfig, ConfigError> {
        let kv_budget = match (self.kv_cache_tokens, self.kv_cache_bytes) {
            (None, None) => KvBudget::Auto,
            (Some(tokens), None) => {
                KvBudget::Tokens(at_least("kv_cache_tokens", tokens, BLOCK_TOKENS as u64)?)
            }
            (None, Some(bytes)) => KvBudget::Bytes(at_least("kv_cache_bytes", bytes.0, 1)?),
            (Some(_), Some(_)) => {
                let expected = "one of --kv-cache-tokens and --kv-cache-bytes";
                return Err(ConfigError::flag("kv_cache_bytes", expected, "both"));
            }
        };
        let threads = self.threads.map(|n| within("threads", n, 1, 1024));
        let context = self.max_model_len.map(|n| at_least("max_model_len", n, 2));
        let batch_tokens = self
            .batch_tokens_max
            .map(|n| within("batch_tokens_max", n, 1, 1 << 16));
        Ok(RuntimeConfig {
            dtype: self.dtype,
            kv_dtype: self.kv_dtype,
            device: self.device,
            threads: threads.transpose()?.map(|n| n as usize),
            context_tokens_max: context.transpose()?.map(|n| n as usize),
            kv_budget,
            gpu_memory_utilization: share("gpu_memory_utilization", self.gpu_memory_utilization)?,
            deterministic: self.deterministic,
            cuda_graphs: !self.no_cuda_graphs,
            batch_tokens_max: batch_tokens.transpose()?.map(|n| n as usize),
            step_time_max: time("step_time_max", self.step_time_max)?,
            sequences_max: within("sequences_max", self.sequences_max, 1, 1 << 12)? as usize,
            queue_max: within("queue_max", self.queue_max, 1, 1 << 16)? as usize,
            prefix_cache: !self.no_prefix_cache,
            speculation: self.speculation()?,
        })
    }

    fn speculation(&self) -> Result<Speculation, ConfigError> {
        let tokens = within(
            "speculative_tokens",
            self.speculative_tokens,
            0,
            SPECULATIVE_TOKENS_MAX,
        )?;
        let longest = within(
            "prompt_lookup_max",
            self.prompt_lookup_max,
            1,
            PROMPT_LOOKUP_MAX,
        )?;
        let shortest = within("prompt_lookup_min", self.prompt_lookup_min, 1, longest)?;
        Ok(Speculation {
            speculative_tokens: tokens as usize,
            prompt_lookup_max: longest as usize,
            prompt_lookup_min: shortest as usize,
        })
    }
}

/// The last part of a path without a GGUF file's ending, in characters that the API's model ids may have.
fn name_of(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or(path.to_owned());
    let is_gguf = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let last = if is_gguf {
        path.file_stem()
    } else {
        path.file_name()
    };
    let name: String = last
        .map(|name| name.to_string_lossy())
        .unwrap_or_default()
        .chars()
        .map(|c| {
            if c.is_ascii_graphic() && c != ':' {
                c
            } else {
                '-'
            }
        })
        .take(256)
        .collect();
    if name.is_empty() {
        "model".to_owned()
    } else {
        name
    }
}

fn host(host: &str) -> Result<String, ConfigError> {
    let is_name = !host.is_empty()
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if is_name || bare.parse::<IpAddr>().is_ok() {
        Ok(bare.to_owned())
    } else {
        Err(ConfigError::flag("host", "an address or a host name", host))
    }
}

fn cors_origins(origins: &[String]) -> Result<Vec<String>, ConfigError> {
    for origin in origins {
        let authority = origin
            .strip_prefix("http://")
            .or(origin.strip_prefix("https://"));
        let legal = authority.is_some_and(|rest| !rest.is_empty() && !rest.contains(['/', ' ']));
        if origin != "*" && !legal {
            let expected = "`*`, or a scheme and a host such as https://example.org";
            return Err(ConfigError::flag("cors_origin", expected, origin));
        }
    }
    Ok(origins.to_vec())
}

fn time(key: &'static str, value: TimeSpan) -> Result<Duration, ConfigError> {
    span(key, value, Duration::from_millis(1))
}

fn span(key: &'static str, value: TimeSpan, least: Duration) -> Result<Duration, ConfigError> {
    if (least..=TIME_MAX).contains(&value.0) {
        return Ok(value.0);
    }
    let (least, most) = (TimeSpan(least), TimeSpan(TIME_MAX));
    Err(ConfigError::flag(key, format!("{least} to {most}"), value))
}

fn at_least<T: PartialOrd + ToString>(key: &str, value: T, least: T) -> Result<T, ConfigError> {
    if value >= least {
        return Ok(value);
    }
    let expected = format!("at least {}", least.to_string());
    Err(ConfigError::flag(key, expected, value))
}

fn share(key: &str, value: f64) -> Result<f64, ConfigError> {
    if value > 0.0 && value <= 1.0 {
        return Ok(value);
    }
    Err(ConfigError::flag(key, "over 0 up to 1", value))
}

fn within(key: &str, value: u32, least: u32, most: u32) -> Result<u32, ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::flag(key, format!("{least} to {most}"), value))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use clap::{Args, Command, FromArgMatches};

    fn validate(args: &[&str]) -> Result<ServeConfig, ConfigError> {
        let command = ServeOptions::augment_args(Command::new("serve").no_binary_name(true));
        let command = command.mut_args(|arg| arg.env(None::<&'static str>));
        let matches = command.try_get_matches_from(args).map_err(Box::new)?;
        let options = ServeOptions::from_arg_matches(&matches).map_err(Box::new)?;
        options.validate()
    }

    #[test]
    fn without_flags_the_demo_is_served_and_nothing_is_closed() {
        let config = validate(&[]).unwrap();
        assert_eq!(config.model, ModelSource::default());
        assert_eq!(config.server.served_model_name, DEMO_NAME);
        assert_eq!(config.server.open_policy, crate::config::Policy::open());
        assert!(config.server.api_keys.is_empty());
    }

    #[test]
    fn with_a_key_only_raises_of_safety_are_allowed() {
        let config = validate(&["--api-key", "sk-1", "--min-safety-floor", "0.25"]).unwrap();
        let policy = &config.server.api_keys[0].policy;
        assert_eq!(
            policy.allow_variants,
            crate::config::Policy::guarded().allow_variants
        );
        assert_eq!(policy.min_safety_floor, 0.25);
    }

    #[test]
    fn errors_name_the_flag_and_what_is_legal() {
        for (args, words) in [
            (
                &["--sequences-max", "0"][..],
                &["--sequences-max", "1 to 4096", "0"][..],
            ),
            (&["--batch-tokens-max", "70000"], &["--batch-tokens-max"]),
            (&["--threads", "0"], &["--threads"]),
            (
                &["--gpu-memory-utilization", "1.1"],
                &["--gpu-memory-utilization", "up to 1"],
            ),
            (
                &["--gpu-memory-utilization", "nan"],
                &["--gpu-memory-utilization"],
            ),
            (
                &["--speculative-tokens", "65"],
                &["--speculative-tokens", "0 to 64"],
            ),
            (
                &["--prompt-lookup-max", "2", "--prompt-lookup-min", "3"],
                &["--prompt-lookup-min", "1 to 2"],
            ),
            (
                &["--model", "x", "--safety", "s"],
                &["--helpfulness", "--safety"],
            ),
            (
                &["--safety", "s", "--helpfulness", "h", "--router", "r"],
                &["--model"],
            ),
            (
                &[
                    "--model",
                    "m",
                    "--experts",
                    "e",
                    "--safety",
                    "s",
                    "--helpfulness",
                    "h",
                    "--router",
                    "r",
                ],
                &["--experts", "--safety"],
            ),
            (&["--experts", "e"], &["--model"]),
            (
                &["--served-model-name", "a:b"],
                &["--served-model-name", "colon"],
            ),
            (&["--host", "a b"], &["--host"]),
            (
                &["--cors-origin", "example.org"],
                &["--cors-origin", "https://"],
            ),
            (&["--request-timeout", "0s"], &["--request-timeout"]),
            (
                &["--min-safety-floor", "1.5"],
                &["--min-safety-floor", "0 to 1"],
            ),
            (&["--min-safety-bias", "nan"], &["--min-safety-bias"]),
            (
                &["--kv-cache-tokens", "64", "--kv-cache-bytes", "1GiB"],
                &["both"],
            ),
            (
                &["--api-key-file", "no-such-file"],
                &["--api-key-file", "no-such-file"],
            ),
            (&["--port", "x"], &["--port"]),
            (&["--modle", "x"], &["--model"]),
        ] {
            let error = validate(args).unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{args:?}: {error}");
            }
        }
    }

    #[test]
    fn a_model_is_named_after_its_path() {
        for (path, name) in [
            ("/models/tiny", "tiny"),
            ("/models/tiny/", "tiny"),
            ("a/Llama 3:8B.Q4_1.gguf", "Llama-3-8B.Q4_1"),
            ("/", "model"),
        ] {
            assert_eq!(name_of(Path::new(path)), name);
        }
    }
}
