//! `midpo health`: the health check of a container that has no curl.

use std::io::Write;
use std::process::ExitCode;

use super::CliError;
use crate::config::HealthOptions;

/// Reads `/ready`; exit code 0 where it answers 200.
pub(super) fn run(options: &HealthOptions) -> Result<ExitCode, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("the HTTP runtime"))?;
    let url = format!("{}/ready", options.url.trim_end_matches('/'));
    let remote = |reason: String| CliError::Remote {
        url: url.clone(),
        reason,
    };
    let status = runtime
        .block_on(async {
            let client = reqwest::Client::builder().timeout(options.timeout.0);
            let response = client.build()?.get(&url).send().await?;
            Ok::<_, reqwest::Error>(response.status())
        })
        .map_err(|error| remote(error.to_string()))?;
    if !status.is_success() {
        return Err(remote(format!("expected status 200, found {status}")));
    }
    writeln!(std::io::stdout(), "ready").map_err(CliError::io("standard output"))?;
    Ok(ExitCode::SUCCESS)
}
