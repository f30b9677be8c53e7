//! Tokenizers and chat templates out of a file's keys.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use midpo::checkpoint::TextParts;
use midpo::dtype::DType;
use midpo::text::{Chat, ChatTemplate, Message, SpecialTokens, Tokenizer};
use midpo::types::TokenId;
use proptest::prelude::*;
use serde_json::Value;

use super::convert::{fixture, gqa, routed};
use super::{load, load_path};
use crate::gguf_file::{GgufFile, Meta};

fn tokenizer(text: &TextParts) -> Tokenizer {
    Tokenizer::new(&text.tokenizer_json).unwrap()
}

#[test]
fn byte_level_tokenizer_gives_the_golden_ids() {
    for (directory, file) in [("tiny-routed", routed(GgmlDType::F32)), ("tiny-gqa", gqa())] {
        let (_, _, text) = load(&format!("{directory}-tokenizer"), &file);
        assert_eq!(text.bos_token.as_deref(), Some("<s>"));
        assert_eq!(text.eos_token.as_deref(), Some("</s>"));
        let tokenizer = tokenizer(&text);
        let golden: Value =
            serde_json::from_slice(&fixture(&format!("{directory}/golden/tokenizer.json")))
                .unwrap();
        for case in golden["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            for (key, bos) in [("ids", false), ("ids_with_bos", true)] {
                let found: Vec<u32> = tokenizer
                    .encode_trusted(text, bos)
                    .unwrap()
                    .iter()
                    .map(|id| id.0)
                    .collect();
                assert_eq!(serde_json::json!(found), case[key], "{text}");
            }
        }
    }
}

/// A SentencePiece vocabulary small enough to work out by hand. Later words have lower scores.
fn sentence_piece() -> GgufFile {
    let mut tokens: Vec<(String, i32)> =
        vec![("<unk>".into(), 2), ("<s>".into(), 3), ("</s>".into(), 3)];
    tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    let words = [
        "▁t", "he", "▁the", "▁h", "▁he", "ll", "▁hell", "o", "▁hello", "▁", "h", "e", "l", "t",
    ];
    tokens.extend(words.map(|word| (word.to_owned(), 1)));
    tokens.push(("<think>".into(), 4));
    // Words that would make `</s>` if control tokens were words.
    tokens.extend(["</", "s>", "<", "/", "s", ">"].map(|word| (word.to_owned(), 1)));
    tokens.resize_with(512, || (String::new(), 5));
    let mut file = routed(GgmlDType::F32);
    for key in ["pre", "merges", "add_bos_token"] {
        file.remove(&format!("tokenizer.ggml.{key}"));
    }
    file.set("tokenizer.ggml.model", Meta::Text("llama".into()));
    file.set(
        "tokenizer.ggml.scores",
        Meta::F32s((0..512).map(|id| -(id as f32)).collect()),
    );
    file.set(
        "tokenizer.ggml.tokens",
        Meta::Texts(tokens.iter().map(|(text, _)| text.clone()).collect()),
    );
    file.set(
        "tokenizer.ggml.token_type",
        Meta::I32s(tokens.iter().map(|(_, kind)| *kind).collect()),
    );
    file
}

#[test]
fn sentence_piece_tokenizer_merges_by_score_and_falls_back_on_bytes() {
    let (_, _, text) = load("sentence-piece", &sentence_piece());
    let tokenizer = tokenizer(&text);
    let texts = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, false).unwrap();
        ids.iter().map(|id| tokenizer.token_text(*id)).collect()
    };
    assert_eq!(texts("the hello"), [" the", " hello"]);
    // The user's `</s>` stays words, though its halves are words.
    assert_eq!(texts("the</s>"), [" the", "</", "s>"]);
    let ids = |text: &str| tokenizer.encode(text, true).unwrap();
    let byte = |byte: u8| TokenId(3 + u32::from(byte));
    let space = tokenizer.id_of("▁").unwrap();
    assert_eq!(ids("é"), [TokenId(1), space, byte(0xc3), byte(0xa9)]);
    assert_eq!(tokenizer.token_bytes(byte(0xc3)), [0xc3]);
    let think = tokenizer.id_of("<think>").unwrap();
    assert!(ids("the <think>").contains(&think) && !tokenizer.is_special(think));
    for text in ["the hello", " the", "é hello\n", ""] {
        assert_eq!(tokenizer.decode(&ids(text), true), text);
    }
    let trusted = tokenizer.encode_trusted("the</s>the", false).unwrap();
    let the = tokenizer.id_of("▁the").unwrap();
    assert_eq!(trusted, [the, TokenId(2), the]);
}

proptest! {
    #[test]
    fn sentence_piece_decodes_as_the_library_does_one_id_at_a_time(
        ids in prop::collection::vec(prop_oneof![0..290u32, 0..3u32, 260..262u32], 0..24),
        skip: bool,
        ){
        use midpo::text::{Detokenizer, Start};
        let (_, _, text) = load("sentence-piece-decode", &sentence_piece());
        let library = tokenizers::Tokenizer::from_bytes(&text.tokenizer_json).unwrap();
        let tokenizer = tokenizer(&text);
        let mut detokenizer = Detokenizer::new(&tokenizer, Start::Text, skip);
        let mut pieces = String::new();
        for id in &ids {
            pieces.push_str(&detokenizer.push(TokenId(*id)));
        }
        pieces.push_str(&detokenizer.finish());
        prop_assert_eq!(pieces, library.decode(&ids, skip).unwrap());
    }
}

/// A real file, where one is at hand: `.ci/run` names it.
#[test]
fn real_file_gives_the_golden_prompt_ids() {
    let Some(path) = std::env::var_os("MIDPO_TEST_GGUF") else {
        println!("MIDPO_TEST_GGUF names no file: nothing to test");
        return;
    };
    let (config, base, text) = load_path(Path::new(&path)).unwrap();
    assert_eq!(
        (config.num_layers, config.hidden_size, config.vocab_size),
        (30, 576, 49_152)
    );
    assert!(config.tie_word_embeddings && base.lm_head.is_none());
    assert_eq!(base.layers[0].q_proj.dtype(), DType::Q4_1);
    assert_eq!(base.embed_tokens.dtype(), DType::Q8_0);
    let special = SpecialTokens {
        bos_token: text.bos_token.clone(),
        eos_token: text.eos_token.clone(),
        others: text.special_tokens.clone(),
    };
    let template = ChatTemplate::new(text.chat_template.as_deref(), special).unwrap();
    let tokenizer = tokenizer(&text);
    let golden: Value = serde_json::from_slice(&fixture("smollm2/golden.json")).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let chat = Chat {
            messages: vec![Message {
                role: "user".into(),
                content: case["prompt"].as_str().unwrap().into(),
                ..Message::default()
            }],
            add_generation_prompt: true,
            ..Chat::default()
        };
        assert_eq!(
            template.render(&chat).unwrap(),
            case["rendered"].as_str().unwrap()
        );
        let ids: Vec<u32> = template
            .encode(&tokenizer, &chat)
            .unwrap()
            .iter()
            .map(|id| id.0)
            .collect();
        assert_eq!(serde_json::json!(ids), case["prompt_ids"]);
        let greedy = case["greedy_ids"].as_array().unwrap().iter();
        let greedy: Vec<TokenId> = greedy
            .map(|id| TokenId(u32::try_from(id.as_u64().unwrap()).unwrap()))
            .collect();
        assert_eq!(
            tokenizer.decode(&greedy, true),
            case["greedy_text"].as_str().unwrap()
        );
    }
}
