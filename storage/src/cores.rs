//! Bounds the threads that decode and verify at a time, for all fetches together.
//!
//! A fetch runs on the thread of whoever wants it, most of the time waiting for the
//! network. What takes a processor happens in turns that come from [`Cores`]: one
//! thread per core works, in the order in which bytes arrived, and finishes. Without
//! turns, fifty answers that come at once would all be decoded at once, and the first
//! reader would wait as long as the last.
//!
//! Turns and not threads of their own: the bytes are in the cache of the core that
//! received them, and nothing has to be handed over. No priorities either: a reader may
//! wait for a chunk that background work decodes, and a turn lasts a few milliseconds.
//!
//! Promise: a turn is held for work on memory only, never for I/O or another wait.
#![forbid(unsafe_code)]

use std::fmt;
use std::num::NonZero;
use std::time::Duration;

use crate::sync::{Arc, Condvar, Mutex, lock, wait};

/// A turn always comes; this is how long a waiter sleeps before he looks again.
const TICK: Duration = Duration::from_secs(1);

/// Turns at the processor. Cheap to clone; clones are the same turns.
#[derive(Clone)]
pub struct Cores(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Number of the next to come.
    next: u64,
    /// Number of the next whose turn it is.
    turn: u64,
}

impl Default for Cores {
    /// One turn for each processor that this process may use.
    fn default() -> Self {
        Self::new(std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN))
    }
}

impl fmt::Debug for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        lock(&self.0.state).fmt(f)
    }
}

/// Given back when dropped, also by a panic.
struct Turn<'a>(&'a Inner);

impl Cores {
    /// * `count`: threads that work at a time.
    #[must_use]
    pub fn new(count: NonZero<usize>) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                free: count.get(),
                next: 0,
                turn: 0,
            }),
            changed: Condvar::new(),
        }))
    }

    /// Does `work` when it is this thread's turn.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        let _turn = self.turn();
        work()
    }

    fn turn(&self) -> Turn<'_> {
        let mut state = lock(&self.0.state);
        let number = state.next;
        state.next = state.next.wrapping_add(1);
        while state.turn != number || state.free == 0 {
            state = wait(&self.0.changed, state, TICK);
        }
        state.turn = state.turn.wrapping_add(1);
        state.free -= 1;
        let more = state.free > 0 && state.turn != state.next;
        drop(state);
        if more {
            self.0.changed.notify_all();
        }
        Turn(&self.0)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.free += 1;
        let waiting = state.turn != state.next;
        drop(state);
        if waiting {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn no_more_than_so_many_work_at_a_time() {
        let cores = Cores::new(NonZero::new(3).unwrap());
        let (now, most, done) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        cores.run(|| {
                            let working = now.fetch_add(1, Ordering::SeqCst) + 1;
                            most.fetch_max(working, Ordering::SeqCst);
                            thread::sleep(Duration::from_micros(200));
                            now.fetch_sub(1, Ordering::SeqCst);
                        });
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 16 * 20);
        assert_eq!(most.into_inner(), 3);
    }

    #[test]
    fn turns_come_in_order_and_survive_a_panic() {
        let cores = Cores::new(NonZero::<usize>::MIN);
        let (order, came) = channel();
        let held = cores.turn();
        let waiters: Vec<_> = (0..5_u64)
            .map(|number| {
                let (theirs, order) = (cores.clone(), order.clone());
                let waiter = thread::spawn(move || {
                    theirs.run(|| order.send(number).unwrap());
                    assert!(number != 2, "on purpose");
                });
                while lock(&cores.0.state).next < number + 2 {
                    thread::yield_now();
                }
                waiter
            })
            .collect();
        drop(held);
        let failed = waiters.into_iter().map(|waiter| waiter.join().is_err());
        assert_eq!(failed.filter(|failed| *failed).count(), 1);
        let broken = cores.clone();
        thread::spawn(move || broken.run(|| panic!("on purpose")))
            .join()
            .unwrap_err();
        drop(order);
        assert_eq!(came.iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(cores.run(|| 7), 7);
    }
}
