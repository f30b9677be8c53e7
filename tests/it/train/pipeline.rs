//! The whole pipeline on a toy: from lines of text to a directory that serves, by one recipe.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use midpo::checkpoint::{self, Sources};
use midpo::config::train::{Recipe, RecipeOverrides, SafetyStage, SftStage, Stage};
use midpo::train::stage::{self, AllOptions, How};
use midpo::train::{METRICS, Observer, Record, Scorer, TrainError, Watch};
use midpo::types::{TokenId, Variant};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::fixture::fixture;
use super::parity::served;

/// A directory of its own, gone with the value.
struct Scratch(TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }
}

/// Keeps what a user would read.
#[derive(Default)]
struct Notes(Vec<String>);

impl Observer for Notes {
    fn started(&mut self, _: &str, _: usize, _: usize) {}
    fn step(&mut self, _: &Record) {}
    fn finished(&mut self) {}
    fn note(&mut self, text: &str) {
        self.0.push(text.to_owned());
    }
}

impl Notes {
    fn with(&self, start: &str) -> Vec<&String> {
        let notes = self.0.iter();
        notes.filter(|note| note.starts_with(start)).collect()
    }
}

const OBJECTS: [&str; 10] = [
    "name", "file", "line", "class", "string", "option", "module", "type", "action", "value",
];
const TEMPLATE: &str = "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + m['content'] + '?' }}\
                        {% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}";

const REFUSAL: &str = "none";
const HELP: &str = "is it, the action for the";
const RECIPE: &str = r#"
output = "out"
pairs = "pairs.jsonl"

[defaults]
max_length = 48
batch_size = 8
threads = 2
dtype = "f32"
epochs = 3

[sft]
init = "config.json"
tokenizer = "tokenizer"
data = "sft.jsonl"
prompt_weight = 0.1
learning_rate = 1e-2

[reward]
learning_rate = 3e-3
[cost]
learning_rate = 3e-3
epochs = 12

[safety]
learning_rate = 1e-2
epochs = 12
rank = 4
alpha = 8.0
margin_scale = 0.15
anchor = 0.3
[helpfulness]
learning_rate = 1e-2
epochs = 5
rank = 4
alpha = 8.0
margin_scale = 0.15
[dpo]
learning_rate = 3e-3
rank = 4
epochs = 1

[dual]

[router]
learning_rate = 1e-2
epochs = 10
hidden = 16
weight_alpha = 0.1
weight_beta = 0.1

[pack]
"#;

/// Two kinds of prompts: of some a refusal is safe and help is not, of the others help is the better and the safer answer.
fn pair(kind: &str, object: &str, flip: bool) -> Value {
    let (prompt, winner, loser, loser_safe, better) = match kind {
        "harmful" => (
            "raise",
            REFUSAL.to_owned(),
            format!("{HELP} {object}"),
            false,
            1,
        ),
        "harmful, both safe" => (
            "raise",
            format!("not for the {object}"),
            "is it, not".to_owned(),
            true,
            0,
        ),
        _ => (
            "get",
            format!("{HELP} {object}"),
            REFUSAL.to_owned(),
            true,
            0,
        ),
    };
    let (first, second) = if flip {
        (loser, winner)
    } else {
        (winner, loser)
    };
    let id = |id: usize| if flip { 1 - id } else { id };
    json!({
        "prompt": format!("{prompt} the {object}"), "kind": kind, "response_0": first, "response_1": second,
        "is_response_0_safe": loser_safe || !flip, "is_response_1_safe": loser_safe || flip,
        "better_response_id": id(better), "safer_response_id": id(0),
    })
}

fn pairs() -> Vec<Value> {
    let kinds = ["harmful", "harmful, both safe", "benign"];
    let objects = OBJECTS.iter().enumerate();
    objects
        .flat_map(|(index, object)| kinds.map(|kind| pair(kind, object, index % 2 == 1)))
        .collect()
}

fn lines(values: &[Value]) -> String {
    values.iter().fold(String::new(), |mut text, value| {
        writeln!(text, "{value}").unwrap();
        text
    })
}

/// Data, recipe, tokenizer and shape.
fn toy() -> Scratch {
    let scratch = Scratch::new();
    let config = fs::read_to_string(fixture("tiny-routed/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for (key, value) in [
        ("hidden_size", 32),
        ("intermediate_size", 64),
        ("num_hidden_layers", 2),
        ("max_position_embeddings", 64),
    ] {
        config[key] = value.into();
    }
    config["tie_word_embeddings"] = true.into();
    scratch.write("config.json", &config.to_string());
    fs::create_dir(scratch.path("tokenizer")).unwrap();
    let tokenizer = fs::read_to_string(fixture("tiny-routed/tokenizer.json")).unwrap();
    scratch.write("tokenizer/tokenizer.json", &tokenizer);
    let special = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE});
    scratch.write("tokenizer/tokenizer_config.json", &special.to_string());
    let generation = json!({"eos_token_id": 2, "do_sample": true, "temperature": 0.7});
    scratch.write("tokenizer/generation_config.json", &generation.to_string());
    let pairs = pairs();
    scratch.write("pairs.jsonl", &lines(&pairs));
    let examples: Vec<Value> = pairs
        .iter()
        .flat_map(|pair| {
            ["response_0", "response_1"]
                .map(|response| json!({"prompt": pair["prompt"], "response": pair[response]}))
        })
        .collect();
    scratch.write("sft.jsonl", &lines(&examples));
    scratch.write("recipe.toml", RECIPE);
    scratch
}

