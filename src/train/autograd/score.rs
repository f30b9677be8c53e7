//! Reward and cost models: a trunk and a linear score of its last token (LlamaForScore, MIDPO.md 2).

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Tensor;

use super::base::incomplete;
use super::batch::{Batch, CHUNK_TOKENS, Last, check, in_chunks};
use super::blocks::{Block, Blocks};
use super::llama::{Llama, Mixture, Shape};
use super::ops::{linear, read};
use super::preference::{sigmoid, softplus};
use super::weights::{Weights, matrix, vector};
use super::{NamedTensor, weighted_sum};
use crate::checkpoint::{Checkpoint, LlamaConfig};
use crate::train::{Gradients, Objective, Parameter, ScorePair, Sequence, Totals, TrainError};

/// What a score means, and so how it is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreKind {
    /// R: higher is better.
    Reward,
    /// C: higher is more harmful, below 0 is safe. `better` of a pair is the safer answer.
    Cost,
}

/// A score model's tensors, as its file holds them.
#[derive(Clone, Debug)]
pub struct ScoreTensors {
    /// Of the trunk.
    pub config: LlamaConfig,
    /// Names as in the file (`model.*`, `score_head.weight`, perhaps `score_head.bias`), row-major numbers.
    pub tensors: Vec<(String, Vec<f32>)>,
}

/// Trains all of a score model. Loss, means over pairs: -log sigmoid(R(y_w) - R(y_l)), or -log sigmoid(C(y_l) - C(y_w)) with -log
/// sigmoid(-C) of each answer said to be safe and -log sigmoid(C) of each said to be unsafe (Safe-RLHF); + [`REGULARISATION`] *
/// mean squared score.
///
/// Watched: `accuracy`, how often the pair is in order, and `sign_accuracy`, how often a cost is on the side of 0 where the label
/// says (1 for answers without label).
pub struct ScoreModel {
    shape: Arc<Shape>,
    blocks: Blocks,
    kind: ScoreKind,
    bias: bool,
}

/// Weight of the mean squared score in the authors' scripts.
pub const REGULARISATION: f64 = 0.001;

const WATCHED: [&str; 2] = ["accuracy", "sign_accuracy"];
const HEAD: &str = "score_head.weight";
const BIAS: &str = "score_head.bias";

impl ScoreModel {
    /// A new one on the first `layers` layers of a base (all: `None`). Its head starts at 0: every pair is even.
    ///
    /// # Errors
    /// [`TrainError`] where tensors are not of the configuration's shapes.
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        layers: Option<usize>,
        kind: ScoreKind,
    ) -> Result<Self, TrainError> {
        let mut config = checkpoint.config.clone();
        config.num_layers = layers.map_or(config.num_layers, |n| n.min(config.num_layers));
        let d = config.hidden_size;
        let head = zeros(vec![matrix(HEAD, 1, d)], vec![1, d]);
        let bias = zeros(vec![vector(BIAS, 1)], vec![1]);
        Self::new(config, &Weights::of(checkpoint), head, Some(bias), kind)
    }

    /// Goes on from a trained one.
    ///
    /// # Errors
    /// [`TrainError::Shape`] names the tensor that is missing or of another shape.
    pub fn from_tensors(score: &ScoreTensors, kind: ScoreKind) -> Result<Self, TrainError> {
        let named = score.tensors.iter();
        let named: HashMap<&str, &[f32]> = named
            .map(|(name, values)| (name.as_str(), values.as_slice()))
            .collect();
        let has_bias = named.contains_key(BIAS);
        let weights = Weights::Named(named);
        let head = weights.block(vec![matrix(HEAD, 1, score.config.hidden_size)])?;
        let bias = has_bias.then(|| weights.block(vec![vector(BIAS, 1)]));
        Self::new(
            score.config.clone(),
            &weights,
            head,
            bias.transpose()?,
            kind,
        )
    }

    fn new(
        config: LlamaConfig,
        weights: &Weights<'_>,
        head: Block,
        bias: Option<Block>,
        kind: ScoreKind,
    ) -> Result<Self, TrainError> {
        let mut blocks = weights.trunk(&config)?;
        let has_bias = bias.is_some();
        blocks.push(head);
        blocks.extend(bias);
        Ok(Self {
            shape: Shape::new(config),
            blocks: Blocks::new(blocks)?,
            kind,
            bias: has_bias,
        })
    }

    /// Shape and constants of the trunk.
    pub fn config(&self) -> &LlamaConfig {
        &self.shape.config
    }

    /// Reward or cost.
    pub fn kind(&self) -> ScoreKind {
        self.kind
    }

    /// Names, shapes and numbers, in the order of Hugging Face's state dict; the normaliser's buffers are the file's.
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

    /// The score of each sequence.
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a sequence that is empty, too long or not of this vocabulary.
    pub fn scores(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, TrainError> {
        let mut scores = Vec::with_capacity(sequences.len());
        let mut rest = sequences;
        while !rest.is_empty() {
            let mut sum = 0;
            let fits = rest.iter().take_while(|sequence| {
                sum += sequence.ids.len();
                sum <= CHUNK_TOKENS
            });
            let (chunk, others) = rest.split_at(fits.count().max(1));
            let of = self.score(chunk, false)?;
            scores.extend(read(&of, <[f32]>::to_vec)?);
            rest = others;
        }
        Ok(scores)
    }

    /// Scores of sequences as one graph: (sequences, 1).
    fn score(&self, sequences: &[&Sequence], tracked: bool) -> Result<Tensor, TrainError> {
        let mut tensors = self.blocks.tensors(tracked).into_iter();
        let llama = Llama::take(&self.shape, &mut tensors).ok_or_else(incomplete)?;
        let head = tensors.next().ok_or_else(incomplete)?;
        let mut batch = Batch::default();
        let mut ends = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            check(sequence, self.config())?;
            batch.push(sequence, sequence.ids.len(), Last::Keep, self.config())?;
            ends.push(batch.ids.len() - 1);
        }
        let hidden = llama.forward(&batch.ids, &batch.lengths, &Mixture::Base)?;
        let scores = linear(&llama.normed_rows(&hidden.x, ends)?, &head)?;
        Ok(match tensors.next() {
            Some(bias) if self.bias => scores.broadcast_add(&bias.reshape((1, 1))?)?,
            _ => scores,
        })
    }

    fn run(
        &self,
        pairs: &[&ScorePair],
        totals: Totals,
        tracked: bool,
    ) -> Result<Gradients, TrainError> {
        let sequences = pairs.iter().flat_map(|pair| [&pair.better, &pair.worse]);
        let sequences: Vec<&Sequence> = sequences.collect();
        let scores = self.score(&sequences, tracked)?;
        let values = read(&scores, <[f32]>::to_vec)?;
        let mut sums = Sums::default();
        for (pair, scores) in pairs.iter().zip(values.chunks_exact(2)) {
            if let [better, worse] = scores {
                sums.add(self.kind, pair, f64::from(*better), f64::from(*worse));
            }
        }
        let items = totals.items as f64;
        let values = if tracked {
            let slopes: Vec<f64> = sums.slopes.iter().map(|slope| slope / items).collect();
            let store = weighted_sum(&scores, &slopes)?.backward()?;
            self.blocks.gradients(&store)?
        } else {
            Vec::new()
        };
        let watched = [sums.right / items, sums.signs / items];
        Ok(Gradients {
            values,
            loss: sums.loss / items,
            watched: WATCHED.into_iter().zip(watched).collect(),
        })
    }

    fn shares(
        &self,
        items: &[&ScorePair],
        batch: Totals,
        tracked: bool,
    ) -> Result<Gradients, TrainError> {
        in_chunks(items, &WATCHED, tokens, |chunk| {
            self.run(chunk, batch, tracked)
        })
    }
}

