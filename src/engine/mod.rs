//! The engine: one thread that owns model, blocks and sequences.

mod error;
mod handle;

pub use error::SubmitError;
pub use handle::{
    EngineHandle, EngineHealth, EngineLimits, EngineState, Event, EventStream, GateDetail,
    GeneratedToken, Submission, TokenGates, TokenLogprobs,
};
