//! The bootstrap of an image: reading, checking, building and merging RAFS v6 metadata.
//!
//! Reading, in the order in which a request passes:
//! * [`image`]: bytes → checked superblocks and tables, zero-copy over a memory map;
//! * [`fs`]: lookup, readdir, attributes, symlinks; [`xattr`]: extended attributes;
//! * [`extents`]: a range of a file → chunks of blobs; [`paths`]: a path → a file;
//! * [`verify`]: the checks that cost time in proportion to the number of files;
//! * [`dump`]: an image as text, for tests and debugging.
//!
//! Writing:
//! * [`tree`]: an image in memory, to build or merge;
//! * [`from_image`]: an image back into a tree;
//! * [`merge`]: layers into one tree, with whiteouts;
//! * [`writer`]: a tree into the bytes of a bootstrap.
//!
//! The raw structures of both directions are in [`format`](mod@format); the
//! format itself is described in `docs/format.md`.
#![forbid(unsafe_code)]

pub mod dump;
pub mod error;
pub mod extents;
pub mod format;
pub mod from_image;
pub mod fs;
pub mod image;
pub mod merge;
mod neighbourhoods;
pub mod paths;
pub mod tree;
pub mod units;
pub mod verify;
mod visited;
pub mod writer;
pub mod xattr;

pub use error::{Corrupt, Error, WriteError};
pub use image::Image;
pub use tree::Tree;
pub use units::{FileKind, Nid};
