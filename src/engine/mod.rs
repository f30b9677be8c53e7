//! The engine: one thread that owns model, blocks and sequences.

mod error;
mod handle;

pub use error::SubmitError;
pub use handle::{
    Command, EngineHandle, EngineLimits, EngineShared, EngineState, Event, EventStream, GateDetail,
    GeneratedToken, Submission, TokenGates, TokenLogprobs,
};
