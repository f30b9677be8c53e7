//! Answers from an OpenAI-compatible server.

use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::{Answer, Turn, TurnError};
use crate::bench::SseParser;
use crate::cli::CliError;
use crate::config::TalkOptions;
use crate::openai::GateSummary;

/// Time to reach the server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence of a stream; servers send a comment long before.
const READ_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest part of a server's error that is shown.
const ERROR_CHARS_MAX: usize = 500;

/// A server and a model on it.
pub(super) struct Remote {
    client: reqwest::Client,
    /// Without `/v1`.
    url: String,
    key: Option<String>,
    model: String,
}

impl Remote {
    pub(super) async fn connect(url: &str, options: &TalkOptions) -> Result<Self, CliError> {
        let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let remote = |reason: &dyn std::fmt::Display| CliError::Remote {
            url: url.clone(),
            reason: reason.to_string(),
        };
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|error| remote(&error))?;
        let mut peer = Self {
            client,
            url: url.clone(),
            key: options.key.as_ref().map(|key| key.0.clone()),
            model: options.name.clone().unwrap_or_default(),
        };
        if peer.model.is_empty() {
            peer.model = peer.first_model().await.map_err(|error| remote(&error))?;
        }
        Ok(peer)
    }

    async fn first_model(&self) -> Result<String, TurnError> {
        let request = self.client.get(format!("{}/v1/models", self.url));
        let response = self.send(request).await?;
        let models: Value = response.json().await.map_err(|error| transport(&error))?;
        let first = models["data"][0]["id"].as_str();
        first
            .map(str::to_owned)
            .ok_or_else(|| TurnError::new("it lists no model; name one with --name"))
    }

    pub(super) async fn answer(
        &self,
        turn: &Turn<'_>,
        on_text: &mut impl FnMut(&str),
    ) -> Result<Answer, TurnError> {
        let request = self
            .client
            .post(format!("{}/v1/chat/completions", self.url));
        let response = self.send(request.json(&self.body(turn))).await?;
        let mut answer = Answer {
            text: String::new(),
            gates: None,
            finish_reason: String::new(),
        };
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        let mut bytes = response.bytes_stream();
        while let Some(piece) = bytes.next().await {
            let piece = piece.map_err(|error| transport(&error))?;
            parser.feed(&piece, &mut events).map_err(TurnError::new)?;
            for event in events.drain(..) {
                if event.data == "[DONE]" {
                    return Ok(answer);
                }
                let chunk: Value = serde_json::from_str(&event.data).map_err(TurnError::new)?;
                read_chunk(&chunk, &mut answer, on_text)?;
            }
        }
        if answer.finish_reason.is_empty() {
            return Err(TurnError::new("the answer was cut off"));
        }
        Ok(answer)
    }

    fn body(&self, turn: &Turn<'_>) -> Value {
        let messages: Vec<Value> = turn
            .messages
            .iter()
            .map(|message| json!({"role": message.role, "content": message.content}))
            .collect();
        let mut body = json!({
            "model": self.model,
            "messages": messages,
            "max_tokens": turn.max_tokens,
            "stream": true,
        });
        if let Some(temperature) = turn.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(seed) = turn.seed {
            body["seed"] = json!(seed);
        }
        // Other servers do not know `midpo`: it is sent only where something is asked of it.
        if let Some(variant) = turn.variant {
            body["midpo"]["variant"] = json!(variant.as_str());
        }
        if turn.gates {
            body["midpo"]["return_gates"] = json!("summary");
        }
        body
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response, TurnError> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.map_err(|error| transport(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let json: Value = serde_json::from_str(&text).unwrap_or_default();
        let message = json["error"]["message"].as_str().unwrap_or(&text);
        let message: String = message.chars().take(ERROR_CHARS_MAX).collect();
        Err(TurnError(format!("{status}: {message}")))
    }
}

fn read_chunk(
    chunk: &Value,
    answer: &mut Answer,
    on_text: &mut impl FnMut(&str),
) -> Result<(), TurnError> {
    if let Some(message) = chunk["error"]["message"].as_str() {
        return Err(TurnError::new(message));
    }
    let choice = &chunk["choices"][0];
    if let Some(text) = choice["delta"]["content"].as_str() {
        answer.text.push_str(text);
        on_text(text);
    }
    if let Some(reason) = choice["finish_reason"].as_str() {
        answer.finish_reason = reason.to_owned();
    }
    let gates: Option<GateSummary> =
        serde_json::from_value(choice["midpo"]["gates"].clone()).unwrap_or_default();
    answer.gates = gates.or(answer.gates);
    Ok(())
}

/// reqwest says only that something failed; its source says what.
fn transport(error: &reqwest::Error) -> TurnError {
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        reason = format!("{reason}: {cause}");
        source = cause.source();
    }
    TurnError(reason)
}
