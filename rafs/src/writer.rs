//! A tree into the bytes of a bootstrap.
//!
//! Three passes over the tree, each iterative: `blobs` decides which blobs are
//! listed in which order, `plan` gives every inode its place and number, and
//! `emit` fills a zeroed buffer. Positions are final when the plan is made,
//! because the number of blobs and prefetch entries is known before.
//!
//! Promises: the same tree gives the same bytes; a tree that the format cannot
//! hold is an error, never a broken image.
//!
//! Format: `docs/format.md`.

mod blobs;
mod chunks;
mod directory;
mod emit;
mod plan;
mod space;
mod xattr;

use storage::{Compressor, Digester};

use crate::error::WriteError;
use crate::image::is_chunk_size;
use crate::tree::{InodeId, Tree};

/// Which blobs an image lists, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum BlobOrder {
    /// As in [`Tree::blobs`], unused ones included.
    #[default]
    AsGiven,
    /// In the order in which files use them; unused ones are left out, and the
    /// rest is no longer marked as containing its own bootstrap. For merged images.
    FirstUse,
}

/// What a bootstrap says beyond its tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Size at which files were cut: a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Compressor of the newest layer.
    pub compressor: Compressor,
    /// Digester of the newest layer.
    pub digester: Digester,
    /// Whether to store owners; otherwise all are 0 and readers report their own.
    pub explicit_uid_gid: bool,
    /// Files and directories to list for prefetching, in order.
    pub prefetch: Vec<InodeId>,
    /// Which blobs to list.
    pub blob_order: BlobOrder,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            chunk_size: 0x10_0000,
            compressor: Compressor::Zstd,
            digester: Digester::Blake3,
            explicit_uid_gid: true,
            prefetch: Vec::new(),
            blob_order: BlobOrder::AsGiven,
        }
    }
}

/// Writes `tree` as a bootstrap.
///
/// Inodes without a name and chunks without a file are left out. Hard links of
/// anything but regular files become separate inodes. Takes time and memory in
/// proportion to the tree; does not block.
///
/// # Errors
/// A [`WriteError`] that names the inode, chunk or blob that the format cannot hold.
pub fn write(tree: &Tree, options: &WriteOptions) -> Result<Vec<u8>, WriteError> {
    if !is_chunk_size(options.chunk_size) {
        return Err(WriteError::BadOption {
            option: "chunk size",
            reason: "must be a power of two from 4 KiB to 16 MiB",
        });
    }
    let blobs = blobs::select(tree, options)?;
    let plan = plan::make(tree, options, blobs)?;
    let chunks = chunks::select(tree, &plan)?;
    emit::emit(tree, options, &plan, &chunks)
}
