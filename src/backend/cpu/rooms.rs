//! What ops need beside their operands: how much, for all steps of a model, and making it before the first.

use super::super::Workload;
use super::{Scratch, Shared, attention, experts, gemm, grow, int8};
use crate::backend::ops::INT8_BLOCK;

/// How long each room is.
pub(super) struct Rooms {
    threads: usize,
    heads: crate::backend::ops::Heads,
    /// Rows of E, 0 without experts.
    pub(super) expert_outputs: usize,
    units: usize,
    parts: usize,
    blocks: usize,
}

impl Rooms {
    pub(super) fn new(work: &Workload, threads: usize) -> Self {
        let limits = &work.limits;
        let expert_outputs = match work.expert_width {
            0 => 0,
            width => width + 2,
        };
        // Beyond so many chunks of rows, no thread shares one.
        let shared = match threads {
            1 => 0,
            _ => 2 * threads - 1,
        };
        let attention = attention::splits_max(limits) * attention::partial_len(work.heads);
        let rows = limits.rows.min(shared * experts::ROWS);
        let mix = rows * experts::splits(work.mlp_width) * expert_outputs;
        Self {
            threads,
            heads: work.heads,
            expert_outputs,
            units: attention::units_max(limits, work.heads),
            parts: (shared * attention).max(mix),
            blocks: int8::Blocks::room(
                limits.rows.max(limits.logit_rows),
                work.quantised_inputs / INT8_BLOCK,
            ),
        }
    }

    /// Of all of them, threads' own included.
    pub(super) fn bytes(&self) -> usize {
        let thread = size_of::<Scratch>()
            + size_of::<gemm::Scratch>()
            + attention::Scratch::bytes(self.heads)
            + experts::Scratch::bytes(self.expert_outputs);
        self.threads * thread
            + self.units * size_of::<attention::Unit>()
            + self.parts * size_of::<f32>()
            + self.blocks * size_of::<int8::Block>()
    }
}

impl Shared {
    pub(super) fn reserve(&mut self, rooms: &Rooms) {
        let missing = rooms.units.saturating_sub(self.units.len());
        self.units.reserve_exact(missing);
        grow(&mut self.parts, rooms.parts, 0.0);
        grow(&mut self.blocks, rooms.blocks, int8::Block::ZERO);
    }
}
