//! The entrance of the pipeline: cuts files into chunks and packs them into items.
//!
//! A source hands over one file after the other; the feeder asks it to fill
//! buffers directly, so that data is copied once, by the read itself. Chunks that
//! lie in holes are neither read nor stored in a buffer.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::Sender;
use storage::blob_writer::BlobOptions;
use storage::original::Place;

use super::Engine;
use super::item::{Item, RawChunk};
use super::workers::{Done, ItemJob, LayerContext};

/// Items are sent when they hold this much: enough to make queues cheap, little
/// enough to stay in a core's cache and to keep all workers busy.
const ITEM_BYTES: usize = 384 << 10;

/// Smallest buffer, in bytes. A buffer holds at least one chunk.
const MIN_BUFFER: usize = 512 << 10;

/// Chunks per item at most, which matters for holes and tiny files only.
const ITEM_CHUNKS: usize = 1024;

/// Chunks per file at most: as many as a blob can hold. Bounds the memory that a
/// sparse file of a few bytes can ask for.
pub const MAX_CHUNKS_PER_FILE: u64 = (1 << 24) - 1;

/// Takes the files of one layer.
#[derive(Debug)]
pub struct Feeder {
    engine: Engine,
    layer: Arc<LayerContext>,
    blob: BlobOptions,
    buffer_size: usize,
    done: Sender<Done>,
    /// Set when the sequencer gave up: nothing more is wanted.
    stopped: Arc<AtomicBool>,
    sequence: u64,
    /// The item being filled, and how much of its buffer is.
    open: Option<(Item, usize)>,
}

/// Why a file was not taken completely.
#[derive(Debug, thiserror::Error)]
pub enum FeedError<E> {
    /// The source failed.
    #[error(transparent)]
    Source(E),
    /// The pipeline has failed and reports why itself.
    #[error("the build was stopped")]
    Stopped,
    /// The file would have more chunks than a blob can hold.
    #[error("{size} bytes are more than {MAX_CHUNKS_PER_FILE} chunks of {chunk_size} bytes")]
    TooLarge {
        /// Length of the file in bytes.
        size: u64,
        /// Length of a chunk in bytes.
        chunk_size: u32,
    },
}

impl Feeder {
    pub(crate) fn new(
        engine: Engine,
        layer: Arc<LayerContext>,
        blob: BlobOptions,
        done: Sender<Done>,
        stopped: Arc<AtomicBool>,
    ) -> Self {
        let buffer_size = super::item::len(blob.chunk_size).max(MIN_BUFFER);
        Self {
            engine,
            layer,
            blob,
            buffer_size,
            done,
            stopped,
            sequence: 0,
            open: None,
        }
    }

