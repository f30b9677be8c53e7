//! Supervised training of a whole base on prompts and answers.

use std::sync::Arc;

use super::NamedTensor;
use super::base::{Positions, head, positions};
use super::batch::{Batch, Last, chunks};
use super::blocks::Blocks;
use super::llama::{Llama, PassGradients, Shape};
use super::mixture::Mixture;
use super::shares::Shares;
use super::weights::Weights;
use crate::checkpoint::{Checkpoint, LlamaConfig};
use crate::train::{Gradients, Objective, Parameter, Pass, Sequence, Totals, TrainError};
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
            blocks: Blocks::new(blocks),
            options,
        })
    }

    /// Shape and constants.
    pub fn config(&self) -> &LlamaConfig {
        &self.shape.config
    }

    /// Names, shapes and numbers, in the order of Hugging Face's state dict.
    pub fn export(&self) -> Vec<NamedTensor> {
        self.blocks.named()
    }

    /// Logits of one sequence.
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a sequence that is empty, too long or not of this vocabulary.
    pub fn positions(&self, ids: &[TokenId]) -> Result<Positions, TrainError> {
        let llama = self.llama();
        let head = head(&llama, self.blocks.blocks());
        positions(&llama, head, ids, &Mixture::Base)
    }

    fn llama(&self) -> Llama<'_> {
        Llama::new(&self.shape, self.blocks.blocks())
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
        shares: &mut Shares,
    ) -> Result<(), TrainError> {
        let mut batch = Batch::default();
        let mut ranges = Vec::with_capacity(items.len());
        for item in items {
            ranges.push(batch.push(item, self.from(item), Last::Drop, self.config())?);
        }
        let llama = self.llama();
        let head = head(&llama, self.blocks.blocks());
        let hidden = llama.forward(&batch, &Mixture::Base, shares.pass());
        let predicted = llama.predict(&batch, &hidden, head);
        let mut slopes = vec![0.0; batch.rows.len()];
        let prompt_slope = -f64::from(self.options.prompt_weight) / totals.weight;
        for (item, range) in items.iter().zip(ranges) {
            let answer = range.end - (item.ids.len() - item.answer);
            let hits = predicted.tokens.hits.get(answer..range.end);
            let accuracy = accuracy(hits.unwrap_or_default());
            shares.watch(0, accuracy / totals.items as f64);
            for (rows, slope) in [
                (range.start..answer, prompt_slope),
                (answer..range.end, -1.0 / totals.weight),
            ] {
                if let Some(slopes) = slopes.get_mut(rows) {
                    slopes.fill(slope);
                }
            }
        }
        let terms = predicted.tokens.log_probs.iter().zip(&slopes);
        shares.loss += terms.map(|(x, slope)| f64::from(*x) * slope).sum::<f64>();
        if shares.pass() == Pass::Forward {
            return Ok(());
        }
        let slopes: Vec<f32> = slopes.into_iter().map(|slope| slope as f32).collect();
        let norm = (Llama::count(self.config()) - 1).min(shares.blocks.len());
        let (trunk, rest) = shares.blocks.split_at_mut(norm);
        let (dnorm, dhead) = rest.split_first_mut().unzip();
        let dhead = dhead.and_then(<[_]>::first_mut).or(trunk.first_mut());
        let dx = llama.predict_backward(
            predicted,
            &hidden,
            head,
            &slopes,
            dhead.map(Vec::as_mut_slice),
            dnorm.map(Vec::as_mut_slice),
        );
        let gradients = PassGradients {
            trunk: Some(trunk),
            mixture: &mut [],
            gate_slopes: [0.0; 2],
        };
        llama.backward(&batch, hidden, &Mixture::Base, dx, gradients);
        Ok(())
    }
}

/// Share of the tokens that the model holds most likely.
fn accuracy(hits: &[bool]) -> f64 {
    let right = hits.iter().filter(|hit| **hit).count();
    right as f64 / hits.len().max(1) as f64
}

impl Objective for Sft {
    type Item = Sequence;

    fn parameters(&self) -> &[Parameter] {
        self.blocks.parameters()
    }

    fn values(&self) -> Result<Vec<Vec<f32>>, TrainError> {
        Ok(self.blocks.values())
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

    fn shares(
        &self,
        items: &[&Sequence],
        totals: Totals,
        pass: Pass,
    ) -> Result<Gradients, TrainError> {
        let mut shares = Shares::new(&self.blocks, &WATCHED, pass);
        for chunk in chunks(items, |item| item.ids.len()) {
            self.run(chunk, totals, &mut shares)?;
        }
        Ok(shares.finish(&self.blocks))
    }
}
