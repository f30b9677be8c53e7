//! Trainers of what `serve` serves (MIDPO.md 3): base (sft), reward and cost models, both experts (SPE-DPO), router. They write the
//! files that `checkpoint` and the authors' pipeline read.
//!
//! [`stage`] is the way from files to files, one function a stage; [`data`] reads and encodes its examples. Beneath, a trainer is an
//! [`Objective`] (what moves, and what is better) and the loop, which knows nothing else. How gradients are computed is
//! [`autograd`]'s alone, so that another engine can take its place.

mod adamw;
pub mod autograd;
mod batches;
mod curves;
pub mod data;
mod error;
mod example;
mod files;
mod job;
mod objective;
mod progress;
mod run;
mod schedule;
mod scorer;
pub mod stage;
mod state;
mod workers;

pub use adamw::AdamWOptions;
pub use error::TrainError;
pub use example::{Pair, ScorePair, Sequence};
pub use job::{CURVES, Ended, Job, Length, METRICS, Report, RunOptions, STATE, Watch};
pub use objective::{Activations, Gradients, Objective, Parameter, Pass, Totals};
pub use progress::{Observer, Record, Unwatched};
pub use run::run;
pub use schedule::{Cosine, Warmup};
pub use scorer::Scorer;
