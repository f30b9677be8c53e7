//! A server on a port of its own, and a client that reads what it says.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use midpo::backend::{Backend, KvFormat, WeightFormat, reference::Reference};
use midpo::checkpoint::{self, Sources, Verify};
use midpo::config::{EngineConfig, Policy, RequestLimits, ServerConfig, Speculation};
use midpo::engine::{self, Engine, EngineState, EngineThread};
use midpo::metrics::Metrics;
use midpo::model::RoutedLlama;
use midpo::server::{self, AppState, Ended, SamplingDefaults, ServedModel};
use midpo::text::{ChatTemplate, SpecialTokens, Tokenizer};
use midpo::types::{FinishReason, Variant};
use reqwest::{Response, StatusCode};
use safetensors::SafeTensors;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Turns of a wait for something that must happen.
const POLLS_MAX: usize = 10_000;

/// The name under which tests serve.
pub const MODEL: &str = "tiny";

/// What a server is started with.
pub struct Setup {
    pub experts: bool,
    pub engine: EngineConfig,
    pub server: ServerConfig,
    pub drain_timeout: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            experts: true,
            engine: EngineConfig {
                batch_tokens_max: 64,
                step_time_max: Duration::from_millis(200),
                sequences_max: 16,
                queue_max: 64,
                context_tokens_max: 320,
                kv_blocks: 256,
                prefix_cache: true,
                // As by default; answers are the same without.
                speculation: Speculation {
                    speculative_tokens: 3,
                    prompt_lookup_max: 5,
                    prompt_lookup_min: 2,
                },
            },
            server: ServerConfig {
                served_model_name: MODEL.to_owned(),
                api_keys: Vec::new(),
                open_policy: Policy::open(),
                body_bytes_max: 64 * 1024,
                request_timeout: Duration::from_secs(120),
                keep_alive: Duration::from_secs(15),
                cors_origins: Vec::new(),
                log_content: false,
                limits: RequestLimits {
                    choices_max: 8,
                    stop_strings_max: 4,
                    stop_bytes_max: 32,
                    logit_bias_max: 8,
                    prompts_max: 8,
                },
                default_max_tokens: Some(16),
            },
            drain_timeout: Duration::from_secs(120),
        }
    }
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-routed")
}

