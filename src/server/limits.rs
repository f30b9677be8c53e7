//! Reading a request and holding it to its limits: what comes out of here is legal in every field.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use serde_json::Value;

use super::AppState;
use super::auth::Caller;
use super::error::{ApiError, echo};
use super::gates::{self, Gates};
use super::models;
use super::unsupported;
use crate::config::RequestLimits;
use crate::openai::{self, GenerationRequest};
use crate::text::{Start, TextStreamOptions};
use crate::types::{SamplingParams, TokenId};

/// As OpenAI's.
const TEMPERATURE_MAX: f32 = 2.0;
/// As OpenAI's, both ways.
const PENALTY_MAX: f32 = 2.0;
/// Far beyond any use.
const REPETITION_PENALTY_MAX: f32 = 100.0;
/// As OpenAI's, both ways.
const LOGIT_BIAS_MAX: f32 = 100.0;
/// The most likely tokens that are told of a place, as OpenAI's.
const TOP_LOGPROBS_MAX: u32 = 20;
/// Entries of `stop_token_ids`.
const STOP_TOKEN_IDS_MAX: usize = 128;
/// From a request's head to the end of its body; a client that sends more slowly holds a connection and nothing else.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of `cache_salt`.
const CACHE_SALT_BYTES_MAX: usize = 256;

/// A request body, read and known to hold no field that would be dropped in silence.
pub struct Body<T>(pub T);

impl<T: openai::Request> FromRequest<AppState> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        check_media_type(&request)?;
        let limit = state.config().body_bytes_max;
        let reading = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, state));
        let read = reading.await.map_err(|_| ApiError::SlowBody {
            seconds: BODY_TIMEOUT.as_secs(),
        })?;
        let bytes = read.map_err(|rejection| match rejection {
            BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => {
                ApiError::ContentTooLarge { limit }
            }
            _ => ApiError::Body,
        })?;
        Ok(Self(openai::read(&bytes)?))
    }
}

fn check_media_type(request: &Request) -> Result<(), ApiError> {
    let found = request
        .headers()
        .get(header::CONTENT_TYPE)
        .map(|value| value.to_str().unwrap_or("something unreadable"));
    let essence = found
        .and_then(|found| found.split(';').next())
        .map(|essence| essence.trim().to_ascii_lowercase());
    match essence.as_deref() {
        Some("application/json") => Ok(()),
        Some(json) if json.starts_with("application/") && json.ends_with("+json") => Ok(()),
        _ => Err(ApiError::MediaType {
            found: echo(found.unwrap_or("none")),
        }),
    }
}

/// What a completion of either kind asks for, checked. The prompt is not part of it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The model as the client named it.
    pub model: String,
    /// How tokens are chosen; `max_tokens` is still to be set by [`Plan::set_max_tokens`].
    pub sampling: SamplingParams,
    /// Choices per prompt, at least 1.
    pub choices: u32,
    /// Variant and gates.
    pub gates: Gates,
    /// How ids become text.
    pub text: TextStreamOptions,
    /// Tokens that end an answer and leave no text.
    pub silent_ends: Vec<TokenId>,
    /// As server-sent events.
    pub stream: bool,
    /// One more chunk at the end.
    pub include_usage: bool,
    /// Answer with ids.
    pub return_token_ids: bool,
    /// Separates prefix caches.
    pub cache_salt: Option<String>,
}

impl Plan {
    /// # Errors
    /// Names the first field that is illegal, unsupported, or denied by the operator.
    pub fn new(
        request: GenerationRequest,
        unknown: &BTreeMap<String, Value>,
        caller: &Caller,
        state: &AppState,
    ) -> Result<Self, ApiError> {
        unsupported::refuse(unknown)?;
        let (model, suffix) = models::find(state, request.model.as_deref())?;
        let limits = state.engine().limits();
        let gates = gates::resolve(suffix, request.midpo.as_ref(), &caller.policy, limits)?;
        let stream = request.stream.unwrap_or(false);
        let choices = request.n.unwrap_or(1);
        let choices_max = state.config().limits.choices_max;
        if !(1..=choices_max).contains(&choices) {
            return Err(range("n", 1, choices_max, choices));
        }
        let include_usage = include_usage(&request, stream)?;
        let return_token_ids = request.return_token_ids.unwrap_or(false);
        let cache_salt = cache_salt(request.cache_salt.as_deref())?;
        let sampling = sampling(&request, state)?;
        let (text, silent_ends) = text(request, &sampling, state)?;
        Ok(Self {
            model,
            sampling,
            choices,
            gates,
            text,
            silent_ends,
            stream,
            include_usage,
            return_token_ids,
            cache_salt,
        })
    }

