//! The log: one subscriber for the process, set once, writing to standard error.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::config::{ConfigError, LogFormat, LogOptions};

/// Starts logging. A second call (in tests of this process) changes nothing.
/// # Errors
/// A `log_level` that is no level and no filter.
pub(super) fn start(options: &LogOptions) -> Result<(), ConfigError> {
    let filter = EnvFilter::builder()
        .parse(&options.log_level)
        .map_err(|error| ConfigError::Invalid {
            origin: "--log-level".to_owned(),
            key: "log_level".to_owned(),
            reason: format!(
                "expected error, warn, info, debug, trace or a filter such as `info,midpo=debug`, found `{}` ({error})",
                options.log_level
            ),
        })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::NONE)
        .with_writer(std::io::stderr);
    // Fails only where a subscriber is set already.
    let _ = match options.log_format {
        LogFormat::Text => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            builder.with_ansi(ansi).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}
