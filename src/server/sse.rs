//! Answers as server-sent events, as OpenAI streams them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt};
use serde::Serialize;

use super::answer::{Answers, Progress};
use super::error::ApiError;
use crate::openai::Usage;

/// The last event of a stream that is whole.
const DONE: &str = "[DONE]";

/// What a step of an answer is on the wire.
pub trait Chunks: Send + 'static {
    /// A chunk.
    type Chunk: Serialize;

    /// The chunks of one step; often none.
    fn step(&mut self, progress: Progress) -> Vec<Self::Chunk>;

    /// The chunk after the last choice has ended, where the client wants one.
    fn end(&mut self, usage: Usage) -> Option<Self::Chunk>;
}

/// A streamed response. An error is the last event, without [`DONE`]: what came before is not an answer.
pub fn respond(answers: Answers, chunks: impl Chunks, keep_alive: Duration) -> Response {
    let events =
        lines(answers, chunks).map(|line| Ok::<_, Infallible>(Event::default().data(line)));
    let keep_alive = KeepAlive::new().interval(keep_alive).text("keep-alive");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // Proxies of nginx's kind would collect the events otherwise.
    response.headers_mut().insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}

struct Lines<C> {
    answers: Answers,
    chunks: C,
    ready: VecDeque<String>,
    ended: bool,
}

fn lines(answers: Answers, chunks: impl Chunks) -> impl Stream<Item = String> + Send + 'static {
    let lines = Lines {
        answers,
        chunks,
        ready: VecDeque::new(),
        ended: false,
    };
    stream::unfold(lines, |mut lines| async move {
        let line = lines.next().await?;
        Some((line, lines))
    })
}

impl<C: Chunks> Lines<C> {
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && !self.ended {
            self.advance().await;
        }
        self.ready.pop_front()
    }

    async fn advance(&mut self) {
        let written = match self.answers.next().await {
            Some(Ok(progress)) => {
                let chunks = self.chunks.step(progress);
                chunks.iter().map(json).collect::<Result<Vec<String>, _>>()
            }
            Some(Err(error)) => Err(error),
            None => {
                self.ended = true;
                let last = self.chunks.end(self.answers.usage());
                let written = last.iter().map(json).collect::<Result<Vec<String>, _>>();
                written.map(|mut lines| {
                    lines.push(DONE.to_owned());
                    lines
                })
            }
        };
        match written {
            Ok(lines) => self.ready.extend(lines),
            Err(error) => {
                self.ended = true;
                error.log();
                self.ready.extend(json(&error.body()).ok());
            }
        }
    }
}

fn json(value: &impl Serialize) -> Result<String, ApiError> {
    serde_json::to_string(value).map_err(|error| {
        tracing::error!(%error, "a chunk cannot be written");
        ApiError::Internal
    })
}
