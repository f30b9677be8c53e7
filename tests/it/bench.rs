//! The load generator against servers that behave and servers that do not.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::http::harness::{MODEL, TestServer};
use indicatif::ProgressBar;
use midpo::bench::{Endpoint, Job, Level, Load, PromptSource, RequestShape, Target, prepare, run};
use midpo::types::Variant;
use serde_json::Map;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Two tokens, usage and the end, as OpenAI sends them.
const ANSWER: &[&str] = &[
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":null}]}\n\n: keep-alive\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"b\"},\"finish_reason\":\"length\"}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2,\"total_tokens\":7}}\n\n",
    "data: [DONE]\n\n",
];

/// What a request is answered with: a status line and pieces of a body, after which the connection closes.
#[derive(Clone, Copy)]
struct Reply {
    status: &'static str,
    pieces: &'static [&'static str],
}

const GOOD: Reply = Reply {
    status: "200 OK",
    pieces: ANSWER,
};

/// A server that counts words as tokens and answers the i-th generation with the i-th reply, over and over.
struct Canned {
    url: String,
    bodies: Arc<std::sync::Mutex<Vec<String>>>,
}

async fn canned(replies: &'static [Reply]) -> Canned {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let bodies = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (kept, turn) = (Arc::clone(&bodies), Arc::new(AtomicUsize::new(0)));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (kept, turn) = (Arc::clone(&kept), Arc::clone(&turn));
            tokio::spawn(async move {
                let (head, body, stream) = receive(stream).await;
                if head.contains("/tokenize") {
                    let asked: serde_json::Value = serde_json::from_str(&body).unwrap();
                    let words = asked["prompt"].as_str().unwrap().split(' ').count();
                    let answer = format!("{{\"count\":{words}}}");
                    send(stream, "200 OK", &[&answer]).await;
                } else if head.contains("/v1/models") {
                    send(
                        stream,
                        "200 OK",
                        &["{\"data\":[{\"id\":\"first\"},{\"id\":\"second\"}]}"],
                    )
                    .await;
                } else {
                    kept.lock().unwrap().push(body);
                    let reply = replies[turn.fetch_add(1, Ordering::SeqCst) % replies.len()];
                    send(stream, reply.status, reply.pieces).await;
                }
            });
        }
    });
    Canned { url, bodies }
}

async fn receive(mut stream: TcpStream) -> (String, String, TcpStream) {
    let (mut bytes, mut piece) = (Vec::new(), [0u8; 4096]);
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let named = name.eq_ignore_ascii_case("content-length");
                named.then(|| value.trim().parse::<usize>().unwrap())
            });
            if body.len() >= length.unwrap_or(0) {
                return (head.to_owned(), body.to_owned(), stream);
            }
        }
        let read = stream.read(&mut piece).await.unwrap();
        bytes.extend_from_slice(&piece[..read]);
    }
}

