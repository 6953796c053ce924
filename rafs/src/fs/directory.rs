//! Directory blocks: lookup by bisection, listing with cookies
//! (`docs/format.md`, "Directories").

use std::ops::ControlFlow;

use zerocopy::FromBytes;

use crate::error::{Error, Found, corrupt};
use crate::format::dirent::Dirent;
use crate::image::Image;
use crate::units::{BLOCK, FileKind, MAX_NAME, Nid, len64};

use super::{Inode, block_count};

/// Bytes of a [`Dirent`].
const DIRENT: usize = size_of::<Dirent>();

/// Bits of a cookie that hold the entry: a block has at most 4096 / 12 = 341.
const ENTRY_BITS: u32 = 9;

/// One entry of a listing; `.` and `..` are entries like any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The inode it leads to.
    pub nid: Nid,
    /// Its name, 1 to 255 bytes without `/` and NUL.
    pub name: &'a [u8],
    /// Type of the inode, as the directory claims.
    pub kind: FileKind,
    /// Cookie to resume the listing behind this entry.
    pub next: u64,
}

/// One block of a directory with a checked head.
struct Block<'a> {
    bytes: &'a [u8],
    entries: &'a [Dirent],
    /// Byte offset of the block in the bootstrap, for messages.
    at: u64,
}

impl<'a> Block<'a> {
    fn parse(bytes: &'a [u8], at: u64) -> Result<Self, Error> {
        let bad = |found: u64| {
            corrupt(
                "first name offset",
                at + 8,
                found,
                "a multiple of 12 inside the block, not 0",
            )
        };
        let (first, _) =
            Dirent::ref_from_prefix(bytes).map_err(|_short| bad(len64(bytes.len())))?;
        let head = usize::from(first.name_offset.get());
        if head == 0 || !head.is_multiple_of(DIRENT) {
            return Err(bad(len64(head)));
        }
        let entries = bytes
            .get(..head)
            .and_then(|head| <[Dirent]>::ref_from_bytes(head).ok())
            .ok_or_else(|| bad(len64(head)))?;
        Ok(Self { bytes, entries, at })
    }

    /// Name of entry `index`, which must exist.
    fn name(&self, index: usize) -> Result<&'a [u8], Error> {
        let offset = |i: usize| {
            self.entries
                .get(i)
                .map(|e| usize::from(e.name_offset.get()))
        };
        let rest = offset(index).and_then(|start| match offset(index.saturating_add(1)) {
            Some(end) => self.bytes.get(start..end),
            None => {
                let tail = self.bytes.get(start..)?;
                tail.split(|&b| b == 0).next()
            }
        });
        match rest {
            Some(name) if !name.is_empty() && name.len() <= MAX_NAME => Ok(name),
            _ => Err(corrupt(
                "directory entry name",
                self.at.saturating_add(len64(index.saturating_mul(DIRENT))),
                len64(index),
                "1 to 255 bytes inside the block",
            )),
        }
    }

    /// The entry at `index`, with everything that leaves this crate checked.
    fn entry(&self, index: usize, next: u64) -> Result<DirEntry<'a>, Error> {
        let name = self.name(index)?;
        let at = self.at.saturating_add(len64(index.saturating_mul(DIRENT)));
        if name.iter().any(|&b| b == b'/' || b == 0) {
            return Err(corrupt(
                "directory entry name",
                at,
                Found::bytes(name),
                "no `/`, no NUL",
            ));
        }
        let Some(raw) = self.entries.get(index) else {
            return Err(corrupt(
                "directory entry",
                at,
                len64(index),
                "an entry of the block",
            ));
        };
        let Some(kind) = FileKind::from_dirent(raw.kind) else {
            return Err(corrupt("directory entry type", at + 10, raw.kind, "1 to 7"));
        };
        Ok(DirEntry {
            nid: Nid::new(raw.nid.get()),
            name,
            kind,
            next,
        })
    }
}

impl Image {
    /// The inode that `name` leads to in directory `dir`; `.` and `..` work too.
    ///
    /// Costs O(log n) comparisons.
    ///
    /// # Errors
    /// [`Error::WrongKind`] if `dir` is no directory, [`Error::Corrupt`] for a
    /// damaged one.
    pub fn lookup(&self, dir: Nid, name: &[u8]) -> Result<Option<Nid>, Error> {
        let inode = self.directory(dir)?;
        // The last block whose first name is not behind `name`.
        let (mut low, mut high) = (0, block_count(inode.size()));
        let mut candidate = None;
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.directory_block(&inode, middle)?;
            if block.name(0)? <= name {
                candidate = Some(block);
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        match candidate {
            None => Ok(None),
            Some(block) => search_block(&block, name),
        }
    }

    /// The directory that contains directory `dir`; the root's is the root.
    ///
    /// # Errors
    /// As for [`Image::lookup`]; a directory without `..` is corrupt.
    pub fn parent(&self, dir: Nid) -> Result<Nid, Error> {
        self.lookup(dir, b"..")?.ok_or_else(|| {
            let at = self.inode_offset(dir).unwrap_or_default();
            corrupt("directory", at, dir.get(), "an entry `..`")
        })
    }

    /// Lists directory `dir` from `cookie` on, in name order, until `each` breaks.
    ///
    /// * `cookie`: 0 for the start, else [`DirEntry::next`] of the last entry seen.
    ///   Any other number is legal and starts somewhere, or lists nothing.
    ///
    /// Resuming costs the same wherever it starts.
    ///
    /// # Errors
    /// [`Error::WrongKind`] if `dir` is no directory, [`Error::Corrupt`] for a
    /// damaged one; entries before the damage were seen.
    pub fn readdir<'a>(
        &'a self,
        dir: Nid,
        cookie: u64,
        mut each: impl FnMut(DirEntry<'a>) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let inode = self.directory(dir)?;
        let mut entry = usize::try_from(cookie & ((1 << ENTRY_BITS) - 1)).unwrap_or(usize::MAX);
        let start = cookie >> ENTRY_BITS;
        for index in start..block_count(inode.size()) {
            let block = self.directory_block(&inode, index)?;
            while entry < block.entries.len() {
                // The head is below 4096, so `entry + 1` fits its bits.
                let next = (index << ENTRY_BITS) | len64(entry + 1);
                if each(block.entry(entry, next)?).is_break() {
                    return Ok(());
                }
                entry += 1;
            }
            entry = 0;
        }
        Ok(())
    }

    fn directory_block(&self, inode: &Inode, index: u64) -> Result<Block<'_>, Error> {
        let bytes = self.flat_block(inode, index)?;
        let at = match inode.layout {
            super::Layout::Plain(start) | super::Layout::Inline(start)
                if len64(bytes.len()) == BLOCK || inode.layout == super::Layout::Plain(start) =>
            {
                u64::from(start).saturating_add(index).saturating_mul(BLOCK)
            }
            _ => inode.tail_offset(),
        };
        Block::parse(bytes, at)
    }
}

/// Bisection inside one block.
fn search_block(block: &Block<'_>, name: &[u8]) -> Result<Option<Nid>, Error> {
    let (mut low, mut high) = (0, block.entries.len());
    while low < high {
        let middle = low + (high - low) / 2;
        match block.name(middle)?.cmp(name) {
            std::cmp::Ordering::Equal => {
                return Ok(block.entries.get(middle).map(|e| Nid::new(e.nid.get())));
            }
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
        }
    }
    Ok(None)
}
