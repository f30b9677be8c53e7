//! What operators see: ids, metrics, health, drain, cancellation.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use midpo::backend::cpu::{Cpu, CpuOptions};
use midpo::engine::EngineState;
use midpo::metrics::{Label, Route, Status};
use midpo::server::Ended;
use midpo::types::Variant;
use serde_json::{Value, json};

use crate::simulation::fragile::{Faults, Fragile};

use super::harness::{MODEL, Setup, TestServer, by_reason, read, until};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Long enough that whatever a test does meanwhile is done before the answer is.
fn long(stream: bool) -> Value {
    json!({"model": MODEL, "prompt": "hello", "max_tokens": 300, "n": 4, "ignore_eos": true, "stream": stream})
}

#[tokio::test]
async fn request_ids_come_back_or_are_made() {
    let server = TestServer::start().await;
    let id = async |given: Option<&str>, path: &str| {
        let mut request = server.request("GET", path);
        if let Some(given) = given {
            request = request.header("x-request-id", given);
        }
        let response = request.send().await.unwrap();
        response.headers()["x-request-id"]
            .to_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(id(Some("mine-1"), "/version").await, "mine-1");
    assert_eq!(id(Some("mine-2"), "/nothing").await, "mine-2");
    assert_ne!(id(Some("two words"), "/version").await, "two words");
    assert_ne!(id(None, "/version").await, id(None, "/version").await);
    let stream = server
        .request("POST", TEXT)
        .header("x-request-id", "s")
        .json(&long(true))
        .send()
        .await
        .unwrap();
    assert_eq!(stream.headers()["x-request-id"], "s");
}

#[tokio::test]
async fn models_list_the_variants_with_their_parent() {
    let server = TestServer::start().await;
    let (_, list) = server.get("/v1/models").await;
    assert_eq!(list["object"], "list");
    let models = list["data"].as_array().unwrap();
    assert_eq!(
        (models[0]["id"].as_str(), &models[0]["parent"]),
        (Some(MODEL), &Value::Null)
    );
    assert_eq!(models.len(), 1 + Variant::ALL.len());
    for model in &models[1..] {
        assert_eq!(model["parent"], MODEL);
        let (status, one) = server
            .get(&format!("/v1/models/{}", model["id"].as_str().unwrap()))
            .await;
        assert_eq!((status.as_u16(), &one), (200, model));
    }
}

#[tokio::test]
async fn the_schema_lists_every_route() {
    let server = TestServer::start().await;
    let (_, schema) = server.get("/openapi.json").await;
    let paths = schema["paths"].as_object().unwrap();
    for route in Route::ALL.iter().filter(|route| **route != Route::Other) {
        assert!(paths.contains_key(route.as_str()), "{}", route.as_str());
    }
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let url = path.replace("{id}", MODEL);
            let request = server
                .request(&method.to_uppercase(), &url)
                .json(&json!({}));
            let status = request.send().await.unwrap().status().as_u16();
            assert!(![404, 405].contains(&status), "{method} {path}: {status}");
        }
    }
    let schemas = schema["components"]["schemas"].as_object().unwrap();
    for name in [
        "ChatRequest",
        "ChatResponse",
        "ChatChunk",
        "CompletionRequest",
        "MidpoRequest",
        "ErrorBody",
    ] {
        assert!(schemas.contains_key(name), "{name}");
    }
}

#[tokio::test]
async fn the_playground_needs_nothing_from_elsewhere() {
    let server = TestServer::start().await;
    let response = server.request("GET", "/").send().await.unwrap();
    assert!(
        response.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/html")
    );
    assert!(response.headers().contains_key("content-security-policy"));
    let page = response.text().await.unwrap();
    assert!(
        !page.contains("http://") && !page.contains("https://"),
        "the page is whole in itself"
    );
}

