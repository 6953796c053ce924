//! Fills the bytes of a bootstrap from a plan.

use storage::{BlobFeatures, BlobInfo, Compressor, Digester};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::error::WriteError;
use crate::format::blob::{BlobRow, DEVICE_TABLE_OFFSET, DeviceSlot};
use crate::format::chunk::RawChunkRecord;
use crate::format::inode::{EXTENDED, ExtendedInode, LAYOUT_CHUNKED, LAYOUT_INLINE, LAYOUT_PLAIN};
use crate::format::superblock::{
    COMPAT_RAFS_V6, DEVICE_TABLE_SLOT, EXTENDED_OFFSET, ExtendedSuperblock, INCOMPAT, MAGIC,
    SUPERBLOCK_OFFSET, Superblock, flags,
};
use crate::tree::{Content, Tree};
use crate::units::{BLOCK, len64};

use super::chunks::{self, Chunks};
use super::directory::{self, Listed};
use super::plan::{Data, Plan, Slot, index};
use super::{BlobOrder, WriteOptions, xattr};

/// Devices start at multiples of this many bytes when all are concatenated.
const DEVICE_ALIGNMENT: u64 = 512 * 1024;

pub(super) fn emit(
    tree: &Tree,
    options: &WriteOptions,
    plan: &Plan,
    chunks: &Chunks,
) -> Result<Vec<u8>, WriteError> {
    let chunk_table = plan.end;
    let chunk_bytes = len64(size_of::<RawChunkRecord>()) * len64(chunks.table.len());
    let len = (chunk_table + chunk_bytes).next_multiple_of(BLOCK);
    let mut emitter = Emitter {
        tree,
        options,
        plan,
        chunks,
        out: vec![0; usize::try_from(len).ok().ok_or_else(too_large)?],
        directory: directory::Builder::default(),
        head: Vec::new(),
    };
    emitter.inodes()?;
    emitter.chunk_table(chunk_table)?;
    let blocks = emitter.devices(len)?;
    emitter.blob_table()?;
    emitter.superblock(blocks)?;
    emitter.extended_superblock(chunk_table, chunk_bytes)?;
    Ok(emitter.out)
}

struct Emitter<'a> {
    tree: &'a Tree,
    options: &'a WriteOptions,
    plan: &'a Plan,
    chunks: &'a Chunks,
    out: Vec<u8>,
    /// Reused from one directory to the next.
    directory: directory::Builder,
    /// Reused from one inode to the next: the inode and what follows it.
    head: Vec<u8>,
}

fn too_large() -> WriteError {
    WriteError::TooMany {
        what: "bytes of metadata",
        limit: u64::from(u32::MAX) * BLOCK,
    }
}

/// Copies `bytes` to `offset`, which the plan made sure is inside.
fn put(out: &mut [u8], offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
    let start = usize::try_from(offset).ok().ok_or_else(too_large)?;
    let target = start
        .checked_add(bytes.len())
        .and_then(|end| out.get_mut(start..end))
        .ok_or_else(too_large)?;
    target.copy_from_slice(bytes);
    Ok(())
}

/// A block number from a byte offset.
fn block(offset: u64) -> Result<u32, WriteError> {
    u32::try_from(offset / BLOCK).ok().ok_or_else(too_large)
}

