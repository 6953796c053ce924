//! Gives every inode its place and its numbers (`docs/format.md`, "Placement").
//!
//! Directories are visited in depth-first order. A directory is placed when it
//! is entered, followed by its entries that are no directories; serial numbers
//! are given to all entries of a directory in name order before its first
//! subdirectory is entered.

use crate::error::WriteError;
use crate::fs::MAX_SYMLINK;
use crate::tree::{Content, InodeId, Name, Tree};
use crate::units::{BLOCK, INODE_SLOT, MAX_DEPTH, len64};

use super::blobs::Blobs;
use super::space::Space;
use super::{WriteOptions, directory, xattr};

/// Bytes of an inode.
const INODE: u64 = 64;

/// Marks an inode of the arena that has no slot.
const NO_SLOT: u32 = u32::MAX;

/// One inode of the bootstrap.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) inode: InodeId,
    /// Serial number.
    pub(super) ino: u32,
    /// Link count.
    pub(super) nlink: u32,
    /// Slot of the parent directory; only meaningful for directories.
    pub(super) parent: u32,
    /// Directories: where their entries start in [`Plan::entries`].
    pub(super) first_entry: usize,
    /// Byte offset in the bootstrap.
    pub(super) offset: u64,
    /// Length of directory or symlink data, in bytes.
    pub(super) data_size: u64,
    pub(super) data: Data,
}

/// Where the data of a directory or symlink is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Data {
    /// All of it from this byte on; also for inodes without such data.
    Plain(u64),
    /// Whole blocks from this byte on, the rest behind the inode.
    Inline(u64),
}

/// Where everything goes.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) blobs: Blobs,
    pub(super) slots: Vec<Slot>,
    /// Slots of all directory entries, directory by directory in name order.
    pub(super) entries: Vec<u32>,
    /// Byte offset of the blob table.
    pub(super) blob_table: u64,
    /// Byte offset from which inode numbers count.
    pub(super) meta_start: u64,
    /// End of the inode area, a multiple of the block size.
    pub(super) end: u64,
    /// Names in the image, the root included.
    pub(super) names: u64,
    pub(super) has_xattrs: bool,
    /// Inodes to prefetch, by slot.
    pub(super) prefetch: Vec<u32>,
}

impl Plan {
    /// Inode number of a slot.
    pub(super) fn nid(&self, slot: u32) -> u64 {
        (self.slot(slot).offset - self.meta_start) / INODE_SLOT
    }

    pub(super) fn slot(&self, slot: u32) -> &Slot {
        &self.slots[index(slot)]
    }
}

/// A slot number as a position.
#[allow(
    clippy::cast_possible_truncation,
    reason = "usize has at least 32 bits on Linux"
)]
pub(super) const fn index(slot: u32) -> usize {
    slot as usize
}

pub(super) fn make(tree: &Tree, options: &WriteOptions, blobs: Blobs) -> Result<Plan, WriteError> {
    let count = blobs.count();
    // Without blobs there is no data to prefetch.
    let prefetch: &[InodeId] = if count == 0 { &[] } else { &options.prefetch };
    let blob_table = (1408 + 128 * count).next_multiple_of(BLOCK);
    let tables_end = blob_table + 256 * count + 4 * len64(prefetch.len());
    // One block between the tables and the root keeps the root's number off 0;
    // without blobs the first block of the file serves as that block.
    let meta_start = if count == 0 {
        0
    } else {
        tables_end.next_multiple_of(BLOCK)
    };
    let mut planner = Planner {
        tree,
        chunk_size: u64::from(options.chunk_size),
        space: Space::new(meta_start + BLOCK),
        slots: Vec::with_capacity(tree.inodes().len()),
        entries: Vec::with_capacity(tree.inodes().len()),
        slot_of: vec![NO_SLOT; tree.inodes().len()],
        names: 0,
        has_xattrs: false,
    };
    planner.run()?;
    let prefetch = prefetch
        .iter()
        .map(|id| match planner.slot_of.get(id.as_usize()) {
            Some(&slot) if slot != NO_SLOT => Ok(slot),
            _ => Err(WriteError::BadOption {
                option: "prefetch list",
                reason: "names an inode that is not in the tree",
            }),
        })
        .collect::<Result<_, _>>()?;
    Ok(Plan {
        blobs,
        slots: planner.slots,
        entries: planner.entries,
        blob_table,
        meta_start,
        end: planner.space.end(),
        names: planner.names,
        has_xattrs: planner.has_xattrs,
        prefetch,
    })
}

struct Planner<'a> {
    tree: &'a Tree,
    chunk_size: u64,
    space: Space,
    slots: Vec<Slot>,
    entries: Vec<u32>,
    /// Slot by position in the arena.
    slot_of: Vec<u32>,
    names: u64,
    has_xattrs: bool,
}

/// A directory that has a slot and is to be placed.
struct Pending<'a> {
    slot: u32,
    name: &'a [u8],
    depth: u32,
}

impl<'a> Planner<'a> {
    fn run(&mut self) -> Result<(), WriteError> {
        let root = self.add_name(self.tree.root(), 0, b"")?;
        let mut pending = vec![Pending {
            slot: root,
            name: b"",
            depth: 0,
        }];
        while let Some(dir) = pending.pop() {
            let first_subdirectory = pending.len();
            self.directory(&dir, &mut pending)?;
            pending[first_subdirectory..].reverse();
        }
        Ok(())
    }

