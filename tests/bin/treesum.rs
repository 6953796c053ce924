//! Describes directory trees as text: `treesum DIR > a; treesum MOUNT > b; diff a b`.

use std::io::{self, Write as _};
use std::path::PathBuf;

use clap::Parser;
use support::tree::{Detail, describe};

/// Describe a directory tree, one JSON object per line, sorted by path.
#[derive(Debug, Parser)]
struct Cli {
    /// Directory to describe
    directory: PathBuf,

    /// Leave out modification times
    #[arg(long)]
    no_mtime: bool,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let detail = if cli.no_mtime {
        Detail::WithoutTimes
    } else {
        Detail::All
    };
    let mut out = io::stdout().lock();
    for line in describe(&cli.directory, detail)? {
        writeln!(out, "{line}")?;
    }
    Ok(())
}