    /// # Errors
    /// Where `min_tokens` is above an explicit limit.
    pub fn set_max_tokens(&mut self, asked: Option<u32>, default: u32) -> Result<(), ApiError> {
        let max_tokens = asked.unwrap_or(default);
        let min_tokens = self.sampling.min_tokens;
        if min_tokens > max_tokens {
            return Err(range("min_tokens", 0, max_tokens, min_tokens));
        }
        self.sampling.max_tokens = max_tokens;
        Ok(())
    }

    /// Asks for log-probabilities.
    /// # Errors
    /// Where more most likely tokens are wanted than are told.
    pub fn set_logprobs(&mut self, param: &str, top: Option<u32>) -> Result<(), ApiError> {
        if let Some(top) = top.filter(|top| *top > TOP_LOGPROBS_MAX) {
            return Err(range(param, 0, TOP_LOGPROBS_MAX, top));
        }
        self.sampling.logprobs = top;
        Ok(())
    }

    /// Whether the answer tells anything of single tokens.
    pub fn tells_tokens(&self) -> bool {
        self.sampling.logprobs.is_some() || self.return_token_ids || self.gates.report.by_token()
    }
}

fn range<T: std::fmt::Display>(param: &str, least: T, most: T, found: T) -> ApiError {
    ApiError::invalid(param, format!("expected {least} to {most}, found {found}"))
}

fn include_usage(request: &GenerationRequest, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = &request.stream_options else {
        return Ok(false);
    };
    if !stream {
        return Err(ApiError::invalid("stream_options", "only with `stream`"));
    }
    if options.include_obfuscation == Some(true) {
        return Err(ApiError::unsupported(
            "stream_options.include_obfuscation",
            "",
        ));
    }
    Ok(options.include_usage.unwrap_or(false))
}

fn cache_salt(salt: Option<&str>) -> Result<Option<String>, ApiError> {
    match salt {
        None => Ok(None),
        Some(salt) if salt.is_empty() || salt.len() > CACHE_SALT_BYTES_MAX => Err(range(
            "cache_salt",
            "1",
            &format!("{CACHE_SALT_BYTES_MAX} bytes"),
            &salt.len().to_string(),
        )),
        Some(salt) => Ok(Some(salt.to_owned())),
    }
}

fn sampling(request: &GenerationRequest, state: &AppState) -> Result<SamplingParams, ApiError> {
    let defaults = state.model().defaults;
    let limits = 0.0..=TEMPERATURE_MAX;
    let temperature = within("temperature", request.temperature, limits)?;
    let top_p = within("top_p", request.top_p, 0.0..=1.0)?;
    let min_p = within("min_p", request.min_p, 0.0..=1.0)?;
    let penalty = |param, value| within(param, value, -PENALTY_MAX..=PENALTY_MAX);
    let presence_penalty = penalty("presence_penalty", request.presence_penalty)?;
    let frequency_penalty = penalty("frequency_penalty", request.frequency_penalty)?;
    let repetition_penalty = repetition_penalty(request.repetition_penalty)?;
    let vocabulary = state.engine().limits().vocabulary;
    Ok(SamplingParams {
        temperature: temperature.unwrap_or(defaults.temperature),
        top_k: top_k(request.top_k)?.unwrap_or(defaults.top_k),
        // 0 is legal in OpenAI's API and means the one most likely token, as does the least number above it.
        top_p: top_p.unwrap_or(defaults.top_p).max(f32::MIN_POSITIVE),
        min_p: min_p.unwrap_or(defaults.min_p),
        presence_penalty: presence_penalty.unwrap_or(0.0),
        frequency_penalty: frequency_penalty.unwrap_or(0.0),
        repetition_penalty: repetition_penalty.unwrap_or(defaults.repetition_penalty),
        logit_bias: logit_bias(
            request.logit_bias.as_ref(),
            vocabulary,
            &state.config().limits,
        )?,
        // The one random number that is not keyed by (seed, position): it is the key.
        seed: match request.seed {
            Some(seed) => seed.cast_unsigned(),
            None => uuid::Uuid::new_v4().as_u64_pair().1,
        },
        logprobs: None,
        max_tokens: 0,
        min_tokens: request.min_tokens.unwrap_or(0),
        stop_token_ids: stop_token_ids(request.stop_token_ids.as_deref(), vocabulary)?,
        ignore_eos: request.ignore_eos.unwrap_or(false),
    })
}

