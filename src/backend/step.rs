//! One step's ragged batch as the ops see it: rows of tokens, grouped by sequence.

use super::BackendError;
use super::ops::Heads;
use crate::types::{BLOCK_TOKENS, BlockId, GateOverride, TokenId};

/// The rows of one sequence in a step: `rows` tokens at positions `start..start + rows`.
#[derive(Clone, Copy, Debug)]
pub struct StepSequence<'a> {
    /// New tokens, at least 1.
    pub rows: usize,
    /// Position of the first; all earlier positions are in the cache.
    pub start: usize,
    /// Blocks of positions `0..start + rows`, in order.
    pub block_table: &'a [BlockId],
    /// What the request does to its gates.
    pub gates: GateOverride,
}

/// A step: the tokens of all sequences, concatenated in order.
#[derive(Clone, Copy, Debug)]
pub struct StepLayout<'a> {
    /// (n).
    pub tokens: &'a [TokenId],
    /// Their rows add up to n.
    pub sequences: &'a [StepSequence<'a>],
    /// Rows whose logits are wanted, each below n.
    pub logit_rows: &'a [usize],
}

/// The largest step that a backend must be ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// n at most.
    pub rows: usize,
    /// Rows with logits at most.
    pub logit_rows: usize,
    /// Sequences at most.
    pub sequences: usize,
    /// Positions of a sequence at most.
    pub positions: usize,
    /// Blocks in the cache.
    pub blocks: usize,
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
}

impl StepLimits {
    /// A sequence has at least one row.
    pub(super) fn sequences_in_a_step(&self) -> usize {
        self.sequences.min(self.rows)
    }

    /// Entries of all block tables.
    pub(super) fn blocks_in_a_step(&self) -> usize {
        let table = self.positions.div_ceil(BLOCK_TOKENS).min(self.blocks);
        self.sequences_in_a_step().saturating_mul(table)
    }
}

/// What all steps of a model ask of a backend at most: how much it needs beside operands follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The largest step.
    pub limits: StepLimits,
    /// Heads of attention.
    pub heads: Heads,
    /// L.
    pub layers: usize,
    /// m.
    pub mlp_width: usize,
    /// w; 0 without experts.
    pub expert_width: usize,
    /// Most inputs of a matrix of which a part is in a block format and meets x in int8; 0: there is none.
    pub quantised_inputs: usize,
}

impl StepLayout<'_> {
    /// Checks every number an op will use as an index. Each backend's `load_step` starts with it.
    pub fn check(&self, limits: &StepLimits) -> Result<(), BackendError> {
        let n = self.tokens.len();
        at_most("tokens", limits.rows, n)?;
        at_most("logit_rows", limits.logit_rows, self.logit_rows.len())?;
        at_most("sequences", limits.sequences, self.sequences.len())?;
        let rows: usize = self.sequences.iter().map(|sequence| sequence.rows).sum();
        if rows != n {
            return Err(contract(
                "sequences",
                format!("{n} rows in all"),
                rows.to_string(),
            ));
        }
        for token in self.tokens {
            below("tokens", limits.vocabulary, token.index())?;
        }
        for row in self.logit_rows {
            below("logit_rows", n, *row)?;
        }
        for sequence in self.sequences {
            let positions = sequence.start.saturating_add(sequence.rows);
            at_most("sequences.positions", limits.positions, positions)?;
            let blocks = positions.div_ceil(BLOCK_TOKENS);
            if sequence.rows == 0 || sequence.block_table.len() < blocks {
                let found = format!(
                    "{} rows, {} blocks",
                    sequence.rows,
                    sequence.block_table.len()
                );
                return Err(contract(
                    "sequences.block_table",
                    format!("at least 1 row, {blocks} blocks"),
                    found,
                ));
            }
            for block in sequence.block_table {
                below("sequences.block_table", limits.blocks, block.index())?;
            }
        }
        Ok(())
    }
}

fn contract(operand: &'static str, expected: String, found: String) -> BackendError {
    BackendError::Contract {
        op: "step",
        operand,
        expected,
        found,
    }
}

fn at_most(operand: &'static str, limit: usize, found: usize) -> Result<(), BackendError> {
    if found <= limit {
        Ok(())
    } else {
        Err(contract(
            operand,
            format!("at most {limit}"),
            found.to_string(),
        ))
    }
}

fn below(operand: &'static str, limit: usize, found: usize) -> Result<(), BackendError> {
    if found < limit {
        Ok(())
    } else {
        Err(contract(
            operand,
            format!("below {limit}"),
            found.to_string(),
        ))
    }
}

/// A step in host memory: what the backends that run here keep of a [`StepLayout`].
///
/// Invariant: what it holds passed [`StepLayout::check`], and no block is written by two sequences (they may share blocks that
/// they only read), so that threads may write K and V at once. Its vectors never grow beyond the limits they were made for.
#[derive(Debug)]
pub struct HostStep {
    limits: StepLimits,
    tokens: Vec<TokenId>,
    sequences: Vec<PlacedSequence>,
    blocks: Vec<BlockId>,
    logit_rows: Vec<usize>,
    /// Blocks that this step writes, a bit each.
    written: Vec<u64>,
}

#[derive(Debug)]
struct PlacedSequence {
    first_row: usize,
    rows: usize,
    start: usize,
    first_block: usize,
    blocks: usize,
    gates: GateOverride,
}

