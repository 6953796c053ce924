//! Writes one blob file front to back: chunk data, tables, tar headers.
//!
//! Chunks arrive digested and compressed, in the order in which they are to be
//! stored. Small ones may be given as a sealed [`Batch`], or one by one to be batched
//! here. [`BlobWriter::finish`] adds the sections that the variant has and says what
//! a bootstrap must know. For a layer that is used in place
//! ([`original`]) the file has the tables only, and chunks are given
//! by their place in the layer.
//!
//! Promises: never seeks, so the output may be a pipe; the same chunks and options
//! give the same bytes; memory holds the chunk table (16 or 24 bytes per chunk),
//! the digests if they are stored (32 bytes per chunk), and one batch. The id and
//! the SHA-256 of the file are computed on the way.
//!
//! Layout variants: `docs/format-blob.md`, "Layout of a blob file".
#![forbid(unsafe_code)]

mod batch;
mod hashing;
mod sections;
#[cfg(test)]
mod tests;

use std::error::Error as StdError;
use std::io::Write;

use crate::algorithm::{Compressor, Digester};
use crate::blob_id::BlobId;
use crate::blob_info::{BlobFeatures, BlobInfo};
use crate::codec::{CodecError, DEFAULT_ZSTD_LEVEL, Encoder, Encoding, as_u64};
use crate::digest::Digest;
use crate::format::FormatError;
use crate::format::chunk_table::{Builder, Layout};
use crate::format::context::BatchContext;
use crate::format::entry::{Entry, flags};
use crate::original::{self, Place, Summary};
use crate::units::{BLOCK_SIZE, ChunkIndex};

pub use batch::{Batch, SealedBatch};

use hashing::HashingSink;
use sections::TailWriter;

/// How a blob is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobOptions {
    /// Of chunks, batches and the chunk table.
    pub compressor: Compressor,
    /// zstd level, as in [`Encoding`].
    pub level: i32,
    /// Of chunk digests.
    pub digester: Digester,
    /// Largest chunk in bytes: a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// End the file with chunk digests and a table of contents.
    pub blob_toc: bool,
    /// Embed the bootstrap.
    pub inline_bootstrap: bool,
    /// Use 24-byte table entries, which carry a CRC32C. Batches imply them.
    pub chunk_info_v2: bool,
    /// Bytes of small chunks that are compressed together: 0 for never, or a power
    /// of two from 4 KiB to `chunk_size`.
    pub batch_size: u32,
    /// Set if chunks stay in an existing layer: then the file is its seek index.
    pub original: Option<original::Kind>,
}

impl Default for BlobOptions {
    fn default() -> Self {
        Self {
            compressor: Compressor::default(),
            level: DEFAULT_ZSTD_LEVEL,
            digester: Digester::default(),
            chunk_size: 1 << 20,
            blob_toc: false,
            inline_bootstrap: false,
            chunk_info_v2: false,
            batch_size: 0,
            original: None,
        }
    }
}

impl BlobOptions {
    /// How chunks are compressed.
    #[must_use]
    pub const fn encoding(&self) -> Encoding {
        Encoding {
            compressor: match self.original {
                // They stay what they are.
                Some(_) => Compressor::None,
                None => self.compressor,
            },
            level: self.level,
        }
    }

    /// Whether a chunk of `size` bytes is to be given as [`ChunkData::Batched`].
    ///
    /// * `whole_file`: whether its file consists of this chunk alone.
    #[must_use]
    pub fn batches(&self, size: u32, whole_file: bool) -> bool {
        whole_file && size < self.batch_size / 2
    }

    fn layout(&self) -> Layout {
        match (self.original, self.batch_size, self.chunk_info_v2) {
            (Some(original::Kind::Gzip), _, _) => Layout::Zran,
            (Some(original::Kind::Tar), _, _) => Layout::V2,
            (None, 0, false) => Layout::V1,
            (None, 0, true) => Layout::V2,
            _ => Layout::Batch,
        }
    }

    /// Of the chunk table.
    fn table_compressor(&self) -> Compressor {
        match self.original {
            Some(_) => Compressor::Zstd,
            None => self.compressor,
        }
    }

    /// Whether sections are followed by tar headers.
    fn has_tar_headers(&self) -> bool {
        self.blob_toc || self.inline_bootstrap
    }

