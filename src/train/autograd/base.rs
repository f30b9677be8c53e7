//! The frozen base: shared by all that is trained on top of it, and pi_ref itself.

use std::sync::Arc;

use super::batch::{Batch, Last};
use super::blocks::Blocks;
use super::llama::{Llama, Shape, rows_of};
use super::mixture::Mixture;
use super::ops::linear;
use super::preference::{Anchor, PairBatch};
use super::weights::Weights;
use crate::checkpoint::{Checkpoint, LlamaConfig};
use crate::train::{Pair, Pass, Sequence, TrainError};
use crate::types::TokenId;

/// A base of which nothing is trained.
pub struct Base {
    shape: Arc<Shape>,
    /// The trunk and, where it is not the embedding, the head.
    blocks: Blocks,
}

/// What a forward pass over one sequence gives at every position.
#[derive(Clone, Debug, PartialEq)]
pub struct Positions {
    /// (positions, vocabulary).
    pub logits: Vec<f32>,
    /// (positions, 2 L): alpha and beta of each layer, as serving shows them; empty without a router.
    pub gates: Vec<f32>,
}

impl Base {
    /// The base of a checkpoint of any format, widened to f32.
    ///
    /// # Errors
    /// [`TrainError`] where tensors are not of the configuration's shapes.
    pub fn new(checkpoint: &Checkpoint) -> Result<Arc<Self>, TrainError> {
        let shape = Shape::new(checkpoint.config.clone());
        let weights = Weights::of(checkpoint);
        let mut blocks = weights.trunk(&shape.config)?;
        blocks.extend(weights.head(&shape.config)?);
        Ok(Arc::new(Self {
            shape,
            blocks: Blocks::new(blocks),
        }))
    }

    /// Its trunk.
    pub(super) fn llama(&self) -> Llama<'_> {
        Llama::new(&self.shape, self.blocks.blocks())
    }

    /// (vocabulary, d).
    pub(super) fn head(&self) -> &[f32] {
        head(&self.llama(), self.blocks.blocks())
    }

    /// Shape and constants.
    pub fn config(&self) -> &LlamaConfig {
        &self.shape.config
    }

    /// Logits of one sequence.
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a sequence that is empty, too long or not of this vocabulary.
    pub fn positions(&self, ids: &[TokenId]) -> Result<Positions, TrainError> {
        self.positions_of(ids, &Mixture::Base)
    }

    /// As [`Base::positions`], with experts.
    pub(super) fn positions_of(
        &self,
        ids: &[TokenId],
        mixture: &Mixture<'_>,
    ) -> Result<Positions, TrainError> {
        positions(&self.llama(), self.head(), ids, mixture)
    }

    /// Summed log-probabilities of (better, worse) of each pair under pi_ref.
    ///
    /// # Errors
    /// As [`Base::positions`].
    pub fn reference_logps(&self, pairs: &[&Pair]) -> Result<Vec<(f32, f32)>, TrainError> {
        let mut sums = Vec::with_capacity(pairs.len());
        // A pair at a time: it runs once, and memory stays that of one.
        for pair in pairs {
            let batch = PairBatch::new(&[pair], Anchor::None, Last::Drop, self.config())?;
            let log_probs = self.log_probs(&batch.batch, &Mixture::Base);
            let sums_of = batch.spans.iter().map(|span| span.sums(&log_probs));
            sums.extend(sums_of.map(|(better, worse)| (better as f32, worse as f32)));
        }
        Ok(sums)
    }

    /// log p of each of the batch's targets.
    pub(super) fn log_probs(&self, batch: &Batch, mixture: &Mixture<'_>) -> Vec<f32> {
        let llama = self.llama();
        let hidden = llama.forward(batch, mixture, Pass::Forward);
        llama.predict(batch, &hidden, self.head()).tokens.log_probs
    }
}

/// What follows the trunk's blocks; else the embedding.
pub(super) fn head<'a>(llama: &Llama<'a>, blocks: &'a [Vec<f32>]) -> &'a [f32] {
    let head = blocks.get(Llama::count(&llama.shape.config));
    head.map_or(llama.embedding(), |head| head)
}

/// Logits and gates of one sequence at every position.
pub(super) fn positions(
    llama: &Llama<'_>,
    head: &[f32],
    ids: &[TokenId],
    mixture: &Mixture<'_>,
) -> Result<Positions, TrainError> {
    let sequence = Sequence {
        ids: ids.to_vec(),
        answer: 1,
    };
    let mut batch = Batch::default();
    batch.push(&sequence, ids.len(), Last::Keep, &llama.shape.config)?;
    let hidden = llama.forward(&batch, mixture, Pass::Forward);
    let d = llama.shape.config.hidden_size;
    let rows: Vec<usize> = (0..ids.len()).collect();
    let x = llama.norm().forward(&rows_of(&hidden.x, d, &rows));
    let layers = hidden.gates.len();
    let mut gates = vec![0.0; ids.len() * 2 * layers];
    for (layer, values) in hidden.gates.iter().enumerate() {
        let rows = gates.chunks_exact_mut((2 * layers).max(1));
        for (row, pair) in rows.zip(values.chunks_exact(2)) {
            for (gate, value) in row.iter_mut().skip(2 * layer).zip(pair) {
                *gate = *value;
            }
        }
    }
    Ok(Positions {
        logits: linear(&x, head, d),
        gates,
    })
}
