//! Raw on-disk structures, nothing else.
//!
//! Every structure has the byte layout of `docs/format.md` and can be read from
//! any position of any bytes: the fields are little-endian and unaligned.
//! Nothing is checked here; [`image`](crate::image) and [`fs`](crate::fs) turn
//! raw structures into checked values, [`writer`](crate::writer) fills them.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

pub mod blob;
pub mod chunk;
pub mod dirent;
pub mod inode;
pub mod superblock;
pub mod xattr;
