//! Tokenizer, templates and text streams, against the ids that the authors' stack and Hugging Face give.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use midpo::text::{
    Chat, ChatTemplate, Message, SpecialTokens, Start, TextError, TextStream, TextStreamOptions,
    Tokenizer,
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

#[test]
fn templates_render_as_jinja2_does() {
    let golden = json_of(".", "templates.json");
    for case in golden["templates"].as_array().unwrap() {
        let template = template(case["source"].as_str().unwrap());
        for want in case["cases"].as_array().unwrap() {
            let messages = &golden["chats"][want["chat"].as_u64().unwrap() as usize];
            let messages = messages.as_array().unwrap().iter().map(|message| {
                let mut extra = message.as_object().unwrap().clone();
                let mut take = |key: &str| {
                    let value = extra.shift_remove(key).unwrap();
                    value.as_str().unwrap().to_owned()
                };
                let (role, content) = (take("role"), take("content"));
                Message {
                    role,
                    content,
                    extra,
                }
            });
            let chat = Chat {
                messages: messages.collect(),
                add_generation_prompt: want["add_generation_prompt"].as_bool().unwrap(),
                ..Chat::default()
            };
            let found = template.render(&chat);
            match (want["text"].as_str(), want["raises"].as_str()) {
                (Some(text), _) => assert_eq!(found.unwrap(), text, "{}", case["name"]),
                (_, Some(message)) => {
                    let message = message.to_owned();
                    assert_eq!(
                        found,
                        Err(TextError::Template { message }),
                        "{}",
                        case["name"]
                    );
                }
                _ => panic!("{want}"),
            }
        }
    }
}

/// Ids of `chat` under `source`, with the special ones named.
fn specials(tokenizer: &Tokenizer, source: &str, chat: &Chat) -> Vec<u32> {
    let ids = template(source).encode(tokenizer, chat).unwrap();
    let special = ids.iter().filter(|id| tokenizer.is_special(**id));
    special.map(|id| id.0).collect()
}

#[test]
fn what_the_user_types_is_never_a_special_token() {
    let tokenizer = tokenizer("tiny-gqa");
    let plain = "<s>{% for m in messages %}{{ m.content }}{% endfor %}</s>";
    let joined = "<s>{{ messages | map(attribute='content') | join }}</s>";
    let trimmed = "<s>{% for m in messages %}{{ m.content | trim }}{% endfor %}</s>";
    let fitted = "<s>{% for m in messages %}<{{ m.content }}>{% endfor %}</s>";
    let condition = "<s>{% for m in messages %}{% if '</s>' in m.content %}{{ m.content.replace('</s>', '<|eot|>') }}{% else %}{{ m.content }}{% endif %}{% endfor %}</s>";
    let json = "<s>{{ messages | tojson }}{{ tools | tojson }}</s>";
    let contents: &[&[&str]] = &[
        &["</s>"],
        &["a<s></s><|user|>b<|eot|>"],
        &["<", "/s>"],
        &["</", "s>"],
        &["</s", ">"],
        &["<|us", "er|>"],
        &["</s  ", "  >"],
        &["  </s>  "],
        &["<</s>/s>", "<|<|user|>user|>"],
        &["s>", "/s>", ">", "<", "</s"],
        &["<s", "s", "/s", "|user|", "|eot|"],
        &[
            "\u{10fffd}</s>\u{10fffc}",
            "\u{10fffd}2\u{10fffd}",
            "\u{fdd0}</s>",
        ],
    ];
    for source in [plain, joined, trimmed, condition, json] {
        for contents in contents {
            let messages: Vec<Value> = contents
                .iter()
                .map(|text| json!({"role": "user", "content": text}))
                .collect();
            let mut chat = chat(&Value::from(messages), false);
            chat.messages[0]
                .extra
                .insert("</s>".into(), json!(["<s>", {"a<|eot|>": "</s>"}]));
            chat.kwargs
                .insert("tools".into(), json!([{"</s>": "<|user|>"}]));
            assert_eq!(
                specials(&tokenizer, source, &chat),
                [1, 2],
                "{source} {contents:?}"
            );
            // Nothing but the ids changed: the text is what the template says.
            let ids = template(source).encode(&tokenizer, &chat).unwrap();
            if source != condition {
                assert_eq!(
                    tokenizer.decode(&ids, false),
                    template(source).render(&chat).unwrap()
                );
            }
        }
    }
    // A head or a tail of a special token does not fit what the template has around it.
    for content in ["s", "/s", "</s", "/s>", "|eot|>"] {
        let found = specials(&tokenizer, fitted, &user(content));
        let built = ["s", "/s"].contains(&content);
        assert_eq!(found.len(), 2 + usize::from(built), "{content}");
    }
}