    /// Takes one file of `size` bytes and returns its number of chunks.
    ///
    /// `data` lists the ranges that hold data, in order and without overlap; the
    /// rest of the file is zeros. `read(offset, buf)` has to fill `buf` with the
    /// bytes at `offset`; it is called in file order, for data only.
    ///
    /// Waits while the budget is used up.
    ///
    /// # Errors
    /// See [`FeedError`]. After an error the layer cannot be completed.
    pub fn file<E>(
        &mut self,
        size: u64,
        data: &[Range<u64>],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<u64, FeedError<E>> {
        let count = self.count_chunks(size)?;
        let chunk_size = u64::from(self.blob.chunk_size);
        let mut data = data;
        for index in 0..count {
            let start = index * chunk_size;
            let end = size.min(start + chunk_size);
            while data.first().is_some_and(|range| range.end <= start) {
                data = &data[1..];
            }
            let is_hole = data.first().is_none_or(|range| range.start >= end);
            let whole_file = count == 1;
            self.chunk(start..end, whole_file, is_hole, |buf| {
                fill(buf, start, data, &mut read).map(|()| None)
            })?;
        }
        Ok(count)
    }

    /// Takes one file of `size` bytes, without holes, whose data stays where it is.
    ///
    /// `read(buf)` has to fill `buf` with the next bytes of the file, one chunk at a
    /// time, and to tell where they are.
    ///
    /// # Errors
    /// As for [`Feeder::file`].
    pub fn file_in_place<E>(
        &mut self,
        size: u64,
        mut read: impl FnMut(&mut [u8]) -> Result<Place, E>,
    ) -> Result<u64, FeedError<E>> {
        let count = self.count_chunks(size)?;
        let chunk_size = u64::from(self.blob.chunk_size);
        for index in 0..count {
            let start = index * chunk_size;
            let end = size.min(start + chunk_size);
            self.chunk(start..end, count == 1, false, |buf| read(buf).map(Some))?;
        }
        Ok(count)
    }

    fn count_chunks<E>(&self, size: u64) -> Result<u64, FeedError<E>> {
        let chunk_size = self.blob.chunk_size;
        let count = size.div_ceil(chunk_size.into());
        if count > MAX_CHUNKS_PER_FILE {
            return Err(FeedError::TooLarge { size, chunk_size });
        }
        Ok(count)
    }

    /// Sends what is left, after the last file, and returns the number of items.
    pub(crate) fn finish(mut self) -> u64 {
        self.send();
        self.sequence
    }

    fn chunk<E>(
        &mut self,
        range: Range<u64>,
        whole_file: bool,
        is_hole: bool,
        read: impl FnOnce(&mut [u8]) -> Result<Option<Place>, E>,
    ) -> Result<(), FeedError<E>> {
        // Both ends are within one chunk size of each other.
        let len = u32::try_from(range.end - range.start).unwrap_or(self.blob.chunk_size);
        let needed = if is_hole { 0 } else { super::item::len(len) };
        if self.stopped.load(Ordering::Relaxed) {
            return Err(FeedError::Stopped);
        }
        if self
            .open
            .as_ref()
            .is_some_and(|(_, used)| used + needed > self.buffer_size)
        {
            self.send();
        }
        let (item, used) = self.open.get_or_insert_with(|| {
            let buffer = self.engine.budget.buffer(self.buffer_size);
            (
                Item {
                    buffer,
                    chunks: Vec::new(),
                },
                0,
            )
        });
        let (start, place) = if is_hole {
            (None, None)
        } else {
            let buf = &mut item.buffer.input[*used..*used + needed];
            (Some(*used), read(buf).map_err(FeedError::Source)?)
        };
        *used += needed;
        let batched = self.blob.batches(len, whole_file);
        item.chunks.push(RawChunk {
            len,
            file_offset: range.start,
            start,
            batched,
            place,
        });
        if *used >= ITEM_BYTES || item.chunks.len() >= ITEM_CHUNKS {
            self.send();
        }
        Ok(())
    }

    fn send(&mut self) {
        let Some((item, _)) = self.open.take() else {
            return;
        };
        self.engine.workers.submit(ItemJob {
            layer: Arc::clone(&self.layer),
            sequence: self.sequence,
            item,
            done: self.done.clone(),
        });
        self.sequence += 1;
    }
}

/// Fills `buf`, which is at `start` of the file: data by `read`, the rest with zeros.
fn fill<E>(
    buf: &mut [u8],
    start: u64,
    data: &[Range<u64>],
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let end = start + buf.len() as u64;
    let mut at = start;
    for range in data.iter().take_while(|range| range.start < end) {
        let from = range.start.max(at);
        let to = range.end.min(end);
        position(buf, start, at..from).fill(0);
        read(from, position(buf, start, from..to))?;
        at = to;
    }
    position(buf, start, at..end).fill(0);
    Ok(())
}

/// The part of `buf` for a range of the file, where `buf` is at `start`.
fn position(buf: &mut [u8], start: u64, range: Range<u64>) -> &mut [u8] {
    // Ranges lie inside the buffer, whose length is a usize.
    let index = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
    &mut buf[index(range.start)..index(range.end)]
}
