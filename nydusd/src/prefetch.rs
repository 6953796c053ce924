//! What to fetch before anybody asks: the files of a list, or those that the image
//! names itself, and then perhaps everything.
//!
//! Files become ranges of blobs here; [`storage::prefetch`] fetches them.

use std::collections::HashSet;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use rafs::image::Image;
use rafs::units::{FileKind, Nid};
use storage::blob::Blob;
use storage::prefetch::{Prefetch, Settings};

use crate::config;

/// What a mount wants to have prefetched.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    /// Absolute paths, most urgent first; instead of those that the image names.
    pub files: Option<Vec<PathBuf>>,
    /// Everything else after them.
    pub all: bool,
    /// How.
    pub settings: Settings,
}

impl Wish {
    /// What a configuration asks for; nothing at all if it does not.
    pub(crate) fn configured(config: &config::Prefetch) -> Self {
        Self {
            files: None,
            all: config.all,
            settings: Settings {
                threads: usize::try_from(config.threads).unwrap_or(usize::MAX),
                step: config.batch_size,
                bandwidth: config.bandwidth,
            },
        }
    }
}

/// Reads a list of absolute paths, one a line; blank lines are skipped.
///
/// # Errors
/// The file cannot be read, or a line is no absolute path.
pub(crate) fn read_list(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let context = || format!("cannot read --prefetch-files {}", path.display());
    let text = std::fs::read_to_string(path).with_context(context)?;
    let mut files = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        ensure!(
            line.starts_with('/'),
            "--prefetch-files {}, line {number}: `{line}` is no absolute path",
            path.display()
        );
        files.push(PathBuf::from(line));
    }
    Ok(files)
}

/// Starts to prefetch what `wish` and the image say; `None` if that is nothing.
pub(crate) fn start(image: &Image, blobs: &[Arc<Blob>], wish: &Wish) -> Option<Prefetch> {
    let mut plan = Plan::new(image, blobs);
    match &wish.files {
        Some(files) => {
            for file in files {
                plan.add_path(file);
            }
        }
        None => {
            for nid in image.prefetch() {
                plan.add(nid);
            }
        }
    }
    if plan.unknown > 0 {
        tracing::warn!("prefetch: {} paths do not exist in the image", plan.unknown);
    }
    if wish.all {
        plan.add_everything();
    }
    if plan.ranges.is_empty() {
        return None;
    }
    tracing::debug!("prefetch: {} ranges", plan.ranges.len());
    Some(Prefetch::start(plan.ranges, wish.settings))
}

/// The ranges to fetch, in order.
struct Plan<'a> {
    image: &'a Image,
    blobs: &'a [Arc<Blob>],
    ranges: Vec<(Arc<Blob>, Range<u64>)>,
    seen: HashSet<Nid>,
    unknown: usize,
}

impl<'a> Plan<'a> {
    fn new(image: &'a Image, blobs: &'a [Arc<Blob>]) -> Self {
        Self {
            image,
            blobs,
            ranges: Vec::new(),
            seen: HashSet::new(),
            unknown: 0,
        }
    }

    fn add_path(&mut self, path: &Path) {
        match rafs::paths::find(self.image, path) {
            Some(nid) => self.add(nid),
            None => self.unknown += 1,
        }
    }

    /// Adds a file, or everything below a directory. What is damaged is left to those
    /// who read it.
    fn add(&mut self, nid: Nid) {
        let mut pending = vec![nid];
        while let Some(nid) = pending.pop() {
            let Ok(inode) = self.image.inode(nid) else {
                continue;
            };
            if !self.seen.insert(nid) {
                continue;
            }
            match inode.kind() {
                FileKind::File => self.add_file(nid),
                FileKind::Directory => pending.extend(children(self.image, nid)),
                _ => {}
            }
        }
    }

    fn add_file(&mut self, nid: Nid) {
        for extent in self.image.extents(nid, 0..u64::MAX).map_while(Result::ok) {
            let Some(blob) = self.blobs.get(extent.blob.as_usize()) else {
                return;
            };
            match self.ranges.last_mut() {
                // Files next to each other, and the gap to the next page.
                Some((last, plain))
                    if Arc::ptr_eq(last, blob)
                        && extent.plain.start >= plain.end
                        && extent.plain.start - plain.end < 4096 =>
                {
                    plain.end = extent.plain.end;
                }
                _ => self.ranges.push((Arc::clone(blob), extent.plain)),
            }
        }
    }

    fn add_everything(&mut self) {
        for blob in self.blobs {
            self.ranges
                .push((Arc::clone(blob), 0..blob.info().uncompressed_size));
        }
    }
}

/// The entries of a directory, last first.
fn children(image: &Image, dir: Nid) -> Vec<Nid> {
    let mut found = Vec::new();
    let listed = image.readdir(dir, 0, |entry| {
        if entry.name != b"." && entry.name != b".." {
            found.push(entry.nid);
        }
        ControlFlow::Continue(())
    });
    if listed.is_err() {
        found.clear();
    }
    found.reverse();
    found
}
