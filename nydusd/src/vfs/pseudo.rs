//! Directories of the daemon's own: they lead to the places where images are mounted.
//!
//! A directory appears when an image is mounted on it or below it, and stays when the
//! image goes, because clients expect to find it there. Node numbers are small and
//! never used twice; node 1 is the root.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::{ROOT_ID, stat64};
use fuse_backend_rs::api::filesystem::DirEntry;
use serde::{Deserialize, Serialize};

use crate::errno::FsError;
use crate::fuse::node::blank;

/// More directories than this are refused: they are never removed.
const MAX_DIRECTORIES: usize = 1 << 16;

/// There are too many directories.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("too many directories: {MAX_DIRECTORIES} mount points were used since the daemon started")]
pub(crate) struct Full;

/// What a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A directory of ours, by node number.
    Directory(u64),
    /// The root of an image, by slot.
    Image(u8),
}

/// One directory.
#[derive(Clone, Debug)]
struct Directory {
    parent: u64,
    names: BTreeMap<Vec<u8>, u64>,
    /// Slot of the image that hides it.
    image: Option<u8>,
    changed: SystemTime,
}

/// One directory as a successor gets it. Images are mounted on it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedDirectory {
    node: u64,
    parent: u64,
    name: String,
    changed: SystemTime,
}

/// The tree.
#[derive(Clone, Debug)]
pub(crate) struct Pseudo {
    directories: BTreeMap<u64, Directory>,
}

impl Default for Pseudo {
    fn default() -> Self {
        let root = Directory::new(ROOT_ID);
        Self {
            directories: BTreeMap::from([(ROOT_ID, root)]),
        }
    }
}

impl Directory {
    fn new(parent: u64) -> Self {
        Self {
            parent,
            names: BTreeMap::new(),
            image: None,
            changed: SystemTime::now(),
        }
    }
}

impl Pseudo {
    /// All directories, parents first, with the numbers that the kernel knows them by.
    pub(crate) fn saved(&self) -> Vec<SavedDirectory> {
        let name = |node: u64, parent: u64| {
            let names = self.directories.get(&parent).map(|dir| &dir.names);
            let found = names
                .into_iter()
                .flatten()
                .find(|(_, other)| **other == node);
            // Names come from paths, which are text.
            found.map_or_else(String::new, |(name, _)| {
                String::from_utf8_lossy(name).into_owned()
            })
        };
        let each = self.directories.iter().map(|(node, dir)| SavedDirectory {
            node: *node,
            parent: dir.parent,
            name: name(*node, dir.parent),
            changed: dir.changed,
        });
        each.collect()
    }

    /// The directories of a predecessor, without images.
    ///
    /// # Errors
    /// When a parent is missing.
    pub(crate) fn restore(saved: &[SavedDirectory]) -> Result<Self, FsError> {
        let mut pseudo = Self::default();
        for directory in saved {
            if directory.node != ROOT_ID {
                let parent = pseudo.directories.get_mut(&directory.parent);
                let parent = parent.ok_or(FsError::UnknownNode(directory.parent))?;
                let name = directory.name.clone().into_bytes();
                parent.names.insert(name, directory.node);
            }
            let made = pseudo
                .directories
                .entry(directory.node)
                .or_insert_with(|| Directory::new(directory.parent));
            made.changed = directory.changed;
        }
        Ok(pseudo)
    }

    fn get(&self, node: u64) -> Result<&Directory, FsError> {
        self.directories
            .get(&node)
            .ok_or(FsError::UnknownNode(node))
    }

    /// Mounts the image in `slot` on an absolute path.
    pub(crate) fn mount(&mut self, path: &str, slot: u8) -> Result<(), Full> {
        let mut at = ROOT_ID;
        for name in names(path) {
            at = self.enter(at, name)?;
        }
        if let Some(directory) = self.directories.get_mut(&at) {
            directory.image = Some(slot);
        }
        Ok(())
    }

    /// The directory `name` in `parent`, made if it is missing.
    fn enter(&mut self, parent: u64, name: &[u8]) -> Result<u64, Full> {
        let node = self.directories.keys().last().map_or(2, |last| last + 1);
        let full = self.directories.len() >= MAX_DIRECTORIES;
        let Some(directory) = self.directories.get_mut(&parent) else {
            return Err(Full);
        };
        if let Some(found) = directory.names.get(name) {
            return Ok(*found);
        }
        if full {
            return Err(Full);
        }
        directory.names.insert(name.to_vec(), node);
        directory.changed = SystemTime::now();
        self.directories.insert(node, Directory::new(parent));
        Ok(node)
    }

    /// Takes the image off a path. The directory stays.
    pub(crate) fn unmount(&mut self, path: &str) {
        let (Some(node), _) = self.walk(path) else {
            return;
        };
        if let Some(directory) = self.directories.get_mut(&node) {
            directory.image = None;
        }
    }

