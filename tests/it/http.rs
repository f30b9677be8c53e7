//! The API over a real socket, a real engine and a tiny model.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod answers;
mod errors;
pub mod harness;
mod operation;
mod policy;
mod streams;
mod texts;
