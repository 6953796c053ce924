//! Images that travel from peer to peer, through a real Dragonfly and other mirrors.
//!
//! They need root and the programs that `make dragonfly` builds; `make test-p2p` runs
//! them. Every test makes a network of its own, in which the origin is slow, and every
//! byte that is read is compared with the tree that the image was made of.
//!
//! - [`sharing`]: what the origin sends, and how long starts take, on one node and on many
//! - [`faults`]: anything between a reader and its bytes fails, and comes back
//! - [`mirrors`]: mirrors that are no Dragonfly
//! - [`preheat`]: images are in the seed before nodes want them
//! - [`content`]: the trees and the readers of these tests

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails where it stands"
)]

mod content;
mod faults;
mod mirrors;
mod preheat;
mod sharing;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// One cluster at a time: they measure.
fn alone() -> MutexGuard<'static, ()> {
    static RUNNING: Mutex<()> = Mutex::new(());
    // Nothing is shared but the machine.
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}
