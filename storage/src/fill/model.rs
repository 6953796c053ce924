//! Every interleaving of readers, writers and failures of single flight, by loom.
//!
//! `flight.rs` takes its locks from `super::sync`. Here it is compiled a second time,
//! with loom's locks in that place, which try all orders in which threads can run.
//! So the model is the code itself, and normal builds know nothing of it.

mod sync {
    pub(super) use loom::sync::atomic::{AtomicBool, Ordering};
    pub(super) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};

    pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }

    /// Never returns early: what works without the timeout loses no wake-up.
    pub(super) fn wait<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        _: std::time::Duration,
    ) -> MutexGuard<'a, T> {
        condvar.wait(guard).unwrap()
    }
}

#[path = "flight.rs"]
#[expect(
    dead_code,
    reason = "the model does not use the locks between processes"
)]
mod flight;

use std::time::{Duration, Instant};

use flight::{Flights, Outcome};
use sync::{Arc, AtomicBool, Ordering};

use crate::backend::Priority;
use crate::units::ChunkIndex;

const CHUNK: ChunkIndex = ChunkIndex::new(0);

/// What readers share: the flights, the ready bit, and what a fetch does next.
struct World {
    flights: Flights,
    ready: AtomicBool,
    fetches: loom::sync::atomic::AtomicUsize,
    /// The first fetch ends like this.
    first: First,
}

#[derive(Clone, Copy, PartialEq)]
enum First {
    Good,
    /// The leader gives up, or panics: it drops its claim.
    Vanishes,
}

impl World {
    fn new(first: First) -> Arc<Self> {
        Arc::new(Self {
            flights: Flights::default(),
            ready: AtomicBool::new(false),
            fetches: loom::sync::atomic::AtomicUsize::new(0),
            first,
        })
    }

    /// The loop of `Filler::settle`, for one chunk.
    fn read(&self) {
        let stop = AtomicBool::new(false);
        let late = Instant::now() + Duration::from_secs(3600);
        for _ in 0..4 {
            if self.ready.load(Ordering::Acquire) {
                return;
            }
            let done = |_| self.ready.load(Ordering::Acquire);
            if let Some(claim) = self.flights.claim([CHUNK], Priority::OnDemand, done).pop() {
                let number = self.fetches.fetch_add(1, Ordering::Relaxed);
                if number == 0 && self.first == First::Vanishes {
                    drop(claim);
                    continue;
                }
                self.ready.store(true, Ordering::Release);
                claim.land(Outcome::Stored);
            } else if let Some(flight) = self.flights.get(CHUNK) {
                let outcome = flight.wait(late, &stop).expect("a result");
                assert!(matches!(outcome, Outcome::Stored | Outcome::Abandoned));
            }
        }
        assert!(self.ready.load(Ordering::Acquire), "gave up too early");
    }
}

fn explore(first: First, fetches: usize) {
    let mut model = loom::model::Builder::new();
    // Enough for every known kind of race, and few enough to be quick.
    model.preemption_bound = Some(3);
    model.check(move || {
        let world = World::new(first);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let world = Arc::clone(&world);
                loom::thread::spawn(move || world.read())
            })
            .collect();
        world.read();
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!(world.fetches.load(Ordering::Relaxed), fetches);
        assert!(world.flights.get(CHUNK).is_none(), "nothing is left behind");
    });
}

#[test]
fn one_of_three_readers_fetches_and_all_are_served() {
    explore(First::Good, 1);
}

#[test]
fn a_leader_that_vanishes_is_replaced_once() {
    explore(First::Vanishes, 2);
}