fn run_all(scratch: &Scratch) -> Result<Notes, TrainError> {
    let recipe = Recipe::load(&scratch.path("recipe.toml"), &RecipeOverrides::default())?;
    let mut notes = Notes::default();
    let mut watch = Watch {
        observer: &mut notes,
        stop: &AtomicBool::new(false),
    };
    stage::all(&recipe, AllOptions::default(), &mut watch)?;
    Ok(notes)
}

fn records(directory: &Path) -> Vec<Record> {
    let text = fs::read_to_string(directory.join("training").join(METRICS)).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Share of the pairs whose `winner` scores on the right side of the other response.
fn pair_accuracy(directory: &Path, winner: &str, sign: f32) -> f32 {
    let scorer = Scorer::open(directory, 48, 1).unwrap();
    let pairs = pairs();
    let right = pairs.iter().filter(|pair| {
        let text = |key: &str| pair[key].as_str().unwrap();
        let winner = pair[winner].as_u64().unwrap();
        let other = format!("response_{}", 1 - winner);
        let winner = format!("response_{winner}");
        let answers = [&winner, &other].map(|key| (text("prompt"), text(key)));
        let scores = scorer.score(&answers).unwrap();
        sign * (scores[0] - scores[1]) > 0.0
    });
    right.count() as f32 / pairs.len() as f32
}

#[test]
fn a_recipe_makes_a_directory_that_serves_and_runs_only_what_is_not_current() {
    let scratch = toy();
    let out = scratch.path("out");
    let notes = run_all(&scratch).unwrap();
    for stage in [
        "sft",
        "reward",
        "cost",
        "safety",
        "helpfulness",
        "dpo",
        "router",
    ] {
        let records = records(&out.join(stage));
        let (first, last) = (&records[0], &records[records.len() - 1]);
        assert!(
            last.loss_smoothed < first.loss,
            "{stage}: {first:?} {last:?}"
        );
        let curves = fs::read_to_string(out.join(stage).join("training/curves.svg")).unwrap();
        assert!(
            curves.contains("<svg") && !out.join(stage).join("training/state.safetensors").exists()
        );
    }
    let sft = records(&out.join("sft"));
    assert!(sft[sft.len() - 1].loss < 0.5 * sft[0].loss);
    let (reward, cost) = (out.join("reward"), out.join("cost"));
    let reward = pair_accuracy(&reward, "better_response_id", 1.0);
    let cost = pair_accuracy(&cost, "safer_response_id", -1.0);
    assert!(reward > 0.75 && cost > 0.75, "reward {reward}, cost {cost}");
    let safety = records(&out.join("safety"));
    assert!(safety[0].watched("delta").unwrap().abs() < 1e-4);
    let delta = safety[safety.len() - 1].watched("delta").unwrap();
    assert!(delta > 0.5, "{delta}");
    assert!(safety[0].watched("margin").unwrap() < 0.0);
    check_dual(&out, &notes);
    check_gates(&out, &notes);
    check_served(&out.join("model"));
    for router in [
        "router.pth",
        "router.safetensors",
        "router_folded.safetensors",
    ] {
        let parts = Sources {
            safety: Some(out.join("safety")),
            helpfulness: Some(out.join("helpfulness")),
            router: Some(out.join("router").join(router)),
            ..Sources::model(out.join("sft"))
        };
        let fingerprint = |sources| checkpoint::load(&sources).unwrap().fingerprint;
        assert_eq!(
            fingerprint(parts),
            fingerprint(Sources::model(out.join("model"))),
            "{router}"
        );
    }

    let again = run_all(&scratch).unwrap();
    assert_eq!(again.0.len(), 9);
    assert!(
        again.0.iter().all(|note| note.contains("skipped")),
        "{:?}",
        again.0
    );
    scratch.write("recipe.toml", &RECIPE.replace("hidden = 16", "hidden = 8"));
    let changed = run_all(&scratch).unwrap();
    let skipped = changed.0.iter().filter(|note| note.contains("skipped"));
    assert_eq!(skipped.count(), 7, "{:?}", changed.0);
    assert!(!changed.with("router: what fixed gates").is_empty());
    assert!(!changed.with("pack: written").is_empty());
}

/// Only pairs of two safe responses are kept, with the winner in both ids.
fn check_dual(out: &Path, notes: &Notes) {
    let dual = fs::read_to_string(out.join("dual.jsonl")).unwrap();
    let mut kinds: HashMap<String, usize> = HashMap::new();
    for line in dual.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        *kinds
            .entry(line["kind"].as_str().unwrap().to_owned())
            .or_default() += 1;
        assert_eq!(line["better_response_id"], line["safer_response_id"]);
        for score in ["cost_0", "cost_1"] {
            assert!(line[score].as_f64().unwrap() < 0.0);
        }
    }
    assert!(kinds["benign"] > 4, "{kinds:?}");
    let note = notes.with("dual: ");
    assert!(
        note[0].contains("dropped, a response is not safe"),
        "{note:?}"
    );
}

