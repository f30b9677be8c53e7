//! One streamed request to an OpenAI-compatible server, and when each piece of its answer arrived.
//!
//! The reader of chunks is lenient on purpose, where `openai` is exact: it must read what any server of the field sends.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::Url;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::BenchError;
use super::sse::{SseEvent, SseParser};
use crate::types::Variant;

/// Longest part of a server's error message that is kept.
const MESSAGE_CHARS_MAX: usize = 200;

/// Which route is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// `/v1/chat/completions`: the prompt is the one user message.
    Chat,
    /// `/v1/completions`: the prompt as it is.
    Completions,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// A server, a model on it, and how to speak to it.
#[derive(Clone, Debug)]
pub struct Target {
    client: reqwest::Client,
    base: Url,
    api_key: Option<String>,
    model: String,
    endpoint: Endpoint,
}

/// What is the same in all requests of a bench.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RequestShape {
    /// Tokens wanted.
    pub max_tokens: u32,
    /// 0: greedy.
    pub temperature: f32,
    /// Sends `ignore_eos`, so that every answer has `max_tokens` tokens (an extension: vLLM, llama.cpp, mistral.rs, midpo).
    pub ignore_eos: bool,
    /// Fields that are put in the body as they are, over all others.
    pub extra: Map<String, Value>,
}

/// `usage` as the server counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Template included.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Generated.
    #[serde(default)]
    pub completion_tokens: u64,
}

/// Why a request did not complete.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// Longer than the client waits.
    #[error("no end within the time limit")]
    Timeout,
    /// An answer that is not 200.
    #[error("status {status}: {message}")]
    Status {
        /// HTTP.
        status: u16,
        /// Start of the body.
        message: String,
    },
    /// An error inside the stream.
    #[error("error event: {0}")]
    Event(String),
    /// A stream that is not server-sent JSON chunks.
    #[error("not a stream of chunks: {0}")]
    Malformed(String),
    /// The stream ended, or its connection broke, before the answer's end.
    #[error("the stream broke off: {0}")]
    Cut(String),
    /// Never sent: too many of this client's requests were under way.
    #[error("more than {limit} requests under way")]
    Overload {
        /// [`super::load::IN_FLIGHT_MAX`].
        limit: usize,
    },
}

impl Failure {
    /// The word under which it is counted.
    pub fn kind(&self) -> String {
        match self {
            Self::Connect(_) => "connect".to_owned(),
            Self::Timeout => "timeout".to_owned(),
            Self::Status { status, .. } => format!("status_{status}"),
            Self::Event(_) => "error_event".to_owned(),
            Self::Malformed(_) => "malformed".to_owned(),
            Self::Cut(_) => "cut".to_owned(),
            Self::Overload { .. } => "overload".to_owned(),
        }
    }
}

/// How a request ended.
pub type Outcome = Result<(), Failure>;

/// One request. Times count from the start of its run.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestRecord {
    /// Asked of a midpo server.
    pub variant: Option<Variant>,
    /// When it was due: in an open loop it may have been sent later, and that wait counts.
    pub due: Duration,
    /// Arrival of every chunk that carries text or tokens.
    pub chunks: Vec<Duration>,
    /// Last byte, or the failure.
    pub ended: Duration,
    /// Where the server told.
    pub usage: Option<Usage>,
    /// How it ended.
    pub outcome: Outcome,
}

impl RequestRecord {
    /// A request of which nothing has come yet.
    pub(super) fn new(variant: Option<Variant>, due: Duration) -> Self {
        Self {
            variant,
            due,
            chunks: Vec::new(),
            ended: due,
            usage: None,
            outcome: Ok(()),
        }
    }

    /// As `usage` counts, else one a chunk.
    pub fn output_tokens(&self) -> u64 {
        self.usage
            .map_or(self.chunks.len() as u64, |usage| usage.completion_tokens)
    }
}

