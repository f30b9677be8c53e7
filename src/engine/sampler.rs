//! From a row of logits to a token. A function of that row, the request's parameters and history, and (seed, choice,
//! position): who else is in the batch cannot matter.
//!
//! Order, as in vLLM: `logit_bias`, `min_tokens`, penalties (repetition, then frequency and presence), temperature, `min_p`,
//! `top_k`, `top_p`. Log-probabilities are of the row as it came.

use std::cmp::Ordering;
use std::collections::HashMap;

use super::handle::TokenLogprobs;
use crate::random;
use crate::types::{SamplingParams, TokenId};

/// Candidates ordered in one go when looking for the nucleus; grows fourfold while its mass is short.
const NUCLEUS_FIRST: usize = 64;

/// Below this temperature the answer is greedy: dividing by less overflows.
const TEMPERATURE_MIN: f32 = 1e-5;

/// Why a row cannot be sampled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// A NaN or +inf.
    #[error("the model's logits are not finite")]
    NotFinite,
    /// Every token is ruled out.
    #[error("no token can follow: every logit is -inf")]
    NoToken,
}

/// Where in its answer a token stands.
#[derive(Clone, Copy, Debug)]
pub struct Position<'a> {
    /// Which of the request's answers.
    pub choice: u32,
    /// Of the new token in the sequence.
    pub position: usize,
    /// Tokens of the answer before it.
    pub generated: usize,
    /// The model's ends of sequence.
    pub eos: &'a [TokenId],
}

/// The tokens that penalties look at. Empty, and free, for a request without penalties.
#[derive(Clone, Debug, Default)]
pub struct History {
    kept: bool,
    counts: HashMap<TokenId, u32>,
}

impl History {
    /// Of a sequence that starts with `prompt`.
    pub fn new(params: &SamplingParams, prompt: &[TokenId]) -> Self {
        let repetition = params.repetition_penalty != 1.0;
        let kept = repetition || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let prompt = if repetition { prompt } else { &[] };
        Self {
            kept,
            counts: prompt.iter().map(|token| (*token, 0)).collect(),
        }
    }

    /// A token was generated.
    pub fn push(&mut self, token: TokenId) {
        if self.kept {
            *self.counts.entry(token).or_default() += 1;
        }
    }
}

/// Chooses tokens. Holds nothing but room to work in.
#[derive(Debug, Default)]
pub struct Sampler {
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    /// exp(logit), once the candidates that remain are known.
    weight: f32,
    token: u32,
}

impl Candidate {
    /// Most likely first; of equals the first in the vocabulary.
    fn order(&self, other: &Self) -> Ordering {
        other
            .logit
            .total_cmp(&self.logit)
            .then(self.token.cmp(&other.token))
    }
}

