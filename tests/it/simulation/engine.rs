//! The whole engine over the tiny checkpoints.

use std::collections::HashSet;
use std::time::Duration;

use midpo::config::{EngineConfig, Speculation};
use midpo::engine::{Engine, Submission, SubmitError};
use midpo::metrics::{Metrics, Refusal};
use midpo::types::{FinishReason, GateRule, TokenId, Variant};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;

use super::rig::{
    Answer, End, Rig, checkpoint, cpu, fixture, greedy, ids, logprob_bits, random, roomy,
};
use super::{Random, speculations};

/// A prompt of the golden files, with each variant's greedy continuation.
pub(super) struct Golden {
    pub(super) name: String,
    pub(super) prompt: Vec<u32>,
    greedy: Vec<(Variant, Vec<u32>)>,
}

pub(super) fn goldens(model: &str) -> Vec<Golden> {
    let dir = fixture(model).join("golden");
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
    let bytes = std::fs::read(dir.join("inference_f32.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let prompts = manifest["prompts"].as_array().unwrap().iter();
    prompts
        .map(|prompt| {
            let name = prompt["name"].as_str().unwrap();
            let tensor = tensors.tensor(&format!("{name}.input_ids")).unwrap();
            let ids = tensor.data().chunks_exact(8);
            let greedy = |variant: Variant| {
                let ids = &prompt["variants"][variant.as_str()]["greedy"];
                let ids = ids.as_array().unwrap().iter();
                (variant, ids.map(|id| id.as_u64().unwrap() as u32).collect())
            };
            Golden {
                name: name.to_owned(),
                prompt: ids
                    .map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32)
                    .collect(),
                greedy: Variant::ALL.map(greedy).to_vec(),
            }
        })
        .collect()
}

#[test]
fn greedy_answers_are_the_goldens_when_all_run_together() {
    for model in ["tiny-routed", "tiny-gqa"] {
        let goldens = goldens(model);
        let cases: Vec<_> = goldens
            .iter()
            .flat_map(|golden| golden.greedy.iter().map(move |greedy| (golden, greedy)))
            .collect();
        assert_eq!(cases.len(), 25);
        let submissions: Vec<Submission> = cases
            .iter()
            .map(|(golden, (variant, ids))| greedy(&golden.prompt, *variant, ids.len() as u32))
            .collect();
        let answers = Rig::new(model, &roomy()).answers(&submissions);
        for ((golden, (variant, want)), answer) in cases.iter().zip(&answers) {
            let found = answer.only().ids();
            assert_eq!(&found, want, "{model} {} {variant:?}", golden.name);
        }
    }
}

/// A request worth repeating: a prompt of several blocks, drawn tokens, log-probabilities and gates.
pub(super) fn probe() -> Submission {
    random(&ids(1, 70), Variant::Routed, 24, 42)
}

/// Sixteen others, of all variants and lengths; some share the probe's first blocks.
pub(super) fn others() -> Vec<Submission> {
    (0..16)
        .map(|i| {
            let stem = if i % 4 == 0 { 1 } else { i };
            let prompt = ids(stem, 3 + 7 * i as usize);
            random(
                &prompt,
                Variant::ALL[i as usize % 5],
                6 + i / 2,
                u64::from(i),
            )
        })
        .collect()
}

#[test]
fn an_answer_has_the_same_bits_in_any_company_and_any_chunks() {
    let alone = Rig::new("tiny-routed", &roomy()).answer(&probe());
    let want = alone.only().bits();
    assert_eq!(alone.only().tokens.len(), 24);
    let mut budgets = Random(3);
    for batch_tokens_max in [512, 17 + budgets.below(8), 30 + budgets.below(100)] {
        for company in [false, true] {
            // Zero: every step was too long, so prompts get their least beside decodes.
            for step_time_max in [Duration::MAX, Duration::ZERO] {
                let config = EngineConfig {
                    batch_tokens_max,
                    step_time_max,
                    ..roomy()
                };
                let mut submissions = if company { others() } else { Vec::new() };
                submissions.push(probe());
                let answers = Rig::new("tiny-routed", &config).answers(&submissions);
                let found = answers.last().unwrap().only().bits();
                assert!(
                    found == want,
                    "{batch_tokens_max} {company} {step_time_max:?}"
                );
            }
        }
    }
}

#[test]
fn an_answer_has_the_same_bits_after_preemption() {
    let want = Rig::new("tiny-routed", &roomy()).answer(&probe());
    for prefix_cache in [true, false] {
        let config = EngineConfig {
            kv_blocks: 11,
            prefix_cache,
            ..roomy()
        };
        let mut rig = Rig::new("tiny-routed", &config);
        // Three that grow by two blocks and more: the cache holds two at their full length.
        let mut submissions = vec![
            random(&ids(5, 20), Variant::Safety, 60, 1),
            random(&ids(6, 20), Variant::Both, 60, 2),
        ];
        submissions.push(probe());
        let answers = rig.answers(&submissions);
        assert!(rig.metrics.preemptions.get() > 0);
        assert_eq!(answers[2].only().bits(), want.only().bits());
        // No token is counted, or sent, a second time.
        let tokens: usize = answers
            .iter()
            .map(|answer| answer.only().tokens.len())
            .sum();
        let counted: u64 = rig.metrics.generated_tokens.iter().map(|c| c.get()).sum();
        assert_eq!(tokens as u64, counted);
    }
}

#[test]
fn an_answer_has_the_same_bits_from_the_prefix_cache() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    let first = rig.answer(&probe());
    let second = rig.answer(&probe());
    assert_eq!(first.cached_tokens, Some(0));
    assert_eq!(second.cached_tokens, Some(64));
    assert_eq!(first.only().bits(), second.only().bits());
    assert_eq!(rig.metrics.prefix_cache_query_tokens.get(), 140);
    assert_eq!(rig.metrics.prefix_cache_hit_tokens.get(), 64);
}

