//! The sections that follow the chunk data of a blob.

use std::io::Write;

use sha2::{Digest as _, Sha256};

use super::hashing::HashingSink;
use super::{BlobOptions, WriteError};
use crate::algorithm::{Compressor, Digester};
use crate::blob_id::BlobId;
use crate::blob_info::{BlobFeatures, BlobInfo, MetaLocation};
use crate::codec::{self, as_u64};
use crate::digest::Digest;
use crate::format::chunk_table::Builder;
use crate::format::header::{ContextArea, Header};
use crate::format::tar_header::{self, names};
use crate::format::toc::{Toc, TocEntry};
use crate::units::BLOCK_SIZE;

/// Writes the sections after the chunk data and remembers them for the table of contents.
pub(super) struct TailWriter<W: Write> {
    options: BlobOptions,
    pub(super) sink: HashingSink<W>,
    toc: Toc,
}

impl<W: Write> TailWriter<W> {
    /// Continues where the chunk data ends.
    pub(super) fn new(options: BlobOptions, sink: HashingSink<W>) -> Self {
        Self {
            options,
            sink,
            toc: Toc::default(),
        }
    }

    /// Ends the chunk data, then writes chunk table, header and digests. Returns the
    /// row for the blob table, as far as it is known, and the cache file form of the table.
    pub(super) fn write_tables(
        &mut self,
        table: Builder,
        digests: &[u8],
        chunk_count: u32,
        plain_size: u64,
    ) -> Result<(BlobInfo, Vec<u8>), WriteError> {
        if self.options.original.is_none() {
            self.end_chunk_data(plain_size)?;
        }
        let (table, contexts) = table.finish()?;
        let (info, header) = self.write_chunk_table(&table, contexts, chunk_count, plain_size)?;
        if self.options.blob_toc {
            self.section(names::DIGESTS, Compressor::None, digests, digests);
            self.sink.exclude(digests)?;
            self.tar_header(names::DIGESTS, as_u64(digests.len()))?;
        }
        Ok((info, cache_form(table, &header)))
    }

    /// Writes the tar header of the chunk data, whose digest in the table of
    /// contents covers that header.
    fn end_chunk_data(&mut self, plain_size: u64) -> Result<(), WriteError> {
        let stored_size = self.sink.len();
        self.tar_header(names::DATA, stored_size)?;
        if !self.options.blob_toc {
            return Ok(());
        }
        self.toc.entries.push(TocEntry {
            name: names::DATA.to_owned(),
            compressor: Compressor::None,
            digest: self.sink.digest(),
            offset: 0,
            stored_size,
            plain_size,
        });
        Ok(())
    }

    fn write_chunk_table(
        &mut self,
        table: &[u8],
        contexts: ContextArea,
        chunk_count: u32,
        plain_size: u64,
    ) -> Result<(BlobInfo, Header), WriteError> {
        let compressor = self.options.table_compressor();
        let packed = codec::compress(compressor, table).map_err(|source| WriteError::Codec {
            what: "the chunk table",
            source,
        })?;
        let stored = packed.as_deref().unwrap_or(table);
        let meta = MetaLocation {
            compressor: packed.as_ref().map_or(Compressor::None, |_| compressor),
            offset: self.sink.len(),
            compressed_size: as_u64(stored.len()),
            uncompressed_size: as_u64(table.len()),
        };
        let mut features = self.options.features();
        if contexts.count == 0 {
            // No chunk was small enough: any reader of v2 tables can read this one.
            features = features.without(BlobFeatures::BATCH);
        }
        let header = Header {
            features,
            chunk_count,
            table: meta,
            contexts,
        };
        let encoded = header.encode();
        self.section(names::TABLE, meta.compressor, stored, table);
        self.sink.write(stored)?;
        self.section(names::TABLE_HEADER, Compressor::None, &*encoded, &*encoded);
        self.sink.write(&*encoded)?;
        self.tar_header(names::TABLE, meta.compressed_size + as_u64(encoded.len()))?;
        let info = BlobInfo {
            id: BlobId::placeholder(),
            chunk_size: self.options.chunk_size,
            chunk_count,
            compressor: self.options.compressor,
            digester: self.options.digester,
            features,
            compressed_size: 0,
            uncompressed_size: plain_size,
            meta,
            toc_size: 0,
            toc_digest: Digest::default(),
            meta_blob_digest: Digest::default(),
            meta_blob_size: 0,
        };
        Ok((info, header))
    }

    /// A bootstrap is compressed only where a table of contents can say so.
    pub(super) fn write_bootstrap(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let packed = if self.options.blob_toc {
            codec::compress(Compressor::Zstd, bytes).map_err(|source| WriteError::Codec {
                what: "the bootstrap",
                source,
            })?
        } else {
            None
        };
        let stored = packed.as_deref().unwrap_or(bytes);
        let compressor = packed
            .as_ref()
            .map_or(Compressor::None, |_| Compressor::Zstd);
        self.section(names::BOOTSTRAP, compressor, stored, bytes);
        self.sink.write(stored)?;
        self.tar_header(names::BOOTSTRAP, as_u64(stored.len()))
    }

    /// Writes the table of contents if there is one; returns its size and digest.
    pub(super) fn write_toc(&mut self) -> Result<(u32, Digest), WriteError> {
        if self.toc.entries.is_empty() {
            return Ok((0, Digest::default()));
        }
        let bytes = self.toc.encode()?;
        self.sink.write(&bytes)?;
        // Five entries and a tar header at most.
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Ok((size, Digest::of(Digester::Sha256, &bytes)))
    }

    /// Notes a section that is about to be written at the current position.
    fn section(&mut self, name: &str, compressor: Compressor, stored: &[u8], plain: &[u8]) {
        if self.options.blob_toc {
            self.toc.entries.push(TocEntry {
                name: name.to_owned(),
                compressor,
                digest: Digest::from_bytes(Sha256::digest(plain).into()),
                offset: self.sink.len(),
                stored_size: as_u64(stored.len()),
                plain_size: as_u64(plain.len()),
            });
        }
    }

    fn tar_header(&mut self, name: &str, size: u64) -> Result<(), WriteError> {
        if self.options.has_tar_headers() {
            self.sink.write(&tar_header::encode(name, size)?)?;
        }
        Ok(())
    }
}

/// The table as a cache directory keeps it: zero padded to whole blocks, then the header.
fn cache_form(mut table: Vec<u8>, header: &Header) -> Vec<u8> {
    let block = usize::try_from(BLOCK_SIZE).unwrap_or(usize::MAX);
    table.resize(table.len().next_multiple_of(block), 0);
    table.extend_from_slice(&*header.encode());
    table
}
