//! A planned step, flattened as the model wants it.

use super::scheduler::{Plan, Scheduler};
use crate::backend::{SampleRow, StepSequence};
use crate::types::TokenId;

/// The step's tokens and the rows whose logits are wanted. Kept between steps for its room: a step of a known size allocates
/// nothing.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// (n).
    pub tokens: Vec<TokenId>,
    /// Rows, each below n.
    pub logit_rows: Vec<usize>,
    /// How to sample from each of them; its first [`Self::samples`] count.
    rows: Vec<SampleRow>,
    samples: usize,
    /// Empty: only the room of the last step's list.
    room: Vec<StepSequence<'static>>,
}

impl Batch {
    /// Flattens `plan`; returns the sequences, in the order of their rows, for [`Self::keep_room`] to take back.
    pub(super) fn fill<'a>(
        &mut self,
        plan: &Plan,
        scheduler: &'a Scheduler,
    ) -> Vec<StepSequence<'a>> {
        self.tokens.clear();
        self.logit_rows.clear();
        let mut sequences = emptied(std::mem::take(&mut self.room));
        for planned in &plan.sequences {
            let Some(sequence) = scheduler.sequence(planned.id) else {
                unreachable!("planned sequences are alive");
            };
            let row = self.tokens.len();
            let rows = planned.start..planned.start + planned.rows - planned.drafts;
            self.tokens.extend_from_slice(&sequence.tokens()[rows]);
            self.tokens
                .extend_from_slice(&sequence.drafted()[..planned.drafts]);
            let logits = row + planned.logits_from;
            self.logit_rows.extend(logits..logits + planned.logit_rows);
            sequences.push(StepSequence {
                rows: planned.rows,
                start: planned.start,
                block_table: sequence.blocks(),
                gates: sequence.gates(),
            });
        }
        sequences
    }

    /// How to sample from each of the logit rows, where the device is to do it; else empty.
    pub(super) fn samples(&self) -> &[SampleRow] {
        &self.rows[..self.samples]
    }

    /// Forgets how to sample.
    pub(super) fn clear_samples(&mut self) {
        self.samples = 0;
    }

    /// One more row to fill in.
    pub(super) fn push_sample(&mut self) -> &mut SampleRow {
        if self.samples == self.rows.len() {
            self.rows.push(SampleRow::default());
        }
        self.samples += 1;
        &mut self.rows[self.samples - 1]
    }

    /// Takes the room of a list that is no longer needed.
    pub(super) fn keep_room(&mut self, room: Vec<StepSequence<'static>>) {
        self.room = room;
    }
}

/// The room of `list`, for sequences that live otherwise: collected from a vector of the same layout, it is the same memory.
pub(super) fn emptied<'to>(mut list: Vec<StepSequence<'_>>) -> Vec<StepSequence<'to>> {
    list.clear();
    let none = |_: StepSequence<'_>| -> StepSequence<'to> { unreachable!("the list is empty") };
    list.into_iter().map(none).collect()
}
