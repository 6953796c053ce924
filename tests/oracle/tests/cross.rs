//! Our programs against the published crates, in both directions.
//!
//! Every option set is tried and every failure listed, because one fault often
//! shows in several. `ORACLE_MATRIX=all` tries every combination instead of
//! every pair of values.
//!
//! What our programs refuse on purpose is expected to be refused, with the
//! message given in [`Options::refused_by_create`] and [`refused_by_check`]: support that
//! arrives makes these tests fail until its line is removed.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use oracle::build::Built;
use oracle::matrix::{self, Options, Source};
use oracle::sources::{self, Sources};
use oracle::{build, compare, ours, program, read};

/// Their reader, and ours, read what our builder wrote.
#[test]
fn their_reader_accepts_our_images() -> Result<()> {
    each(|sources, options, out| {
        let created = program::create(sources.path(options.source), options, out);
        if let Some(built) = expect(created, options.refused_by_create()).context("create")? {
            read_both(sources, options, &built)?;
        }
        Ok(())
    })
}

/// Our library reads, and our `check` accepts, what their builder wrote.
#[test]
fn our_reader_accepts_their_images() -> Result<()> {
    each(|sources, options, out| {
        let built = build::image(sources.path(options.source), options, out)?;
        read_both(sources, options, &built)?;
        expect(program::check(&built), refused_by_check(options)).context("check")?;
        Ok(())
    })
}

fn refused_by_check(options: &Options) -> Option<&'static str> {
    if options.inline_meta {
        return Some("this is no RAFS v6 bootstrap");
    }
    (options.source == Source::TargzRef).then_some("layers that are used in place")
}

/// The value, unless the failure is the expected one.
fn expect<T>(result: Result<T>, refusal: Option<&str>) -> Result<Option<T>> {
    match (result, refusal) {
        (Ok(value), None) => Ok(Some(value)),
        (Ok(_), Some(text)) => bail!("works now; no longer expect {text:?}"),
        (Err(error), Some(text)) if format!("{error:#}").contains(text) => Ok(None),
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
