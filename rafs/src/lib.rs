//! The bootstrap of an image: reading, checking, building and merging RAFS v6 metadata.
//!
//! * [`tree`]: an image in memory, to build or merge.
//!
//! Reading: bytes → `image` (checked superblock and tables) → `fs` (lookup,
//! readdir, attributes, file range → `extents`). Writing: [`tree`] →
//! `writer` → bytes. The raw structures of both are in `format`.
//! The format itself: `docs/format.md`.
#![forbid(unsafe_code)]

pub mod error;
pub mod extents;
pub mod format;
pub mod from_image;
pub mod fs;
pub mod image;
pub mod merge;
pub mod tree;
pub mod writer;