impl Target {
    /// # Errors
    /// [`BenchError::Url`] for what is not `http://...`; no TLS is built in.
    pub fn new(
        url: &str,
        model: &str,
        api_key: Option<String>,
        endpoint: Endpoint,
        timeout: Duration,
    ) -> Result<Self, BenchError> {
        let bad = |reason: String| BenchError::Url {
            found: url.to_owned(),
            reason,
        };
        let trimmed = url.trim_end_matches('/').trim_end_matches("/v1");
        let base = Url::parse(trimmed).map_err(|error| bad(error.to_string()))?;
        if base.scheme() != "http" || base.cannot_be_a_base() {
            return Err(bad("only http is built in".to_owned()));
        }
        let client = reqwest::Client::builder()
            .timeout(timeout)
            .no_proxy()
            .pool_max_idle_per_host(usize::MAX)
            .build()
            .map_err(BenchError::Client)?;
        Ok(Self {
            client,
            base,
            api_key,
            model: model.to_owned(),
            endpoint,
        })
    }

    /// The same server and model, by its own list: the first of `/v1/models`.
    ///
    /// # Errors
    /// [`BenchError::Server`] when the list cannot be read or is empty.
    pub async fn with_first_model(mut self) -> Result<Self, BenchError> {
        #[derive(Deserialize)]
        struct Model {
            id: String,
        }
        #[derive(Deserialize)]
        struct List {
            data: Vec<Model>,
        }
        let failed = |reason: String| BenchError::Server {
            url: self.base.to_string(),
            what: "/v1/models",
            reason,
        };
        let request = self.request(self.client.get(self.address("/v1/models")));
        let answer = request.send().await.map_err(|e| failed(chain(&e)))?;
        let answer = answer.error_for_status().map_err(|e| failed(chain(&e)))?;
        let list: List = answer.json().await.map_err(|e| failed(chain(&e)))?;
        let first = list.data.into_iter().next();
        let first = first.ok_or_else(|| failed("the list is empty".to_owned()))?;
        self.model = first.id;
        Ok(self)
    }

    /// The server's address.
    pub fn url(&self) -> &str {
        self.base.as_str()
    }

    /// The model asked for.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The route asked.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Tokens of `text` as the server's `/tokenize` counts them (vLLM's and midpo's `prompt`, llama.cpp's `content`); `None`
    /// where it has no such route.
    pub async fn count_tokens(&self, text: &str) -> Option<usize> {
        #[derive(Deserialize)]
        struct Tokens {
            count: Option<usize>,
            tokens: Option<Vec<Value>>,
        }
        let body = json!({"model": self.model, "prompt": text, "content": text, "add_special_tokens": false});
        let request = self.client.post(self.address("/tokenize")).json(&body);
        let answer = self.request(request).send().await.ok()?;
        let answer = answer.error_for_status().ok()?;
        let tokens: Tokens = answer.json().await.ok()?;
        tokens
            .count
            .or_else(|| tokens.tokens.map(|tokens| tokens.len()))
    }

    /// Sends one request and reads its stream to the end. `epoch` is the start of the run, `due` the request's place in it.
    pub async fn stream(
        &self,
        prompt: &str,
        shape: &RequestShape,
        variant: Option<Variant>,
        epoch: Instant,
        due: Duration,
    ) -> RequestRecord {
        let mut record = RequestRecord::new(variant, due);
        record.outcome = self
            .read_stream(prompt, shape, variant, epoch, &mut record)
            .await;
        record.ended = epoch.elapsed();
        record
    }

    async fn read_stream(
        &self,
        prompt: &str,
        shape: &RequestShape,
        variant: Option<Variant>,
        epoch: Instant,
        record: &mut RequestRecord,
    ) -> Outcome {
        let body = self.body(prompt, shape, variant);
        let request = self.client.post(self.address(self.endpoint.path()));
        let request = self.request(request.json(&body));
        let answer = request.send().await.map_err(|e| transport(&e))?;
        let status = answer.status().as_u16();
        if status != 200 {
            let message = short(&answer.text().await.unwrap_or_default());
            return Err(Failure::Status { status, message });
        }
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        let (mut bytes, mut end) = (answer.bytes_stream(), AnswerEnd::Open);
        while let Some(piece) = bytes.next().await {
            let piece = piece.map_err(|error| transport(&error))?;
            let now = epoch.elapsed();
            let fed = parser.feed(&piece, &mut events);
            fed.map_err(|error| Failure::Malformed(error.to_string()))?;
            for event in events.drain(..) {
                end = end.max(read_event(&event, now, record)?);
            }
            if end == AnswerEnd::Done {
                return Ok(());
            }
        }
        match end {
            AnswerEnd::Open => Err(Failure::Cut("no finish_reason, no [DONE]".to_owned())),
            AnswerEnd::Finished | AnswerEnd::Done => Ok(()),
        }
    }

