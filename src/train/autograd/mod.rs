//! What is trained, over candle's autograd on the CPU: forward, loss and gradient of each [`crate::train::Objective`]. No type of
//! candle leaves this module.
//!
//! `ops` are the nodes of the graph; `llama` the forward pass made of them; `weights` and `blocks` what is trained and by which
//! names; `batch` lays sequences end to end; `preference` is SPE-DPO. Then the objectives: [`Sft`], [`ScoreModel`], [`Expert`] and
//! [`Router`], the last two on a frozen [`Base`].
//!
//! Each runs on the calling thread, in whose rayon pool candle's matmuls run too.

mod base;
mod batch;
mod blocks;
mod expert;
mod fold;
mod llama;
mod ops;
mod preference;
mod router;
mod score;
mod sft;
mod weights;

pub use base::{Base, Positions};
pub use expert::{Expert, ExpertOptions};
pub use router::{FixedGates, Router, RouterOptions};
pub use score::{ScoreKind, ScoreModel, ScoreTensors};
pub use sft::{Sft, SftOptions};

use candle_core::{Device, Tensor};

use super::TrainError;

impl From<candle_core::Error> for TrainError {
    fn from(error: candle_core::Error) -> Self {
        Self::Engine(error.to_string())
    }
}

/// A tensor as files hold it: name, row-major axes, numbers.
pub type NamedTensor = (String, Vec<usize>, Vec<f32>);

/// sum(slopes * values), whose gradient is `slopes`: losses are worked out in f64 outside the graph, which only needs to know how
/// they move with each of its results.
fn weighted_sum(values: &Tensor, slopes: &[f64]) -> candle_core::Result<Tensor> {
    let slopes: Vec<f32> = slopes.iter().map(|slope| *slope as f32).collect();
    let slopes = Tensor::from_vec(slopes, values.shape(), &Device::Cpu)?;
    (values * slopes)?.sum_all()
}
