//! What operators and their machines ask: health, readiness, metrics, version, the schema, the playground.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use serde_json::json;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::AppState;
use super::{chat, completions, models, tokenize};
use crate::engine::EngineState;
use crate::openai::Version;

/// Time without a step, while there is work, after which the process is to be started anew. Far above the longest step:
/// a full prefill chunk of a large model on a small machine.
const STALL_MAX: Duration = Duration::from_secs(300);

/// Whether the process is alive: the engine's thread lives, and advances while there is work.
#[utoipa::path(get, path = "/health", tag = "operation",
    responses((status = 200, description = "Alive"), (status = 503, description = "Start it anew")))]
pub async fn health(State(state): State<AppState>) -> Response {
    let health = state.engine().health();
    let stalled = health.stalled.is_some_and(|since| since > STALL_MAX);
    match (health.state, stalled) {
        (EngineState::Dead, _) => unavailable("dead"),
        (_, true) => unavailable("stalled"),
        _ => Json(json!({"status": "ok"})).into_response(),
    }
}

/// Whether new requests are taken.
#[utoipa::path(get, path = "/ready", tag = "operation",
    responses((status = 200, description = "Ready"), (status = 503, description = "Send requests elsewhere")))]
pub async fn ready(State(state): State<AppState>) -> Response {
    match state.engine().state() {
        EngineState::Running => Json(json!({"status": "ready"})).into_response(),
        EngineState::Draining => unavailable("draining"),
        EngineState::Stopped => unavailable("stopped"),
        EngineState::Dead => unavailable("dead"),
    }
}

fn unavailable(status: &str) -> Response {
    (
        StatusCode::SERVICE_UNAVAILABLE,
        Json(json!({"status": status})),
    )
        .into_response()
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "operation",
    responses((status = 200, description = "Prometheus' text format", body = String, content_type = "text/plain")))]
pub async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.metrics().render())
}

/// Version of the program, and the model's hash.
#[utoipa::path(get, path = "/version", tag = "operation", responses((status = 200, body = Version)))]
pub async fn version(State(state): State<AppState>) -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model_fingerprint: state.model().fingerprint.clone(),
    })
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "operation",
    responses((status = 200, description = "OpenAPI", body = Object)))]
pub async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(ApiDoc::openapi())
}

/// A page to try the model with.
#[utoipa::path(get, path = "/", tag = "operation",
    responses((status = 200, description = "A page to try the model with", body = String, content_type = "text/html")))]
pub async fn playground() -> impl IntoResponse {
    // The page loads nothing from anywhere and talks to its own origin only; what it shows is the model's words.
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";
    (
        [
            (header::CONTENT_SECURITY_POLICY, policy),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
        ],
        Html(include_str!("playground/index.html")),
    )
}

/// The schema of everything that is served.
#[derive(OpenApi)]
#[openapi(
    info(title = "midpo", description = "OpenAI's API over a routed Llama, with the object `midpo` each way."),
    paths(
        chat::create, completions::create, models::list, models::retrieve, tokenize::tokenize, tokenize::detokenize,
        health, ready, metrics, version, openapi, playground
    ),
    modifiers(&BearerKey)
)]
pub struct ApiDoc;

/// API keys, where the operator has configured any.
struct BearerKey;

impl Modify for BearerKey {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        components.add_security_scheme("api_key", scheme);
    }
}