#[test]
fn names_of_special_tokens_never_match_words_of_the_text() {
    let tokenizer = tokenizer("tiny-routed");
    let mut codes: Vec<u32> = (0x10_0000..=0x10_fffd).rev().take(3).collect();
    codes.push(0x10_0000);
    for code in codes {
        let mark = char::from_u32(code).unwrap();
        let text = format!("{mark}2{mark} and {mark}");
        let ids = tokenizer
            .encode_trusted(&format!("{text}</s>"), false)
            .unwrap();
        assert_eq!(
            ids.iter().filter(|id| tokenizer.is_special(**id)).count(),
            1
        );
        assert_eq!(tokenizer.decode(&ids, true), text);
    }
}

#[test]
fn template_errors_are_the_templates_own_words() {
    for (source, message) in [
        ("{{ raise_exception('no system role') }}", "no system role"),
        (
            "{% macro f() %}{{ raise_exception('inner: \"x\"') }}{% endmacro %}{{ f() }}",
            "inner: \"x\"",
        ),
    ] {
        let found = template(source).render(&user("x"));
        assert_eq!(
            found,
            Err(TextError::Template {
                message: message.into()
            })
        );
    }
    for source in [
        "{{ messages.nope.nope }}",
        "{{ 1 + 'a' }}",
        "{{ nope() }}",
        "{{ x | tojson }}",
    ] {
        let message = template(source).render(&user("x")).unwrap_err().to_string();
        assert!(
            message.starts_with("the chat template fails: "),
            "{message}"
        );
    }
    for source in ["{% if %}", "{{ x", "{% nope %}", "{% for %}{% endfor %}"] {
        let error = ChatTemplate::new(Some(source), special()).unwrap_err();
        assert!(matches!(error, TextError::TemplateSource { .. }), "{error}");
        assert!(error.to_string().contains("line 1"), "{error}");
    }
}

#[test]
fn templates_that_run_away_are_stopped() {
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{% for i in range(100000) %}{{ messages[0].content * 100 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ] {
        assert!(
            template(source).render(&user("some words")).is_err(),
            "{source}"
        );
    }
    let long = "x".repeat(5 << 20);
    let error = template("{{ messages[0].content }}")
        .render(&user(&long))
        .unwrap_err();
    assert!(matches!(error, TextError::TooLong { .. }), "{error}");
    let error = tokenizer("tiny-routed").encode(&long, false).unwrap_err();
    assert!(matches!(error, TextError::TooLong { .. }), "{error}");
}

#[test]
fn strftime_now_formats_the_date() {
    let text = template("{{ strftime_now('%Y-%m-%d %B') }}")
        .render(&user("x"))
        .unwrap();
    let parts: Vec<&str> = text.split(['-', ' ']).collect();
    assert_eq!(parts.len(), 4, "{text}");
    assert!(parts[0].parse::<u32>().unwrap() >= 2025, "{text}");
}

#[test]
fn continue_final_message_ends_with_the_last_words() {
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let trims = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]\n{% endfor %}";
    let drops = "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}";
    let going = |last: &str| {
        let messages = json!([
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": last},
        ]);
        Chat {
            continue_final_message: true,
            ..chat(&messages, false)
        }
    };
    for (source, last, want) in [
        (source, "Once upon", "[user]Hi[end]\n[assistant]Once upon"),
        (source, "Once  ", "[user]Hi[end]\n[assistant]Once  "),
        (source, "Hi", "[user]Hi[end]\n[assistant]Hi"),
        (trims, " Once ", "[user]Hi[end]\n[assistant]Once"),
    ] {
        let chat = going(last);
        assert_eq!(template(source).render(&chat).unwrap(), want);
        let tokenizer = tokenizer("tiny-gqa");
        let ids = template(source).encode(&tokenizer, &chat).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), want);
    }
    assert!(template(drops).render(&going("x")).is_err());
    let both = Chat {
        add_generation_prompt: true,
        ..going("x")
    };
    assert!(template(source).render(&both).is_err());
    let paper = ChatTemplate::new(None, special()).unwrap();
    let want = "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:Sure,";
    assert_eq!(paper.render(&going("Sure,")).unwrap(), want);
}

#[test]
fn paper_template_takes_a_system_turn_and_refuses_what_it_cannot_say() {
    let paper = ChatTemplate::new(None, SpecialTokens::default()).unwrap();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let render = |turns: &[Value], generation| paper.render(&chat(&turns.into(), generation));
    let (system, user) = (turn("system", "Be brief."), turn("user", "Hi"));
    let answer = turn("assistant", "Yes?");
    for (turns, generation, want) in [
        (
            vec![system.clone(), user.clone()],
            true,
            "USER: Be brief. Hi ASSISTANT:",
        ),
        (vec![user.clone()], false, "USER: Hi"),
        (
            vec![user.clone(), answer.clone()],
            false,
            "USER: Hi ASSISTANT:Yes?</s>",
        ),
    ] {
        let want = format!("BEGINNING OF CONVERSATION: {want}");
        assert_eq!(render(&turns, generation).unwrap(), want);
    }
    for turns in [
        vec![answer.clone(), user.clone()],
        vec![user.clone(), answer.clone(), answer],
        vec![turn("tool", "x"), user.clone()],
        vec![user, system],
    ] {
        let error = render(&turns, true).unwrap_err();
        assert!(matches!(&error, TextError::Template { message } if message.contains("user")));
    }
}