#[tokio::test]
async fn metrics_add_up() {
    let server = TestServer::start().await;
    server
        .answer(
            TEXT,
            json!({"prompt": "a", "max_tokens": 4, "ignore_eos": true}),
        )
        .await;
    server
        .answer(TEXT, json!({"prompt": ["a", "b"], "max_tokens": 4, "n": 2}))
        .await;
    server
        .answer(TEXT, json!({"prompt": "a", "max_tokens": 0, "echo": true}))
        .await;
    server
        .answer(
            CHAT,
            json!({"messages": [{"role": "user", "content": "x"}], "midpo": {"variant": "base"}}),
        )
        .await;
    server
        .chunks(
            CHAT,
            json!({"messages": [{"role": "user", "content": "x"}]}),
        )
        .await;
    server.post(CHAT, &json!({"messages": []})).await;
    drop(
        server
            .request("POST", TEXT)
            .json(&long(true))
            .send()
            .await
            .unwrap(),
    );
    // Two prompts in one request are two requests to the engine.
    until("all are taken", || taken(&server) == 7).await;
    server.rest().await;
    let metrics = &server.metrics;
    assert_eq!(by_reason(metrics).iter().sum::<u64>(), taken(&server));
    assert_eq!(by_reason(metrics)[2], 1, "the stream that was left");
    assert_eq!(metrics.cancellations.get(), 1);
    let with_a_token = metrics.time_to_first_token.count();
    assert!(
        (5..=6).contains(&with_a_token),
        "all but the echo, and maybe the one that was left: {with_a_token}"
    );
    until("responses are over", || {
        metrics.http_requests_in_flight.get() == 0
    })
    .await;
    let count = |route, status| metrics.http_requests.of(route).of(status).get();
    assert_eq!(count(Route::Completions, Status::Ok), 4);
    assert_eq!(count(Route::ChatCompletions, Status::Ok), 2);
    assert_eq!(count(Route::ChatCompletions, Status::BadRequest), 1);
    let (_, text) = server.get("/metrics").await;
    let text = text.as_str().unwrap();
    for line in [
        r#"midpo_http_requests_total{route="/v1/chat/completions",status="400"} 1"#,
        "midpo_sequences_running 0",
        r#"vllm:num_requests_running{model_name="tiny"} 0"#,
    ] {
        assert!(text.contains(line), "{line}");
    }
    assert!(!text.contains("hello"), "no client's words in labels");
}

#[tokio::test]
async fn leaving_a_stream_frees_its_blocks() {
    let server = TestServer::start().await;
    let response = server
        .request("POST", TEXT)
        .json(&long(true))
        .send()
        .await
        .unwrap();
    let mut bytes = response.bytes_stream();
    assert!(bytes.next().await.unwrap().unwrap().starts_with(b"data: "));
    assert_eq!(server.metrics.http_requests_in_flight.get(), 1);
    drop(bytes);
    server.rest().await;
    until("the request is over", || {
        server.metrics.http_requests_in_flight.get() == 0
    })
    .await;
    assert_eq!(by_reason(&server.metrics), [0, 0, 1, 0]);
    assert!(server.metrics.generated_tokens.of(Variant::Routed).get() < 4 * 300);
}

#[tokio::test]
async fn leaving_before_the_answer_cancels_too() {
    let server = TestServer::start().await;
    let request = server.request("POST", TEXT).json(&long(false));
    let client = tokio::spawn(request.send());
    until("it runs", || taken(&server) == 1).await;
    client.abort();
    server.rest().await;
    until("the request is over", || {
        server.metrics.http_requests_in_flight.get() == 0
    })
    .await;
    let responses = server.metrics.http_requests.of(Route::Completions);
    assert_eq!(responses.of(Status::ClientClosed).get(), 1);
    assert_eq!(by_reason(&server.metrics), [0, 0, 1, 0]);
}

/// Requests that the engine has taken.
fn taken(server: &TestServer) -> u64 {
    server
        .metrics
        .requests
        .iter()
        .map(|count| count.get())
        .sum()
}

