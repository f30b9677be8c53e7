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
//! | 0 | [`types`], [`dtype`], [`openai`], [`metrics`] | dtype, metrics: types |
//! | 1 | [`config`], [`text`], [`backend`], [`checkpoint`] | types, dtype |
//! | 2 | [`demo`], [`model`] | checkpoint, backend |
//! | 3 | [`engine`] | config, metrics, backend, model |
//! | 4 | [`server`] | openai, config, metrics, text, engine |
//! | 5 | [`bench`] | openai, config |
//! | 6 | `cli` | all |
//!
//! `tests/it/architecture.rs` reads the `use` lines and holds every module to this table.
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
pub mod metrics;
pub mod model;
pub mod openai;
pub mod server;
pub mod text;
pub mod types;
