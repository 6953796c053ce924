//! Single flight: of all readers that need a chunk now, one fetches it.
//!
//! The first to [`claim`](Flights::claim) a chunk is its leader; everyone else
//! finds the [`Flight`] and waits. A leader that returns early or panics lands its
//! flights by dropping them, so nobody waits for a thread that is gone.
//!
//! Promises: the lock covers map operations only; a landed flight leaves the map
//! before its waiters wake, so no result, and no error, is ever served twice.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;

// From the parent, so that `model` can put a model checker in their place.
use super::sync::{Arc, AtomicBool, Condvar, Mutex, Ordering, lock, wait};
use crate::backend::Priority;
use crate::cache::{CacheError, ChunkLock};
use crate::error::ReadError;
use crate::units::ChunkIndex;

/// How often a waiter looks whether the blob is being closed.
const TICK: Duration = Duration::from_millis(500);

/// How a flight ended.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// The chunk is in the cache file and marked ready.
    Stored,
    /// The chunk is good but could not be written.
    Memory {
        /// Its verified bytes.
        bytes: Bytes,
        /// Why it is not in the file.
        cause: CacheError,
    },
    /// There are no bytes.
    Failed(ReadError),
    /// The leader vanished; a waiter may try itself.
    Abandoned,
}

/// A fetch in progress, as its followers see it.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) priority: Priority,
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

impl Flight {
    /// Waits for the outcome; `None` at the deadline or once `stop` is set.
    pub(crate) fn wait(&self, deadline: Instant, stop: &AtomicBool) -> Option<Outcome> {
        let mut guard = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*guard {
                return Some(outcome.clone());
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() || stop.load(Ordering::Relaxed) {
                return None;
            }
            guard = wait(&self.landed, guard, rest.min(TICK));
        }
    }

    fn land(&self, outcome: Outcome) {
        *lock(&self.outcome) = Some(outcome);
        self.landed.notify_all();
    }
}

/// The fetches in progress for one blob.
#[derive(Debug, Default)]
pub(crate) struct Flights(Mutex<HashMap<ChunkIndex, Arc<Flight>>>);

impl Flights {
    /// Becomes the leader for those of `chunks` that nobody fetches and that are
    /// not `done`.
    ///
    /// `done` is asked under the lock: a leader publishes its chunk before it gives
    /// up the claim, so a chunk that is neither in flight nor done is really missing.
    pub(crate) fn claim(
        &self,
        chunks: impl IntoIterator<Item = ChunkIndex>,
        priority: Priority,
        done: impl Fn(ChunkIndex) -> bool,
    ) -> Vec<Claim<'_>> {
        let mut flights = lock(&self.0);
        let mut claims = Vec::new();
        for index in chunks {
            if done(index) || flights.contains_key(&index) {
                continue;
            }
            let flight = Arc::new(Flight {
                priority,
                outcome: Mutex::new(None),
                landed: Condvar::new(),
            });
            flights.insert(index, Arc::clone(&flight));
            claims.push(Claim {
                flights: self,
                index,
                flight,
                lock: None,
                landed: false,
            });
        }
        claims
    }

    /// The flight of a chunk, if somebody fetches it now.
    pub(crate) fn get(&self, index: ChunkIndex) -> Option<Arc<Flight>> {
        lock(&self.0).get(&index).cloned()
    }

    fn end(&self, index: ChunkIndex, flight: &Flight, outcome: Outcome) {
        lock(&self.0).remove(&index);
        flight.land(outcome);
    }
}

/// The duty to fetch a chunk.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    flights: &'a Flights,
    index: ChunkIndex,
    flight: Arc<Flight>,
    /// The same duty towards other processes.
    lock: Option<ChunkLock<'a>>,
    landed: bool,
}

impl<'a> Claim<'a> {
    pub(crate) fn index(&self) -> ChunkIndex {
        self.index
    }

    /// Keeps other processes from fetching the chunk, for as long as the flight lasts.
    pub(crate) fn hold(&mut self, lock: ChunkLock<'a>) {
        self.lock = Some(lock);
    }

    /// Ends the flight and wakes everyone who waits for it.
    pub(crate) fn land(mut self, outcome: Outcome) {
        self.landed = true;
        // First, or it could be the lock of the next flight that is given back.
        self.lock = None;
        self.flights.end(self.index, &self.flight, outcome);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.lock = None;
        if !self.landed {
            self.flights
                .end(self.index, &self.flight, Outcome::Abandoned);
        }
    }
}
