//! A Llama over sequences laid end to end, without padding: forward, and back to whatever is trained.

use std::sync::Arc;

use super::batch::Batch;
use super::layer::{Axes, BackGradients, KeptLayer, LAYER_BLOCKS, Layer, Way};
use super::mixture::{Mixture, MixtureGradient};
use super::ops::{Attention, Heads, RmsNorm, TokenLogProbs, add_scaled, token_log_probs};
use crate::checkpoint::{LlamaConfig, rope_table};
use crate::train::{Activations, Pass};

/// What all models of a configuration share.
pub(super) struct Shape {
    /// As in the checkpoint.
    pub config: LlamaConfig,
    /// (positions, head_dim).
    rope: Vec<f32>,
}

impl Shape {
    /// Positions as the model was made for, so that stretched tables are those that it is served with.
    pub(super) fn new(config: LlamaConfig) -> Arc<Self> {
        let rope = rope_table(&config, config.max_position_embeddings);
        Arc::new(Self { config, rope })
    }

    fn attention<'a>(&'a self, lengths: &'a [usize]) -> Attention<'a> {
        Attention {
            heads: Heads {
                query: self.config.num_heads,
                kv: self.config.num_kv_heads,
                size: self.config.head_dim,
            },
            rope: &self.rope,
            lengths,
        }
    }

    fn axes(&self) -> Axes {
        Axes {
            d: self.config.hidden_size,
            m: self.config.intermediate_size,
        }
    }
}

/// Weights of a trunk, as [`super::weights::Weights::trunk`] orders its blocks: embedding, layers, last norm. What follows (a head)
/// is the caller's.
#[derive(Clone, Copy)]
pub(super) struct Llama<'a> {
    /// Configuration and rope.
    pub shape: &'a Shape,
    blocks: &'a [Vec<f32>],
}

/// Gradients of a trunk's blocks; the same order.
pub(super) type TrunkGradients<'a> = Option<&'a mut [Vec<f32>]>;

/// What a forward pass leaves.
pub(super) struct Hidden {
    /// (n, d): the residual stream before the last norm.
    pub x: Vec<f32>,
    /// Alpha and beta of every token, (n, 2) a layer; none without a router.
    pub gates: Vec<Vec<f32>>,
    /// One a layer; none where no pass back follows.
    traces: Vec<Trace>,
}

/// What a layer leaves for the way back.
enum Trace {
    All(Box<KeptLayer>),
    /// What it took, (n, d).
    Input(Vec<f32>),
}

/// Rows whose log-probabilities were taken.
pub(super) struct Predicted {
    /// What the head said.
    pub tokens: TokenLogProbs,
    rows: Vec<usize>,
    /// (rows, d): before and after the last norm.
    chosen: Vec<f32>,
    normed: Vec<f32>,
}

impl<'a> Llama<'a> {
    pub(super) fn new(shape: &'a Shape, blocks: &'a [Vec<f32>]) -> Self {
        Self { shape, blocks }
    }

    /// Blocks of the trunk.
    pub(super) fn count(config: &LlamaConfig) -> usize {
        2 + LAYER_BLOCKS * config.num_layers
    }

