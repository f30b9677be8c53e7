//! Trainers of what `serve` serves (MIDPO.md 3): base (sft), reward and cost models, both experts (SPE-DPO), router. They write the
//! files that `checkpoint` and the authors' pipeline read.
//!
//! A trainer is an [`Objective`] (what moves, and what is better) and the loop, which knows nothing else. candle lives in
//! [`autograd`] alone: no type of it leaves that module, so that another engine can take its place.

pub mod autograd;
mod error;
mod example;
mod objective;

pub use error::TrainError;
pub use example::{Pair, Sequence};
pub use objective::{Gradients, Objective, Parameter, Totals};
