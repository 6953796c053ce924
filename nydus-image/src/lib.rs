//! The image builder: sources → layers → images.
//!
//! One command is one file ([`create`], [`convert`], [`merge`], [`check`]); they share
//!
//! * [`source`]: where files come from: a directory or a tar stream;
//! * [`build`]: one layer from one source, through
//! * [`pipeline`]: cutting, digests, compression and storing, on all cores;
//! * [`reuse`]: images whose chunks are referred to instead of stored again;
//! * [`output`]: files that appear complete or not at all, and FIFOs;
//! * [`report`]: the JSON report of a command.
//!
//! [`preheat`] puts what was pushed where nodes will look for it.
//!
//! The commands that read images, [`inspect`], [`stat`], [`unpack`] and [`export`],
//! share
//!
//! * [`access`]: where bootstrap and blobs are;
//! * [`listing`]: all names of an image;
//! * [`data`]: its chunks, verified, and [`ordered`]: many of them at a time.
//!
//! The metadata format is in the crate `rafs`, the blob format in `storage`.
#![forbid(unsafe_code)]

pub mod access;
pub mod build;
pub mod check;
pub mod cli;
pub mod convert;
pub mod create;
pub mod data;
pub mod export;
pub mod inspect;
mod interrupt;
pub mod listing;
pub mod logging;
pub mod merge;
pub mod ordered;
pub mod output;
pub mod pipeline;
pub mod prefetch;
pub mod preheat;
pub mod report;
pub mod reuse;
pub mod source;
pub mod stat;
pub mod unpack;
pub mod version;
