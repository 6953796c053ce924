//! A bootstrap's bytes, checked once, then trusted.
//!
//! [`Image::open`] maps a file and checks everything whose cost depends on the
//! number of blobs: both superblocks, the device table, the blob table and where
//! the other tables lie. Inodes are checked when they are used, so that opening
//! an image of a million files takes microseconds; [`verify`](crate::verify)
//! walks them all.
//!
//! Nothing is copied out of the map per file, and no allocation is sized by a
//! field of the image without a bound.
//!
//! Next: [`fs`](crate::fs) for files and directories. Rules: `docs/format.md`.

mod blobs;
mod chunks;
mod superblock;

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use storage::mapped::Mapped;
use storage::{BlobId, BlobIndex, BlobInfo, Compressor, Digest, Digester};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::error::{Error, corrupt};
use crate::units::{INODE_SLOT, Nid, len64};
pub(crate) use blobs::{MAX_CHUNKS, MAX_COMPRESSED};
pub use chunks::BlobDigests;
pub(crate) use superblock::is_chunk_size;

/// A checked bootstrap. Cheap to share behind an [`Arc`].
#[derive(Debug)]
pub struct Image {
    data: Mapped,
    layout: superblock::Layout,
    blobs: Vec<BlobInfo>,
    /// Positions in the chunk table in order of (blob, chunk index); built on first use.
    chunk_order: OnceLock<chunks::ChunkOrder>,
}