/// The router moves: what it costs to open alpha and shut beta is paid only where it helps.
fn check_gates(out: &Path, notes: &Notes) {
    let records = records(&out.join("router"));
    let (first, last) = (&records[0], &records[records.len() - 1]);
    let moved = |name: &str| last.watched(name).unwrap() - first.watched(name).unwrap();
    assert!(moved("alpha") < -0.05 && moved("beta") > 0.05, "{last:?}");
    let table = notes.with("router: what fixed gates")[0];
    assert!(
        table.contains("| benign |") && table.contains("| (1, 0) | (0, 1) | (1, 1) |"),
        "{table}"
    );
}

/// The packed directory loads, keeps the tokenizer's settings, and computes with every variant.
fn check_served(directory: &Path) {
    let checkpoint = checkpoint::load(&Sources::model(directory)).unwrap();
    assert!(checkpoint.experts.is_some());
    assert_eq!(checkpoint.generation.temperature, Some(0.7));
    assert_eq!(checkpoint.text.chat_template.as_deref(), Some(TEMPLATE));
    let ids = [1, 40, 50, 60].map(TokenId);
    let logits = |variant: Variant| served(&checkpoint, &ids, variant).logits;
    let base = logits(Variant::Base);
    for variant in [Variant::Routed, Variant::Safety, Variant::Helpfulness] {
        assert_ne!(logits(variant), base, "{variant:?}");
    }
}

/// Asks for the end in a step.
struct StopAt<'a>(usize, &'a AtomicBool);

impl Observer for StopAt<'_> {
    fn started(&mut self, _: &str, _: usize, _: usize) {}
    fn step(&mut self, record: &Record) {
        self.1.store(record.step == self.0, Ordering::Relaxed);
    }
    fn finished(&mut self) {}
    fn note(&mut self, _: &str) {}
}

#[test]
fn an_interrupted_stage_goes_on_to_the_same_file() {
    let scratch = toy();
    let recipe = Recipe::load(&scratch.path("recipe.toml"), &RecipeOverrides::default()).unwrap();
    let train = |output: &str, resume: bool, stop_at: usize| {
        let mut options: SftStage = recipe.stage().unwrap();
        options.output.output = Some(scratch.path(output));
        options.training.epochs = 1;
        let stop = AtomicBool::new(false);
        let mut watch = Watch {
            observer: &mut StopAt(stop_at, &stop),
            stop: &stop,
        };
        let how = How {
            resume,
            overwrite: false,
        };
        stage::sft(&options, how, &mut watch)
    };
    let weights = |output: &str| fs::read(scratch.path(output).join("model.safetensors"));
    train("whole", false, usize::MAX).unwrap();
    let error = train("halves", false, 3).unwrap_err();
    assert!(
        matches!(error, TrainError::Interrupted { step: 3, .. }),
        "{error}"
    );
    assert!(weights("halves").is_err());
    assert_eq!(train("halves", true, usize::MAX).unwrap().steps, 8);
    assert_eq!(weights("halves").unwrap(), weights("whole").unwrap());
    assert!(matches!(
        train("halves", true, usize::MAX),
        Err(TrainError::Exists { .. })
    ));
}

#[test]
fn a_stage_says_what_it_lacks_and_does_not_write_over_what_is_there() {
    let scratch = toy();
    let recipe = Recipe::load(&scratch.path("recipe.toml"), &RecipeOverrides::default()).unwrap();
    let run = |options: &SafetyStage| {
        let mut notes = Notes::default();
        let mut watch = Watch {
            observer: &mut notes,
            stop: &AtomicBool::new(false),
        };
        let ended = stage::safety(options, How::default(), &mut watch);
        ended.unwrap_err().to_string()
    };
    let mut safety: SafetyStage = recipe.stage().unwrap();
    safety.cost.cost = None;
    assert!(run(&safety).starts_with("safety: `cost`: expected "));
    let out = recipe.output(Stage::Safety);
    fs::create_dir_all(&out).unwrap();
    fs::write(out.join("stage.json"), "{}").unwrap();
    let safety: SafetyStage = recipe.stage().unwrap();
    let error = run(&safety);
    assert!(
        error.contains("exists already") && error.contains("--overwrite"),
        "{error}"
    );
}
