//! Threads that digest and compress, shared by all layers.
//!
//! A worker keeps one compression context per algorithm and holds no lock while it
//! works. Which worker takes which item does not influence the result.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use storage::blob_writer::{Batch, SealedBatch};
use storage::codec::{CodecError, Encoder, Encoding};
use storage::{Digest, Digester};

use super::dedup::Dedup;
use super::item::{Data, Digested, Item, RawChunk};
use crate::reuse::Known;

/// The threads. They end when the value is dropped.
#[derive(Debug)]
pub struct Workers {
    /// `None` only while the value is dropped.
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

/// What the workers need to know about a layer.
#[derive(Debug)]
pub(crate) struct LayerContext {
    pub(crate) encoding: Encoding,
    pub(crate) digester: Digester,
    pub(crate) dedup: Dedup,
    /// Chunks of other images, which need not be stored.
    pub(crate) known: Arc<Known>,
    /// Gets every chunk that is stored, at its place in the uncompressed address space.
    pub(crate) plain: Option<Arc<File>>,
    /// One chunk of zeros: the content of holes.
    pub(crate) zeros: Vec<u8>,
    /// Digest and checksum of zeros by length, so that a large hole is hashed once.
    hole_digests: Mutex<HashMap<u32, (Digest, u32)>>,
}

/// Work to do.
#[derive(Debug)]
enum Job {
    /// Digest and compress the chunks of an item.
    Item(ItemJob),
    /// Compress a batch.
    Seal {
        batch: Batch,
        encoding: Encoding,
        sealed: Sender<Result<SealedBatch, CodecError>>,
    },
}

/// One item to work on, and where to deliver it.
#[derive(Debug)]
pub(crate) struct ItemJob {
    pub(crate) layer: Arc<LayerContext>,
    /// Position of the item in its layer's stream.
    pub(crate) sequence: u64,
    pub(crate) item: Item,
    pub(crate) done: Sender<Done>,
}

/// A finished item.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) sequence: u64,
    pub(crate) item: Item,
    /// One result per chunk of the item.
    pub(crate) result: Result<Vec<Digested>, CodecError>,
}

impl Workers {
    pub(crate) fn start(threads: usize) -> Self {
        let (jobs, queue) = crossbeam_channel::bounded(threads * 2);
        let threads = (0..threads)
            .map(|_| {
                let queue = queue.clone();
                std::thread::spawn(move || work(&queue))
            })
            .collect();
        Self {
            jobs: Some(jobs),
            threads,
        }
    }

    /// Queues an item; waits while the queue is full. Workers never wait for anything
    /// but jobs, so this ends.
    pub(crate) fn submit(&self, item: ItemJob) {
        self.send(Job::Item(item));
    }

    /// Queues a batch, like an item. The result comes through the channel, which
    /// closes without one only if a worker panics.
    pub(crate) fn seal(
        &self,
        batch: Batch,
        encoding: Encoding,
    ) -> Receiver<Result<SealedBatch, CodecError>> {
        let (sealed, result) = crossbeam_channel::bounded(1);
        self.send(Job::Seal {
            batch,
            encoding,
            sealed,
        });
        result
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // Fails only if every worker has panicked. The job's channel then closes
            // and its layer fails with a message that says so.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl LayerContext {
    pub(crate) fn new(
        encoding: Encoding,
        digester: Digester,
        chunk_size: usize,
        known: Arc<Known>,
        plain: Option<Arc<File>>,
    ) -> Self {
        Self {
            encoding,
            digester,
            dedup: Dedup::default(),
            known,
            plain,
            zeros: vec![0; chunk_size],
            hole_digests: Mutex::default(),
        }
    }

    fn digest(&self, chunk: &RawChunk, bytes: &[u8]) -> (Digest, u32) {
        let compute = || (Digest::of(self.digester, bytes), crc32c::crc32c(bytes));
        if chunk.start.is_some() {
            return compute();
        }
        let mut known = self
            .hole_digests
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *known.entry(chunk.len).or_insert_with(compute)
    }
}

/// The encoders of a thread, kept between items: one per algorithm and level in use.
#[derive(Default)]
pub(crate) struct Compression {
    encoders: Vec<Encoder>,
}

impl Compression {
    /// Appends the compressed form of `bytes` to `output`, if it is smaller.
    pub(crate) fn append(
        &mut self,
        encoding: Encoding,
        bytes: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Data, CodecError> {
        let start = output.len();
        let shrunk = self.encoder(encoding)?.compress(bytes, output)?;
        Ok(if shrunk {
            Data::Compressed(start..output.len())
        } else {
            Data::Raw
        })
    }

    fn encoder(&mut self, encoding: Encoding) -> Result<&mut Encoder, CodecError> {
        let known = self
            .encoders
            .iter()
            .position(|encoder| encoder.encoding() == encoding);
        let index = match known {
            Some(index) => index,
            None => {
                self.encoders.push(Encoder::new(encoding)?);
                self.encoders.len() - 1
            }
        };
        Ok(&mut self.encoders[index])
    }
}

fn work(queue: &Receiver<Job>) {
    let mut compression = Compression::default();
    for job in queue {
        match job {
            Job::Item(ItemJob {
                layer,
                sequence,
                mut item,
                done,
            }) => {
                let result = process(&layer, &mut compression, &mut item);
                // A layer that failed no longer listens.
                let _ = done.send(Done {
                    sequence,
                    item,
                    result,
                });
            }
            Job::Seal {
                batch,
                encoding,
                sealed,
            } => {
                let result = compression
                    .encoder(encoding)
                    .and_then(|encoder| batch.seal(encoder));
                let _ = sealed.send(result);
            }
        }
    }
}

fn process(
    layer: &LayerContext,
    compression: &mut Compression,
    item: &mut Item,
) -> Result<Vec<Digested>, CodecError> {
    let memory = &mut *item.buffer;
    item.chunks
        .iter()
        .map(|chunk| {
            let bytes = chunk.bytes(&memory.input, &layer.zeros);
            let (digest, crc32c) = layer.digest(chunk, bytes);
            let data = if chunk.batched {
                Data::Raw
            } else if layer.known.find(&digest, chunk.len).is_some() {
                Data::Claimed
            } else if layer.dedup.claim(&digest) {
                compression.append(layer.encoding, bytes, &mut memory.output)?
            } else {
                Data::Claimed
            };
            Ok(Digested {
                digest,
                crc32c,
                data,
            })
        })
        .collect()
}