impl Image {
    /// Maps and checks the bootstrap at `path`.
    ///
    /// Takes time in proportion to the number of blobs, not of files.
    ///
    /// # Errors
    /// * [`Error::Io`]: the file cannot be opened or mapped;
    /// * [`Error::Corrupt`]: it is no RAFS v6 bootstrap, or a damaged one;
    /// * [`Error::Unsupported`]: RAFS v5, tarfs, encryption, external blobs.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let data = Mapped::open(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::from_mapped(data)
    }

    /// Checks a bootstrap that is in memory. Errors as for [`Image::open`].
    ///
    /// # Errors
    /// See [`Image::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        Self::from_mapped(Mapped::from_vec(bytes))
    }

    /// Checks a bootstrap that is mapped already. Errors as for [`Image::open`].
    ///
    /// # Errors
    /// See [`Image::open`].
    pub fn from_mapped(data: Mapped) -> Result<Self, Error> {
        let layout = superblock::check(&data)?;
        let blobs = blobs::check(&data, &layout)?;
        let image = Self {
            data,
            layout,
            blobs,
            chunk_order: OnceLock::new(),
        };
        let root = image.root();
        image.directory(root)?;
        Ok(image)
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> Nid {
        self.layout.root
    }

    /// Number of names in the image, the root included, as the superblock claims.
    #[must_use]
    pub fn inode_count(&self) -> u64 {
        self.layout.inode_count
    }

    /// Largest chunk of all files, in bytes: a power of two from 4 KiB to 16 MiB.
    #[must_use]
    pub fn chunk_size(&self) -> u32 {
        self.layout.chunk_size
    }

    /// Flags of the image (see [`flags`](crate::format::superblock::flags)).
    #[must_use]
    pub fn flags(&self) -> u64 {
        self.layout.flags
    }

    /// Whether inodes carry their real owner; otherwise all owners read as 0.
    #[must_use]
    pub fn has_explicit_owners(&self) -> bool {
        self.layout.flags & crate::format::superblock::flags::EXPLICIT_UID_GID != 0
    }

    /// How the newest layer's chunks are compressed; other blobs may differ.
    #[must_use]
    pub fn compressor(&self) -> Compressor {
        self.layout.compressor
    }

    /// How the newest layer's chunks are identified; other blobs may differ.
    #[must_use]
    pub fn digester(&self) -> Digester {
        self.layout.digester
    }

    /// The blobs, in table order.
    #[must_use]
    pub fn blobs(&self) -> &[BlobInfo] {
        &self.blobs
    }

    /// The bytes of the bootstrap, for the kernel or a copy.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// Inodes that the builder asked to prefetch: files, or directories with
    /// everything below them. At most as many as the table has room for.
    pub fn prefetch(&self) -> impl Iterator<Item = Nid> + '_ {
        let table = self.data.get(self.layout.prefetch_table.clone());
        let nids = table.and_then(|t| <[zerocopy::little_endian::U32]>::ref_from_bytes(t).ok());
        nids.unwrap_or(&[])
            .iter()
            .map(|nid| Nid::new(u64::from(nid.get())))
            .take_while(|nid| nid.get() != 0)
    }

    /// Replaces the id of a blob: for a bootstrap that was embedded in its own
    /// blob, and therefore holds a placeholder. No effect for an unknown blob.
    pub fn set_blob_id(&mut self, blob: BlobIndex, id: BlobId) {
        if let Some(info) = self.blobs.get_mut(blob.as_usize()) {
            info.id = id;
        }
    }

    /// Sets the digest of the file that holds the chunk table of a blob whose
    /// data is an OCI layer. No effect for an unknown blob.
    pub fn set_meta_blob_digest(&mut self, blob: BlobIndex, digest: Digest) {
        if let Some(info) = self.blobs.get_mut(blob.as_usize()) {
            info.meta_blob_digest = digest;
        }
    }

    /// Digests of the chunks of one blob, for verification of its data.
    ///
    /// Costs nothing here; the first lookup sorts the chunk table's positions
    /// (four bytes a record, once for all blobs).
    #[must_use]
    pub fn digests(self: &Arc<Self>, blob: BlobIndex) -> BlobDigests {
        BlobDigests::new(Arc::clone(self), blob)
    }

    /// `len` bytes at `offset`, or an error that names `field`.
    pub(crate) fn slice(&self, offset: u64, len: u64, field: &'static str) -> Result<&[u8], Error> {
        slice(&self.data, offset, len, field)
    }

    /// The raw structure at `offset`, or an error that names `field`.
    pub(crate) fn raw<T>(&self, offset: u64, field: &'static str) -> Result<&T, Error>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        raw(&self.data, offset, field)
    }

    /// Byte offset of an inode. It lies behind the device table and inside the file.
    pub(crate) fn inode_offset(&self, nid: Nid) -> Result<u64, Error> {
        nid.get()
            .checked_mul(INODE_SLOT)
            .and_then(|o| o.checked_add(self.layout.meta_start))
            .filter(|o| *o >= self.layout.tables_start && *o < len64(self.data.len()))
            .ok_or_else(|| {
                corrupt(
                    "inode number",
                    self.layout.meta_start,
                    nid.get(),
                    "a position inside the file",
                )
            })
    }

    /// Where the chunk table lies.
    pub(crate) fn chunk_table(&self) -> Range<usize> {
        self.layout.chunk_table.clone()
    }
}

/// `len` bytes of `data` at `offset`, or an error that names `field`.
fn slice<'a>(
    data: &'a [u8],
    offset: u64,
    len: u64,
    field: &'static str,
) -> Result<&'a [u8], Error> {
    range(offset, len)
        .and_then(|range| data.get(range))
        .ok_or_else(|| corrupt(field, offset, len, "a range inside the file"))
}

/// The raw structure of `data` at `offset`, or an error that names `field`.
fn raw<'a, T>(data: &'a [u8], offset: u64, field: &'static str) -> Result<&'a T, Error>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    usize::try_from(offset)
        .ok()
        .and_then(|start| data.get(start..))
        .and_then(|bytes| T::ref_from_prefix(bytes).ok())
        .map(|(value, _)| value)
        .ok_or_else(|| {
            corrupt(
                field,
                offset,
                len64(size_of::<T>()),
                "as many bytes inside the file",
            )
        })
}

/// A byte range as positions in memory; `None` if it overflows.
fn range(offset: u64, len: u64) -> Option<Range<usize>> {
    let end = offset.checked_add(len)?;
    Some(usize::try_from(offset).ok()?..usize::try_from(end).ok()?)
}
