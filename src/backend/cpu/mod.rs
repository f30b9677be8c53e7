//! The CPU backend.

pub mod limits;
