//! A containerd snapshotter for images that start before they are downloaded.
//!
//! containerd asks a snapshotter for directories: one per image layer, and one per
//! container that starts from them. For ordinary images this plugin does what
//! containerd's own overlayfs snapshotter does. For Nydus images it says that every
//! data layer is there already, lets containerd unpack the small bootstrap layer,
//! and mounts the image lazily, by `nydusd`, once a container starts from it.
//!
//! The way of a request:
//! - [`api`]: messages and service, as on the wire
//! - [`service`]: wire to domain and back, nothing else
//! - [`lifecycle`]: what happens for prepare, commit, remove, ...
//! - [`store`]: durable records, in transactions
//! - [`mounts`]: the mounts that a container or an unpacker performs
//! - [`images`]: which snapshots are lazily mounted images, and for whom
//! - [`daemons`]: `nydusd`, one for all images or one for each: started, watched, found again
//! - [`prefetch`]: what is to be fetched first of an image when it is mounted
//! - `replacement`: an upgrade of `nydusd` that lasts
//! - `mirrors`: the mirrors of registries that containerd uses, for daemons
//! - [`keychain`]: the image service in front of containerd's, and what it remembers
//! - [`manager`], `notify`: systemd, which holds what this program holds for daemons
//! - [`reconcile`]: after a start, records, directories and mounts agree again
//! - [`config`], [`containerd_config`]: `config.toml`, and what containerd needs in its own
//! - [`system`]: metrics, and who serves what
//!
//! Promises: a crash between any two steps leaves nothing behind that the next
//! start does not repair; credentials are never written to disk.

pub mod api;
pub mod config;
pub mod containerd_config;
pub mod daemons;
pub mod error;
pub mod filter;
mod gc;
pub mod images;
pub mod keychain;
pub mod labels;
pub mod lifecycle;
pub mod manager;
mod mirrors;
pub mod mounts;
mod notify;
pub mod prefetch;
pub mod reconcile;
mod replacement;
pub mod server;
pub mod service;
pub mod store;
pub mod system;
pub mod usage;
