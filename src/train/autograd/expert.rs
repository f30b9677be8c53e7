//! One expert: SPE-DPO of a LoRA on every layer's `mlp.down_proj` (MIDPO.md 3).

use std::sync::Arc;

use super::base::{Base, Positions};
use super::batch::{Last, chunks};
use super::blocks::{Block, Blocks, check_one};
use super::llama::PassGradients;
use super::mixture::Mixture;
use super::preference::{Anchor, BETA_DPO, Loss, PairBatch};
use super::shares::Shares;
use super::weights::{matrix, name_hash};
use crate::checkpoint;
use crate::random::SplitMix64;
use crate::train::{Gradients, Objective, Pair, Parameter, Pass, Totals, TrainError};
use crate::types::TokenId;

/// How an expert is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertOptions {
    /// r.
    pub rank: usize,
    /// lora_alpha: s = alpha / r.
    pub alpha: f32,
    /// beta_DPO.
    pub beta_dpo: f32,
    /// Weight of -log p(y_w), a mean over the answer's tokens; 0 is the paper's loss.
    pub anchor: f32,
    /// Of A's start.
    pub seed: u64,
}

impl Default for ExpertOptions {
    /// The authors'.
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            beta_dpo: BETA_DPO,
            anchor: 0.0,
            seed: 42,
        }
    }
}

/// Trains an expert on a frozen base. Loss: -log sigmoid(beta_DPO * Delta + margin), a mean over pairs.
///
/// Watched, means over pairs: `delta`, `margin`, and `accuracy`, how often Delta > 0.
pub struct Expert {
    base: Arc<Base>,
    blocks: Blocks,
    scale: f32,
    options: ExpertOptions,
}

const WATCHED: [&str; 3] = ["delta", "margin", "accuracy"];

impl Expert {
    /// A new one: A is uniform in ±1 / sqrt(m) (PEFT's start), B is 0, so that it changes nothing yet.
    ///
    /// # Errors
    /// [`TrainError::Engine`] where the engine fails.
    pub fn new(base: Arc<Base>, options: ExpertOptions) -> Result<Self, TrainError> {
        let m = base.config().intermediate_size;
        let d = base.config().hidden_size;
        let layers = (0..base.config().num_layers).map(|layer| {
            let mut stream = SplitMix64::new(options.seed, name_hash(&name(layer, "lora_A")));
            let bound = 1.0 / (m as f64).sqrt();
            let mut uniform = || ((2.0 * stream.unit() - 1.0) * bound) as f32;
            let lora_a = (0..options.rank * m).map(|_| uniform()).collect();
            let lora_b = vec![0.0; d * options.rank];
            checkpoint::ExpertLayer { lora_a, lora_b }
        });
        let expert = checkpoint::Expert {
            rank: options.rank,
            scale: options.alpha / options.rank.max(1) as f32,
            layers: layers.collect(),
        };
        Self::from_tensors(base, &expert, options)
    }

    /// Goes on from a trained one, whose rank and scale hold instead of those of `options`.
    ///
    /// # Errors
    /// [`TrainError::Shape`] where it is another base's.
    pub fn from_tensors(
        base: Arc<Base>,
        expert: &checkpoint::Expert,
        options: ExpertOptions,
    ) -> Result<Self, TrainError> {
        let (d, m) = (base.config().hidden_size, base.config().intermediate_size);
        if expert.layers.len() != base.config().num_layers {
            return Err(TrainError::Shape {
                name: "layers of the expert".to_owned(),
                expected: base.config().num_layers,
                found: expert.layers.len(),
            });
        }
        let mut blocks = Vec::new();
        for (index, layer) in expert.layers.iter().enumerate() {
            for (parameter, values) in [
                (
                    matrix(&name(index, "lora_A"), expert.rank, m),
                    &layer.lora_a,
                ),
                (
                    matrix(&name(index, "lora_B"), d, expert.rank),
                    &layer.lora_b,
                ),
            ] {
                check_one(&parameter, values)?;
                blocks.push(Block {
                    values: values.clone(),
                    parts: vec![parameter],
                });
            }
        }
        Ok(Self {
            base,
            blocks: Blocks::new(blocks),
            scale: expert.scale,
            options: ExpertOptions {
                rank: expert.rank,
                ..options
            },
        })
    }

    /// As serving takes it.
    pub fn export(&self) -> checkpoint::Expert {
        let mut values = self.blocks.values().into_iter();
        let mut layers = Vec::new();
        while let (Some(lora_a), Some(lora_b)) = (values.next(), values.next()) {
            layers.push(checkpoint::ExpertLayer { lora_a, lora_b });
        }
        checkpoint::Expert {
            rank: self.options.rank,
            scale: self.scale,
            layers,
        }
    }

