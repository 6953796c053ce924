//! The two superblocks (`docs/format.md`, "Superblock" and "Extended superblock").

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Byte offset of the [`Superblock`].
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Byte offset of the [`ExtendedSuperblock`].
pub const EXTENDED_OFFSET: u64 = 1152;
/// First number of an EROFS superblock.
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// First number of a RAFS v5 image, at byte 0.
pub const MAGIC_V5: u32 = 0x5241_4653;
/// `feature_compat` bit: this is RAFS v6.
pub const COMPAT_RAFS_V6: u32 = 0x4000_0000;
/// `feature_incompat`: chunked files and a device table.
pub const INCOMPAT: u32 = 0xC;
/// Position of the device table in units of its slots: 11 × 128 = 1408.
pub const DEVICE_TABLE_SLOT: u16 = 11;

/// EROFS superblock at byte 1024.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct Superblock {
    pub magic: U32,
    pub checksum: U32,
    pub feature_compat: U32,
    pub block_bits: u8,
    pub extension_slots: u8,
    pub root_nid: U16,
    pub inode_count: U64,
    pub build_time: U64,
    pub build_time_nsec: U32,
    pub blocks: U32,
    pub meta_block: U32,
    pub xattr_block: U32,
    pub uuid: [u8; 16],
    pub volume_name: [u8; 16],
    pub feature_incompat: U32,
    pub compression: U16,
    pub extra_devices: U16,
    pub device_table_slot: U16,
    pub reserved: [u8; 38],
}
const _: () = assert!(size_of::<Superblock>() == 128);

/// RAFS extended superblock at byte 1152.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct ExtendedSuperblock {
    pub flags: U64,
    pub blob_table_offset: U64,
    pub blob_table_size: U32,
    pub chunk_size: U32,
    pub chunk_table_offset: U64,
    pub chunk_table_size: U64,
    pub prefetch_table_offset: U64,
    pub prefetch_table_size: U32,
    pub padding: U32,
    pub reserved: [u8; 200],
}
const _: () = assert!(size_of::<ExtendedSuperblock>() == 256);

/// Bits of [`ExtendedSuperblock::flags`] (`docs/format.md`, "Flags").
#[allow(missing_docs, reason = "the flags are documented in docs/format.md")]
pub mod flags {
    pub const COMPRESSOR_NONE: u64 = 0x1;
    pub const COMPRESSOR_LZ4: u64 = 0x2;
    pub const DIGEST_BLAKE3: u64 = 0x4;
    pub const DIGEST_SHA256: u64 = 0x8;
    pub const EXPLICIT_UID_GID: u64 = 0x10;
    pub const HAS_XATTR: u64 = 0x20;
    pub const COMPRESSOR_GZIP: u64 = 0x40;
    pub const COMPRESSOR_ZSTD: u64 = 0x80;
    pub const INLINED_CHUNK_DIGEST: u64 = 0x100;
    pub const TARFS: u64 = 0x200;
    pub const ENCRYPTION_NONE: u64 = 0x0100_0000;
    pub const ENCRYPTION_AES_128_XTS: u64 = 0x0200_0000;
    /// Six bits that readers accept and ignore.
    pub const IGNORED: u64 = 0xFC00_0000;
    /// Every bit that a reader may meet.
    pub const KNOWN: u64 = 0x3FF | ENCRYPTION_NONE | ENCRYPTION_AES_128_XTS | IGNORED;
}
