//! The file-system view of an image: attributes, lookup, readdir, symlinks.
//!
//! Every operation takes an inode number, reads the inode from the map, checks
//! what it uses and works on borrowed bytes. Directories are searched by
//! bisection, first over blocks, then inside one; a directory cookie names a
//! block and an entry, so a listing resumes without searching.
//!
//! Promises: no panic, no allocation beyond a few KiB and no unbounded loop,
//! whatever the bytes say. No I/O but page faults of the map; no locks.
//!
//! Next: [`extents`](crate::extents) for file data, [`xattr`](crate::xattr).
//! Layout: `docs/format.md`, "Inodes", "Directories".

mod directory;

use crate::error::{Error, corrupt};
use crate::format::inode::{
    CompactInode, EXTENDED, ExtendedInode, LAYOUT_CHUNKED, LAYOUT_INLINE, LAYOUT_PLAIN,
};
use crate::image::Image;
use crate::tree::Attr;
use crate::units::{BLOCK, FileKind, Nid};
pub use directory::DirEntry;

/// Longest symbolic link target that is read, in bytes.
pub const MAX_SYMLINK: u64 = 4096;

/// How an inode's data is placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// All data in consecutive blocks from this one on.
    Plain(u32),
    /// Whole blocks from this one on, the rest behind the inode.
    Inline(u32),
    /// Chunk indexes behind the inode; the chunk format word.
    Chunked(u32),
}

/// An inode, read and checked. Small; copy it freely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    nid: Nid,
    kind: FileKind,
    attr: Attr,
    size: u64,
    nlink: u32,
    rdev: u32,
    ino: u32,
    pub(crate) layout: Layout,
    /// Byte offset in the bootstrap.
    pub(crate) offset: u64,
    /// Bytes of the inode itself: 32 or 64.
    header: u64,
    /// Bytes of the xattr area that follows it.
    pub(crate) xattr_size: u64,
}

impl Inode {
    /// Its number in this image.
    #[must_use]
    pub fn nid(&self) -> Nid {
        self.nid
    }

    /// Its type.
    #[must_use]
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Permission bits, owner and time. A compact inode has time 0.
    #[must_use]
    pub fn attr(&self) -> Attr {
        self.attr
    }

    /// `st_mode`: type and permission bits.
    #[must_use]
    pub fn mode(&self) -> u16 {
        self.kind.mode_bits() | self.attr.permissions
    }

    /// Length of a file, symlink target or directory listing, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of names, or 2 + subdirectories of a directory.
    #[must_use]
    pub fn nlink(&self) -> u32 {
        self.nlink
    }

    /// Device number in Linux's 32-bit encoding; 0 unless a device.
    #[must_use]
    pub fn rdev(&self) -> u32 {
        self.rdev
    }

    /// Serial number given by the builder; only informative.
    #[must_use]
    pub fn ino(&self) -> u32 {
        self.ino
    }

    /// Byte offset right behind the inode, where its xattrs are.
    pub(crate) fn xattr_offset(&self) -> u64 {
        self.offset.saturating_add(self.header)
    }

    /// Byte offset right behind inode and xattrs.
    pub(crate) fn tail_offset(&self) -> u64 {
        self.xattr_offset().saturating_add(self.xattr_size)
    }
}

/// The fields that both inode sizes have, widened.
struct Fields {
    format: u16,
    xattr_count: u16,
    mode: u16,
    size: u64,
    union: u32,
    ino: u32,
    nlink: u32,
    attr: Attr,
    header: u64,
}

impl From<&ExtendedInode> for Fields {
    fn from(raw: &ExtendedInode) -> Self {
        Self {
            format: raw.format.get(),
            xattr_count: raw.xattr_count.get(),
            mode: raw.mode.get(),
            size: raw.size.get(),
            union: raw.union.get(),
            ino: raw.ino.get(),
            nlink: raw.nlink.get(),
            attr: Attr {
                permissions: raw.mode.get() & 0o7777,
                uid: raw.uid.get(),
                gid: raw.gid.get(),
                mtime: raw.mtime.get(),
                mtime_nsec: raw.mtime_nsec.get(),
            },
            header: 64,
        }
    }
}

impl From<&CompactInode> for Fields {
    fn from(raw: &CompactInode) -> Self {
        Self {
            format: raw.format.get(),
            xattr_count: raw.xattr_count.get(),
            mode: raw.mode.get(),
            size: raw.size.get().into(),
            union: raw.union.get(),
            ino: raw.ino.get(),
            nlink: raw.nlink.get().into(),
            attr: Attr {
                permissions: raw.mode.get() & 0o7777,
                uid: raw.uid.get().into(),
                gid: raw.gid.get().into(),
                mtime: 0,
                mtime_nsec: 0,
            },
            header: 32,
        }
    }
}

