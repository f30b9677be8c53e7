//! `midpo`: parse, run, and say on standard error what went wrong.

use std::process::ExitCode;

fn main() -> ExitCode {
    midpo::cli::run(std::env::args_os())
}