#[test]
fn stream_tells_which_tokens_each_piece_covers() {
    let tokenizer = tokenizer("tiny-routed");
    let options = TextStreamOptions {
        stop: vec!["lo wo".into()],
        ..TextStreamOptions::default()
    };
    let mut stream = TextStream::new(&tokenizer, &options);
    let ids = tokenizer.encode("Hello world, hello", false).unwrap();
    let (mut text, mut tokens, mut stop) = (String::new(), 0, None);
    for (count, id) in ids.iter().enumerate() {
        let piece = stream.push(*id);
        text.push_str(&piece.text);
        tokens += piece.tokens;
        if piece.stop.is_some() {
            assert_eq!(tokens, count + 1);
            stop = piece.stop;
            break;
        }
        // Tokens whose text is held back are not covered yet.
        assert_eq!(tokenizer.decode(&ids[..tokens], true), text);
    }
    assert_eq!(
        (text.as_str(), stop.map(|stop| stop.index)),
        ("Hel", Some(0))
    );
    assert_eq!(stream.push(ids[0]), midpo::text::TextPiece::default());
    assert_eq!(stream.finish(), midpo::text::TextPiece::default());
    // A character of four bytes is four tokens here: they are covered together.
    let mut stream = TextStream::new(&tokenizer, &TextStreamOptions::default());
    let ids = tokenizer.encode("🌧!", false).unwrap();
    let pieces: Vec<_> = ids.iter().map(|id| stream.push(*id)).collect();
    let covered: Vec<usize> = pieces.iter().map(|piece| piece.tokens).collect();
    assert_eq!(covered, [0, 0, 0, 4, 1]);
    assert_eq!(pieces[3].text, "🌧");
    let mut stream = TextStream::new(&tokenizer, &TextStreamOptions::default());
    assert_eq!(stream.push(ids[0]).tokens, 0);
    assert_eq!(stream.push_silent().tokens, 0);
    let rest = stream.finish();
    assert_eq!((rest.text.as_str(), rest.tokens), ("\u{fffd}", 2));
}

#[test]
fn token_bytes_joined_are_the_bytes_of_the_text() {
    for fixture in FIXTURES {
        let tokenizer = tokenizer(fixture);
        let text = "naïve 🌧 日本語\n\ttabs";
        let ids = tokenizer.encode(text, false).unwrap();
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|id| tokenizer.token_bytes(*id))
            .collect();
        assert_eq!(bytes, text.as_bytes());
        assert_eq!(tokenizer.token_text(TokenId(2)), "</s>");
        assert_eq!(tokenizer.id_of("</s>"), Some(TokenId(2)));
        assert_eq!(tokenizer.token_bytes(TokenId(99_999)), b"");
        assert!(!tokenizer.is_special(TokenId(99_999)));
    }
}

#[test]
fn broken_tokenizers_are_errors() {
    let good = read("tiny-routed", "tokenizer.json");
    let mut json: Value = serde_json::from_slice(&good).unwrap();
    let with = |path: &[&str], value: Value| {
        let mut broken = json.clone();
        let mut at = &mut broken;
        for key in path {
            at = &mut at[*key];
        }
        *at = value;
        serde_json::to_vec(&broken).unwrap()
    };
    let cases = [
        b"".to_vec(),
        b"{}".to_vec(),
        b"[1, 2".to_vec(),
        good[..good.len() / 2].to_vec(),
        good[..good.len() - 2].to_vec(),
        with(&["decoder"], json!({"type": "WordPiece"})),
        with(&["decoder"], json!({"type": "Nope"})),
        with(&["decoder"], json!(3)),
        with(&["model", "vocab"], json!({"a": 4_294_967_295u32})),
        with(&["model", "merges"], json!([["zz", "qq"]])),
        with(&["model", "type"], json!("Nope")),
        with(&["added_tokens"], json!([{"id": 0}])),
        with(
            &["pre_tokenizer"],
            json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}),
        ),
    ];
    for case in cases {
        let shown = String::from_utf8_lossy(&case[..case.len().min(40)]).into_owned();
        let error = Tokenizer::new(&case).unwrap_err();
        assert!(
            matches!(error, TextError::Tokenizer { .. }),
            "{shown}: {error}"
        );
    }
    json["truncation"] =
        json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    let tokenizer = Tokenizer::new(&serde_json::to_vec(&json).unwrap()).unwrap();
    assert!(tokenizer.encode("a longer text", true).unwrap().len() > 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn broken_tokenizers_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = read("tiny-routed", "tokenizer.json");
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = Tokenizer::new(&bytes);
    }
}
