//! The router: base and both experts frozen, the gates' linear maps move (MIDPO.md 3).

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

use super::base::{Base, Positions};
use super::batch::{Last, in_chunks};
use super::expert::{references, tokens};
use super::fold::{self, GATE_TENSORS, Gate};
use super::llama::{Gating, Mixture, RoutedLayer};
use super::ops::read;
use super::preference::{Anchor, BETA_DPO, Loss, PairBatch, delta};
use super::{NamedTensor, weighted_sum};
use crate::checkpoint::{self, ExpertLayer};
use crate::train::{Gradients, Objective, Pair, Parameter, Totals, TrainError};
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
    /// ([A_s ; A_h], [s B_s | s B_h]), one a layer.
    experts: Vec<(Tensor, Tensor)>,
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

/// The folded gates of a layer as variables: weight (2, m), bias (2).
struct Folded {
    weight: Var,
    bias: Var,
}

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
        let mixture = self.mixture(|_| Gating::Fixed([alpha, beta]));
        let mut worth = Vec::with_capacity(pairs.len());
        for (pair, reference) in pairs.iter().zip(references) {
            let PairBatch { batch, spans } =
                PairBatch::new(&[pair], Anchor::None, Last::Drop, self.base.config())?;
            let log_probs = self.base.log_probs(batch, &mixture)?;
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
        let folded = self.fold()?;
        let mixture = self.mixture(|layer| learned(&folded, layer, false));
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
        let mixture = self.mixture(|_| Gating::Fixed([alpha, beta]));
        self.base.positions_of(ids, &mixture)
    }

    fn loss(&self) -> Loss {
        Loss {
            beta_dpo: f64::from(self.options.beta_dpo),
            anchor: 0.0,
        }
    }

    fn mixture(&self, gating: impl Fn(usize) -> Gating) -> Mixture {
        let layers = self.experts.iter().enumerate();
        let layers = layers.map(|(index, (low, high))| RoutedLayer {
            low: low.clone(),
            high: high.clone(),
            gating: gating(index),
        });
        Mixture::Routed(layers.collect())
    }

    /// Both gates of each layer, folded.
    fn fold(&self) -> Result<Vec<Folded>, TrainError> {
        let m = self.base.config().intermediate_size;
        let mut layers = Vec::new();
        for tensors in self.values.chunks_exact(2 * GATE_TENSORS) {
            let (mut weight, mut bias) = (Vec::with_capacity(2 * m), Vec::with_capacity(2));
            for gate in tensors.chunks_exact(GATE_TENSORS).filter_map(Gate::new) {
                let (a, a0) = gate.fold();
                weight.extend(a);
                bias.push(a0);
            }
            layers.push(Folded {
                weight: Var::from_vec(weight, (2, m), &Device::Cpu)?,
                bias: Var::from_vec(bias, 2, &Device::Cpu)?,
            });
        }
        Ok(layers)
    }

    /// The folded gates' gradients, alpha's and beta's (a, a0) of each layer.
    fn folded_gradients(folded: &[Folded], store: &GradStore) -> Result<Vec<Vec<f32>>, TrainError> {
        let mut gradients = Vec::with_capacity(2 * folded.len());
        for layer in folded {
            let m = layer.weight.dim(1)?;
            let (Some(weight), Some(bias)) = (store.get(&layer.weight), store.get(&layer.bias))
            else {
                gradients.extend([vec![0.0; m + 1], vec![0.0; m + 1]]);
                continue;
            };
            read(weight, |weight| {
                read(bias, |bias| {
                    for (a, a0) in weight.chunks_exact(m).zip(bias) {
                        gradients.push(a.iter().chain([a0]).copied().collect());
                    }
                })
            })??;
        }
        Ok(gradients)
    }

    /// The parameters' gradients from those of the folded gates.
    fn unfold(&self, folded: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let gates = self.values.chunks_exact(GATE_TENSORS).filter_map(Gate::new);
        let unfolded = gates.zip(folded).filter_map(|(gate, gradient)| {
            let (da0, da) = gradient.split_last()?;
            Some(gate.unfold(da, *da0))
        });
        unfolded.flatten().collect()
    }

    fn run(
        &self,
        folded: &[Folded],
        pairs: &[&Pair],
        totals: Totals,
        tracked: bool,
    ) -> Result<Gradients, TrainError> {
        let references = references(&self.base, pairs)?;
        let PairBatch { batch, spans } =
            PairBatch::new(pairs, Anchor::None, Last::Keep, self.base.config())?;
        let mixture = self.mixture(|layer| learned(folded, layer, tracked));
        let hidden = self.base.forward(&batch, &mixture)?;
        let log_probs = batch.log_probs(&self.base.llama, &self.base.head, &hidden, None)?;
        let sums = read(&log_probs, |log_probs| {
            // The router's loss has no margin.
            let margins = pairs.iter().map(|_| 0.0);
            self.loss().of(log_probs, &spans, &references, margins)
        })?;
        let items = totals.items as f64;
        let [alpha, beta, alpha_last, beta_last] = self.gate_means(pairs, &hidden.gates, totals)?;
        // Gates are within (0, 1): |alpha| = alpha, |beta - 1| = 1 - beta; this part holds its share of all tokens.
        let share = pairs.iter().map(|pair| tokens(pair)).sum::<usize>() as f64;
        let share = share / totals.tokens as f64;
        let loss = sums.loss / items
            + f64::from(self.options.weight_alpha) * alpha
            + f64::from(self.options.weight_beta) * (share - beta);
        let values = if tracked {
            let slopes: Vec<f64> = sums.slopes.iter().map(|slope| slope / items).collect();
            let mut scalar = weighted_sum(&log_probs, &slopes)?;
            for gates in &hidden.gates {
                scalar = (scalar + weighted_sum(gates, &self.gate_slopes(gates, totals)?)?)?;
            }
            Self::folded_gradients(folded, &scalar.backward()?)?
        } else {
            Vec::new()
        };
        let watched = [
            sums.delta / items,
            sums.right / items,
            sums.dpo / items,
            alpha,
            beta,
            alpha_last,
            beta_last,
        ];
        Ok(Gradients {
            values,
            loss,
            watched: WATCHED.into_iter().zip(watched).collect(),
        })
    }

    /// d loss / d gate of the regulariser: the same for every token and layer.
    fn gate_slopes(&self, gates: &Tensor, totals: Totals) -> Result<Vec<f64>, TrainError> {
        let pool = (totals.tokens * self.experts.len()) as f64;
        let slopes = [
            f64::from(self.options.weight_alpha) / pool,
            -f64::from(self.options.weight_beta) / pool,
        ];
        Ok(slopes.repeat(gates.dim(0)?))
    }

    /// Shares of the means of alpha and beta over all tokens, and over the last tokens of prompts.
    fn gate_means(
        &self,
        pairs: &[&Pair],
        gates: &[Tensor],
        totals: Totals,
    ) -> Result<[f64; 4], TrainError> {
        let sequences = pairs.iter().flat_map(|pair| [&pair.better, &pair.worse]);
        let last = sequences.scan(0, |start, sequence| {
            let row = *start + sequence.answer - 1;
            *start += sequence.ids.len();
            Some(row)
        });
        let last: Vec<usize> = last.collect();
        let mut sums = [0.0; 4];
        for layer in gates {
            read(layer, |gates| {
                for (index, gate) in gates.iter().enumerate() {
                    sums[index % 2] += f64::from(*gate);
                }
                for row in &last {
                    for (sum, gate) in sums[2..].iter_mut().zip(gates.iter().skip(2 * row)) {
                        *sum += f64::from(*gate);
                    }
                }
            })?;
        }
        let layers = gates.len().max(1) as f64;
        let (tokens, ends) = (totals.tokens as f64, 2.0 * totals.items as f64);
        let [alpha, beta, alpha_last, beta_last] = sums.map(|sum| sum / layers);
        Ok([
            alpha / tokens,
            beta / tokens,
            alpha_last / ends,
            beta_last / ends,
        ])
    }

    fn shares(
        &self,
        items: &[&Pair],
        batch: Totals,
        tracked: bool,
    ) -> Result<Gradients, TrainError> {
        let folded = self.fold()?;
        let mut shares = in_chunks(items, &WATCHED, tokens, |chunk| {
            self.run(&folded, chunk, batch, tracked)
        })?;
        if tracked {
            shares.values = self.unfold(&shares.values);
        }
        Ok(shares)
    }
}

