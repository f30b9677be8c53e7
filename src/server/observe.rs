//! Around every request: its id, its span, its place in the metrics, and the count that a drain waits for.

use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt;
use tokio::sync::watch;
use tracing::Instrument;
use uuid::Uuid;

use super::AppState;
use crate::metrics::{GaugeGuard, Label, Metrics, Route, Status};

use std::sync::Arc;

/// The header that carries a request's id, both ways.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Characters of an id that a client chose.
const REQUEST_ID_CHARS_MAX: usize = 128;

/// The client's id where it is one that can stand in a log line; else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok());
    let legal = |id: &&str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte);
        (1..=REQUEST_ID_CHARS_MAX).contains(&id.len()) && id.bytes().all(plain)
    };
    match given.filter(legal) {
        Some(id) => id.to_owned(),
        None => Uuid::new_v4().to_string(),
    }
}

/// Requests that generate, while they run.
#[derive(Clone, Debug, Default)]
pub struct Running(Arc<watch::Sender<usize>>);

impl Running {
    fn enter(&self) -> RunningGuard {
        self.0.send_modify(|count| *count += 1);
        RunningGuard(self.clone())
    }

    /// How many.
    pub fn count(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until there are none.
    pub async fn ended(&self) {
        // Fails only when the sender is gone, and `self` holds it.
        let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
    }
}

struct RunningGuard(Running);

impl Drop for RunningGuard {
    fn drop(&mut self) {
        self.0
            .0
            .send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// One request's place in the metrics, until the last byte of its response or the loss of its client.
struct Tally {
    metrics: Arc<Metrics>,
    route: Route,
    started: Instant,
    status: Option<Status>,
    _in_flight: GaugeGuard,
    _running: Option<RunningGuard>,
}

impl Tally {
    fn new(state: &AppState, route: Route) -> Self {
        let generates = matches!(route, Route::ChatCompletions | Route::Completions);
        Self {
            metrics: Arc::clone(state.metrics()),
            route,
            started: Instant::now(),
            status: None,
            _in_flight: state.metrics().http_requests_in_flight.hold(),
            _running: generates.then(|| state.running().enter()),
        }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        let status = self.status.unwrap_or(Status::ClientClosed);
        self.metrics
            .http_requests
            .of(self.route)
            .of(status)
            .increment();
        let duration = self.metrics.http_request_duration.of(self.route);
        duration.observe(self.started.elapsed().as_secs_f64());
    }
}

/// A route by its pattern, so that no client makes labels.
fn route(request: &Request) -> Route {
    let pattern = request
        .extensions()
        .get::<MatchedPath>()
        .map(MatchedPath::as_str);
    let pattern = match pattern {
        Some("/v1/models/{*id}") => "/v1/models",
        Some(pattern) => pattern,
        None => return Route::Other,
    };
    let found = Route::ALL.iter().find(|route| route.as_str() == pattern);
    found.copied().unwrap_or(Route::Other)
}

/// The outermost middleware.
pub async fn observe(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let route = route(&request);
    let id = request_id(request.headers());
    let span = tracing::info_span!(
        "request",
        request_id = %id,
        method = %request.method(),
        route = route.as_str(),
        key = tracing::field::Empty,
        variant = tracing::field::Empty,
        prompt_tokens = tracing::field::Empty,
        completion_tokens = tracing::field::Empty,
        finish_reason = tracing::field::Empty,
    );
    let mut tally = Tally::new(&state, route);
    let mut response = next.run(request).instrument(span.clone()).await;
    tally.status = Some(Status::of(response.status().as_u16()));
    span.in_scope(|| {
        let seconds = tally.started.elapsed().as_secs_f64();
        tracing::debug!(status = response.status().as_u16(), seconds, "responded");
    });
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    hold_while_streaming(response, tally)
}

/// A whole body is in memory by now; a stream keeps its request open, and its tally with it.
fn hold_while_streaming(response: Response, tally: Tally) -> Response {
    let content_type = response.headers().get(header::CONTENT_TYPE);
    let streams =
        content_type.is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
    if !streams {
        return response;
    }
    let (parts, body) = response.into_parts();
    let stream = body.into_data_stream().inspect(move |_| {
        let _held = &tally;
    });
    Response::from_parts(parts, Body::from_stream(stream))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    #[test]
    fn request_id_is_the_clients_only_where_it_is_harmless() {
        let given = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(value).unwrap());
            request_id(&headers)
        };
        assert_eq!(given("abc-1.2_3:4"), "abc-1.2_3:4");
        for value in [
            "",
            "two words",
            "a\"b",
            "{}",
            &"x".repeat(REQUEST_ID_CHARS_MAX + 1),
        ] {
            let id = given(value);
            assert!(
                id != value && Uuid::parse_str(&id).is_ok(),
                "{value:?} -> {id:?}"
            );
        }
        assert!(Uuid::parse_str(&request_id(&HeaderMap::new())).is_ok());
    }

    #[tokio::test]
    async fn running_ends_when_the_last_guard_is_dropped() {
        let running = Running::default();
        let guards = [running.enter(), running.enter()];
        assert_eq!(running.count(), 2);
        drop(guards);
        running.ended().await;
        assert_eq!(running.count(), 0);
    }
}