    /// Summed log-probabilities of (better, worse) of each pair under pi_ref, the base: for [`Pair::reference`].
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a pair that is too long or not of this vocabulary.
    pub fn reference_logps(&self, pairs: &[&Pair]) -> Result<Vec<(f32, f32)>, TrainError> {
        self.base.reference_logps(pairs)
    }

    /// Logits of one sequence under the expert.
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a sequence that is empty, too long or not of this vocabulary.
    pub fn positions(&self, ids: &[TokenId]) -> Result<Positions, TrainError> {
        self.base.positions_of(ids, &self.mixture())
    }

    fn mixture(&self) -> Mixture<'_> {
        Mixture::Expert {
            blocks: self.blocks.blocks(),
            rank: self.options.rank,
            scale: self.scale,
        }
    }

    fn run(&self, pairs: &[&Pair], totals: Totals, shares: &mut Shares) -> Result<(), TrainError> {
        let references = references(&self.base, pairs)?;
        let anchor = if self.options.anchor > 0.0 {
            Anchor::Answer
        } else {
            Anchor::None
        };
        let PairBatch { batch, spans } =
            PairBatch::new(pairs, anchor, Last::Drop, self.base.config())?;
        let (llama, head, mixture) = (self.base.llama(), self.base.head(), self.mixture());
        let hidden = llama.forward(&batch, &mixture, shares.pass());
        let predicted = llama.predict(&batch, &hidden, head);
        let loss = Loss {
            beta_dpo: f64::from(self.options.beta_dpo),
            anchor: f64::from(self.options.anchor),
        };
        let margins = pairs.iter().map(|pair| pair.margin);
        let margin: f64 = margins.clone().map(f64::from).sum();
        let sums = loss.of(&predicted.tokens.log_probs, &spans, &references, margins);
        let items = totals.items as f64;
        shares.loss += sums.loss / items;
        for (index, sum) in [sums.delta, margin, sums.right].into_iter().enumerate() {
            shares.watch(index, sum / items);
        }
        if shares.pass() != Pass::Forward {
            let slopes: Vec<f32> = sums
                .slopes
                .iter()
                .map(|slope| (slope / items) as f32)
                .collect();
            let dx = llama.predict_backward(predicted, &hidden, head, &slopes, None, None);
            let gradients = PassGradients {
                trunk: None,
                mixture: &mut shares.blocks,
                gate_slopes: [0.0; 2],
            };
            llama.backward(&batch, hidden, &mixture, dx, gradients);
        }
        Ok(())
    }
}

/// Tokens of both sequences of a pair.
pub(super) fn tokens(pair: &Pair) -> usize {
    pair.better.ids.len() + pair.worse.ids.len()
}

/// pi_ref's sums: those that the pairs carry, and the rest computed.
pub(super) fn references(base: &Base, pairs: &[&Pair]) -> Result<Vec<(f32, f32)>, TrainError> {
    let missing: Vec<&Pair> = pairs
        .iter()
        .copied()
        .filter(|pair| pair.reference.is_none())
        .collect();
    let mut computed = base.reference_logps(&missing)?.into_iter();
    let references = pairs
        .iter()
        .filter_map(|pair| pair.reference.or_else(|| computed.next()));
    Ok(references.collect())
}

/// PEFT's name of a matrix.
fn name(layer: usize, matrix: &str) -> String {
    format!("base_model.model.model.layers.{layer}.mlp.down_proj.{matrix}.weight")
}

impl Objective for Expert {
    type Item = Pair;

    fn parameters(&self) -> &[Parameter] {
        self.blocks.parameters()
    }

    fn values(&self) -> Result<Vec<Vec<f32>>, TrainError> {
        Ok(self.blocks.values())
    }

    fn set_values(&mut self, values: &[Vec<f32>]) -> Result<(), TrainError> {
        self.blocks.set_values(values)
    }

    fn totals(&self, item: &Pair) -> Totals {
        let tokens = tokens(item);
        Totals {
            items: 1,
            tokens,
            weight: tokens as f64,
        }
    }

    fn shares(&self, items: &[&Pair], totals: Totals, pass: Pass) -> Result<Gradients, TrainError> {
        let mut shares = Shares::new(&self.blocks, &WATCHED, pass);
        for chunk in chunks(items, tokens) {
            self.run(chunk, totals, &mut shares)?;
        }
        Ok(shares.finish(&self.blocks))
    }
}
