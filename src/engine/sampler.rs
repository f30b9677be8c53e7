//! From a row of logits to a token. A function of that row, the request's parameters and history, and (seed, choice,
//! position): who else is in the batch cannot matter.
//!
//! Order, as in vLLM: `logit_bias`, `min_tokens`, penalties (repetition, then frequency and presence), temperature, `min_p`,
//! `top_k`, `top_p`. Log-probabilities are of the row as it came.
//!
//! Probabilities are integers in units of 2^-30 of the most likely token's ([`mass`]): their sums do not depend on the order of
//! additions, so `kernels/sample.cu` chooses the same tokens, to the bit.

use std::cmp::Ordering;
use std::collections::HashMap;

use super::handle::TokenLogprobs;
use crate::backend::{SampleFault, SampleRow};
use crate::random;
use crate::types::{SamplingParams, TokenId};

/// Candidates ordered in one go when looking for the nucleus; grows fourfold while its mass is short.
const NUCLEUS_FIRST: usize = 64;

/// Below this temperature the answer is greedy: dividing by less overflows.
const TEMPERATURE_MIN: f32 = 1e-5;

/// exp(x) in units of 2^-30, for x <= 0; within 4e-6 of it and a unit. Below a unit it is 0: what is a billion times less likely than
/// the most likely token is never drawn.
///
/// 2^(x log2 e) by its series around the nearest integer. Every step rounds on its own, as in the kernel: nothing is fused.
pub fn mass(x: f32) -> u32 {
    /// 1.5 * 2^23: adding it leaves the nearest integer in the last bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln(2)^k / k!, from k = 6 down to 0.
    const SERIES: [f32; 7] = [
        0.000_154_035_3,
        0.001_333_355_8,
        0.009_618_129,
        0.055_504_11,
        0.240_226_5,
        std::f32::consts::LN_2,
        1.0,
    ];
    let t = x * std::f32::consts::LOG2_E;
    if t.is_nan() || t < -31.0 {
        return 0;
    }
    let shifted = t + ROUND;
    let fraction = t - (shifted - ROUND);
    let power = SERIES.iter().fold(0.0, |sum, term| sum * fraction + term);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    (power * f32::from_bits(exponent.wrapping_add(30 + 127) << 23)) as u32
}

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

impl From<SampleFault> for SampleError {
    fn from(fault: SampleFault) -> Self {
        match fault {
            SampleFault::NotFinite => Self::NotFinite,
            SampleFault::NoToken => Self::NoToken,
        }
    }
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
    /// Its probability, once the candidates that remain are known.
    mass: u32,
    token: u32,
}