#[test]
fn a_prompt_that_is_cached_whole_still_computes_its_last_token() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    let submission = random(&ids(2, 64), Variant::Routed, 4, 7);
    let first = rig.answer(&submission);
    let second = rig.answer(&submission);
    assert_eq!(second.cached_tokens, Some(48));
    assert_eq!(first.only().bits(), second.only().bits());
}

#[test]
fn an_answer_is_part_of_the_next_turns_prefix() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    let mut turn = greedy(&ids(2, 30), Variant::Routed, 20);
    let answer = rig.answer(&turn);
    turn.prompt
        .extend(answer.only().ids().into_iter().map(TokenId));
    turn.prompt.push(TokenId(9));
    // 30 + 19 positions were computed: three blocks.
    assert_eq!(rig.answer(&turn).cached_tokens, Some(48));
}

/// Requests with the probe's prompt that must not see its blocks.
fn strangers() -> Vec<Submission> {
    let with = |change: fn(&mut Submission)| {
        let mut submission = probe();
        change(&mut submission);
        submission
    };
    let biased = |bias, floor, ceiling| {
        let mut submission = probe();
        submission.gates.safety = GateRule::new(bias, floor, ceiling).unwrap();
        submission
    };
    let mut strangers: Vec<Submission> = [
        Variant::Base,
        Variant::Safety,
        Variant::Helpfulness,
        Variant::Both,
    ]
    .map(|variant| random(&ids(1, 70), variant, 24, 42))
    .to_vec();
    strangers.extend([
        biased(1.5, 0.0, 1.0),
        biased(0.0, 0.9, 1.0),
        biased(0.0, 0.0, 0.1),
        with(|s| s.gates.helpfulness = GateRule::new(-1.5, 0.0, 1.0).unwrap()),
        with(|s| s.cache_salt = Some("tenant".to_owned())),
        with(|s| s.cache_salt = Some(String::new())),
    ]);
    strangers
}

#[test]
fn the_prefix_cache_serves_nobody_elses_blocks() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    rig.answer(&probe());
    for (index, stranger) in strangers().iter().enumerate() {
        let fresh = Rig::new("tiny-routed", &roomy()).answer(stranger);
        let found = rig.answer(stranger);
        assert_eq!(found.cached_tokens, Some(0), "stranger {index}");
        assert!(
            found.only().bits() == fresh.only().bits(),
            "stranger {index}"
        );
        let again = rig.answer(stranger);
        assert_eq!(again.cached_tokens, Some(64), "stranger {index}");
    }
}

