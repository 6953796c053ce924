//! Checks of both superblocks (`docs/format.md`, "Superblock", "Extended superblock").

use std::ops::Range;

use storage::{Compressor, Digester};

use crate::error::{Error, corrupt};
use crate::format::blob::{BlobRow, DEVICE_TABLE_OFFSET, DeviceSlot};
use crate::format::chunk::RawChunkRecord;
use crate::format::superblock::{
    COMPAT_RAFS_V6, DEVICE_TABLE_SLOT, EXTENDED_OFFSET, ExtendedSuperblock, INCOMPAT, MAGIC,
    MAGIC_V5, SUPERBLOCK_OFFSET, Superblock, flags,
};
use crate::units::{BLOCK, MAX_BLOBS, Nid, len64};

use super::{range, raw};

/// What the superblocks say, checked.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) root: Nid,
    pub(super) inode_count: u64,
    /// Byte offset from which inode numbers count.
    pub(super) meta_start: u64,
    /// First byte behind the device table; nothing else lies before it.
    pub(super) tables_start: u64,
    pub(super) flags: u64,
    pub(super) compressor: Compressor,
    pub(super) digester: Digester,
    pub(super) chunk_size: u32,
    pub(super) blocks: u32,
    pub(super) blob_table: Range<usize>,
    pub(super) chunk_table: Range<usize>,
    pub(super) prefetch_table: Range<usize>,
}

/// Offset of a superblock field in the file.
macro_rules! at {
    ($base:expr, $type:ty, $field:ident) => {
        $base + len64(std::mem::offset_of!($type, $field))
    };
}

pub(super) fn check(data: &[u8]) -> Result<Layout, Error> {
    check_kind(data)?;
    let sb: &Superblock = raw(data, SUPERBLOCK_OFFSET, "superblock")?;
    check_superblock(sb, data)?;
    let ext: &ExtendedSuperblock = raw(data, EXTENDED_OFFSET, "extended superblock")?;
    let (compressor, digester) = check_flags(ext.flags.get())?;
    let chunk_size = ext.chunk_size.get();
    if !is_chunk_size(chunk_size) {
        return Err(corrupt(
            "chunk size",
            at!(EXTENDED_OFFSET, ExtendedSuperblock, chunk_size),
            chunk_size,
            "a power of two from 4 KiB to 16 MiB",
        ));
    }
    let tables = check_tables(ext, sb, data)?;
    Ok(Layout {
        root: Nid::new(u64::from(sb.root_nid.get())),
        inode_count: sb.inode_count.get(),
        meta_start: u64::from(sb.meta_block.get()) * BLOCK,
        flags: ext.flags.get(),
        compressor,
        digester,
        chunk_size,
        blocks: sb.blocks.get(),
        tables_start: tables.start,
        blob_table: tables.blobs,
        chunk_table: tables.chunks,
        prefetch_table: tables.prefetch,
    })
}

/// Whether a chunk size is in the range of the format.
pub(crate) fn is_chunk_size(size: u32) -> bool {
    size.is_power_of_two() && (0x1000..=0x100_0000).contains(&size)
}

/// Tells a RAFS v6 bootstrap from other files.
fn check_kind(data: &[u8]) -> Result<(), Error> {
    let len = len64(data.len());
    if raw::<zerocopy::little_endian::U32>(data, 0, "first bytes")?.get() == MAGIC_V5 {
        return Err(Error::Unsupported {
            feature: "RAFS version 5",
        });
    }
    let sb: &Superblock = raw(data, SUPERBLOCK_OFFSET, "superblock")?;
    if sb.magic.get() != MAGIC {
        return Err(corrupt(
            "magic",
            SUPERBLOCK_OFFSET,
            sb.magic.get(),
            "0xe0f5e1e2: this is no RAFS v6 bootstrap",
        ));
    }
    if sb.feature_compat.get() & COMPAT_RAFS_V6 == 0 {
        return Err(corrupt(
            "compatible features",
            at!(SUPERBLOCK_OFFSET, Superblock, feature_compat),
            sb.feature_compat.get(),
            "the RAFS v6 bit 0x40000000: this is EROFS, but no RAFS v6 bootstrap",
        ));
    }
    if sb.block_bits == 9 {
        return Err(Error::Unsupported { feature: "tarfs" });
    }
    if len < BLOCK || !len.is_multiple_of(BLOCK) {
        return Err(corrupt(
            "file length",
            0,
            len,
            "a positive multiple of 4096",
        ));
    }
    Ok(())
}

