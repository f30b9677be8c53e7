//! Sampling on a device: what it must know of a row of logits, and what comes back. What it means: `engine/sampler.rs`.

use crate::types::TokenId;

/// What a row of logits is sampled with. Tokens that the vocabulary lacks are ignored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleRow {
    /// In [0, 1): picks from what the rest leaves.
    pub random: f64,
    /// 1 / temperature; 0 takes the most likely token.
    pub scale: f32,
    /// What of the largest logit a token may fall short by, below 0; -inf: by anything.
    pub least: f32,
    /// Keeps the k most likely; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest most likely that have this share of the probability; 1 keeps all.
    pub top_p: f32,
    /// Divides positive and multiplies other logits of `history`.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of `history` that were generated.
    pub presence_penalty: f32,
    /// Subtracted as often as they were.
    pub frequency_penalty: f32,
    /// Added first; no token twice.
    pub bias: Vec<(TokenId, f32)>,
    /// Ruled out.
    pub masked: Vec<TokenId>,
    /// How often each token of prompt and answer was generated; no token twice.
    pub history: Vec<(TokenId, u32)>,
    /// A grammar's: bit t % 32 of word t / 32 allows token t. `None` allows all.
    pub allowed: Option<Vec<u32>>,
    /// Log-probability of the token, and so many of the most likely, of the row as it came; `None`: neither.
    pub top: Option<u32>,
}

/// Why a row could not be sampled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleFault {
    /// A NaN or +inf.
    NotFinite,
    /// Every token is ruled out.
    NoToken,
}

/// What was sampled, a row after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// (rows).
    pub tokens: Vec<Result<TokenId, SampleFault>>,
    /// (rows): the token's log-probability where it was asked for.
    pub logprobs: Vec<Option<f32>>,
    /// (rows): the most likely and their log-probabilities, as many as were asked for.
    pub top: Vec<Vec<(TokenId, f32)>>,
}
