//! The engine: one thread that owns model, blocks and sequences.

mod error;
mod handle;
pub mod pool;
pub mod prefix;
mod random;
pub mod sampler;
pub mod scheduler;
pub mod sequence;

pub use error::SubmitError;
pub use handle::{
    EngineHandle, EngineHealth, EngineLimits, EngineState, Event, EventStream, GateDetail,
    GeneratedToken, Submission, TokenGates, TokenLogprobs,
};