#[test]
fn without_a_prefix_cache_requests_share_nothing() {
    let config = EngineConfig {
        prefix_cache: false,
        ..roomy()
    };
    let mut rig = Rig::new("tiny-routed", &config);
    rig.answer(&probe());
    assert_eq!(rig.answer(&probe()).cached_tokens, Some(0));
    assert_eq!(rig.metrics.prefix_cache_query_tokens.get(), 0);
}

#[test]
fn choices_share_the_prompt_and_differ_in_their_numbers() {
    for prefix_cache in [true, false] {
        let config = EngineConfig {
            prefix_cache,
            ..roomy()
        };
        let mut rig = Rig::new("tiny-routed", &config);
        let mut submission = random(&ids(1, 70), Variant::Routed, 12, 5);
        submission.choices = 4;
        let answer = rig.answer(&submission);
        assert_eq!(answer.choices.len(), 4);
        let texts: HashSet<_> = answer.choices.iter().map(|choice| choice.ids()).collect();
        assert_eq!(texts.len(), 4, "each choice has numbers of its own");
        // The prompt once; the others from its last whole block on; then 11 decodes each.
        let computed = 70 + 3 * (70 - 64) + 4 * 11;
        assert_eq!(rig.metrics.step_tokens.sum(), f64::from(computed));
        submission.choices = 1;
        let alone = Rig::new("tiny-routed", &config).answer(&submission);
        assert_eq!(alone.only().bits(), answer.choices[0].bits());
    }
}

#[test]
fn a_lost_client_frees_its_blocks_within_a_step() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    let mut submission = random(&ids(1, 70), Variant::Routed, 400, 5);
    submission.choices = 3;
    for steps in [0, 1, 2, 5] {
        let stream = rig.submit(&submission);
        let mut other = rig.submit(&greedy(&ids(3, 5), Variant::Base, 3));
        for _ in 0..steps {
            rig.engine.step().unwrap();
        }
        drop(stream);
        rig.run();
        assert_eq!(Answer::read(&mut other).only().tokens.len(), 3);
        assert_eq!(rig.held(), 0);
        assert_eq!(rig.handle.waiting(), 0);
    }
    assert_eq!(rig.metrics.cancellations.get(), 4);
}

#[test]
fn a_choice_that_is_stopped_ends_and_the_others_go_on() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    let mut submission = random(&ids(1, 20), Variant::Routed, 30, 5);
    submission.choices = 2;
    let mut stream = rig.submit(&submission);
    for _ in 0..5 {
        rig.engine.step().unwrap();
    }
    stream.stop(0);
    rig.run();
    let answer = Answer::read(&mut stream);
    let [stopped, whole] = &answer.choices[..] else {
        panic!("two choices");
    };
    assert_eq!(stopped.end, Some(End::Finished(FinishReason::Stop)));
    assert!(stopped.tokens.len() < 30);
    assert_eq!(whole.end, Some(End::Finished(FinishReason::Length)));
    assert_eq!(whole.tokens.len(), 30);
    assert_eq!(rig.metrics.cancellations.get(), 0);
}

#[test]
fn answers_end_where_they_should() {
    let goldens = goldens("tiny-routed");
    let ids = &goldens[0].greedy[0].1;
    // The golden's end of sequence comes as its fifteenth token.
    let eos_at = ids.iter().position(|id| *id == 2).unwrap();
    let base = greedy(&goldens[0].prompt, Variant::Routed, 32);
    let mut rig = Rig::new("tiny-routed", &roomy());
    let with = |change: &dyn Fn(&mut Submission)| {
        let mut submission = base.clone();
        change(&mut submission);
        submission
    };
    let eos = with(&|s| s.sampling.ignore_eos = false);
    let stop = with(&|s| s.sampling.stop_token_ids = vec![TokenId(ids[3])]);
    let first = ids.iter().position(|id| *id == ids[3]).unwrap();
    let length = with(&|s| s.sampling.max_tokens = 5);
    for (submission, want, reason) in [
        (&eos, eos_at + 1, FinishReason::Stop),
        (&stop, first + 1, FinishReason::Stop),
        (&length, 5, FinishReason::Length),
        (&base, 32, FinishReason::Length),
    ] {
        let answer = rig.answer(submission);
        assert_eq!(answer.only().ids(), ids[..want]);
        assert_eq!(answer.only().end, Some(End::Finished(reason)));
    }
    let late = with(&|s| (s.sampling.ignore_eos, s.sampling.min_tokens) = (false, 20));
    assert!(rig.answer(&late).only().tokens.len() >= 20);
}

