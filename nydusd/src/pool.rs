//! Threads that wait: as many as there is work, up to a limit, and none when there
//! has been none for a while.
//!
//! Promises: submitting never blocks; work is begun in the order it was submitted; a
//! piece of work that panics costs itself only. If not a single thread can be had,
//! the work is done by who submits it.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a thread waits for work before it ends.
const PATIENCE: Duration = Duration::from_secs(10);
/// Stack of a thread, in bytes.
const STACK_SIZE: usize = 512 << 10;

/// Threads that do one kind of work, on pieces of type `T`.
pub(crate) struct Pool<T>(Arc<Shared<T>>);

struct Shared<T> {
    name: &'static str,
    limit: usize,
    work: Box<dyn Fn(T) + Send + Sync>,
    state: Mutex<State<T>>,
    arrived: Condvar,
}

struct State<T> {
    queue: VecDeque<T>,
    threads: usize,
    idle: usize,
}

impl<T> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.0.name)
            .finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Pool<T> {
    /// At most `limit` threads called `name` that do `work`. None is started yet.
    pub(crate) fn new(
        name: &'static str,
        limit: usize,
        work: impl Fn(T) + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Shared {
            name,
            limit,
            work: Box::new(work),
            state: Mutex::new(State {
                queue: VecDeque::new(),
                threads: 0,
                idle: 0,
            }),
            arrived: Condvar::new(),
        }))
    }

    /// Has a thread work on `piece`, one more if all are busy.
    pub(crate) fn submit(&self, piece: T) {
        let start = {
            let mut state = self.0.lock();
            state.queue.push_back(piece);
            let start = state.idle < state.queue.len() && state.threads < self.0.limit;
            state.threads += usize::from(start);
            start
        };
        self.0.arrived.notify_one();
        if !start {
            return;
        }
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new()
            .name(self.0.name.to_owned())
            .stack_size(STACK_SIZE);
        if let Err(error) = thread.spawn(move || shared.run(PATIENCE)) {
            tracing::warn!("cannot start a thread: {error}");
            let alone = {
                let mut state = self.0.lock();
                state.threads -= 1;
                state.threads == 0
            };
            if alone {
                self.0.lock().threads += 1;
                self.0.run(Duration::ZERO);
            }
        }
    }
}

impl<T> Shared<T> {
    /// Body of a thread: ends when nothing came for `patience`.
    fn run(&self, patience: Duration) {
        while let Some(piece) = self.next(patience) {
            // The panic was printed; whoever waits for the piece learns by its drop.
            let _ = catch_unwind(AssertUnwindSafe(|| (self.work)(piece)));
        }
    }

    /// The next piece; `None` when the thread should end, which is counted.
    fn next(&self, patience: Duration) -> Option<T> {
        let mut state = self.lock();
        if let Some(piece) = state.queue.pop_front() {
            return Some(piece);
        }
        state.idle += 1;
        let (mut state, _) = self
            .arrived
            .wait_timeout_while(state, patience, |state| state.queue.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.idle -= 1;
        let piece = state.queue.pop_front();
        state.threads -= usize::from(piece.is_none());
        piece
    }

    /// The state is plain counters, valid whatever a panicking thread did.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn there_are_as_many_threads_as_work() {
        // Nobody gets past the barrier before eight pieces are worked on at once.
        let barrier = Arc::new(Barrier::new(9));
        let waiting = Arc::clone(&barrier);
        let pool = Pool::new("test", 8, move |(): ()| {
            waiting.wait();
        });
        (0..8).for_each(|_| pool.submit(()));
        barrier.wait();
        assert!(pool.0.lock().threads <= 8);
    }

    #[test]
    fn a_panic_costs_one_piece() {
        let (sender, receiver) = channel();
        let pool = Pool::new("test", 1, move |number: u32| {
            assert!(number != 1, "meant to happen");
            sender.send(number).unwrap();
        });
        (0..3).for_each(|number| pool.submit(number));
        assert_eq!(receiver.iter().take(2).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(pool.0.lock().threads, 1);
    }
}
