//! The exit of the pipeline: stores chunks in the order of the stream.
//!
//! Items arrive in the order in which workers finish them and wait here until
//! their turn. In stream order, a chunk that is known already becomes a reference;
//! any other is appended to the blob. Hence the blob is the same for every number
//! of threads: the first occurrence in the stream is what is stored, and its
//! compressed form depends on nothing but its bytes.

use std::collections::HashMap;
use std::io::Write;

use crossbeam_channel::Receiver;
use rafs::tree::ChunkRecord;
use storage::blob_writer::{BlobWriter, ChunkData, PreparedChunk, WriteError};
use storage::codec::CodecError;
use storage::{BlobId, BlobIndex};

use super::item::{Data, Digested, Item, RawChunk};
use super::workers::{Compression, Done, LayerContext};
use crate::reuse::KnownChunk;

/// What became of the chunks of a layer.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// Every chunk that files use, by first use, with its blob's position in `blobs`.
    pub(crate) chunks: Vec<ChunkRecord>,
    /// The blobs of these chunks, in the order of their first use.
    pub(crate) blobs: Vec<Owner>,
    /// For every chunk of every file in stream order: its position in `chunks`.
    pub(crate) references: Vec<u32>,
    /// Items handled.
    pub(crate) items: u64,
}

/// Whose blob a chunk is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The layer that is being built.
    Layer,
    /// Another image, which was given for reuse.
    Known(BlobId),
}

/// Why chunks could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A chunk could not be compressed.
    #[error("cannot compress a chunk")]
    Compress(#[source] CodecError),
    /// The blob could not be written.
    #[error("cannot write the blob")]
    Write(#[source] WriteError),
    /// A worker thread died, which is a bug; its panic message says more.
    #[error("a worker thread has died")]
    WorkerLost,
}

/// Handles items until the feeder and all workers have dropped their end of `done`.
pub(crate) fn run<W: Write>(
    done: &Receiver<Done>,
    layer: &LayerContext,
    writer: &mut BlobWriter<W>,
) -> Result<Stored, StoreError> {
    let mut sequencer = Sequencer {
        layer,
        writer,
        compression: Compression::default(),
        late: Vec::new(),
        stored: Stored::default(),
    };
    // Bounded by the budget: every waiting item holds a share of it.
    let mut waiting = HashMap::new();
    for item in done {
        waiting.insert(item.sequence, item);
        while let Some(next) = waiting.remove(&sequencer.stored.items) {
            sequencer.item(&next.item, next.result.map_err(StoreError::Compress)?)?;
        }
    }
    if waiting.is_empty() {
        Ok(sequencer.stored)
    } else {
        Err(StoreError::WorkerLost)
    }
}

struct Sequencer<'a, W: Write> {
    layer: &'a LayerContext,
    writer: &'a mut BlobWriter<W>,
    compression: Compression,
    /// The compressed form of a chunk whose digest another worker had claimed.
    late: Vec<u8>,
    stored: Stored,
}

impl<W: Write> Sequencer<'_, W> {
    fn item(&mut self, item: &Item, results: Vec<Digested>) -> Result<(), StoreError> {
        for (chunk, digested) in item.chunks.iter().zip(results) {
            let position = match self.layer.dedup.stored(&digested.digest) {
                Some(position) => position,
                None => match self.layer.known.find(&digested.digest, chunk.len) {
                    Some(known) => self.reuse(known),
                    None => self.append(item, chunk, &digested)?,
                },
            };
            if let Some(record) = self.stored.chunks.get_mut(super::item::len(position)) {
                record.file_offset = chunk.file_offset;
            }
            self.stored.references.push(position);
        }
        self.stored.items += 1;
        Ok(())
    }

    /// Stores a chunk that is not in the blob yet.
    ///
    /// Its compressed form may be missing: another worker was quicker to claim the
    /// digest, with a chunk that is later in the stream. Rare, and compressing it
    /// once more gives the same bytes.
    fn append(
        &mut self,
        item: &Item,
        chunk: &RawChunk,
        digested: &Digested,
    ) -> Result<u32, StoreError> {
        let raw = chunk.bytes(&item.buffer.input, &self.layer.zeros);
        let data = match (&digested.data, &chunk.place) {
            (_, Some(place)) => ChunkData::InPlace(place),
            (Data::Raw, None) if chunk.batched => ChunkData::Batched(raw),
            (Data::Raw, None) => ChunkData::Raw(raw),
            (Data::Compressed(range), None) => {
                ChunkData::Compressed(&item.buffer.output[range.clone()])
            }
            (Data::Claimed, None) => {
                self.late.clear();
                let data = self
                    .compression
                    .append(self.layer.compressor, raw, &mut self.late)
                    .map_err(StoreError::Compress)?;
                if data == Data::Raw {
                    ChunkData::Raw(raw)
                } else {
                    ChunkData::Compressed(&self.late)
                }
            }
        };
        let prepared = PreparedChunk {
            digest: digested.digest,
            uncompressed_size: chunk.len,
            crc32c: digested.crc32c,
            data,
        };
        let stored = self.writer.append(&prepared).map_err(StoreError::Write)?;
        let blob = self.stored.blob(&Owner::Layer);
        Ok(self.add(ChunkRecord {
            digest: digested.digest,
            blob,
            index: stored.index,
            compressed: stored.compressed,
            compressed_size: stored.compressed_size,
            uncompressed_size: chunk.len,
            compressed_offset: stored.compressed_offset,
            uncompressed_offset: stored.uncompressed_offset,
            file_offset: chunk.file_offset,
            crc32c: Some(digested.crc32c),
        }))
    }

    /// Refers to a chunk of another image.
    fn reuse(&mut self, known: &KnownChunk) -> u32 {
        let blob = self
            .stored
            .blob(&Owner::Known(self.layer.known.blob(known).id.clone()));
        self.add(ChunkRecord {
            blob,
            ..known.record.clone()
        })
    }

    fn add(&mut self, record: ChunkRecord) -> u32 {
        // Less than 2^32: a blob has 2^24 chunks at most, and an image 254 blobs.
        let position = u32::try_from(self.stored.chunks.len()).unwrap_or(u32::MAX);
        self.layer.dedup.store(record.digest, position);
        self.stored.chunks.push(record);
        position
    }
}

impl Stored {
    /// Position of a blob in `blobs`, where it is added if it is new.
    fn blob(&mut self, owner: &Owner) -> BlobIndex {
        let known = self.blobs.iter().position(|blob| blob == owner);
        let position = known.unwrap_or_else(|| {
            self.blobs.push(owner.clone());
            self.blobs.len() - 1
        });
        BlobIndex::new(u32::try_from(position).unwrap_or(u32::MAX))
    }
}
