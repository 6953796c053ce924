//! The nasty tree in every form that a builder takes.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::compare::Rules;
use crate::describe::{self, Entry};
use crate::matrix::Source;
use crate::nasty;

/// The tree, its tar, its gzip-compressed tar, and what it must read back as.
#[derive(Debug)]
pub struct Sources {
    tree: PathBuf,
    tar: PathBuf,
    targz: PathBuf,
    /// Description of the tree.
    pub expected: Vec<Entry>,
}

impl Sources {
    /// Makes all of them in `dir`.
    pub fn new(dir: &Path) -> Result<Self> {
        let (tree, tar, targz) = (dir.join("tree"), dir.join("a.tar"), dir.join("a.tar.gz"));
        nasty::tree(&tree)?;
        nasty::tar(&tree, &tar)?;
        nasty::gzip(&tar, &targz)?;
        let expected = describe::directory(&tree)?;
        Ok(Self {
            tree,
            tar,
            targz,
            expected,
        })
    }

    /// What to give to a builder.
    pub fn path(&self, source: Source) -> &Path {
        match source {
            Source::Dir => &self.tree,
            Source::Tar => &self.tar,
            Source::Targz | Source::TargzRef => &self.targz,
        }
    }
}

/// What an image from `source` may differ in from the tree.
pub fn rules(source: Source) -> Rules {
    let tar = source != Source::Dir;
    Rules {
        tar,
        ignore_root_mtime: !tar,
        ..Rules::default()
    }
}
