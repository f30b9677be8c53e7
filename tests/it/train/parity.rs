//! Losses, gradients and five steps of AdamW against the goldens' `ours_f64`; logits and gates against what is served.

use std::sync::atomic::AtomicBool;

use midpo::backend::reference::Reference;
use midpo::backend::{KvFormat, StepLayout, StepSequence, WeightFormat};
use midpo::checkpoint::Checkpoint;
use midpo::model::{ModelOptions, RoutedLlama};
use midpo::train::autograd::{
    Base, Expert, ExpertOptions, Positions, Router, RouterOptions, ScoreKind, ScoreModel, Sft,
    SftOptions,
};
use midpo::train::{
    Activations, AdamWOptions, Gradients, Job, Length, METRICS, Objective, Pair, RunOptions,
    Unwatched, Warmup, Watch, run,
};
use midpo::types::{BLOCK_TOKENS, BlockId, TokenId, Variant};

use super::fixture::*;

/// The fixtures' README, "use as tolerance".
const LOG_PROBS: f64 = 2e-4;
const LOSS: f64 = 1e-5;
const GRADIENTS: f32 = 1e-5;
const SCORES: f64 = 1e-5;
const AFTER_STEPS: f32 = 1e-4;

fn by_name<'a>(objective: &impl Objective, values: &'a [Vec<f32>], name: &str) -> &'a [f32] {
    let at = objective.parameters().iter().position(|p| p.name == name);
    &values[at.expect(name)]
}

fn watched(gradients: &Gradients, name: &str) -> f64 {
    gradients
        .watched
        .iter()
        .find(|(watched, _)| *watched == name)
        .expect(name)
        .1
}

fn lora(matrix: &str) -> String {
    format!("base_model.model.model.layers.1.mlp.down_proj.{matrix}.weight")
}

fn expert(part: &str) -> Expert {
    let (checkpoint, base) = base();
    let experts = checkpoint.experts.unwrap();
    let tensors = match part {
        "safety" => experts.safety,
        _ => experts.helpfulness,
    };
    Expert::from_tensors(base, &tensors, ExpertOptions::default()).unwrap()
}

fn router() -> Router {
    let (checkpoint, base) = base();
    let experts = checkpoint.experts.unwrap();
    let tensors = router_tensors("tiny-routed", 3);
    let options = RouterOptions::default();
    Router::from_tensors(
        base,
        &experts.safety,
        &experts.helpfulness,
        &tensors,
        options,
    )
    .unwrap()
}

/// pi_ref and Delta of each pair alone, then of all as one batch.
fn check_deltas<O: Objective<Item = Pair>>(
    part: &str,
    objective: &O,
    references: impl Fn(&[&Pair]) -> Vec<(f32, f32)>,
) -> Gradients {
    let ours = &golden()[part]["ours_f64"];
    let pairs = pairs(part);
    let (logp_ref, delta) = (numbers(&ours["logp_ref"]), numbers(&ours["delta"]));
    let refs: Vec<&Pair> = pairs.iter().collect();
    for (index, (better, worse)) in references(&refs).into_iter().enumerate() {
        close(
            "better under pi_ref",
            better.into(),
            logp_ref[index],
            LOG_PROBS,
        );
        close(
            "worse under pi_ref",
            worse.into(),
            logp_ref[pairs.len() + index],
            LOG_PROBS,
        );
        let alone = [refs[index]];
        let share = objective
            .evaluate(&alone, objective.totals(refs[index]))
            .unwrap();
        close(
            "delta",
            watched(&share, "delta"),
            delta[index],
            2.0 * LOG_PROBS,
        );
    }
    objective
        .gradients(&refs, totals(objective, &pairs), Activations::Kept)
        .unwrap()
}

#[test]
fn experts_losses_and_gradients_are_the_goldens() {
    for part in ["safety", "helpfulness"] {
        let expert = expert(part);
        let got = check_deltas(part, &expert, |pairs| {
            expert.reference_logps(pairs).unwrap()
        });
        let want = golden()[part]["ours_f64"]["loss_mean"].as_f64().unwrap();
        close(part, got.loss, want, LOSS);
        for matrix in ["lora_A", "lora_B"] {
            let want = Tensors::training().floats(&format!("{part}.ours_f64.grad.{matrix}"));
            let gradient = by_name(&expert, &got.values, &lora(matrix));
            all_close(&format!("{part} {matrix}"), gradient, &want, GRADIENTS);
        }
    }
}

