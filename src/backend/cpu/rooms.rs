//! What ops need beside their operands: how much, for all steps of a model, and making it before the first.

use std::cell::Cell;

use super::super::Workload;
use super::{Scratch, attention, experts, gemm, grow, int8};
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

/// Room for what chunks leave for a later pass: made by `reserve`, or grows in the first steps.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) units: Vec<attention::Unit>,
    pub(super) parts: Vec<f32>,
    pub(super) blocks: Vec<int8::Block>,
    /// What `blocks` hold for the product that follows.
    pub(super) quantised: Cell<Option<Quantised>>,
    /// Most inputs that products meet in blocks, as `reserve` was told.
    quantised_inputs: usize,
}

/// Rows in [`Shared::blocks`].
#[derive(Clone, Copy)]
pub(super) struct Quantised {
    /// Address of the buffer they are of: compared, never followed.
    pub(super) x: usize,
    pub(super) rows: usize,
    /// Blocks in a row.
    pub(super) stride: usize,
}

impl Quantised {
    /// Their blocks, in `room`, which is made long enough.
    pub(super) fn blocks(&self, room: &mut Vec<int8::Block>) -> int8::Blocks {
        let len = int8::Blocks::room(self.rows, self.stride);
        grow(room, len, int8::Block::ZERO);
        int8::Blocks {
            start: room.as_mut_ptr(),
            len,
            stride: self.stride,
        }
    }
}

impl Shared {
    pub(super) fn reserve(&mut self, rooms: &Rooms, quantised_inputs: usize) {
        self.quantised_inputs = quantised_inputs;
        let missing = rooms.units.saturating_sub(self.units.len());
        self.units.reserve_exact(missing);
        grow(&mut self.parts, rooms.parts, 0.0);
        grow(&mut self.blocks, rooms.blocks, int8::Block::ZERO);
    }

    /// Blocks for `rows` rows of the output `x`, which the op quantises while it is in the cache. Of no length where no product will ask
    /// for them.
    pub(super) fn behind(&mut self, x: &[f32], rows: usize, width: usize) -> int8::Blocks {
        let whole = width.is_multiple_of(INT8_BLOCK) && width <= self.quantised_inputs;
        self.blocks_of(x, rows, if whole { width / INT8_BLOCK } else { 0 })
    }

    /// The same, of `stride` blocks a row.
    pub(super) fn blocks_of(&mut self, x: &[f32], rows: usize, stride: usize) -> int8::Blocks {
        let x = x.as_ptr().addr();
        let made = Quantised { x, rows, stride };
        self.quantised.set((stride > 0).then_some(made));
        made.blocks(&mut self.blocks)
    }
}
