//! What must hold whatever the numbers.

use midpo::checkpoint::LlamaConfig;
use midpo::train::autograd::{
    Expert, ExpertOptions, Router, RouterOptions, ScoreKind, ScoreModel, Sft, SftOptions,
};
use midpo::train::{Activations, Gradients, Objective, Pair, Sequence};
use midpo::types::TokenId;

use super::fixture::*;

/// Whether a batch may be split, and shuffled, without moving loss, gradient or what is watched; and its layers computed twice without
/// moving a bit.
fn check_shares<O: Objective>(what: &str, objective: &O, items: &[O::Item]) {
    let batch = totals(objective, items);
    let all: Vec<&O::Item> = items.iter().collect();
    let whole = objective.gradients(&all, batch, Activations::Kept).unwrap();
    let twice = objective
        .gradients(&all, batch, Activations::Checkpointed)
        .unwrap();
    assert_eq!(whole, twice, "{what}");
    let mut backwards = all.clone();
    backwards.reverse();
    let reversed = objective
        .gradients(&backwards, batch, Activations::Kept)
        .unwrap();
    // One item a part is also a batch without any padding inside attention's groups.
    let parts = all.iter().map(|item| {
        objective
            .gradients(&[item], batch, Activations::Kept)
            .unwrap()
    });
    let split = parts
        .reduce(|mut sum, part| {
            sum.loss += part.loss;
            for (sum, part) in sum.watched.iter_mut().zip(part.watched) {
                sum.1 += part.1;
            }
            for (sum, part) in sum
                .values
                .iter_mut()
                .flatten()
                .zip(part.values.iter().flatten())
            {
                *sum += part;
            }
            sum
        })
        .unwrap();
    let forward = objective.evaluate(&all, batch).unwrap();
    assert!(forward.values.is_empty());
    close(what, forward.loss, whole.loss, 1e-9);
    for (how, other) in [("reversed", reversed), ("split", split)] {
        let what = format!("{what}, {how}");
        close(&what, other.loss, whole.loss, 1e-5);
        for ((name, got), (_, want)) in other.watched.iter().zip(&whole.watched) {
            close(&format!("{what}: {name}"), *got, *want, 1e-3);
        }
        for (got, want) in other.values.iter().zip(&whole.values) {
            all_close(&what, got, want, 2e-5);
        }
    }
}

fn sequences() -> Vec<Sequence> {
    let pairs = pairs("helpfulness");
    pairs
        .into_iter()
        .map(|pair| Sequence {
            answer: pair.first_difference,
            ..pair.better
        })
        .collect()
}

fn small() -> LlamaConfig {
    LlamaConfig {
        vocab_size: 12,
        hidden_size: 8,
        intermediate_size: 12,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 4,
        tie_word_embeddings: true,
        max_position_embeddings: 16,
        ..score_tensors("reward").config
    }
}

#[test]
fn shares_of_a_batch_add_up_whatever_its_order_and_what_is_kept() {
    let (checkpoint, base) = base();
    let experts = checkpoint.experts.clone().unwrap();
    let sft = Sft::from_checkpoint(&checkpoint, SftOptions { prompt_weight: 0.1 }).unwrap();
    check_shares("sft", &sft, &sequences());
    let cost = ScoreModel::from_tensors(&score_tensors("cost"), ScoreKind::Cost).unwrap();
    check_shares("cost", &cost, &score_pairs(&[0, 1, 2, 7], true));
    let options = ExpertOptions {
        anchor: 0.3,
        ..ExpertOptions::default()
    };
    let expert = Expert::from_tensors(base.clone(), &experts.helpfulness, options).unwrap();
    check_shares("expert", &expert, &pairs("helpfulness"));
    let options = RouterOptions {
        hidden: 8,
        ..RouterOptions::default()
    };
    let router = Router::new(base, &experts.safety, &experts.helpfulness, options).unwrap();
    check_shares("router", &router, &pairs("router"));
}

fn watched(gradients: &Gradients, name: &str) -> f64 {
    gradients
        .watched
        .iter()
        .find(|(watched, _)| *watched == name)
        .unwrap()
        .1
}

#[test]
fn a_new_expert_is_the_reference_and_its_loss_is_log_2() {
    let (_, base) = base();
    let expert = Expert::new(base, ExpertOptions::default()).unwrap();
    let pairs: Vec<Pair> = pairs("helpfulness")
        .into_iter()
        .map(|p| Pair { margin: 0.0, ..p })
        .collect();
    let refs: Vec<&Pair> = pairs.iter().collect();
    let got = expert
        .gradients(&refs, totals(&expert, &pairs), Activations::Kept)
        .unwrap();
    close("loss", got.loss, 2f64.ln(), 1e-5);
    close("delta", watched(&got, "delta"), 0.0, 1e-4);
    // B is 0, so A cannot move yet, and B must.
    for (parameter, gradient) in expert.parameters().iter().zip(&got.values) {
        let still = gradient.iter().all(|x| *x == 0.0);
        assert_eq!(
            still,
            parameter.name.contains("lora_A"),
            "{}",
            parameter.name
        );
    }
}

#[test]
fn gates_that_are_shut_are_the_reference() {
    let (checkpoint, base) = base();
    let experts = checkpoint.experts.unwrap();
    let options = RouterOptions {
        hidden: 8,
        ..RouterOptions::default()
    };
    let router = Router::new(base, &experts.safety, &experts.helpfulness, options).unwrap();
    let pairs = pairs("router");
    let refs: Vec<&Pair> = pairs.iter().collect();
    for worth in router.fixed_gates(&refs, 0.0, 0.0).unwrap() {
        close("delta", worth.delta, 0.0, 1e-4);
        close("loss", worth.loss, 2f64.ln(), 1e-5);
    }
    let open = router.fixed_gates(&refs, 1.0, 0.0).unwrap();
    assert!(open.iter().any(|worth| worth.delta.abs() > 0.1));
}

