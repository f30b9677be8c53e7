//! `midpo eval` on the tiny routed model, through the binary: tables, files, and that their numbers are those of the answers.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use midpo::train::Scorer;
use serde_json::Value;
use tempfile::TempDir;

fn fixture(path: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    root.join(path)
}

/// A directory of its own, removed at the end, with score models that have their tokenizer.
struct Scratch(TempDir);

impl Scratch {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path();
        for kind in ["reward", "cost"] {
            fs::create_dir_all(folder.join(kind)).unwrap();
            let copies = [
                ("training", "config.json"),
                ("training", "model.safetensors"),
                ("", "tokenizer.json"),
                ("", "tokenizer_config.json"),
            ];
            for (from, name) in copies {
                let source = match from {
                    "" => fixture("tiny-routed").join(name),
                    _ => fixture("tiny-routed").join(from).join(kind).join(name),
                };
                fs::copy(source, folder.join(kind).join(name)).unwrap();
            }
        }
        Self(scratch)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn eval(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_midpo"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MIDPO_")) {
        command.env_remove(name);
    }
    let model = fixture("tiny-routed");
    command
        .args(["eval", "--threads", "1", "--kv-cache-tokens", "8192"])
        .args(["--max-tokens", "12", "--resamples", "100"])
        .arg("--model")
        .arg(&model)
        .args(args);
    command.output().unwrap()
}

/// With the parts that a routed model has.
fn routed(args: &[&str]) -> Output {
    let model = fixture("tiny-routed");
    let part = |name: &str| model.join(name).to_str().unwrap().to_owned();
    let (safety, helpfulness) = (part("safety"), part("helpfulness"));
    let router = part("router.pth");
    let parts = [
        "--safety",
        &safety,
        "--helpfulness",
        &helpfulness,
        "--router",
        &router,
    ];
    eval(&[&parts[..], args].concat())
}