/// One sequence of a [`HostStep`].
#[derive(Clone, Copy, Debug)]
pub struct HostSequence<'a> {
    /// Its first row in the step's buffers.
    pub first_row: usize,
    /// Its rows.
    pub rows: usize,
    /// Position of its first row.
    pub start: usize,
    /// Blocks of positions `0..start + rows`.
    pub block_table: &'a [BlockId],
    /// Rules of its gates.
    pub gates: GateOverride,
}

impl HostSequence<'_> {
    /// Each row with its position.
    pub fn placed_rows(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (first_row, start) = (self.first_row, self.start);
        (0..self.rows).map(move |i| (first_row + i, start + i))
    }
}

impl HostStep {
    /// Room for any step within `limits`, reserved now so that loading a step allocates nothing.
    pub fn new(limits: StepLimits) -> Self {
        Self {
            limits,
            tokens: Vec::with_capacity(limits.rows),
            sequences: Vec::with_capacity(limits.sequences_in_a_step()),
            blocks: Vec::with_capacity(limits.blocks_in_a_step()),
            logit_rows: Vec::with_capacity(limits.logit_rows),
            written: vec![0; limits.blocks.div_ceil(64)],
        }
    }

    /// Bytes that it takes.
    pub fn bytes(limits: &StepLimits) -> usize {
        let numbers = limits.logit_rows + limits.blocks.div_ceil(64);
        limits.rows * size_of::<TokenId>()
            + limits.sequences_in_a_step() * size_of::<PlacedSequence>()
            + limits.blocks_in_a_step() * size_of::<BlockId>()
            + numbers * size_of::<u64>()
    }

    /// Checks `layout` and keeps it. On an error the step before stays.
    pub fn load(&mut self, layout: &StepLayout<'_>) -> Result<(), BackendError> {
        layout.check(&self.limits)?;
        self.check_writes(layout)?;
        self.tokens.clear();
        self.tokens.extend_from_slice(layout.tokens);
        self.logit_rows.clear();
        self.logit_rows.extend_from_slice(layout.logit_rows);
        self.sequences.clear();
        self.blocks.clear();
        let mut first_row = 0;
        for sequence in layout.sequences {
            let blocks = (sequence.start + sequence.rows).div_ceil(BLOCK_TOKENS);
            self.sequences.push(PlacedSequence {
                first_row,
                rows: sequence.rows,
                start: sequence.start,
                first_block: self.blocks.len(),
                blocks,
                gates: sequence.gates,
            });
            self.blocks
                .extend_from_slice(&sequence.block_table[..blocks]);
            first_row += sequence.rows;
        }
        Ok(())
    }

    /// Becomes a step of `rows` rows that belong to no sequence, with logits wanted of each: a shape without content.
    ///
    /// # Errors
    /// More than the limits have.
    pub(super) fn pad(&mut self, rows: usize) -> Result<(), BackendError> {
        at_most("tokens", self.limits.rows, rows)?;
        at_most("logit_rows", self.limits.logit_rows, rows)?;
        self.tokens.clear();
        self.tokens.resize(rows, TokenId(0));
        self.logit_rows.clear();
        self.logit_rows.extend(0..rows);
        self.sequences.clear();
        self.blocks.clear();
        Ok(())
    }

    fn check_writes(&mut self, layout: &StepLayout<'_>) -> Result<(), BackendError> {
        self.written.fill(0);
        for sequence in layout.sequences {
            let end = (sequence.start + sequence.rows).div_ceil(BLOCK_TOKENS);
            for block in &sequence.block_table[sequence.start / BLOCK_TOKENS..end] {
                let (word, bit) = (block.index() / 64, 1 << (block.index() % 64));
                if self.written[word] & bit != 0 {
                    let found = format!("block {} twice", block.index());
                    let expected = "each block written by one sequence".to_owned();
                    return Err(contract("sequences.block_table", expected, found));
                }
                self.written[word] |= bit;
            }
        }
        Ok(())
    }

    /// The limits it was made for.
    pub fn limits(&self) -> &StepLimits {
        &self.limits
    }

    /// (n).
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// n.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows whose logits are wanted.
    pub fn logit_rows(&self) -> &[usize] {
        &self.logit_rows
    }

    /// Sequences in order of their rows.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = HostSequence<'_>> {
        self.sequences.iter().map(|placed| self.resolve(placed))
    }

    /// Index of the sequence that `row` belongs to.
    pub fn sequence_of(&self, row: usize) -> usize {
        self.sequences
            .partition_point(|placed| placed.first_row <= row)
            - 1
    }

    /// The `i`-th sequence.
    pub fn sequence(&self, i: usize) -> HostSequence<'_> {
        self.resolve(&self.sequences[i])
    }

    /// One past the last position of any row: what a table of positions must cover.
    pub fn positions_end(&self) -> usize {
        let ends = self
            .sequences
            .iter()
            .map(|placed| placed.start + placed.rows);
        ends.max().unwrap_or(0)
    }

    /// One past the largest block index in use: what a cache must cover.
    pub fn blocks_end(&self) -> usize {
        let ends = self.blocks.iter().map(|block| block.index() + 1);
        ends.max().unwrap_or(0)
    }

    fn resolve(&self, placed: &PlacedSequence) -> HostSequence<'_> {
        HostSequence {
            first_row: placed.first_row,
            rows: placed.rows,
            start: placed.start,
            block_table: &self.blocks[placed.first_block..][..placed.blocks],
            gates: placed.gates,
        }
    }
}
