//! Benchmarks: a load generator that speaks HTTP only, so that it measures any OpenAI-compatible server, and the report of the
//! engine-only bench. What drives the bare engine is in `cli`: this module reaches no model.

mod arrivals;
mod client;
mod engine_report;
mod error;
mod load;
mod plot;
mod prompts;
mod report;
mod sse;
mod stats;

pub use arrivals::poisson;
pub use client::{Endpoint, Failure, Outcome, RequestRecord, RequestShape, Target, Usage};
pub use engine_report::{
    Bound, EngineReport, MachineFacts, Measurement, ModelFacts, RatioRow, ServerRow, Work,
};
pub use error::BenchError;
pub use load::{Job, Load, Run, run};
pub use plot::sweep_svg;
pub use prompts::{PromptSource, prepare};
pub use report::{Conditions, ErrorCount, Level, LoadReport, VariantRow};
pub use sse::{SseError, SseEvent, SseParser};
pub use stats::{Quantiles, Spread, ratios};
