//! The exit of the pipeline: stores chunks in the order of the stream.
//!
//! Items arrive in the order in which workers finish them and wait here until
//! their turn. In stream order, a chunk that is known already becomes a reference;
//! any other gets the next place in the blob; small ones are collected into batches,
//! which workers compress while the sequencer goes on ([`queue`](super::queue)). Hence the blob is the same for every number
//! of threads: the first occurrence in the stream is what is stored, and its
//! compressed form depends on nothing but its bytes.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;

use crossbeam_channel::Receiver;
use rafs::tree::ChunkRecord;
use storage::blob_writer::{Batch, BlobOptions, BlobWriter, WriteError};
use storage::codec::CodecError;
use storage::{BlobId, BlobIndex, ChunkIndex};

use super::item::{Data, Digested, Item};
use super::queue::{Pending, Queue};
use super::workers::{Compression, Done, LayerContext, Workers};
use crate::reuse::KnownChunk;

/// Bit of a reference to a chunk of another image.
const KNOWN: u32 = 1 << 31;

/// What became of the chunks of a layer.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// Every chunk of the layer's blob, by chunk index.
    pub(crate) chunks: Vec<ChunkRecord>,
    /// Chunks of other images, by first use.
    pub(crate) known: Vec<ChunkRecord>,
    /// The blobs of all these chunks, in the order of their first use.
    pub(crate) blobs: Vec<Owner>,
    /// For every chunk of every file in stream order: see [`Stored::resolve`].
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
    /// The uncompressed data could not be written.
    #[error("cannot write the uncompressed data")]
    Plain(#[source] std::io::Error),
    /// A worker thread died, which is a bug; its panic message says more.
    #[error("a worker thread has died")]
    WorkerLost,
}

/// Handles items until the feeder and all workers have dropped their end of `done`.
pub(crate) fn run<W: Write>(
    done: &Receiver<Done>,
    layer: &Arc<LayerContext>,
    workers: &Workers,
    options: BlobOptions,
    writer: &mut BlobWriter<W>,
) -> Result<Stored, StoreError> {
    let mut sequencer = Sequencer {
        layer,
        workers,
        options,
        queue: Queue::new(layer, writer),
        compression: Compression::default(),
        batch: Batch::default(),
        batch_start: 0,
        stored: Stored::default(),
    };
    // Bounded by the budget: every waiting item holds a share of it.
    let mut waiting = HashMap::new();
    loop {
        let item = match done.try_recv() {
            Ok(item) => item,
            // What is queued holds shares of the budget, for which the feeder may wait:
            // write it before waiting for more.
            Err(_none_now) => {
                sequencer.queue.drain(&mut sequencer.stored.chunks)?;
                match done.recv() {
                    Ok(item) => item,
                    Err(_closed) => break,
                }
            }
        };
        waiting.insert(item.sequence, item);
        while let Some(next) = waiting.remove(&sequencer.stored.items) {
            let digested = next.result.map_err(StoreError::Compress)?;
            sequencer.item(next.item, digested)?;
        }
    }
    if !waiting.is_empty() {
        return Err(StoreError::WorkerLost);
    }
    sequencer.flush_batch()?;
    sequencer.queue.drain(&mut sequencer.stored.chunks)?;
    Ok(sequencer.stored)
}

struct Sequencer<'a, W: Write> {
    layer: &'a Arc<LayerContext>,
    workers: &'a Workers,
    options: BlobOptions,
    queue: Queue<'a, W>,
    compression: Compression,
    /// Small chunks since the last large one.
    batch: Batch,
    /// Position of the first of them.
    batch_start: u32,
    stored: Stored,
}

