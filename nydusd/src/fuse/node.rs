//! Numbers and attributes as the kernel sees them.
//!
//! A node number is the slot of a mount in its top byte and the inode's position
//! in the image below, so it needs no table, survives a restart, and two images
//! in one daemon never collide. The root of a session is node 1 by the protocol.
//! `st_ino` is the node number, for the root too.

use fuse_backend_rs::abi::fuse_abi::{ROOT_ID, stat64, statvfs64};
use rafs::fs::Inode;
use rafs::image::Image;
use rafs::units::{FileKind, Nid};
use storage::units::BLOCK_SIZE;

/// Bits of a node number that hold the inode number.
const NID_BITS: u32 = 56;
const NID_MASK: u64 = (1 << NID_BITS) - 1;

/// Place of a mounted image in the daemon, 1 to 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(u8);

impl Slot {
    /// Of the first image, and of one that has a mount to itself.
    pub(crate) const FIRST: Self = Self(1);

    /// The slot with this number; `None` for 0, which is not an image's.
    pub(crate) fn new(number: u8) -> Option<Self> {
        (number > 0).then_some(Self(number))
    }

    /// The number in the top byte of a node number; 0 for the daemon's own directories.
    pub(crate) fn of(node: u64) -> u8 {
        // Fits: eight bits are left.
        u8::try_from(node >> NID_BITS).unwrap_or(0)
    }

    /// Its number.
    pub(crate) fn get(self) -> u8 {
        self.0
    }

    /// The node number of an inode.
    pub(crate) fn node(self, nid: Nid) -> u64 {
        (u64::from(self.0) << NID_BITS) | (nid.get() & NID_MASK)
    }

    /// The inode behind a node number; `None` if it belongs to another slot.
    pub(crate) fn nid(self, node: u64, root: Nid) -> Option<Nid> {
        if node == ROOT_ID {
            return Some(root);
        }
        (node >> NID_BITS == u64::from(self.0)).then(|| Nid::new(node & NID_MASK))
    }
}

/// What `stat` shows. All three times are the modification time, the only one
/// an image has; blocks are counted as the kernel's EROFS does.
pub(crate) fn attributes(node: u64, inode: &Inode) -> stat64 {
    let attr = inode.attr();
    let mut stat = blank();
    stat.st_ino = node;
    stat.st_mode = u32::from(inode.mode());
    stat.st_nlink = u64::from(inode.nlink());
    stat.st_uid = attr.uid;
    stat.st_gid = attr.gid;
    // The kernel reads the low 32 bits in the encoding that images use.
    stat.st_rdev = u64::from(inode.rdev());
    // The format's sizes are unsigned, the kernel's are not; no file is so large.
    stat.st_size = i64::try_from(inode.size()).unwrap_or(i64::MAX);
    stat.st_blksize = BLOCK_SIZE.cast_signed();
    stat.st_blocks = i64::try_from(inode.size().div_ceil(BLOCK_SIZE))
        .unwrap_or(i64::MAX)
        .saturating_mul(BLOCK_SIZE.cast_signed() / 512);
    for (seconds, nanoseconds) in [
        (&mut stat.st_atime, &mut stat.st_atime_nsec),
        (&mut stat.st_mtime, &mut stat.st_mtime_nsec),
        (&mut stat.st_ctime, &mut stat.st_ctime_nsec),
    ] {
        *seconds = attr.mtime;
        *nanoseconds = i64::from(attr.mtime_nsec);
    }
    stat
}

/// What `statfs` shows where there is no image: nothing.
pub(crate) fn empty() -> statvfs64 {
    // SAFETY: the structure is plain integers, for which zero is a value.
    let mut stat: statvfs64 = unsafe { std::mem::zeroed() };
    stat.f_bsize = BLOCK_SIZE;
    stat.f_frsize = BLOCK_SIZE;
    stat.f_namemax = 255;
    stat
}

/// What `statfs` shows: everything used, nothing free.
pub(crate) fn usage(image: &Image) -> statvfs64 {
    let mut stat = empty();
    let bytes: u64 = image
        .blobs()
        .iter()
        .fold(0, |sum, blob| sum.saturating_add(blob.uncompressed_size));
    stat.f_blocks = bytes.div_ceil(BLOCK_SIZE);
    stat.f_files = image.inode_count();
    stat
}

/// `d_type` of a directory entry.
pub(crate) fn dirent_type(kind: FileKind) -> u32 {
    u32::from(match kind {
        FileKind::File => libc::DT_REG,
        FileKind::Directory => libc::DT_DIR,
        FileKind::CharDevice => libc::DT_CHR,
        FileKind::BlockDevice => libc::DT_BLK,
        FileKind::Fifo => libc::DT_FIFO,
        FileKind::Socket => libc::DT_SOCK,
        FileKind::Symlink => libc::DT_LNK,
    })
}

pub(crate) fn blank() -> stat64 {
    fuse_backend_rs::api::filesystem::Entry::default().attr
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lead_back_to_their_inode() {
        let (root, other) = (Nid::new(36), Nid::new(0x1234_5678));
        let slot = Slot::FIRST;
        assert_eq!(slot.node(root), 0x0100_0000_0000_0024);
        assert_eq!(slot.nid(slot.node(other), root), Some(other));
        assert_eq!(slot.nid(1, root), Some(root), "the session's root");
        assert_eq!(slot.nid(slot.node(root), root), Some(root));
        assert_eq!(slot.nid(0, root), None);
        assert_eq!(slot.nid(2, root), None);
        assert_eq!(slot.nid(0x0200_0000_0000_0024, root), None, "another slot");
    }

    #[test]
    fn a_hostile_number_stays_in_its_slot() {
        let node = Slot::FIRST.node(Nid::new(u64::MAX));
        assert_eq!(node >> 56, 1);
    }
}
