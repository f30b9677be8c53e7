//! Everything that can be wrong with a request has a status, a code and names its field.

use serde_json::{Value, json};

use super::harness::{MODEL, Setup, TestServer, read};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A chat with more or other fields; a null takes one away.
fn chat(fields: Value) -> Value {
    let mut body =
        json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn text(fields: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": "hi", "max_tokens": 4});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn check(server: &TestServer, path: &str, body: Value, status: u16, param: &str, code: &str) {
    for stream in [false, true] {
        let mut body = body.clone();
        if stream && path.starts_with("/v1/") && body.get("stream_options").is_none() {
            body["stream"] = true.into();
        }
        let (found, answer) = server.post(path, &body).await;
        let error = &answer["error"];
        let message = format!("{path} {body}\n{answer}");
        assert_eq!(found.as_u16(), status, "{message}");
        assert_eq!(
            error["param"].as_str().unwrap_or_default(),
            param,
            "{message}"
        );
        assert_eq!(error["code"], code, "{message}");
        assert!(!error["message"].as_str().unwrap().is_empty(), "{message}");
        assert!(!error["type"].as_str().unwrap().is_empty(), "{message}");
    }
}

#[tokio::test]
async fn illegal_values_are_refused_by_name() {
    let server = TestServer::start().await;
    let many = |count: usize| vec!["x"; count];
    let cases = [
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 5_000_000_000u64}), "top_k"),
        (json!({"min_p": -0.1}), "min_p"),
        (json!({"n": 0}), "n"),
        (json!({"n": 9}), "n"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias.x"),
        (json!({"logit_bias": {"512": 1}}), "logit_bias.512"),
        (json!({"logit_bias": {"05": 1}}), "logit_bias.05"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias.5"),
        (json!({"stop": many(5)}), "stop"),
        (json!({"stop": [""]}), "stop[0]"),
        (json!({"stop": "x".repeat(33)}), "stop[0]"),
        (json!({"stop_token_ids": [1, 512]}), "stop_token_ids[1]"),
        (json!({"min_tokens": 5}), "min_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (
            json!({"max_tokens": null, "max_completion_tokens": 0}),
            "max_completion_tokens",
        ),
        (json!({"max_completion_tokens": 9}), "max_tokens"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "top_logprobs",
        ),
        (json!({"cache_salt": ""}), "cache_salt"),
        (json!({"messages": []}), "messages"),
        (
            json!({"add_generation_prompt": true, "continue_final_message": true}),
            "add_generation_prompt",
        ),
        (json!({"midpo": {"safety_bias": 1000}}), "midpo.safety_bias"),
        (json!({"midpo": {"variant": "x"}}), "midpo.variant"),
        (
            json!({"midpo": {"variant": "base"}, "model": "tiny:safety"}),
            "midpo.variant",
        ),
        (
            json!({"stream": false, "stream_options": {"include_usage": true}}),
            "stream_options",
        ),
    ];
    for (fields, param) in cases {
        check(&server, CHAT, chat(fields), 400, param, "invalid_value").await;
    }
    let cases = [
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": many(9)}), "prompt"),
        (json!({"prompt": [512]}), "prompt"),
        (json!({"prompt": "", "add_special_tokens": false}), "prompt"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"logprobs": 21}), "logprobs"),
    ];
    for (fields, param) in cases {
        check(&server, TEXT, text(fields), 400, param, "invalid_value").await;
    }
    check(
        &server,
        "/tokenize",
        json!({}),
        400,
        "prompt",
        "invalid_value",
    )
    .await;
    check(
        &server,
        "/detokenize",
        json!({"tokens": [512]}),
        400,
        "tokens[0]",
        "invalid_value",
    )
    .await;
    server.rest().await;
}

#[tokio::test]
async fn wrong_types_are_refused_at_their_place() {
    let server = TestServer::start().await;
    let cases = [
        (json!({"messages": "hi"}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": 5}]}),
            "messages[0].content",
        ),
        (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"stop": 5}), "stop"),
        (json!({"midpo": {"colour": "red"}}), "midpo.colour"),
        (
            json!({"midpo": {"return_gates": "all"}}),
            "midpo.return_gates",
        ),
        (
            json!({"midpo": {"safety_bias": "NaN"}}),
            "midpo.safety_bias",
        ),
    ];
    for (fields, param) in cases {
        check(&server, CHAT, chat(fields), 400, param, "invalid_type").await;
    }
    check(
        &server,
        TEXT,
        text(json!({"prompt": ["a", 1]})),
        400,
        "prompt",
        "invalid_type",
    )
    .await;
    check(
        &server,
        TEXT,
        json!({"model": MODEL}),
        400,
        "prompt",
        "invalid_type",
    )
    .await;
}

