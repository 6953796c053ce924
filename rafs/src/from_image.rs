//! A bootstrap back into a tree, to merge or rebuild it.
//!
//! The walk goes directory by directory without recursion. An image that
//! contains itself is refused: a directory is entered once, and nesting is
//! limited to [`MAX_DEPTH`]. Time and memory are bounded by the length of the
//! bootstrap, see `visited`.

use std::collections::HashMap;
use std::ops::ControlFlow;

use crate::error::{Error, corrupt};
use crate::fs::Inode;
use crate::image::Image;
use crate::tree::{self, ChunkId, Content, InodeId, Tree, Xattrs};
use crate::units::{FileKind, MAX_DEPTH, Nid, is_valid_name};
use crate::visited::Visited;

impl Tree {
    /// Reads all metadata of `image`.
    ///
    /// Names of one inode stay hard links. Every chunk of the image's files must
    /// have a record in its chunk table.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for damage anywhere in the image, including
    /// directories with several names; [`Error::Unsupported`] for encrypted chunks.
    pub fn from_image(image: &Image) -> Result<Self, Error> {
        let root = image.inode(image.root())?;
        let mut tree = Self::new(root.attr());
        tree.blobs = image.blobs().to_vec();
        let root_id = tree.root();
        tree.inode_mut(root_id).xattrs = xattrs(image, image.root())?;
        let mut visited = Visited::new(image);
        visited.first(&root)?;
        let mut loader = Loader {
            image,
            visited,
            tree,
            inodes: HashMap::from([(image.root(), root_id)]),
            chunks: vec![None; image.chunk_record_count()],
        };
        let mut pending = vec![(image.root(), root_id, 0_u32)];
        while let Some((nid, id, depth)) = pending.pop() {
            if depth > MAX_DEPTH {
                return Err(corrupt("directory depth", 0, depth, "at most 4096"));
            }
            for (child, child_id) in loader.directory(nid, id)? {
                pending.push((child, child_id, depth + 1));
            }
        }
        Ok(loader.tree)
    }
}

struct Loader<'a> {
    image: &'a Image,
    tree: Tree,
    visited: Visited,
    /// What was read already.
    inodes: HashMap<Nid, InodeId>,
    /// Chunks of the tree by position in the chunk table.
    chunks: Vec<Option<ChunkId>>,
}

impl Loader<'_> {
    /// Reads the entries of a directory; returns its subdirectories.
    fn directory(&mut self, nid: Nid, id: InodeId) -> Result<Vec<(Nid, InodeId)>, Error> {
        let mut subdirectories = Vec::new();
        let mut result = Ok(());
        let image = self.image;
        image.readdir(nid, 0, |entry| {
            if entry.name == b"." || entry.name == b".." {
                return ControlFlow::Continue(());
            }
            result = self
                .entry(id, entry.name, entry.nid)
                .map(|subdirectory| subdirectories.extend(subdirectory));
            match result {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        result.map(|()| subdirectories)
    }

    /// Reads one entry; returns it if it is a directory.
    fn entry(
        &mut self,
        dir: InodeId,
        name: &[u8],
        nid: Nid,
    ) -> Result<Option<(Nid, InodeId)>, Error> {
        let inode = self.image.inode(nid)?;
        let is_directory = inode.kind() == FileKind::Directory;
        // Fails for a directory that was met before.
        let is_new = self.visited.first(&inode)?;
        let id = match self.inodes.get(&nid) {
            Some(&id) if !is_new => id,
            _ => self.load(&inode)?,
        };
        let duplicate = match self.tree.link(dir, name, id) {
            Ok(previous) => previous.is_some(),
            Err(_) => !is_valid_name(name),
        };
        if duplicate {
            return Err(corrupt(
                "directory entry name",
                self.image.inode_offset(nid)?,
                crate::error::Found::bytes(name),
                "a legal name that no other entry of the directory has",
            ));
        }
        Ok(is_directory.then_some((nid, id)))
    }

    fn load(&mut self, inode: &Inode) -> Result<InodeId, Error> {
        let nid = inode.nid();
        let content = match inode.kind() {
            FileKind::Directory => Content::directory(),
            FileKind::File => Content::File {
                size: inode.size(),
                chunks: self.file_chunks(nid, inode.size())?,
            },
            FileKind::Symlink => Content::Symlink(self.image.readlink(nid)?.into()),
            FileKind::CharDevice => Content::CharDevice(inode.rdev()),
            FileKind::BlockDevice => Content::BlockDevice(inode.rdev()),
            FileKind::Fifo => Content::Fifo,
            FileKind::Socket => Content::Socket,
        };
        let id = self.tree.add_inode(tree::Inode {
            attr: inode.attr(),
            xattrs: xattrs(self.image, nid)?,
            content,
            implied: false,
        });
        self.inodes.insert(nid, id);
        Ok(id)
    }

    /// The chunks of a file. Their number is bounded by the index array, which
    /// lies inside the bootstrap.
    fn file_chunks(&mut self, nid: Nid, size: u64) -> Result<Vec<ChunkId>, Error> {
        let mut chunks = Vec::new();
        for extent in self.image.extents(nid, 0..size) {
            let extent = extent?;
            let position = self.image.chunk_position(extent.blob, extent.chunk);
            let Some(position) = position else {
                return Err(missing_record(self.image, nid, extent.chunk.get()));
            };
            let id = match self.chunks.get(position).copied().flatten() {
                Some(id) => id,
                None => {
                    let id = self.tree.add_chunk(self.image.chunk_record(position)?);
                    if let Some(slot) = self.chunks.get_mut(position) {
                        *slot = Some(id);
                    }
                    id
                }
            };
            let record = self.tree.chunk(id);
            let len = extent.plain.end.saturating_sub(extent.plain.start);
            if record.uncompressed_offset != extent.plain.start
                || u64::from(record.uncompressed_size) != len
            {
                return Err(missing_record(self.image, nid, extent.chunk.get()));
            }
            chunks.push(id);
        }
        Ok(chunks)
    }
}

/// The error for a file chunk without a record that fits.
pub(crate) fn missing_record(image: &Image, nid: Nid, chunk: u32) -> Error {
    let at = image.inode_offset(nid).unwrap_or_default();
    corrupt(
        "chunk of a file",
        at,
        chunk,
        "a record of the same blob, position and size in the chunk table",
    )
}

fn xattrs(image: &Image, nid: Nid) -> Result<Xattrs, Error> {
    let mut all = Xattrs::new();
    for xattr in image.xattrs(nid)? {
        all.insert(xattr.key().into(), xattr.value.into());
    }
    Ok(all)
}
