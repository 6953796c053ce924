//! An image in memory: inodes, directories, chunks and blobs, to be built,
//! merged and written.
//!
//! Inodes live in an arena. A name is an entry of a directory; a hard link is a
//! second entry that leads to the same inode, so link counts are never stored,
//! only counted. Chunks live in an arena of their own, because files share them.

mod walk;

use std::collections::BTreeMap;

use storage::{BlobIndex, BlobInfo, ChunkIndex, Digest};

use crate::error::WriteError;
use crate::units::{FileKind, is_valid_name};
pub use walk::{Walk, WalkEntry};

/// A name in a directory: any bytes but `/` and NUL, 1 to 255 of them.
pub type Name = Box<[u8]>;

/// Extended attributes by full key (`user.x`, `security.capability`, …), sorted.
pub type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// Names an inode of one [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub(crate) u32);

/// Names a chunk of one [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub(crate) u32);

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
    /// Whether this is a directory that exists only because its layer puts
    /// something into it. Over a directory of a lower layer it changes nothing
    /// but the entries. Bootstraps do not store this.
    pub implied: bool,
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

impl InodeId {
    /// The id as a position in the arena.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "usize has at least 32 bits on Linux"
    )]
    pub(crate) const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl ChunkId {
    /// The id as a position in the arena.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "usize has at least 32 bits on Linux"
    )]
    pub(crate) const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl Content {
    /// An empty directory.
    #[must_use]
    pub const fn directory() -> Self {
        Self::Directory(BTreeMap::new())
    }

    /// The type of inode that has such content.
    #[must_use]
    pub const fn kind(&self) -> FileKind {
        match self {
            Self::Directory(_) => FileKind::Directory,
            Self::File { .. } => FileKind::File,
            Self::Symlink(_) => FileKind::Symlink,
            Self::CharDevice(_) => FileKind::CharDevice,
            Self::BlockDevice(_) => FileKind::BlockDevice,
            Self::Fifo => FileKind::Fifo,
            Self::Socket => FileKind::Socket,
        }
    }
}

impl Inode {
    /// An inode without extended attributes.
    #[must_use]
    pub const fn new(attr: Attr, content: Content) -> Self {
        Self {
            attr,
            xattrs: Xattrs::new(),
            content,
            implied: false,
        }
    }

    /// A directory that its layer has no entry for, see [`Inode::implied`].
    #[must_use]
    pub const fn implied_directory(attr: Attr) -> Self {
        let mut inode = Self::new(attr, Content::directory());
        inode.implied = true;
        inode
    }

    /// The entries, if it is a directory.
    #[must_use]
    pub const fn entries(&self) -> Option<&BTreeMap<Name, InodeId>> {
        match &self.content {
            Content::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    /// The entries to change, if it is a directory.
    pub(crate) const fn entries_mut(&mut self) -> Option<&mut BTreeMap<Name, InodeId>> {
        match &mut self.content {
            Content::Directory(entries) => Some(entries),
            _ => None,
        }
    }
}

/// Ids are only valid for the tree that gave them; the accessors panic on others,
/// like an index out of range.
impl Tree {
    /// A tree of one empty directory, without chunks and blobs.
    #[must_use]
    pub fn new(root: Attr) -> Self {
        Self {
            inodes: vec![Inode::new(root, Content::directory())],
            chunks: Vec::new(),
            blobs: Vec::new(),
        }
    }

    /// The root directory.
    #[must_use]
    pub const fn root(&self) -> InodeId {
        InodeId(0)
    }

    /// The inode with this id.
    #[must_use]
    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.as_usize()]
    }

