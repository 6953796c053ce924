//! Our programs against the published crates, in both directions.
//!
//! Every option set is tried and every failure listed, because one fault often
//! shows in several. `ORACLE_MATRIX=all` tries every combination instead of
//! every pair of values.
//!
//! What our programs refuse on purpose is expected to be refused, with the
//! message given in [`refused_by_check`]: support that arrives makes these tests fail
//! until its line is removed.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
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
        expect(program::check(&built), refused_by_check(options)).context("check")
    })
}

/// `check` wants a bootstrap in a file of its own.
fn refused_by_check(options: &Options) -> Option<&'static str> {
    options
        .inline_meta
        .then_some("this is no RAFS v6 bootstrap")
}

/// The result, in which the expected failure is a success.
fn expect(result: Result<()>, refusal: Option<&str>) -> Result<()> {
    match (result, refusal) {
        (result, None) => result,
        (Ok(()), Some(text)) => bail!("works now; no longer expect {text:?}"),
        (Err(error), Some(text)) if format!("{error:#}").contains(text) => Ok(()),
        (Err(error), _) => Err(error),
    }
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
