//! One layer, forward and back: x += attention(norm(x)); x += mlp(norm(x)), with whatever is mixed into the MLP.

use super::mixture::{KeptMixture, LayerMixture, MixtureGradient};
use super::ops::{
    Attention, RmsNorm, add_linear, add_product, add_weight_gradient, linear, silu_mul,
    silu_mul_backward,
};

/// Blocks of a layer, in the order of [`Layer::take`].
pub(super) const LAYER_BLOCKS: usize = 6;

/// Weights of a layer.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    /// [q ; k ; v]: (width, d).
    qkv: &'a [f32],
    /// (d, heads * head_dim).
    output: &'a [f32],
    /// [gate ; up]: (2m, d).
    gate_up: &'a [f32],
    /// (d, m).
    down: &'a [f32],
    /// (d).
    input_norm: &'a [f32],
    /// (d).
    mlp_norm: &'a [f32],
    /// Of both norms.
    eps: f32,
}

/// Axes of a layer.
#[derive(Clone, Copy)]
pub(super) struct Axes {
    /// Residual stream.
    pub d: usize,
    /// MLP.
    pub m: usize,
}

/// What the way back needs of the way there, (n, ...) each.
pub(super) struct KeptLayer {
    x: Vec<f32>,
    normed: Vec<f32>,
    /// q and k turned.
    qkv: Vec<f32>,
    softmax: Vec<f32>,
    attended: Vec<f32>,
    /// Between attention and MLP.
    middle: Vec<f32>,
    middle_normed: Vec<f32>,
    gate_up: Vec<f32>,
    h: Vec<f32>,
    mixture: KeptMixture,
}

impl KeptLayer {
    /// (n, 2): alpha and beta; `None` without a router.
    pub(super) fn gates(&self) -> Option<&[f32]> {
        self.mixture.gates()
    }

    /// What the layer took, (n, d): all that [`Layer::forward`] needs to give the rest again.
    pub(super) fn input(self) -> Vec<f32> {
        self.x
    }
}

/// Gradients of a layer's weights, in the order of its blocks; `None`: frozen.
type LayerGradients<'a> = Option<&'a mut [Vec<f32>; LAYER_BLOCKS]>;

impl<'a> Layer<'a> {
    /// Of [`LAYER_BLOCKS`] blocks.
    pub(super) fn take(blocks: &'a [Vec<f32>; LAYER_BLOCKS], eps: f32) -> Self {
        let [qkv, output, gate_up, down, input_norm, mlp_norm] = blocks;
        Self {
            qkv,
            output,
            gate_up,
            down,
            input_norm,
            mlp_norm,
            eps,
        }
    }

    fn norm(&self, weight: &'a [f32]) -> RmsNorm<'a> {
        let eps = self.eps;
        RmsNorm { weight, eps }
    }

    /// x (n, d) to the next layer's.
    pub(super) fn forward(
        &self,
        x: Vec<f32>,
        axes: Axes,
        attention: &Attention<'_>,
        mixture: LayerMixture<'_>,
    ) -> (Vec<f32>, KeptLayer) {
        let Axes { d, m } = axes;
        let normed = self.norm(self.input_norm).forward(&x);
        let mut qkv = linear(&normed, self.qkv, d);
        let (attended, softmax) = attention.forward(&mut qkv);
        let mut middle = x.clone();
        add_linear(
            &mut middle,
            1.0,
            &attended,
            self.output,
            self.output.len() / d,
        );
        let middle_normed = self.norm(self.mlp_norm).forward(&middle);
        let gate_up = linear(&middle_normed, self.gate_up, d);
        let h = silu_mul(&gate_up, m);
        let mut next = middle.clone();
        add_linear(&mut next, 1.0, &h, self.down, m);
        let kept_mixture = mixture.forward(&h, m, &mut next);
        let kept = KeptLayer {
            x,
            normed,
            qkv,
            softmax,
            attended,
            middle,
            middle_normed,
            gate_up,
            h,
            mixture: kept_mixture,
        };
        (next, kept)
    }

    /// dx (n, d) of what the layer gave, to that of what it took. With `Way::Mixture` the way ends at the mixture.
    pub(super) fn backward(
        &self,
        kept: KeptLayer,
        axes: Axes,
        attention: &Attention<'_>,
        mixture: LayerMixture<'_>,
        gradients: BackGradients<'_>,
        dx: &mut [f32],
    ) {
        let Axes { d, m } = axes;
        let BackGradients {
            weights,
            mixture: moved,
            way,
        } = gradients;
        let mut dh = vec![0.0; kept.h.len()];
        if way == Way::Through {
            add_product(&mut dh, 1.0, dx, self.down, m);
        }
        mixture.backward(&kept.mixture, &kept.h, m, dx, &mut dh, moved);
        if way == Way::Mixture {
            return;
        }
        let [dqkv, doutput, dgate_up, ddown, dinput_norm, dmlp_norm] = match weights {
            Some(weights) => weights.each_mut().map(|w| Some(w.as_mut_slice())),
            None => [const { None }; LAYER_BLOCKS],
        };
        weight_gradient(ddown, dx, &kept.h, m);
        let mut moved = kept.gate_up;
        silu_mul_backward(&mut moved, &dh, m);
        weight_gradient(dgate_up, &moved, &kept.middle_normed, d);
        let mut dnormed = vec![0.0; dx.len()];
        add_product(&mut dnormed, 1.0, &moved, self.gate_up, d);
        self.norm(self.mlp_norm)
            .backward(&kept.middle, &dnormed, dx, dmlp_norm);
        let width = self.output.len() / d;
        weight_gradient(doutput, dx, &kept.attended, width);
        let mut dattended = vec![0.0; kept.attended.len()];
        add_product(&mut dattended, 1.0, dx, self.output, width);
        let moved = attention.backward(&kept.qkv, &kept.softmax, &dattended);
        weight_gradient(dqkv, &moved, &kept.normed, d);
        dnormed.fill(0.0);
        add_product(&mut dnormed, 1.0, &moved, self.qkv, d);
        self.norm(self.input_norm)
            .backward(&kept.x, &dnormed, dx, dinput_norm);
    }
}

/// How far back a layer goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// To what it took: something trained is below.
    Through,
    /// To its mixture: nothing below is trained.
    Mixture,
}

/// Where a layer's gradients are added up.
pub(super) struct BackGradients<'a> {
    /// Its own.
    pub weights: LayerGradients<'a>,
    /// Those of what is mixed in.
    pub mixture: MixtureGradient<'a>,
    /// How far.
    pub way: Way,
}

fn weight_gradient(dw: Option<&mut [f32]>, dy: &[f32], x: &[f32], k: usize) {
    if let Some(dw) = dw {
        add_weight_gradient(dw, 1.0, dy, x, k);
    }
}