#[test]
fn references_that_a_pair_carries_change_nothing() {
    let (_, base) = base();
    let expert = Expert::new(base, ExpertOptions::default()).unwrap();
    let plain = pairs("safety");
    let refs: Vec<&Pair> = plain.iter().collect();
    let references = expert.reference_logps(&refs).unwrap();
    let cached = plain.iter().cloned().zip(references);
    let cached: Vec<Pair> = cached
        .map(|(pair, reference)| Pair {
            reference: Some(reference),
            ..pair
        })
        .collect();
    let batch = totals(&expert, &plain);
    let cached: Vec<&Pair> = cached.iter().collect();
    assert_eq!(
        expert.evaluate(&refs, batch).unwrap(),
        expert.evaluate(&cached, batch).unwrap()
    );
}

/// Every parameter's gradient against central differences of the loss.
fn check_slopes<O: Objective>(objective: &mut O, items: &[O::Item]) {
    const STEP: f32 = 1e-2;
    let batch = totals(objective, items);
    let refs: Vec<&O::Item> = items.iter().collect();
    let values = objective.values().unwrap();
    let gradients = objective
        .gradients(&refs, batch, Activations::Kept)
        .unwrap()
        .values;
    for tensor in 0..values.len() {
        let name = objective.parameters()[tensor].name.clone();
        // Every tensor, a few places of each.
        for at in (0..values[tensor].len()).step_by(7) {
            let mut loss = |by: f32| {
                let mut moved = values.clone();
                moved[tensor][at] += by;
                objective.set_values(&moved).unwrap();
                objective.evaluate(&refs, batch).unwrap().loss
            };
            let slope = (loss(STEP) - loss(-STEP)) / f64::from(2.0 * STEP);
            let gradient = f64::from(gradients[tensor][at]);
            close(
                &format!("{name} {at}"),
                gradient,
                slope,
                2e-3 * slope.abs().max(0.2),
            );
        }
    }
}

#[test]
fn gradients_of_all_weights_are_the_slopes_of_the_loss() {
    let ids = |ids: &[u32]| ids.iter().map(|id| TokenId(*id)).collect::<Vec<_>>();
    let sequences = [
        Sequence {
            ids: ids(&[1, 5, 9, 3, 11, 2]),
            answer: 3,
        },
        Sequence {
            ids: ids(&[1, 7, 4, 2]),
            answer: 2,
        },
    ];
    let mut untied = small();
    untied.tie_word_embeddings = false;
    for config in [small(), untied] {
        let mut sft = Sft::random(config, 3, SftOptions { prompt_weight: 0.5 }).unwrap();
        // Weights of .02 leave nothing to see: slopes would drown in rounding.
        let larger = sft.values().unwrap().into_iter().zip(sft.parameters());
        let larger: Vec<Vec<f32>> = larger
            .map(|(values, p)| {
                values
                    .iter()
                    .map(|x| if p.decay { 15.0 * x } else { *x })
                    .collect()
            })
            .collect();
        sft.set_values(&larger).unwrap();
        check_slopes(&mut sft, &sequences);
    }
}

#[test]
fn a_score_model_on_a_trunk_of_fewer_layers_learns_to_order_its_pairs() {
    let checkpoint = load("tiny-routed");
    let mut model = ScoreModel::from_checkpoint(&checkpoint, Some(1), ScoreKind::Cost).unwrap();
    assert_eq!(model.config().num_layers, 1);
    let pairs = score_pairs(&[0, 1, 2], true);
    let refs: Vec<_> = pairs.iter().collect();
    let batch = totals(&model, &pairs);
    let start = model.gradients(&refs, batch, Activations::Kept).unwrap();
    // All scores are 0: log 2 for the order and for each of the two signs.
    close("loss", start.loss, 3.0 * 2f64.ln(), 1e-6);
    for _ in 0..30 {
        let gradients = model.gradients(&refs, batch, Activations::Kept).unwrap();
        let mut values = model.values().unwrap();
        for (value, slope) in values
            .iter_mut()
            .flatten()
            .zip(gradients.values.iter().flatten())
        {
            *value -= 0.05 * slope;
        }
        model.set_values(&values).unwrap();
    }
    let end = model.evaluate(&refs, batch).unwrap();
    assert!(
        end.loss < 0.5 * start.loss,
        "{} to {}",
        start.loss,
        end.loss
    );
    assert_eq!(
        (watched(&end, "accuracy"), watched(&end, "sign_accuracy")),
        (1.0, 1.0)
    );
}

#[test]
fn what_data_gets_wrong_is_an_error() {
    let sft = Sft::random(small(), 1, SftOptions { prompt_weight: 0.0 }).unwrap();
    let sequence = |length: usize, id: u32, answer: usize| Sequence {
        ids: vec![TokenId(id); length],
        answer,
    };
    for (sequence, want) in [
        (sequence(0, 1, 1), "0 tokens"),
        (sequence(17, 1, 1), "17 tokens: expected 1 to 16"),
        (sequence(3, 12, 1), "token 12: expected one below 12"),
        (sequence(3, 1, 0), "answer from token 0"),
        (sequence(3, 1, 4), "answer from token 4"),
    ] {
        let error = sft
            .evaluate(&[&sequence], sft.totals(&sequence))
            .unwrap_err()
            .to_string();
        assert!(error.contains(want), "{error}");
    }
    let mut sft = sft;
    let error = sft.set_values(&[vec![0.0]]).unwrap_err().to_string();
    assert!(error.contains("parameters"), "{error}");
}
