//! Inodes of both sizes (`docs/format.md`, "Inodes").

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bit of the format word: 64-byte inode.
pub const EXTENDED: u16 = 0x1;
/// Data layout: all data in blocks, or none.
pub const LAYOUT_PLAIN: u16 = 0;
/// Data layout: the last partial block follows the inode.
pub const LAYOUT_INLINE: u16 = 2;
/// Data layout: chunk indexes follow the inode.
pub const LAYOUT_CHUNKED: u16 = 4;
/// Bit of the chunk format: 8-byte chunk indexes.
pub const CHUNK_FORMAT_INDEXES: u32 = 0x20;
/// Bits of the chunk format: logarithm of the mapping unit in blocks.
pub const CHUNK_FORMAT_BITS: u32 = 0x1f;

/// 32-byte inode, in images of older writers only.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct CompactInode {
    pub format: U16,
    pub xattr_count: U16,
    pub mode: U16,
    pub nlink: U16,
    pub size: U32,
    pub reserved: U32,
    pub union: U32,
    pub ino: U32,
    pub uid: U16,
    pub gid: U16,
    pub reserved2: U32,
}
const _: () = assert!(size_of::<CompactInode>() == 32);

/// 64-byte inode.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct ExtendedInode {
    pub format: U16,
    pub xattr_count: U16,
    pub mode: U16,
    pub reserved: U16,
    pub size: U64,
    pub union: U32,
    pub ino: U32,
    pub uid: U32,
    pub gid: U32,
    pub mtime: I64,
    pub mtime_nsec: U32,
    pub nlink: U32,
    pub reserved2: [u8; 16],
}
const _: () = assert!(size_of::<ExtendedInode>() == 64);
