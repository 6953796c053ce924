//! Collects the rows of a chunk table while a blob is written.
//!
//! Keeps 16 or 24 bytes per chunk and 40 per batch in memory: the table is the
//! one thing of a blob that must be complete before it can be stored.

use zerocopy::IntoBytes as _;

use super::super::FormatError;
use super::super::context::{BatchContext, CONTEXT_SIZE};
use super::super::entry::{Entry, EntryV1, EntryV2};
use super::super::header::ContextArea;
use super::MAX_CHUNKS;
use crate::codec::as_u64;
use crate::units::ChunkIndex;

/// Which encoding a table uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// 16-byte entries.
    V1,
    /// 24-byte entries.
    V2,
    /// 24-byte entries followed by batch contexts.
    Batch,
}

/// A chunk table in the making.
#[derive(Debug)]
pub struct Builder {
    layout: Layout,
    entries: Vec<u8>,
    count: u32,
    contexts: Vec<u8>,
}

impl Builder {
    /// An empty table.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            entries: Vec::new(),
            count: 0,
            contexts: Vec::new(),
        }
    }

    /// Appends an entry and returns its index.
    ///
    /// # Errors
    /// [`FormatError::Unrepresentable`] if the layout has no room for a value, or
    /// the table has 2^24 - 1 entries already.
    pub fn push(&mut self, entry: &Entry) -> Result<ChunkIndex, FormatError> {
        if self.count == MAX_CHUNKS {
            return Err(FormatError::Unrepresentable {
                object: "chunk table",
                field: "chunk count",
                value: u64::from(self.count) + 1,
                problem: "a blob has at most 2^24 - 1 chunks; use larger chunks",
            });
        }
        match self.layout {
            Layout::V1 => self
                .entries
                .extend_from_slice(EntryV1::as_bytes(&entry.to_v1()?)),
            Layout::V2 | Layout::Batch => {
                self.entries
                    .extend_from_slice(EntryV2::as_bytes(&entry.to_v2()?));
            }
        }
        let index = ChunkIndex::new(self.count);
        self.count += 1;
        Ok(index)
    }

    /// Appends a batch context. Only tables with [`Layout::Batch`] keep them.
    pub fn push_batch(&mut self, context: BatchContext) {
        self.contexts.extend_from_slice(&context.encode());
    }

    /// Number of entries so far.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.count
    }

    /// Whether there are no entries yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Number of batch contexts so far; the index of the next one.
    #[must_use]
    pub fn batch_count(&self) -> u32 {
        // No more batches than chunks, of which there are less than 2^24.
        u32::try_from(self.contexts.len() / CONTEXT_SIZE).unwrap_or(u32::MAX)
    }

    /// The uncompressed table and what its header says about contexts.
    #[must_use]
    pub fn finish(mut self) -> (Vec<u8>, ContextArea) {
        if self.layout != Layout::Batch || self.contexts.is_empty() {
            return (self.entries, ContextArea::default());
        }
        let area = ContextArea {
            offset: as_u64(self.entries.len()),
            size: as_u64(self.contexts.len()),
            count: self.batch_count(),
        };
        self.entries.append(&mut self.contexts);
        (self.entries, area)
    }
}
