//! A planned step, flattened as the model wants it.

use super::scheduler::{Plan, Scheduler};
use crate::backend::StepSequence;
use crate::types::TokenId;

/// The step's tokens and the rows whose logits are wanted. Kept between steps for its room.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// (n).
    pub tokens: Vec<TokenId>,
    /// Rows, each below n.
    pub logit_rows: Vec<usize>,
}

impl Batch {
    /// Flattens `plan`; returns the sequences, in the order of their rows.
    pub(super) fn fill<'a>(
        &mut self,
        plan: &Plan,
        scheduler: &'a Scheduler,
    ) -> Vec<StepSequence<'a>> {
        self.tokens.clear();
        self.logit_rows.clear();
        let mut sequences = Vec::with_capacity(plan.sequences.len());
        for planned in &plan.sequences {
            let Some(sequence) = scheduler.sequence(planned.id) else {
                unreachable!("planned sequences are alive");
            };
            let row = self.tokens.len();
            let rows = planned.start..planned.start + planned.rows;
            self.tokens.extend_from_slice(&sequence.tokens()[rows]);
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
}