    fn body(&self, prompt: &str, shape: &RequestShape, variant: Option<Variant>) -> Value {
        let mut body = json!({
            "model": self.model,
            "max_tokens": shape.max_tokens,
            "temperature": shape.temperature,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.endpoint {
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": prompt}]),
            Endpoint::Completions => body["prompt"] = json!(prompt),
        }
        if shape.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        if let Some(variant) = variant {
            body["midpo"] = json!({"variant": variant.as_str()});
        }
        for (key, value) in &shape.extra {
            body[key.as_str()] = value.clone();
        }
        body
    }

    fn address(&self, path: &str) -> Url {
        let mut address = self.base.clone();
        let prefix = address.path().trim_end_matches('/').to_owned();
        address.set_path(&format!("{prefix}{path}"));
        address
    }

    fn request(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }
}

/// How far an answer's end has come; later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum AnswerEnd {
    Open,
    /// A `finish_reason` has come; usage may follow.
    Finished,
    /// `[DONE]`.
    Done,
}

#[derive(Deserialize)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
    text: Option<String>,
    token_ids: Option<Vec<Value>>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
}

impl Choice {
    /// Whether the chunk brings something of the answer; the role chunk and the last one do not.
    fn has_tokens(&self) -> bool {
        let full = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        let delta = self.delta.as_ref();
        full(&self.text)
            || self.token_ids.as_ref().is_some_and(|ids| !ids.is_empty())
            || delta.is_some_and(|delta| full(&delta.content) || full(&delta.reasoning_content))
    }
}

fn read_event(
    event: &SseEvent,
    now: Duration,
    record: &mut RequestRecord,
) -> Result<AnswerEnd, Failure> {
    if event.data == "[DONE]" {
        return Ok(AnswerEnd::Done);
    }
    let chunk: Chunk = match serde_json::from_str(&event.data) {
        Ok(chunk) => chunk,
        Err(_) if event.kind == "error" => return Err(Failure::Event(short(&event.data))),
        Err(error) => {
            let text = short(&event.data);
            return Err(Failure::Malformed(format!("{error} in `{text}`")));
        }
    };
    if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
        return Err(Failure::Event(short(&error.to_string())));
    }
    // Some servers send a running count with every chunk: the last one holds.
    record.usage = chunk.usage.or(record.usage);
    let choices = chunk.choices.unwrap_or_default();
    if choices.iter().any(Choice::has_tokens) {
        record.chunks.push(now);
    }
    let finished = choices.iter().any(|choice| choice.finish_reason.is_some());
    Ok(if finished {
        AnswerEnd::Finished
    } else {
        AnswerEnd::Open
    })
}

fn transport(error: &reqwest::Error) -> Failure {
    if error.is_timeout() {
        Failure::Timeout
    } else if error.is_connect() {
        Failure::Connect(short(&chain(error)))
    } else {
        Failure::Cut(short(&chain(error)))
    }
}

/// The error and its causes on one line: reqwest's own text names only the outermost.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    let causes: String = causes.map(|cause| format!(": {cause}")).collect();
    format!("{error}{causes}")
}

