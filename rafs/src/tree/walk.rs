//! All names of a tree, one by one, without recursion.

use std::collections::btree_map;

use super::{InodeId, Name, Tree};

/// One name of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalkEntry {
    /// The path from the root, starting with `/`.
    pub path: Vec<u8>,
    /// What it leads to.
    pub id: InodeId,
    /// The directory that has the name; the root for the root.
    pub parent: InodeId,
}

/// Iterator of [`Tree::walk`].
///
/// Never ends if a directory contains itself, which [`Tree::link`] does not prevent.
#[derive(Debug)]
pub struct Walk<'a> {
    tree: &'a Tree,
    root_seen: bool,
    /// Directories still to be entered, the next one last.
    pending: Vec<(Vec<u8>, InodeId)>,
    current: Option<Level<'a>>,
}

/// The directory that is being listed.
#[derive(Debug)]
struct Level<'a> {
    path: Vec<u8>,
    id: InodeId,
    entries: btree_map::Iter<'a, Name, InodeId>,
    subdirectories: Vec<(Vec<u8>, InodeId)>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(tree: &'a Tree) -> Self {
        Self {
            tree,
            root_seen: false,
            pending: vec![(Vec::new(), tree.root())],
            current: None,
        }
    }

    /// Enters the next directory; `None` if there is none left.
    fn enter(&mut self) -> Option<()> {
        let (path, id) = self.pending.pop()?;
        let entries = self.tree.inode(id).entries()?.iter();
        self.current = Some(Level {
            path,
            id,
            entries,
            subdirectories: Vec::new(),
        });
        Some(())
    }
}

impl Iterator for Walk<'_> {
    type Item = WalkEntry;

    fn next(&mut self) -> Option<WalkEntry> {
        if !self.root_seen {
            self.root_seen = true;
            return Some(WalkEntry {
                path: b"/".to_vec(),
                id: self.tree.root(),
                parent: self.tree.root(),
            });
        }
        loop {
            let Some(level) = &mut self.current else {
                self.enter()?;
                continue;
            };
            if let Some((name, &id)) = level.entries.next() {
                let path = [&level.path[..], b"/", name].concat();
                if self.tree.inode(id).entries().is_some() {
                    level.subdirectories.push((path.clone(), id));
                }
                return Some(WalkEntry {
                    path,
                    id,
                    parent: level.id,
                });
            }
            let left = self.current.take()?;
            self.pending.extend(left.subdirectories.into_iter().rev());
        }
    }
}
