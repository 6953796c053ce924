//! Checks of the device table and the blob table
//! (`docs/format.md`, "Device table", "Blob table").

use std::collections::HashSet;

use storage::blob_info::MetaLocation;
use storage::{BlobFeatures, BlobId, BlobInfo, Compressor, Digest, Digester};
use zerocopy::FromBytes;

use crate::error::{Error, Found, corrupt};
use crate::format::blob::{BlobRow, DEVICE_TABLE_OFFSET, DeviceSlot};
use crate::units::{BLOCK, len64};

use super::raw;
use super::superblock::Layout;

/// Most chunks of a blob that a reader accepts.
pub(crate) const MAX_CHUNKS: u32 = 1 << 24;
/// Largest blob file, in bytes: compressed offsets have 40 bits.
pub(crate) const MAX_COMPRESSED: u64 = 1 << 40;
/// Largest uncompressed address space, in bytes.
pub(crate) const MAX_UNCOMPRESSED: u64 = 1 << 44;

pub(super) fn check(data: &[u8], layout: &Layout) -> Result<Vec<BlobInfo>, Error> {
    let rows = data.get(layout.blob_table.clone()).unwrap_or(&[]);
    let rows = <[BlobRow]>::ref_from_bytes(rows).unwrap_or(&[]);
    let mut blobs = Vec::with_capacity(rows.len());
    let mut ids = HashSet::with_capacity(rows.len());
    let mut blocks = 0_u64;
    for (position, row) in (0_u32..).zip(rows) {
        let position64 = u64::from(position);
        let checker = Row {
            row,
            at: len64(layout.blob_table.start) + position64 * len64(size_of::<BlobRow>()),
        };
        let blob = checker.check(position, layout.chunk_size)?;
        let device_at = DEVICE_TABLE_OFFSET + position64 * len64(size_of::<DeviceSlot>());
        let device: &DeviceSlot = raw(data, device_at, "device slot")?;
        check_device(device, device_at, row, &blob)?;
        if !ids.insert(blob.id.clone()) {
            return Err(corrupt(
                "device id",
                device_at,
                Found::bytes(blob.id.as_str().as_bytes()),
                "an id that no other device has",
            ));
        }
        blocks += u64::from(device.blocks.get());
        blobs.push(blob);
    }
    // The kernel ignores the sum and so do other readers; ours only warns.
    if !blobs.is_empty() && blocks != u64::from(layout.blocks) {
        tracing::debug!(
            blocks,
            claimed = layout.blocks,
            "superblock block count is off"
        );
    }
    Ok(blobs)
}

fn check_device(device: &DeviceSlot, at: u64, row: &BlobRow, blob: &BlobInfo) -> Result<(), Error> {
    if device.id != row.id {
        return Err(corrupt(
            "device id",
            at,
            Found::bytes(&device.id),
            "the id of its blob",
        ));
    }
    let blocks = u64::from(device.blocks.get());
    if blocks == 0 || blocks * BLOCK != blob.uncompressed_size {
        return Err(corrupt(
            "device blocks",
            at + 64,
            blocks,
            "the blob's uncompressed size in blocks, not 0",
        ));
    }
    Ok(())
}

/// One row of the blob table and where it is.
struct Row<'a> {
    row: &'a BlobRow,
    at: u64,
}

/// Refuses a field of a row unless the condition holds.
macro_rules! require {
    ($self:ident, $field:ident, $name:literal, $ok:expr, $rule:literal) => {
        if !$ok {
            return Err(corrupt(
                $name,
                $self.at + len64(std::mem::offset_of!(BlobRow, $field)),
                $self.row.$field.get(),
                $rule,
            ));
        }
    };
}