#[tokio::test]
async fn draining_finishes_what_runs_and_refuses_what_comes() {
    let mut server = TestServer::start().await;
    assert_eq!(server.get("/ready").await.0, 200);
    let response = server
        .request("POST", TEXT)
        .json(&long(true))
        .send()
        .await
        .unwrap();
    let mut bytes = response.bytes_stream();
    let first = bytes.next().await.unwrap().unwrap();
    server.begin_shutdown();
    let mut refused = None;
    let mut turns = tokio::time::interval(Duration::from_millis(1));
    while refused.is_none() {
        turns.tick().await;
        let Ok(ready) = server.request("GET", "/ready").send().await else {
            break;
        };
        if ready.status() == 503 {
            let late = server.request("POST", TEXT).json(&long(false)).send().await;
            refused = late.ok();
        }
    }
    if let Some(refused) = refused {
        let (status, answer) = read(refused).await;
        assert_eq!(
            (status.as_u16(), &answer["error"]["code"]),
            (503, &json!("draining"))
        );
    }
    let mut text = first.to_vec();
    while let Some(more) = bytes.next().await {
        text.extend(more.unwrap());
    }
    assert!(
        String::from_utf8(text)
            .unwrap()
            .ends_with("data: [DONE]\n\n"),
        "what ran was finished"
    );
    assert_eq!(server.ended().await, (Ended::Drained, EngineState::Stopped));
}

#[tokio::test]
async fn a_drain_ends_when_its_time_is_over() {
    let mut server = TestServer::with(Setup {
        drain_timeout: Duration::ZERO,
        ..Setup::default()
    })
    .await;
    let response = server
        .request("POST", TEXT)
        .json(&long(true))
        .send()
        .await
        .unwrap();
    let mut bytes = response.bytes_stream();
    bytes.next().await.unwrap().unwrap();
    server.begin_shutdown();
    let (ended, engine) = server.ended().await;
    assert!(matches!(ended, Ended::CutOff { requests: 1 }), "{ended:?}");
    assert_eq!(engine, EngineState::Stopped);
}

#[tokio::test]
async fn cors_is_off_unless_configured() {
    let preflight = async |server: &TestServer| {
        let request = server
            .request("OPTIONS", CHAT)
            .header("origin", "https://page.example")
            .header("access-control-request-method", "POST")
            .header(
                "access-control-request-headers",
                "authorization,content-type",
            );
        let response = request.send().await.unwrap();
        response
            .headers()
            .get("access-control-allow-origin")
            .cloned()
    };
    assert_eq!(preflight(&TestServer::start().await).await, None);
    let mut setup = Setup::default();
    setup.server.cors_origins = vec!["https://page.example".to_owned()];
    let allowed = preflight(&TestServer::with(setup).await).await;
    assert_eq!(allowed.unwrap(), "https://page.example");
}

#[tokio::test]
async fn gzip_is_for_bodies_and_never_for_streams() {
    let server = TestServer::start().await;
    let encoding = async |request: reqwest::RequestBuilder| {
        let response = request
            .header("accept-encoding", "gzip")
            .send()
            .await
            .unwrap();
        response.headers().get("content-encoding").cloned()
    };
    assert_eq!(
        encoding(server.request("GET", "/metrics")).await.unwrap(),
        "gzip"
    );
    assert_eq!(
        encoding(server.request("POST", TEXT).json(&long(true))).await,
        None
    );
}

/// Takes in what is logged on this thread, which is all of them: the test's runtime has one.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn logs_name_the_request_and_tell_its_words_only_where_configured() {
    // While there is only one subscriber, `tracing` asks whichever thread meets a log line first whether anybody listens, and
    // remembers the answer for all: another test would deafen this one.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    for log_content in [false, true] {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let mut setup = Setup::default();
        setup.server.log_content = log_content;
        let server = TestServer::with(setup).await;
        let answer = async |stream: bool| {
            let body = json!({"messages": [{"role": "user", "content": "xylophone"}], "frobnicate": "quixotic",
                "max_tokens": 4, "ignore_eos": true, "stream": stream});
            let request = server
                .request("POST", CHAT)
                .header("x-request-id", "id-of-mine")
                .json(&body);
            request.send().await.unwrap().text().await.unwrap()
        };
        answer(false).await;
        answer(true).await;
        server.rest().await;
        until("both are logged", || {
            let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
            text.matches("answered").count() == 2
        })
        .await;
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let answered: Vec<&str> = text
            .lines()
            .filter(|line| line.ends_with("answered"))
            .collect();
        for line in &answered {
            for field in [
                "request_id=id-of-mine",
                "variant=\"routed\"",
                "completion_tokens=4",
                "finish_reason=\"length\"",
            ] {
                assert!(line.contains(field), "{field} in {line}");
            }
        }
        assert!(text.contains("frobnicate"), "unknown fields are listed");
        assert!(!text.contains("quixotic"), "but not what they say");
        assert_eq!(text.contains("xylophone"), log_content, "{text}");
    }
}

