//! Small chunks that are compressed as one unit.
//!
//! A batch grows chunk by chunk, is sealed with any encoder on any thread, and is
//! then handed to [`BlobWriter::append_batch`](super::BlobWriter::append_batch)
//! when its turn comes. Rules: `docs/format-blob.md`, "Batches".

use super::BlobOptions;
use crate::codec::{CodecError, Encoder, as_u64};
use crate::digest::Digest;

/// A batch that is being filled.
#[derive(Debug, Default)]
pub struct Batch {
    members: Vec<Member>,
    bytes: Vec<u8>,
}

/// A batch that is ready to be stored.
#[derive(Debug)]
pub struct SealedBatch {
    pub(super) members: Vec<Member>,
    pub(super) plain_size: usize,
    /// Compressed, unless that would not be smaller.
    pub(super) stored: Vec<u8>,
}

/// A chunk of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) digest: Digest,
    /// In bytes; less than the batch size.
    pub(super) size: u32,
}

impl Batch {
    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Chunks in it.
    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        // Each has at least one byte of a batch of at most 16 MiB.
        u32::try_from(self.members.len()).unwrap_or(u32::MAX)
    }

    /// Uncompressed bytes in it.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether a chunk of `size` bytes may join; if not, seal this batch first.
    #[must_use]
    pub fn has_room(&self, size: usize, options: &BlobOptions) -> bool {
        self.is_empty() || as_u64(self.bytes.len() + size) < u64::from(options.batch_size)
    }

    /// Adds a chunk that [`BlobOptions::batches`] names, by its uncompressed bytes.
    pub fn push(&mut self, digest: Digest, bytes: &[u8]) {
        // Chunks of batches are smaller than 8 MiB; the writer checks again.
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.members.push(Member { digest, size });
        self.bytes.extend_from_slice(bytes);
    }

    /// Compresses the batch.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn seal(self, encoder: &mut Encoder) -> Result<SealedBatch, CodecError> {
        let mut stored = Vec::new();
        let plain_size = self.bytes.len();
        if !encoder.compress(&self.bytes, &mut stored)? {
            stored = self.bytes;
        }
        Ok(SealedBatch {
            members: self.members,
            plain_size,
            stored,
        })
    }
}