    /// Follows a path as far as it goes: the node at its end if it is there, and the
    /// deepest directory on the way to it with the name that is looked for in it.
    pub(crate) fn walk<'a>(&self, path: &'a str) -> (Option<u64>, Option<(u64, &'a [u8])>) {
        let mut at = ROOT_ID;
        let mut step = None;
        for name in names(path) {
            step = Some((at, name));
            match self
                .directories
                .get(&at)
                .and_then(|dir| dir.names.get(name))
            {
                Some(node) => at = *node,
                None => return (None, step),
            }
        }
        (Some(at), step)
    }

    /// What a name leads to.
    pub(crate) fn find(&self, parent: u64, name: &[u8]) -> Result<Option<Found>, FsError> {
        let node = self.get(parent)?.names.get(name);
        Ok(match node {
            Some(node) => Some(self.shown(*node)?),
            None => None,
        })
    }

    fn shown(&self, node: u64) -> Result<Found, FsError> {
        let image = self.get(node)?.image;
        Ok(image.map_or(Found::Directory(node), Found::Image))
    }

    /// Calls `each` with every entry after `cookie`, until it breaks.
    pub(crate) fn list(
        &self,
        node: u64,
        cookie: u64,
        mut each: impl FnMut(DirEntry<'_>, Found) -> ControlFlow<()>,
    ) -> Result<(), FsError> {
        let directory = self.get(node)?;
        let dots: [(&[u8], u64); 2] = [(b".", node), (b"..", directory.parent)];
        let names = directory.names.iter();
        let entries = dots
            .into_iter()
            .chain(names.map(|(name, node)| (name.as_slice(), *node)));
        // A cookie is a position: names come and go between calls, which readdir allows.
        let skipped = usize::try_from(cookie).unwrap_or(usize::MAX);
        for ((name, node), offset) in entries.zip(1u64..).skip(skipped) {
            let entry = DirEntry {
                ino: node,
                offset,
                type_: u32::from(libc::DT_DIR),
                name,
            };
            if each(entry, self.shown(node)?).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// What `stat` shows of a directory.
    pub(crate) fn attributes(&self, node: u64) -> Result<stat64, FsError> {
        let directory = self.get(node)?;
        let since = directory.changed.duration_since(UNIX_EPOCH);
        let since = since.unwrap_or_default();
        let mut stat = blank();
        stat.st_ino = node;
        stat.st_mode = libc::S_IFDIR | 0o755;
        stat.st_nlink = 2;
        stat.st_blksize = 4096;
        for (seconds, nanoseconds) in [
            (&mut stat.st_atime, &mut stat.st_atime_nsec),
            (&mut stat.st_mtime, &mut stat.st_mtime_nsec),
            (&mut stat.st_ctime, &mut stat.st_ctime_nsec),
        ] {
            *seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
            *nanoseconds = i64::from(since.subsec_nanos());
        }
        Ok(stat)
    }
}

fn names(path: &str) -> impl Iterator<Item = &[u8]> {
    path.split('/')
        .filter(|name| !name.is_empty())
        .map(str::as_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(pseudo: &Pseudo, node: u64, cookie: u64) -> Vec<(String, Found)> {
        let mut all = Vec::new();
        pseudo
            .list(node, cookie, |entry, found| {
                all.push((String::from_utf8_lossy(entry.name).into_owned(), found));
                ControlFlow::Continue(())
            })
            .unwrap();
        all
    }

    #[test]
    fn directories_lead_to_images_and_stay() {
        let mut pseudo = Pseudo::default();
        pseudo.mount("/a/b", 7).unwrap();
        pseudo.mount("/a/c", 9).unwrap();
        let Ok(Some(Found::Directory(a))) = pseudo.find(1, b"a") else {
            panic!("no directory a");
        };
        assert_eq!(pseudo.find(a, b"b").unwrap(), Some(Found::Image(7)));
        assert_eq!(pseudo.find(a, b"x").unwrap(), None);
        let names: Vec<_> = listed(&pseudo, a, 0).into_iter().map(|it| it.0).collect();
        assert_eq!(names, [".", "..", "b", "c"]);
        assert_eq!(listed(&pseudo, a, 3), [("c".to_owned(), Found::Image(9))]);
        pseudo.unmount("/a/b");
        assert!(matches!(
            pseudo.find(a, b"b").unwrap(),
            Some(Found::Directory(_))
        ));
        assert!(pseudo.find(99, b"b").is_err());
        assert_eq!(pseudo.walk("/a/zz"), (None, Some((a, b"zz".as_slice()))));
        assert_eq!(pseudo.walk("/"), (Some(1), None));
    }

    #[test]
    fn a_successor_has_the_same_directories() {
        let mut pseudo = Pseudo::default();
        for path in ["/b/c", "/a", "/b/a"] {
            pseudo.mount(path, 7).unwrap();
        }
        let saved = pseudo.saved();
        let mut again = Pseudo::restore(&saved).unwrap();
        assert_eq!(again.saved(), saved);
        for path in ["/", "/a", "/b", "/b/a", "/b/c"] {
            assert_eq!(again.walk(path).0, pseudo.walk(path).0, "{path}");
        }
        assert!(matches!(again.find(1, b"a"), Ok(Some(Found::Directory(_)))));
        again.mount("/b/a", 7).unwrap();
        assert_eq!(again.saved(), saved);
        assert!(Pseudo::restore(&saved[2..]).is_err(), "no parent");
    }
}
