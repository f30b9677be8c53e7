//! One test binary: each file in `tests/` would link the crate again.

mod architecture;
mod bench;
mod checkpoint;
mod cli;
mod cuda;
mod demo;
mod docs;
mod eval;
mod gguf;
mod gguf_file;
mod golden;
mod http;
mod ops;
mod pairs;
mod simulation;
mod tensor_parallel;
mod text;
mod train;
