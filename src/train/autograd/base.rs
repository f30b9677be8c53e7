//! The frozen base: shared by all that is trained on top of it, and pi_ref itself.

use std::sync::Arc;

use candle_core::Tensor;

use super::batch::{Batch, Last};
use super::llama::{Hidden, Llama, Mixture, Shape};
use super::ops::{linear, read};
use super::preference::{self, PairBatch};
use super::weights::Weights;
use crate::checkpoint::{Checkpoint, LlamaConfig};
use crate::train::{Pair, Sequence, TrainError};
use crate::types::TokenId;

/// A base of which nothing is trained.
pub struct Base {
    pub(super) llama: Llama,
    /// (vocabulary, d).
    pub(super) head: Tensor,
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
        let blocks = weights.trunk(&shape.config)?;
        let tensors: Result<Vec<Tensor>, TrainError> =
            blocks.into_iter().map(|block| block.frozen()).collect();
        let llama = Llama::take(&shape, &mut tensors?.into_iter()).ok_or_else(incomplete)?;
        let head = match weights.head(&shape.config)? {
            Some(head) => head.frozen()?,
            None => llama.embedding.clone(),
        };
        Ok(Arc::new(Self { llama, head }))
    }

    /// Shape and constants.
    pub fn config(&self) -> &LlamaConfig {
        &self.llama.shape.config
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
        mixture: &Mixture,
    ) -> Result<Positions, TrainError> {
        positions(&self.llama, &self.head, ids, mixture)
    }

    /// Summed log-probabilities of (better, worse) of each pair under pi_ref.
    ///
    /// # Errors
    /// As [`Base::positions`].
    pub fn reference_logps(&self, pairs: &[&Pair]) -> Result<Vec<(f32, f32)>, TrainError> {
        let mut sums = Vec::with_capacity(pairs.len());
        // A pair at a time: it runs once, and memory stays that of one.
        for pair in pairs {
            let batch =
                PairBatch::new(&[pair], preference::Anchor::None, Last::Drop, self.config())?;
            let log_probs = self.log_probs(batch.batch, &Mixture::Base)?;
            let sums_of = batch.spans.iter().map(|span| span.sums(&log_probs));
            sums.extend(sums_of.map(|(better, worse)| (better as f32, worse as f32)));
        }
        Ok(sums)
    }

    /// log p of each of the batch's targets, without a graph unless the mixture is trained.
    pub(super) fn log_probs(
        &self,
        batch: Batch,
        mixture: &Mixture,
    ) -> Result<Vec<f32>, TrainError> {
        let hidden = self.forward(&batch, mixture)?;
        let log_probs = batch.log_probs(&self.llama, &self.head, &hidden, None)?;
        Ok(read(&log_probs, <[f32]>::to_vec)?)
    }

    /// The trunk with experts.
    pub(super) fn forward(&self, batch: &Batch, mixture: &Mixture) -> Result<Hidden, TrainError> {
        Ok(self.llama.forward(&batch.ids, &batch.lengths, mixture)?)
    }
}

/// Logits and gates of one sequence at every position.
pub(super) fn positions(
    llama: &Llama,
    head: &Tensor,
    ids: &[TokenId],
    mixture: &Mixture,
) -> Result<Positions, TrainError> {
    let sequence = Sequence {
        ids: ids.to_vec(),
        answer: 1,
    };
    let mut batch = Batch::default();
    batch.push(&sequence, ids.len(), Last::Keep, &llama.shape.config)?;
    let hidden = llama.forward(&batch.ids, &batch.lengths, mixture)?;
    let x = llama.normed_rows(&hidden.x, (0..ids.len()).collect())?;
    let logits = read(&linear(&x, head)?, <[f32]>::to_vec)?;
    let mut gates = vec![0.0; ids.len() * 2 * hidden.gates.len()];
    let width = (2 * hidden.gates.len()).max(1);
    for (layer, layer_gates) in hidden.gates.iter().enumerate() {
        read(layer_gates, |values| {
            for (row, pair) in gates.chunks_exact_mut(width).zip(values.chunks_exact(2)) {
                for (gate, value) in row.iter_mut().skip(2 * layer).zip(pair) {
                    *gate = *value;
                }
            }
        })?;
    }
    Ok(Positions { logits, gates })
}

/// Cannot happen: the blocks of a trunk were made for its configuration.
pub(super) fn incomplete() -> TrainError {
    TrainError::Engine("expected all tensors of a trunk".to_owned())
}
