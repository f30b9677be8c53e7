//! What is added to `W_down h` of a layer: nothing, one expert, or both weighed by their gates (MIDPO.md 1).

use super::ops::{
    add_linear, add_product, add_weight_gradient, gates, gates_backward, linear, mix, mix_backward,
};

/// In every layer of a model.
pub(super) enum Mixture<'a> {
    /// Nothing.
    Base,
    /// s B A h of one expert, its gate 1.
    Expert {
        /// A (r, m), B (d, r), A, B, ...: two a layer.
        blocks: &'a [Vec<f32>],
        /// r.
        rank: usize,
        /// s.
        scale: f32,
    },
    /// Both experts, each weighed by its gate.
    Routed {
        /// One a layer.
        experts: &'a [BothExperts],
        /// 2r.
        width: usize,
        /// Where the gates come from.
        gating: Gating<'a>,
    },
}

/// Both experts of a layer.
pub(super) struct BothExperts {
    /// [A_s ; A_h]: (2r, m).
    pub low: Vec<f32>,
    /// [s B_s | s B_h]: (d, 2r).
    pub high: Vec<f32>,
}

/// Where gates come from.
#[derive(Clone, Copy)]
pub(super) enum Gating<'a> {
    /// The folded router: [a ; b] (2, m), [a0 ; b0] (2), two blocks a layer.
    Learned(&'a [Vec<f32>]),
    /// The same for every token: alpha, beta.
    Fixed([f32; 2]),
}

/// In one layer.
#[derive(Clone, Copy)]
pub(super) enum LayerMixture<'a> {
    Base,
    Expert {
        a: &'a [f32],
        b: &'a [f32],
        rank: usize,
        scale: f32,
    },
    Routed {
        experts: &'a BothExperts,
        width: usize,
        gating: LayerGating<'a>,
    },
}

/// Where one layer's gates come from.
#[derive(Clone, Copy)]
pub(super) enum LayerGating<'a> {
    Learned { weight: &'a [f32], bias: &'a [f32] },
    Fixed([f32; 2]),
}

/// What the way back needs.
pub(super) enum KeptMixture {
    Base,
    /// A h: (n, r).
    Expert(Vec<f32>),
    Routed {
        /// [A_s h ; A_h h]: (n, 2r).
        low: Vec<f32>,
        /// (n, 2).
        gates: Vec<f32>,
    },
}

impl KeptMixture {
    pub(super) fn gates(&self) -> Option<&[f32]> {
        match self {
            Self::Routed { gates, .. } => Some(gates),
            Self::Base | Self::Expert(_) => None,
        }
    }
}

/// Where gradients of a layer's mixture are added up.
pub(super) struct MixtureGradient<'a> {
    /// Of A and B, or of the folded router's weight and bias; `None`: frozen.
    pub blocks: Option<&'a mut [Vec<f32>; 2]>,
    /// What the loss adds to every row's d gates: the regulariser.
    pub gate_slopes: [f32; 2],
}

impl Mixture<'_> {
    /// In layer `index`.
    pub(super) fn layer(&self, index: usize) -> LayerMixture<'_> {
        match self {
            Self::Base => LayerMixture::Base,
            Self::Expert {
                blocks,
                rank,
                scale,
            } => match blocks.get(2 * index..2 * index + 2) {
                Some([a, b]) => LayerMixture::Expert {
                    a,
                    b,
                    rank: *rank,
                    scale: *scale,
                },
                _ => LayerMixture::Base,
            },
            Self::Routed {
                experts,
                width,
                gating,
            } => match experts.get(index) {
                Some(experts) => LayerMixture::Routed {
                    experts,
                    width: *width,
                    gating: gating.layer(index),
                },
                None => LayerMixture::Base,
            },
        }
    }
}

impl<'a> Gating<'a> {
    fn layer(self, index: usize) -> LayerGating<'a> {
        match self {
            Self::Fixed(gates) => LayerGating::Fixed(gates),
            Self::Learned(blocks) => match blocks.get(2 * index..2 * index + 2) {
                Some([weight, bias]) => LayerGating::Learned { weight, bias },
                _ => LayerGating::Fixed([0.0, 0.0]),
            },
        }
    }
}

impl LayerGating<'_> {
    /// (n, 2) of h (n, m).
    fn gates(self, h: &[f32], m: usize) -> Vec<f32> {
        match self {
            Self::Learned { weight, bias } => {
                let mut values = linear(h, weight, m);
                gates(&mut values, bias);
                values
            }
            Self::Fixed(gates) => gates.repeat(h.len() / m.max(1)),
        }
    }
}

impl LayerMixture<'_> {
    /// Adds to x (n, d) what is mixed in for h (n, m).
    pub(super) fn forward(self, h: &[f32], m: usize, x: &mut [f32]) -> KeptMixture {
        match self {
            Self::Base => KeptMixture::Base,
            Self::Expert { a, b, rank, scale } => {
                let low = linear(h, a, m);
                add_linear(x, scale, &low, b, rank);
                KeptMixture::Expert(low)
            }
            Self::Routed {
                experts,
                width,
                gating,
            } => {
                let gates = gating.gates(h, m);
                let low = linear(h, &experts.low, m);
                add_linear(x, 1.0, &mix(&low, &gates, width), &experts.high, width);
                KeptMixture::Routed { low, gates }
            }
        }
    }

    /// Adds to dh (n, m) what dx (n, d) moves through the mixture.
    pub(super) fn backward(
        self,
        kept: &KeptMixture,
        h: &[f32],
        m: usize,
        dx: &[f32],
        dh: &mut [f32],
        gradient: MixtureGradient<'_>,
    ) {
        match (self, kept) {
            (Self::Expert { a, b, rank, scale }, KeptMixture::Expert(low)) => {
                let mut dlow = vec![0.0; low.len()];
                add_product(&mut dlow, scale, dx, b, rank);
                if let Some([da, db]) = gradient.blocks {
                    add_weight_gradient(db, scale, dx, low, rank);
                    add_weight_gradient(da, 1.0, &dlow, h, m);
                }
                add_product(dh, 1.0, &dlow, a, m);
            }
            (
                Self::Routed {
                    experts,
                    width,
                    gating,
                },
                KeptMixture::Routed { low, gates },
            ) => {
                let mut du = vec![0.0; low.len()];
                add_product(&mut du, 1.0, dx, &experts.high, width);
                let mut dgates = mix_backward(low, gates, &mut du, width);
                add_product(dh, 1.0, &du, &experts.low, m);
                let LayerGating::Learned { weight, .. } = gating else {
                    return;
                };
                for (d, slope) in dgates.iter_mut().zip(gradient.gate_slopes.iter().cycle()) {
                    *d += slope;
                }
                let mut unseen = [Vec::new(), vec![0.0; 2]];
                let wanted = gradient.blocks.is_some();
                let [dweight, dbias] = gradient.blocks.unwrap_or(&mut unseen);
                gates_backward(gates, &mut dgates, dbias);
                if wanted {
                    add_weight_gradient(dweight, 1.0, &dgates, h, m);
                }
                add_product(dh, 1.0, &dgates, weight, m);
            }
            _ => {}
        }
    }
}
