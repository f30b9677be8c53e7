//! `kernels/sample.cu` against the engine's sampler: the same tokens, to the bit, for everything that a request can ask for, over
//! rows with ties, both zeros and ruled out tokens; log-probabilities to f32's rounding.

use midpo::backend::cuda::Cuda;
use midpo::backend::ops::Heads;
use midpo::backend::{
    Backend, BackendError, SampleFault, SampleRow, Sampled, StepLimits, Workload,
};
use midpo::engine::TokenLogprobs;
use midpo::engine::sampler::{History, Position, SampleError, Sampler, describe, mass};
use midpo::types::{SamplingParams, TokenId};

use super::{Random, TestDriver, backends, check_schedules};

const EOS: [TokenId; 2] = [TokenId(0), TokenId(5)];
/// The device sums in f32, the host in f64; logits are below 32 here.
const LOGPROB_ERROR: f32 = 2e-5;

/// A row of logits and what a request wants of it.
struct Case {
    logits: Vec<f32>,
    params: SamplingParams,
    prompt: Vec<TokenId>,
    answer: Vec<TokenId>,
    choice: u32,
    allowed: Option<Vec<u32>>,
}

impl Case {
    /// A row of `vocabulary` and parameters of which each is at rest half of the time.
    fn random(random: &mut Random, vocabulary: usize) -> Self {
        let logits = (0..vocabulary).map(|_| logit(random)).collect();
        // Ids that the vocabulary lacks are ignored.
        let token = |random: &mut Random| TokenId(random.below(vocabulary + 2) as u32);
        let tokens = |random: &mut Random, most: usize| -> Vec<_> {
            (0..random.below(most)).map(|_| token(random)).collect()
        };
        let pick = |random: &mut Random, rest: f32, values: &[f32]| match random.below(2) {
            0 => rest,
            _ => values[random.below(values.len())],
        };
        let mut bias: Vec<_> = tokens(random, 6);
        bias.sort_unstable();
        bias.dedup();
        let params = SamplingParams {
            temperature: pick(random, 1.0, &[0.0, 1e-6, 0.01, 0.7, 2.0]),
            top_k: [0, 0, 1, 2, 40, 1000][random.below(6)],
            top_p: pick(random, 1.0, &[0.0, 0.1, 0.5, 0.9, 0.999]),
            min_p: pick(random, 0.0, &[1e-6, 0.05, 0.5, 1.0]),
            presence_penalty: pick(random, 0.0, &[-2.0, 0.3, 2.0]),
            frequency_penalty: pick(random, 0.0, &[-2.0, 0.1, 2.0]),
            repetition_penalty: pick(random, 1.0, &[0.5, 1.1, 3.0]),
            logit_bias: bias
                .into_iter()
                .map(|token| (token, 20.0 * random.number()))
                .collect(),
            seed: random.below(1 << 40) as u64,
            logprobs: [None, Some(0), Some(3), Some(20)][random.below(4)],
            min_tokens: [0, 0, 3][random.below(3)],
            stop_token_ids: tokens(random, 3),
            ignore_eos: random.below(2) == 0,
            ..SamplingParams::default()
        };
        let allowed = (random.below(4) == 0).then(|| bits(random, vocabulary));
        Self {
            logits,
            prompt: tokens(random, 40),
            answer: tokens(random, 20),
            choice: random.below(3) as u32,
            allowed,
            params,
        }
    }

    fn plain(logits: Vec<f32>, params: SamplingParams) -> Self {
        Self {
            logits,
            params,
            prompt: Vec::new(),
            answer: Vec::new(),
            choice: 0,
            allowed: None,
        }
    }

    fn history(&self) -> History {
        let mut history = History::new(&self.params, &self.prompt);
        self.answer.iter().for_each(|token| history.push(*token));
        history
    }

    fn position(&self) -> Position<'static> {
        Position {
            choice: self.choice,
            position: self.prompt.len() + self.answer.len(),
            generated: self.answer.len(),
            eos: &EOS,
        }
    }

    fn row(&self) -> SampleRow {
        let mut row = SampleRow::default();
        describe(&self.params, &self.history(), self.position(), &mut row);
        row.allowed.clone_from(&self.allowed);
        row
    }

    /// What the engine's sampler says: the token, and log-probabilities of the row as it came.
    fn on_host(&self) -> (Result<TokenId, SampleError>, Option<TokenLogprobs>) {
        let mut logits = self.logits.clone();
        if let Some(bits) = &self.allowed {
            let ruled_out = |token: &usize| (bits[token / 32] >> (token % 32)) & 1 == 0;
            (0..logits.len())
                .filter(ruled_out)
                .for_each(|token| logits[token] = f32::NEG_INFINITY);
        }
        let mut sampler = Sampler::default();
        let token = sampler.sample(&logits, &self.params, &self.history(), self.position());
        let told = match (token, self.params.logprobs) {
            (Ok(token), Some(top)) => sampler.logprobs(&self.logits, token, top as usize).ok(),
            _ => None,
        };
        (token, told)
    }
}

