//! Chunk indexes of files, and the chunk table.

use storage::BlobIndex;

use crate::error::WriteError;
use crate::format::chunk::{ChunkIndexEntry, RECORD_COMPRESSED, RECORD_CRC, RawChunkRecord};
use crate::format::inode::{CHUNK_FORMAT_BITS, CHUNK_FORMAT_INDEXES};
use crate::tree::{ChunkId, ChunkRecord, Content, Tree};
use crate::units::BLOCK;

use super::plan::Plan;

/// A chunk as the bootstrap names it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    device: u8,
    index: u32,
    block: u32,
}

/// The chunks that files use.
#[derive(Debug)]
pub(super) struct Chunks {
    /// By position in the arena; `None` for a chunk that no file uses.
    places: Vec<Option<Place>>,
    /// Ids of the records of the chunk table, in its order.
    pub(super) table: Vec<ChunkId>,
}

/// The error for a chunk of a blob that the tree does not have.
pub(super) fn unknown_blob(record: &ChunkRecord) -> WriteError {
    refuse(record, "the tree has no such blob")
}

fn refuse(record: &ChunkRecord, reason: &'static str) -> WriteError {
    WriteError::BadChunk {
        blob: record.blob.get(),
        index: record.index.get(),
        reason,
    }
}

/// Finds and checks all chunks that the planned files use.
pub(super) fn select(tree: &Tree, plan: &Plan) -> Result<Chunks, WriteError> {
    let mut places = vec![None; tree.chunks().len()];
    let mut table = Vec::new();
    for slot in &plan.slots {
        let Content::File { chunks, .. } = &tree.inode(slot.inode).content else {
            continue;
        };
        for &id in chunks {
            if let place @ None = &mut places[id.as_usize()] {
                *place = Some(check(tree, plan, tree.chunk(id))?);
                table.push(id);
            }
        }
    }
    let key = |id: &ChunkId| {
        let record = tree.chunk(*id);
        let blob = plan.blobs.renumber(record.blob);
        (record.digest, blob, record.index, *id)
    };
    table.sort_unstable_by_key(key);
    // The same stored chunk may have come from several layers.
    table.dedup_by_key(|id| {
        let (digest, blob, index, _) = key(id);
        (digest, blob, index)
    });
    Ok(Chunks { places, table })
}

fn check(tree: &Tree, plan: &Plan, record: &ChunkRecord) -> Result<Place, WriteError> {
    let blob = plan
        .blobs
        .renumber(record.blob)
        .ok_or_else(|| unknown_blob(record))?;
    let info = tree
        .blobs
        .get(record.blob.as_usize())
        .ok_or_else(|| unknown_blob(record))?;
    let end = record
        .uncompressed_offset
        .checked_add(record.uncompressed_size.into());
    let (index, block) = (record.index.get(), record.uncompressed_offset / BLOCK);
    let reason = if index >= info.chunk_count || index >= 1 << 24 {
        "its index is not below the blob's chunk count"
    } else if !record.uncompressed_offset.is_multiple_of(BLOCK) {
        "its uncompressed offset is no multiple of 4096"
    } else if record.uncompressed_size == 0 || end.is_none_or(|e| e > info.uncompressed_size) {
        "it is empty or ends behind the uncompressed size of its blob"
    } else if let (Ok(device), Ok(block)) = (u8::try_from(blob.get() + 1), u32::try_from(block)) {
        return Ok(Place {
            device,
            index,
            block,
        });
    } else {
        "its position does not fit the format"
    };
    Err(refuse(record, reason))
}

impl Chunks {
    fn place(&self, id: ChunkId) -> Option<Place> {
        self.places.get(id.as_usize()).copied().flatten()
    }

    /// The chunk index entry of a chunk.
    pub(super) fn index_entry(&self, id: ChunkId) -> ChunkIndexEntry {
        let place = self.place(id).unwrap_or(Place {
            device: 0,
            index: 0,
            block: 0,
        });
        let [low0, low1, high, _] = place.index.to_le_bytes();
        ChunkIndexEntry {
            index_low: u16::from_le_bytes([low0, low1]).into(),
            device: place.device,
            index_high: high,
            block: place.block.into(),
        }
    }

    /// The chunk format of a file: the logarithm of the range that the kernel
    /// maps with one index.
    ///
    /// Normally the chunk size. If all chunks lie one after the other in one
    /// blob, it is the whole file, and the kernel needs the first index only.
    pub(super) fn format(&self, size: u64, chunks: &[ChunkId], chunk_size: u32) -> u32 {
        let unit = if chunks.len() > 1 && self.contiguous(chunks, chunk_size) {
            size.checked_next_power_of_two()
        } else {
            None
        };
        let bits = |unit: u64| (unit / BLOCK).trailing_zeros();
        let bits = match unit.map(bits) {
            Some(bits) if bits <= CHUNK_FORMAT_BITS => bits,
            _ => bits(chunk_size.into()),
        };
        CHUNK_FORMAT_INDEXES | bits
    }

    fn contiguous(&self, chunks: &[ChunkId], chunk_size: u32) -> bool {
        let step = u64::from(chunk_size) / BLOCK;
        chunks.windows(2).all(|pair| {
            let [a, b] = pair else { return false };
            match (self.place(*a), self.place(*b)) {
                (Some(a), Some(b)) => {
                    a.device == b.device && u64::from(a.block) + step == u64::from(b.block)
                }
                _ => false,
            }
        })
    }
}

/// The record of a chunk in the chunk table.
pub(super) fn record(record: &ChunkRecord, blob: BlobIndex) -> RawChunkRecord {
    // A CRC of 0 cannot be told from none.
    let crc = record.crc32c.unwrap_or(0);
    let compressed = if record.compressed {
        RECORD_COMPRESSED
    } else {
        0
    };
    let crc_flag = if crc == 0 { 0 } else { RECORD_CRC };
    RawChunkRecord {
        digest: *record.digest.as_bytes(),
        blob: blob.get().into(),
        flags: (compressed | crc_flag).into(),
        compressed_size: record.compressed_size.into(),
        uncompressed_size: record.uncompressed_size.into(),
        compressed_offset: record.compressed_offset.into(),
        uncompressed_offset: record.uncompressed_offset.into(),
        file_offset: record.file_offset.into(),
        index: record.index.get().into(),
        crc32c: crc.into(),
    }
}
