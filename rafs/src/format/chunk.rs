//! Chunk indexes of files and records of the chunk table
//! (`docs/format.md`, "Chunk indexes" and "Chunk records").

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Where one chunk of a file is.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct ChunkIndexEntry {
    pub index_low: U16,
    pub device: u8,
    pub index_high: u8,
    pub block: U32,
}
const _: () = assert!(size_of::<ChunkIndexEntry>() == 8);

/// One stored chunk and its digest.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct RawChunkRecord {
    pub digest: [u8; 32],
    pub blob: U32,
    pub flags: U32,
    pub compressed_size: U32,
    pub uncompressed_size: U32,
    pub compressed_offset: U64,
    pub uncompressed_offset: U64,
    pub file_offset: U64,
    pub index: U32,
    pub crc32c: U32,
}
const _: () = assert!(size_of::<RawChunkRecord>() == 80);

/// Flag of a record: stored compressed.
pub const RECORD_COMPRESSED: u32 = 0x1;
/// Flag of a record: stored encrypted.
pub const RECORD_ENCRYPTED: u32 = 0x4;
/// Flag of a record: the CRC32C field is valid.
pub const RECORD_CRC: u32 = 0x10;
