//! End-to-end tests: the real programs on real parts, judged from outside.
//!
//! They need root, FUSE, loop devices and the tools that `misc/install.sh`
//! installs; whatever is missing makes them fail and say so.
//!
//! - [`scene`]: what a test stands on: a directory, builds, mounts
//! - [`create`], [`merge`], [`convert`]: what was built reads back as it was
//! - [`kernel`], [`kernel_matrix`]: the kernel's own EROFS agrees
//! - [`erofs`]: images that the kernel serves, filled as they are read
//! - [`below`]: many images of one daemon, each with a mount of its own
//! - [`in_place`]: layers used in place, [`reuse`]: chunks of other images
//! - [`fixtures`]: so do images that Nydus v2.4 wrote
//! - [`bad_build`], [`bad_registry`], [`bad_mount`]: every bad input has one clear end
//! - [`api`]: the control socket: many images, numbers, commands
//! - [`backends`], [`soak`]: blobs from real servers, good and bad ones
//! - [`kills`]: any one process of a daemon can die at any moment
//! - [`groups`]: control groups of keeper and worker
//! - [`lifecycle`]: daemons end cleanly, however they are told
//! - [`prefetch`]: what is fetched before it is read
//! - [`preheat`]: what is put into Dragonfly before anybody reads it
//! - [`read_only`]: every way to read and to write
//! - [`upgrade`]: mounts pass from one daemon to another
//! - [`unpack`]: images as archives and as disks
//! - [`help`]: what the programs say about themselves

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails where it stands"
)]

mod api;
mod backends;
mod bad_build;
mod bad_mount;
mod bad_registry;
mod below;
mod convert;
mod create;
mod erofs;
mod fixtures;
mod groups;
mod hedge;
mod help;
mod in_place;
mod kernel;
mod kernel_matrix;
mod kills;
mod lifecycle;
mod merge;
mod prefetch;
mod preheat;
mod read_only;
mod reuse;
mod scene;
mod soak;
mod unpack;
mod upgrade;
