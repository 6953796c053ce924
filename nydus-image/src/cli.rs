//! The command line: global options and the list of commands.
//!
//! The options of a command are declared beside its code (`create/args.rs`,
//! `merge.rs`, `check.rs`); this file joins them.

use std::path::PathBuf;

use anyhow::bail;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Parser, Subcommand};

use crate::{
    check, convert, create, export, inspect, logging, merge, preheat, stat, unpack, version,
};

/// Build, merge, check and look into lazily loaded container images (RAFS v6).
#[derive(Debug, Parser)]
#[command(
    name = "nydus-image",
    version = version::BLOCK,
    max_term_width = 100,
    after_help = "Every command explains itself: nydus-image <COMMAND> --help"
)]
pub struct Cli {
    /// Append log lines to this file instead of standard error
    #[arg(
        short = 'L',
        long,
        global = true,
        value_name = "log-file",
        help_heading = "Logging"
    )]
    log_file: Option<PathBuf>,

    /// Least important level to log: trace, debug, info, warn or error
    #[arg(
        short = 'l',
        long,
        global = true,
        value_name = "log-level",
        default_value = "info",
        value_parser = parse_level,
        help_heading = "Logging"
    )]
    log_level: tracing::Level,

    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do.
#[derive(Debug, Subcommand)]
enum Command {
    Create(Box<create::Args>),
    Merge(merge::Args),
    Check(check::Args),
    Convert(Box<convert::Args>),
    Preheat(preheat::Args),
    Inspect(inspect::Args),
    Stat(stat::Args),
    Unpack(unpack::Args),
    Export(export::Args),
    /// Not supported: the blobs of an image are not rewritten
    #[command(hide = true)]
    Compact(Anything),
    /// Not supported: any bootstrap serves as --chunk-dict
    #[command(hide = true)]
    Chunkdict(Anything),
    /// Not supported: choose what to prefetch with --prefetch-policy
    #[command(hide = true)]
    Optimize(Anything),
}

// Options of a command that other builders have: never looked at.
#[derive(Debug, clap::Args)]
struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    words: Vec<std::ffi::OsString>,
}

impl Cli {
    /// Starts logging and runs the command.
    ///
    /// # Errors
    /// Whatever made the command fail; [`UsageError`] if its options contradict each other.
    pub fn run(self) -> anyhow::Result<()> {
        logging::start(self.log_level, self.log_file.as_deref())?;
        match self.command {
            Some(Command::Create(args)) => create::run(*args),
            Some(Command::Merge(args)) => merge::run(&args),
            Some(Command::Check(args)) => check::run(&args),
            Some(Command::Convert(args)) => convert::run(&args),
            Some(Command::Preheat(args)) => preheat::run(&args),
            Some(Command::Inspect(args)) => inspect::run(&args),
            Some(Command::Stat(args)) => stat::run(&args),
            Some(Command::Unpack(args)) => unpack::run(&args),
            Some(Command::Export(args)) => export::run(&args),
            Some(Command::Compact(_)) => {
                bail!("compact is not supported: the blobs of an image are not rewritten")
            }
            Some(Command::Chunkdict(_)) => {
                bail!("chunkdict is not supported: any bootstrap serves as --chunk-dict")
            }
            Some(Command::Optimize(_)) => {
                bail!("optimize is not supported: choose what to prefetch with --prefetch-policy")
            }
            None => print_usage(),
        }
    }
}

/// Options that parse one by one but make no sense together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Without a command there is nothing to do, which is no failure.
#[allow(clippy::print_stdout, reason = "the requested output of this call")]
fn print_usage() -> anyhow::Result<()> {
    println!("Usage: nydus-image [OPTIONS] <COMMAND>; see nydus-image --help");
    Ok(())
}

/// Parses a path that callers leave empty for "none"; paths are not empty otherwise.
pub(crate) fn path_or_empty() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

fn parse_level(name: &str) -> Result<tracing::Level, String> {
    match name {
        "trace" => Ok(tracing::Level::TRACE),
        "debug" => Ok(tracing::Level::DEBUG),
        "info" => Ok(tracing::Level::INFO),
        "warn" => Ok(tracing::Level::WARN),
        "error" => Ok(tracing::Level::ERROR),
        _ => Err("expected trace, debug, info, warn or error".to_owned()),
    }
}

/// Parses a size in bytes: decimal, or hexadecimal after `0x`.
pub(crate) fn parse_size(text: &str) -> Result<u32, String> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .map_err(|error| format!("{error}; expected a decimal number or 0x and hexadecimal digits"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_decimal_or_hexadecimal() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("0x100000"), Ok(0x10_0000));
        assert!(parse_size("1M").is_err());
        assert!(parse_size("").is_err());
        assert!(parse_size("-1").is_err());
    }
}
