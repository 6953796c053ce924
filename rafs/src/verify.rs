//! The checks whose cost depends on the number of files.
//!
//! Opening an image checks its superblocks and tables only.
//! [`Image::verify_tree`] looks at everything else: every directory, inode,
//! attribute, symlink, chunk index and chunk record. What it accepts can be
//! read, listed and merged without an error from the bootstrap.
//!
//! Rules: `docs/format.md`, "What a reader rejects".

use std::ops::ControlFlow;

use crate::error::{Error, Found, corrupt};
use crate::from_image::missing_record;
use crate::fs::{DirEntry, Inode, Layout};
use crate::image::Image;
use crate::units::{BLOCK, FileKind, MAX_DEPTH, Nid, is_valid_name};
use crate::visited::Visited;

/// What an image holds, counted while it was verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Directories, the root included.
    pub directories: u64,
    /// Names of regular files; a hard link counts again.
    pub files: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Devices, pipes and sockets.
    pub specials: u64,
    /// Uncompressed bytes of all regular files; a hard link counts again.
    pub bytes: u64,
    /// Chunk indexes of all regular files; a hard link counts again.
    pub chunks: u64,
}

impl Summary {
    /// All names, the root included: what the superblock should say.
    #[must_use]
    pub fn names(&self) -> u64 {
        self.directories + self.files + self.symlinks + self.specials
    }

    /// Counts an inode that is no directory.
    fn count(&mut self, inode: &Inode, chunk_size: u32) {
        match inode.kind() {
            FileKind::File => {
                self.files += 1;
                self.bytes = self.bytes.saturating_add(inode.size());
                let chunks = inode.size().div_ceil(chunk_size.into());
                self.chunks = self.chunks.saturating_add(chunks);
            }
            FileKind::Symlink => self.symlinks += 1,
            _ => self.specials += 1,
        }
    }
}

/// A directory that is still to be verified.
struct Pending {
    nid: Nid,
    parent: Nid,
    depth: u32,
}

impl Image {
    /// Walks the whole image and checks everything that opening it did not.
    ///
    /// Takes time in proportion to the image and memory in proportion to its
    /// directories. Does not block.
    ///
    /// # Errors
    /// The first [`Error`] met.
    pub fn verify_tree(&self) -> Result<Summary, Error> {
        let mut summary = Summary::default();
        let mut visited = Visited::new(self);
        let root = self.root();
        let mut pending = vec![Pending {
            nid: root,
            parent: root,
            depth: 0,
        }];
        for position in 0..self.chunk_record_count() {
            self.chunk_record(position)?;
        }
        while let Some(dir) = pending.pop() {
            if dir.depth > MAX_DEPTH {
                return Err(corrupt("directory depth", 0, dir.depth, "at most 4096"));
            }
            summary.directories += 1;
            for nid in self.verify_directory(&dir, &mut visited, &mut summary)? {
                pending.push(Pending {
                    nid,
                    parent: dir.nid,
                    depth: dir.depth + 1,
                });
            }
        }
        Ok(summary)
    }

