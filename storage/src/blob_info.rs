//! What a bootstrap says about one blob: one row of its blob table, checked.
#![forbid(unsafe_code)]

use crate::algorithm::{Compressor, Digester};
use crate::blob_id::BlobId;
use crate::digest::Digest;

/// Feature bits of a blob (`docs/format.md`, "Blob features").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct BlobFeatures(u32);

impl BlobFeatures {
    /// Chunks are 4 KiB aligned in the uncompressed address space.
    pub const ALIGNED: Self = Self(0x1);
    /// The bootstrap is embedded in the blob.
    pub const INLINED_FS_META: Self = Self(0x2);
    /// The chunk table has 24-byte entries.
    pub const CHUNK_INFO_V2: Self = Self(0x4);
    /// The chunk table carries gzip seek contexts; the data file is an OCI layer.
    pub const ZRAN: Self = Self(0x8);
    /// Chunk data and chunk table are in different files.
    pub const SEPARATE: Self = Self(0x10);
    /// The blob carries its chunk digests.
    pub const INLINED_CHUNK_DIGEST: Self = Self(0x20);
    /// Raw tar used in place; not supported.
    pub const TARFS: Self = Self(0x40);
    /// The chunk table carries batch contexts.
    pub const BATCH: Self = Self(0x80);
    /// Chunk data is encrypted; not supported.
    pub const ENCRYPTED: Self = Self(0x100);
    /// The row belongs to a generated chunk dictionary.
    pub const CHUNKDICT_GENERATED: Self = Self(0x200);
    /// Produced by the prefetch optimiser.
    pub const SEPARATED_PREFETCH: Self = Self(0x400);
    /// The data lives in an external store; not supported.
    pub const EXTERNAL: Self = Self(0x800);
    /// Sections of the blob are followed by tar headers.
    pub const HAS_TAR_HEADER: Self = Self(0x1000_0000);
    /// The blob ends with a table of contents.
    pub const HAS_TOC: Self = Self(0x2000_0000);
    /// The chunk table's offset bounds the chunk data.
    pub const CAP_TAR_TOC: Self = Self(0x4000_0000);
    /// Bits that a reader does not know and must not ignore.
    pub const UNKNOWN_INCOMPATIBLE: Self = Self(0x8000_f000);

    /// Wraps the word of the blob table, unknown bits included.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The word of the blob table.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether all bits of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any bit of `other` is set.
    #[must_use]
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both sets of bits.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits that are not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl std::ops::BitOr for BlobFeatures {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

/// Where a blob's compression context table (chunk table) is, and how it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MetaLocation {
    /// How the table is compressed; `None` exactly when it is stored raw.
    pub compressor: Compressor,
    /// Byte offset in the file that holds it.
    pub offset: u64,
    /// Stored length in bytes, without the 4096-byte header that follows.
    pub compressed_size: u64,
    /// Length in bytes after decompression, contexts included.
    pub uncompressed_size: u64,
}

/// One blob as a bootstrap describes it. Sizes are in bytes.
///
/// Values that came from a file have passed the checks of
/// `docs/format.md`, "Blob table"; `rafs` is where that happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobInfo {
    /// Name of the blob.
    pub id: BlobId,
    /// Largest chunk: a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Number of chunks; below 2^24.
    pub chunk_count: u32,
    /// How chunks are compressed.
    pub compressor: Compressor,
    /// How chunks are identified.
    pub digester: Digester,
    /// Layout variants.
    pub features: BlobFeatures,
    /// Length of the blob file, or what stands for it (`docs/format.md`, "Sizes of a blob").
    pub compressed_size: u64,
    /// Length of the uncompressed address space: a multiple of 4096.
    pub uncompressed_size: u64,
    /// Where the chunk table is.
    pub meta: MetaLocation,
    /// Length of the table of contents with its tar header; 0 if unknown.
    pub toc_size: u32,
    /// SHA-256 of the table of contents with its tar header; zero if unknown.
    pub toc_digest: Digest,
    /// `SEPARATE` blobs: SHA-256 of the file that holds the chunk table; zero otherwise.
    pub meta_blob_digest: Digest,
    /// `SEPARATE` blobs: length of that file.
    pub meta_blob_size: u64,
}

impl BlobInfo {
    /// Bytes at the start of the data file that may hold chunk data: the bound
    /// for every chunk's compressed range.
    #[must_use]
    pub fn data_size(&self) -> u64 {
        if self.features.contains(BlobFeatures::SEPARATE)
            || !self.features.contains(BlobFeatures::CAP_TAR_TOC)
        {
            self.compressed_size
        } else if self.features.contains(BlobFeatures::HAS_TAR_HEADER) {
            self.meta.offset.saturating_sub(512)
        } else {
            self.meta.offset
        }
    }
}
