//! What is trained on: token ids, and which of them count.

use crate::types::TokenId;

/// A prompt and its answer, as the model will be served with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Prompt through the chat template, answer, end of sequence. Not padded, at most as long as the model's context.
    pub ids: Vec<TokenId>,
    /// Where the answer starts: `ids[answer..]` is the answer and its end of sequence. At least 1.
    pub answer: usize,
}

/// Two answers to one prompt, of which one is preferred.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// y_w.
    pub better: Sequence,
    /// y_l.
    pub worse: Sequence,
    /// First position in which the two differ; log-probabilities are summed from here to each one's end (MIDPO.md 3). At least 1.
    pub first_difference: usize,
    /// The clamped margin as it is added to beta_DPO * Delta: min(0, C(y_w) - C(y_l)) or -max(0, R(y_w) - R(y_l)); 0 is plain DPO.
    pub margin: f32,
    /// Summed log-probability of (better, worse) under pi_ref, once it has been computed.
    pub reference: Option<(f32, f32)>,
    /// Where it came from, for messages: line of the data file, from 1.
    pub line: usize,
}

/// Two answers to one prompt, for a score model.
#[derive(Clone, Debug, PartialEq)]
pub struct ScorePair {
    /// Of a reward model the better answer, of a cost model the safer one.
    pub better: Sequence,
    /// The other.
    pub worse: Sequence,
    /// Whether `better` is said to be safe; `None`: no label, or a reward model.
    pub better_safe: Option<bool>,
    /// Whether `worse` is said to be safe.
    pub worse_safe: Option<bool>,
}
