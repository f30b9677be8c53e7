//! The engine over the CUDA backend: tokens that the device draws are those that the engine's sampler draws from the same logits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use midpo::backend::{Backend, KvFormat, StepLayout, StepSequence, WeightFormat};
use midpo::config::{EngineConfig, Speculation};
use midpo::engine::sampler::{History, Position, Sampler};
use midpo::engine::{
    Engine, Event, EventStream, GateDetail, GeneratedToken, Submission, TokenLogprobs,
    model_options,
};
use midpo::metrics::Metrics;
use midpo::model::RoutedLlama;
use midpo::types::{BlockId, SamplingParams, TokenId, Variant};

use super::memory::counting;
use crate::golden::load;

const MODEL: &str = "tiny-gqa";
const ANSWER: u32 = 6;

fn config() -> EngineConfig {
    EngineConfig {
        batch_tokens_max: 128,
        step_time_max: Duration::MAX,
        sequences_max: 8,
        queue_max: 8,
        context_tokens_max: 128,
        kv_blocks: 64,
        prefix_cache: false,
        speculation: Speculation::OFF,
    }
}

fn model<B: Backend>(backend: B) -> RoutedLlama<B> {
    let options = model_options(&config(), KvFormat::BF16, WeightFormat::Stored);
    RoutedLlama::new(backend, &load(MODEL, true), options).unwrap()
}

fn submission(stem: u32, sampling: SamplingParams) -> Submission {
    Submission {
        prompt: (0..9 + stem)
            .map(|i| TokenId(3 + (stem * 53 + i * 17) % 200))
            .collect(),
        sampling: SamplingParams {
            max_tokens: ANSWER,
            ..sampling
        },
        choices: 1,
        variant: Variant::Routed,
        gates: Variant::Routed.gates(),
        cache_salt: None,
        prompt_logprobs: None,
        gate_detail: GateDetail::None,
        prompt_gates: false,
    }
}