    /// The inode with this id, to change. Entries are best changed with
    /// [`Tree::link`] and [`Tree::unlink`].
    pub fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id.as_usize()]
    }

    /// All inodes of the arena, also those that no name leads to (any more).
    #[must_use]
    pub fn inodes(&self) -> &[Inode] {
        &self.inodes
    }

    /// Adds an inode that no name leads to yet.
    ///
    /// # Panics
    /// At 2^32 inodes, which take more than 400 GiB.
    pub fn add_inode(&mut self, inode: Inode) -> InodeId {
        let id = u32::try_from(self.inodes.len()).expect("an arena of 2^32 inodes fits no memory");
        self.inodes.push(inode);
        InodeId(id)
    }

    /// Lets `name` in directory `dir` lead to `id`, and returns what it led to before.
    ///
    /// A second name for an inode is a hard link. A directory must get one name
    /// only; that is checked when the tree is written.
    ///
    /// # Errors
    /// [`WriteError::BadName`], and [`WriteError::NotADirectory`] for `dir`.
    pub fn link(
        &mut self,
        dir: InodeId,
        name: &[u8],
        id: InodeId,
    ) -> Result<Option<InodeId>, WriteError> {
        if !is_valid_name(name) {
            return Err(WriteError::BadName {
                name: name.to_vec(),
            });
        }
        match self.inode_mut(dir).entries_mut() {
            Some(entries) => Ok(entries.insert(name.into(), id)),
            None => Err(WriteError::NotADirectory {
                path: name.to_vec(),
            }),
        }
    }

    /// Adds an inode and lets `name` in `dir` lead to it.
    ///
    /// # Errors
    /// As for [`Tree::link`]; the inode is not added then.
    pub fn insert(
        &mut self,
        dir: InodeId,
        name: &[u8],
        inode: Inode,
    ) -> Result<InodeId, WriteError> {
        let id = self.add_inode(inode);
        match self.link(dir, name, id) {
            Ok(_) => Ok(id),
            Err(err) => {
                self.inodes.pop();
                Err(err)
            }
        }
    }

    /// Removes a name, and returns what it led to. `None` also if `dir` is no directory.
    pub fn unlink(&mut self, dir: InodeId, name: &[u8]) -> Option<InodeId> {
        self.inode_mut(dir).entries_mut()?.remove(name)
    }

    /// What `name` leads to in `dir`; `None` also if `dir` is no directory.
    #[must_use]
    pub fn entry(&self, dir: InodeId, name: &[u8]) -> Option<InodeId> {
        self.inode(dir).entries()?.get(name).copied()
    }

    /// What a path leads to, from the root, without following symbolic links.
    /// Empty components are ignored, so `""` and `"/"` are the root.
    #[must_use]
    pub fn lookup(&self, path: &[u8]) -> Option<InodeId> {
        path.split(|&b| b == b'/')
            .filter(|name| !name.is_empty())
            .try_fold(self.root(), |dir, name| self.entry(dir, name))
    }

    /// The directory at `path`, created with all its missing parents.
    ///
    /// * `path`: components separated by `/`; empty ones are ignored.
    /// * `attr`: what created directories get.
    ///
    /// # Errors
    /// [`WriteError::NotADirectory`] if a component exists and is none (a
    /// symbolic link is not followed), [`WriteError::BadName`] for `.`, `..`
    /// and names that are too long.
    pub fn mkdir_all(&mut self, path: &[u8], attr: Attr) -> Result<InodeId, WriteError> {
        let mut dir = self.root();
        for name in path.split(|&b| b == b'/').filter(|name| !name.is_empty()) {
            dir = match self.entry(dir, name) {
                Some(id) if self.inode(id).entries().is_some() => id,
                Some(_) => {
                    return Err(WriteError::NotADirectory {
                        path: path.to_vec(),
                    });
                }
                None => self.insert(dir, name, Inode::new(attr, Content::directory()))?,
            };
        }
        Ok(dir)
    }

    /// Adds a stored chunk, to be named by files.
    ///
    /// # Panics
    /// At 2^32 chunks, which take more than 400 GiB.
    pub fn add_chunk(&mut self, chunk: ChunkRecord) -> ChunkId {
        let id = u32::try_from(self.chunks.len()).expect("an arena of 2^32 chunks fits no memory");
        self.chunks.push(chunk);
        ChunkId(id)
    }

    /// The chunk with this id.
    #[must_use]
    pub fn chunk(&self, id: ChunkId) -> &ChunkRecord {
        &self.chunks[id.as_usize()]
    }

    /// The chunk with this id, to change.
    pub fn chunk_mut(&mut self, id: ChunkId) -> &mut ChunkRecord {
        &mut self.chunks[id.as_usize()]
    }

    /// All chunks of the arena, in the order of their ids.
    #[must_use]
    pub fn chunks(&self) -> &[ChunkRecord] {
        &self.chunks
    }

    /// All chunks of the arena, in the order of their ids, to change.
    pub fn chunks_mut(&mut self) -> &mut [ChunkRecord] {
        &mut self.chunks
    }

    /// The ids of all chunks, in the order of [`Tree::chunks`].
    pub fn chunk_ids(&self) -> impl Iterator<Item = ChunkId> + use<> {
        let end = u32::try_from(self.chunks.len()).unwrap_or(u32::MAX);
        (0..end).map(ChunkId)
    }

    /// Every name of the tree with its path, the root (with the path `/`) first.
    ///
    /// The order is the one in which files are stored: all entries of a
    /// directory in name order, then its subdirectories one after the other.
    /// A hard link appears once for every name.
    #[must_use]
    pub fn walk(&self) -> Walk<'_> {
        Walk::new(self)
    }

    /// Takes the tree apart: inodes and chunks in the order of their ids.
    pub(crate) fn into_parts(self) -> (Vec<Inode>, Vec<ChunkRecord>, Vec<BlobInfo>) {
        (self.inodes, self.chunks, self.blobs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_inodes() {
        let mut tree = Tree::new(Attr::default());
        let dir = tree.mkdir_all(b"/a//b/", Attr::default()).unwrap();
        let file = tree
            .insert(dir, b"f", Inode::new(Attr::default(), Content::Fifo))
            .unwrap();
        assert_eq!(tree.link(tree.root(), b"g", file).unwrap(), None);
        assert_eq!(tree.lookup(b"a/b/f"), Some(file));
        assert_eq!(tree.lookup(b"/g"), Some(file));
        assert_eq!(tree.lookup(b""), Some(tree.root()));
        assert_eq!(tree.lookup(b"g/x"), None);
        assert_eq!(tree.unlink(tree.root(), b"g"), Some(file));
        assert_eq!(tree.lookup(b"g"), None);
    }

    #[test]
    fn bad_names_and_non_directories_are_refused() {
        let mut tree = Tree::new(Attr::default());
        let inodes = tree.inodes().len();
        let fifo = || Inode::new(Attr::default(), Content::Fifo);
        let root = tree.root();
        assert!(matches!(
            tree.insert(root, b"..", fifo()),
            Err(WriteError::BadName { .. })
        ));
        assert_eq!(tree.inodes().len(), inodes);
        let file = tree.insert(root, b"f", fifo()).unwrap();
        assert!(matches!(
            tree.link(file, b"x", root),
            Err(WriteError::NotADirectory { .. })
        ));
        assert!(matches!(
            tree.mkdir_all(b"f/x", Attr::default()),
            Err(WriteError::NotADirectory { .. })
        ));
    }
}
