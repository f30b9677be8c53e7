//! The router: base and both experts frozen, the gates' linear maps move (MIDPO.md 3).

use std::sync::Arc;

use super::NamedTensor;
use super::base::{Base, Positions};
use super::batch::{Last, chunks};
use super::blocks::{Block, Blocks, check};
use super::expert::{references, tokens};
use super::fold::{self, GATE_TENSORS, Gate};
use super::llama::PassGradients;
use super::mixture::{BothExperts, Gating, Mixture};
use super::preference::{Anchor, BETA_DPO, Loss, PairBatch, delta};
use super::shares::Shares;
use crate::checkpoint::{self, ExpertLayer};
use crate::train::{Gradients, Objective, Pair, Parameter, Pass, Totals, TrainError};
use crate::types::TokenId;

/// How a router is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterOptions {
    /// Width between a gate's first two maps.
    pub hidden: usize,
    /// beta_DPO.
    pub beta_dpo: f32,
    /// Weight of mean|alpha|; 1 in the paper.
    pub weight_alpha: f32,
    /// Weight of mean|beta - 1|; 1 in the paper.
    pub weight_beta: f32,
    /// Of the start.
    pub seed: u64,
}

impl Default for RouterOptions {
    /// The authors'.
    fn default() -> Self {
        Self {
            hidden: 512,
            beta_dpo: BETA_DPO,
            weight_alpha: 1.0,
            weight_beta: 1.0,
            seed: 42,
        }
    }
}

/// What fixed gates are worth on a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FixedGates {
    /// -log sigmoid(beta_DPO * Delta).
    pub loss: f64,
    /// Delta.
    pub delta: f64,
}

/// Trains the gates. Loss: -log sigmoid(beta_DPO * Delta), a mean over pairs, + weight_alpha * mean|alpha| + weight_beta *
/// mean|beta - 1|, means over layers and all real tokens of the batch.
///
/// Watched: `delta`, `accuracy` (Delta > 0) and `dpo`, means over pairs; `alpha` and `beta`, means over layers and tokens;
/// `alpha_last` and `beta_last`, at the last token of each prompt, means over layers and sequences.
pub struct Router {
    base: Arc<Base>,
    /// One a layer.
    experts: Vec<BothExperts>,
    /// 2r.
    width: usize,
    parameters: Vec<Parameter>,
    /// In the order of `parameters`: alpha's six tensors, then beta's, of each layer.
    values: Vec<Vec<f32>>,
    options: RouterOptions,
}

const WATCHED: [&str; 7] = [
    "delta",
    "accuracy",
    "dpo",
    "alpha",
    "beta",
    "alpha_last",
    "beta_last",
];

impl Router {
    /// A new one, torch's `Linear` start: gates begin near a half.
    ///
    /// # Errors
    /// [`TrainError::Shape`] where an expert is another base's.
    pub fn new(
        base: Arc<Base>,
        safety: &checkpoint::Expert,
        helpfulness: &checkpoint::Expert,
        options: RouterOptions,
    ) -> Result<Self, TrainError> {
        let m = base.config().intermediate_size;
        let parameters: Vec<Parameter> = (0..base.config().num_layers)
            .flat_map(|layer| {
                ["alpha", "beta"].map(|word| fold::parameters(layer, word, options.hidden, m))
            })
            .flatten()
            .collect();
        let values = fold::start(&parameters, options.seed);
        Ok(Self {
            experts: stack_experts(&base, safety, helpfulness)?,
            width: 2 * safety.rank.max(helpfulness.rank),
            base,
            parameters,
            values,
            options,
        })
    }

    /// Goes on from tensors by the names of `router.safetensors`; their width holds instead of that of `options`.
    ///
    /// # Errors
    /// [`TrainError::Shape`] names the tensor that is missing or of another shape.
    pub fn from_tensors(
        base: Arc<Base>,
        safety: &checkpoint::Expert,
        helpfulness: &checkpoint::Expert,
        tensors: &[NamedTensor],
        options: RouterOptions,
    ) -> Result<Self, TrainError> {
        let first = tensors
            .iter()
            .find(|tensor| tensor.0 == "layer_0_alpha.linear_0.bias");
        let hidden = first.map_or(options.hidden, |(_, _, values)| values.len());
        let options = RouterOptions { hidden, ..options };
        let mut router = Self::new(base, safety, helpfulness, options)?;
        let values = router.parameters.iter().map(|parameter| {
            let found = tensors.iter().find(|tensor| tensor.0 == parameter.name);
            found.map(|tensor| tensor.2.clone()).unwrap_or_default()
        });
        let values: Vec<Vec<f32>> = values.collect();
        router.set_values(&values)?;
        Ok(router)
    }

    /// Names, shapes and numbers of `router.safetensors`.
    pub fn export(&self) -> Vec<NamedTensor> {
        let named = self.parameters.iter().zip(&self.values);
        named
            .map(|(parameter, values)| {
                (
                    parameter.name.clone(),
                    parameter.shape.clone(),
                    values.clone(),
                )
            })
            .collect()
    }

