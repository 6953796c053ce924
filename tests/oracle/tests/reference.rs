//! The published reader and builder alone: does this crate drive them properly?
//!
//! What the matrix says about our own programs is worth as much as these tests.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oracle::compare::{self, Rules};
use oracle::matrix::{self, Source};
use oracle::{build, describe, nasty, read, stored};

/// Their reader gives back what their builder was given, for every option set.
#[test]
fn their_builder_and_reader_agree() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sources = Sources::new(dir.path())?;
    let expected = describe::directory(&sources.tree)?;
    for (number, options) in matrix::pairwise().iter().enumerate() {
        let out = dir.path().join(format!("image-{number}"));
        let built = build::image(sources.of(options.source), options, &out)?;
        let found =
            read::image(&built.boot, &built.blob_dir).with_context(|| options.to_string())?;
        compare::equal(&expected, &found, rules(options.source))
            .with_context(|| options.to_string())?;
        std::fs::remove_dir_all(out)?;
    }
    Ok(())
}

/// Their reader reads every stored image as its expected tree.
#[test]
fn their_reader_reads_stored_images() -> Result<()> {
    let Some(root) = std::env::var_os("NYDUS_FIXTURES").map(PathBuf::from) else {
        eprintln!("NYDUS_FIXTURES is not set: no stored images to read");
        return Ok(());
    };
    for folder in stored::folders(&root)? {
        let dir = tempfile::tempdir()?;
        let name = folder.display().to_string();
        let built = stored::stage(&folder, dir.path())?;
        let found = read::image(&built.boot, &built.blob_dir).with_context(|| name.clone())?;
        let expected = stored::expected(&folder)?;
        stored::equal(&expected, &found, stored::excuse(&folder)).with_context(|| name)?;
    }
    Ok(())
}

struct Sources {
    tree: PathBuf,
    tar: PathBuf,
    targz: PathBuf,
}

impl Sources {
    fn new(dir: &Path) -> Result<Self> {
        let (tree, tar, targz) = (dir.join("tree"), dir.join("a.tar"), dir.join("a.tar.gz"));
        nasty::tree(&tree)?;
        nasty::tar(&tree, &tar)?;
        nasty::gzip(&tar, &targz)?;
        Ok(Self { tree, tar, targz })
    }

    fn of(&self, source: Source) -> &Path {
        match source {
            Source::Dir => &self.tree,
            Source::Tar => &self.tar,
            Source::Targz | Source::TargzRef => &self.targz,
        }
    }
}

fn rules(source: Source) -> Rules {
    let tar = source != Source::Dir;
    Rules {
        tar,
        ignore_root_mtime: !tar,
        ..Rules::default()
    }
}