/// The gates of a layer.
fn learned(folded: &[Folded], layer: usize, tracked: bool) -> Gating {
    match folded.get(layer) {
        Some(gates) if tracked => Gating::Learned {
            weight: gates.weight.as_tensor().clone(),
            bias: gates.bias.as_tensor().clone(),
        },
        Some(gates) => Gating::Learned {
            weight: gates.weight.as_detached_tensor(),
            bias: gates.bias.as_detached_tensor(),
        },
        // There is one a layer.
        None => Gating::Fixed([0.0, 0.0]),
    }
}

/// [A_s ; A_h] and [s B_s | s B_h] of each layer; the lower rank is filled up with zeros.
fn stack_experts(
    base: &Base,
    safety: &checkpoint::Expert,
    helpfulness: &checkpoint::Expert,
) -> Result<Vec<(Tensor, Tensor)>, TrainError> {
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
        let low = Tensor::from_vec(low, (2 * rank, m), &Device::Cpu)?;
        stacked.push((low, Tensor::from_vec(high, (d, 2 * rank), &Device::Cpu)?));
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
        super::blocks::check(&self.parameters, values)?;
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

    fn gradients(&self, items: &[&Pair], batch: Totals) -> Result<Gradients, TrainError> {
        self.shares(items, batch, true)
    }

    fn evaluate(&self, items: &[&Pair], batch: Totals) -> Result<Gradients, TrainError> {
        self.shares(items, batch, false)
    }
}
