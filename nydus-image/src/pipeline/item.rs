//! What travels through the pipeline: a buffer with some consecutive chunks.

use std::ops::Range;

use storage::Digest;
use storage::original::Place;

use super::budget::Buffer;

/// Consecutive chunks of the stream, of one or more files.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) buffer: Buffer,
    pub(crate) chunks: Vec<RawChunk>,
}

/// A chunk as the source delivers it.
#[derive(Debug)]
pub(crate) struct RawChunk {
    /// Length in bytes, at least 1.
    pub(crate) len: u32,
    /// Its position in its file.
    pub(crate) file_offset: u64,
    /// Start of its bytes in the buffer; `None` if it lies in a hole, all zeros.
    pub(crate) start: Option<usize>,
    /// Whether it is compressed together with its neighbours, by the blob writer.
    pub(crate) batched: bool,
    /// Where it is already, if its layer is used in place.
    pub(crate) place: Option<Place>,
}

/// What a worker found out about a chunk.
#[derive(Debug)]
pub(crate) struct Digested {
    pub(crate) digest: Digest,
    pub(crate) crc32c: u32,
    pub(crate) data: Data,
}

/// Which form of a chunk is ready to be stored.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// Somebody else claimed the digest.
    Claimed,
    /// Store the input: compression does not make it smaller, or comes later.
    Raw,
    /// Compressed bytes in the buffer's output.
    Compressed(Range<usize>),
}

impl RawChunk {
    /// The bytes of the chunk, from the buffer or from `zeros`.
    ///
    /// The feeder never makes a chunk longer than the buffer or the chunk size,
    /// which is the length of `zeros`.
    pub(crate) fn bytes<'a>(&self, input: &'a [u8], zeros: &'a [u8]) -> &'a [u8] {
        let len = len(self.len);
        match self.start {
            Some(start) => &input[start..start + len],
            None => &zeros[..len],
        }
    }
}

/// A chunk length as a length in memory.
#[allow(
    clippy::cast_possible_truncation,
    reason = "usize has at least 32 bits on Linux"
)]
pub(crate) const fn len(bytes: u32) -> usize {
    bytes as usize
}
