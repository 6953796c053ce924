//! Names of inodes and their types, and the block arithmetic of a bootstrap.

use std::fmt;

/// Bytes in a block of a bootstrap.
pub const BLOCK: u64 = 4096;

/// Bytes between two possible inode positions.
pub const INODE_SLOT: u64 = 32;

/// Most blobs that a chunk index entry can tell apart.
pub const MAX_BLOBS: usize = 254;

/// Deepest nesting of directories that is read or written.
///
/// The format has no limit. This one bounds the length of paths that a hostile
/// image can make a tool build; no path of Linux (4096 bytes) is deeper than 2048.
pub const MAX_DEPTH: u32 = 4096;

/// Longest name of a directory entry, in bytes.
pub const MAX_NAME: usize = 255;

/// Names an inode of one image by its position (`docs/format.md`, "Inodes").
///
/// It is the inode number that the kernel's EROFS reports. It stays valid as
/// long as the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nid(u64);

impl Nid {
    /// Wraps the number of a directory entry or of a request.
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The plain number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Nid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Symbolic link.
    Symlink,
}

/// Type, number in directory entries, type bits of `st_mode`.
const KINDS: [(FileKind, u8, u16); 7] = [
    (FileKind::File, 1, 0o100_000),
    (FileKind::Directory, 2, 0o040_000),
    (FileKind::CharDevice, 3, 0o020_000),
    (FileKind::BlockDevice, 4, 0o060_000),
    (FileKind::Fifo, 5, 0o010_000),
    (FileKind::Socket, 6, 0o140_000),
    (FileKind::Symlink, 7, 0o120_000),
];

impl FileKind {
    /// The type bits of `st_mode` (`S_IFMT`).
    pub const MODE_MASK: u16 = 0o170_000;

    /// The type that the bits of a mode name; `None` for an unknown combination.
    #[must_use]
    pub fn from_mode(mode: u16) -> Option<Self> {
        let bits = mode & Self::MODE_MASK;
        KINDS.iter().find(|k| k.2 == bits).map(|k| k.0)
    }

    /// The type bits of `st_mode`.
    #[must_use]
    pub fn mode_bits(self) -> u16 {
        KINDS.iter().find(|k| k.0 == self).map_or(0, |k| k.2)
    }

    /// The type that the number in a directory entry names.
    #[must_use]
    pub fn from_dirent(number: u8) -> Option<Self> {
        KINDS.iter().find(|k| k.1 == number).map(|k| k.0)
    }

    /// The number in directory entries.
    #[must_use]
    pub fn dirent_number(self) -> u8 {
        KINDS.iter().find(|k| k.0 == self).map_or(0, |k| k.1)
    }

    /// Whether inodes of this type carry a device number.
    #[must_use]
    pub const fn is_special(self) -> bool {
        matches!(
            self,
            Self::CharDevice | Self::BlockDevice | Self::Fifo | Self::Socket
        )
    }
}

/// Whether `name` may be a directory entry other than `.` and `..`.
#[must_use]
pub fn is_valid_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|&b| b == b'/' || b == 0)
}

/// A length in memory as a number of 64 bits.
#[must_use]
#[allow(
    clippy::cast_possible_truncation,
    reason = "usize has at most 64 bits on every target of Rust"
)]
pub const fn len64(len: usize) -> u64 {
    len as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_map_both_ways() {
        for (kind, number, bits) in KINDS {
            assert_eq!(FileKind::from_dirent(number), Some(kind));
            assert_eq!(FileKind::from_mode(bits | 0o7777), Some(kind));
            assert_eq!((kind.dirent_number(), kind.mode_bits()), (number, bits));
        }
        assert_eq!(FileKind::from_dirent(0), None);
        assert_eq!(FileKind::from_mode(0), None);
    }

    #[test]
    fn names() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'n'; 256]] {
            assert!(!is_valid_name(bad));
        }
        for good in [&b"..."[..], b"-", b"\xff", &[b'n'; 255]] {
            assert!(is_valid_name(good));
        }
    }
}