impl Row<'_> {
    fn check(&self, position: u32, chunk_size: u32) -> Result<BlobInfo, Error> {
        let row = self.row;
        let id = self.id()?;
        require!(
            self,
            index,
            "blob index",
            row.index.get() == position,
            "its position"
        );
        require!(
            self,
            chunk_size,
            "blob chunk size",
            row.chunk_size.get() == chunk_size,
            "the chunk size of the image"
        );
        require!(
            self,
            chunk_count,
            "chunk count",
            row.chunk_count.get() <= MAX_CHUNKS,
            "at most 2^24"
        );
        let features = self.features()?;
        let meta = self.meta(features)?;
        let (compressor, digester) = self.algorithms()?;
        self.sizes()?;
        Ok(BlobInfo {
            id,
            chunk_size,
            chunk_count: row.chunk_count.get(),
            compressor,
            digester,
            features,
            compressed_size: row.compressed_size.get(),
            uncompressed_size: row.uncompressed_size.get(),
            meta,
            toc_size: row.toc_size.get(),
            toc_digest: Digest::from_bytes(row.toc_digest),
            meta_blob_digest: Digest::from_bytes(row.meta_blob_digest),
            meta_blob_size: row.meta_blob_size.get(),
        })
    }

    fn id(&self) -> Result<BlobId, Error> {
        let bytes = &self.row.id;
        let len = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        let (id, padding) = bytes.split_at(len);
        std::str::from_utf8(id)
            .ok()
            .filter(|_| padding.iter().all(|&b| b == 0))
            .and_then(|id| BlobId::new(id).ok())
            .ok_or_else(|| {
                corrupt(
                    "blob id",
                    self.at,
                    Found::bytes(bytes),
                    "1 to 64 of the characters A-Z a-z 0-9 . _ -, padded with NUL",
                )
            })
    }

    fn features(&self) -> Result<BlobFeatures, Error> {
        let features = BlobFeatures::from_bits(self.row.features.get());
        for (bit, feature) in [
            (BlobFeatures::TARFS, "tarfs"),
            (BlobFeatures::ENCRYPTED, "encryption"),
            (BlobFeatures::EXTERNAL, "external blobs"),
        ] {
            if features.contains(bit) {
                return Err(Error::Unsupported { feature });
            }
        }
        require!(
            self,
            features,
            "blob features",
            !features.intersects(BlobFeatures::UNKNOWN_INCOMPATIBLE),
            "no unknown incompatible bits"
        );
        require!(
            self,
            features,
            "blob features",
            features.contains(BlobFeatures::ALIGNED),
            "the ALIGNED bit"
        );
        require!(
            self,
            features,
            "blob features",
            features.contains(BlobFeatures::CHUNK_INFO_V2)
                || !features.intersects(BlobFeatures::BATCH | BlobFeatures::ZRAN),
            "CHUNK_INFO_V2 where BATCH or ZRAN is set"
        );
        if self.row.cipher.get() != 0 {
            return Err(Error::Unsupported {
                feature: "encryption",
            });
        }
        Ok(features)
    }

    fn algorithms(&self) -> Result<(Compressor, Digester), Error> {
        let row = self.row;
        let compressor = Compressor::from_disk(row.compressor.get());
        require!(
            self,
            compressor,
            "chunk compressor",
            compressor.is_some(),
            "0 none, 1 lz4, 2 gzip or 3 zstd"
        );
        let digester = Digester::from_disk(row.digester.get());
        require!(
            self,
            digester,
            "digester",
            digester.is_some(),
            "0 BLAKE3 or 1 SHA-256"
        );
        Ok((compressor.unwrap_or_default(), digester.unwrap_or_default()))
    }

    fn sizes(&self) -> Result<(), Error> {
        let row = self.row;
        require!(
            self,
            compressed_size,
            "compressed size",
            row.compressed_size.get() <= MAX_COMPRESSED,
            "at most 2^40"
        );
        require!(
            self,
            uncompressed_size,
            "uncompressed size",
            row.uncompressed_size.get() <= MAX_UNCOMPRESSED
                && row.uncompressed_size.get().is_multiple_of(BLOCK),
            "a multiple of 4096, at most 2^44"
        );
        let toc = row.toc_size.get();
        require!(
            self,
            toc_size,
            "TOC size",
            toc == 0 || ((512..=0x1_0000).contains(&toc) && toc.is_multiple_of(128)),
            "0, or a multiple of 128 from 512 to 65536"
        );
        Ok(())
    }

    /// Where the chunk table of the blob is; its size must fit the chunk count.
    fn meta(&self, features: BlobFeatures) -> Result<MetaLocation, Error> {
        let row = self.row;
        let compressor = Compressor::from_disk(row.meta_compressor.get());
        require!(
            self,
            meta_compressor,
            "chunk table compressor",
            compressor.is_some(),
            "0 none, 1 lz4, 2 gzip or 3 zstd"
        );
        let (stored, plain) = (
            row.meta_compressed_size.get(),
            row.meta_uncompressed_size.get(),
        );
        require!(
            self,
            meta_offset,
            "chunk table offset",
            row.meta_offset.get().checked_add(stored).is_some(),
            "no overflow with the compressed size"
        );
        require!(
            self,
            meta_compressed_size,
            "chunk table compressed size",
            stored <= plain && (compressor != Some(Compressor::None) || stored == plain),
            "at most the uncompressed size, and equal to it if stored raw"
        );
        let count = u64::from(row.chunk_count.get());
        let fits = if !features.contains(BlobFeatures::CHUNK_INFO_V2) {
            plain == 16 * count || features.contains(BlobFeatures::CHUNKDICT_GENERATED)
        } else if features.intersects(BlobFeatures::BATCH | BlobFeatures::ZRAN) {
            plain >= 24 * count
        } else {
            plain == 24 * count || features.contains(BlobFeatures::CHUNKDICT_GENERATED)
        };
        require!(
            self,
            meta_uncompressed_size,
            "chunk table uncompressed size",
            fits,
            "the size of an entry times the chunk count"
        );
        Ok(MetaLocation {
            compressor: compressor.unwrap_or_default(),
            offset: row.meta_offset.get(),
            compressed_size: stored,
            uncompressed_size: plain,
        })
    }
}
