//! Sequences laid end to end, and which of their tokens' log-probabilities are wanted.

use std::ops::Range;

use crate::checkpoint::LlamaConfig;
use crate::train::{Sequence, TrainError};

/// Most tokens of one pass (one item may have more). A larger part of a batch is computed in several: what a layer's activations
/// need stays within the cache of a core, and memory does not grow with the batch.
pub(super) const CHUNK_TOKENS: usize = 1024;

/// Sequences, and the tokens of them that are predicted. The token at position p is predicted by the row of p - 1.
#[derive(Default)]
pub(super) struct Batch {
    /// All sequences.
    pub ids: Vec<usize>,
    /// Tokens of each.
    pub lengths: Vec<usize>,
    /// Rows that predict.
    pub rows: Vec<usize>,
    /// What each of them predicts.
    pub targets: Vec<usize>,
}

/// Whether the last token of a sequence, which predicts nothing, is computed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    /// Its gates count.
    Keep,
    /// Nobody looks at it.
    Drop,
}

impl Batch {
    /// Adds a sequence of which the tokens from position `from` on are predicted. Returns their range in `rows`.
    ///
    /// # Errors
    /// For a sequence that is empty or too long, whose answer starts outside it, or with a token outside the vocabulary.
    pub(super) fn push(
        &mut self,
        sequence: &Sequence,
        from: usize,
        last: Last,
        config: &LlamaConfig,
    ) -> Result<Range<usize>, TrainError> {
        check(sequence, config)?;
        let start = self.ids.len();
        let kept = match last {
            Last::Keep => sequence.ids.len(),
            Last::Drop => sequence.ids.len() - 1,
        };
        let ids = sequence.ids.iter().map(|id| id.index());
        self.ids.extend(ids.clone().take(kept));
        self.lengths.push(kept);
        let first = self.rows.len();
        let from = from.max(1);
        self.targets.extend(ids.skip(from));
        self.rows
            .extend((from..sequence.ids.len()).map(|position| start + position - 1));
        Ok(first..self.rows.len())
    }
}

/// What a forward pass relies on.
pub(super) fn check(sequence: &Sequence, config: &LlamaConfig) -> Result<(), TrainError> {
    let length = sequence.ids.len();
    let positions = config.max_position_embeddings;
    let reason = if length == 0 || length > positions {
        format!("a sequence of {length} tokens: expected 1 to {positions}")
    } else if !(1..=length).contains(&sequence.answer) {
        let answer = sequence.answer;
        format!("an answer from token {answer} on: expected from 1 to {length}")
    } else if let Some(id) = sequence
        .ids
        .iter()
        .find(|id| id.index() >= config.vocab_size)
    {
        format!("token {}: expected one below {}", id.0, config.vocab_size)
    } else {
        return Ok(());
    };
    Err(TrainError::Engine(reason))
}

/// Splits `items` where about [`CHUNK_TOKENS`] tokens are full, at least one item each.
pub(super) fn chunks<'a, T>(
    items: &'a [&'a T],
    tokens: impl Fn(&T) -> usize,
) -> impl Iterator<Item = &'a [&'a T]> {
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let fits = rest.iter().take_while(|item| {
            sum += tokens(item);
            sum <= CHUNK_TOKENS
        });
        let count = fits.count().max(1).min(rest.len());
        let (chunk, others) = rest.split_at(count);
        rest = others;
        (count > 0).then_some(chunk)
    })
}
