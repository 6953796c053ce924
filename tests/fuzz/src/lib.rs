//! What the fuzz targets and the seed collector share: how an input of the
//! `blob_meta` target is laid out, and [`memory`], the bound on what reading a
//! hostile file may take.
//!
//! Run with `misc/fuzz.sh`; every input that fails is kept below `artifacts` and
//! belongs, cut down, into a test beside the code it broke.

pub mod memory;

use storage::algorithm::{Compressor, Digester};
use storage::blob_info::{BlobFeatures, BlobInfo, MetaLocation};
use storage::{BlobId, Digest};

/// Bytes before the stored table: log2 of the chunk size, length of the
/// uncompressed and of the compressed address space.
pub const PREFIX: usize = 17;

/// Length of a chunk table's header.
const HEADER: usize = 4096;

/// An input of `blob_meta`: a stored chunk table and what a bootstrap would say
/// about its blob.
#[must_use]
pub fn encode_table_input(info: &BlobInfo, stored: &[u8]) -> Vec<u8> {
    let mut out = vec![info.chunk_size.ilog2().to_le_bytes()[0]];
    out.extend(info.uncompressed_size.to_le_bytes());
    out.extend(info.compressed_size.to_le_bytes());
    out.extend(stored);
    out
}

/// The blob and the stored table of an input. Everything that the table's own
/// header repeats is taken from there, so that the comparison of the two does not
/// end most runs at once.
#[must_use]
pub fn decode_table_input(input: &[u8]) -> Option<(BlobInfo, &[u8])> {
    let (prefix, stored) = input.split_at_checked(PREFIX)?;
    let header = stored.get(stored.len().checked_sub(HEADER)?..)?;
    let word = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(header.get(at..at + 8)?.try_into().ok()?));
    let of_prefix = |at: usize| Some(u64::from_le_bytes(prefix.get(at..at + 8)?.try_into().ok()?));
    let compressor = match word(8)? {
        0 => Compressor::None,
        1 => Compressor::Lz4,
        2 => Compressor::Gzip,
        _ => Compressor::Zstd,
    };
    let info = BlobInfo {
        id: BlobId::placeholder(),
        chunk_size: 1 << (12 + prefix.first()? % 13),
        chunk_count: word(12)?.min(1 << 24),
        compressor,
        digester: Digester::Blake3,
        features: BlobFeatures::from_bits(word(4)?),
        compressed_size: of_prefix(9)?,
        uncompressed_size: of_prefix(1)?,
        meta: MetaLocation {
            compressor,
            offset: long(16)?,
            compressed_size: long(24)?,
            uncompressed_size: long(32)?,
        },
        toc_size: 0,
        toc_digest: Digest::default(),
        meta_blob_digest: Digest::default(),
        meta_blob_size: 0,
    };
    Some((info, stored))
}