fn check_superblock(sb: &Superblock, data: &[u8]) -> Result<(), Error> {
    let meta = u64::from(sb.meta_block.get()) * BLOCK;
    // Field, its offset, its value, whether it is legal, the rule.
    let rules: [(&'static str, u64, u64, bool, &'static str); 11] = [
        (
            "superblock checksum",
            at!(SUPERBLOCK_OFFSET, Superblock, checksum),
            sb.checksum.get().into(),
            sb.checksum.get() == 0,
            "0",
        ),
        (
            "block size bits",
            at!(SUPERBLOCK_OFFSET, Superblock, block_bits),
            sb.block_bits.into(),
            sb.block_bits == 12,
            "12",
        ),
        (
            "superblock extension slots",
            at!(SUPERBLOCK_OFFSET, Superblock, extension_slots),
            sb.extension_slots.into(),
            sb.extension_slots == 0,
            "0",
        ),
        (
            "inode count",
            at!(SUPERBLOCK_OFFSET, Superblock, inode_count),
            sb.inode_count.get(),
            sb.inode_count.get() != 0,
            "at least 1",
        ),
        (
            "metadata block",
            at!(SUPERBLOCK_OFFSET, Superblock, meta_block),
            sb.meta_block.get().into(),
            meta <= len64(data.len()),
            "a block inside the file",
        ),
        (
            "shared xattr block",
            at!(SUPERBLOCK_OFFSET, Superblock, xattr_block),
            sb.xattr_block.get().into(),
            sb.xattr_block.get() == 0,
            "0",
        ),
        (
            "incompatible features",
            at!(SUPERBLOCK_OFFSET, Superblock, feature_incompat),
            sb.feature_incompat.get().into(),
            sb.feature_incompat.get() == INCOMPAT,
            "0xc",
        ),
        (
            "compression information",
            at!(SUPERBLOCK_OFFSET, Superblock, compression),
            sb.compression.get().into(),
            sb.compression.get() == 0,
            "0",
        ),
        (
            "number of devices",
            at!(SUPERBLOCK_OFFSET, Superblock, extra_devices),
            sb.extra_devices.get().into(),
            usize::from(sb.extra_devices.get()) <= MAX_BLOBS,
            "at most 254",
        ),
        (
            "device table slot",
            at!(SUPERBLOCK_OFFSET, Superblock, device_table_slot),
            sb.device_table_slot.get().into(),
            sb.device_table_slot.get() == DEVICE_TABLE_SLOT,
            "11",
        ),
        (
            // Some old writers store 4096 in an image without blobs.
            "number of blocks",
            at!(SUPERBLOCK_OFFSET, Superblock, blocks),
            sb.blocks.get().into(),
            sb.extra_devices.get() != 0 || matches!(sb.blocks.get(), 0 | 4096),
            "0 in an image without blobs",
        ),
    ];
    match rules.into_iter().find(|rule| !rule.3) {
        None => Ok(()),
        Some((field, offset, found, _, expected)) => Err(corrupt(field, offset, found, expected)),
    }
}

