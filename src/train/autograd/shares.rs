//! A part's share of its batch, added up chunk by chunk.

use super::blocks::Blocks;
use crate::train::{Gradients, Pass};

/// Sums so far.
pub(super) struct Shares {
    /// Of the loss.
    pub loss: f64,
    watched: Vec<(&'static str, f64)>,
    /// Of the gradient, in blocks; empty where none is wanted.
    pub blocks: Vec<Vec<f32>>,
    pass: Pass,
}

impl Shares {
    /// Of the gradient of `blocks`, with [`Pass::Back`]; `watched` names what is watched.
    pub(super) fn new(blocks: &Blocks, watched: &[&'static str], pass: Pass) -> Self {
        Self {
            loss: 0.0,
            watched: watched.iter().map(|name| (*name, 0.0)).collect(),
            blocks: match pass {
                Pass::Back(_) => blocks.zeros(),
                Pass::Forward => Vec::new(),
            },
            pass,
        }
    }

    /// How far it goes.
    pub(super) fn pass(&self) -> Pass {
        self.pass
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
