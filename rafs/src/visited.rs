//! Bounds for walks over a whole image.
//!
//! In a hostile image, inodes may lie on top of each other, so that a few
//! kilobytes pretend to be millions of files that share one huge chunk index
//! array. Honest inodes do not overlap: together they are not longer than the
//! file. A walk that counts every inode once against the length of the file is
//! therefore linear in it.

use crate::error::{Error, corrupt};
use crate::fs::Inode;
use crate::image::Image;
use crate::units::{FileKind, INODE_SLOT, len64};

/// Inodes that a walk has seen, and how many bytes the others can have.
#[derive(Debug)]
pub(crate) struct Visited {
    /// A bit for every place in the file where an inode can begin.
    seen: Vec<u64>,
    left: u64,
    chunk_size: u64,
}

impl Visited {
    pub(crate) fn new(image: &Image) -> Self {
        let len = len64(image.bytes().len());
        let words = usize::try_from(len / INODE_SLOT / 64).unwrap_or(usize::MAX);
        Self {
            seen: vec![0; words.saturating_add(1)],
            left: len,
            chunk_size: image.chunk_size().into(),
        }
    }

    /// Whether this is the first time that the walk meets `inode`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a directory that was met before, and when all
    /// inodes together are longer than the file.
    pub(crate) fn first(&mut self, inode: &Inode) -> Result<bool, Error> {
        if !self.mark(inode) {
            if inode.kind() == FileKind::Directory {
                return Err(corrupt(
                    "directory entry",
                    inode.offset,
                    inode.nid().get(),
                    "a directory that no other entry leads to",
                ));
            }
            return Ok(false);
        }
        let data = match inode.kind() {
            FileKind::File => inode.size().div_ceil(self.chunk_size).saturating_mul(8),
            FileKind::Directory | FileKind::Symlink => inode.size(),
            _ => 0,
        };
        let len = (inode.tail_offset() - inode.offset).saturating_add(data);
        match self.left.checked_sub(len) {
            Some(left) => self.left = left,
            None => {
                return Err(corrupt(
                    "inode",
                    inode.offset,
                    len,
                    "a length that fits the file beside all other inodes",
                ));
            }
        }
        Ok(true)
    }

    /// Sets the bit of an inode; whether it was clear.
    fn mark(&mut self, inode: &Inode) -> bool {
        let place = inode.offset / INODE_SLOT;
        let word = usize::try_from(place / 64).ok();
        // An inode that could be read lies inside the file.
        let Some(word) = word.and_then(|word| self.seen.get_mut(word)) else {
            return false;
        };
        let bit = 1 << (place % 64);
        let was_clear = *word & bit == 0;
        *word |= bit;
        was_clear
    }
}