#[tokio::test]
async fn names_of_models_may_hold_slashes() {
    let mut setup = Setup::default();
    setup.server.served_model_name = "organisation/model".to_owned();
    let server = TestServer::with(setup).await;
    for id in ["organisation/model", "organisation/model:safety"] {
        let (status, model) = server.get(&format!("/v1/models/{id}")).await;
        assert_eq!((status.as_u16(), model["id"].as_str()), (200, Some(id)));
        server
            .answer(TEXT, json!({"model": id, "prompt": "a", "max_tokens": 1}))
            .await;
    }
    let models = server
        .metrics
        .http_requests
        .of(Route::Models)
        .of(Status::Ok);
    assert_eq!(models.get(), 2);
}

async fn fragile() -> (TestServer, Faults) {
    let faults = Faults::default();
    let options = CpuOptions {
        threads: Some(1),
        ..CpuOptions::default()
    };
    let backend = Fragile {
        inner: Cpu::new(options).unwrap(),
        faults: faults.clone(),
    };
    (TestServer::over(backend, Setup::default()).await, faults)
}

#[tokio::test]
async fn a_step_that_fails_ends_its_requests_and_no_others() {
    let (server, faults) = fragile().await;
    faults.fail(1);
    let (status, answer) = server.post(TEXT, &long(false)).await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (500, &json!("internal_error"))
    );
    let response = server
        .request("POST", TEXT)
        .json(&long(true))
        .send()
        .await
        .unwrap();
    let mut bytes = response.bytes_stream();
    let mut text = bytes.next().await.unwrap().unwrap().to_vec();
    faults.fail(1);
    while let Some(more) = bytes.next().await {
        text.extend(more.unwrap());
    }
    let text = String::from_utf8(text).unwrap();
    let last = text.trim_end().rsplit("data: ").next().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(
        last["error"]["code"], "internal_error",
        "an error ends the stream, and no [DONE]"
    );
    assert_eq!(server.get("/health").await.0, 200);
    server
        .answer(TEXT, json!({"prompt": "a", "max_tokens": 2}))
        .await;
    server.rest().await;
    assert_eq!(by_reason(&server.metrics)[3], 2);
}

#[tokio::test]
async fn when_the_engine_dies_open_requests_hear_of_it_and_serving_ends() {
    let (server, faults) = fragile().await;
    let response = server
        .request("POST", TEXT)
        .json(&long(true))
        .send()
        .await
        .unwrap();
    let mut bytes = response.bytes_stream();
    let mut text = bytes.next().await.unwrap().unwrap().to_vec();
    faults.panic();
    while let Some(more) = bytes.next().await {
        text.extend(more.unwrap());
    }
    let text = String::from_utf8(text).unwrap();
    let last = text.trim_end().rsplit("data: ").next().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert!(last["error"]["message"].is_string(), "{last}");
    // The clients hear of it first. Then nothing is ready, and soon nothing is accepted.
    let mut turns = tokio::time::interval(Duration::from_millis(1));
    while let Ok(ready) = server.request("GET", "/ready").send().await {
        if ready.status() == 503 {
            break;
        }
        turns.tick().await;
    }
    assert_eq!(server.ended().await, (Ended::EngineDead, EngineState::Dead));
}