/// Sums over pairs.
#[derive(Default)]
struct Sums {
    loss: f64,
    right: f64,
    signs: f64,
    /// d loss / d score: better, worse, better, ...
    slopes: Vec<f64>,
}

impl Sums {
    fn add(&mut self, kind: ScoreKind, pair: &ScorePair, better: f64, worse: f64) {
        // The pairwise loss pulls `high` above `low`.
        let sign = match kind {
            ScoreKind::Reward => 1.0,
            ScoreKind::Cost => -1.0,
        };
        let ahead = sign * (better - worse);
        let slope = -sign * sigmoid(-ahead);
        self.loss += softplus(-ahead);
        self.right += f64::from(u8::from(ahead > 0.0));
        let mut signs = 0.0;
        for (score, slope, safe) in [
            (better, slope, pair.better_safe),
            (worse, -slope, pair.worse_safe),
        ] {
            let mut slope = slope + REGULARISATION * score;
            self.loss += REGULARISATION * score * score / 2.0;
            let labelled = safe.filter(|_| kind == ScoreKind::Cost);
            let side = labelled.map(|safe| if safe { -1.0 } else { 1.0 });
            if let Some(side) = side {
                self.loss += softplus(-side * score);
                slope -= side * sigmoid(-side * score);
            }
            signs += side.map_or(1.0, |side| f64::from(u8::from(side * score > 0.0)));
            self.slopes.push(slope);
        }
        self.signs += signs / 2.0;
    }
}

fn zeros(parts: Vec<Parameter>, shape: Vec<usize>) -> Block {
    Block {
        values: vec![0.0; shape.iter().product()],
        shape,
        parts,
    }
}

/// Tokens of both sequences.
fn tokens(pair: &ScorePair) -> usize {
    pair.better.ids.len() + pair.worse.ids.len()
}

impl Objective for ScoreModel {
    type Item = ScorePair;

    fn parameters(&self) -> &[Parameter] {
        self.blocks.parameters()
    }

    fn values(&self) -> Result<Vec<Vec<f32>>, TrainError> {
        self.blocks.values()
    }

    fn set_values(&mut self, values: &[Vec<f32>]) -> Result<(), TrainError> {
        self.blocks.set_values(values)
    }

    fn totals(&self, item: &ScorePair) -> Totals {
        let tokens = tokens(item);
        Totals {
            items: 1,
            tokens,
            weight: tokens as f64,
        }
    }

    fn gradients(&self, items: &[&ScorePair], batch: Totals) -> Result<Gradients, TrainError> {
        self.shares(items, batch, true)
    }

    fn evaluate(&self, items: &[&ScorePair], batch: Totals) -> Result<Gradients, TrainError> {
        self.shares(items, batch, false)
    }
}
