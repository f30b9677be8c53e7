//! Text completions, and tokens there and back.

use serde_json::{Value, json};

use super::harness::{MODEL, TestServer};

const TEXT: &str = "/v1/completions";

fn of(prompt: Value, more: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6, "ignore_eos": true});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[tokio::test]
async fn prompts_come_as_texts_or_ids_one_or_many() {
    let server = TestServer::start().await;
    let ids = async |text: &str| {
        let (_, told) = server.post("/tokenize", &json!({"prompt": text})).await;
        told["tokens"].clone()
    };
    let (left, right) = (ids("hello").await, ids("good morning").await);
    let one = server.answer(TEXT, of(json!("hello"), json!({}))).await;
    assert_eq!(one["object"], "text_completion");
    assert!(one["id"].as_str().unwrap().starts_with("cmpl-"));
    let text = |answer: &Value, index: usize| answer["choices"][index]["text"].clone();
    assert_eq!(
        text(&server.answer(TEXT, of(left.clone(), json!({}))).await, 0),
        text(&one, 0)
    );
    let many = server
        .answer(TEXT, of(json!(["hello", "good morning"]), json!({"n": 2})))
        .await;
    let choices = many["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices
        .iter()
        .map(|choice| choice["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(text(&many, 0), text(&one, 0));
    assert_eq!(text(&many, 1), text(&one, 0), "greedy choices are equal");
    let lists = server
        .answer(TEXT, of(json!([left, right]), json!({})))
        .await;
    assert_eq!(text(&lists, 1), text(&many, 2));
    assert_eq!(many["usage"]["completion_tokens"], 24);
    assert_eq!(
        many["usage"]["prompt_tokens"],
        lists["usage"]["prompt_tokens"]
    );
}

#[tokio::test]
async fn echo_with_logprobs_and_no_tokens_reads_the_prompt_alone() {
    let server = TestServer::start().await;
    let more = json!({"echo": true, "logprobs": 2, "max_tokens": 0, "return_token_ids": true});
    let answer = server
        .answer(TEXT, of(json!("good morning to you"), more))
        .await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "good morning to you");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["token_ids"], json!([]));
    let told = &choice["logprobs"];
    let lengths = ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
        .map(|list| told[list].as_array().unwrap().len());
    let prompt = choice["prompt_token_ids"].as_array().unwrap().len();
    assert_eq!(lengths, [prompt; 4]);
    assert_eq!(
        (&told["token_logprobs"][0], &told["top_logprobs"][0]),
        (&Value::Null, &Value::Null)
    );
    assert!(
        told["token_logprobs"].as_array().unwrap()[1..]
            .iter()
            .all(|logprob| logprob.as_f64().unwrap() <= 0.0)
    );
    for top in &told["top_logprobs"].as_array().unwrap()[1..] {
        assert!((2..=3).contains(&top.as_object().unwrap().len()));
    }
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    // Offsets point at the tokens' own texts, the start of sequence in front being no text.
    for at in 1..prompt {
        let offset = told["text_offset"][at].as_u64().unwrap() as usize;
        let token = told["tokens"][at].as_str().unwrap();
        assert!("good morning to you"[offset..].starts_with(token), "{told}");
    }
}

#[tokio::test]
async fn echo_puts_the_prompt_before_the_answer_and_offsets_go_on() {
    let server = TestServer::start().await;
    let plain = server
        .answer(TEXT, of(json!("hello"), json!({"logprobs": 0})))
        .await;
    let echoed = server
        .answer(
            TEXT,
            of(json!("hello"), json!({"logprobs": 0, "echo": true})),
        )
        .await;
    let text = |answer: &Value| answer["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(text(&echoed), format!("hello{}", text(&plain)));
    let list = |answer: &Value, name: &str| {
        answer["choices"][0]["logprobs"][name]
            .as_array()
            .unwrap()
            .clone()
    };
    let (plain_tokens, tokens) = (list(&plain, "tokens"), list(&echoed, "tokens"));
    assert_eq!(tokens[tokens.len() - plain_tokens.len()..], plain_tokens);
    let offsets = list(&echoed, "text_offset");
    let first = offsets[tokens.len() - plain_tokens.len()].as_u64().unwrap();
    assert_eq!(
        (list(&plain, "text_offset")[0].as_u64(), first),
        (Some(0), 5)
    );
    let streamed = server
        .chunks(
            TEXT,
            of(json!("hello"), json!({"logprobs": 0, "echo": true})),
        )
        .await;
    let joined: String = streamed.iter().map(text).collect();
    assert_eq!(joined, text(&echoed));
    let streamed: Vec<Value> = streamed
        .iter()
        .flat_map(|chunk| list(chunk, "text_offset"))
        .collect();
    assert_eq!(streamed, offsets);
}

#[tokio::test]
async fn tokens_go_there_and_back() {
    let server = TestServer::start().await;
    for text in ["hello", "  two  spaces", "é € 😀\n\ttab", ""] {
        let (status, told) = server
            .post(
                "/tokenize",
                &json!({"prompt": text, "add_special_tokens": false, "return_token_strs": true}),
            )
            .await;
        assert_eq!(status, 200, "{told}");
        let count = told["tokens"].as_array().unwrap().len();
        assert_eq!(told["count"], count);
        assert_eq!(told["token_strs"].as_array().unwrap().len(), count);
        assert_eq!(told["max_model_len"], 320);
        let (_, back) = server
            .post("/detokenize", &json!({"tokens": told["tokens"]}))
            .await;
        assert_eq!(back["prompt"], text);
    }
    let (_, with) = server.post("/tokenize", &json!({"prompt": "hello"})).await;
    assert_eq!(with["tokens"][0], 1, "the start of sequence");
}
