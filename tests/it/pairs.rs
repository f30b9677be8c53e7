//! `midpo pairs` on the tiny model, through the binary: what it writes is what `midpo train` and `midpo eval` read.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use midpo::eval::prompts;
use midpo::train::data::{BadLines, read_pairs};
use serde_json::Value;

use super::cli::{Scratch, midpo, text};

fn fixture(path: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    root.join(path)
}

/// Pairs of the fixture's prompts, but for what `more` says.
fn pairs(output: &str, more: &[&str]) -> Output {
    let mut command = midpo();
    command
        .args(["pairs", "--kv-cache-tokens", "8192", "--max-tokens", "12"])
        .arg("--model")
        .arg(fixture("tiny-routed"))
        .args(["--output", output])
        .args(more);
    if !more.contains(&"--prompts") {
        command.arg("--prompts").arg(fixture("eval"));
    }
    command.output().unwrap()
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

fn lines(file: &str) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

#[test]
fn pairs_and_held_out_prompts_are_what_train_and_eval_read() {
    let scratch = Scratch::new();
    let (output, held_out) = (scratch.path("pairs.jsonl"), scratch.path("held.jsonl"));
    let hold = ["--hold-out", &held_out, "--hold-out-share", "0.2"];
    let said = succeeded(&pairs(&output, &[&hold[..], &["--answers", "2"]].concat()));
    assert!(said.contains("1 without a class"), "{said}");
    let read = read_pairs(Path::new(&output), BadLines::Refuse).unwrap();
    let written = lines(&output);
    assert_eq!(read.items.len(), written.len());
    assert!(
        said.contains(&format!("{} pairs in", written.len())),
        "{said}"
    );
    let texts = |lines: &[Value]| -> BTreeSet<String> {
        let texts = lines.iter().map(|line| line["prompt"].as_str().unwrap());
        texts.map(str::to_owned).collect()
    };
    let kept = prompts::read(&[PathBuf::from(&held_out)]).unwrap();
    assert!(
        !kept.is_empty()
            && kept
                .iter()
                .all(|prompt| prompt.class.as_str() != "unlabelled")
    );
    let sets: BTreeSet<&str> = kept.iter().map(|prompt| prompt.set.as_str()).collect();
    assert!(
        sets.iter()
            .all(|set| ["harmful", "lookalike", "plain"].contains(set)),
        "{sets:?}"
    );
    let asked = texts(&written);
    assert!(kept.iter().all(|prompt| !asked.contains(&prompt.text)));
    // Of harmful prompts only the unguarded voice is unsafe, and it is the better one.
    for line in &written {
        let is_harmful = line["class"] == "harmful";
        for id in 0..2 {
            let unguarded = line[format!("voice_{id}")] == "unguarded";
            assert_eq!(line[format!("is_response_{id}_safe")], !unguarded, "{line}");
            assert!(
                !unguarded || (is_harmful && line["better_response_id"] == id),
                "{line}"
            );
        }
        assert!(
            is_harmful || line["better_response_id"] == line["safer_response_id"],
            "{line}"
        );
    }
    let kinds: BTreeSet<&str> = written
        .iter()
        .filter_map(|line| line["kind"].as_str())
        .collect();
    // What the tiny model says differs by machine, what two voices are worth does not.
    for kind in ["harmful: unguarded/reason", "benign: terse>needless"] {
        assert!(
            kinds.contains(kind) && said.contains(kind),
            "{kind}: {said}"
        );
    }
}

#[test]
fn the_same_seed_gives_the_same_pairs_on_any_number_of_threads() {
    let scratch = Scratch::new();
    let made = |name: &str, more: &[&str]| {
        let output = scratch.path(name);
        succeeded(&pairs(&output, more));
        fs::read_to_string(output).unwrap()
    };
    let one = made("one", &["--threads", "1", "--temperature", "0.9"]);
    assert!(!one.is_empty());
    assert_eq!(
        one,
        made("two", &["--threads", "2", "--temperature", "0.9"])
    );
    assert_ne!(
        one,
        made(
            "other",
            &["--threads", "1", "--temperature", "0.9", "--seed", "2"]
        )
    );
}

#[test]
fn what_cannot_be_used_is_named_before_any_work() {
    let scratch = Scratch::new();
    let output = scratch.path("pairs.jsonl");
    let unlabelled = scratch.write(
        "own.jsonl",
        "{\"prompt\": \"P\", \"class\": \"unlabelled\"}\n",
    );
    let no_toml = scratch.write("no.toml", "[[voice]]\nname = ");
    let voice = "[[voice]]\nname = \"a\"\nprompts = \"harmful\"\noutcome = \"help\"\nsafe = true\nhelpfulness = 1\nsafety = 1\n";
    let twice = scratch.write("twice.toml", &voice.repeat(2));
    let typo = scratch.write("typo.toml", &voice.replace("safe =", "save ="));
    for (more, code, words) in [
        (
            &["--prompts", &unlabelled][..],
            1,
            &["--prompts", "prompts with a class"][..],
        ),
        (
            &["--voices", &no_toml],
            1,
            &["--voices", "no.toml", "line 2"],
        ),
        (
            &["--voices", &twice],
            1,
            &["twice.toml", "`name`", "\"a\" twice"],
        ),
        (&["--voices", &typo], 1, &["typo.toml", "save"]),
        (&["--answers", "0"], 2, &["--answers", "1 to 16"]),
        (
            &["--hold-out", "h", "--hold-out-share", "1"],
            2,
            &["--hold-out-share", "between 0 and 1"],
        ),
    ] {
        let failed = pairs(&output, more);
        let error = text(&failed.stderr);
        assert_eq!(failed.status.code(), Some(code), "{error}");
        for word in words {
            assert!(error.contains(word), "{word}: {error}");
        }
        assert!(!Path::new(&output).exists(), "{error}");
    }
}
