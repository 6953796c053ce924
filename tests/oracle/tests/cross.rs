//! Our programs against the published crates, in both directions.
//!
//! Every option set is tried and every failure listed, because one fault often
//! shows in several. `ORACLE_MATRIX=all` tries every combination instead of
//! every pair of values.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use oracle::build::Built;
use oracle::matrix::{self, Options};
use oracle::sources::{self, Sources};
use oracle::{build, compare, ours, program, read};

/// Their reader, and ours, read what our builder wrote.
#[test]
fn their_reader_accepts_our_images() -> Result<()> {
    each(|sources, options, out| {
        let built =
            program::create(sources.path(options.source), options, out).context("create")?;
        read_both(sources, options, &built)
    })
}

/// Our library reads, and our `check` accepts, what their builder wrote.
#[test]
fn our_reader_accepts_their_images() -> Result<()> {
    each(|sources, options, out| {
        let built = build::image(sources.path(options.source), options, out)?;
        read_both(sources, options, &built)?;
        program::check(&built).context("check")
    })
}

fn read_both(sources: &Sources, options: &Options, built: &Built) -> Result<()> {
    let Built { boot, blob_dir } = built;
    let equal = |found: Result<Vec<_>>| {
        compare::equal(&sources.expected, &found?, sources::rules(options.source))
    };
    equal(read::image(boot, blob_dir)).context("their reader")?;
    equal(ours::image(boot, blob_dir)).context("our reader")
}

fn each(test: impl Fn(&Sources, &Options, &Path) -> Result<()>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sources = Sources::new(dir.path())?;
    let everything = std::env::var("ORACLE_MATRIX").is_ok_and(|v| v == "all");
    let options = if everything {
        matrix::all()
    } else {
        matrix::pairwise()
    };
    let mut failures = Vec::new();
    for options in &options {
        let out = dir.path().join("image");
        if let Err(error) = test(&sources, options, &out) {
            failures.push(format!("{options}: {error:#}"));
        }
        std::fs::remove_dir_all(out)?;
    }
    let (failed, all) = (failures.len(), options.len());
    ensure!(
        failures.is_empty(),
        "{failed} of {all} option sets:\n{}",
        failures.join("\n")
    );
    Ok(())
}