/// Halves between -8 and 24, so that a row is full of ties; both zeros; ruled out tokens.
fn logit(random: &mut Random) -> f32 {
    match random.below(16) {
        0 => f32::NEG_INFINITY,
        1 => -0.0,
        2 => 0.0,
        3..8 => (random.number() * 16.0).round() / 2.0,
        _ => random.number() * random.number() * 16.0 + 8.0 * (random.number() - 0.5),
    }
}

/// A grammar that allows about half of the tokens.
fn bits(random: &mut Random, vocabulary: usize) -> Vec<u32> {
    (0..vocabulary.div_ceil(32))
        .map(|_| random.below(1 << 32) as u32)
        .collect()
}

/// All of one vocabulary, in one launch.
fn on_device(cuda: &mut Cuda<TestDriver>, cases: &[Case]) -> Sampled {
    let vocabulary = cases[0].logits.len();
    let mut logits = cuda.exact_buffer(cases.len() + 1, vocabulary).unwrap();
    let values: Vec<_> = cases.iter().flat_map(|case| case.logits.clone()).collect();
    cuda.write(&mut logits, &values).unwrap();
    let rows: Vec<_> = cases.iter().map(Case::row).collect();
    let mut sampled = Sampled::default();
    assert!(cuda.sample(&logits, &rows).unwrap());
    cuda.sampled(&rows, &mut sampled).unwrap();
    sampled
}

fn check(cuda: &mut Cuda<TestDriver>, cases: &[Case]) {
    let sampled = on_device(cuda, cases);
    assert_eq!(sampled.tokens.len(), cases.len());
    for (i, case) in cases.iter().enumerate() {
        let label = format!("row {i} of {}: {:?}", case.logits.len(), case.params);
        let (token, told) = case.on_host();
        let want = token.map_err(|error| match error {
            SampleError::NotFinite => SampleFault::NotFinite,
            SampleError::NoToken => SampleFault::NoToken,
        });
        assert_eq!(sampled.tokens[i], want, "{label}");
        let logprob = told.as_ref().map(|told| told.logprob);
        let top = told.map_or(Vec::new(), |told| told.top);
        assert_logprobs(&label, sampled.logprobs[i], logprob);
        let tokens =
            |top: &[(TokenId, f32)]| top.iter().map(|(token, _)| *token).collect::<Vec<_>>();
        assert_eq!(tokens(&sampled.top[i]), tokens(&top), "{label}");
        for ((_, got), (_, want)) in sampled.top[i].iter().zip(&top) {
            assert_logprobs(&label, Some(*got), Some(*want));
        }
    }
}

fn assert_logprobs(label: &str, got: Option<f32>, want: Option<f32>) {
    let close = match (got, want) {
        (Some(got), Some(want)) => got == want || (got - want).abs() <= LOGPROB_ERROR,
        (got, want) => got == want,
    };
    assert!(close, "{label}: log-probability {got:?}, not {want:?}");
}

#[test]
fn sample_chooses_the_hosts_tokens_whatever_is_asked_for() {
    let random = &mut Random(41);
    for (_, cuda) in &mut backends() {
        for vocabulary in [1, 2, 31, 33, 511, 513, 1000, 4099] {
            let cases: Vec<_> = (0..24).map(|_| Case::random(random, vocabulary)).collect();
            check(cuda, &cases);
        }
    }
}

/// A unit more or less in one token's mass changes a choice here.
#[test]
fn sample_weighs_tokens_as_the_host_does_to_the_unit() {
    let random = &mut Random(43);
    let mut logits: Vec<f32> = (0..90).map(|_| 10.0 * random.number() - 10.0).collect();
    logits[77] = 0.0;
    let masses: Vec<u64> = logits.iter().map(|x| u64::from(mass(*x))).collect();
    let total: u64 = masses.iter().sum();
    let mut rows = Vec::new();
    let mut want = Vec::new();
    let mut before = 0;
    for (token, mass) in masses.iter().enumerate().filter(|(_, mass)| **mass > 0) {
        for unit in [before, before + mass - 1] {
            rows.push(SampleRow {
                random: (unit as f64 + 0.5) / total as f64,
                scale: 1.0,
                least: f32::NEG_INFINITY,
                top_p: 1.0,
                ..SampleRow::default()
            });
            want.push(Ok(TokenId(token as u32)));
        }
        before += mass;
    }
    for (_, cuda) in &mut backends() {
        let mut buffer = cuda.exact_buffer(rows.len(), logits.len()).unwrap();
        cuda.write(&mut buffer, &logits.repeat(rows.len())).unwrap();
        let mut sampled = Sampled::default();
        assert!(cuda.sample(&buffer, &rows).unwrap());
        cuda.sampled(&rows, &mut sampled).unwrap();
        assert_eq!(sampled.tokens, want);
    }
}

