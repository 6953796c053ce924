//! Collects the rows of a chunk table while a blob is written.
//!
//! Keeps 16 or 24 bytes per chunk, 40 per batch and up to 32 KiB per seek context
//! in memory: the table is the one thing of a blob that must be complete before
//! it can be stored.

use std::sync::Arc;

use zerocopy::IntoBytes as _;

use super::super::FormatError;
use super::super::context::{BatchContext, CONTEXT_SIZE, ZranContext};
use super::super::entry::{Entry, EntryV1, EntryV2};
use super::super::header::ContextArea;
use super::MAX_CHUNKS;
use crate::codec::as_u64;
use crate::original::ContextStart;
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
    /// 24-byte entries followed by seek contexts and their dictionaries.
    Zran,
}

/// A chunk table in the making.
#[derive(Debug)]
pub struct Builder {
    layout: Layout,
    entries: Vec<u8>,
    count: u32,
    contexts: Vec<u8>,
    dictionaries: Vec<u8>,
    /// The seek context that chunks still join.
    open: Option<OpenContext>,
}

/// A seek context whose end is not known yet.
#[derive(Debug)]
struct OpenContext {
    start: Arc<ContextStart>,
    input_end: u64,
    output_size: u32,
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
            dictionaries: Vec::new(),
            open: None,
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
            Layout::V2 | Layout::Batch | Layout::Zran => {
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

    /// Extends a seek context so that it holds `output_size` bytes, which need input
    /// up to `input_end`, and returns its index. A context that was not the last one
    /// is a new one.
    ///
    /// # Errors
    /// [`FormatError::Unrepresentable`] if the previous context is longer than
    /// readers accept.
    pub fn extend_zran(
        &mut self,
        start: &Arc<ContextStart>,
        input_end: u64,
        output_size: u32,
    ) -> Result<u32, FormatError> {
        match &mut self.open {
            Some(open) if Arc::ptr_eq(&open.start, start) => {
                open.input_end = open.input_end.max(input_end);
                open.output_size = open.output_size.max(output_size);
            }
            _ => {
                self.close_zran()?;
                self.open = Some(OpenContext {
                    start: Arc::clone(start),
                    input_end,
                    output_size,
                });
            }
        }
        Ok(self.context_count())
    }

    fn close_zran(&mut self) -> Result<(), FormatError> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        let start = &open.start;
        let context = ZranContext {
            input: start.input_offset..open.input_end,
            output_offset: start.output_offset,
            output_size: open.output_size,
            dictionary: &start.dictionary,
            previous_byte: start.previous_byte,
            bits: start.bits,
        };
        let encoded = context.encode(as_u64(self.dictionaries.len()))?;
        self.contexts.extend_from_slice(&encoded);
        self.dictionaries.extend_from_slice(&start.dictionary);
        Ok(())
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

    /// Number of complete contexts so far; the index of the next one.
    #[must_use]
    pub fn context_count(&self) -> u32 {
        // No more batches than chunks, of which there are less than 2^24.
        u32::try_from(self.contexts.len() / CONTEXT_SIZE).unwrap_or(u32::MAX)
    }

    /// The uncompressed table and what its header says about contexts.
    ///
    /// # Errors
    /// As for [`Builder::extend_zran`].
    pub fn finish(mut self) -> Result<(Vec<u8>, ContextArea), FormatError> {
        self.close_zran()?;
        let with_contexts = matches!(self.layout, Layout::Batch | Layout::Zran);
        if !with_contexts || self.contexts.is_empty() {
            return Ok((self.entries, ContextArea::default()));
        }
        let area = ContextArea {
            offset: as_u64(self.entries.len()),
            size: as_u64(self.contexts.len() + self.dictionaries.len()),
            count: self.context_count(),
        };
        self.entries.append(&mut self.contexts);
        self.entries.append(&mut self.dictionaries);
        Ok((self.entries, area))
    }
}
