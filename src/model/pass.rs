//! All ops of a step, in their order.

use super::collective::Rank;
use super::layer::{self, Activations};
use super::weights::Weights;
use crate::backend::{Backend, BackendError, ops};
use crate::checkpoint::LlamaConfig;

/// What a forward pass reads and writes, beside the step.
pub(super) struct Pass<'a, B: Backend> {
    pub weights: &'a Weights<B>,
    /// (positions, head_dim).
    pub rope: &'a B::Buffer,
    pub cache: &'a mut B::KvCache,
    pub activations: &'a mut Activations<B>,
    pub config: &'a LlamaConfig,
    pub rank: &'a mut Rank<B>,
}

impl<B: Backend> Pass<'_, B> {
    /// From tokens to the logits of `logit_rows` of the step's `rows`.
    pub(super) fn run(
        &mut self,
        backend: &mut B,
        step: &B::Step,
        (rows, logit_rows): (usize, usize),
    ) -> Result<(), BackendError> {
        let (weights, act) = (self.weights, &mut *self.activations);
        backend.embed(ops::Embed {
            step,
            table: &weights.embed,
            x: &mut act.x,
        })?;
        for (index, layer) in weights.layers.iter().enumerate() {
            let place = layer::Place {
                index,
                rows,
                step,
                config: self.config,
                rope: self.rope,
            };
            layer::forward(backend, layer, &place, self.cache, act, self.rank)?;
        }
        backend.gather_rows(ops::GatherRows {
            step,
            x: &act.x,
            y: &mut act.head_x,
        })?;
        backend.rms_norm(ops::RmsNorm {
            n: logit_rows,
            x: &act.head_x,
            weight: &weights.norm,
            eps: self.config.rms_norm_eps,
            y: &mut act.head_normed,
        })?;
        backend.matmul(ops::MatMul {
            n: logit_rows,
            x: &act.head_normed,
            w: weights.head.as_ref().unwrap_or(&weights.embed),
            y: &mut act.logits,
            add: false,
        })
    }
}
