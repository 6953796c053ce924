//! The published reader and builder alone: does this crate drive them properly?
//!
//! What the matrix says about our own programs is worth as much as these tests.

use anyhow::{Context, Result, ensure};
use oracle::build::Built;
use oracle::sources::{self, Sources};
use oracle::{build, compare, matrix, ours, read, stored};

/// Their reader gives back what their builder was given, for every option set.
#[test]
fn their_builder_and_reader_agree() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sources = Sources::new(dir.path())?;
    for (number, options) in matrix::pairwise().iter().enumerate() {
        let out = dir.path().join(number.to_string());
        let built = build::image(sources.path(options.source), options, &out)?;
        let found =
            read::image(&built.boot, &built.blob_dir).with_context(|| options.to_string())?;
        compare::equal(&sources.expected, &found, sources::rules(options.source))
            .with_context(|| options.to_string())?;
        std::fs::remove_dir_all(out)?;
    }
    Ok(())
}

/// A changed byte of chunk data does not pass as the source.
#[test]
fn the_comparison_notices_damage() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sources = Sources::new(dir.path())?;
    let options = matrix::pairwise()[0];
    let built = build::image(
        sources.path(options.source),
        &options,
        &dir.path().join("out"),
    )?;
    for entry in std::fs::read_dir(&built.blob_dir)? {
        let path = entry?.path();
        let mut bytes = std::fs::read(&path)?;
        bytes[100] ^= 1;
        std::fs::write(path, bytes)?;
    }
    let equal = |found: Result<Vec<_>>| {
        compare::equal(&sources.expected, &found?, sources::rules(options.source))
    };
    ensure!(equal(read::image(&built.boot, &built.blob_dir)).is_err());
    ensure!(equal(ours::image(&built.boot, &built.blob_dir)).is_err());
    Ok(())
}

/// Their reader and ours read every stored image as its expected tree.
#[test]
fn stored_images_read_as_expected() -> Result<()> {
    let Some(root) = stored::root()? else {
        return Ok(());
    };
    let folders = stored::folders(&root)?;
    ensure!(!folders.is_empty(), "no folders");
    let mut failures = Vec::new();
    for folder in folders {
        let dir = tempfile::tempdir()?;
        let built = stored::stage(&folder, dir.path())?;
        let expected = stored::expected(&folder)?;
        let compare = |reader: fn(&std::path::Path, &std::path::Path) -> Result<Vec<_>>| {
            let Built { boot, blob_dir } = &built;
            stored::equal(&expected, &reader(boot, blob_dir)?, stored::excuse(&folder))
        };
        for (who, result) in [
            ("their", compare(read::image)),
            ("our", compare(ours::image)),
        ] {
            if let Err(error) = result {
                failures.push(format!("{}, {who} reader: {error:#}", folder.display()));
            }
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}
