//! Hands out the space of the inode area.
//!
//! Inodes are appended at multiples of 32 bytes; data blocks are taken from the
//! end, and the block that inodes were being put in stays open behind them.

use crate::units::{BLOCK, INODE_SLOT};

/// The free space of the inode area, in byte offsets of the bootstrap.
#[derive(Debug)]
pub(super) struct Space {
    /// Next free byte for inodes.
    cursor: u64,
    /// End of the block that is open for inodes.
    open_end: u64,
    /// End of everything handed out, a multiple of the block size.
    end: u64,
}

impl Space {
    /// Space from `start` on, which is a multiple of the block size.
    pub(super) fn new(start: u64) -> Self {
        Self {
            cursor: start,
            open_end: start,
            end: start,
        }
    }

    /// Place for an inode of `len` bytes. With `one_block` (an inode with an
    /// inline tail, at most a block long) it does not cross a block boundary.
    pub(super) fn inode(&mut self, len: u64, one_block: bool) -> u64 {
        // The open end is a multiple of the slot size, so this stays inside.
        let aligned = self.cursor.next_multiple_of(INODE_SLOT);
        let fits = aligned + len <= self.open_end;
        let grows = !one_block && self.open_end == self.end;
        let start = if fits || grows { aligned } else { self.end };
        self.cursor = start + len;
        if !fits {
            self.open_end = self.cursor.next_multiple_of(BLOCK);
            self.end = self.open_end;
        }
        start
    }

    /// Place for `count` consecutive blocks.
    pub(super) fn blocks(&mut self, count: u64) -> u64 {
        let start = self.end;
        self.end += count * BLOCK;
        start
    }

    /// End of everything handed out: a multiple of the block size.
    pub(super) fn end(&self) -> u64 {
        self.end
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
    fn plain_inodes_may_cross_blocks_unless_data_follows() {
        let mut space = Space::new(4096);
        assert_eq!(space.inode(4064, false), 4096);
        assert_eq!(space.inode(10_000, false), 8160);
        assert_eq!(space.blocks(2), 20480);
        assert_eq!(
            space.inode(64, false),
            18176,
            "the open block is used first"
        );
        assert_eq!(space.inode(4096, false), 28672);
        assert_eq!(space.end(), 32768);
    }
}