#[tokio::test]
async fn known_fields_that_are_not_honoured_are_refused_and_unknown_ones_ignored() {
    let server = TestServer::start().await;
    let cases = [
        (
            json!({"tools": [{"type": "function", "function": {"name": "f"}}]}),
            "tools",
        ),
        (json!({"tool_choice": "auto"}), "tool_choice"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (
            json!({"prediction": {"type": "content", "content": "x"}}),
            "prediction",
        ),
        (json!({"web_search_options": {}}), "web_search_options"),
        (json!({"guided_json": {"type": "object"}}), "guided_json"),
        (json!({"echo": true}), "echo"),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            "messages[0].role",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
            "messages[0].content[0].type",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "y"}]}]}),
            "messages[0].tool_calls",
        ),
    ];
    for (fields, param) in cases {
        check(
            &server,
            CHAT,
            chat(fields),
            400,
            param,
            "unsupported_parameter",
        )
        .await;
    }
    check(
        &server,
        TEXT,
        text(json!({"best_of": 4})),
        400,
        "best_of",
        "unsupported_parameter",
    )
    .await;
    check(
        &server,
        TEXT,
        text(json!({"suffix": "x"})),
        400,
        "suffix",
        "unsupported_parameter",
    )
    .await;
    let harmless = json!({"frobnicate": {"a": [1]}, "tools": [], "response_format": {"type": "text"}, "user": "u",
        "tool_choice": "none", "modalities": ["text"], "store": false});
    server.answer(CHAT, chat(harmless)).await;
}

#[tokio::test]
async fn unknown_models_and_routes_are_not_found() {
    let server = TestServer::start().await;
    for model in ["gpt-4", "tiny:", "tiny:nothing", ""] {
        let body = chat(json!({"model": model}));
        check(&server, CHAT, body, 404, "model", "model_not_found").await;
    }
    check(
        &server,
        "/tokenize",
        json!({"model": "x", "prompt": "y"}),
        404,
        "model",
        "model_not_found",
    )
    .await;
    let (status, answer) = server.get("/v1/models/nothing").await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    let (status, answer) = server.get("/v1/nothing").await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (404, &json!("unknown_url"))
    );
    let (status, answer) = server.get(CHAT).await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (405, &json!("method_not_allowed"))
    );
    let (status, _) = server.post("/health", &json!({})).await;
    assert_eq!(status.as_u16(), 405);
}