#[test]
fn prompt_logprobs_come_whole_in_any_chunks() {
    let golden = &goldens("tiny-routed")[2];
    let mut submission = greedy(&golden.prompt, Variant::Routed, 0);
    submission.prompt_logprobs = Some(2);
    let mut want = None;
    for batch_tokens_max in [512, 7, 33] {
        let config = EngineConfig {
            batch_tokens_max,
            ..roomy()
        };
        let mut rig = Rig::new("tiny-routed", &config);
        // A cached prefix would leave out what was asked for.
        for _ in 0..2 {
            let answer = rig.answer(&submission);
            assert_eq!(answer.cached_tokens, Some(0));
            let logprobs = answer.prompt_logprobs.as_ref().unwrap();
            assert_eq!(logprobs.len(), golden.prompt.len());
            assert!(logprobs[0].is_none());
            let bits: Vec<_> = logprobs[1..]
                .iter()
                .map(|one| logprob_bits(one.as_ref().unwrap()))
                .collect();
            assert_eq!(&bits, want.get_or_insert(bits.clone()));
            let choice = answer.only();
            assert!(choice.tokens.is_empty());
            assert_eq!(choice.end, Some(End::Finished(FinishReason::Length)));
        }
        // With an answer and several choices too.
        let mut talking = submission.clone();
        (talking.sampling.max_tokens, talking.choices) = (3, 2);
        let answer = rig.answer(&talking);
        assert_eq!(answer.prompt_logprobs.unwrap().len(), golden.prompt.len());
        assert!(answer.choices.iter().all(|choice| choice.tokens.len() == 3));
    }
}

#[test]
fn prompt_logprobs_are_the_goldens() {
    let golden = &goldens("tiny-routed")[2];
    let bytes = std::fs::read(fixture("tiny-routed").join("golden/inference_f32.safetensors"));
    let bytes = bytes.unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("chat.routed.logits").unwrap();
    let logits: Vec<f64> = logits
        .data()
        .chunks_exact(4)
        .map(|x| f64::from(f32::from_le_bytes(x.try_into().unwrap())))
        .collect();
    let mut submission = greedy(&golden.prompt, Variant::Routed, 0);
    submission.prompt_logprobs = Some(0);
    let answer = Rig::new("tiny-routed", &roomy()).answer(&submission);
    let found = answer.prompt_logprobs.unwrap();
    let rows = logits.chunks_exact(logits.len() / golden.prompt.len());
    for (position, row) in rows.enumerate().take(golden.prompt.len() - 1) {
        let sum: f64 = row.iter().map(|logit| logit.exp()).sum();
        let want = row[golden.prompt[position + 1] as usize] - sum.ln();
        let found = found[position + 1].as_ref().unwrap().logprob;
        // Twice the tolerance of one logit: a difference of two.
        assert!((f64::from(found) - want).abs() < 4e-4, "{position}");
    }
}

#[test]
fn a_broken_row_fails_its_own_sequence_only() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    let mut broken = greedy(&ids(4, 9), Variant::Routed, 6);
    broken.sampling.logit_bias = vec![(TokenId(7), f32::NAN)];
    let answers = rig.answers(&[broken, probe()]);
    let end = answers[0].choices[0].end.clone();
    assert!(matches!(end, Some(End::Failed(message)) if message.contains("not finite")));
    let alone = Rig::new("tiny-routed", &roomy()).answer(&probe());
    assert_eq!(answers[1].only().bits(), alone.only().bits());
}

