//! What is trained: forward, loss and gradient of each [`crate::train::Objective`], on the CPU, each on the thread that calls.
//!
//! `ops` are the operations with their ways back; `layer`, `mixture` and `llama` the model made of them, its way back written out;
//! `weights` and `blocks` what is trained and by which names; `batch` lays sequences end to end; `preference` is SPE-DPO. Then the
//! objectives: [`Sft`], [`ScoreModel`], [`Expert`] and [`Router`], the last two on a frozen [`Base`].
//!
//! A first version was a graph of candle's. It asks the system for the number of CPUs at every matmul (40 us), adds gradients up through one
//! pool behind one lock, and computes gradients of frozen weights: half of two cores. It is now what the tests compare each operation with.

mod base;
mod batch;
mod blocks;
mod expert;
mod fold;
mod layer;
mod llama;
mod mixture;
mod ops;
mod preference;
mod router;
mod score;
mod sft;
mod shares;
mod weights;

pub use base::{Base, Positions};
pub use expert::{Expert, ExpertOptions};
pub use router::{FixedGates, Router, RouterOptions};
pub use score::{ScoreKind, ScoreModel, ScoreTensors};
pub use sft::{Sft, SftOptions};

/// A tensor as files hold it: name, row-major axes, numbers.
pub type NamedTensor = (String, Vec<usize>, Vec<f32>);