fn check_flags(bits: u64) -> Result<(Compressor, Digester), Error> {
    let bad = |expected| corrupt("flags", EXTENDED_OFFSET, bits, expected);
    if bits & flags::TARFS != 0 {
        return Err(Error::Unsupported { feature: "tarfs" });
    }
    if bits & flags::ENCRYPTION_AES_128_XTS != 0 {
        return Err(Error::Unsupported {
            feature: "encryption",
        });
    }
    if bits & !flags::KNOWN != 0 {
        return Err(bad("no unknown bits"));
    }
    let compressors = flags::COMPRESSOR_NONE
        | flags::COMPRESSOR_LZ4
        | flags::COMPRESSOR_GZIP
        | flags::COMPRESSOR_ZSTD;
    let compressor = match bits & compressors {
        flags::COMPRESSOR_NONE => Compressor::None,
        flags::COMPRESSOR_LZ4 => Compressor::Lz4,
        flags::COMPRESSOR_GZIP => Compressor::Gzip,
        flags::COMPRESSOR_ZSTD => Compressor::Zstd,
        _ => return Err(bad("exactly one compressor bit")),
    };
    let digester = match bits & (flags::DIGEST_BLAKE3 | flags::DIGEST_SHA256) {
        flags::DIGEST_BLAKE3 => Digester::Blake3,
        flags::DIGEST_SHA256 => Digester::Sha256,
        _ => return Err(bad("exactly one digest bit")),
    };
    Ok((compressor, digester))
}

/// Where the tables lie, in bytes of the file.
struct Tables {
    start: u64,
    blobs: Range<usize>,
    chunks: Range<usize>,
    prefetch: Range<usize>,
}

fn check_tables(ext: &ExtendedSuperblock, sb: &Superblock, data: &[u8]) -> Result<Tables, Error> {
    let devices = u64::from(sb.extra_devices.get());
    let start = DEVICE_TABLE_OFFSET + devices * len64(size_of::<DeviceSlot>());
    let table = |field, offset_at, offset: u64, size: u64, record: u64, align: u64| {
        if !size.is_multiple_of(record) {
            return Err(corrupt(field, offset_at, size, "whole records"));
        }
        if size == 0 {
            return Ok(0..0);
        }
        if !offset.is_multiple_of(align) || offset < BLOCK || offset < start {
            return Err(corrupt(
                field,
                offset_at,
                offset,
                "an aligned offset behind the device table",
            ));
        }
        range(offset, size)
            .filter(|r| r.end <= data.len())
            .ok_or_else(|| corrupt(field, offset_at, offset, "a table inside the file"))
    };
    let blobs = table(
        "blob table",
        at!(EXTENDED_OFFSET, ExtendedSuperblock, blob_table_offset),
        ext.blob_table_offset.get(),
        ext.blob_table_size.get().into(),
        len64(size_of::<BlobRow>()),
        BLOCK,
    )?;
    if len64(blobs.len()) != devices * len64(size_of::<BlobRow>()) {
        return Err(corrupt(
            "blob table size",
            at!(EXTENDED_OFFSET, ExtendedSuperblock, blob_table_size),
            ext.blob_table_size.get(),
            "256 for every device",
        ));
    }
    let chunks = table(
        "chunk table",
        at!(EXTENDED_OFFSET, ExtendedSuperblock, chunk_table_offset),
        ext.chunk_table_offset.get(),
        ext.chunk_table_size.get(),
        len64(size_of::<RawChunkRecord>()),
        BLOCK,
    )?;
    // Old writers leave a size without an offset when there is no table.
    let prefetch_size = match ext.prefetch_table_offset.get() {
        0 => 0,
        _ => ext.prefetch_table_size.get(),
    };
    let prefetch = table(
        "prefetch table",
        at!(EXTENDED_OFFSET, ExtendedSuperblock, prefetch_table_offset),
        ext.prefetch_table_offset.get(),
        prefetch_size.into(),
        4,
        8,
    )?;
    check_overlap([&blobs, &chunks, &prefetch])?;
    Ok(Tables {
        start,
        blobs,
        chunks,
        prefetch,
    })
}

fn check_overlap(tables: [&Range<usize>; 3]) -> Result<(), Error> {
    let [a, b, c] = tables;
    for (x, y) in [(a, b), (a, c), (b, c)] {
        if !x.is_empty() && !y.is_empty() && x.start < y.end && y.start < x.end {
            return Err(corrupt(
                "tables",
                len64(x.start),
                len64(y.start),
                "no overlap of blob, chunk and prefetch table",
            ));
        }
    }
    Ok(())
}
