//! Our programs against the published crates, in both directions.
//!
//! Every option set is tried and every failure listed, because one fault often
//! shows in several. `ORACLE_MATRIX=all` tries every combination instead of
//! every pair of values.

use anyhow::{Context, Result, ensure};
use oracle::matrix::{self, Options};
use oracle::sources::{self, Sources};
use oracle::{build, compare, ours, program, read};

/// Their reader, and ours, read what our builder wrote.
#[test]
fn their_reader_accepts_our_images() -> Result<()> {
    each(|sources, options, out| {
        let built = program::create(sources.path(options.source), options, out)?;
        let rules = sources::rules(options.source);
        let found = read::image(&built.boot, &built.blob_dir).context("their reader")?;
        compare::equal(&sources.expected, &found, rules).context("their reader")?;
        let found = ours::image(&built.boot, &built.blob_dir).context("our reader")?;
        compare::equal(&sources.expected, &found, rules).context("our reader")
    })
}

/// Our `check` accepts, and our library reads, what their builder wrote.
#[test]
fn our_reader_accepts_their_images() -> Result<()> {
    each(|sources, options, out| {
        let built = build::image(sources.path(options.source), options, out)?;
        program::check(&built).context("check")?;
        let found = ours::image(&built.boot, &built.blob_dir)?;
        compare::equal(&sources.expected, &found, sources::rules(options.source))
    })
}

fn each(test: impl Fn(&Sources, &Options, &std::path::Path) -> Result<()>) -> Result<()> {
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
