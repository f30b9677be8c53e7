//! `midpo serve`.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{CliError, engine, logging};
use crate::config::{ServeConfig, ServeOptions};
use crate::engine::EngineState;
use crate::metrics::Metrics;
use crate::server::{self, AppState, Ended};

/// Serves until a signal, or until the engine dies.
pub(super) fn run(options: &ServeOptions) -> Result<ExitCode, CliError> {
    let config = options.validate()?;
    logging::start(&options.log)?;
    if options.check {
        return check(&config);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("the HTTP runtime"))?;
    let code = runtime.block_on(serve(config));
    // A tokenisation that is still running must not hold the process back.
    runtime.shutdown_background();
    code
}

/// Prints the memory's budget.
fn check(config: &ServeConfig) -> Result<ExitCode, CliError> {
    let budget = engine::check(&config.model, &config.runtime)?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{budget}").map_err(CliError::io("standard output"))?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(config: ServeConfig) -> Result<ExitCode, CliError> {
    // Bound before the model is loaded: a port that is taken is an error at once, not after minutes.
    let listener = TcpListener::bind((config.host.as_str(), config.port))
        .await
        .map_err(CliError::io(format!(
            "--host {} --port {}",
            config.host, config.port
        )))?;
    let address = listener
        .local_addr()
        .map_err(CliError::io("the listener's address"))?;
    warn_if_open(&config, address.ip().is_loopback());
    let metrics = Arc::new(Metrics::new(&config.server.served_model_name));
    let started = engine::start(&config.model, &config.runtime, Arc::clone(&metrics))?;
    let signals = Signals::new()?;
    announce(&format!("listening on http://{address}"));
    let state = AppState::new(started.handle, started.model, config.server, metrics);
    let ended = server::serve(listener, state, signals.first(), config.drain_timeout)
        .await
        .map_err(CliError::io("the HTTP server"))?;
    match ended {
        Ended::EngineDead => return Err(CliError::EngineDead),
        Ended::CutOff { requests } => {
            tracing::warn!(requests, "the drain timeout is over: requests were cut off");
            return Ok(ExitCode::SUCCESS);
        }
        Ended::Drained => {}
    }
    let joined = tokio::task::spawn_blocking(|| started.thread.join()).await;
    match joined {
        Ok(EngineState::Dead) | Err(_) => Err(CliError::EngineDead),
        Ok(_) => {
            tracing::info!("drained");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The first line on standard output, for whoever started this process.
fn announce(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let said = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    if let Err(error) = said {
        tracing::warn!(%error, "standard output is closed");
    }
    tracing::info!("{line}");
}

fn warn_if_open(config: &ServeConfig, is_loopback: bool) {
    if config.server.api_keys.is_empty() && !is_loopback {
        tracing::warn!(
            host = config.host,
            "no API key is configured: whoever reaches this address may use the model, every variant of it"
        );
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(CliError::io("signal handlers"));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Completes at the first signal. The second one ends the process at once.
    async fn first(mut self) {
        let name = self.next().await;
        tracing::info!(
            "{name}: no new requests are taken; a second signal ends the process at once"
        );
        tokio::spawn(async move {
            let name = self.next().await;
            tracing::warn!("{name} again: ending at once");
            std::process::exit(1);
        });
    }
}