impl<W: Write> Sequencer<'_, W> {
    fn item(&mut self, item: Item, results: Vec<Digested>) -> Result<(), StoreError> {
        // Entries of the queue share it until they are written.
        let item = Arc::new(item);
        for (chunk, digested) in results.into_iter().enumerate() {
            let position = match self.layer.dedup.stored(&digested.digest) {
                Some(position) => position,
                None => {
                    let known = self
                        .layer
                        .known
                        .find(&digested.digest, item.chunks[chunk].len);
                    match known {
                        Some(known) => self.reuse(known),
                        None => self.append(&item, chunk, digested)?,
                    }
                }
            };
            if let Some(record) = self.stored.chunks.get_mut(super::item::len(position)) {
                record.file_offset = item.chunks[chunk].file_offset;
            }
            self.stored.references.push(position);
        }
        self.stored.items += 1;
        Ok(())
    }

    /// Gives a chunk that is not in the blob yet the next place there.
    fn append(
        &mut self,
        item: &Arc<Item>,
        chunk: usize,
        digested: Digested,
    ) -> Result<u32, StoreError> {
        let raw = &item.chunks[chunk];
        let position = self.record(raw.len, &digested);
        if raw.batched {
            self.join_batch(item, chunk, &digested, position)?;
            return Ok(position);
        }
        self.flush_batch()?;
        let entry = match digested.data {
            Data::Claimed => self.late(item, chunk, position)?,
            data => Pending::Chunk {
                item: Arc::clone(item),
                chunk,
                data,
                position,
            },
        };
        self.queue.push(entry, &mut self.stored.chunks)?;
        Ok(position)
    }

    /// Adds a record, which lacks what only the writer knows.
    fn record(&mut self, size: u32, digested: &Digested) -> u32 {
        // The writer refuses more chunks than a u32 counts.
        let position = u32::try_from(self.stored.chunks.len()).unwrap_or(u32::MAX);
        let blob = self.stored.blob(&Owner::Layer);
        self.layer.dedup.store(digested.digest, position);
        self.stored.chunks.push(ChunkRecord {
            digest: digested.digest,
            blob,
            index: ChunkIndex::new(position),
            compressed: false,
            compressed_size: 0,
            uncompressed_size: size,
            compressed_offset: 0,
            uncompressed_offset: 0,
            file_offset: 0,
            crc32c: Some(digested.crc32c),
        });
        position
    }

    /// Refers to a chunk of another image.
    fn reuse(&mut self, known: &KnownChunk) -> u32 {
        let id = self.layer.known.blob(known).id.clone();
        let blob = self.stored.blob(&Owner::Known(id));
        // Far less than 2^31: an image has 254 blobs of 2^24 chunks at most, and so many
        // records would take terabytes.
        let position = u32::try_from(self.stored.known.len()).unwrap_or(u32::MAX) | KNOWN;
        self.layer.dedup.store(known.record.digest, position);
        self.stored.known.push(ChunkRecord {
            blob,
            ..known.record.clone()
        });
        position
    }

    /// Compresses a chunk whose digest another worker was quicker to claim, with a
    /// chunk that is later in the stream. Rare, and the bytes are the same.
    fn late(
        &mut self,
        item: &Arc<Item>,
        chunk: usize,
        position: u32,
    ) -> Result<Pending, StoreError> {
        let raw = item.chunks[chunk].bytes(&item.buffer.input, &self.layer.zeros);
        let mut bytes = Vec::new();
        let data = self
            .compression
            .append(self.layer.encoding, raw, &mut bytes)
            .map_err(StoreError::Compress)?;
        Ok(match data {
            Data::Compressed(_) => Pending::Late { bytes, position },
            data => Pending::Chunk {
                item: Arc::clone(item),
                chunk,
                data,
                position,
            },
        })
    }

    fn join_batch(
        &mut self,
        item: &Arc<Item>,
        chunk: usize,
        digested: &Digested,
        position: u32,
    ) -> Result<(), StoreError> {
        let bytes = item.chunks[chunk].bytes(&item.buffer.input, &self.layer.zeros);
        if !self.batch.has_room(bytes.len(), &self.options) {
            self.flush_batch()?;
        }
        if self.batch.is_empty() {
            self.batch_start = position;
        }
        self.batch.push(digested.digest, bytes);
        Ok(())
    }

    /// Sends the batch to a worker.
    fn flush_batch(&mut self) -> Result<(), StoreError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batch);
        let entry = Pending::Batch {
            position: self.batch_start,
            count: batch.chunk_count(),
            sealed: self.workers.seal(batch, self.layer.encoding),
        };
        self.queue.push(entry, &mut self.stored.chunks)
    }
}

impl Stored {
    /// The record that a reference names: its list, and the position there.
    pub(crate) fn resolve(reference: u32) -> (bool, usize) {
        (reference & KNOWN != 0, super::item::len(reference & !KNOWN))
    }

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
