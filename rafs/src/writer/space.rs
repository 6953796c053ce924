//! Hands out the space of the inode area.
//!
//! Inodes are appended at multiples of 32 bytes and data blocks behind them.
//! What a block boundary leaves unused is remembered and given to later
//! inodes, the smallest rest that is large enough first.

use crate::units::{BLOCK, INODE_SLOT};

/// Remembered rests of blocks. More would cost time for every inode and save
/// little: a rest is soon filled.
const MAX_HOLES: usize = 32;

/// Bytes of the smallest inode that is written.
const MIN_INODE: u64 = 64;

/// The free space of the inode area, in byte offsets of the bootstrap.
#[derive(Debug)]
pub(super) struct Space {
    /// Next free byte behind everything handed out.
    cursor: u64,
    /// Free rests of earlier blocks: start (a multiple of 32) and end.
    holes: Vec<(u64, u64)>,
}

impl Space {
    /// Space from `start` on, which is a multiple of the block size.
    pub(super) fn new(start: u64) -> Self {
        Self {
            cursor: start,
            holes: Vec::new(),
        }
    }

    /// Place for an inode of `len` bytes. With `one_block` (an inode with an
    /// inline tail, at most a block long) it does not cross a block boundary.
    pub(super) fn inode(&mut self, len: u64, one_block: bool) -> u64 {
        if let Some(start) = self.fill_hole(len) {
            return start;
        }
        let aligned = self.cursor.next_multiple_of(INODE_SLOT);
        let start = if one_block && aligned % BLOCK + len > BLOCK {
            self.close_block();
            self.cursor
        } else {
            aligned
        };
        self.cursor = start + len;
        start
    }

    /// Place for `count` consecutive blocks.
    pub(super) fn blocks(&mut self, count: u64) -> u64 {
        self.close_block();
        let start = self.cursor;
        self.cursor += count * BLOCK;
        start
    }

    /// End of everything handed out, rounded up to the block size.
    pub(super) fn end(&self) -> u64 {
        self.cursor.next_multiple_of(BLOCK)
    }

    fn fill_hole(&mut self, len: u64) -> Option<u64> {
        let (position, &(start, end)) = self
            .holes
            .iter()
            .enumerate()
            .filter(|(_, (start, end))| len <= end - start)
            .min_by_key(|(_, (start, end))| end - start)?;
        let rest = (start + len).next_multiple_of(INODE_SLOT);
        if rest + MIN_INODE <= end {
            self.holes[position].0 = rest;
        } else {
            self.holes.remove(position);
        }
        Some(start)
    }

    /// Moves on to a block boundary and remembers what lies before it.
    fn close_block(&mut self) {
        let (start, end) = (self.cursor.next_multiple_of(INODE_SLOT), self.end());
        self.cursor = end;
        if start + MIN_INODE <= end {
            if self.holes.len() == MAX_HOLES {
                self.holes.remove(0);
            }
            self.holes.push((start, end));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inline_inodes_stay_in_one_block() {
        let mut space = Space::new(8192);
        assert_eq!(space.inode(4000, true), 8192);
        assert_eq!(space.inode(64, true), 8192 + 4000, "4000 is a slot");
        assert_eq!(space.inode(64, true), 12288, "32 bytes were left");
        assert_eq!(space.end(), 16384);
    }

    #[test]
    fn plain_inodes_may_cross_blocks() {
        let mut space = Space::new(4096);
        assert_eq!(space.inode(4064, false), 4096);
        assert_eq!(space.inode(10_000, false), 8160);
        assert_eq!(space.end(), 20480);
    }

    #[test]
    fn rests_of_blocks_are_filled() {
        let mut space = Space::new(4096);
        assert_eq!(space.inode(64, false), 4096);
        assert_eq!(space.blocks(2), 8192);
        assert_eq!(space.inode(4096, false), 16384, "does not fit the rest");
        assert_eq!(space.inode(100, true), 4160);
        assert_eq!(space.inode(3872, false), 4288);
        assert_eq!(space.inode(64, false), 20480, "32 bytes are no inode");
    }
}
