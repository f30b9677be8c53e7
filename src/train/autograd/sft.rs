//! Supervised training of a whole base on prompts and answers.

use std::sync::Arc;

use candle_core::Tensor;

use super::base::{Positions, incomplete, positions};
use super::batch::{Batch, Last, in_chunks};
use super::blocks::Blocks;
use super::llama::{Llama, Mixture, Shape};
use super::ops::{Hits, read};
use super::weights::Weights;
use super::{NamedTensor, weighted_sum};
use crate::checkpoint::{Checkpoint, LlamaConfig};
use crate::train::{Gradients, Objective, Parameter, Sequence, Totals, TrainError};
use crate::types::TokenId;

/// What counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SftOptions {
    /// Weight of a prompt's tokens; an answer's weigh 1. From 0 to 1.
    pub prompt_weight: f32,
}

/// Trains all weights of a base. Loss: -log p per token, a weighted mean over the batch.
///
/// Watched: `accuracy`, the share of an answer's tokens that the model holds most likely, a mean over sequences.
pub struct Sft {
    shape: Arc<Shape>,
    blocks: Blocks,
    options: SftOptions,
}

const WATCHED: [&str; 1] = ["accuracy"];

impl Sft {
    /// Goes on from a base.
    ///
    /// # Errors
    /// [`TrainError`] where tensors are not of the configuration's shapes.
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        options: SftOptions,
    ) -> Result<Self, TrainError> {
        let weights = Weights::of(checkpoint);
        Self::new(checkpoint.config.clone(), &weights, options)
    }

    /// Starts from random weights: normal with standard deviation .02, `o_proj` and `down_proj` 1 / sqrt(2 L) of it, norms 1.
    ///
    /// # Errors
    /// [`TrainError::Engine`] where the engine fails.
    pub fn random(config: LlamaConfig, seed: u64, options: SftOptions) -> Result<Self, TrainError> {
        let layers = config.num_layers;
        Self::new(config, &Weights::Random { seed, layers }, options)
    }

    fn new(
        config: LlamaConfig,
        weights: &Weights<'_>,
        options: SftOptions,
    ) -> Result<Self, TrainError> {
        let mut blocks = weights.trunk(&config)?;
        blocks.extend(weights.head(&config)?);
        Ok(Self {
            shape: Shape::new(config),
            blocks: Blocks::new(blocks)?,
            options,
        })
    }

    /// Shape and constants.
    pub fn config(&self) -> &LlamaConfig {
        &self.shape.config
    }

    /// Names, shapes and numbers, in the order of Hugging Face's state dict.
    ///
    /// # Errors
    /// [`TrainError::Engine`] where the engine fails.
    pub fn export(&self) -> Result<Vec<NamedTensor>, TrainError> {
        let values = self.blocks.values()?.into_iter();
        let named = self.blocks.parameters().iter().zip(values);
        Ok(named
            .map(|(parameter, values)| (parameter.name.clone(), parameter.shape.clone(), values))
            .collect())
    }

    /// Logits of one sequence.
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a sequence that is empty, too long or not of this vocabulary.
    pub fn positions(&self, ids: &[TokenId]) -> Result<Positions, TrainError> {
        let (llama, head) = self.model(false)?;
        positions(&llama, &head, ids, &Mixture::Base)
    }

    /// Trunk and head.
    fn model(&self, tracked: bool) -> Result<(Llama, Tensor), TrainError> {
        let mut tensors = self.blocks.tensors(tracked).into_iter();
        let llama = Llama::take(&self.shape, &mut tensors).ok_or_else(incomplete)?;
        let head = tensors.next().unwrap_or_else(|| llama.embedding.clone());
        Ok((llama, head))
    }

    /// First position that is predicted.
    fn from(&self, sequence: &Sequence) -> usize {
        if self.options.prompt_weight > 0.0 {
            1
        } else {
            sequence.answer
        }
    }

    fn run(
        &self,
        items: &[&Sequence],
        totals: Totals,
        tracked: bool,
    ) -> Result<Gradients, TrainError> {
        let (llama, head) = self.model(tracked)?;
        let mut batch = Batch::default();
        let mut ranges = Vec::with_capacity(items.len());
        for item in items {
            ranges.push(batch.push(item, self.from(item), Last::Drop, self.config())?);
        }
        let hidden = llama.forward(&batch.ids, &batch.lengths, &Mixture::Base)?;
        let hits = Hits::default();
        let log_probs = batch.log_probs(&llama, &head, &hidden, Some(hits.clone()))?;
        let hits = hits.take();
        let mut slopes = vec![0.0; hits.len()];
        let mut accuracy = 0.0;
        for (item, range) in items.iter().zip(ranges) {
            let answer = range.end - (item.ids.len() - item.answer);
            let prompt = slopes.get_mut(range.start..answer).unwrap_or_default();
            prompt.fill(-f64::from(self.options.prompt_weight) / totals.weight);
            let answer_slopes = slopes.get_mut(answer..range.end).unwrap_or_default();
            answer_slopes.fill(-1.0 / totals.weight);
            let hits = hits.get(answer..range.end).unwrap_or_default();
            let right = hits.iter().filter(|hit| **hit).count();
            accuracy += right as f64 / hits.len().max(1) as f64;
        }
        let loss = read(&log_probs, |log_probs| {
            let terms = log_probs.iter().zip(&slopes);
            terms.map(|(x, slope)| f64::from(*x) * slope).sum::<f64>()
        })?;
        let values = if tracked {
            let store = weighted_sum(&log_probs, &slopes)?.backward()?;
            self.blocks.gradients(&store)?
        } else {
            Vec::new()
        };
        let watched = vec![(WATCHED[0], accuracy / totals.items as f64)];
        Ok(Gradients {
            values,
            loss,
            watched,
        })
    }

    fn shares(
        &self,
        items: &[&Sequence],
        batch: Totals,
        tracked: bool,
    ) -> Result<Gradients, TrainError> {
        in_chunks(
            items,
            &WATCHED,
            |item| item.ids.len(),
            |chunk| self.run(chunk, batch, tracked),
        )
    }
}

impl Objective for Sft {
    type Item = Sequence;

    fn parameters(&self) -> &[Parameter] {
        self.blocks.parameters()
    }

    fn values(&self) -> Result<Vec<Vec<f32>>, TrainError> {
        self.blocks.values()
    }

    fn set_values(&mut self, values: &[Vec<f32>]) -> Result<(), TrainError> {
        self.blocks.set_values(values)
    }

    fn totals(&self, item: &Sequence) -> Totals {
        let answer = item.ids.len().saturating_sub(item.answer);
        let prompt = item.answer.saturating_sub(1);
        Totals {
            items: 1,
            tokens: item.ids.len(),
            weight: answer as f64 + f64::from(self.options.prompt_weight) * prompt as f64,
        }
    }

    fn gradients(&self, items: &[&Sequence], batch: Totals) -> Result<Gradients, TrainError> {
        self.shares(items, batch, true)
    }

    fn evaluate(&self, items: &[&Sequence], batch: Totals) -> Result<Gradients, TrainError> {
        self.shares(items, batch, false)
    }
}
