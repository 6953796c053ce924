//! `nydusd` as a user runs it: the real program, real mounts, real signals.
//!
//! Needs root and `/dev/fuse`. Every test builds its own small image with the
//! libraries and mounts it in a directory of its own; a test that fails takes
//! its daemon and its mount down all the same ([`daemon::Daemon`]).
#![allow(
    clippy::unwrap_used,
    clippy::panic_in_result_fn,
    reason = "a test ends with a panic, also in its helpers"
)]

mod daemon;
mod failures;
mod image;
mod life;
mod reads;
mod reference;
mod registry;