impl Candidate {
    /// Most likely first; of equals, as both zeros are, the first in the vocabulary.
    fn order(&self, other: &Self) -> Ordering {
        let (logit, other_logit) = (self.logit + 0.0, other.logit + 0.0);
        other_logit
            .total_cmp(&logit)
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
        let greedy = scale(params) == 0.0;
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
        for token in masked_ends(params, eos) {
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
        let (scale, least) = (scale(params), max + least(params));
        self.candidates.clear();
        let kept = self.logits.iter().zip(0..);
        let kept = kept.filter(|(logit, _)| **logit > f32::NEG_INFINITY && **logit >= least);
        self.candidates.extend(kept.map(|(logit, token)| Candidate {
            logit: *logit,
            mass: 0,
            token,
        }));
        let top_k = params.top_k as usize;
        let few = top_k > 0 && top_k < self.candidates.len();
        if few {
            self.candidates
                .select_nth_unstable_by(top_k - 1, Candidate::order);
            self.candidates.truncate(top_k);
        }
        for candidate in &mut self.candidates {
            candidate.mass = mass((candidate.logit - max) * scale);
        }
        if params.top_p < 1.0 {
            let nucleus = self.nucleus(f64::from(params.top_p));
            self.candidates.truncate(nucleus);
        }
        if few || params.top_p < 1.0 {
            self.candidates
                .sort_unstable_by_key(|candidate| candidate.token);
        }
        self.pick(random)
    }

    /// Orders as many candidates as it needs to, and returns how many of the first reach `top_p` of the mass of all.
    fn nucleus(&mut self, top_p: f64) -> usize {
        let target = ((top_p * self.total() as f64).ceil() as u64).max(1);
        let mut mass = 0;
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
                mass += u64::from(candidate.mass);
                if mass >= target {
                    return ordered + index + 1;
                }
            }
            ordered += group_len;
            group *= 4;
        }
        self.candidates.len()
    }

    /// Of the candidates; below 2^53.
    fn total(&self) -> u64 {
        let masses = self.candidates.iter();
        masses.map(|candidate| u64::from(candidate.mass)).sum()
    }

    /// Inverse of the cumulative distribution over the candidates, in the vocabulary's order.
    fn pick(&self, random: f64) -> Result<TokenId, SampleError> {
        let total = self.total();
        // Rounding may have made all of it of a number just below 1.
        let target = ((random * total as f64) as u64).min(total.saturating_sub(1));
        let mut mass = 0;
        let chosen = self.candidates.iter().find(|candidate| {
            mass += u64::from(candidate.mass);
            mass > target
        });
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
                mass: 0,
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

/// What [`Sampler::sample`] and [`Sampler::logprobs`] do with a row, for a device that does the same; `row` keeps its room.
pub fn describe(
    params: &SamplingParams,
    history: &History,
    position: Position<'_>,
    row: &mut SampleRow,
) {
    row.random = random::uniform(params.seed, position.choice, position.position as u64);
    row.scale = scale(params);
    row.least = least(params);
    row.top_k = params.top_k;
    row.top_p = params.top_p;
    row.repetition_penalty = params.repetition_penalty;
    row.presence_penalty = params.presence_penalty;
    row.frequency_penalty = params.frequency_penalty;
    row.bias.clone_from(&params.logit_bias);
    row.masked.clear();
    if position.generated < params.min_tokens as usize {
        row.masked.extend(masked_ends(params, position.eos));
    }
    row.history.clear();
    let counts = history.counts.iter();
    row.history
        .extend(counts.map(|(token, count)| (*token, *count)));
    row.top = params.logprobs;
}

/// What may not be sampled before `min_tokens`.
fn masked_ends<'a>(
    params: &'a SamplingParams,
    eos: &'a [TokenId],
) -> impl Iterator<Item = TokenId> + 'a {
    let eos = if params.ignore_eos { &[] } else { eos };
    eos.iter().chain(&params.stop_token_ids).copied()
}

/// What logits are multiplied by; 0 is greedy.
fn scale(params: &SamplingParams) -> f32 {
    match params.temperature < TEMPERATURE_MIN {
        true => 0.0,
        false => 1.0 / params.temperature,
    }
}

/// p / p_max >= min_p, in logits: what of the largest a logit may fall short by, below 0.
fn least(params: &SamplingParams) -> f32 {
    match params.min_p > 0.0 {
        true => params.min_p.ln() * params.temperature,
        false => f32::NEG_INFINITY,
    }
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
            mass: 1 << 30,
            token,
        });
        sampler.candidates.extend(candidates);
        assert_eq!(sampler.nucleus(0.5), 500);
        let first = sampler.candidates[..500].iter().map(|c| c.token);
        assert!(first.eq(0..500));
    }

    #[test]
    fn mass_is_a_power_of_e_and_nothing_when_it_is_less_than_a_unit() {
        let one = f64::from(1u32 << 30);
        assert_eq!(mass(0.0), 1 << 30);
        let points = (0..200_000).map(|i| i as f32 * -1.1e-4);
        for x in points.chain([-f32::MIN_POSITIVE, -1e-20, -20.79, -21.4]) {
            let (want, found) = (f64::from(x).exp() * one, f64::from(mass(x)));
            assert!(
                (found - want).abs() <= 1.0 + 4e-6 * want,
                "{x}: {found} {want}"
            );
        }
        for x in [-21.5, -1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(mass(x), 0, "{x}");
        }
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
