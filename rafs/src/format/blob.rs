//! Device slots and blob table rows (`docs/format.md`, "Device table" and "Blob table").

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Byte offset of the device table.
pub const DEVICE_TABLE_OFFSET: u64 = 1408;

/// One blob as the kernel's EROFS sees it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct DeviceSlot {
    pub id: [u8; 64],
    pub blocks: U32,
    pub mapped_block: U32,
    pub reserved: [u8; 56],
}
const _: () = assert!(size_of::<DeviceSlot>() == 128);

/// One row of the blob table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct BlobRow {
    pub id: [u8; 64],
    pub index: U32,
    pub chunk_size: U32,
    pub chunk_count: U32,
    pub compressor: U32,
    pub digester: U32,
    pub features: U32,
    pub compressed_size: U64,
    pub uncompressed_size: U64,
    pub toc_size: U32,
    pub meta_compressor: U32,
    pub meta_offset: U64,
    pub meta_compressed_size: U64,
    pub meta_uncompressed_size: U64,
    pub toc_digest: [u8; 32],
    pub meta_blob_digest: [u8; 32],
    pub meta_blob_size: U64,
    pub cipher_iv: U64,
    pub cipher: U32,
    pub reserved: [u8; 36],
}
const _: () = assert!(size_of::<BlobRow>() == 256);