impl Emitter<'_> {
    fn put<T: IntoBytes + Immutable>(&mut self, offset: u64, raw: &T) -> Result<(), WriteError> {
        put(&mut self.out, offset, raw.as_bytes())
    }

    fn inodes(&mut self) -> Result<(), WriteError> {
        let plan = self.plan;
        for (number, slot) in (0_u32..).zip(&plan.slots) {
            self.head.clear();
            let inode = self.tree.inode(slot.inode);
            let (layout, union) = self.union(slot)?;
            let raw = self.raw_inode(slot, layout, union)?;
            self.head.extend_from_slice(raw.as_bytes());
            xattr::append_area(&mut self.head, &inode.xattrs);
            match &inode.content {
                Content::File { chunks, .. } if !chunks.is_empty() => {
                    self.head.resize(self.head.len().next_multiple_of(8), 0);
                    for &chunk in chunks {
                        let entry = self.chunks.index_entry(chunk);
                        self.head.extend_from_slice(entry.as_bytes());
                    }
                }
                Content::Symlink(target) => self.flat(slot, target)?,
                Content::Directory(_) => self.list(number, slot)?,
                _ => {}
            }
            put(&mut self.out, slot.offset, &self.head)?;
        }
        Ok(())
    }

    /// Data layout and union word of an inode.
    fn union(&self, slot: &Slot) -> Result<(u16, u32), WriteError> {
        Ok(match &self.tree.inode(slot.inode).content {
            Content::File { size, chunks } => {
                let format = self.chunks.format(*size, chunks, self.options.chunk_size);
                (LAYOUT_CHUNKED, format)
            }
            Content::Directory(_) | Content::Symlink(_) => match slot.data {
                Data::Plain(start) => (LAYOUT_PLAIN, block(start)?),
                Data::Inline(start) => (LAYOUT_INLINE, block(start)?),
            },
            Content::CharDevice(number) | Content::BlockDevice(number) => (LAYOUT_PLAIN, *number),
            Content::Fifo | Content::Socket => (LAYOUT_PLAIN, 0),
        })
    }

    fn raw_inode(&self, slot: &Slot, layout: u16, union: u32) -> Result<ExtendedInode, WriteError> {
        let inode = self.tree.inode(slot.inode);
        let xattr_size = xattr::area_size(&inode.xattrs).unwrap_or(0);
        let (uid, gid) = match self.options.explicit_uid_gid {
            true => (inode.attr.uid, inode.attr.gid),
            false => (0, 0),
        };
        let size = match &inode.content {
            Content::File { size, .. } => *size,
            _ => slot.data_size,
        };
        Ok(ExtendedInode {
            format: (EXTENDED | layout << 1).into(),
            xattr_count: xattr::count_word(xattr_size).ok_or_else(too_large)?.into(),
            mode: (inode.content.kind().mode_bits() | inode.attr.permissions).into(),
            reserved: 0.into(),
            size: size.into(),
            union: union.into(),
            ino: slot.ino.into(),
            uid: uid.into(),
            gid: gid.into(),
            mtime: inode.attr.mtime.into(),
            mtime_nsec: inode.attr.mtime_nsec.into(),
            nlink: slot.nlink.into(),
            reserved2: [0; 16],
        })
    }

    /// Places the data of a symlink: blocks into the buffer, the tail behind the inode.
    fn flat(&mut self, slot: &Slot, data: &[u8]) -> Result<(), WriteError> {
        place_flat(&mut self.out, &mut self.head, slot.data, data)
    }

    /// Places the data of a directory.
    fn list(&mut self, number: u32, slot: &Slot) -> Result<(), WriteError> {
        let plan = self.plan;
        let Some(entries) = self.tree.inode(slot.inode).entries() else {
            return Ok(());
        };
        let mut children = plan.entries[slot.first_entry..].iter();
        self.directory.clear();
        for listed in directory::listing(entries) {
            let target = match listed {
                Listed::Dot => number,
                Listed::DotDot => slot.parent,
                // The plan listed the entries in the same order.
                Listed::Entry(..) => children.next().copied().unwrap_or(number),
            };
            let inode = plan.slots[index(target)].inode;
            let kind = self.tree.inode(inode).content.kind();
            self.directory.push(listed.name(), plan.nid(target), kind);
        }
        place_flat(
            &mut self.out,
            &mut self.head,
            slot.data,
            self.directory.finish(),
        )
    }

    fn chunk_table(&mut self, offset: u64) -> Result<(), WriteError> {
        let mut at = offset;
        for &id in &self.chunks.table {
            let record = self.tree.chunk(id);
            let blob = self.plan.blobs.renumber(record.blob);
            let raw = chunks::record(record, blob.unwrap_or_default());
            self.put(at, &raw)?;
            at += len64(size_of::<RawChunkRecord>());
        }
        Ok(())
    }

    /// Writes the device table; returns the sum of the blocks of all devices.
    fn devices(&mut self, len: u64) -> Result<u32, WriteError> {
        let plan = self.plan;
        let (mut position, mut sum, mut at) = (len, 0_u64, DEVICE_TABLE_OFFSET);
        for info in &plan.blobs.infos {
            position = position.next_multiple_of(DEVICE_ALIGNMENT);
            let raw = DeviceSlot {
                id: id_bytes(info),
                blocks: block(info.uncompressed_size)?.into(),
                mapped_block: block(position)?.into(),
                reserved: [0; 56],
            };
            self.put(at, &raw)?;
            position += info.uncompressed_size;
            sum += info.uncompressed_size;
            at += len64(size_of::<DeviceSlot>());
        }
        block(sum)
    }

    /// Writes the blob table and, right behind it, the prefetch table.
    fn blob_table(&mut self) -> Result<(), WriteError> {
        let plan = self.plan;
        let mut at = plan.blob_table;
        for (position, info) in (0_u32..).zip(&plan.blobs.infos) {
            self.put(at, &blob_row(position, info))?;
            at += len64(size_of::<BlobRow>());
        }
        for &slot in &plan.prefetch {
            let nid = u32::try_from(plan.nid(slot)).ok().ok_or_else(too_large)?;
            self.put(at, &zerocopy::little_endian::U32::new(nid))?;
            at += 4;
        }
        Ok(())
    }

    fn superblock(&mut self, blocks: u32) -> Result<(), WriteError> {
        let plan = self.plan;
        let mut raw = Superblock::new_zeroed();
        raw.magic = MAGIC.into();
        raw.feature_compat = COMPAT_RAFS_V6.into();
        raw.block_bits = 12;
        // The root has the first slot, right behind one block.
        raw.root_nid = u16::try_from(plan.nid(0))
            .ok()
            .ok_or_else(too_large)?
            .into();
        raw.inode_count = plan.names.into();
        raw.blocks = blocks.into();
        raw.meta_block = block(plan.meta_start)?.into();
        raw.feature_incompat = INCOMPAT.into();
        raw.extra_devices = u16::try_from(plan.blobs.infos.len())
            .ok()
            .ok_or_else(too_large)?
            .into();
        raw.device_table_slot = DEVICE_TABLE_SLOT.into();
        self.put(SUPERBLOCK_OFFSET, &raw)
    }

    fn extended_superblock(&mut self, table: u64, table_size: u64) -> Result<(), WriteError> {
        let plan = self.plan;
        let blob_table_size = len64(size_of::<BlobRow>()) * plan.blobs.count();
        let mut raw = ExtendedSuperblock::new_zeroed();
        raw.flags = self.flags().into();
        raw.blob_table_offset = plan.blob_table.into();
        raw.blob_table_size = u32::try_from(blob_table_size)
            .ok()
            .ok_or_else(too_large)?
            .into();
        raw.chunk_size = self.options.chunk_size.into();
        raw.chunk_table_offset = table.into();
        raw.chunk_table_size = table_size.into();
        if !plan.prefetch.is_empty() {
            let size = 4 * len64(plan.prefetch.len());
            raw.prefetch_table_offset = (plan.blob_table + blob_table_size).into();
            raw.prefetch_table_size = u32::try_from(size).ok().ok_or_else(too_large)?.into();
        }
        self.put(EXTENDED_OFFSET, &raw)
    }

    fn flags(&self) -> u64 {
        let plan = self.plan;
        let mut bits = flags::ENCRYPTION_NONE
            | match self.options.compressor {
                Compressor::None => flags::COMPRESSOR_NONE,
                Compressor::Lz4 => flags::COMPRESSOR_LZ4,
                Compressor::Gzip => flags::COMPRESSOR_GZIP,
                Compressor::Zstd => flags::COMPRESSOR_ZSTD,
            }
            | match self.options.digester {
                Digester::Blake3 => flags::DIGEST_BLAKE3,
                Digester::Sha256 => flags::DIGEST_SHA256,
            };
        let digests_in_blob =
            |b: &BlobInfo| b.features.contains(BlobFeatures::INLINED_CHUNK_DIGEST);
        for (bit, set) in [
            (flags::EXPLICIT_UID_GID, self.options.explicit_uid_gid),
            // A merged image always says so, like those of other writers.
            (
                flags::HAS_XATTR,
                plan.has_xattrs || self.options.blob_order == BlobOrder::FirstUse,
            ),
            (
                flags::INLINED_CHUNK_DIGEST,
                plan.blobs.infos.iter().all(digests_in_blob),
            ),
        ] {
            if set {
                bits |= bit;
            }
        }
        bits
    }
}