    fn features(&self) -> BlobFeatures {
        let mut features = BlobFeatures::ALIGNED | BlobFeatures::CAP_TAR_TOC;
        for (wanted, feature) in [
            (self.has_tar_headers(), BlobFeatures::HAS_TAR_HEADER),
            (
                self.blob_toc,
                BlobFeatures::HAS_TOC | BlobFeatures::INLINED_CHUNK_DIGEST,
            ),
            (self.inline_bootstrap, BlobFeatures::INLINED_FS_META),
            (self.layout() != Layout::V1, BlobFeatures::CHUNK_INFO_V2),
            (self.layout() == Layout::Batch, BlobFeatures::BATCH),
            (self.layout() == Layout::Zran, BlobFeatures::ZRAN),
            (self.original.is_some(), BlobFeatures::SEPARATE),
        ] {
            if wanted {
                features = features | feature;
            }
        }
        features
    }

    fn check(&self) -> Result<(), WriteError> {
        let size_ok = |size: u32| size.is_power_of_two() && (1 << 12..=1 << 24).contains(&size);
        if !size_ok(self.chunk_size) {
            return Err(WriteError::Options {
                field: "chunk size",
                value: self.chunk_size,
            });
        }
        if self.batch_size != 0 && !(size_ok(self.batch_size) && self.batch_size <= self.chunk_size)
        {
            return Err(WriteError::Options {
                field: "batch size",
                value: self.batch_size,
            });
        }
        Ok(())
    }
}

/// A chunk that is ready to be stored.
#[derive(Clone, Copy, Debug)]
pub struct PreparedChunk<'a> {
    /// Digest of the uncompressed bytes, by the blob's digester.
    pub digest: Digest,
    /// Length of the uncompressed bytes, 1 to the chunk size.
    pub uncompressed_size: u32,
    /// CRC32C of the uncompressed bytes.
    pub crc32c: u32,
    /// What to store.
    pub data: ChunkData<'a>,
}