#[test]
fn what_can_never_fit_is_refused_with_its_sizes() {
    let config = EngineConfig {
        kv_blocks: 8,
        queue_max: 2,
        ..roomy()
    };
    let rig = Rig::new("tiny-routed", &config);
    let refused = |submission: &Submission| rig.handle.submit(submission.clone()).err().unwrap();
    for (prompt, max_tokens, want) in [
        (vec![], 1, SubmitError::EmptyPrompt),
        (
            vec![1, 512],
            1,
            SubmitError::TokenOutOfRange {
                found: 512,
                vocabulary: 512,
            },
        ),
        (
            ids(1, 500),
            13,
            SubmitError::ContextLength {
                limit: 512,
                prompt: 500,
                max_tokens: 13,
            },
        ),
        (
            ids(1, 120),
            10,
            SubmitError::CacheTooSmall {
                needed: 9,
                blocks: 8,
            },
        ),
    ] {
        assert_eq!(refused(&greedy(&prompt, Variant::Base, max_tokens)), want);
    }
    // 120 + 9 tokens, of which the last is never computed: 8 blocks.
    let _fits = rig.submit(&greedy(&ids(1, 120), Variant::Base, 9));
    let _second = rig.submit(&probe());
    assert_eq!(refused(&probe()), SubmitError::QueueFull { limit: 2 });
    assert_eq!(rig.metrics.refusals.of(Refusal::Invalid).get(), 4);
    assert_eq!(rig.metrics.refusals.of(Refusal::QueueFull).get(), 1);
}

#[test]
fn the_longest_request_that_fits_runs_to_its_end() {
    let config = EngineConfig {
        kv_blocks: 8,
        ..roomy()
    };
    let mut rig = Rig::new("tiny-routed", &config);
    let longest = greedy(&ids(1, 120), Variant::Base, 9);
    let answers = rig.answers(&[longest.clone(), longest]);
    assert!(answers.iter().all(|answer| answer.only().tokens.len() == 9));
}

#[test]
fn a_model_without_experts_serves_its_base_only() {
    let config = roomy();
    let mut plain = checkpoint("tiny-routed");
    plain.experts = None;
    let options = midpo::engine::model_options(
        &config,
        midpo::backend::KvFormat::F32,
        midpo::backend::WeightFormat::Stored,
    );
    let model = midpo::model::RoutedLlama::new(cpu(), &plain, options).unwrap();
    let metrics = std::sync::Arc::new(Metrics::new("plain"));
    let (handle, engine) = Engine::new(model, &config, std::sync::Arc::clone(&metrics));
    let mut rig = Rig {
        handle,
        engine,
        metrics,
    };
    let variant = Variant::Routed.as_str();
    let refused = rig.handle.submit(probe()).err();
    assert_eq!(refused, Some(SubmitError::NoExperts { variant }));
    let base = random(&ids(1, 70), Variant::Base, 8, 1);
    let found = rig.answer(&base);
    assert!(
        found
            .only()
            .tokens
            .iter()
            .all(|token| token.gates.is_none())
    );
    // The base variant of a routed model is the base, to the bit.
    let routed = Rig::new("tiny-routed", &roomy()).answer(&base);
    for (plain, routed) in found.only().tokens.iter().zip(&routed.only().tokens) {
        assert_eq!(plain.id, routed.id);
        assert_eq!(plain.logprobs, routed.logprobs);
    }
}

/// [`roomy`], with guesses from the shortest runs: many, and many of them wrong.
pub(super) fn guessing() -> EngineConfig {
    EngineConfig {
        speculation: Speculation {
            speculative_tokens: 3,
            prompt_lookup_max: 4,
            prompt_lookup_min: 1,
        },
        ..roomy()
    }
}

/// A request whose answer repeats itself more or less, with parameters that look back at it.
fn repetitive(numbers: &mut Random) -> Submission {
    let n = numbers.next() as u32;
    let cycle = ids(n % 3, 1 + numbers.below(6));
    let prompt: Vec<u32> = cycle
        .into_iter()
        .cycle()
        .take(1 + n as usize % 40)
        .collect();
    let variant = Variant::ALL[numbers.below(5)];
    let mut submission = random(&prompt, variant, n % 40, u64::from(n));
    submission.choices = 1 + u32::from(numbers.one_in(4));
    let sampling = &mut submission.sampling;
    sampling.temperature = [0.0, 0.0, 0.7][numbers.below(3)];
    sampling.repetition_penalty = [1.0, 1.0, 1.3][numbers.below(3)];
    sampling.frequency_penalty = [0.0, 0.0, 0.4][numbers.below(3)];
    sampling.ignore_eos = numbers.one_in(2);
    sampling.min_tokens = (n % 7).min(sampling.max_tokens);
    // Few tokens left: loops, or coin tosses.
    let left = [0, 1, 2, 2, 3][numbers.below(5)];
    sampling.logit_bias = (0..left).map(|i| (TokenId(2 + i), 60.0)).collect();
    if numbers.one_in(3) {
        sampling.stop_token_ids = vec![TokenId(2 + left)];
    }
    submission
}

