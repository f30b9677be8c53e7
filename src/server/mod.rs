//! HTTP: a request becomes a submission, and the engine's events become OpenAI's answers. All that it holds of the engine is a handle.
//!
//! [`router`] is the whole API as a service; [`serve`] runs it on a listener until it is told to stop, then drains.

mod answer;
mod auth;
mod chat;
mod completions;
mod error;
mod gates;
mod head;
mod limits;
mod logprobs;
mod models;
mod observe;
mod ops;
mod prompt;
mod sse;
mod tokenize;
mod unsupported;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use crate::config::ServerConfig;
use crate::engine::{EngineHandle, EngineState};
use crate::metrics::Metrics;
use crate::text::{ChatTemplate, Tokenizer};
use crate::types::TokenId;

pub use error::ApiError;
pub use ops::ApiDoc;

/// Time that connections get to close once nothing runs any more.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The served model, as far as HTTP needs to know it.
pub struct ServedModel {
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Chats to text.
    pub template: ChatTemplate,
    /// The model's ends of sequence: they end an answer and leave no text.
    pub ends: Vec<TokenId>,
    /// Where a request names no value.
    pub defaults: SamplingDefaults,
    /// Unix seconds at which it was loaded.
    pub created: u64,
    /// Hash of its weights, in hexadecimal.
    pub fingerprint: String,
}

/// Sampling where a request names no value: the model's own (`generation_config.json`), else OpenAI's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// 0 to 2.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

/// What every handler holds. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

struct Inner {
    engine: EngineHandle,
    model: ServedModel,
    config: ServerConfig,
    metrics: Arc<Metrics>,
    keyring: auth::Keyring,
    running: observe::Running,
}

impl AppState {
    /// Joins the parts.
    pub fn new(
        engine: EngineHandle,
        model: ServedModel,
        config: ServerConfig,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self(Arc::new(Inner {
            keyring: auth::Keyring::new(&config),
            engine,
            model,
            config,
            metrics,
            running: observe::Running::default(),
        }))
    }

    fn engine(&self) -> &EngineHandle {
        &self.0.engine
    }

    fn model(&self) -> &ServedModel {
        &self.0.model
    }

    fn config(&self) -> &ServerConfig {
        &self.0.config
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    fn keyring(&self) -> &auth::Keyring {
        &self.0.keyring
    }

    fn running(&self) -> &observe::Running {
        &self.0.running
    }

    /// Answer tokens where a request names no limit: the operator's default, and never more than the context has room for.
    fn default_max_tokens(&self, prompt_tokens: usize) -> u32 {
        let room = self
            .engine()
            .limits()
            .context_tokens_max
            .saturating_sub(prompt_tokens);
        // At least 1: a prompt that fills the context is then refused with both numbers.
        let room = u32::try_from(room.max(1)).unwrap_or(u32::MAX);
        self.config()
            .default_max_tokens
            .map_or(room, |default| default.min(room))
    }

    fn log_prompt(&self, ids: &[TokenId]) {
        if self.config().log_content {
            let prompt = self.model().tokenizer.decode(ids, false);
            tracing::info!(prompt, "prompt");
        }
    }

    fn log_answer(&self, choice: u32, text: &str) {
        if self.config().log_content && !text.is_empty() {
            tracing::info!(choice, text, "answer");
        }
    }
}

/// The whole API.
pub fn router(state: AppState) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        // All of the rest: names of models may hold slashes, and clients do not escape them.
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route_layer(middleware::from_fn_with_state(
            state.clone(),
            auth::authenticate,
        ));
    // The schema tells nothing that the source does not, and the page asks for a key itself.
    let open = Router::new()
        .route("/health", get(ops::health))
        .route("/ready", get(ops::ready))
        .route("/metrics", get(ops::metrics))
        .route("/version", get(ops::version))
        .route("/openapi.json", get(ops::openapi))
        .route("/", get(ops::playground));
    let mut app = guarded
        .merge(open)
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(state.config().body_bytes_max))
        .layer(CatchPanicLayer::custom(error::panicked))
        // Leaves event streams alone: gzip would hold events back.
        .layer(CompressionLayer::new());
    if let Some(cors) = cors(&state.config().cors_origins) {
        app = app.layer(cors);
    }
    app.layer(middleware::from_fn_with_state(
        state.clone(),
        observe::observe,
    ))
    .with_state(state)
}

async fn no_route(request: Request) -> ApiError {
    ApiError::NoRoute {
        method: request.method().to_string(),
        path: error::echo(request.uri().path()),
    }
}

async fn no_method(request: Request) -> ApiError {
    ApiError::Method {
        method: request.method().to_string(),
        path: error::echo(request.uri().path()),
    }
}

/// `None`: off.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::from(Any)
    } else {
        let values = origins
            .iter()
            .filter_map(|origin| HeaderValue::from_str(origin).ok());
        AllowOrigin::list(values)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            HeaderName::from_static("x-request-id"),
        ])
        .expose_headers([HeaderName::from_static("x-request-id"), header::RETRY_AFTER]);
    Some(layer)
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Told to stop, and everything that ran was answered.
    Drained,
    /// Told to stop, and these requests were still running when the time was over: they were cut off.
    CutOff {
        /// How many.
        requests: usize,
    },
    /// The engine died: the process should end with a failure.
    EngineDead,
}

/// Serves until `shutdown` completes or the engine dies. Then nothing new is admitted (503, and `/ready` says so), what runs
/// may finish within `drain_timeout`, and the connections are closed.
/// # Errors
/// Those of the listener.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send,
    drain_timeout: Duration,
) -> io::Result<Ended> {
    let listener = listener.tap_io(|stream| {
        // A token is a small packet, and the next one waits for nothing.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection keeps Nagle's algorithm");
        }
    });
    let (close, closed) = oneshot::channel::<()>();
    let server = axum::serve(listener, router(state.clone())).with_graceful_shutdown(async {
        let _ = closed.await;
    });
    let mut server = tokio::spawn(server.into_future());
    let engine = state.engine().clone();
    let dead = tokio::select! {
        finished = &mut server => return finished.map_err(io::Error::other)?.map(|()| Ended::Drained),
        () = shutdown => false,
        ended = engine.ended() => ended == EngineState::Dead,
    };
    if !dead {
        tracing::info!(running = state.running().count(), "draining");
    }
    engine.drain();
    // The listener stays open meanwhile: balancers must see that `/ready` has turned.
    let drained = tokio::time::timeout(drain_timeout, state.running().ended()).await;
    let requests = state.running().count();
    let _ = close.send(());
    let timeout = if drained.is_ok() {
        CLOSE_TIMEOUT
    } else {
        Duration::ZERO
    };
    if tokio::time::timeout(timeout, &mut server).await.is_err() {
        server.abort();
    }
    Ok(match (dead, drained) {
        (true, _) => Ended::EngineDead,
        (false, Ok(())) => Ended::Drained,
        (false, Err(_)) => Ended::CutOff { requests },
    })
}