#[tokio::test]
async fn bodies_that_are_no_requests_are_refused() {
    let server = TestServer::start().await;
    let send = async |kind: Option<&str>, body: String| {
        let mut request = server.request("POST", CHAT).body(body);
        if let Some(kind) = kind {
            request = request.header("content-type", kind);
        }
        let (status, answer) = read(request.send().await.unwrap()).await;
        (
            status.as_u16(),
            answer["error"]["code"].as_str().unwrap().to_owned(),
        )
    };
    let json = Some("application/json");
    let whole = chat(json!({})).to_string();
    let expect = |status: u16, code: &str| (status, code.to_owned());
    assert_eq!(
        send(json, "{".to_owned()).await,
        expect(400, "invalid_json")
    );
    assert_eq!(send(json, String::new()).await, expect(400, "invalid_json"));
    assert_eq!(
        send(json, "[]".to_owned()).await,
        expect(400, "invalid_json")
    );
    assert_eq!(
        send(json, r#"{"temperature": NaN}"#.to_owned()).await,
        expect(400, "invalid_json")
    );
    assert_eq!(
        send(json, "[".repeat(10_000)).await,
        expect(400, "invalid_json")
    );
    assert_eq!(
        send(None, whole.clone()).await,
        expect(415, "unsupported_media_type")
    );
    assert_eq!(
        send(Some("text/plain"), whole.clone()).await,
        expect(415, "unsupported_media_type")
    );
    let padded = format!("{whole}{}", " ".repeat(64 * 1024));
    assert_eq!(send(json, padded).await, expect(413, "content_too_large"));
    let charset = "application/json; charset=utf-8";
    let response = server
        .request("POST", CHAT)
        .header("content-type", charset)
        .body(whole);
    assert_eq!(response.send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn prompts_beyond_the_context_are_refused_with_their_sizes() {
    let server = TestServer::start().await;
    let long = chat(json!({"max_tokens": 1000}));
    check(
        &server,
        CHAT,
        long,
        400,
        "messages",
        "context_length_exceeded",
    )
    .await;
    let ids = vec![5; 400];
    check(
        &server,
        TEXT,
        text(json!({"prompt": ids})),
        400,
        "prompt",
        "context_length_exceeded",
    )
    .await;
    let (_, answer) = server.post(TEXT, &text(json!({"prompt": ids}))).await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("320") && message.contains("400"),
        "{message}"
    );
    // Without a limit of its own, a long chat gets the room that is left.
    let body = json!({"model": MODEL, "prompt": vec![5; 310], "max_tokens": 6, "ignore_eos": true});
    assert_eq!(
        server.answer(TEXT, body).await["usage"]["completion_tokens"],
        6
    );
}

#[tokio::test]
async fn the_templates_refusal_is_the_clients_error() {
    let server = TestServer::start().await;
    let two = json!({"messages": [{"role": "assistant", "content": "I begin"}]});
    let (status, answer) = server.post(CHAT, &chat(two)).await;
    assert_eq!(status.as_u16(), 400, "{answer}");
    assert_eq!(answer["error"]["code"], "chat_template_error");
    assert_eq!(answer["error"]["param"], "messages");
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("user")
    );
}

#[tokio::test]
async fn a_full_queue_is_a_429_with_retry_after_and_nothing_is_lost() {
    let mut setup = Setup::default();
    setup.engine.queue_max = 1;
    setup.engine.sequences_max = 1;
    let server = TestServer::with(setup).await;
    let long = json!({"model": MODEL, "prompt": "hi", "max_tokens": 100, "ignore_eos": true});
    let posts = (0..12).map(|_| server.request("POST", TEXT).json(&long).send());
    let responses = futures_util::future::join_all(posts).await;
    let mut counts = (0, 0);
    for response in responses {
        let response = response.unwrap();
        match response.status().as_u16() {
            200 => counts.0 += 1,
            429 => {
                counts.1 += 1;
                assert!(response.headers().contains_key("retry-after"));
                let (_, answer) = read(response).await;
                assert_eq!(answer["error"]["code"], "queue_full");
            }
            other => panic!("{other}"),
        }
    }
    assert!(counts.0 >= 1 && counts.1 >= 1, "{counts:?}");
    server.rest().await;
    assert_eq!(
        server
            .metrics
            .refusals
            .of(midpo::metrics::Refusal::QueueFull)
            .get(),
        counts.1
    );
}

#[tokio::test]
async fn a_request_past_its_deadline_is_ended() {
    let mut setup = Setup::default();
    setup.server.request_timeout = std::time::Duration::ZERO;
    let server = TestServer::with(setup).await;
    let (status, answer) = server.post(CHAT, &chat(json!({}))).await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (504, &json!("request_timeout"))
    );
    let events = server.events(CHAT, chat(json!({}))).await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(
        last["error"]["code"], "request_timeout",
        "an error event ends the stream, and no [DONE]"
    );
    server.rest().await;
}

#[tokio::test]
async fn a_model_without_experts_serves_base_alone() {
    let server = TestServer::with(Setup {
        experts: false,
        ..Setup::default()
    })
    .await;
    server.answer(CHAT, chat(json!({}))).await;
    server
        .answer(CHAT, chat(json!({"model": "tiny:base"})))
        .await;
    for fields in [
        json!({"midpo": {"variant": "routed"}}),
        json!({"model": "tiny:safety"}),
    ] {
        check(
            &server,
            CHAT,
            chat(fields),
            400,
            "midpo.variant",
            "invalid_value",
        )
        .await;
    }
    let body = chat(json!({"midpo": {"return_gates": "summary"}}));
    check(
        &server,
        CHAT,
        body,
        400,
        "midpo.return_gates",
        "invalid_value",
    )
    .await;
    let (_, models) = server.get("/v1/models").await;
    let ids: Vec<&str> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["tiny", "tiny:base"]);
}