    /// Places a directory and its entries; subdirectories are numbered and left for later.
    fn directory(
        &mut self,
        dir: &Pending<'a>,
        pending: &mut Vec<Pending<'a>>,
    ) -> Result<(), WriteError> {
        let inode = self.tree.inode(self.slots[index(dir.slot)].inode);
        let Some(entries) = inode.entries() else {
            return Ok(());
        };
        if dir.depth > MAX_DEPTH {
            return Err(WriteError::TooMany {
                what: "nested directories",
                limit: MAX_DEPTH.into(),
            });
        }
        self.place(dir.slot, dir.name, directory::size(entries))?;
        self.slots[index(dir.slot)].first_entry = self.entries.len();
        for (name, &id) in entries {
            let slot = self.entry(dir, name, id, pending)?;
            self.entries.push(slot);
        }
        Ok(())
    }

    /// The slot that an entry of a directory leads to.
    fn entry(
        &mut self,
        dir: &Pending<'a>,
        name: &'a Name,
        id: InodeId,
        pending: &mut Vec<Pending<'a>>,
    ) -> Result<u32, WriteError> {
        let known = self.slot_of[id.as_usize()];
        match &self.tree.inode(id).content {
            Content::Directory(_) if known != NO_SLOT => Err(WriteError::DirectoryLinkedTwice {
                name: name.to_vec(),
            }),
            Content::Directory(_) => {
                let slot = self.add_name(id, dir.slot, name)?;
                self.slots[index(dir.slot)].nlink += 1;
                pending.push(Pending {
                    slot,
                    name,
                    depth: dir.depth + 1,
                });
                Ok(slot)
            }
            Content::File { .. } if known != NO_SLOT => {
                self.names += 1;
                self.slots[index(known)].nlink += 1;
                Ok(known)
            }
            content => {
                let size = match content {
                    Content::Symlink(target) => len64(target.len()),
                    _ => 0,
                };
                let slot = self.add_name(id, dir.slot, name)?;
                self.place(slot, name, size)?;
                Ok(slot)
            }
        }
    }

    /// Gives an inode a slot and a serial number.
    fn add_name(&mut self, id: InodeId, parent: u32, name: &[u8]) -> Result<u32, WriteError> {
        self.check(id, name)?;
        self.names += 1;
        let too_many = |_| WriteError::TooMany {
            what: "names",
            limit: u64::from(u32::MAX >> 1),
        };
        let ino = i32::try_from(self.names).map_err(too_many)?.unsigned_abs();
        // There are no more slots than names, so this stays below NO_SLOT.
        let slot = u32::try_from(self.slots.len()).map_err(too_many)?;
        let is_directory = self.tree.inode(id).entries().is_some();
        self.slots.push(Slot {
            inode: id,
            ino,
            nlink: if is_directory { 2 } else { 1 },
            parent,
            first_entry: 0,
            offset: 0,
            data_size: 0,
            data: Data::Plain(0),
        });
        self.slot_of[id.as_usize()] = slot;
        Ok(slot)
    }

    /// Gives a slot its place; `data_size` is the length of directory or symlink data.
    fn place(&mut self, slot: u32, name: &[u8], data_size: u64) -> Result<(), WriteError> {
        let inode = self.tree.inode(self.slots[index(slot)].inode);
        let xattrs = xattr::area_size(&inode.xattrs).map_err(|refused| WriteError::BadXattr {
            name: name.to_vec(),
            key: refused.key.to_vec(),
            reason: refused.reason,
        })?;
        self.has_xattrs |= xattrs != 0;
        let head = INODE + xattrs;
        let tail = data_size % BLOCK;
        let (offset, data) = match &inode.content {
            Content::File { chunks, .. } => {
                let len = match chunks.len() {
                    0 => head,
                    count => head.next_multiple_of(8) + 8 * len64(count),
                };
                (self.space.inode(len, false), Data::Plain(0))
            }
            _ if data_size == 0 => (self.space.inode(head, false), Data::Plain(0)),
            _ if tail != 0 && head + tail <= BLOCK => {
                let offset = self.space.inode(head + tail, true);
                let blocks = match data_size / BLOCK {
                    // Nothing reads it, but something must be there.
                    0 => offset / BLOCK * BLOCK,
                    count => self.space.blocks(count),
                };
                (offset, Data::Inline(blocks))
            }
            _ => {
                let offset = self.space.inode(head, false);
                (
                    offset,
                    Data::Plain(self.space.blocks(data_size.div_ceil(BLOCK))),
                )
            }
        };
        let slot = &mut self.slots[index(slot)];
        slot.offset = offset;
        slot.data_size = data_size;
        slot.data = data;
        Ok(())
    }

    /// The rules that an inode of a tree could break.
    fn check(&self, id: InodeId, name: &[u8]) -> Result<(), WriteError> {
        let inode = self.tree.inode(id);
        let reason = match &inode.content {
            Content::File { size, chunks }
                if size.div_ceil(self.chunk_size) != len64(chunks.len()) =>
            {
                "its number of chunks does not fit its size"
            }
            Content::Symlink(target)
                if target.is_empty()
                    || len64(target.len()) >= MAX_SYMLINK
                    || target.contains(&0) =>
            {
                "a symbolic link needs a target of 1 to 4095 bytes without NUL"
            }
            _ if inode.attr.permissions > 0o7777 => "its permissions have more than 12 bits",
            _ if inode.attr.mtime_nsec >= 1_000_000_000 => {
                "its modification time has a billion nanoseconds or more"
            }
            _ => return Ok(()),
        };
        Err(WriteError::BadInode {
            name: name.to_vec(),
            reason,
        })
    }
}
