//! From file data to stored chunks, on all cores, in a fixed order.
//!
//! ```text
//! source thread        workers (shared)            sequencer, one per layer
//!   Feeder  ──items──▶  digest, then compress  ──▶  in stream order: reference
//!      ▲                what nobody claimed         known chunks, append new ones
//!      └───────────────── buffers ◀───────────────────────┘
//! ```
//!
//! * [`feeder`] cuts files into chunks and packs several small ones into one
//!   *item*, so that queues cost little per file.
//! * [`workers`] digest every chunk. The first worker that meets a digest claims
//!   it (`dedup`) and compresses the chunk; equal chunks cost no more than
//!   their digest.
//! * `sequencer` handles items in the order of the stream, so the blob does not
//!   depend on thread timing. It sends batches of small chunks back to the workers
//!   and keeps what comes after them in the `queue`.
//! * [`budget`] bounds the memory of all layers together: an item holds its share
//!   from the moment its buffer is filled until its chunks are stored.

pub mod budget;
pub(crate) mod dedup;
pub mod feeder;
pub(crate) mod item;
mod queue;
pub(crate) mod sequencer;
pub mod workers;

use std::sync::Arc;

/// What layers share: worker threads and memory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    pub(crate) workers: Arc<workers::Workers>,
    pub(crate) budget: Arc<budget::Budget>,
}

impl Engine {
    /// Chunk data that may be in memory at a time, in bytes, unless told otherwise.
    pub const DEFAULT_MEMORY: usize = 32 << 20;

    /// Starts `threads` workers; all layers together keep at most `memory` bytes of
    /// chunk data in flight, or one item if that is larger.
    #[must_use]
    pub fn new(threads: usize, memory: usize) -> Self {
        Self {
            workers: Arc::new(workers::Workers::start(threads.max(1))),
            budget: Arc::new(budget::Budget::new(memory)),
        }
    }

    /// One worker per processor, and [`Engine::DEFAULT_MEMORY`] or, with many
    /// processors, 8 MiB for each.
    #[must_use]
    pub fn for_this_machine() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::new(
            threads,
            Self::DEFAULT_MEMORY.max(threads.saturating_mul(8 << 20)),
        )
    }
}