    /// (vocabulary, d).
    pub(super) fn embedding(&self) -> &'a [f32] {
        self.blocks.first().map_or(&[], |block| block)
    }

    fn layers(&self) -> impl DoubleEndedIterator<Item = Layer<'a>> + ExactSizeIterator {
        let eps = self.shape.config.rms_norm_eps;
        let (layers, _) = self.blocks.get(1..).unwrap_or_default().as_chunks();
        let layers = layers.iter().take(self.shape.config.num_layers);
        layers.map(move |blocks| Layer::take(blocks, eps))
    }

    /// The last norm.
    pub(super) fn norm(&self) -> RmsNorm<'a> {
        let at = Self::count(&self.shape.config) - 1;
        RmsNorm {
            weight: self.blocks.get(at).map_or(&[], |block| block),
            eps: self.shape.config.rms_norm_eps,
        }
    }

    /// Sequences of `lengths` tokens, their `ids` end to end, checked by [`Batch::push`].
    pub(super) fn forward(&self, batch: &Batch, mixture: &Mixture<'_>, pass: Pass) -> Hidden {
        let d = self.shape.config.hidden_size;
        let mut x = rows_of(self.embedding(), d, &batch.ids);
        let attention = self.shape.attention(&batch.lengths);
        let (mut gates, mut traces) = (Vec::new(), Vec::new());
        for (index, layer) in self.layers().enumerate() {
            let mixture = mixture.layer(index);
            let (next, layer) = layer.forward(x, self.shape.axes(), &attention, mixture);
            x = next;
            gates.extend(layer.gates().map(<[f32]>::to_vec));
            match pass {
                Pass::Back(Activations::Kept) => traces.push(Trace::All(Box::new(layer))),
                Pass::Back(Activations::Checkpointed) => traces.push(Trace::Input(layer.input())),
                Pass::Forward => {}
            }
        }
        Hidden { x, gates, traces }
    }

    /// From dx (n, d) of what [`Llama::forward`] gave (with [`Pass::Back`]) to the gradients of the trunk, of the mixture (two blocks a layer), or of both.
    pub(super) fn backward(
        &self,
        batch: &Batch,
        hidden: Hidden,
        mixture: &Mixture<'_>,
        mut dx: Vec<f32>,
        gradients: PassGradients<'_>,
    ) {
        let PassGradients {
            trunk,
            mixture: mixture_blocks,
            gate_slopes,
        } = gradients;
        let d = self.shape.config.hidden_size;
        let (dembedding, dlayers) = trunk.and_then(<[_]>::split_first_mut).unzip();
        let dlayers = dlayers
            .unwrap_or_default()
            .as_chunks_mut::<LAYER_BLOCKS>()
            .0;
        let mut dlayers: Vec<_> = dlayers.iter_mut().collect();
        dlayers.truncate(self.shape.config.num_layers);
        let mut dmixtures: Vec<_> = mixture_blocks.as_chunks_mut::<2>().0.iter_mut().collect();
        let attention = self.shape.attention(&batch.lengths);
        let layers = self.layers().enumerate().rev();
        for ((index, layer), trace) in layers.zip(hidden.traces.into_iter().rev()) {
            let (axes, mixture) = (self.shape.axes(), mixture.layer(index));
            let kept = match trace {
                Trace::All(kept) => *kept,
                Trace::Input(x) => layer.forward(x, axes, &attention, mixture).1,
            };
            let weights = dlayers.pop();
            let way = if index > 0 || weights.is_some() {
                Way::Through
            } else {
                Way::Mixture
            };
            let gradients = BackGradients {
                weights,
                mixture: MixtureGradient {
                    blocks: dmixtures.pop(),
                    gate_slopes,
                },
                way,
            };
            layer.backward(kept, axes, &attention, mixture, gradients, &mut dx);
        }
        if let Some(dembedding) = dembedding {
            add_rows(dembedding, d, &batch.ids, &dx);
        }
    }

    /// Log-probabilities of the batch's targets, head (vocabulary, d).
    pub(super) fn predict(&self, batch: &Batch, hidden: &Hidden, head: &[f32]) -> Predicted {
        let d = self.shape.config.hidden_size;
        let chosen = rows_of(&hidden.x, d, &batch.rows);
        let normed = self.norm().forward(&chosen);
        Predicted {
            tokens: token_log_probs(&normed, head, d, batch.targets.clone()),
            rows: batch.rows.clone(),
            chosen,
            normed,
        }
    }

    /// From d loss / d log-probability to dx (n, d) for [`Llama::backward`], adding up what the head and the last norm of the trunk
    /// move by.
    pub(super) fn predict_backward(
        &self,
        predicted: Predicted,
        hidden: &Hidden,
        head: &[f32],
        slopes: &[f32],
        dhead: Option<&mut [f32]>,
        dnorm: Option<&mut [f32]>,
    ) -> Vec<f32> {
        let d = self.shape.config.hidden_size;
        let Predicted {
            tokens,
            rows,
            chosen,
            normed,
        } = predicted;
        let dnormed = tokens.backward(&normed, head, d, slopes, dhead);
        self.rows_backward(&rows, &chosen, &dnormed, dnorm, hidden.x.len())
    }

    /// From what the last norm of some rows gave back to dx (n, d), of `len` numbers.
    pub(super) fn rows_backward(
        &self,
        rows: &[usize],
        chosen: &[f32],
        dnormed: &[f32],
        dnorm: Option<&mut [f32]>,
        len: usize,
    ) -> Vec<f32> {
        let mut dchosen = vec![0.0; chosen.len()];
        self.norm().backward(chosen, dnormed, &mut dchosen, dnorm);
        let mut dx = vec![0.0; len];
        add_rows(&mut dx, self.shape.config.hidden_size, rows, &dchosen);
        dx
    }
}

/// Where a pass back adds its gradients up.
pub(super) struct PassGradients<'a> {
    /// Of the trunk; `None`: frozen.
    pub trunk: TrunkGradients<'a>,
    /// Of the mixture, two blocks a layer; empty: frozen.
    pub mixture: &'a mut [Vec<f32>],
    /// What the loss adds to every token's and layer's d gates.
    pub gate_slopes: [f32; 2],
}

/// Some rows of a matrix of `d` columns.
pub(super) fn rows_of(matrix: &[f32], d: usize, rows: &[usize]) -> Vec<f32> {
    let mut chosen = Vec::with_capacity(rows.len() * d);
    for row in rows {
        chosen.extend_from_slice(matrix.get(row * d..(row + 1) * d).unwrap_or_default());
    }
    chosen
}

/// The way back through [`rows_of`]: adds each to its row.
fn add_rows(matrix: &mut [f32], d: usize, rows: &[usize], values: &[f32]) {
    for (row, values) in rows.iter().zip(values.chunks_exact(d.max(1))) {
        if let Some(sums) = matrix.get_mut(row * d..(row + 1) * d) {
            add_scaled(sums, 1.0, values);
        }
    }
}
