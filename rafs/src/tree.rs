//! An image in memory: inodes, directories, chunks and blobs, to be built,
//! merged and written.
//!
//! Inodes live in an arena. A name is an entry of a directory; a hard link is a
//! second entry that leads to the same inode, so link counts are never stored,
//! only counted. Chunks live in an arena of their own, because files share them.

use std::collections::BTreeMap;

use storage::{BlobIndex, BlobInfo, ChunkIndex, Digest};

/// A name in a directory: any bytes but `/` and NUL, 1 to 255 of them.
pub type Name = Box<[u8]>;

/// Extended attributes by full key (`user.x`, `security.capability`, …), sorted.
pub type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// Names an inode of one [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(u32);

/// Names a chunk of one [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(u32);

/// Permission bits, owner and time of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Attr {
    /// The low 12 bits of `st_mode`: permissions, set-id and sticky bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time in seconds since 1970, negative before.
    pub mtime: i64,
    /// Nanoseconds of the modification time, below 10^9.
    pub mtime_nsec: u32,
}

/// What an inode is, and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A directory: entries by name, in byte order. `.` and `..` are implied.
    Directory(BTreeMap<Name, InodeId>),
    /// A regular file of `size` bytes, cut into chunks of the tree's chunk size.
    File {
        /// Length in bytes.
        size: u64,
        /// One chunk per started chunk size, in file order.
        chunks: Vec<ChunkId>,
    },
    /// A symbolic link and its target, 1 to 4095 bytes.
    Symlink(Box<[u8]>),
    /// A character device with its number in Linux's 32-bit encoding.
    CharDevice(u32),
    /// A block device with its number in Linux's 32-bit encoding.
    BlockDevice(u32),
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
}

/// A file system object; the names that lead to it are in its directories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Permission bits, owner and time.
    pub attr: Attr,
    /// Extended attributes.
    pub xattrs: Xattrs,
    /// Type and content.
    pub content: Content,
}

/// A stored chunk: one record of a bootstrap's chunk table. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkRecord {
    /// Digest of the uncompressed bytes, by the blob's digester.
    pub digest: Digest,
    /// The blob that holds it: an index into [`Tree::blobs`].
    pub blob: BlobIndex,
    /// Its position in the blob's chunk table.
    pub index: ChunkIndex,
    /// Whether it is stored compressed. False for a chunk of a batch.
    pub compressed: bool,
    /// Stored length; 0 for a chunk of a batch.
    pub compressed_size: u32,
    /// Length of the data, 1 to 16 MiB.
    pub uncompressed_size: u32,
    /// Start in the stored blob; 0 for a chunk of a batch.
    pub compressed_offset: u64,
    /// Start in the uncompressed address space; a multiple of 4096.
    pub uncompressed_offset: u64,
    /// Position in the file that used the chunk last while it was built.
    pub file_offset: u64,
    /// CRC32C of the uncompressed bytes, if known.
    pub crc32c: Option<u32>,
}

/// An image, or one layer of it, in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    inodes: Vec<Inode>,
    chunks: Vec<ChunkRecord>,
    /// The blobs that [`ChunkRecord::blob`] refers to, in table order.
    pub blobs: Vec<BlobInfo>,
}