fn within(
    param: &str,
    value: Option<f32>,
    limits: RangeInclusive<f32>,
) -> Result<Option<f32>, ApiError> {
    match value {
        // Infinity is what a number beyond f32 has become.
        Some(value) if !limits.contains(&value) => {
            Err(range(param, *limits.start(), *limits.end(), value))
        }
        value => Ok(value),
    }
}

fn repetition_penalty(penalty: Option<f32>) -> Result<Option<f32>, ApiError> {
    match penalty {
        None => Ok(None),
        Some(penalty) if penalty > 0.0 && penalty <= REPETITION_PENALTY_MAX => Ok(Some(penalty)),
        Some(penalty) => {
            let message = format!("expected above 0, to {REPETITION_PENALTY_MAX}, found {penalty}");
            Err(ApiError::invalid("repetition_penalty", message))
        }
    }
}

/// 0: every token; the API writes -1 too.
fn top_k(top_k: Option<i64>) -> Result<Option<u32>, ApiError> {
    match top_k {
        None => Ok(None),
        Some(-1) => Ok(Some(0)),
        Some(top_k) => u32::try_from(top_k).map(Some).map_err(|_| {
            ApiError::invalid("top_k", format!("expected -1, 0 or more, found {top_k}"))
        }),
    }
}

fn logit_bias(
    biases: Option<&BTreeMap<String, f32>>,
    vocabulary: usize,
    limits: &RequestLimits,
) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(biases) = biases else {
        return Ok(Vec::new());
    };
    if biases.len() > limits.logit_bias_max {
        return Err(range("logit_bias", 0, limits.logit_bias_max, biases.len()));
    }
    let checked = biases.iter().map(|(key, bias)| {
        let param = || format!("logit_bias.{}", echo(key));
        let id = key
            .parse::<u32>()
            .ok()
            // A second spelling of a number (`05`) could name a token twice.
            .filter(|id| (*id as usize) < vocabulary && id.to_string() == *key);
        let id = id.ok_or_else(|| {
            let message = format!(
                "expected token ids below {vocabulary}, found `{}`",
                echo(key)
            );
            ApiError::invalid(param(), message)
        })?;
        if !(-LOGIT_BIAS_MAX..=LOGIT_BIAS_MAX).contains(bias) {
            return Err(range(&param(), -LOGIT_BIAS_MAX, LOGIT_BIAS_MAX, *bias));
        }
        Ok((TokenId(id), *bias))
    });
    checked.collect()
}

fn stop_token_ids(ids: Option<&[u32]>, vocabulary: usize) -> Result<Vec<TokenId>, ApiError> {
    let ids = ids.unwrap_or_default();
    if ids.len() > STOP_TOKEN_IDS_MAX {
        return Err(range("stop_token_ids", 0, STOP_TOKEN_IDS_MAX, ids.len()));
    }
    let checked = ids.iter().enumerate().map(|(at, id)| {
        if (*id as usize) < vocabulary {
            return Ok(TokenId(*id));
        }
        let message = format!("expected token ids below {vocabulary}, found {id}");
        Err(ApiError::invalid(format!("stop_token_ids[{at}]"), message))
    });
    checked.collect()
}

/// How ids become text, and the ends that leave none.
fn text(
    request: GenerationRequest,
    sampling: &SamplingParams,
    state: &AppState,
) -> Result<(TextStreamOptions, Vec<TokenId>), ApiError> {
    let limits = &state.config().limits;
    let stop = request
        .stop
        .map(openai::Stop::into_strings)
        .unwrap_or_default();
    if stop.len() > limits.stop_strings_max {
        return Err(range("stop", 0, limits.stop_strings_max, stop.len()));
    }
    for (at, string) in stop.iter().enumerate() {
        if string.is_empty() || string.len() > limits.stop_bytes_max {
            let message = format!(
                "expected 1 to {} bytes, found {}",
                limits.stop_bytes_max,
                string.len()
            );
            return Err(ApiError::invalid(format!("stop[{at}]"), message));
        }
    }
    let include = request.include_stop_str_in_output.unwrap_or(false);
    let mut silent_ends = Vec::new();
    if !include {
        silent_ends.extend_from_slice(&sampling.stop_token_ids);
        if !sampling.ignore_eos {
            silent_ends.extend_from_slice(&state.model().ends);
        }
    }
    let options = TextStreamOptions {
        start: Start::Continuation,
        skip_special_tokens: request.skip_special_tokens.unwrap_or(true),
        stop,
        include_stop_str_in_output: include,
    };
    Ok((options, silent_ends))
}