fn short(text: &str) -> String {
    let mut line: String = text.chars().take(MESSAGE_CHARS_MAX).collect();
    if line.len() < text.len() {
        line.push_str("...");
    }
    line.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn target(url: &str, endpoint: Endpoint) -> Result<Target, BenchError> {
        Target::new(url, "m", None, endpoint, Duration::from_secs(1))
    }

    fn shape() -> RequestShape {
        RequestShape {
            max_tokens: 8,
            temperature: 0.0,
            ignore_eos: true,
            extra: Map::new(),
        }
    }

    #[test]
    fn url_is_the_servers_root_however_it_is_written() {
        for url in [
            "http://h:1",
            "http://h:1/",
            "http://h:1/v1",
            "http://h:1/v1/",
        ] {
            let target = target(url, Endpoint::Chat).unwrap();
            let address = target.address("/v1/models");
            assert_eq!(address.as_str(), "http://h:1/v1/models", "{url}");
        }
        let behind = target("http://h/api/v1", Endpoint::Chat).unwrap();
        assert_eq!(behind.address("/x").as_str(), "http://h/api/x");
        for url in ["", "h:1", "https://h", "ftp://h", "http://"] {
            let error = target(url, Endpoint::Chat).unwrap_err().to_string();
            assert!(error.starts_with("--url: expected"), "{url}: {error}");
        }
    }

    #[test]
    fn body_has_what_was_asked_for_and_extra_wins() {
        let chat = target("http://h", Endpoint::Chat).unwrap();
        let body = chat.body("hi", &shape(), Some(Variant::Safety));
        assert_eq!(body["messages"][0]["content"], "hi");
        assert_eq!(body["midpo"]["variant"], "safety");
        assert_eq!(body["ignore_eos"], true);
        let mut shape = shape();
        shape.ignore_eos = false;
        shape.extra.insert("max_tokens".to_owned(), json!(3));
        let completions = target("http://h", Endpoint::Completions).unwrap();
        let body = completions.body("hi", &shape, None);
        assert_eq!(
            (&body["prompt"], &body["max_tokens"]),
            (&json!("hi"), &json!(3))
        );
        assert!(body.get("ignore_eos").is_none() && body.get("midpo").is_none());
    }

    fn check(kind: &str, data: &str, want: Result<AnswerEnd, &str>, chunks: usize) {
        let mut record = RequestRecord::new(None, Duration::ZERO);
        let event = SseEvent {
            kind: kind.to_owned(),
            data: data.to_owned(),
        };
        let found = read_event(&event, Duration::from_secs(1), &mut record);
        assert_eq!(
            found.map_err(|e| e.kind()),
            want.map_err(str::to_owned),
            "{data}"
        );
        assert_eq!(record.chunks.len(), chunks, "{data}");
    }

    #[test]
    fn read_event_counts_only_chunks_that_bring_something() {
        use AnswerEnd::{Done, Finished, Open};
        let role =
            r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
        check("", role, Ok(Open), 0);
        check(
            "",
            r#"{"choices":[{"delta":{"content":"a"}}]}"#,
            Ok(Open),
            1,
        );
        check(
            "",
            r#"{"choices":[{"delta":{"reasoning_content":"a"}}]}"#,
            Ok(Open),
            1,
        );
        check(
            "",
            r#"{"choices":[{"text":"a","finish_reason":null}]}"#,
            Ok(Open),
            1,
        );
        check(
            "",
            r#"{"choices":[{"text":"","token_ids":[7]}]}"#,
            Ok(Open),
            1,
        );
        check(
            "",
            r#"{"choices":[{"text":"a","finish_reason":"stop"}]}"#,
            Ok(Finished),
            1,
        );
        check(
            "",
            r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}"#,
            Ok(Open),
            0,
        );
        check("", r#"{"choices":null}"#, Ok(Open), 0);
        check("", "[DONE]", Ok(Done), 0);
        check("", r#"{"error":{"message":"no"}}"#, Err("error_event"), 0);
        check("error", "no", Err("error_event"), 0);
        check("", "no", Err("malformed"), 0);
    }

    #[test]
    fn output_tokens_are_the_servers_count_where_there_is_one() {
        let mut record = RequestRecord::new(None, Duration::ZERO);
        record.chunks = vec![Duration::ZERO; 3];
        assert_eq!(record.output_tokens(), 3);
        record.usage = Some(Usage {
            prompt_tokens: 1,
            completion_tokens: 9,
        });
        assert_eq!(record.output_tokens(), 9);
    }
}