fn place_flat(
    out: &mut [u8],
    head: &mut Vec<u8>,
    place: Data,
    data: &[u8],
) -> Result<(), WriteError> {
    match place {
        Data::Plain(start) => put(out, start, data),
        Data::Inline(start) => {
            let whole = data.len() - data.len() % 4096;
            let (blocks, tail) = data.split_at(whole);
            if !blocks.is_empty() {
                put(out, start, blocks)?;
            }
            head.extend_from_slice(tail);
            Ok(())
        }
    }
}

fn id_bytes(info: &BlobInfo) -> [u8; 64] {
    let mut bytes = [0; 64];
    // A blob id has at most 64 bytes.
    for (to, from) in bytes.iter_mut().zip(info.id.as_str().bytes()) {
        *to = from;
    }
    bytes
}

fn blob_row(position: u32, info: &BlobInfo) -> BlobRow {
    BlobRow {
        id: id_bytes(info),
        index: position.into(),
        chunk_size: info.chunk_size.into(),
        chunk_count: info.chunk_count.into(),
        compressor: info.compressor.to_disk().into(),
        digester: info.digester.to_disk().into(),
        features: info.features.bits().into(),
        compressed_size: info.compressed_size.into(),
        uncompressed_size: info.uncompressed_size.into(),
        toc_size: info.toc_size.into(),
        meta_compressor: info.meta.compressor.to_disk().into(),
        meta_offset: info.meta.offset.into(),
        meta_compressed_size: info.meta.compressed_size.into(),
        meta_uncompressed_size: info.meta.uncompressed_size.into(),
        toc_digest: *info.toc_digest.as_bytes(),
        meta_blob_digest: *info.meta_blob_digest.as_bytes(),
        meta_blob_size: info.meta_blob_size.into(),
        cipher_iv: 0.into(),
        cipher: 0.into(),
        reserved: [0; 36],
    }
}
