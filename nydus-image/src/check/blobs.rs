//! Reads every chunk of every blob and compares it with the bootstrap.
//!
//! Threads take runs of chunks from a shared counter, so that all processors work
//! until the end. The first problem found stops the others.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, bail};
use rafs::Image;
use storage::chunk::{Chunk, Encoding};
use storage::codec::{CodecError, decompress_into, zran};
use storage::digest::ChunkDigests;
use storage::format::chunk_table::ChunkTable;
use storage::format::{FormatError, stored_table};
use storage::{BlobFeatures, BlobId, BlobIndex, BlobInfo, ChunkIndex, Digest};

use crate::pipeline::item::len;

/// Chunks that a thread takes at a time.
const RUN: u32 = 16;

/// A chunk that is not what the bootstrap says.
#[derive(Debug, thiserror::Error)]
#[error("blob {blob}: chunk {chunk}, stored at byte {offset}")]
pub struct ChunkError {
    /// The blob.
    blob: BlobId,
    /// The chunk.
    chunk: ChunkIndex,
    /// Where it is in the blob file.
    offset: u64,
    #[source]
    problem: ChunkProblem,
}

/// What is wrong with a chunk.
#[derive(Debug, thiserror::Error)]
pub enum ChunkProblem {
    /// The blob's table and the bootstrap describe it differently.
    #[error("its {field} is {found} in the blob, but {expected} in the bootstrap")]
    Differs {
        /// What is different.
        field: &'static str,
        /// By the blob's chunk table.
        found: u64,
        /// By the bootstrap.
        expected: u64,
    },
    /// Its row in the chunk table is damaged.
    #[error("its entry in the chunk table is damaged")]
    Entry(#[source] FormatError),
    /// The file cannot be read, or is too short.
    #[error("cannot read it")]
    Read(#[source] std::io::Error),
    /// It does not decompress.
    #[error("cannot decompress it")]
    Decode(#[source] CodecError),
    /// It decompresses to other bytes.
    #[error("its digest is {found}, but {expected} in the bootstrap")]
    Digest {
        /// Of the data.
        found: Digest,
        /// By the bootstrap.
        expected: Digest,
    },
}

/// Verifies all blobs of `image`, which are in files of `dir` named by their ids.
pub(super) fn verify(image: &Arc<Image>, dir: &Path) -> anyhow::Result<()> {
    for (index, info) in (0..).zip(image.blobs()) {
        let file = open(dir, info.id.as_str())?;
        let table = if info.features.contains(BlobFeatures::SEPARATE) {
            // The data is a layer; a second file has the chunk table.
            let tables = open(dir, &info.meta_blob_digest.to_string())?;
            read_table(&tables, info)
        } else {
            read_table(&file, info)
        };
        let table =
            table.with_context(|| format!("blob {}: its chunk table is not valid", info.id))?;
        let blob = Blob {
            image,
            index: BlobIndex::new(index),
            info,
            file,
            table,
            digests: image.digests(BlobIndex::new(index)),
        };
        blob.verify()?;
    }
    Ok(())
}

fn open(dir: &Path, name: &str) -> anyhow::Result<File> {
    let path = dir.join(name);
    File::open(&path).with_context(|| format!("cannot open {}", path.display()))
}

fn read_table(file: &File, info: &BlobInfo) -> anyhow::Result<ChunkTable> {
    let range = stored_table::stored_range(info)?;
    let size = file.metadata()?.len();
    if range.end > size {
        bail!(
            "it ends at byte {}, but the file has only {size} bytes",
            range.end
        );
    }
    let mut stored = vec![0; usize::try_from(range.end - range.start)?];
    file.read_exact_at(&mut stored, range.start)?;
    Ok(stored_table::open(info, &stored)?)
}

/// One blob to verify.
struct Blob<'a, D> {
    image: &'a Image,
    index: BlobIndex,
    info: &'a BlobInfo,
    file: File,
    table: ChunkTable,
    digests: D,
}

/// Buffers of one thread.
#[derive(Default)]
struct Buffers {
    stored: Vec<u8>,
    plain: Vec<u8>,
    /// The batch or seek context that is in `plain`, for the chunks that follow.
    unit: Option<u32>,
}

impl<D: ChunkDigests> Blob<'_, D> {
    fn verify(&self) -> Result<(), ChunkError> {
        let next = AtomicU32::new(0);
        let stop = AtomicBool::new(false);
        let first_error = Mutex::new(None);
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    if let Err(error) = self.verify_runs(&next, &stop) {
                        stop.store(true, Ordering::Relaxed);
                        let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
                        first.get_or_insert(error);
                    }
                });
            }
        });
        let first = first_error
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        first.map_or(Ok(()), Err)
    }

    fn verify_runs(&self, next: &AtomicU32, stop: &AtomicBool) -> Result<(), ChunkError> {
        let mut buffers = Buffers::default();
        loop {
            // Below 2^24 chunks and few threads: the counter does not wrap.
            let start = next.fetch_add(RUN, Ordering::Relaxed);
            if start >= self.table.len() || stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            for index in start..self.table.len().min(start + RUN) {
                self.verify_chunk(ChunkIndex::new(index), &mut buffers)?;
            }
        }
    }

    fn verify_chunk(&self, index: ChunkIndex, buffers: &mut Buffers) -> Result<(), ChunkError> {
        let fail = |offset, problem| ChunkError {
            blob: self.info.id.clone(),
            chunk: index,
            offset,
            problem,
        };
        let chunk = self
            .table
            .chunk(index)
            .map_err(|e| fail(0, ChunkProblem::Entry(e)))?;
        let offset = match chunk.encoding {
            Encoding::Raw { offset }
            | Encoding::Compressed { offset, .. }
            | Encoding::Batch { offset, .. } => offset,
            Encoding::Zran { .. } => 0,
        };
        self.compare(index, &chunk, buffers)
            .map_err(|problem| fail(offset, problem))
    }

    fn compare(
        &self,
        index: ChunkIndex,
        chunk: &Chunk,
        buffers: &mut Buffers,
    ) -> Result<(), ChunkProblem> {
        let position = self.image.chunk_position(self.index, index);
        // Every record was read once by `verify_tree`.
        if let Some(Ok(record)) = position.map(|at| self.image.chunk_record(at)) {
            equal("offset", chunk.plain_offset, record.uncompressed_offset)?;
            equal(
                "size",
                chunk.plain_size.into(),
                record.uncompressed_size.into(),
            )?;
        }
        let bytes = self.decode(chunk, buffers)?;
        // A chunk without a digest belongs to a file that is not in this image.
        let Some(expected) = self.digests.chunk_digest(index) else {
            return Ok(());
        };
        let found = Digest::of(self.info.digester, bytes);
        if found == expected {
            Ok(())
        } else {
            Err(ChunkProblem::Digest { found, expected })
        }
    }

    fn decode<'b>(
        &self,
        chunk: &Chunk,
        buffers: &'b mut Buffers,
    ) -> Result<&'b [u8], ChunkProblem> {
        let size = len(chunk.plain_size);
        match chunk.encoding {
            Encoding::Raw { offset } => {
                buffers.unit = None;
                self.read(offset, size, &mut buffers.plain)?;
                Ok(&buffers.plain)
            }
            Encoding::Compressed {
                offset,
                size: stored,
            } => {
                buffers.unit = None;
                self.read(offset, len(stored), &mut buffers.stored)?;
                self.decompress(size, buffers)?;
                Ok(&buffers.plain)
            }
            Encoding::Batch {
                offset,
                context,
                within,
            } => {
                if buffers.unit != Some(context) {
                    buffers.unit = None;
                    self.batch(offset, context, buffers)?;
                    buffers.unit = Some(context);
                }
                Ok(part(&buffers.plain, within, size))
            }
            Encoding::Zran { context, within } => {
                if buffers.unit != Some(context) {
                    buffers.unit = None;
                    self.seek_context(context, buffers)?;
                    buffers.unit = Some(context);
                }
                Ok(part(&buffers.plain, within, size))
            }
        }
    }

    fn seek_context(&self, number: u32, buffers: &mut Buffers) -> Result<(), ChunkProblem> {
        let context = self
            .table
            .zran_context(number)
            .map_err(ChunkProblem::Entry)?;
        // The table has checked both sizes: at most 32 and 16 MiB.
        let input = context.input.end.saturating_sub(context.input.start);
        let input = usize::try_from(input).unwrap_or(usize::MAX);
        self.read(context.input.start, input, &mut buffers.stored)?;
        buffers.plain.resize(len(context.output_size), 0);
        zran::decode(&context, &buffers.stored, &mut buffers.plain).map_err(ChunkProblem::Decode)
    }

    fn batch(&self, offset: u64, context: u32, buffers: &mut Buffers) -> Result<(), ChunkProblem> {
        let batch = self
            .table
            .batch_context(context)
            .map_err(ChunkProblem::Entry)?;
        let (stored, plain) = (len(batch.compressed_size), len(batch.uncompressed_size));
        if stored == plain {
            return self.read(offset, plain, &mut buffers.plain);
        }
        self.read(offset, stored, &mut buffers.stored)?;
        self.decompress(plain, buffers)
    }

    fn read(&self, offset: u64, size: usize, into: &mut Vec<u8>) -> Result<(), ChunkProblem> {
        into.resize(size, 0);
        self.file
            .read_exact_at(into, offset)
            .map_err(ChunkProblem::Read)
    }

    fn decompress(&self, size: usize, buffers: &mut Buffers) -> Result<(), ChunkProblem> {
        buffers.plain.resize(size, 0);
        decompress_into(self.info.compressor, &buffers.stored, &mut buffers.plain)
            .map_err(ChunkProblem::Decode)
    }
}

/// A chunk of a unit; the table has checked that it lies inside.
fn part(unit: &[u8], within: u32, size: usize) -> &[u8] {
    unit.get(len(within)..)
        .and_then(|rest| rest.get(..size))
        .unwrap_or(&[])
}

fn equal(field: &'static str, found: u64, expected: u64) -> Result<(), ChunkProblem> {
    if found == expected {
        Ok(())
    } else {
        Err(ChunkProblem::Differs {
            field,
            found,
            expected,
        })
    }
}