/// The bytes of a chunk.
#[derive(Clone, Copy, Debug)]
pub enum ChunkData<'a> {
    /// Compressed, strictly smaller than the uncompressed bytes.
    Compressed(&'a [u8]),
    /// Uncompressed, because compression does not make them smaller.
    Raw(&'a [u8]),
    /// Uncompressed, to be compressed here with its neighbours; for chunks that
    /// [`BlobOptions::batches`] names.
    Batched(&'a [u8]),
    /// Nothing: the chunk stays where it is, with [`BlobOptions::original`].
    InPlace(&'a Place),
}

/// Where a chunk went: what its record in a bootstrap says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// Position in the chunk table.
    pub index: ChunkIndex,
    /// Whether it is stored compressed; false in a batch.
    pub compressed: bool,
    /// Stored length; 0 in a batch.
    pub compressed_size: u32,
    /// Start in the blob file; 0 in a batch.
    pub compressed_offset: u64,
    /// Start in the uncompressed address space.
    pub uncompressed_offset: u64,
}

/// A blob that is complete.
#[derive(Clone, Debug)]
pub struct FinishedBlob {
    /// The row of a blob table; `None` if no chunk was stored.
    ///
    /// With an embedded bootstrap the id is the real one, all else is as that
    /// bootstrap says it: it does not know the bytes after itself. For a layer that
    /// is used in place it is the id of that layer.
    pub info: Option<BlobInfo>,
    /// Id by the exclusion rule of `docs/format-blob.md`, "Blob ids".
    pub id: BlobId,
    /// SHA-256 of the whole file, by which registries name it.
    pub file_sha256: Digest,
    /// Length of the file. 0 means that there is no blob: nothing was stored and
    /// nothing is embedded.
    pub file_size: u64,
    /// Length of the table of contents with its tar header; 0 if there is none.
    pub toc_size: u32,
    /// SHA-256 of it; zero if there is none.
    pub toc_digest: Digest,
    /// Content of the `.blob.meta` file of a cache directory; empty if no chunk was stored.
    pub cct: Vec<u8>,
}

/// Why a blob could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The output failed.
    #[error("writing the blob at byte {at}")]
    Io {
        /// Position in the blob file.
        at: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// An option has a value that the format does not allow.
    #[error("{field} {value} is not a power of two in the allowed range")]
    Options {
        /// The option.
        field: &'static str,
        /// Its value.
        value: u32,
    },
    /// The caller's chunk contradicts itself or the options.
    #[error("chunk {index}: {problem}")]
    Chunk {
        /// Position the chunk would have had.
        index: u32,
        /// What is wrong.
        problem: &'static str,
    },
    /// The blob exceeds a limit of the format.
    #[error("the blob cannot be stored in this format")]
    Limit {
        /// Which limit.
        #[from]
        source: FormatError,
    },
    /// A batch or table could not be compressed.
    #[error("compressing {what}")]
    Codec {
        /// What was being compressed.
        what: &'static str,
        /// What the codec said.
        source: CodecError,
    },
    /// The embedded bootstrap could not be made.
    #[error("making the embedded bootstrap")]
    Bootstrap {
        /// What its maker said.
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// Writes one blob to `W`, which need not be able to seek.
///
/// Pass `&mut W` to keep the writer. Dropping a `BlobWriter` before it is finished
/// leaves an incomplete file behind; whoever opened the file removes it.
#[derive(Debug)]
pub struct BlobWriter<W: Write> {
    options: BlobOptions,
    sink: HashingSink<W>,
    table: Builder,
    /// Chunk digests, if they are stored.
    digests: Vec<u8>,
    /// End of the uncompressed address space so far.
    plain_size: u64,
    batch: Batch,
    encoder: Encoder,
    /// The layer that the chunks are in, once it is known.
    layer: Option<Summary>,
}

impl<W: Write> BlobWriter<W> {
    /// Starts a blob. Nothing is written yet.
    ///
    /// # Errors
    /// [`WriteError::Options`] for a chunk or batch size that the format does not
    /// allow, [`WriteError::Codec`] for gzip.
    pub fn new(out: W, options: BlobOptions) -> Result<Self, WriteError> {
        options.check()?;
        let encoder = Encoder::new(options.encoding()).map_err(|source| WriteError::Codec {
            what: "the blob",
            source,
        })?;
        Ok(Self {
            options,
            sink: HashingSink::new(out),
            table: Builder::new(options.layout()),
            digests: Vec::new(),
            plain_size: 0,
            batch: Batch::default(),
            encoder,
            layer: None,
        })
    }

    /// Names the layer that all chunks are in; with [`BlobOptions::original`], before
    /// the blob is finished.
    pub fn set_original(&mut self, layer: Summary) {
        self.layer = Some(layer);
    }

    /// Number of chunks stored so far.
    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        self.table.len()
    }

    /// Stores a chunk; the order of calls is the order in the blob.
    ///
    /// Writes to the output unless the chunk joins a batch.
    ///
    /// # Errors
    /// [`WriteError::Io`]; [`WriteError::Chunk`] if sizes contradict each other;
    /// [`WriteError::Limit`] beyond 2^24 - 1 chunks, 1 TiB of compressed or 16 TiB
    /// of uncompressed data. The blob is not usable after an error.
    pub fn append(&mut self, chunk: &PreparedChunk<'_>) -> Result<StoredChunk, WriteError> {
        self.check_chunk(chunk)?;
        match chunk.data {
            ChunkData::Batched(bytes) => self.join_batch(chunk, bytes),
            ChunkData::Compressed(bytes) => self.store(chunk, bytes, flags::COMPRESSED),
            ChunkData::Raw(bytes) => self.store(chunk, bytes, 0),
            ChunkData::InPlace(place) => self.refer(chunk, place),
        }
    }

    /// Stores a batch that was compressed elsewhere, after all that came before.
    ///
    /// Returns what became of its first chunk; the others follow it in the table.
    ///
    /// # Errors
    /// As for [`BlobWriter::append`]; also if a chunk of the batch is not one that
    /// [`BlobOptions::batches`] names, or the batch is empty.
    pub fn append_batch(&mut self, batch: &SealedBatch) -> Result<StoredChunk, WriteError> {
        self.flush_batch()?;
        self.store_batch(batch)
    }

    fn check_chunk(&self, chunk: &PreparedChunk<'_>) -> Result<(), WriteError> {
        let size = chunk.uncompressed_size;
        let plain = as_u64(match chunk.data {
            ChunkData::Raw(bytes) | ChunkData::Batched(bytes) | ChunkData::Compressed(bytes) => {
                bytes.len()
            }
            ChunkData::InPlace(_) => 0,
        });
        let kind = match chunk.data {
            ChunkData::InPlace(Place::Tar { .. }) => Some(original::Kind::Tar),
            ChunkData::InPlace(Place::Gzip { .. }) => Some(original::Kind::Gzip),
            _ => None,
        };
        let problem = match chunk.data {
            _ if size == 0 || size > self.options.chunk_size => "empty or above the chunk size",
            _ if kind != self.options.original => "not in the kind of layer that the blob is for",
            ChunkData::Compressed(_) if plain == 0 || plain >= u64::from(size) => {
                "compressed but not smaller"
            }
            ChunkData::Raw(_) | ChunkData::Batched(_) if plain != u64::from(size) => {
                "its size is not that of its bytes"
            }
            ChunkData::Batched(_) if !self.options.batches(size, true) => "too large for a batch",
            _ => return Ok(()),
        };
        Err(WriteError::Chunk {
            index: self.table.len(),
            problem,
        })
    }

    /// Stores a chunk as a unit of its own.
    fn store(
        &mut self,
        chunk: &PreparedChunk<'_>,
        bytes: &[u8],
        compressed: u8,
    ) -> Result<StoredChunk, WriteError> {
        self.flush_batch()?;
        let offset = self.sink.len();
        // At most `uncompressed_size`, as `check_chunk` saw.
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        // A flagged CRC of zero is invalid; v1 entries drop flag and CRC anyway.
        let (crc_flag, data) = match (self.options.layout(), chunk.crc32c) {
            (Layout::V1, _) | (_, 0) => (0, 0),
            (_, crc) => (flags::HAS_CRC, u64::from(crc)),
        };
        let index = self.table.push(&Entry {
            plain_offset: self.plain_size,
            plain_size: chunk.uncompressed_size,
            offset,
            size,
            flags: compressed | crc_flag,
            data,
        })?;
        self.sink.write(bytes)?;
        let uncompressed_offset = self.plain_size;
        self.account(chunk.digest, chunk.uncompressed_size);
        Ok(StoredChunk {
            index,
            compressed: compressed != 0,
            compressed_size: size,
            compressed_offset: offset,
            uncompressed_offset,
        })
    }

    /// Notes where a chunk is in its layer.
    fn refer(
        &mut self,
        chunk: &PreparedChunk<'_>,
        place: &Place,
    ) -> Result<StoredChunk, WriteError> {
        // Informative in a gzip, and 24 bits in the table.
        const MAX_STORED: u64 = (1 << 24) - 1;
        let (offset, size, flags, data) = match place {
            Place::Tar { offset } => {
                let crc = u64::from(chunk.crc32c);
                let flag = if crc == 0 { 0 } else { flags::HAS_CRC };
                (*offset, chunk.uncompressed_size, flag, crc)
            }
            Place::Gzip {
                context,
                within,
                start,
                end,
            } => {
                // Both are bounded by the 16 MiB that a context can have.
                let output_size = within.saturating_add(chunk.uncompressed_size);
                let number = self.table.extend_zran(context, *end, output_size)?;
                let size = end.saturating_sub(*start).min(MAX_STORED);
                let data = u64::from(number) << 32 | u64::from(*within);
                let size = u32::try_from(size).unwrap_or_default();
                (*start, size, flags::COMPRESSED | flags::ZRAN, data)
            }
        };
        let index = self.table.push(&Entry {
            plain_offset: self.plain_size,
            plain_size: chunk.uncompressed_size,
            offset,
            size,
            flags,
            data,
        })?;
        let uncompressed_offset = self.plain_size;
        self.account(chunk.digest, chunk.uncompressed_size);
        Ok(StoredChunk {
            index,
            compressed: flags & flags::COMPRESSED != 0,
            compressed_size: size,
            compressed_offset: offset,
            uncompressed_offset,
        })
    }

    fn join_batch(
        &mut self,
        chunk: &PreparedChunk<'_>,
        bytes: &[u8],
    ) -> Result<StoredChunk, WriteError> {
        if !self.batch.has_room(bytes.len(), &self.options) {
            self.flush_batch()?;
        }
        let stored = self.batch_entry(
            chunk.digest,
            chunk.uncompressed_size,
            as_u64(self.batch.len()),
        )?;
        self.batch.push(chunk.digest, bytes);
        Ok(stored)
    }

    /// Adds a chunk of the batch that is stored next to the table.
    fn batch_entry(
        &mut self,
        digest: Digest,
        size: u32,
        offset_in_batch: u64,
    ) -> Result<StoredChunk, WriteError> {
        let index = self.table.push(&Entry {
            plain_offset: self.plain_size,
            plain_size: size,
            // Nothing is written before the batch itself.
            offset: self.sink.len(),
            size: 0,
            flags: flags::COMPRESSED | flags::BATCH,
            data: u64::from(self.table.context_count()) << 32 | offset_in_batch,
        })?;
        let uncompressed_offset = self.plain_size;
        self.account(digest, size);
        Ok(StoredChunk {
            index,
            compressed: false,
            compressed_size: 0,
            compressed_offset: 0,
            uncompressed_offset,
        })
    }

    /// Counts a chunk that was added to the table.
    fn account(&mut self, digest: Digest, size: u32) {
        self.plain_size += u64::from(size).next_multiple_of(BLOCK_SIZE);
        if self.options.blob_toc {
            self.digests.extend_from_slice(digest.as_bytes());
        }
    }

    fn flush_batch(&mut self) -> Result<(), WriteError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batch);
        let sealed = batch.seal(&mut self.encoder);
        let sealed = sealed.map_err(|source| WriteError::Codec {
            what: "a batch",
            source,
        })?;
        // Its chunks are in the table already.
        self.write_batch(&sealed)
    }

    fn store_batch(&mut self, batch: &SealedBatch) -> Result<StoredChunk, WriteError> {
        let mut first = None;
        let mut offset = 0;
        for member in &batch.members {
            if member.size == 0 || !self.options.batches(member.size, true) {
                return Err(WriteError::Chunk {
                    index: self.table.len(),
                    problem: "empty, or too large for a batch",
                });
            }
            let stored = self.batch_entry(member.digest, member.size, offset)?;
            offset += u64::from(member.size);
            first.get_or_insert(stored);
        }
        self.write_batch(batch)?;
        first.ok_or(WriteError::Chunk {
            index: self.table.len(),
            problem: "a batch without chunks",
        })
    }

    fn write_batch(&mut self, batch: &SealedBatch) -> Result<(), WriteError> {
        self.sink.write(&batch.stored)?;
        // Less than the batch size, which is at most 16 MiB.
        let len = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        self.table.push_batch(BatchContext {
            compressed_size: len(batch.stored.len()),
            uncompressed_size: len(batch.plain_size),
        });
        Ok(())
    }

    /// Writes everything that follows the chunk data.
    ///
    /// * `bootstrap`: makes the bootstrap to embed; called only with
    ///   [`BlobOptions::inline_bootstrap`]. It gets the row of its blob table, with
    ///   the placeholder id, or `None` if no chunk was stored.
    ///
    /// # Errors
    /// As for [`BlobWriter::append`]; [`WriteError::Bootstrap`] if `bootstrap` fails.
    pub fn finish<F>(mut self, bootstrap: F) -> Result<FinishedBlob, WriteError>
    where
        F: FnOnce(Option<&BlobInfo>) -> Result<Vec<u8>, Box<dyn StdError + Send + Sync>>,
    {
        self.flush_batch()?;
        let mut tail = TailWriter::new(self.options, self.sink);
        let stored = if self.table.is_empty() {
            None
        } else {
            let chunk_count = self.table.len();
            Some(tail.write_tables(self.table, &self.digests, chunk_count, self.plain_size)?)
        };
        let (mut info, cct) = stored.map_or((None, Vec::new()), |(info, cct)| (Some(info), cct));
        let layer = self.layer.unwrap_or_default();
        let in_place = self.options.original.is_some();
        if let (Some(info), true) = (&mut info, in_place) {
            info.id = BlobId::from_digest(&layer.digest);
            info.compressed_size = layer.size;
        }
        if self.options.inline_bootstrap {
            if let (Some(info), false) = (&mut info, in_place) {
                info.compressed_size = tail.sink.len();
            }
            let bytes =
                bootstrap(info.as_ref()).map_err(|source| WriteError::Bootstrap { source })?;
            tail.write_bootstrap(&bytes)?;
        }
        let (toc_size, toc_digest) = tail.write_toc()?;
        let file_size = tail.sink.len();
        let (digest, file_sha256) = tail.sink.finish()?;
        let id = BlobId::from_digest(&digest);
        if let Some(info) = &mut info {
            if !in_place {
                info.id = id.clone();
            }
            if !self.options.inline_bootstrap {
                info.toc_size = toc_size;
                info.toc_digest = toc_digest;
                if in_place {
                    info.meta_blob_digest = digest;
                    info.meta_blob_size = file_size;
                } else {
                    info.compressed_size = file_size;
                }
            }
        }
        Ok(FinishedBlob {
            info,
            id,
            file_sha256,
            file_size,
            toc_size,
            toc_digest,
            cct,
        })
    }
}
