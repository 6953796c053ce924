//! The chunk table: records by blob and chunk index, and their digests.
//!
//! The table on disk is sorted by digest, but readers ask by blob and index.
//! The first question sorts the positions of all records once: four bytes a
//! record, bounded by the length of the file whatever its fields claim.

use std::fmt;
use std::sync::Arc;

use storage::digest::ChunkDigests;
use storage::{BlobIndex, ChunkIndex, Digest};
use zerocopy::FromBytes;

use crate::error::{Error, corrupt};
use crate::format::chunk::{RECORD_COMPRESSED, RECORD_CRC, RECORD_ENCRYPTED, RawChunkRecord};
use crate::tree::ChunkRecord;
use crate::units::{BLOCK, len64};

use super::Image;

/// Digests of the chunks of one blob, from the chunk table of an image.
#[derive(Clone)]
pub struct BlobDigests {
    image: Arc<Image>,
    blob: BlobIndex,
}

impl BlobDigests {
    pub(super) fn new(image: Arc<Image>, blob: BlobIndex) -> Self {
        Self { image, blob }
    }
}

impl fmt::Debug for BlobDigests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobDigests(blob {})", self.blob)
    }
}

impl ChunkDigests for BlobDigests {
    fn chunk_digest(&self, index: ChunkIndex) -> Option<Digest> {
        let position = self.image.chunk_position(self.blob, index)?;
        let record = self.image.raw_chunks().get(position)?;
        Some(Digest::from_bytes(record.digest))
    }
}

/// Sort key of a record. A blob index beyond 8 bits or a chunk index beyond 24
/// is never asked for, so a collision of such a record with another is harmless.
fn key(record: &RawChunkRecord) -> u64 {
    u64::from(record.blob.get()) << 32 | u64::from(record.index.get())
}

impl Image {
    /// Number of records in the chunk table.
    #[must_use]
    pub fn chunk_record_count(&self) -> usize {
        self.raw_chunks().len()
    }

    /// The record at `position` of the chunk table, checked against its blob.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a position past the end and for a record that does
    /// not fit its blob; [`Error::Unsupported`] for an encrypted chunk.
    pub fn chunk_record(&self, position: usize) -> Result<ChunkRecord, Error> {
        let at = len64(self.chunk_table().start)
            .saturating_add(len64(position).saturating_mul(len64(size_of::<RawChunkRecord>())));
        let Some(raw) = self.raw_chunks().get(position) else {
            return Err(corrupt(
                "chunk table",
                at,
                len64(position),
                "a record at this position",
            ));
        };
        self.check_record(raw, at)
    }

    /// Position of the record of a chunk in the chunk table.
    ///
    /// The first call sorts the table's positions by blob and chunk; a call
    /// costs one comparison if the table has all chunks of the blob.
    #[must_use]
    pub fn chunk_position(&self, blob: BlobIndex, index: ChunkIndex) -> Option<usize> {
        let records = self.raw_chunks();
        let order = self
            .chunk_order
            .get_or_init(|| ChunkOrder::new(records, self.blobs.len()));
        order.find(records, blob, index)
    }

    fn raw_chunks(&self) -> &[RawChunkRecord] {
        let table = self.data.get(self.chunk_table()).unwrap_or(&[]);
        <[RawChunkRecord]>::ref_from_bytes(table).unwrap_or(&[])
    }

    fn check_record(&self, raw: &RawChunkRecord, at: u64) -> Result<ChunkRecord, Error> {
        if raw.flags.get() & RECORD_ENCRYPTED != 0 {
            return Err(Error::Unsupported {
                feature: "encryption",
            });
        }
        let index = BlobIndex::new(raw.blob.get());
        let Some(blob) = self.blobs.get(index.as_usize()) else {
            return Err(corrupt(
                "blob of a chunk record",
                at + 32,
                raw.blob.get(),
                "a known blob",
            ));
        };
        if raw.index.get() >= blob.chunk_count {
            return Err(corrupt(
                "index of a chunk record",
                at + 72,
                raw.index.get(),
                "less than the blob's chunk count",
            ));
        }
        let (start, size) = (raw.uncompressed_offset.get(), raw.uncompressed_size.get());
        let end = start.checked_add(size.into());
        if size == 0 || size > self.chunk_size() {
            return Err(corrupt(
                "uncompressed size of a chunk record",
                at + 44,
                size,
                "1 to the chunk size",
            ));
        }
        if !start.is_multiple_of(BLOCK) || end.is_none_or(|end| end > blob.uncompressed_size) {
            return Err(corrupt(
                "uncompressed offset of a chunk record",
                at + 56,
                start,
                "a multiple of 4096 inside the blob",
            ));
        }
        Ok(ChunkRecord {
            digest: Digest::from_bytes(raw.digest),
            blob: index,
            index: ChunkIndex::new(raw.index.get()),
            compressed: raw.flags.get() & RECORD_COMPRESSED != 0,
            compressed_size: raw.compressed_size.get(),
            uncompressed_size: size,
            compressed_offset: raw.compressed_offset.get(),
            uncompressed_offset: start,
            file_offset: raw.file_offset.get(),
            crc32c: (raw.flags.get() & RECORD_CRC != 0).then(|| raw.crc32c.get()),
        })
    }
}

/// Positions in the chunk table in order of blob and chunk index.
#[derive(Debug)]
pub(super) struct ChunkOrder {
    /// One position for every blob and chunk index that has a record.
    positions: Vec<u32>,
    /// Where the positions of each blob start, and where the last one's end.
    starts: Vec<usize>,
}

impl ChunkOrder {
    fn new(records: &[RawChunkRecord], blobs: usize) -> Self {
        // A table of 2^32 records has 320 GiB; what lies beyond is not found.
        let mut keyed: Vec<(u64, u32)> = records.iter().map(key).zip(0_u32..).collect();
        keyed.sort_unstable();
        keyed.dedup_by_key(|(key, _)| *key);
        let starts = (0..=len64(blobs))
            .map(|blob| keyed.partition_point(|(key, _)| key >> 32 < blob))
            .collect();
        Self {
            positions: keyed.into_iter().map(|(_, position)| position).collect(),
            starts,
        }
    }

    fn find(
        &self,
        records: &[RawChunkRecord],
        blob: BlobIndex,
        index: ChunkIndex,
    ) -> Option<usize> {
        let start = *self.starts.get(blob.as_usize())?;
        let end = *self.starts.get(blob.as_usize().checked_add(1)?)?;
        let of_blob = self.positions.get(start..end)?;
        let record = |position: &u32| {
            let position = usize::try_from(*position).ok()?;
            Some((position, records.get(position)?.index.get()))
        };
        // Every index appears once, so chunk `i` has at most `i` before it; it
        // has exactly `i` if none is missing.
        let latest = of_blob.get(..=index.as_usize()).unwrap_or(of_blob);
        let before = match latest.last().and_then(record) {
            Some((_, last)) if last == index.get() => latest.len() - 1,
            _ => latest.partition_point(|p| record(p).is_some_and(|(_, i)| i < index.get())),
        };
        let (position, found) = record(latest.get(before)?)?;
        (found == index.get()).then_some(position)
    }
}