impl Image {
    /// Reads and checks an inode.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the number leads outside the file or the inode
    /// breaks a rule.
    pub fn inode(&self, nid: Nid) -> Result<Inode, Error> {
        let offset = self.inode_offset(nid)?;
        let format = self.raw::<zerocopy::little_endian::U16>(offset, "inode format")?;
        let fields = if format.get() & EXTENDED != 0 {
            Fields::from(self.raw::<ExtendedInode>(offset, "extended inode")?)
        } else {
            Fields::from(self.raw::<CompactInode>(offset, "compact inode")?)
        };
        check_inode(nid, offset, &fields)
    }

    /// An inode that must be a directory.
    pub(crate) fn directory(&self, nid: Nid) -> Result<Inode, Error> {
        let inode = self.inode(nid)?;
        if inode.kind != FileKind::Directory {
            return Err(Error::WrongKind {
                nid,
                expected: "directory",
            });
        }
        Ok(inode)
    }

    /// Target of a symbolic link, 1 to 4096 bytes.
    ///
    /// # Errors
    /// [`Error::WrongKind`] for another type, [`Error::Corrupt`] for a target
    /// of illegal length or outside the file.
    pub fn readlink(&self, nid: Nid) -> Result<Vec<u8>, Error> {
        let inode = self.inode(nid)?;
        if inode.kind != FileKind::Symlink {
            return Err(Error::WrongKind {
                nid,
                expected: "symbolic link",
            });
        }
        if inode.size == 0 || inode.size > MAX_SYMLINK {
            return Err(corrupt(
                "symlink length",
                inode.offset.saturating_add(8),
                inode.size,
                "1 to 4096",
            ));
        }
        // At most one block, because of the limit above.
        Ok(self.flat_block(&inode, 0)?.to_vec())
    }

    /// Block `index` of the data of a directory or symlink: 4096 bytes, or the
    /// rest in the last one.
    pub(crate) fn flat_block(&self, inode: &Inode, index: u64) -> Result<&[u8], Error> {
        let outside = || corrupt("data block", inode.offset, index, "a block of the inode");
        let done = index.checked_mul(BLOCK).ok_or_else(outside)?;
        let len = inode.size.checked_sub(done).ok_or_else(outside)?.min(BLOCK);
        let (start, inline) = match inode.layout {
            Layout::Plain(start) => (start, false),
            Layout::Inline(start) => (start, len < BLOCK),
            Layout::Chunked(_) => return Err(outside()),
        };
        if inline {
            return self.slice(inode.tail_offset(), len, "inline data");
        }
        let offset = u64::from(start)
            .checked_add(index)
            .and_then(|block| block.checked_mul(BLOCK))
            .ok_or_else(outside)?;
        self.slice(offset, len, "data block")
    }
}

fn check_inode(nid: Nid, offset: u64, f: &Fields) -> Result<Inode, Error> {
    let Some(kind) = FileKind::from_mode(f.mode) else {
        return Err(corrupt(
            "file mode",
            offset + 4,
            f.mode,
            "a known file type",
        ));
    };
    let layout = match f.format >> 1 {
        LAYOUT_PLAIN => Layout::Plain(f.union),
        LAYOUT_INLINE => Layout::Inline(f.union),
        LAYOUT_CHUNKED => Layout::Chunked(f.union),
        _ => {
            return Err(corrupt(
                "inode format",
                offset,
                f.format,
                "0, 1, 4, 5, 8 or 9",
            ));
        }
    };
    let allowed = match kind {
        FileKind::File => matches!(layout, Layout::Chunked(_)),
        FileKind::Directory | FileKind::Symlink => !matches!(layout, Layout::Chunked(_)),
        _ => true,
    };
    if !allowed {
        return Err(corrupt(
            "inode format",
            offset,
            f.format,
            "a data layout that fits its type",
        ));
    }
    let xattr_size = match f.xattr_count {
        0 => 0,
        words => 12 + 4 * u64::from(words - 1),
    };
    let is_device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
    Ok(Inode {
        nid,
        kind,
        attr: f.attr,
        size: f.size,
        nlink: f.nlink,
        rdev: if is_device { f.union } else { 0 },
        ino: f.ino,
        layout,
        offset,
        header: f.header,
        xattr_size,
    })
}

/// Number of blocks that hold `size` bytes.
pub(crate) fn block_count(size: u64) -> u64 {
    size.div_ceil(BLOCK)
}