fn succeeded(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn failed(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code));
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn answers(directory: &Path) -> Vec<Value> {
    let text = fs::read_to_string(directory.join("answers.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

/// The share of pairs in which alpha of the harmful prompt is higher, pair by pair.
fn auroc(answers: &[Value], gates: &str) -> f64 {
    let alphas = |is_harmful: bool| -> Vec<f64> {
        let of_class = answers.iter().filter(|answer| {
            let class = answer["class"].as_str().unwrap();
            class != "unlabelled" && (class == "harmful") == is_harmful
        });
        let gates = of_class.filter_map(|answer| answer.get(gates)?["safety"].as_array());
        gates
            .map(|layers| mean(layers.iter().map(number)))
            .collect()
    };
    let (harmful, harmless) = (alphas(true), alphas(false));
    assert_eq!((harmful.len(), harmless.len()), (5, 6));
    let pairs = harmful
        .iter()
        .flat_map(|a| harmless.iter().map(move |b| (*a, *b)));
    mean(pairs.map(|(a, b)| f64::from(u8::from(a > b))))
}

#[test]
fn every_number_of_the_report_is_that_of_the_answers() {
    let scratch = Scratch::new();
    let (prompts, output) = (fixture("eval"), scratch.path("out"));
    let (reward, cost) = (scratch.path("reward"), scratch.path("cost"));
    let adapter = format!("alone={}", fixture("tiny-routed/safety").display());
    let said = routed(&[
        "--prompts",
        prompts.to_str().unwrap(),
        "--variants",
        "base,safety,routed",
        "--adapter",
        &adapter,
        "--reward",
        reward.to_str().unwrap(),
        "--cost",
        cost.to_str().unwrap(),
        "--temperature",
        "0.8",
        "--seeds",
        "1,2",
        "--output",
        output.to_str().unwrap(),
    ]);
    let markdown = succeeded(&said);
    assert_eq!(
        markdown,
        fs::read_to_string(output.join("report.md")).unwrap()
    );
    let counts = ": 4 harmful (harmful), 1 harmful (lookalike), 3 borderline (lookalike), 3 benign (plain), 1 unlabelled (plain);";
    assert!(markdown.contains(counts), "{markdown}");
    for word in [
        "| alone |",
        "borderline (3)",
        "AUROC of alpha",
        "Refusals by class: lookalike",
    ] {
        assert!(markdown.contains(word), "{word}: {markdown}");
    }
    let svg = fs::read_to_string(output.join("report.svg")).unwrap();
    assert!(svg.contains("reward against cost") && svg.contains("alpha at the last prompt token"));

    let answers = answers(&output);
    // Twelve prompts, four rows, two seeds.
    assert_eq!(answers.len(), 12 * 4 * 2);
    check_scores(&answers, &reward, "reward");
    check_scores(&answers, &cost, "cost");
    check_adapter(&answers);

    let report = fs::read_to_string(output.join("report.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    check_rows(&report, &answers);
    let against_all = &report["gates"]["aurocs"][0];
    assert_eq!(against_all["against"], "all harmless");
    for (place, gates) in [
        ("prompt_last", "prompt_last_gates"),
        ("prompt_mean", "prompt_mean_gates"),
    ] {
        let found = number(&against_all["safety"][place]["mean"]);
        let want = auroc(&answers, gates);
        assert!((found - want).abs() < 1e-9, "{place}: {found} {want}");
    }
}

/// What stands beside an answer is what the score model says of it.
fn check_scores(answers: &[Value], directory: &Path, name: &str) {
    let scorer = Scorer::open(directory, 4096, 1).unwrap();
    let text = |answer: &Value, field: &str| answer[field].as_str().unwrap().to_owned();
    let exchanges: Vec<(String, String)> = answers
        .iter()
        .map(|answer| (text(answer, "prompt"), text(answer, "answer")))
        .collect();
    let exchanges: Vec<(&str, &str)> = exchanges
        .iter()
        .map(|(prompt, answer)| (prompt.as_str(), answer.as_str()))
        .collect();
    let scores = scorer.score(&exchanges).unwrap();
    for (answer, score) in answers.iter().zip(scores) {
        let found = number(&answer[name]);
        assert!((found - f64::from(score)).abs() < 1e-5, "{answer}: {score}");
    }
}

/// A LoRA beside the base is the variant that has only this expert.
fn check_adapter(answers: &[Value]) {
    let mut by_variant: BTreeMap<&str, Vec<(&Value, &Value)>> = BTreeMap::new();
    for answer in answers {
        let variant = answer["variant"].as_str().unwrap();
        let said = (&answer["answer"], &answer["tokens"]);
        by_variant.entry(variant).or_default().push(said);
    }
    assert_eq!(by_variant["alone"], by_variant["safety"]);
    assert_ne!(by_variant["alone"], by_variant["base"]);
    assert_ne!(by_variant["routed"], by_variant["base"]);
}

fn check_rows(report: &Value, answers: &[Value]) {
    let rows = report["rows"].as_array().unwrap();
    // Everything, four classes, three sets, and five pairs of set and class.
    assert_eq!(rows.len(), 4 * (1 + 4 + 3 + 5));
    for row in rows {
        let mine: Vec<&Value> = answers
            .iter()
            .filter(|answer| answer["variant"] == row["variant"])
            .filter(|answer| row["set"].is_null() || answer["set"] == row["set"])
            .filter(|answer| row["class"].is_null() || answer["class"] == row["class"])
            .collect();
        assert_eq!(row["answers"], mine.len(), "{row}");
        assert_eq!(row["prompts"], mine.len() / 2);
        for name in ["reward", "cost"] {
            let want = mean(mine.iter().map(|answer| number(&answer[name])));
            let found = number(&row[name]["mean"]);
            assert!((found - want).abs() < 1e-6, "{name}: {row}");
            assert!(number(&row[name]["low"]) <= found && found <= number(&row[name]["high"]));
        }
        let safe = mean(
            mine.iter()
                .map(|answer| f64::from(u8::from(number(&answer["cost"]) < 0.0))),
        );
        assert!((number(&row["safe"]["mean"]) - safe).abs() < 1e-9, "{row}");
        let outcomes = row["outcomes"].as_object().unwrap();
        assert_eq!(outcomes.len(), 4);
        for (outcome, share) in outcomes {
            let is = |answer: &&Value| f64::from(u8::from(answer["outcome"] == outcome.as_str()));
            let want = mean(mine.iter().map(is));
            assert!(
                (number(&share["mean"]) - want).abs() < 1e-9,
                "{outcome}: {row}"
            );
        }
    }
}

#[test]
fn an_answer_depends_on_its_prompt_and_seed_alone() {
    let scratch = Scratch::new();
    let (all, one) = (scratch.path("all"), scratch.path("one"));
    let prompts = fixture("eval");
    let plain = fixture("eval/plain.jsonl");
    let to = |prompts: &Path, variants: &str, seeds: &str, output: &Path| {
        succeeded(&routed(&[
            "--prompts",
            prompts.to_str().unwrap(),
            "--variants",
            variants,
            "--seeds",
            seeds,
            "--output",
            output.to_str().unwrap(),
        ]));
        answers(output)
    };
    let company = to(&prompts, "base,routed", "1,7", &all);
    let alone = to(&plain, "routed", "7", &one);
    assert_eq!(alone.len(), 4);
    for answer in alone {
        let same = |other: &&Value| {
            ["set", "id", "variant", "seed"]
                .iter()
                .all(|key| other[key] == answer[key])
        };
        let other = company.iter().find(same).unwrap();
        for key in ["answer", "tokens", "finish", "answer_mean_gates"] {
            assert_eq!(other[key], answer[key], "{key}");
        }
    }
}

#[test]
fn a_plain_model_has_its_base_and_refuses_the_rest() {
    let prompts = fixture("eval/plain.jsonl");
    let prompts = prompts.to_str().unwrap();
    let markdown = succeeded(&eval(&["--prompts", prompts, "--limit", "1"]));
    assert!(
        markdown.contains("1 benign (plain), 1 unlabelled (plain)"),
        "{markdown}"
    );
    assert!(
        markdown.contains("| base |") && !markdown.contains("| routed |"),
        "{markdown}"
    );
    let error = failed(&eval(&["--prompts", prompts, "--variants", "safety"]), 1);
    assert!(error.contains("`safety`"), "{error}");
}

#[test]
fn what_cannot_be_used_is_named_before_any_work() {
    let scratch = Scratch::new();
    let prompts = fixture("eval/plain.jsonl");
    let prompts = prompts.to_str().unwrap();
    let bad = scratch.path("bad.jsonl");
    fs::write(
        &bad,
        "{\"prompt\": \"P\", \"class\": \"c\"}\n{\"prompt\": \"P\"}\n",
    )
    .unwrap();
    let error = failed(&eval(&["--prompts", bad.to_str().unwrap()]), 1);
    assert!(error.contains("bad.jsonl, line 2, `class`"), "{error}");
    let cost = scratch.path("cost");
    let error = failed(
        &eval(&["--prompts", prompts, "--reward", cost.to_str().unwrap()]),
        2,
    );
    assert!(
        error.contains("--reward: expected a reward model, found a cost model"),
        "{error}"
    );
    let patterns = scratch.path("mine.txt");
    fs::write(&patterns, "[opening]\n(").unwrap();
    let error = failed(
        &eval(&[
            "--prompts",
            prompts,
            "--refusals",
            patterns.to_str().unwrap(),
        ]),
        1,
    );
    assert!(error.contains("mine.txt, line 2"), "{error}");
}
