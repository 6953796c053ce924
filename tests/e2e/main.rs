//! End-to-end tests: the real programs on real parts, judged from outside.
//!
//! They need root, FUSE, loop devices and the tools that `misc/install.sh`
//! installs; whatever is missing makes them fail and say so.
//!
//! - [`scene`]: what a test stands on: a directory, builds, mounts
//! - [`create`], [`merge`], [`convert`]: what was built reads back as it was
//! - [`kernel`], [`kernel_matrix`]: the kernel's own EROFS agrees
//! - [`in_place`]: layers used in place, [`reuse`]: chunks of other images
//! - [`fixtures`]: so do images that Nydus v2.4 wrote
//! - [`bad_build`], [`bad_registry`], [`bad_mount`]: every bad input has one clear end
//! - [`backends`], [`soak`]: blobs from real servers, good and bad ones
//! - [`lifecycle`]: daemons end cleanly, however they are told
//! - [`prefetch`]: what is fetched before it is read
//! - [`unpack`]: images as archives and as disks
//! - [`help`]: what the programs say about themselves

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails where it stands"
)]

mod backends;
mod bad_build;
mod bad_mount;
mod bad_registry;
mod convert;
mod create;
mod fixtures;
mod help;
mod in_place;
mod kernel;
mod kernel_matrix;
mod lifecycle;
mod merge;
mod prefetch;
mod reuse;
mod scene;
mod soak;
mod unpack;
