//! One step's ragged batch as the ops see it: rows of tokens, grouped by sequence.

use super::BackendError;
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
