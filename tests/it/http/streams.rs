//! Streams, event by event.

use serde_json::{Value, json};

use super::harness::{MODEL, Setup, TestServer, normalised};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(more: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0,
        "max_tokens": 6, "ignore_eos": true});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn transcript(server: &TestServer, path: &str, body: Value) -> String {
    let events = server.events(path, body).await;
    let lines = events.iter().map(|event| match event.as_str() {
        "[DONE]" => event.clone(),
        json => normalised(serde_json::from_str(json).unwrap()).to_string(),
    });
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

#[tokio::test]
async fn streams_are_as_their_transcripts() {
    let server = TestServer::start().await;
    let usage = json!({"stream_options": {"include_usage": true}, "max_tokens": 2, "return_token_ids": true});
    let text = json!({"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 4, "ignore_eos": true,
        "stream_options": {"include_usage": true}});
    let gates =
        json!({"n": 2, "max_tokens": 1, "midpo": {"variant": "safety", "return_gates": "tokens"}});
    let cases = [
        (
            "chat",
            CHAT,
            chat(json!({})),
            include_str!("transcripts/chat.txt"),
        ),
        (
            "chat_usage",
            CHAT,
            chat(usage),
            include_str!("transcripts/chat_usage.txt"),
        ),
        (
            "chat_gates",
            CHAT,
            chat(gates),
            include_str!("transcripts/chat_gates.txt"),
        ),
        ("text", TEXT, text, include_str!("transcripts/text.txt")),
    ];
    let mut differences = String::new();
    for (name, path, body, golden) in cases {
        let found = transcript(&server, path, body).await;
        if found != golden {
            differences += &format!("--- {name}\n{found}");
        }
    }
    assert!(
        differences.is_empty(),
        "transcripts differ; found:\n{differences}"
    );
}

#[tokio::test]
async fn a_stream_tells_what_the_whole_answer_tells() {
    let server = TestServer::start().await;
    let more = json!({"logprobs": true, "top_logprobs": 2, "return_token_ids": true, "n": 3, "seed": 5, "temperature": 1.2,
        "max_tokens": 24, "midpo": {"return_gates": "tokens"}});
    let whole = server.answer(CHAT, chat(more.clone())).await;
    let mut streamed = more;
    streamed["stream_options"] = json!({"include_usage": true});
    let chunks = server.chunks(CHAT, chat(streamed)).await;
    assert_eq!(chunks[0]["prompt_token_ids"], whole["prompt_token_ids"]);
    for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let own: Vec<&Value> = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"].get(0))
            .filter(|choice| choice["index"] == index)
            .collect();
        assert_eq!(own[0]["delta"], json!({"role": "assistant", "content": ""}));
        let text: String = own
            .iter()
            .filter_map(|chunk| chunk["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, choice["message"]["content"].as_str().unwrap());
        let join = |get: &dyn Fn(&Value) -> Value| -> Vec<Value> {
            own.iter()
                .flat_map(|chunk| get(chunk).as_array().cloned().unwrap_or_default())
                .collect()
        };
        let all = |value: &Value| value.as_array().unwrap().clone();
        assert_eq!(
            join(&|chunk| chunk["token_ids"].clone()),
            all(&choice["token_ids"])
        );
        assert_eq!(
            join(&|chunk| chunk["logprobs"]["content"].clone()),
            all(&choice["logprobs"]["content"])
        );
        assert_eq!(
            join(&|chunk| chunk["midpo"]["tokens"].clone()),
            all(&choice["midpo"]["tokens"])
        );
        for chunk in &own[1..] {
            let lengths = [
                &chunk["token_ids"],
                &chunk["logprobs"]["content"],
                &chunk["midpo"]["tokens"],
            ]
            .map(|list| list.as_array().map_or(0, Vec::len));
            assert_eq!(lengths, [lengths[0]; 3], "aligned in every chunk");
        }
        let ends: Vec<&Value> = own
            .iter()
            .map(|chunk| &chunk["finish_reason"])
            .filter(|end| !end.is_null())
            .collect();
        assert_eq!(ends, [&choice["finish_reason"]]);
        let last = own.last().unwrap();
        assert_eq!(last["midpo"]["gates"], choice["midpo"]["gates"]);
    }
    let (last, before) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"]["completion_tokens"],
        whole["usage"]["completion_tokens"]
    );
    assert!(
        before
            .iter()
            .all(|chunk| chunk.get("usage") == Some(&Value::Null))
    );
}

#[tokio::test]
async fn a_waiting_stream_is_kept_alive_with_comments() {
    let mut setup = Setup::default();
    setup.engine.sequences_max = 1;
    setup.server.keep_alive = std::time::Duration::from_millis(1);
    let server = TestServer::with(setup).await;
    let body = json!({"model": MODEL, "prompt": "hi", "max_tokens": 200, "ignore_eos": true, "stream": true});
    let send = || server.request("POST", TEXT).json(&body).send();
    let (first, second) = (send().await.unwrap(), send().await.unwrap());
    let (first, second) = tokio::join!(first.text(), second.text());
    let second = second.unwrap();
    assert!(first.unwrap().ends_with("data: [DONE]\n\n"));
    assert!(second.starts_with(": keep-alive\n\n"), "{second}");
    assert!(second.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn many_streams_at_once_all_complete() {
    let server = TestServer::start().await;
    let stream = async |seed: usize| {
        let more = json!({"seed": seed, "temperature": 1.0, "max_tokens": 32});
        let chunks = server.chunks(CHAT, chat(more)).await;
        let text = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
        text.collect::<String>()
    };
    let together = futures_util::future::join_all((0..16).map(stream)).await;
    for (seed, text) in together.iter().enumerate() {
        assert_eq!(&stream(seed).await, text, "alone as among others");
    }
}
