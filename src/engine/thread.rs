//! The engine's thread: its start, its end, and what happens when it panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use super::handle::EngineState;
use super::{Engine, EngineHandle};
use crate::backend::Backend;
use crate::config::EngineConfig;
use crate::metrics::Metrics;
use crate::model::RoutedLlama;

/// What the clients of a dead engine are told.
const DEATH: &str = "the engine has died";

/// Joins the engine's thread.
pub struct EngineThread(JoinHandle<EngineState>);

impl EngineThread {
    /// Waits for the engine's end: [`EngineState::Stopped`] or [`EngineState::Dead`].
    pub fn join(self) -> EngineState {
        // A panic is caught inside; one that got out anyway is a death.
        self.0.join().unwrap_or(EngineState::Dead)
    }
}

impl<B: Backend> Engine<B> {
    /// Builds an engine and runs it on a thread of its own.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn spawn(
        model: RoutedLlama<B>,
        config: &EngineConfig,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(EngineHandle, EngineThread)> {
        let (handle, engine) = Self::new(model, config, metrics);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(|| engine.run())?;
        Ok((handle, EngineThread(thread)))
    }

    /// Runs to the end. A panic or a device that is given up ends every open request with an error.
    pub fn run(mut self) -> EngineState {
        // Unwind safe: after a panic only the requests' channels are used.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let state = match outcome {
            Ok(Ok(())) => EngineState::Stopped,
            Ok(Err(error)) => {
                tracing::error!(%error, "the engine gives up: the device fails again and again");
                EngineState::Dead
            }
            Err(panic) => {
                let reason = panic_message(panic.as_ref());
                tracing::error!(reason, "the engine thread panicked");
                EngineState::Dead
            }
        };
        self.end(state);
        state
    }

    /// Tells every client first, then everyone who waits for the end: the process may exit at once.
    fn end(&mut self, state: EngineState) {
        for admission in self.inbox.close() {
            admission.refuse(DEATH);
        }
        self.sessions.fail_all(DEATH, Instant::now());
        self.inbox.end(state);
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