type Said = (Option<End>, Vec<u32>);

fn said(answers: &[Answer]) -> Vec<Vec<Said>> {
    let choices = |answer: &Answer| {
        let choices = answer.choices.iter();
        choices
            .map(|choice| (choice.end.clone(), choice.bits()))
            .collect()
    };
    answers.iter().map(choices).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn answers_have_the_same_bits_and_ends_with_guesses_in_any_world(
        seed: u64,
        batch_tokens_max in 1usize..48,
        sequences_max in 1usize..6,
        kv_blocks in 6usize..24,
        prefix_cache: bool,
        speculation in speculations(),
    ) {
        let mut numbers = Random(seed);
        let submissions: Vec<Submission> = (0..6).map(|_| repetitive(&mut numbers)).collect();
        let want = said(&Rig::new("tiny-routed", &roomy()).answers(&submissions));
        let config = EngineConfig {
            batch_tokens_max, sequences_max, kv_blocks, prefix_cache, speculation, ..roomy()
        };
        // The second time over what the first, with its wrong guesses, left in the cache.
        let mut rig = Rig::new("tiny-routed", &config);
        for _ in 0..2 {
            prop_assert!(said(&rig.answers(&submissions)) == want);
        }
    }
}

#[test]
fn guesses_cost_a_row_each_and_save_a_step_where_they_are_right() {
    let mut numbers = Random(5);
    let submissions: Vec<Submission> = (0..40)
        .map(|_| {
            let mut submission = repetitive(&mut numbers);
            (submission.choices, submission.sampling.ignore_eos) = (1, true);
            submission.sampling.stop_token_ids.clear();
            submission.sampling.max_tokens += 1;
            submission
        })
        .collect();
    let without_cache = |config| EngineConfig {
        prefix_cache: false,
        ..config
    };
    let run = |config: EngineConfig| {
        let mut rig = Rig::new("tiny-routed", &without_cache(config));
        let answers: Vec<Answer> = submissions.iter().map(|one| rig.answer(one)).collect();
        (said(&answers), rig.metrics)
    };
    let (want, plain) = run(roomy());
    let (found, guessed) = run(guessing());
    assert!(found == want);
    assert_eq!(plain.spec_decode_drafts.get(), 0);
    let drafts = guessed.spec_decode_drafts.get();
    let drafted = guessed.spec_decode_draft_tokens.get();
    let accepted = guessed.spec_decode_accepted_tokens.get();
    assert!(
        (drafts..=3 * drafts).contains(&drafted),
        "{drafts} {drafted}"
    );
    // The workload would prove little if it met only one kind.
    assert!(
        accepted > 50 && drafted - accepted > 50,
        "{accepted} of {drafted}"
    );
    let rejected = (drafted - accepted) as f64;
    assert_eq!(
        guessed.step_tokens.sum(),
        plain.step_tokens.sum() + rejected
    );
    // One at a time: a step fewer for each right guess.
    assert_eq!(
        guessed.step_tokens.count() + accepted,
        plain.step_tokens.count()
    );
    let generated =
        |metrics: &Metrics| -> u64 { metrics.generated_tokens.iter().map(|c| c.get()).sum() };
    assert_eq!(generated(&guessed), generated(&plain));
}

#[test]
fn only_tokens_that_were_generated_are_found_in_the_prefix_cache() {
    let mut rig = Rig::new("tiny-routed", &guessing());
    // Two tokens at random: guesses are wrong half of the time.
    let mut first = random(&ids(2, 3), Variant::Routed, 90, 4);
    first.sampling.logit_bias = vec![(TokenId(7), 60.0), (TokenId(8), 60.0)];
    let answer = rig.answer(&first);
    let metrics = &rig.metrics;
    assert!(metrics.spec_decode_draft_tokens.get() > metrics.spec_decode_accepted_tokens.get());
    let mut turn = first.clone();
    turn.prompt
        .extend(answer.only().ids().into_iter().map(TokenId));
    turn.prompt.push(TokenId(9));
    let fresh = Rig::new("tiny-routed", &roomy()).answer(&turn);
    let found = rig.answer(&turn);
    // 3 + 89 positions were computed: five blocks.
    assert_eq!(found.cached_tokens, Some(80));
    assert!(found.only().bits() == fresh.only().bits());
}