/// Of every kind that the device must do something for.
fn submissions() -> Vec<Submission> {
    let random = SamplingParams {
        temperature: 0.9,
        seed: 5,
        ..SamplingParams::default()
    };
    let greedy = SamplingParams {
        temperature: 0.0,
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let filtered = SamplingParams {
        top_p: 0.8,
        top_k: 40,
        min_p: 0.01,
        repetition_penalty: 1.3,
        presence_penalty: 0.5,
        frequency_penalty: 0.2,
        logprobs: Some(0),
        seed: 6,
        ..random.clone()
    };
    let biased = SamplingParams {
        logit_bias: vec![(TokenId(7), 4.0), (TokenId(8), -3.0)],
        stop_token_ids: vec![TokenId(9)],
        min_tokens: 3,
        ..random.clone()
    };
    let all = [random, greedy, filtered, biased];
    (1..)
        .zip(all)
        .map(|(stem, sampling)| submission(stem, sampling))
        .collect()
}

fn tokens(stream: &mut EventStream) -> Vec<GeneratedToken> {
    let mut tokens = Vec::new();
    while let Some(event) = stream.try_next() {
        match event {
            Event::Token { token, .. } => tokens.push(token),
            Event::Failed { message, .. } => panic!("{message}"),
            Event::Prompt { .. } | Event::Finished { .. } => {}
        }
    }
    tokens
}

/// The answers of one run of the engine, and how often the device sampled.
fn answers(submissions: &[Submission]) -> (Vec<Vec<GeneratedToken>>, usize) {
    let (cuda, counts) = counting(true);
    let metrics = Arc::new(Metrics::new(MODEL));
    let (handle, mut engine) = Engine::new(model(cuda), &config(), metrics);
    let mut streams: Vec<_> = submissions
        .iter()
        .map(|one| handle.submit(one.clone()).unwrap())
        .collect();
    loop {
        engine.step().unwrap();
        if engine.is_idle() {
            break;
        }
    }
    let answers = streams.iter_mut().map(tokens).collect();
    (answers, counts.samples.load(Ordering::SeqCst))
}

/// What the host's sampler says of the logits after the prompt and `answer` so far, token by token, alone on a device.
fn on_host(
    submission: &Submission,
    answer: &[GeneratedToken],
) -> Vec<(TokenId, Option<TokenLogprobs>)> {
    let (cuda, _) = counting(false);
    let mut model = model(cuda);
    let eos = model.eos_token_ids().to_vec();
    let blocks: Vec<_> = (0..8).map(BlockId::new).collect();
    let params = &submission.sampling;
    let mut history = History::new(params, &submission.prompt);
    let mut sampler = Sampler::default();
    let mut new = submission.prompt.clone();
    let mut start = 0;
    let mut drawn = Vec::new();
    for (generated, said) in answer.iter().enumerate() {
        let sequence = StepSequence {
            rows: new.len(),
            start,
            block_table: &blocks,
            gates: submission.gates,
        };
        let layout = StepLayout {
            tokens: &new,
            sequences: &[sequence],
            logit_rows: &[new.len() - 1],
        };
        let logits = model.forward(&layout).unwrap().logits.to_vec();
        start += new.len();
        let position = Position {
            choice: 0,
            position: start,
            generated,
            eos: &eos,
        };
        let token = sampler.sample(&logits, params, &history, position).unwrap();
        let top = params.logprobs.map(|top| top as usize);
        drawn.push((
            token,
            top.map(|top| sampler.logprobs(&logits, token, top).unwrap()),
        ));
        history.push(said.id);
        new = vec![said.id];
    }
    drawn
}

#[test]
fn the_device_draws_what_the_host_would_for_every_kind_of_request() {
    if let Some(reason) = cuda_emu::ABSENT {
        eprintln!("skipped: {reason}");
        return;
    }
    let submissions = submissions();
    let (answers, sampled) = answers(&submissions);
    assert!(sampled >= ANSWER as usize, "{sampled} launches");
    for (submission, answer) in submissions.iter().zip(&answers) {
        assert!(!answer.is_empty());
        for (said, (token, logprobs)) in answer.iter().zip(on_host(submission, answer)) {
            assert_eq!(said.id, token, "{:?}", submission.sampling);
            let (said, want) = (said.logprobs.clone(), logprobs);
            let told = |logprobs: &Option<TokenLogprobs>| {
                let numbers = logprobs.iter().flat_map(|told| {
                    let top = told.top.iter().map(|(_, logprob)| *logprob);
                    std::iter::once(told.logprob).chain(top)
                });
                numbers.collect::<Vec<_>>()
            };
            let ids = |logprobs: &Option<TokenLogprobs>| {
                let top = logprobs.iter().flat_map(|told| &told.top);
                top.map(|(token, _)| *token).collect::<Vec<_>>()
            };
            assert_eq!(ids(&said), ids(&want));
            assert_eq!(said.is_some(), submission.sampling.logprobs.is_some());
            for (said, want) in told(&said).iter().zip(told(&want)) {
                assert!((said - want).abs() < 1e-4, "{said} {want}");
            }
        }
    }
}

/// Log-probabilities of a prompt need its logits on the host: then the host samples, in that step alone.
#[test]
fn a_step_that_reports_a_prompt_is_sampled_on_the_host_and_answers_the_same() {
    if let Some(reason) = cuda_emu::ABSENT {
        eprintln!("skipped: {reason}");
        return;
    }
    let plain = submissions();
    let mut reporting = plain.clone();
    reporting[0].prompt_logprobs = Some(2);
    let ((want, device), (got, mixed)) = (answers(&plain), answers(&reporting));
    assert!(mixed < device && mixed > 0, "{mixed} of {device}");
    let ids = |answers: &[Vec<GeneratedToken>]| -> Vec<Vec<TokenId>> {
        let ids = |answer: &Vec<GeneratedToken>| answer.iter().map(|token| token.id).collect();
        answers.iter().map(ids).collect()
    };
    assert_eq!(ids(&got), ids(&want));
}