#[test]
fn routers_loss_its_parts_and_gradients_are_the_goldens() {
    let router = router();
    let got = check_deltas("router", &router, |pairs| {
        router.reference_logps(pairs).unwrap()
    });
    let ours = &golden()["router"]["ours_f64"];
    close("loss", got.loss, ours["loss_total"].as_f64().unwrap(), LOSS);
    close(
        "dpo",
        watched(&got, "dpo"),
        ours["dpo"].as_f64().unwrap(),
        LOSS,
    );
    close(
        "alpha",
        watched(&got, "alpha"),
        ours["reg_alpha"].as_f64().unwrap(),
        LOSS,
    );
    close(
        "beta",
        1.0 - watched(&got, "beta"),
        ours["reg_beta"].as_f64().unwrap(),
        LOSS,
    );
    let tensors = Tensors::training();
    for (word, part) in [
        ("alpha", "linear_0.weight"),
        ("alpha", "linear_0.bias"),
        ("alpha", "linear_2.weight"),
        ("alpha", "linear_2.bias"),
        ("beta", "linear_0.bias"),
        ("beta", "linear_2.weight"),
        ("beta", "linear_2.bias"),
    ] {
        let want = tensors.floats(&format!("router.ours_f64.grad.{word}.{part}"));
        let gradient = by_name(&router, &got.values, &format!("layer_1_{word}.{part}"));
        // The fixture keeps the first rows of the first map.
        all_close(
            &format!("{word} {part}"),
            &gradient[..want.len()],
            &want,
            GRADIENTS,
        );
    }
}

#[test]
fn scores_and_the_losses_that_train_them_are_the_goldens() {
    let golden = golden();
    for (name, kind, safer, letter) in [
        ("reward", ScoreKind::Reward, false, "R"),
        ("cost", ScoreKind::Cost, true, "C"),
    ] {
        let model = ScoreModel::from_tensors(&score_tensors(name), kind).unwrap();
        let rows: Vec<usize> = (0..12).collect();
        let ordered = score_pairs(&rows, false);
        for (side, key) in [(true, "better"), (false, "worse")] {
            let sequences: Vec<_> = ordered
                .iter()
                .map(|p| if side { &p.better } else { &p.worse })
                .collect();
            let want = numbers(&golden["score"][format!("{letter}_{key}")]);
            for (got, want) in model.scores(&sequences).unwrap().into_iter().zip(want) {
                close(name, got.into(), want, SCORES);
            }
        }
        let training = &golden["score_model_training"][name];
        let rows = numbers(&training["rows"])
            .into_iter()
            .map(|row| row as usize);
        let pairs = score_pairs(&rows.collect::<Vec<_>>(), safer);
        let refs: Vec<_> = pairs.iter().collect();
        let got = model
            .gradients(&refs, totals(&model, &pairs), Activations::Kept)
            .unwrap();
        close(name, got.loss, training["loss"].as_f64().unwrap(), LOSS);
        let want = numbers(&training["score_head_weight_grad"]);
        let want: Vec<f32> = want.into_iter().map(|x| x as f32).collect();
        all_close(
            name,
            by_name(&model, &got.values, "score_head.weight"),
            &want,
            GRADIENTS,
        );
    }
}

/// Five steps at a constant rate on the whole batch: losses before each and after the last, and the values left.
fn five_steps<O: Objective<Item = Pair>>(part: &str, objective: &mut O) {
    let adamw = &golden()[part]["adamw"];
    let items = pairs(part);
    let directory = tempfile::tempdir().unwrap();
    let options = RunOptions {
        length: Length::Steps(5),
        batch_size: items.len(),
        part_size: 2,
        activations: Activations::Kept,
        threads: 2,
        learning_rate: adamw["lr"].as_f64().unwrap(),
        warmup: Warmup::Steps(0),
        final_factor: 1.0,
        adamw: AdamWOptions {
            weight_decay: adamw["weight_decay"].as_f64().unwrap(),
            ..AdamWOptions::default()
        },
        clip: None,
        seed: 1,
        save_every: None,
        stop_delta: None,
    };
    let lines: Vec<usize> = (1..=items.len()).collect();
    let job = Job {
        name: part,
        items: &items,
        lines: &lines,
        identity: part,
        directory: directory.path(),
        resume: false,
    };
    let mut watch = Watch {
        observer: &mut Unwatched,
        stop: &AtomicBool::new(false),
    };
    run(objective, &job, &options, &mut watch).unwrap();
    let metrics = std::fs::read_to_string(directory.path().join(METRICS)).unwrap();
    let records = metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut losses: Vec<f64> = records
        .map(|record| record["loss"].as_f64().unwrap())
        .collect();
    let refs: Vec<&Pair> = items.iter().collect();
    losses.push(
        objective
            .evaluate(&refs, totals(objective, &items))
            .unwrap()
            .loss,
    );
    let want = numbers(&adamw["losses_before_each_step_and_after_the_last"]);
    assert_eq!(losses.len(), want.len());
    for (got, want) in losses.into_iter().zip(want) {
        close(part, got, want, AFTER_STEPS.into());
    }
}