/// One of the fixture's golden files.
pub fn golden(name: &str) -> Value {
    let path = fixture().join("golden").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The ids of one of its golden prompts.
pub fn golden_ids(prompt: &str) -> Vec<i64> {
    let bytes = std::fs::read(fixture().join("golden/inference_f32.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = tensors.tensor(&format!("{prompt}.input_ids")).unwrap();
    let (ids, _) = ids.data().as_chunks::<8>();
    ids.iter().map(|id| i64::from_le_bytes(*id)).collect()
}

pub struct TestServer {
    pub base: String,
    pub metrics: Arc<Metrics>,
    client: reqwest::Client,
    shutdown: Option<oneshot::Sender<()>>,
    serving: JoinHandle<std::io::Result<Ended>>,
    engine: EngineThread,
}

impl TestServer {
    pub async fn start() -> Self {
        Self::with(Setup::default()).await
    }

    pub async fn with(setup: Setup) -> Self {
        // Plain loops: the same bits on every machine, which the transcripts need.
        Self::over(Reference, setup).await
    }

    pub async fn over<B: Backend + Send + 'static>(backend: B, setup: Setup) -> Self {
        let directory = fixture();
        let expert = |name: &str| setup.experts.then(|| directory.join(name));
        let checkpoint = checkpoint::load(&Sources {
            model: directory.clone(),
            safety: expert("safety"),
            helpfulness: expert("helpfulness"),
            router: expert("router.pth"),
            verify: Verify::default(),
        })
        .unwrap();
        let metrics = Arc::new(Metrics::new(MODEL));
        let options = engine::model_options(&setup.engine, KvFormat::F32, WeightFormat::F32);
        let model = RoutedLlama::new(backend, &checkpoint, options).unwrap();
        let text = &checkpoint.text;
        let served = ServedModel {
            tokenizer: Tokenizer::new(&text.tokenizer_json).unwrap(),
            template: ChatTemplate::new(
                text.chat_template.as_deref(),
                SpecialTokens {
                    bos_token: text.bos_token.clone(),
                    eos_token: text.eos_token.clone(),
                    others: text.special_tokens.clone(),
                },
            )
            .unwrap(),
            ends: model.eos_token_ids().to_vec(),
            defaults: SamplingDefaults::default(),
            created: 1_700_000_000,
            fingerprint: checkpoint.fingerprint.clone(),
        };
        let (handle, engine) = Engine::spawn(model, &setup.engine, Arc::clone(&metrics)).unwrap();
        let state = AppState::new(handle, served, setup.server, Arc::clone(&metrics));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (shutdown, told) = oneshot::channel::<()>();
        let until = async {
            let _ = told.await;
        };
        Self {
            base,
            metrics,
            client: reqwest::Client::builder().no_proxy().build().unwrap(),
            shutdown: Some(shutdown),
            serving: tokio::spawn(server::serve(listener, state, until, setup.drain_timeout)),
            engine,
        }
    }

    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        self.client.request(method, format!("{}{path}", self.base))
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        read(self.request("GET", path).send().await.unwrap()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        read(self.request("POST", path).json(body).send().await.unwrap()).await
    }

    /// The answer of a request that must succeed.
    pub async fn answer(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.post(path, &body).await;
        assert_eq!(status, 200, "{body}\n{answer}");
        answer
    }

    /// The events of a stream, comments left out.
    pub async fn events(&self, path: &str, mut body: Value) -> Vec<String> {
        body["stream"] = true.into();
        let response = self.request("POST", path).json(&body).send().await.unwrap();
        assert_eq!(response.status(), 200, "{body}");
        let kind = response.headers()["content-type"].to_str().unwrap();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        let text = response.text().await.unwrap();
        let events = text.split("\n\n").filter(|event| !event.is_empty());
        events
            .filter_map(|event| match event.strip_prefix("data: ") {
                Some(data) => Some(data.to_owned()),
                None => {
                    assert!(event.starts_with(':'), "{event:?}");
                    None
                }
            })
            .collect()
    }

    /// The chunks of a stream that ends well.
    pub async fn chunks(&self, path: &str, body: Value) -> Vec<Value> {
        let mut events = self.events(path, body).await;
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events
            .iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }

    /// Waits until nothing runs, waits or holds a block.
    pub async fn rest(&self) {
        until("rest", || {
            let held = midpo::metrics::BlockState::Held;
            let finished: u64 = by_reason(&self.metrics).iter().sum();
            let taken: u64 = self.metrics.requests.iter().map(|count| count.get()).sum();
            self.metrics.sequences_running.get() == 0
                && self.metrics.sequences_waiting.get() == 0
                && self.metrics.kv_blocks.of(held).get() == 0
                && finished == taken
        })
        .await;
    }

    /// Tells the server to stop, as a signal would.
    pub fn begin_shutdown(&mut self) {
        let _ = self.shutdown.take().map(|shutdown| shutdown.send(()));
    }

    /// How it ended.
    pub async fn ended(self) -> (Ended, EngineState) {
        let ended = self.serving.await.unwrap().unwrap();
        (ended, self.engine.join())
    }
}

/// Finished requests by reason, over all variants.
pub fn by_reason(metrics: &Metrics) -> [u64; 4] {
    use FinishReason::{Cancelled, Failed, Length, Stop};
    [Stop, Length, Cancelled, Failed].map(|reason| {
        let of = |variant: Variant| metrics.requests_finished.of(variant).of(reason).get();
        Variant::ALL.into_iter().map(of).sum()
    })
}

/// Yields to everybody else until `condition` holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let mut turns = tokio::time::interval(Duration::from_millis(1));
    for _ in 0..POLLS_MAX {
        if condition() {
            return;
        }
        turns.tick().await;
    }
    panic!("never: {what}");
}

pub async fn read(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let text = response.text().await.unwrap();
    let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
    (status, value)
}

/// Ids and times of a response are never the same.
pub fn normalised(mut value: Value) -> Value {
    if let Some(id) = value.get_mut("id") {
        let prefix = id.as_str().unwrap().split('-').next().unwrap().to_owned();
        *id = format!("{prefix}-ID").into();
    }
    if let Some(created) = value.get_mut("created") {
        assert!(created.as_u64().unwrap() > 1_700_000_000);
        *created = 0.into();
    }
    if let Some(fingerprint) = value.get_mut("system_fingerprint") {
        assert!(fingerprint.as_str().unwrap().starts_with("midpo-"));
        *fingerprint = "FINGERPRINT".into();
    }
    value
}
