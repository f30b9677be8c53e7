//! Reward and cost models: a trunk and a linear score of its last token (LlamaForScore, MIDPO.md 2).

use std::collections::HashMap;
use std::sync::Arc;

use super::NamedTensor;
use super::batch::{Batch, Last, chunks};
use super::blocks::{Block, Blocks};
use super::llama::{Hidden, Llama, PassGradients, Shape, rows_of};
use super::mixture::Mixture;
use super::ops::{add_product, add_weight_gradient, linear};
use super::preference::{sigmoid, softplus};
use super::shares::Shares;
use super::weights::{Weights, matrix, vector};
use crate::checkpoint::{Checkpoint, LlamaConfig};
use crate::train::{
    Gradients, Objective, Parameter, Pass, ScorePair, Sequence, Totals, TrainError,
};

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
        let head = zeros(matrix(HEAD, 1, d));
        let bias = zeros(vector(BIAS, 1));
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
        blocks.push(head);
        blocks.extend(bias);
        Ok(Self {
            shape: Shape::new(config),
            blocks: Blocks::new(blocks),
            kind,
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
    pub fn export(&self) -> Vec<NamedTensor> {
        self.blocks.named()
    }

    /// The score of each sequence.
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a sequence that is empty, too long or not of this vocabulary.
    pub fn scores(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, TrainError> {
        let mut scores = Vec::with_capacity(sequences.len());
        for chunk in chunks(sequences, |sequence| sequence.ids.len()) {
            scores.extend(self.score(chunk, Pass::Forward)?.scores);
        }
        Ok(scores)
    }

    fn llama(&self) -> Llama<'_> {
        Llama::new(&self.shape, self.blocks.blocks())
    }

    /// (d), and (1) or nothing.
    fn head(&self) -> (&[f32], &[f32]) {
        let blocks = self.blocks.blocks();
        let at = Llama::count(self.config());
        let block = |at: usize| blocks.get(at).map_or(&[][..], |block| block);
        (block(at), block(at + 1))
    }

    fn score(&self, sequences: &[&Sequence], pass: Pass) -> Result<Scored, TrainError> {
        let mut batch = Batch::default();
        let mut ends = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            batch.push(sequence, sequence.ids.len(), Last::Keep, self.config())?;
            ends.push(batch.ids.len() - 1);
        }
        let llama = self.llama();
        let hidden = llama.forward(&batch, &Mixture::Base, pass);
        let d = self.config().hidden_size;
        let chosen = rows_of(&hidden.x, d, &ends);
        let normed = llama.norm().forward(&chosen);
        let (weight, bias) = self.head();
        let mut scores = linear(&normed, weight, d);
        for score in &mut scores {
            *score += bias.first().copied().unwrap_or(0.0);
        }
        Ok(Scored {
            batch,
            ends,
            hidden,
            chosen,
            normed,
            scores,
        })
    }

    fn run(
        &self,
        pairs: &[&ScorePair],
        totals: Totals,
        shares: &mut Shares,
    ) -> Result<(), TrainError> {
        let sequences = pairs.iter().flat_map(|pair| [&pair.better, &pair.worse]);
        let sequences: Vec<&Sequence> = sequences.collect();
        let scored = self.score(&sequences, shares.pass())?;
        let mut sums = Sums::default();
        for (pair, scores) in pairs.iter().zip(scored.scores.chunks_exact(2)) {
            if let [better, worse] = scores {
                sums.add(self.kind, pair, f64::from(*better), f64::from(*worse));
            }
        }
        let items = totals.items as f64;
        shares.loss += sums.loss / items;
        shares.watch(0, sums.right / items);
        shares.watch(1, sums.signs / items);
        if shares.pass() != Pass::Forward {
            let slopes: Vec<f32> = sums
                .slopes
                .iter()
                .map(|slope| (slope / items) as f32)
                .collect();
            self.back(scored, &slopes, &mut shares.blocks);
        }
        Ok(())
    }

    /// From d loss / d score to all gradients.
    fn back(&self, scored: Scored, slopes: &[f32], blocks: &mut [Vec<f32>]) {
        let d = self.config().hidden_size;
        let count = Llama::count(self.config());
        let (trunk, head) = blocks.split_at_mut(count.min(blocks.len()));
        let (weight, _) = self.head();
        let mut dnormed = vec![0.0; scored.normed.len()];
        add_product(&mut dnormed, 1.0, slopes, weight, d);
        if let Some(dweight) = head.first_mut() {
            add_weight_gradient(dweight, 1.0, slopes, &scored.normed, d);
        }
        for dbias in head.iter_mut().skip(1).flatten() {
            *dbias += slopes.iter().sum::<f32>();
        }
        let Some((dnorm, trunk)) = trunk.split_last_mut() else {
            return;
        };
        let llama = self.llama();
        let len = scored.hidden.x.len();
        let dx = llama.rows_backward(&scored.ends, &scored.chosen, &dnormed, Some(dnorm), len);
        let gradients = PassGradients {
            trunk: Some(trunk),
            mixture: &mut [],
            gate_slopes: [0.0; 2],
        };
        llama.backward(&scored.batch, scored.hidden, &Mixture::Base, dx, gradients);
    }
}

/// Scores, and what the way back needs.
struct Scored {
    batch: Batch,
    /// Row of each sequence's last token.
    ends: Vec<usize>,
    hidden: Hidden,
    /// (sequences, d): before and after the last norm.
    chosen: Vec<f32>,
    normed: Vec<f32>,
    /// (sequences).
    scores: Vec<f32>,
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

fn zeros(parameter: Parameter) -> Block {
    Block {
        values: vec![0.0; parameter.shape.iter().product()],
        parts: vec![parameter],
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
        Ok(self.blocks.values())
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

    fn shares(
        &self,
        items: &[&ScorePair],
        totals: Totals,
        pass: Pass,
    ) -> Result<Gradients, TrainError> {
        let mut shares = Shares::new(&self.blocks, &WATCHED, pass);
        for chunk in chunks(items, tokens) {
            self.run(chunk, totals, &mut shares)?;
        }
        Ok(shares.finish(&self.blocks))
    }
}
