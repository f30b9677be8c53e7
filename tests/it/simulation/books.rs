//! Metrics add up, whatever the engine was asked.

use midpo::config::EngineConfig;
use midpo::metrics::{Gate, Label, Metrics};
use midpo::types::{FinishReason, Variant};

use super::Random;
use super::engine::guessing;
use super::rig::{Answer, End, Rig, ids, random, roomy};

#[test]
fn metrics_add_up_after_random_work() {
    for config in [roomy(), guessing()] {
        check_random_work(&config);
    }
}

fn check_random_work(config: &EngineConfig) {
    let config = EngineConfig {
        kv_blocks: 14,
        batch_tokens_max: 40,
        sequences_max: 6,
        ..config.clone()
    };
    let mut rig = Rig::new("tiny-routed", &config);
    let mut random_numbers = Random(11);
    let mut open = Vec::new();
    let (mut requests, mut dropped, mut answers) = (0u64, 0, Vec::new());
    for _ in 0..160 {
        if requests < 90 && open.len() < 12 {
            let n = random_numbers.below(1000) as u32;
            let prompt = ids(n % 5, 1 + random_numbers.below(90));
            let variant = Variant::ALL[n as usize % 5];
            let mut submission = random(&prompt, variant, n % 30, u64::from(n));
            submission.choices = 1 + n % 2;
            open.push(rig.submit(&submission));
            requests += 1;
        }
        rig.engine.step().unwrap();
        rig.engine.scheduler().assert_invariants();
        if random_numbers.one_in(6) && !open.is_empty() {
            drop(open.remove(random_numbers.below(open.len())));
            dropped += 1;
        }
        if open.len() >= 12 {
            rig.run();
            answers.extend(open.drain(..).map(|mut stream| Answer::read(&mut stream)));
        }
    }
    rig.run();
    answers.extend(open.drain(..).map(|mut stream| Answer::read(&mut stream)));
    check_sums(&rig.metrics, requests, dropped, &answers);
    let metrics = &rig.metrics;
    let drafts = metrics.spec_decode_drafts.get();
    let drafted = metrics.spec_decode_draft_tokens.get();
    let most = config.speculation.speculative_tokens as u64;
    assert_eq!(drafts > 0, most > 0);
    assert!((drafts..=most * drafts).contains(&drafted));
    assert!(metrics.spec_decode_accepted_tokens.get() <= drafted);
    assert_eq!(rig.held(), 0);
}

fn check_sums(metrics: &Metrics, requests: u64, dropped: u64, answers: &[Answer]) {
    let sum = |counters: &mut dyn Iterator<Item = u64>| counters.sum::<u64>();
    let taken = sum(&mut metrics.requests.iter().map(|c| c.get()));
    let finished = metrics.requests_finished.iter().flat_map(|by| by.iter());
    assert_eq!(taken, requests);
    assert_eq!(sum(&mut finished.map(|c| c.get())), requests);
    let cancelled = Variant::ALL.map(|variant| {
        let finished = metrics.requests_finished.of(variant);
        finished.of(FinishReason::Cancelled).get()
    });
    assert_eq!(cancelled.iter().sum::<u64>(), metrics.cancellations.get());
    // Some clients left when all was said already.
    assert!((1..=dropped).contains(&metrics.cancellations.get()));
    assert_eq!(answers.len() as u64 + dropped, requests);
    for choice in answers.iter().flat_map(|answer| &answer.choices) {
        assert!(matches!(choice.end, Some(End::Finished(_))), "{choice:?}");
    }
    // Of those whose client stayed; the others' tokens are counted too, but nobody read them.
    let with_token = answers.iter().filter(|answer| {
        answer
            .choices
            .iter()
            .any(|choice| !choice.tokens.is_empty())
    });
    let first_tokens = metrics.time_to_first_token.count();
    let least = with_token.count() as u64;
    assert!((least..=least + dropped).contains(&first_tokens));
    let generated = sum(&mut metrics.generated_tokens.iter().map(|c| c.get()));
    let read = answers.iter().flat_map(|answer| &answer.choices);
    assert!(generated >= read.map(|choice| choice.tokens.len() as u64).sum());
    assert_eq!(metrics.request_duration.count(), requests);
    assert_eq!(metrics.sequences_running.get(), 0);
    assert_eq!(metrics.sequences_waiting.get(), 0);
    assert_eq!(metrics.kv_cache_usage.get(), 0.0);
    for gate in Gate::ALL {
        let observed = metrics.gates.of(*gate).iter().map(|h| h.count());
        assert_eq!(observed.sum::<u64>(), generated);
    }
}