    /// Summed log-probabilities of (better, worse) of each pair under pi_ref, the base: for [`Pair::reference`].
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a pair that is too long or not of this vocabulary.
    pub fn reference_logps(&self, pairs: &[&Pair]) -> Result<Vec<(f32, f32)>, TrainError> {
        self.base.reference_logps(pairs)
    }

    /// What gates fixed at alpha and beta are worth on each pair: the table to print before a router is trained (DEMO.md 6).
    ///
    /// # Errors
    /// As [`Router::reference_logps`].
    pub fn fixed_gates(
        &self,
        pairs: &[&Pair],
        alpha: f32,
        beta: f32,
    ) -> Result<Vec<FixedGates>, TrainError> {
        let references = references(&self.base, pairs)?;
        let mixture = self.mixture(Gating::Fixed([alpha, beta]));
        let mut worth = Vec::with_capacity(pairs.len());
        for (pair, reference) in pairs.iter().zip(references) {
            let PairBatch { batch, spans } =
                PairBatch::new(&[pair], Anchor::None, Last::Drop, self.base.config())?;
            let log_probs = self.base.log_probs(&batch, &mixture);
            for span in spans {
                let delta = delta(span.sums(&log_probs), reference);
                let loss = self.loss().dpo(delta, 0.0);
                worth.push(FixedGates { loss, delta });
            }
        }
        Ok(worth)
    }

    /// Logits and gates of one sequence under the router as it is.
    ///
    /// # Errors
    /// [`TrainError::Engine`] for a sequence that is empty, too long or not of this vocabulary.
    pub fn positions(&self, ids: &[TokenId]) -> Result<Positions, TrainError> {
        let folded = self.fold();
        let mixture = self.mixture(Gating::Learned(folded.blocks()));
        self.base.positions_of(ids, &mixture)
    }

    /// As [`Router::positions`], gates fixed at alpha and beta.
    ///
    /// # Errors
    /// As [`Router::positions`].
    pub fn positions_fixed(
        &self,
        ids: &[TokenId],
        alpha: f32,
        beta: f32,
    ) -> Result<Positions, TrainError> {
        let mixture = self.mixture(Gating::Fixed([alpha, beta]));
        self.base.positions_of(ids, &mixture)
    }

    fn loss(&self) -> Loss {
        Loss {
            beta_dpo: f64::from(self.options.beta_dpo),
            anchor: 0.0,
        }
    }

    fn mixture<'a>(&'a self, gating: Gating<'a>) -> Mixture<'a> {
        Mixture::Routed {
            experts: &self.experts,
            width: self.width,
            gating,
        }
    }

    /// Both gates of each layer, folded: [a ; b] (2, m) and [a0 ; b0] (2), two blocks a layer.
    fn fold(&self) -> Blocks {
        let mut blocks = Vec::new();
        for tensors in self.values.chunks_exact(2 * GATE_TENSORS) {
            let (mut weight, mut bias) = (Vec::new(), Vec::new());
            for gate in tensors.chunks_exact(GATE_TENSORS).filter_map(Gate::new) {
                let (a, a0) = gate.fold();
                weight.extend(a);
                bias.push(a0);
            }
            blocks.extend([weight, bias].map(|values| Block {
                values,
                parts: Vec::new(),
            }));
        }
        Blocks::new(blocks)
    }

    /// The parameters' gradients from those of the folded gates.
    fn unfold(&self, folded: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let m = self.base.config().intermediate_size;
        let mut layers = folded.chunks_exact(2);
        let gates = std::iter::from_fn(|| match layers.next() {
            Some([weight, bias]) => Some(weight.chunks_exact(m).zip(bias)),
            _ => None,
        });
        let tensors = self.values.chunks_exact(GATE_TENSORS).filter_map(Gate::new);
        let unfolded = tensors.zip(gates.flatten());
        unfolded
            .flat_map(|(gate, (da, da0))| gate.unfold(da, *da0))
            .collect()
    }

