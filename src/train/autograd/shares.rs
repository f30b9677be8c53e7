//! A part's share of its batch, added up chunk by chunk.

use super::blocks::Blocks;
use super::llama::Keep;
use crate::train::Gradients;

/// Sums so far.
pub(super) struct Shares {
    /// Of the loss.
    pub loss: f64,
    watched: Vec<(&'static str, f64)>,
    /// Of the gradient, in blocks; empty where none is wanted.
    pub blocks: Vec<Vec<f32>>,
    keep: Keep,
}

impl Shares {
    /// Of the gradient of `blocks`, with [`Keep::For`]; `watched` names what is watched.
    pub(super) fn new(blocks: &Blocks, watched: &[&'static str], keep: Keep) -> Self {
        Self {
            loss: 0.0,
            watched: watched.iter().map(|name| (*name, 0.0)).collect(),
            blocks: match keep {
                Keep::For(_) => blocks.zeros(),
                Keep::Nothing => Vec::new(),
            },
            keep,
        }
    }

    /// Whether a pass back follows.
    pub(super) fn keep(&self) -> Keep {
        self.keep
    }

    /// Adds to what is watched as number `index`.
    pub(super) fn watch(&mut self, index: usize, share: f64) {
        if let Some((_, sum)) = self.watched.get_mut(index) {
            *sum += share;
        }
    }

    /// As the loop wants it, of the parameters of `blocks`.
    pub(super) fn finish(self, blocks: &Blocks) -> Gradients {
        Gradients {
            values: blocks.split(self.blocks),
            loss: self.loss,
            watched: self.watched,
        }
    }
}
