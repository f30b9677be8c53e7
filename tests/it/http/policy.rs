//! Keys, and what the operator allows each of them.

use midpo::config::{ApiKey, Policy};
use reqwest::Response;
use serde_json::{Value, json};

use super::harness::{MODEL, Setup, TestServer, read};

const CHAT: &str = "/v1/chat/completions";

async fn guarded() -> TestServer {
    let mut setup = Setup::default();
    let key = |name: &str, policy| ApiKey {
        name: name.to_owned(),
        secret: format!("secret-of-{name}"),
        policy,
    };
    let floors = Policy {
        min_safety_floor: 0.5,
        ..Policy::open()
    };
    setup.server.api_keys = vec![
        key("guest", Policy::guarded()),
        key("owner", Policy::open()),
        key("floors", floors),
    ];
    TestServer::with(setup).await
}

async fn send(server: &TestServer, key: Option<&str>, midpo: Value) -> Response {
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "midpo": midpo,
        "temperature": 0, "ignore_eos": true});
    let mut request = server.request("POST", CHAT).json(&body);
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    request.send().await.unwrap()
}

#[tokio::test]
async fn without_a_key_only_what_machines_ask_is_answered() {
    let server = guarded().await;
    for path in [
        "/health",
        "/ready",
        "/metrics",
        "/version",
        "/openapi.json",
        "/",
    ] {
        assert_eq!(server.get(path).await.0, 200, "{path}");
    }
    for (method, path) in [
        ("POST", CHAT),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
    ] {
        for key in [None, Some("wrong"), Some("secret-of-guest "), Some("")] {
            let mut request = server.request(method, path).json(&json!({}));
            if let Some(key) = key {
                request = request.header("authorization", format!("Token {key}"));
            }
            let response = request.send().await.unwrap();
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            let (status, answer) = read(response).await;
            assert_eq!(status, 401, "{path}");
            assert_eq!(answer["error"]["code"], "invalid_api_key");
            assert_eq!(answer["error"]["type"], "authentication_error");
        }
    }
    let (status, _) = read(send(&server, Some("secret-of-nobody"), json!({})).await).await;
    assert_eq!(status, 401);
}

#[tokio::test]
async fn a_guarded_key_may_raise_safety_and_never_lower_it() {
    let server = guarded().await;
    let guest = Some("secret-of-guest");
    for midpo in [
        json!({}),
        json!({"variant": "safety"}),
        json!({"safety_bias": 2}),
        json!({"safety_floor": 0.5, "helpfulness_ceiling": 0.5}),
    ] {
        assert_eq!(
            send(&server, guest, midpo.clone()).await.status(),
            200,
            "{midpo}"
        );
    }
    for (midpo, param) in [
        (json!({"variant": "base"}), "midpo.variant"),
        (json!({"variant": "helpfulness"}), "midpo.variant"),
        (json!({"safety_bias": -1}), "midpo.safety_bias"),
        (json!({"helpfulness_bias": 1}), "midpo.helpfulness_bias"),
    ] {
        let (status, answer) = read(send(&server, guest, midpo.clone()).await).await;
        assert_eq!(status, 403, "{midpo}");
        assert_eq!(answer["error"]["code"], "policy_denied");
        assert_eq!(answer["error"]["param"], param);
        let owner = send(&server, Some("secret-of-owner"), midpo).await;
        assert_eq!(owner.status(), 200);
    }
    let models = async |key: &str| {
        let request = server.request("GET", "/v1/models").bearer_auth(key);
        let (_, list) = read(request.send().await.unwrap()).await;
        let ids = list["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|model| model["id"].as_str().unwrap().to_owned());
        ids.collect::<Vec<_>>()
    };
    assert_eq!(
        models("secret-of-guest").await,
        ["tiny", "tiny:routed", "tiny:safety"]
    );
    assert_eq!(models("secret-of-owner").await.len(), 6);
}

#[tokio::test]
async fn an_operators_floor_holds_for_requests_that_name_none() {
    let server = guarded().await;
    let floors = Some("secret-of-floors");
    for variant in ["routed", "base"] {
        let midpo = json!({"variant": variant, "return_gates": "summary"});
        let (status, answer) = read(send(&server, floors, midpo).await).await;
        assert_eq!(status, 200, "{answer}");
        let least = answer["choices"][0]["midpo"]["gates"]["safety"]["min"]
            .as_f64()
            .unwrap();
        assert!(least >= 0.5 - 1e-6, "{variant}: {least}");
    }
    let (status, _) = read(send(&server, floors, json!({"safety_floor": 0.4})).await).await;
    assert_eq!(status, 403);
}
