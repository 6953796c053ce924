//! What is decided but not written yet: the blob's next chunks, in order.
//!
//! The sequencer decides what is stored where before the bytes are ready, since
//! workers compress batches. Entries leave at the front, once their bytes are there.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use crossbeam_channel::{Receiver, TryRecvError};
use rafs::tree::ChunkRecord;
use storage::blob_writer::{BlobWriter, ChunkData, PreparedChunk, SealedBatch, StoredChunk};
use storage::codec::CodecError;

use super::item::{Data, Item, len};
use super::sequencer::StoreError;
use super::workers::LayerContext;

/// Entries that may wait, so that a slow batch cannot make everything wait in memory.
const MAX_WAITING: usize = 64;

/// Something to be written.
pub(super) enum Pending {
    /// Chunk number `chunk` of an item, in the form that `data` names.
    Chunk {
        item: Arc<Item>,
        chunk: usize,
        data: Data,
        /// Position of its record.
        position: u32,
    },
    /// Compressed bytes of a chunk that no worker had ready.
    Late { bytes: Vec<u8>, position: u32 },
    /// A batch that a worker compresses; its chunks have records from `position` on.
    Batch {
        sealed: Receiver<Result<SealedBatch, CodecError>>,
        position: u32,
        count: u32,
    },
}

/// The queue with its end at the writer.
pub(super) struct Queue<'a, W: Write> {
    layer: &'a LayerContext,
    writer: &'a mut BlobWriter<W>,
    waiting: VecDeque<Pending>,
}

impl<'a, W: Write> Queue<'a, W> {
    pub(super) fn new(layer: &'a LayerContext, writer: &'a mut BlobWriter<W>) -> Self {
        Self {
            layer,
            writer,
            waiting: VecDeque::new(),
        }
    }

    /// Adds an entry and writes what is ready at the front.
    pub(super) fn push(
        &mut self,
        entry: Pending,
        records: &mut [ChunkRecord],
    ) -> Result<(), StoreError> {
        self.waiting.push_back(entry);
        while let Some(front) = self.waiting.pop_front() {
            let wait = self.waiting.len() >= MAX_WAITING;
            if let Some(blocked) = self.write(front, wait, records)? {
                self.waiting.push_front(blocked);
                break;
            }
        }
        Ok(())
    }

    /// Writes everything, waiting for what is not ready.
    pub(super) fn drain(&mut self, records: &mut [ChunkRecord]) -> Result<(), StoreError> {
        while let Some(front) = self.waiting.pop_front() {
            self.write(front, true, records)?;
        }
        Ok(())
    }

    /// Writes an entry, or gives it back if its bytes are not there and `wait` is false.
    fn write(
        &mut self,
        entry: Pending,
        wait: bool,
        records: &mut [ChunkRecord],
    ) -> Result<Option<Pending>, StoreError> {
        match entry {
            Pending::Chunk {
                item,
                chunk,
                data,
                position,
            } => {
                let raw = &item.chunks[chunk];
                let data = match (data, &raw.place) {
                    (_, Some(place)) => ChunkData::InPlace(place),
                    (Data::Compressed(range), None) => {
                        ChunkData::Compressed(&item.buffer.output[range])
                    }
                    (Data::Raw | Data::Claimed, None) => {
                        ChunkData::Raw(raw.bytes(&item.buffer.input, &self.layer.zeros))
                    }
                };
                self.chunk(data, position, records)?;
                if let Some(plain) = &self.layer.plain {
                    let bytes = raw.bytes(&item.buffer.input, &self.layer.zeros);
                    let at = records[len(position)].uncompressed_offset;
                    write_plain(plain, bytes, at)?;
                }
            }
            Pending::Late { bytes, position } => {
                self.chunk(ChunkData::Compressed(&bytes), position, records)?;
            }
            Pending::Batch {
                sealed,
                position,
                count,
            } => {
                let result = if wait {
                    sealed.recv().map_err(|_closed| StoreError::WorkerLost)?
                } else {
                    match sealed.try_recv() {
                        Ok(result) => result,
                        Err(TryRecvError::Empty) => {
                            return Ok(Some(Pending::Batch {
                                sealed,
                                position,
                                count,
                            }));
                        }
                        Err(TryRecvError::Disconnected) => return Err(StoreError::WorkerLost),
                    }
                };
                let batch = result.map_err(StoreError::Compress)?;
                let mut stored = self
                    .writer
                    .append_batch(&batch)
                    .map_err(StoreError::Write)?;
                for record in &mut records[len(position)..len(position + count)] {
                    complete(record, &stored);
                    let size = u64::from(record.uncompressed_size);
                    stored.uncompressed_offset += size.next_multiple_of(storage::units::BLOCK_SIZE);
                }
            }
        }
        Ok(None)
    }

    fn chunk(
        &mut self,
        data: ChunkData<'_>,
        position: u32,
        records: &mut [ChunkRecord],
    ) -> Result<(), StoreError> {
        let record = &mut records[len(position)];
        let prepared = PreparedChunk {
            digest: record.digest,
            uncompressed_size: record.uncompressed_size,
            crc32c: record.crc32c.unwrap_or_default(),
            data,
        };
        let stored = self.writer.append(&prepared).map_err(StoreError::Write)?;
        complete(record, &stored);
        Ok(())
    }
}

/// Writes a chunk to a file that is made of holes already.
fn write_plain(file: &File, bytes: &[u8], at: u64) -> Result<(), StoreError> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    file.write_all_at(bytes, at).map_err(StoreError::Plain)
}

/// Enters where a chunk went. Its index is its position, known from the start.
fn complete(record: &mut ChunkRecord, stored: &StoredChunk) {
    record.compressed = stored.compressed;
    record.compressed_size = stored.compressed_size;
    record.compressed_offset = stored.compressed_offset;
    record.uncompressed_offset = stored.uncompressed_offset;
}
