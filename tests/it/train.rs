//! Training: its numbers against the goldens of `tests/fixtures/tiny-routed/training`, and what must hold whatever the numbers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod fixture;
mod parity;
mod pipeline;
mod properties;
