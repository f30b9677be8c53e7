//! Gates that the engine tells of: the goldens', in any chunks, as asked, and measured.

use midpo::config::EngineConfig;
use midpo::engine::GateDetail;
use midpo::metrics::Gate;
use midpo::types::Variant;
use safetensors::SafeTensors;

use super::engine::{goldens, probe};
use super::rig::{Rig, fixture, greedy, ids, random, roomy};

/// The gates of a golden prompt: alpha and beta, each (layers, tokens).
fn golden_gates(tensors: &SafeTensors<'_>, name: &str) -> [Vec<f32>; 2] {
    ["alpha", "beta"].map(|gate| {
        let tensor = tensors.tensor(&format!("{name}.{gate}")).unwrap();
        let numbers = tensor.data().chunks_exact(4);
        numbers
            .map(|x| f32::from_le_bytes(x.try_into().unwrap()))
            .collect()
    })
}

#[test]
fn gates_of_prompts_are_the_goldens_in_any_chunks_and_behind_any_cache() {
    let bytes = std::fs::read(fixture("tiny-routed").join("golden/inference_f32.safetensors"));
    let bytes = bytes.unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for batch_tokens_max in [512, 7] {
        let config = EngineConfig {
            batch_tokens_max,
            ..roomy()
        };
        let mut rig = Rig::new("tiny-routed", &config);
        for golden in goldens("tiny-routed") {
            let mut submission = greedy(&golden.prompt, Variant::Routed, 3);
            (submission.prompt_gates, submission.choices) = (true, 2);
            // The second time the prompt is in the cache, which knows no gates.
            let first = rig.answer(&submission);
            let second = rig.answer(&submission);
            assert_eq!(second.cached_tokens, Some(0));
            assert_eq!(first.prompt_gates, second.prompt_gates);
            let found = first.prompt_gates.unwrap();
            // What the first token was chosen by is the end of the prompt.
            assert_eq!(first.choices[1].tokens[0].gates.as_ref(), Some(&found.last));
            let tokens = golden.prompt.len();
            let [alpha, beta] = golden_gates(&tensors, &golden.name);
            for (last, mean, want) in [
                (&found.last.safety, &found.mean.safety, alpha),
                (&found.last.helpfulness, &found.mean.helpfulness, beta),
            ] {
                assert_eq!((last.len(), mean.len(), want.len()), (3, 3, 3 * tokens));
                for (layer, want) in want.chunks_exact(tokens).enumerate() {
                    let sum: f32 = want.iter().sum();
                    // The fixtures' README: 2e-6 measured.
                    assert!((last[layer] - want[tokens - 1]).abs() < 2e-5, "{layer}");
                    assert!((mean[layer] - sum / tokens as f32).abs() < 2e-5, "{layer}");
                }
            }
        }
    }
}

#[test]
fn gates_of_a_prompt_are_told_once_where_asked_also_after_preemption() {
    let mut asked = probe();
    asked.prompt_gates = true;
    let want = Rig::new("tiny-routed", &roomy()).answer(&asked);
    assert!(want.prompt_gates.is_some());
    let unasked = Rig::new("tiny-routed", &roomy()).answer(&probe());
    assert_eq!(unasked.prompt_gates, None);
    assert_eq!(unasked.only().bits(), want.only().bits());
    let config = EngineConfig {
        kv_blocks: 11,
        batch_tokens_max: 24,
        ..roomy()
    };
    let mut rig = Rig::new("tiny-routed", &config);
    let mut submissions = vec![
        random(&ids(5, 20), Variant::Safety, 60, 1),
        random(&ids(6, 20), Variant::Both, 60, 2),
    ];
    submissions.push(asked);
    let answers = rig.answers(&submissions);
    assert!(rig.metrics.preemptions.get() > 0);
    assert_eq!(answers[2].prompt_gates, want.prompt_gates);
}

#[test]
fn gates_are_told_as_asked_and_measured() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    let mut submission = greedy(&ids(4, 9), Variant::Safety, 6);
    let layers = rig.answer(&submission);
    let gates = layers.only().tokens[0].gates.as_ref().unwrap();
    assert_eq!(
        (&gates.safety, &gates.helpfulness),
        (&vec![1.0; 3], &vec![0.0; 3])
    );
    submission.gate_detail = GateDetail::Mean;
    let gates = rig.answer(&submission).only().tokens[5]
        .gates
        .clone()
        .unwrap();
    assert_eq!((gates.safety, gates.helpfulness), (vec![1.0], vec![0.0]));
    submission.gate_detail = GateDetail::None;
    let answer = rig.answer(&submission);
    assert!(
        answer
            .only()
            .tokens
            .iter()
            .all(|token| token.gates.is_none())
    );
    let safety = rig.metrics.gates.of(Gate::Safety).of(Variant::Safety);
    assert_eq!((safety.count(), safety.sum()), (18, 18.0));
    let helpfulness = rig.metrics.gates.of(Gate::Helpfulness).of(Variant::Safety);
    assert_eq!((helpfulness.count(), helpfulness.sum()), (18, 0.0));
}
