//! The 4096 bytes that follow a chunk table (`docs/format-blob.md`, "Table header").
//!
//! It repeats what the blob table of the bootstrap says, so that a table that
//! belongs to another blob, or to another version of it, is noticed.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, expect_equal};
use crate::blob_info::{BlobFeatures, BlobInfo, MetaLocation};

/// Length of the header in bytes, on disk and in the cache file.
pub const HEADER_SIZE: usize = 4096;

const MAGIC: u32 = 0xb10b_b10b;
const OBJECT: &str = "chunk table header";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: U32,
    features: U32,
    compressor: U32,
    chunk_count: U32,
    table_offset: U64,
    table_compressed_size: U64,
    table_uncompressed_size: U64,
    contexts_offset: U64,
    contexts_size: U64,
    context_count: U32,
    reserved: [u8; 4032],
    magic_end: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_SIZE);

/// Where the contexts of a batch or gzip blob are inside the uncompressed table.
/// All zero if there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextArea {
    /// Start in bytes; directly after the entries.
    pub offset: u64,
    /// Length in bytes, dictionaries included.
    pub size: u64,
    /// Number of contexts.
    pub count: u32,
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Features of the blob; informative.
    pub features: BlobFeatures,
    /// Number of chunk entries.
    pub chunk_count: u32,
    /// Where the table is in the blob and how it is compressed.
    pub table: MetaLocation,
    /// Where the contexts are in the uncompressed table.
    pub contexts: ContextArea,
}

impl Header {
    /// The header as it is stored.
    #[must_use]
    pub fn encode(&self) -> Box<[u8; HEADER_SIZE]> {
        let mut raw = Raw::new_zeroed();
        raw.magic = MAGIC.into();
        raw.features = self.features.bits().into();
        raw.compressor = self.table.compressor.to_disk().into();
        raw.chunk_count = self.chunk_count.into();
        raw.table_offset = self.table.offset.into();
        raw.table_compressed_size = self.table.compressed_size.into();
        raw.table_uncompressed_size = self.table.uncompressed_size.into();
        raw.contexts_offset = self.contexts.offset.into();
        raw.contexts_size = self.contexts.size.into();
        raw.context_count = self.contexts.count.into();
        raw.magic_end = MAGIC.into();
        Box::new(zerocopy::transmute!(raw))
    }

    /// Reads a header and compares it with what the bootstrap says about the blob.
    ///
    /// The context area is not checked here: whoever uses it knows the table.
    ///
    /// # Errors
    /// [`FormatError::Size`] unless there are exactly 4096 bytes,
    /// [`FormatError::Mismatch`] naming the field that differs from `info`.
    pub fn decode(bytes: &[u8], info: &BlobInfo) -> Result<Self, FormatError> {
        let raw = Raw::ref_from_bytes(bytes)
            .ok()
            .ok_or_else(|| FormatError::Size {
                object: OBJECT,
                expected: crate::codec::as_u64(HEADER_SIZE),
                got: crate::codec::as_u64(bytes.len()),
            })?;
        let meta = &info.meta;
        for (field, found, expected) in [
            ("magic", raw.magic, MAGIC),
            ("second magic", raw.magic_end, MAGIC),
            (
                "table compressor",
                raw.compressor,
                meta.compressor.to_disk(),
            ),
            ("chunk count", raw.chunk_count, info.chunk_count),
        ] {
            expect_equal(OBJECT, field, found.get().into(), expected.into())?;
        }
        for (field, found, expected) in [
            ("table offset", raw.table_offset, meta.offset),
            (
                "table compressed size",
                raw.table_compressed_size,
                meta.compressed_size,
            ),
            (
                "table uncompressed size",
                raw.table_uncompressed_size,
                meta.uncompressed_size,
            ),
        ] {
            expect_equal(OBJECT, field, found.get(), expected)?;
        }
        Ok(Self {
            features: BlobFeatures::from_bits(raw.features.get()),
            chunk_count: raw.chunk_count.get(),
            table: *meta,
            contexts: ContextArea {
                offset: raw.contexts_offset.get(),
                size: raw.contexts_size.get(),
                count: raw.context_count.get(),
            },
        })
    }
}