impl Sampler {
    /// The next token, given the (vocabulary) logits of the token before it.
    ///
    /// # Errors
    /// When the logits are broken or rule out every token.
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        history: &History,
        position: Position<'_>,
    ) -> Result<TokenId, SampleError> {
        max_logit(logits)?;
        let masks = position.generated < params.min_tokens as usize;
        let plain = params.logit_bias.is_empty() && !masks && history.counts.is_empty();
        let greedy = params.temperature < TEMPERATURE_MIN;
        if plain && greedy {
            return argmax(logits);
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.add_bias(params);
        if masks {
            self.mask_ends(params, position.eos);
        }
        self.penalise(params, history);
        if greedy {
            return argmax(&self.logits);
        }
        let random = random::uniform(params.seed, position.choice, position.position as u64);
        self.draw(params, random)
    }

    fn add_bias(&mut self, params: &SamplingParams) {
        for (token, bias) in &params.logit_bias {
            if let Some(logit) = self.logits.get_mut(token.index()) {
                *logit += bias;
            }
        }
    }

    fn mask_ends(&mut self, params: &SamplingParams, eos: &[TokenId]) {
        let eos = if params.ignore_eos { &[] } else { eos };
        for token in eos.iter().chain(&params.stop_token_ids) {
            if let Some(logit) = self.logits.get_mut(token.index()) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    fn penalise(&mut self, params: &SamplingParams, history: &History) {
        for (token, count) in &history.counts {
            let Some(logit) = self.logits.get_mut(token.index()) else {
                continue;
            };
            if *logit > 0.0 {
                *logit /= params.repetition_penalty;
            } else {
                *logit *= params.repetition_penalty;
            }
            *logit -= params.frequency_penalty * *count as f32;
            if *count > 0 {
                *logit -= params.presence_penalty;
            }
        }
    }

    /// `random` in [0, 1) picks from what temperature, `min_p`, `top_k` and `top_p` leave.
    fn draw(&mut self, params: &SamplingParams, random: f64) -> Result<TokenId, SampleError> {
        let max = max_logit(&self.logits)?;
        let scale = 1.0 / params.temperature;
        // p / p_max >= min_p, in logits; min_p = 0 keeps all but the impossible.
        let least = max + params.min_p.ln() * params.temperature;
        self.candidates.clear();
        let kept = self.logits.iter().zip(0..).filter(|(logit, _)| {
            **logit > f32::NEG_INFINITY && (params.min_p <= 0.0 || **logit >= least)
        });
        self.candidates.extend(kept.map(|(logit, token)| Candidate {
            logit: (logit - max) * scale,
            weight: 0.0,
            token,
        }));
        let top_k = params.top_k as usize;
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates
                .select_nth_unstable_by(top_k - 1, Candidate::order);
            self.candidates.truncate(top_k);
        }
        for candidate in &mut self.candidates {
            candidate.weight = candidate.logit.exp();
        }
        if params.top_p < 1.0 {
            let nucleus = self.nucleus(f64::from(params.top_p));
            self.candidates.truncate(nucleus);
        }
        self.pick(random)
    }

    /// Orders as many candidates as it needs to, and returns how many of the first reach `top_p` of the mass of all.
    fn nucleus(&mut self, top_p: f64) -> usize {
        let total: f64 = self.candidates.iter().map(weight).sum();
        let target = top_p * total;
        let mut mass = 0.0;
        let mut ordered = 0;
        let mut group = NUCLEUS_FIRST;
        while ordered < self.candidates.len() {
            let rest = &mut self.candidates[ordered..];
            if group < rest.len() {
                rest.select_nth_unstable_by(group - 1, Candidate::order);
            }
            let group_len = group.min(rest.len());
            rest[..group_len].sort_unstable_by(Candidate::order);
            for (index, candidate) in rest[..group_len].iter().enumerate() {
                mass += weight(candidate);
                if mass >= target {
                    return ordered + index + 1;
                }
            }
            ordered += group_len;
            group *= 4;
        }
        self.candidates.len()
    }

    /// Inverse of the cumulative distribution over the candidates. Their order is a function of the row alone: the same
    /// selections run on the same numbers.
    fn pick(&self, random: f64) -> Result<TokenId, SampleError> {
        let total: f64 = self.candidates.iter().map(weight).sum();
        let target = random * total;
        let mut mass = 0.0;
        let chosen = self.candidates.iter().find(|candidate| {
            mass += weight(candidate);
            mass > target
        });
        // Rounding may leave the last one a hair short.
        let chosen = chosen.or(self.candidates.last());
        chosen
            .map(|candidate| TokenId(candidate.token))
            .ok_or(SampleError::NoToken)
    }

    /// Log-probability of `token` in the distribution of `logits`, and the `top` most likely tokens.
    ///
    /// # Errors
    /// When the logits are broken.
    pub fn logprobs(
        &mut self,
        logits: &[f32],
        token: TokenId,
        top: usize,
    ) -> Result<TokenLogprobs, SampleError> {
        let max = max_logit(logits)?;
        let sum: f64 = logits
            .iter()
            .map(|logit| f64::from((logit - max).exp()))
            .sum();
        let log_sum = f64::from(max) + sum.ln();
        let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
        self.most_likely(logits, top);
        Ok(TokenLogprobs {
            logprob: logits
                .get(token.index())
                .map_or(f32::NEG_INFINITY, |logit| logprob(*logit)),
            top: self
                .candidates
                .iter()
                .map(|candidate| (TokenId(candidate.token), logprob(candidate.logit)))
                .collect(),
        })
    }

    /// The `top` first of `logits`, in order, in `candidates`.
    fn most_likely(&mut self, logits: &[f32], top: usize) {
        self.candidates.clear();
        for (logit, token) in logits.iter().copied().zip(0..) {
            let full = self.candidates.len() >= top;
            if full
                && self
                    .candidates
                    .last()
                    .is_none_or(|last| logit <= last.logit)
            {
                continue;
            }
            let candidate = Candidate {
                logit,
                weight: 0.0,
                token,
            };
            let at = self
                .candidates
                .partition_point(|other| other.order(&candidate) == Ordering::Less);
            self.candidates.insert(at, candidate);
            self.candidates.truncate(top);
        }
    }
}

fn weight(candidate: &Candidate) -> f64 {
    f64::from(candidate.weight)
}

/// The largest logit; also the one check of a row.
fn max_logit(logits: &[f32]) -> Result<f32, SampleError> {
    let mut max = f32::NEG_INFINITY;
    let mut nan = false;
    for logit in logits {
        max = max.max(*logit);
        nan |= logit.is_nan();
    }
    if nan || max == f32::INFINITY {
        return Err(SampleError::NotFinite);
    }
    if max == f32::NEG_INFINITY {
        return Err(SampleError::NoToken);
    }
    Ok(max)
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> Result<TokenId, SampleError> {
    let max = max_logit(logits)?;
    let first = logits.iter().zip(0..).find(|(logit, _)| **logit == max);
    first
        .map(|(_, token)| TokenId(token))
        .ok_or(SampleError::NoToken)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::collections::HashSet;

    use super::*;

    const EOS: [TokenId; 1] = [TokenId(2)];

    fn sampling() -> SamplingParams {
        SamplingParams::default()
    }

    fn greedy() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            ..sampling()
        }
    }

    fn at(generated: usize) -> Position<'static> {
        Position {
            choice: 0,
            position: 10 + generated,
            generated,
            eos: &EOS,
        }
    }

    fn sample(logits: &[f32], params: &SamplingParams) -> Result<TokenId, SampleError> {
        Sampler::default().sample(logits, params, &History::default(), at(0))
    }

    /// All tokens drawn at many positions.
    fn drawn(logits: &[f32], params: &SamplingParams) -> HashSet<u32> {
        let mut sampler = Sampler::default();
        (0..2000)
            .map(|n| {
                let history = History::default();
                sampler.sample(logits, params, &history, at(n)).unwrap().0
            })
            .collect()
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        let token = sample(&[1.0, 3.0, 2.0, 3.0], &greedy());
        assert_eq!(token, Ok(TokenId(1)));
    }

    #[test]
    fn broken_rows_are_errors() {
        let inf = f32::INFINITY;
        for params in [greedy(), sampling()] {
            for (logits, error) in [
                ([1.0, f32::NAN], SampleError::NotFinite),
                ([1.0, inf], SampleError::NotFinite),
                ([-inf, -inf], SampleError::NoToken),
            ] {
                assert_eq!(sample(&logits, &params), Err(error));
                let logprobs = Sampler::default().logprobs(&logits, TokenId(0), 1);
                assert_eq!(logprobs, Err(error));
            }
            assert_eq!(sample(&[], &params), Err(SampleError::NoToken));
        }
    }

    #[test]
    fn a_row_whose_every_token_is_masked_is_an_error() {
        let params = SamplingParams {
            min_tokens: 1,
            stop_token_ids: vec![TokenId(0), TokenId(1)],
            ..sampling()
        };
        assert_eq!(sample(&[1.0, 1.0, 9.0], &params), Err(SampleError::NoToken));
    }

    #[test]
    fn min_tokens_masks_ends_until_then() {
        let logits = [0.0, 1.0, 9.0, 8.0];
        let params = SamplingParams {
            min_tokens: 2,
            stop_token_ids: vec![TokenId(3)],
            ..greedy()
        };
        let ignoring = SamplingParams {
            ignore_eos: true,
            ..params.clone()
        };
        for (params, generated, want) in [(&params, 1, 1), (&params, 2, 2), (&ignoring, 1, 2)] {
            let history = History::default();
            let token = Sampler::default().sample(&logits, params, &history, at(generated));
            assert_eq!(token, Ok(TokenId(want)));
        }
    }

    #[test]
    fn logit_bias_moves_the_choice_and_ignores_unknown_tokens() {
        let params = SamplingParams {
            logit_bias: vec![(TokenId(0), 5.0), (TokenId(77), 100.0)],
            ..greedy()
        };
        assert_eq!(sample(&[0.0, 1.0, 4.0], &params), Ok(TokenId(0)));
    }

    /// The logits after penalties, for a prompt [0, 1] and an answer [1, 3, 3].
    fn penalised(params: SamplingParams) -> Vec<f32> {
        let mut history = History::new(&params, &[TokenId(0), TokenId(1)]);
        for token in [1, 3, 3] {
            history.push(TokenId(token));
        }
        let mut sampler = Sampler {
            logits: vec![2.0, -2.0, 2.0, 2.0],
            candidates: Vec::new(),
        };
        sampler.penalise(&params, &history);
        sampler.logits
    }

    #[test]
    fn penalties_follow_vllm() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            ..greedy()
        };
        assert_eq!(penalised(params), [1.0, -4.0, 2.0, 1.0]);
        let params = SamplingParams {
            presence_penalty: 0.5,
            ..greedy()
        };
        assert_eq!(penalised(params), [2.0, -2.5, 2.0, 1.5]);
        let params = SamplingParams {
            frequency_penalty: 0.5,
            ..greedy()
        };
        assert_eq!(penalised(params), [2.0, -2.5, 2.0, 1.0]);
    }

    #[test]
    fn filters_keep_what_they_should() {
        // Probabilities 0.4, 0.3, 0.2, 0.1.
        let logits: Vec<f32> = [0.2f32, 0.4, 0.1, 0.3].iter().map(|p| p.ln()).collect();
        let all = || [0, 1, 2, 3].into();
        for (params, want) in [
            (sampling(), all()),
            (
                SamplingParams {
                    top_k: 2,
                    ..sampling()
                },
                HashSet::from([1, 3]),
            ),
            (
                SamplingParams {
                    top_k: 9,
                    ..sampling()
                },
                all(),
            ),
            (
                SamplingParams {
                    top_p: 0.65,
                    ..sampling()
                },
                [1, 3].into(),
            ),
            (
                SamplingParams {
                    top_p: 0.75,
                    ..sampling()
                },
                [1, 3, 0].into(),
            ),
            (
                SamplingParams {
                    top_p: 0.0,
                    ..sampling()
                },
                [1].into(),
            ),
            (
                SamplingParams {
                    min_p: 0.6,
                    ..sampling()
                },
                [1, 3].into(),
            ),
            (
                SamplingParams {
                    min_p: 1.0,
                    ..sampling()
                },
                [1].into(),
            ),
            (
                // Of the first three 0.44, 0.33, 0.22: the nucleus is taken within them.
                SamplingParams {
                    top_k: 3,
                    top_p: 0.7,
                    ..sampling()
                },
                [1, 3].into(),
            ),
        ] {
            assert_eq!(drawn(&logits, &params), want, "{params:?}");
        }
    }

    #[test]
    fn top_k_of_equals_keeps_the_first() {
        let params = SamplingParams {
            top_k: 2,
            ..sampling()
        };
        assert_eq!(drawn(&[1.0; 8], &params), [0, 1].into());
    }

    #[test]
    fn the_nucleus_of_a_flat_row_needs_more_than_one_group() {
        let mut sampler = Sampler::default();
        let candidates = (0..1000).map(|token| Candidate {
            logit: 0.0,
            weight: 1.0,
            token,
        });
        sampler.candidates.extend(candidates);
        assert_eq!(sampler.nucleus(0.5), 500);
        let first = sampler.candidates[..500].iter().map(|c| c.token);
        assert!(first.eq(0..500));
    }

    #[test]
    fn draws_follow_the_distribution() {
        let probabilities = [0.5f32, 0.25, 0.125, 0.125];
        for temperature in [1.0f32, 0.5] {
            check_distribution(&probabilities, temperature);
        }
    }

    fn check_distribution(probabilities: &[f32], temperature: f32) {
        const DRAWS: usize = 20_000;
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let powers: Vec<f32> = probabilities
            .iter()
            .map(|p| p.powf(1.0 / temperature))
            .collect();
        let total: f32 = powers.iter().sum();
        let params = SamplingParams {
            temperature,
            seed: 5,
            ..sampling()
        };
        let mut sampler = Sampler::default();
        let mut counts = vec![0usize; probabilities.len()];
        for n in 0..DRAWS {
            let token = sampler.sample(&logits, &params, &History::default(), at(n));
            counts[token.unwrap().index()] += 1;
        }
        for (count, power) in counts.iter().zip(powers) {
            let (found, want) = (*count as f32 / DRAWS as f32, power / total);
            let deviation = (want * (1.0 - want) / DRAWS as f32).sqrt();
            assert!((found - want).abs() < 5.0 * deviation, "{found} {want}");
        }
    }

    #[test]
    fn logprobs_are_of_the_unmodified_row() {
        let logits = [1000.0, 999.0, -f32::INFINITY, 1000.0, 990.0];
        let found = Sampler::default().logprobs(&logits, TokenId(1), 3).unwrap();
        let log_sum = (2.0 + (-1f64).exp() + (-10f64).exp()).ln();
        let want = [(0, -log_sum), (3, -log_sum), (1, -1.0 - log_sum)];
        assert!((f64::from(found.logprob) - want[2].1).abs() < 1e-6);
        assert_eq!(found.top.len(), 3);
        for ((token, logprob), (want_token, want)) in found.top.iter().zip(want) {
            assert_eq!(token.0, want_token);
            assert!((f64::from(*logprob) - want).abs() < 1e-6);
        }
        let none = Sampler::default().logprobs(&logits, TokenId(2), 0).unwrap();
        assert_eq!((none.logprob, none.top.len()), (-f32::INFINITY, 0));
    }
}
