//! Tokenizer, templates and text streams, against the ids that the authors' stack and Hugging Face give.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use midpo::text::{
    Chat, ChatTemplate, Message, SpecialTokens, Start, TextStream, TextStreamOptions, Tokenizer,
};
use midpo::types::TokenId;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const FIXTURES: [&str; 2] = ["tiny-routed", "tiny-gqa"];

fn read(fixture: &str, file: &str) -> Vec<u8> {
    let path = format!(
        "{}/tests/fixtures/{fixture}/{file}",
        env!("CARGO_MANIFEST_DIR")
    );
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn json_of(fixture: &str, file: &str) -> Value {
    serde_json::from_slice(&read(fixture, file)).unwrap()
}

fn tokenizer(fixture: &str) -> Tokenizer {
    Tokenizer::new(&read(fixture, "tokenizer.json")).unwrap()
}

fn ids(value: &Value) -> Vec<TokenId> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| TokenId(u32::try_from(id.as_u64().unwrap()).unwrap()))
        .collect()
}

fn special() -> SpecialTokens {
    SpecialTokens {
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        others: vec![("pad_token".into(), "<pad>".into())],
    }
}

fn chat(messages: &Value, add_generation_prompt: bool) -> Chat {
    Chat {
        messages: messages
            .as_array()
            .unwrap()
            .iter()
            .map(|message| Message {
                role: message["role"].as_str().unwrap().to_owned(),
                content: message["content"].as_str().unwrap().to_owned(),
                extra: Map::new(),
            })
            .collect(),
        add_generation_prompt,
        ..Chat::default()
    }
}

fn user(content: &str) -> Chat {
    chat(&json!([{"role": "user", "content": content}]), true)
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(Some(source), special()).unwrap()
}

#[test]
fn encode_and_decode_give_the_golden_ids_and_texts() {
    for fixture in FIXTURES {
        let (tokenizer, golden) = (
            tokenizer(fixture),
            json_of(fixture, "golden/tokenizer.json"),
        );
        assert_eq!(tokenizer.vocab_size(), 512);
        for case in golden["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            for (key, bos) in [("ids", false), ("ids_with_bos", true)] {
                let want = ids(&case[key]);
                assert_eq!(tokenizer.encode_trusted(text, bos).unwrap(), want, "{text}");
                if ["s>", "unk>", "<pad>", "|>"]
                    .iter()
                    .any(|part| text.contains(part))
                {
                    // Only the start of sequence that was asked for is one; the text's own is words.
                    let inert = tokenizer.encode(text, bos).unwrap();
                    let special = inert.iter().filter(|id| tokenizer.is_special(**id));
                    assert_eq!(special.count(), usize::from(bos), "{text}");
                    assert_eq!(tokenizer.decode(&inert, true), text);
                } else {
                    assert_eq!(tokenizer.encode(text, bos).unwrap(), want, "{text}");
                }
            }
            for (key, skip) in [("decoded", false), ("decoded_skip_special", true)] {
                let want = case[key].as_str().unwrap();
                let decoded = tokenizer.decode(&ids(&case["ids"]), skip);
                assert_eq!(decoded, want, "{fixture}: {text}: {key}");
            }
        }
        let case = &golden["reference_evaluation_template"];
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]));
    }
}

#[test]
fn paper_template_gives_the_golden_texts_and_ids_with_the_users_words_inert() {
    for fixture in FIXTURES {
        let (tokenizer, golden) = (
            tokenizer(fixture),
            json_of(fixture, "golden/tokenizer.json"),
        );
        let template = ChatTemplate::new(None, special()).unwrap();
        for case in golden["paper_template"].as_array().unwrap() {
            let chat = chat(&case["messages"], true);
            assert_eq!(
                template.render(&chat).unwrap(),
                case["text"].as_str().unwrap()
            );
            let found = template.encode(&tokenizer, &chat).unwrap();
            let want = case.get("ids_user_text_inert").unwrap_or(&case["ids"]);
            assert_eq!(found, ids(want), "{}", case["name"]);
        }
    }
}

#[test]
fn jinja_template_gives_the_golden_texts_and_ids() {
    let (tokenizer, golden) = (
        tokenizer("tiny-gqa"),
        json_of("tiny-gqa", "golden/tokenizer.json"),
    );
    let config = json_of("tiny-gqa", "tokenizer_config.json");
    let template = template(config["chat_template"].as_str().unwrap());
    let cases = golden["jinja_template"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let generation = case["add_generation_prompt"].as_bool().unwrap();
        let chat = chat(&case["messages"], generation);
        assert_eq!(
            template.render(&chat).unwrap(),
            case["text"].as_str().unwrap()
        );
        let want = case.get("ids_user_text_inert").unwrap_or(&case["ids"]);
        assert_eq!(
            template.encode(&tokenizer, &chat).unwrap(),
            ids(want),
            "{case}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn stream_joined_is_the_decoding_of_all_ids(
        which in 0..2usize,
        generated in prop::collection::vec(0..520u32, 0..60),
        skip: bool,
    ) {
        let tokenizer = tokenizer(FIXTURES[which]);
        let library = tokenizers::Tokenizer::from_bytes(read(FIXTURES[which], "tokenizer.json")).unwrap();
        let options = TextStreamOptions { start: Start::Text, skip_special_tokens: skip, ..TextStreamOptions::default() };
        let mut stream = TextStream::new(&tokenizer, &options);
        let (mut text, mut tokens) = (String::new(), 0);
        for (count, id) in generated.iter().enumerate() {
            let piece = stream.push(TokenId(*id));
            text.push_str(&piece.text);
            tokens += piece.tokens;
            // The covered tokens are all in the text that is out.
            let covered: Vec<u32> = generated[..tokens].to_vec();
            let whole = library.decode(&covered, skip).unwrap();
            prop_assert!(text.starts_with(whole.trim_end_matches('\u{fffd}')), "{text:?} {whole:?}");
            prop_assert!(tokens <= count + 1);
        }
        let rest = stream.finish();
        text.push_str(&rest.text);
        prop_assert_eq!(tokens + rest.tokens, generated.len());
        prop_assert_eq!(text, library.decode(&generated, skip).unwrap());
    }
}
