//! One chunk of a blob: where it lies in both address spaces and how to decode it.
#![forbid(unsafe_code)]

use std::ops::Range;

/// A chunk as the chunk table of its blob describes it. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Start in the uncompressed address space; a multiple of 4096.
    pub plain_offset: u64,
    /// Uncompressed length, 1 to 16 MiB.
    pub plain_size: u32,
    /// How to get the bytes.
    pub encoding: Encoding,
    /// CRC32C of the uncompressed bytes, if the table carries one.
    pub crc32c: Option<u32>,
}

/// How the bytes of a chunk are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The chunk is `size` raw bytes at `offset` of the blob; `size` equals `plain_size`.
    Raw {
        /// Start in the compressed address space.
        offset: u64,
    },
    /// The chunk is one compressed unit by the blob's compressor.
    Compressed {
        /// Start in the compressed address space.
        offset: u64,
        /// Stored length.
        size: u32,
    },
    /// The chunk is part of a batch that is stored as one unit.
    Batch {
        /// Start of the *batch* in the compressed address space.
        offset: u64,
        /// Index of the batch context.
        context: u32,
        /// Start of the chunk in the uncompressed batch.
        within: u32,
    },
    /// The chunk is part of the output of a gzip seek context.
    Zran {
        /// Index of the context.
        context: u32,
        /// Start of the chunk in the context's output.
        within: u32,
    },
}

impl Chunk {
    /// The bytes of the uncompressed address space that hold the chunk's data.
    #[must_use]
    pub fn plain_range(&self) -> Range<u64> {
        self.plain_offset..self.plain_offset.saturating_add(u64::from(self.plain_size))
    }
}