#[test]
fn sample_cuts_flat_rows_where_the_host_does() {
    let shapes: [fn(usize) -> f32; 3] = [|_| 1.5, |i| -((i % 3) as f32), |i| (i as f32) * 1e-7];
    let filters = [(7, 1.0), (0, 0.5), (100, 0.37), (0, 0.999_9), (699, 0.0)];
    let case = |(i, (top_k, top_p)): (usize, (u32, f32))| {
        let logits = (0..700).map(shapes[i % 3]).collect();
        let params = SamplingParams {
            top_k,
            top_p,
            seed: i as u64,
            logprobs: Some(5),
            ..SamplingParams::default()
        };
        Case::plain(logits, params)
    };
    let cases: Vec<_> = (0..30).map(|i| case((i, filters[i % 5]))).collect();
    for (_, cuda) in &mut backends() {
        check(cuda, &cases);
    }
}

#[test]
fn sample_tells_broken_rows_apart_and_their_neighbours_do_not_mind() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let greedy = SamplingParams {
        temperature: 0.0,
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let biased = SamplingParams {
        logit_bias: vec![(TokenId(1), f32::MAX)],
        ..SamplingParams::default()
    };
    let masked = SamplingParams {
        min_tokens: 1,
        stop_token_ids: vec![TokenId(1), TokenId(2)],
        ..SamplingParams::default()
    };
    let mut cases = Vec::new();
    for params in [SamplingParams::default(), greedy] {
        for logits in [
            [1.0, nan, 2.0],
            [1.0, -nan, 2.0],
            [1.0, inf, 2.0],
            [-inf; 3],
            [-inf, 3.0, 0.0],
        ] {
            cases.push(Case::plain(logits.to_vec(), params.clone()));
        }
    }
    cases.push(Case::plain(vec![0.0, f32::MAX, 0.0], biased));
    cases.push(Case::plain(vec![0.0; 3], masked));
    for (_, cuda) in &mut backends() {
        check(cuda, &cases);
    }
}

#[test]
fn sample_does_not_depend_on_the_order_of_threads_and_blocks() {
    let random = &mut Random(42);
    let cases: Vec<_> = (0..6).map(|_| Case::random(random, 700)).collect();
    check_schedules(|cuda| on_device(cuda, &cases));
}

#[test]
fn sample_leaves_to_the_host_what_nobody_reserved_room_for() {
    let limits = StepLimits {
        rows: 4,
        logit_rows: 2,
        sequences: 2,
        positions: 64,
        blocks: 8,
        vocabulary: 33,
    };
    let work = Workload {
        limits,
        heads: Heads {
            query: 2,
            kv: 1,
            size: 16,
        },
        layers: 1,
        mlp_width: 64,
        expert_width: 0,
        quantised_inputs: 0,
    };
    let row = |masked| SampleRow {
        masked: vec![TokenId(3); masked],
        ..SampleRow::default()
    };
    for (_, cuda) in &mut backends() {
        cuda.reserve(&work).unwrap();
        let logits = cuda.exact_buffer(2, 33).unwrap();
        let mut sampled = Sampled::default();
        // Room is for 4096 words of lists a row on average.
        for (longs, there) in [([8192, 0], true), ([8192, 1], false), ([4096, 4096], true)] {
            let rows = longs.map(row);
            assert_eq!(cuda.sample(&logits, &rows).unwrap(), there);
            if there {
                // Other rows than were sampled.
                assert!(cuda.sampled(&rows[..1], &mut sampled).is_err());
                assert!(cuda.sample(&logits, &rows).unwrap());
                cuda.sampled(&rows, &mut sampled).unwrap();
            } else {
                assert!(cuda.sampled(&rows, &mut sampled).is_err());
                continue;
            }
            assert_eq!(sampled.tokens, [Ok(TokenId(0)); 2], "{longs:?}");
        }
    }
}

#[test]
fn sample_refuses_what_it_cannot_do() {
    let row = |top, words| SampleRow {
        top,
        allowed: Some(vec![u32::MAX; words]),
        ..SampleRow::default()
    };
    for (_, cuda) in &mut backends() {
        let logits = cuda.exact_buffer(1, 33).unwrap();
        let inexact = cuda.buffer(1, 33).unwrap();
        let mut refused = |logits, rows: &[SampleRow]| match cuda.sample(logits, rows) {
            Err(BackendError::Contract { operand, .. }) => operand,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&logits, &[row(None, 2), row(None, 2)]), "rows");
        assert_eq!(refused(&logits, &[row(Some(21), 2)]), "top");
        assert_eq!(refused(&logits, &[row(None, 1)]), "allowed");
        assert_eq!(refused(&inexact, &[row(None, 2)]), "logits");
    }
}
