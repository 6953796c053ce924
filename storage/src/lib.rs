//! Blobs: how their bytes are stored, fetched, decoded, verified and cached.
//!
//! The flow of one read, top to bottom:
//!
//! 1. a front end asks [`blob::Blob`] to make a range of the blob's
//!    *uncompressed address space* resident;
//! 2. [`ready_map`] tells which chunks of it are in the local cache file already;
//! 3. [`fill`] fetches the missing ones, one fetch per chunk however many
//!    readers wait, through a [`backend`];
//! 4. [`codec`] decodes and [`digest`] verifies every chunk;
//! 5. [`cache`] holds the file that front ends read from.
//!
//! The container format of a blob file (chunk tables, TOC, tar headers) is in
//! [`mod@format`]; it is shared with the builder, which writes blobs with
//! [`blob_writer`], and reads layers that stay what they are with [`original`].

#![cfg_attr(
    test,
    allow(
        clippy::duplicate_mod,
        reason = "fill::model compiles a module once more, with the locks of a model checker"
    )
)]

pub mod algorithm;
pub mod backend;
pub mod blob;
pub mod blob_id;
pub mod blob_info;
pub mod blob_writer;
pub mod budget;
pub mod cache;
pub mod chunk;
pub mod codec;
pub mod cores;
pub mod digest;
pub mod error;
pub mod fill;
pub mod format;
pub mod gate;
mod gzip_blocks;
pub mod mapped;
pub mod metrics;
pub mod oci;
pub mod original;
pub mod prefetch;
mod readahead;
pub mod ready_map;
pub mod speculate;
pub mod sync;
pub mod units;

pub use algorithm::{Compressor, Digester};
pub use blob_id::BlobId;
pub use blob_info::{BlobFeatures, BlobInfo};
pub use digest::Digest;
pub use units::{BlobIndex, BlobOffset, ChunkIndex, PlainOffset};
