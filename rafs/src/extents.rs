//! File ranges to chunks: pure arithmetic over chunk indexes.
//!
//! A file is an array of chunk indexes, one per started chunk size. Each names
//! a blob, a chunk of it, and where the chunk starts in the blob's uncompressed
//! address space. So a read can be planned without any table of the blob.
//!
//! Layout: `docs/format.md`, "Chunk indexes".

use std::ops::Range;

use storage::{BlobIndex, ChunkIndex};

use crate::error::{Error, corrupt};
use crate::format::chunk::ChunkIndexEntry;
use crate::format::inode::{CHUNK_FORMAT_BITS, CHUNK_FORMAT_INDEXES};
use crate::fs::{Inode, Layout};
use crate::image::Image;
use crate::units::{BLOCK, FileKind, Nid, len64};

/// A run of a file inside one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The blob that holds the chunk.
    pub blob: BlobIndex,
    /// The chunk in the blob.
    pub chunk: ChunkIndex,
    /// The run in the blob's uncompressed address space, in bytes; not empty,
    /// and inside the blob.
    pub plain: Range<u64>,
    /// Where the run starts in its chunk, in bytes.
    pub chunk_offset: u64,
    /// Where the run starts in the file, in bytes.
    pub file_offset: u64,
}

/// The extents of a file range, in file order. Ends after the first error.
#[derive(Debug)]
pub struct Extents<'a> {
    state: State<'a>,
}

#[derive(Debug)]
enum State<'a> {
    Failed(Option<Error>),
    Walking(Walk<'a>),
}

/// Where a walk over the chunk indexes stands.
#[derive(Debug)]
struct Walk<'a> {
    image: &'a Image,
    /// Byte offset of the chunk index array.
    array: u64,
    size: u64,
    at: u64,
    end: u64,
}

impl Image {
    /// The chunks that hold `range` of file `nid`, which is cut at the file's end.
    ///
    /// Costs O(1) to start and per extent. Every extent is checked against the
    /// blob table before it is returned.
    ///
    /// The first item is an error if `nid` is no regular file
    /// ([`Error::WrongKind`]) or is damaged ([`Error::Corrupt`]).
    #[must_use]
    pub fn extents(&self, nid: Nid, range: Range<u64>) -> Extents<'_> {
        let state = match self.inode(nid).and_then(|inode| self.walk(&inode, range)) {
            Ok(walk) => State::Walking(walk),
            Err(err) => State::Failed(Some(err)),
        };
        Extents { state }
    }

    fn walk(&self, inode: &Inode, range: Range<u64>) -> Result<Walk<'_>, Error> {
        let Layout::Chunked(format) = inode.layout else {
            return Err(Error::WrongKind {
                nid: inode.nid(),
                expected: "regular file",
            });
        };
        if inode.kind() != FileKind::File {
            return Err(Error::WrongKind {
                nid: inode.nid(),
                expected: "regular file",
            });
        }
        if format & !CHUNK_FORMAT_BITS != CHUNK_FORMAT_INDEXES {
            return Err(corrupt(
                "chunk format",
                inode.offset.saturating_add(16),
                format,
                "bit 5 set, bits 6 to 31 clear",
            ));
        }
        let array = inode.tail_offset().checked_next_multiple_of(8);
        let count = inode.size().div_ceil(u64::from(self.chunk_size()));
        let len = count.checked_mul(len64(size_of::<ChunkIndexEntry>()));
        let (Some(array), Some(len)) = (array, len) else {
            return Err(corrupt(
                "file size",
                inode.offset + 8,
                inode.size(),
                "no overflow",
            ));
        };
        if len > 0 {
            self.slice(array, len, "chunk index array")?;
        }
        Ok(Walk {
            image: self,
            array,
            size: inode.size(),
            at: range.start,
            end: range.end.min(inode.size()),
        })
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.state {
            State::Failed(err) => err.take().map(Err),
            State::Walking(walk) => {
                if walk.at >= walk.end {
                    return None;
                }
                match walk.step() {
                    Ok(extent) => Some(Ok(extent)),
                    Err(err) => {
                        self.state = State::Failed(None);
                        Some(Err(err))
                    }
                }
            }
        }
    }
}

impl Walk<'_> {
    /// The extent at `self.at`, which lies before the end of the file.
    fn step(&mut self) -> Result<Extent, Error> {
        let chunk_size = u64::from(self.image.chunk_size());
        let (position, within) = (self.at / chunk_size, self.at % chunk_size);
        // The whole array is inside the file, so nothing below overflows.
        let entry_at = self.array + position * len64(size_of::<ChunkIndexEntry>());
        let entry: &ChunkIndexEntry = self.image.raw(entry_at, "chunk index")?;
        let chunk_len = chunk_size.min(self.size - position * chunk_size);
        let (blob, chunk, start) = self.check(entry, entry_at, chunk_len)?;
        let len = (chunk_len - within).min(self.end - self.at);
        let extent = Extent {
            blob,
            chunk,
            plain: start + within..start + within + len,
            chunk_offset: within,
            file_offset: self.at,
        };
        self.at += len;
        Ok(extent)
    }

    /// Blob, chunk and its start in the blob's uncompressed address space.
    fn check(
        &self,
        entry: &ChunkIndexEntry,
        at: u64,
        len: u64,
    ) -> Result<(BlobIndex, ChunkIndex, u64), Error> {
        let blob = u32::from(entry.device).checked_sub(1).map(BlobIndex::new);
        let info = blob.and_then(|b| self.image.blobs().get(b.as_usize()));
        let (Some(blob), Some(info)) = (blob, info) else {
            return Err(corrupt(
                "blob of a chunk index",
                at + 2,
                entry.device,
                "a known blob + 1",
            ));
        };
        let index = u32::from(entry.index_high) << 16 | u32::from(entry.index_low.get());
        if index >= info.chunk_count {
            return Err(corrupt(
                "chunk of a chunk index",
                at,
                index,
                "less than the blob's chunk count",
            ));
        }
        let start = u64::from(entry.block.get()) * BLOCK;
        if start + len > info.uncompressed_size {
            return Err(corrupt(
                "block of a chunk index",
                at + 4,
                entry.block.get(),
                "a chunk inside the blob",
            ));
        }
        Ok((blob, ChunkIndex::new(index), start))
    }
}
