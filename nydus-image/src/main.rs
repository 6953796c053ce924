//! The `nydus-image` program: parses the command line, runs one command, and turns
//! its outcome into an exit code. Everything else is in the library.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or layers that cannot be merged.

use std::process::ExitCode;

use clap::Parser as _;
use nydus_image::cli::{Cli, UsageError};
use nydus_image::merge::Incompatible;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output and are no failure.
            let code = if error.use_stderr() { 2 } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(report(&error)),
    }
}

/// Prints the whole chain of `error` once and picks the exit code.
#[allow(
    clippy::print_stderr,
    reason = "the one place that reports a failed command"
)]
fn report(error: &anyhow::Error) -> u8 {
    if let Some(usage) = error.downcast_ref::<UsageError>() {
        eprintln!("error: {usage}\n\nFor more information, try '--help'.");
        return 2;
    }
    // Not `{:?}` of anyhow, which may add a backtrace: that is for developers.
    eprintln!("Error: {error}");
    for (index, cause) in error.chain().skip(1).enumerate() {
        if index == 0 {
            eprintln!("\nCaused by:");
        }
        eprintln!("    {index}: {cause}");
    }
    if error
        .chain()
        .any(<dyn std::error::Error>::is::<Incompatible>)
    {
        2
    } else {
        1
    }
}