    fn run(
        &self,
        folded: &Blocks,
        pairs: &[&Pair],
        totals: Totals,
        shares: &mut Shares,
    ) -> Result<(), TrainError> {
        let references = references(&self.base, pairs)?;
        let PairBatch { batch, spans } =
            PairBatch::new(pairs, Anchor::None, Last::Keep, self.base.config())?;
        let (llama, head) = (self.base.llama(), self.base.head());
        let mixture = self.mixture(Gating::Learned(folded.blocks()));
        let hidden = llama.forward(&batch, &mixture, shares.pass());
        let predicted = llama.predict(&batch, &hidden, head);
        // The router's loss has no margin.
        let margins = pairs.iter().map(|_| 0.0);
        let sums = self
            .loss()
            .of(&predicted.tokens.log_probs, &spans, &references, margins);
        let items = totals.items as f64;
        let means = self.gate_means(pairs, &hidden.gates, totals);
        let [alpha, beta, ..] = means;
        // Gates are within (0, 1): |alpha| = alpha, |beta - 1| = 1 - beta; this part holds its share of all tokens.
        let share = batch.ids.len() as f64 / totals.tokens as f64;
        shares.loss += sums.loss / items
            + f64::from(self.options.weight_alpha) * alpha
            + f64::from(self.options.weight_beta) * (share - beta);
        let of_pairs = [sums.delta, sums.right, sums.dpo].map(|sum| sum / items);
        for (index, share) in of_pairs.into_iter().chain(means).enumerate() {
            shares.watch(index, share);
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
                gate_slopes: self.gate_slopes(totals),
            };
            llama.backward(&batch, hidden, &mixture, dx, gradients);
        }
        Ok(())
    }

    /// d loss / d gate of the regulariser: the same for every token and layer.
    fn gate_slopes(&self, totals: Totals) -> [f32; 2] {
        let pool = (totals.tokens * self.experts.len()) as f32;
        [
            self.options.weight_alpha / pool,
            -self.options.weight_beta / pool,
        ]
    }

    /// Shares of the means of alpha and beta over all tokens, and over the last tokens of prompts.
    fn gate_means(&self, pairs: &[&Pair], gates: &[Vec<f32>], totals: Totals) -> [f64; 4] {
        let sequences = pairs.iter().flat_map(|pair| [&pair.better, &pair.worse]);
        let last = sequences.scan(0, |start, sequence| {
            let row = *start + sequence.answer - 1;
            *start += sequence.ids.len();
            Some(row)
        });
        let last: Vec<usize> = last.collect();
        let (mut all, mut ends) = ([0.0; 2], [0.0; 2]);
        for gates in gates {
            for (sum, gate) in (0..2).cycle().zip(gates) {
                all[sum] += f64::from(*gate);
            }
            for row in &last {
                for (sum, gate) in ends.iter_mut().zip(gates.iter().skip(2 * row)) {
                    *sum += f64::from(*gate);
                }
            }
        }
        let layers = gates.len().max(1) as f64;
        let (tokens, sequences) = (totals.tokens as f64, 2.0 * totals.items as f64);
        let [alpha, beta] = all.map(|sum| sum / layers / tokens);
        let [alpha_last, beta_last] = ends.map(|sum| sum / layers / sequences);
        [alpha, beta, alpha_last, beta_last]
    }
}

/// [A_s ; A_h] and [s B_s | s B_h] of each layer; the lower rank is filled up with zeros.
fn stack_experts(
    base: &Base,
    safety: &checkpoint::Expert,
    helpfulness: &checkpoint::Expert,
) -> Result<Vec<BothExperts>, TrainError> {
    let (d, m) = (base.config().hidden_size, base.config().intermediate_size);
    let rank = safety.rank.max(helpfulness.rank);
    let mut stacked = Vec::with_capacity(base.config().num_layers);
    for index in 0..base.config().num_layers {
        let mut low = Vec::with_capacity(2 * rank * m);
        let mut high = vec![0.0; d * 2 * rank];
        for (side, expert) in [safety, helpfulness].into_iter().enumerate() {
            let layer = expert_layer(expert, index, d, m)?;
            low.extend_from_slice(&layer.lora_a);
            low.resize((side + 1) * rank * m, 0.0);
            let rows = layer.lora_b.chunks_exact(expert.rank.max(1));
            for (row, values) in high.chunks_exact_mut(2 * rank).zip(rows) {
                for (out, value) in row.iter_mut().skip(side * rank).zip(values) {
                    *out = expert.scale * value;
                }
            }
        }
        stacked.push(BothExperts { low, high });
    }
    Ok(stacked)
}

/// One layer of an expert, if it is of this base.
fn expert_layer(
    expert: &checkpoint::Expert,
    index: usize,
    d: usize,
    m: usize,
) -> Result<&ExpertLayer, TrainError> {
    let shape = |what: &str, expected, found| TrainError::Shape {
        name: format!("layer {index} of an expert: {what}"),
        expected,
        found,
    };
    let layer = expert
        .layers
        .get(index)
        .ok_or_else(|| shape("lora_A", expert.rank * m, 0))?;
    for (what, expected, found) in [
        ("lora_A", expert.rank * m, layer.lora_a.len()),
        ("lora_B", d * expert.rank, layer.lora_b.len()),
    ] {
        if expected != found {
            return Err(shape(what, expected, found));
        }
    }
    Ok(layer)
}

impl Objective for Router {
    type Item = Pair;

    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn values(&self) -> Result<Vec<Vec<f32>>, TrainError> {
        Ok(self.values.clone())
    }

    fn set_values(&mut self, values: &[Vec<f32>]) -> Result<(), TrainError> {
        check(&self.parameters, values)?;
        self.values = values.to_vec();
        Ok(())
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
        let folded = self.fold();
        let mut shares = Shares::new(&folded, &WATCHED, pass);
        for chunk in chunks(items, tokens) {
            self.run(&folded, chunk, totals, &mut shares)?;
        }
        let values = match pass {
            Pass::Back(_) => self.unfold(&shares.blocks),
            Pass::Forward => Vec::new(),
        };
        let sums = shares.finish(&folded);
        Ok(Gradients { values, ..sums })
    }
}