async fn send(mut stream: TcpStream, status: &str, pieces: &[&str]) {
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    for piece in pieces {
        // Cut anywhere: the middle of a line is where parsers break.
        for half in [&piece[..piece.len() / 2], &piece[piece.len() / 2..]] {
            stream.write_all(half.as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            tokio::task::yield_now().await;
        }
    }
}

fn shape() -> RequestShape {
    RequestShape {
        max_tokens: 2,
        temperature: 0.0,
        ignore_eos: true,
        extra: Map::new(),
    }
}

fn target(url: &str) -> Target {
    Target::new(url, "m", None, Endpoint::Chat, Duration::from_secs(60)).unwrap()
}

async fn level(url: &str, prompts: usize, load: Load, variants: &[Variant]) -> Level {
    let (prompts, shape) = (vec!["hello".to_owned(); prompts], shape());
    let job = Job {
        prompts: &prompts,
        shape: &shape,
        variants,
        seed: 1,
    };
    Level::of(&run(&target(url), job, load, &ProgressBar::hidden()).await)
}

#[tokio::test]
async fn every_request_of_a_closed_or_open_loop_is_sent_once_and_counted() {
    for load in [Load::Concurrency(3), Load::Rate(2000.0)] {
        let server = canned(&[GOOD]).await;
        let variants = [Variant::Routed, Variant::Base];
        let level = level(&server.url, 10, load, &variants).await;
        assert_eq!(
            (level.requests, level.completed),
            (10, 10),
            "{:?}",
            level.errors
        );
        assert_eq!((level.prompt_tokens, level.output_tokens), (50, 20));
        assert_eq!(level.output_chunks, 20);
        assert_eq!((level.ttft_ms.count, level.itl_ms.count), (10, 10));
        assert!(level.e2e_ms.max >= level.ttft_ms.max && level.ttft_ms.max > 0.0);
        assert!(level.output_tokens_per_second > 0.0);
        let shares: Vec<_> = level
            .variants
            .iter()
            .map(|v| (v.variant, v.completed))
            .collect();
        assert_eq!(shares, [("routed", 5), ("base", 5)]);
        let bodies = server.bodies.lock().unwrap();
        assert_eq!(
            bodies
                .iter()
                .filter(|b| b.contains("\"variant\":\"base\""))
                .count(),
            5
        );
        assert!(
            bodies
                .iter()
                .all(|body| body.contains("\"include_usage\":true"))
        );
    }
}

#[tokio::test]
async fn failures_are_counted_by_kind_and_never_as_throughput() {
    const REPLIES: &[Reply] = &[
        GOOD,
        Reply {
            status: "429 Too Many Requests",
            pieces: &["{\"error\":{\"message\":\"queue full\"}}"],
        },
        Reply {
            status: "200 OK",
            pieces: &["data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n"],
        },
        Reply {
            status: "200 OK",
            pieces: &["data: {\"error\":{\"message\":\"boom\"}}\n\n"],
        },
        Reply {
            status: "200 OK",
            pieces: &["data: <html>\n\n"],
        },
    ];
    let server = canned(REPLIES).await;
    let level = level(&server.url, 10, Load::Concurrency(1), &[]).await;
    let counts: Vec<_> = level
        .errors
        .iter()
        .map(|(k, e)| (k.as_str(), e.count))
        .collect();
    let want = [
        ("cut", 2),
        ("error_event", 2),
        ("malformed", 2),
        ("status_429", 2),
    ];
    assert_eq!(counts, want);
    assert!(level.errors["status_429"].example.contains("queue full"));
    assert_eq!((level.completed, level.output_tokens), (2, 4));
    assert_eq!(level.variants, []);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_a_connect_failure() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    let level = level(&url, 3, Load::Concurrency(2), &[]).await;
    assert_eq!(level.errors["connect"].count, 3);
    let error = target(&url).with_first_model().await.unwrap_err();
    assert!(error.to_string().contains("/v1/models"), "{error}");
}

#[tokio::test]
async fn prompts_have_the_length_that_the_server_counts_and_the_first_model_is_asked() {
    let server = canned(&[GOOD]).await;
    let target = target(&server.url).with_first_model().await.unwrap();
    assert_eq!(target.model(), "first");
    for tokens in [1, 7, 98] {
        let source = PromptSource::Words { tokens, seed: 3 };
        let prompts = prepare(&source, &target, 4).await.unwrap();
        for prompt in &prompts {
            assert_eq!(prompt.split(' ').count(), tokens);
        }
        let mut different = prompts.clone();
        different.dedup();
        assert!(tokens == 1 || different.len() == 4);
    }
}

#[tokio::test]
async fn a_real_server_yields_every_token_of_every_variant_and_counts_prompts_itself() {
    let server = TestServer::start().await;
    for endpoint in [Endpoint::Chat, Endpoint::Completions] {
        let timeout = Duration::from_secs(60);
        let target = Target::new(&server.base, MODEL, None, endpoint, timeout).unwrap();
        let source = PromptSource::Words {
            tokens: 12,
            seed: 5,
        };
        let prompts = prepare(&source, &target, 10).await.unwrap();
        for prompt in &prompts {
            // The tiny tokenizer has no whole words: one more or less is several tokens.
            let counted = target.count_tokens(prompt).await.unwrap();
            assert!(counted.abs_diff(12) <= 3, "{counted}: {prompt}");
        }
        let shape = RequestShape {
            max_tokens: 6,
            ..shape()
        };
        let job = Job {
            prompts: &prompts,
            shape: &shape,
            variants: &Variant::ALL,
            seed: 1,
        };
        let done = run(&target, job, Load::Concurrency(3), &ProgressBar::hidden()).await;
        let level = Level::of(&done);
        assert_eq!(
            (level.completed, level.output_tokens),
            (10, 60),
            "{:?}",
            level.errors
        );
        assert!(level.prompt_tokens >= 90, "{}", level.prompt_tokens);
        assert!(
            level
                .variants
                .iter()
                .all(|row| row.completed == 2 && row.output_tokens == 12)
        );
    }
}