    /// Checks a directory and everything in it but subdirectories, which it returns.
    fn verify_directory(
        &self,
        dir: &Pending,
        visited: &mut Visited,
        summary: &mut Summary,
    ) -> Result<Vec<Nid>, Error> {
        let inode = self.directory(dir.nid)?;
        visited.first(&inode)?;
        self.verify_common(&inode)?;
        let mut listing = Listing {
            image: self,
            dir,
            at: inode.offset,
            last: &[],
            dots: 0,
            subdirectories: Vec::new(),
        };
        let mut result = Ok(());
        self.readdir(dir.nid, 0, |entry| {
            result = listing.entry(&entry, visited, summary);
            match result {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        result?;
        if listing.dots != 2 {
            return Err(corrupt(
                "directory",
                inode.offset,
                dir.nid.get(),
                "entries `.` and `..`",
            ));
        }
        Ok(listing.subdirectories)
    }

    /// Checks what all inodes have.
    fn verify_common(&self, inode: &Inode) -> Result<(), Error> {
        if inode.nlink() == 0 {
            return Err(corrupt("link count", inode.offset, 0_u32, "at least 1"));
        }
        if inode.attr().mtime_nsec >= 1_000_000_000 {
            return Err(corrupt(
                "nanoseconds of the modification time",
                inode.offset + 40,
                inode.attr().mtime_nsec,
                "less than 10^9",
            ));
        }
        self.xattrs(inode.nid())?;
        if matches!(inode.layout, Layout::Inline(_)) {
            let tail = inode.size() % BLOCK;
            if inode.offset % BLOCK + (inode.tail_offset() - inode.offset) + tail > BLOCK {
                return Err(corrupt(
                    "inline data",
                    inode.tail_offset(),
                    tail,
                    "inode, attributes and tail in one block",
                ));
            }
        }
        Ok(())
    }

    /// Checks an inode that is no directory.
    fn verify_leaf(&self, inode: &Inode) -> Result<(), Error> {
        self.verify_common(inode)?;
        match inode.kind() {
            FileKind::Symlink => {
                let target = self.readlink(inode.nid())?;
                if target.contains(&0) {
                    return Err(corrupt(
                        "symlink target",
                        inode.offset,
                        Found::bytes(&target),
                        "no NUL",
                    ));
                }
            }
            FileKind::File => self.verify_chunks(inode)?,
            _ => {}
        }
        Ok(())
    }

    /// Every chunk of a file must have its record.
    fn verify_chunks(&self, inode: &Inode) -> Result<(), Error> {
        for extent in self.extents(inode.nid(), 0..inode.size()) {
            let extent = extent?;
            let missing = || missing_record(self, inode.nid(), extent.chunk.get());
            let position = self
                .chunk_position(extent.blob, extent.chunk)
                .ok_or_else(missing)?;
            let record = self.chunk_record(position)?;
            if record.uncompressed_offset != extent.plain.start
                || u64::from(record.uncompressed_size) != extent.plain.end - extent.plain.start
            {
                return Err(missing());
            }
        }
        Ok(())
    }
}

/// The state of one directory's check.
struct Listing<'a> {
    image: &'a Image,
    dir: &'a Pending,
    /// Byte offset of the directory's inode, for messages.
    at: u64,
    last: &'a [u8],
    dots: u32,
    subdirectories: Vec<Nid>,
}

impl<'a> Listing<'a> {
    fn entry(
        &mut self,
        entry: &DirEntry<'a>,
        visited: &mut Visited,
        summary: &mut Summary,
    ) -> Result<(), Error> {
        let bad = |expected| {
            corrupt(
                "directory entry",
                self.at,
                Found::bytes(entry.name),
                expected,
            )
        };
        // The last name is empty before the first entry, and no name is.
        if entry.name <= self.last {
            return Err(bad("a name behind the previous one in byte order"));
        }
        self.last = entry.name;
        let expected = match entry.name {
            b"." => Some(self.dir.nid),
            b".." => Some(self.dir.parent),
            _ => None,
        };
        if let Some(expected) = expected {
            if entry.nid != expected || entry.kind != FileKind::Directory {
                return Err(bad("the directory itself or its parent"));
            }
            self.dots += 1;
            return Ok(());
        }
        if !is_valid_name(entry.name) {
            return Err(bad("a legal name"));
        }
        let inode = self.image.inode(entry.nid)?;
        if inode.kind() != entry.kind {
            return Err(bad("the type of its inode"));
        }
        if inode.kind() == FileKind::Directory {
            self.subdirectories.push(entry.nid);
            return Ok(());
        }
        summary.count(&inode, self.image.chunk_size());
        // Another name of a hard link has nothing new.
        if visited.first(&inode)? {
            self.image.verify_leaf(&inode)
        } else {
            Ok(())
        }
    }
}