#[test]
fn five_steps_of_adamw_are_the_goldens() {
    for part in ["safety", "helpfulness"] {
        let mut expert = expert(part);
        five_steps(part, &mut expert);
        let values = expert.values().unwrap();
        for matrix in ["lora_A", "lora_B"] {
            let want =
                Tensors::training().floats(&format!("{part}.ours_f64.after_5_steps.{matrix}"));
            all_close(
                part,
                by_name(&expert, &values, &lora(matrix)),
                &want,
                AFTER_STEPS,
            );
        }
    }
    five_steps("router", &mut router());
}

/// What is served for every position of `ids`.
pub fn served(checkpoint: &Checkpoint, ids: &[TokenId], variant: Variant) -> Positions {
    let options = ModelOptions {
        rows: 64,
        logit_rows: 64,
        sequences: 1,
        positions: 64,
        kv_blocks: 64 / BLOCK_TOKENS,
        kv_format: KvFormat::F32,
        weight_format: WeightFormat::F32,
    };
    let mut model = RoutedLlama::new(Reference, checkpoint, options).unwrap();
    let blocks: Vec<BlockId> = (0..options.kv_blocks as u32).map(BlockId::new).collect();
    let sequences = [StepSequence {
        rows: ids.len(),
        start: 0,
        block_table: &blocks,
        gates: variant.gates(),
    }];
    let logit_rows: Vec<usize> = (0..ids.len()).collect();
    let layout = StepLayout {
        tokens: ids,
        sequences: &sequences,
        logit_rows: &logit_rows,
    };
    let output = model.forward(&layout).unwrap();
    Positions {
        logits: output.logits.to_vec(),
        gates: output.gates.to_vec(),
    }
}

#[test]
fn what_is_trained_is_what_is_served() {
    let options = ExpertOptions::default();
    for name in ["tiny-routed", "tiny-gqa"] {
        let checkpoint = load(name);
        let base = Base::new(&checkpoint).unwrap();
        let experts = checkpoint.experts.clone().unwrap();
        let tensors = router_tensors(name, checkpoint.config.num_layers);
        let (safety, helpfulness) = (&experts.safety, &experts.helpfulness);
        let router = Router::from_tensors(
            base.clone(),
            safety,
            helpfulness,
            &tensors,
            RouterOptions::default(),
        );
        let router = router.unwrap();
        let expert = |tensors| Expert::from_tensors(base.clone(), tensors, options).unwrap();
        let ids: Vec<TokenId> = (0..40)
            .map(|i| TokenId(1 + (i * i * 37 + i) % 500))
            .collect();
        let fixed = |alpha, beta| router.positions_fixed(&ids, alpha, beta).unwrap();
        let sft = Sft::from_checkpoint(&checkpoint, SftOptions { prompt_weight: 0.0 }).unwrap();
        for (variant, got) in [
            (Variant::Base, base.positions(&ids).unwrap()),
            (Variant::Base, sft.positions(&ids).unwrap()),
            (Variant::Base, fixed(0.0, 0.0)),
            (Variant::Safety, fixed(1.0, 0.0)),
            (
                Variant::Safety,
                expert(&experts.safety).positions(&ids).unwrap(),
            ),
            (Variant::Helpfulness, fixed(0.0, 1.0)),
            (
                Variant::Helpfulness,
                expert(&experts.helpfulness).positions(&ids).unwrap(),
            ),
            (Variant::Both, fixed(1.0, 1.0)),
            (Variant::Routed, router.positions(&ids).unwrap()),
        ] {
            let want = served(&checkpoint, &ids, variant);
            let what = format!("{name} {variant:?}");
            all_close(&what, &got.logits, &want.logits, 1e-4);
            if !got.gates.is_empty() {
                all_close(&what, &got.gates, &want.gates, 2e-5);
            }
        }
    }
}
