//! `midpo` serves a routed Llama: a frozen base, a safety expert and a helpfulness expert (rank-r LoRAs on `mlp.down_proj`),
//! and a router that mixes the two per token and per layer (MidPO, arXiv 2506.02460).
//!
//! # A request's way
//! `server::chat` (JSON to token ids) -> [`engine::EngineHandle::submit`] -> `Engine::step` (receive, plan, forward, sample,
//! commit) -> [`model::RoutedLlama::forward`] -> an op of [`backend::Backend`]. Back: one event channel per request,
//! detokenised and cut at stop strings on the HTTP side.
//!
//! # Layers
//! | layer | module | may use |
//! |--:|---|---|
//! | 0 | [`types`] | |
//! | 0 | [`dtype`] | types |
//! | 0 | [`openai`] | types |
//! | 0 | [`metrics`] | types |
//! | 0 | [`random`] | |
//! | 0 | [`plot`] | |
//! | 1 | [`config`] | types |
//! | 1 | [`text`] | types |
//! | 1 | [`backend`] | types dtype |
//! | 1 | [`checkpoint`] | types dtype |
//! | 2 | [`demo`] | types random checkpoint |
//! | 2 | [`model`] | types dtype checkpoint backend |
//! | 3 | [`engine`] | types config metrics random backend model |
//! | 4 | [`server`] | types openai config metrics text engine |
//! | 4 | [`train`] | types dtype config plot random text checkpoint |
//! | 5 | [`bench`] | types openai config plot random |
//! | 5 | [`eval`] | types plot random text demo backend model engine train |
//! | 6 | [`cli`] | all |
//!
//! # Homes of crates
//! Types of a crate stay in the modules where it is at home; a crate that is not listed may be used anywhere.
//!
//! | crate | home |
//! |---|---|
//! | axum, tower, tower_http, subtle, uuid | server |
//! | utoipa | openai server |
//! | serde_path_to_error | openai |
//! | reqwest, indicatif | bench cli |
//! | tokio | engine server bench cli |
//! | futures_util | engine server bench eval cli |
//! | zip | checkpoint |
//! | safetensors | checkpoint train |
//! | memmap2 | checkpoint backend |
//! | sha2 | checkpoint engine train |
//! | tokenizers, minijinja, minijinja_contrib | text |
//! | jiff | text config |
//! | clap | config cli |
//! | figment, strsim | config |
//! | toml | demo eval cli |
//! | prometheus | metrics |
//! | tracing_subscriber | cli |
//! | half | dtype backend checkpoint |
//! | cudarc | backend |
//! | gemm_common, gemm_f32, ndarray, pulp | train |
//! | regex | eval |
//! | plotters | plot |
//! | candle_core, candle_nn, candle_transformers, proptest | tests |
//!
//! # Unsafe
//! `unsafe` is allowed in `backend/cpu`, `backend/cuda`, `backend/device`, `checkpoint/mmap.rs`, `train/autograd/ops/matrix.rs`, and nowhere else.
//!
//! `tests/it/architecture.rs` reads the three lists above and holds every module to them.
//!
//! # Invariants, mostly of what is absent
//! * `server` cannot reach `model`, `backend` or `checkpoint`: all it holds is an `EngineHandle`.
//! * Scheduler, block pool, prefix index and sampler have no clock, no I/O and no channel: tests simulate them.
//! * `model` has no `cfg(feature)`; it sees a `Backend`.
//! * No globals, no environment variable read outside `config`, no random number that is not keyed by (seed, position).
//! * A request or a file can make an error, never a panic.

pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod demo;
pub mod dtype;
pub mod engine;
pub mod eval;
pub mod metrics;
pub mod model;
pub mod openai;
pub mod plot;
pub mod random;
pub mod server;
pub mod text;
pub mod train;
pub mod types;
