//! A bound for the memory of all fetches in progress.
//!
//! Before a request is made, its compressed bytes and its largest decoded piece are
//! taken from the [`Budget`]; they are given back when the request is done. So memory
//! depends on configuration and not on the number of readers or the fields of an image.
//!
//! Promises: whoever waits is served in order, readers before background work; that
//! never gets more than half, so that a reader finds room; a request larger than
//! everything is let through alone; every wait has a deadline. Nobody who waits here
//! holds anything that another one could wait for.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use crate::backend::Priority;
use crate::sync::{Arc, AtomicBool, Condvar, Mutex, Ordering, lock, wait};

/// Memory for fetches if nothing else is configured, in bytes.
pub const DEFAULT: u64 = 64 << 20;

/// How often a waiter looks whether its blob is being closed.
const TICK: Duration = Duration::from_millis(500);

/// Bytes that fetches in progress may take. Cheap to clone; clones are the same budget.
#[derive(Clone)]
pub struct Budget(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    limit: u64,
    used: u64,
    /// Of that, for background work.
    used_ahead: u64,
    next_ticket: u64,
    /// Tickets of those who wait, in order.
    readers: VecDeque<u64>,
    ahead: VecDeque<u64>,
}

/// Bytes taken from a budget, until dropped.
#[derive(Debug)]
pub struct Grant {
    budget: Budget,
    bytes: u64,
    priority: Priority,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(DEFAULT)
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget")
            .field("limit", &self.limit())
            .field("used", &self.used())
            .finish()
    }
}

impl Budget {
    /// * `limit`: most bytes in flight.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                limit,
                ..State::default()
            }),
            changed: Condvar::new(),
        }))
    }

    /// Most bytes in flight.
    #[must_use]
    pub fn limit(&self) -> u64 {
        lock(&self.0.state).limit
    }

    /// Makes the limit at least this: those who share a budget get what the most
    /// demanding one asks for.
    pub fn raise(&self, limit: u64) {
        let mut state = lock(&self.0.state);
        state.limit = state.limit.max(limit);
        drop(state);
        self.0.changed.notify_all();
    }

    /// Bytes that are taken now.
    #[must_use]
    pub fn used(&self) -> u64 {
        lock(&self.0.state).used
    }

    /// Waits until there is room; `None` at the deadline or once `stop` is set.
    ///
    /// * `bytes`: what is needed; more than there is counts as all of it.
    #[must_use]
    pub fn take(
        &self,
        bytes: u64,
        priority: Priority,
        deadline: Instant,
        stop: &AtomicBool,
    ) -> Option<Grant> {
        let mut state = lock(&self.0.state);
        let bytes = bytes.min(state.limit);
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.queue(priority).push_back(ticket);
        loop {
            if state.is_turn(ticket, priority) && state.has_room(bytes, priority) {
                state.queue(priority).pop_front();
                state.used += bytes;
                if priority != Priority::OnDemand {
                    state.used_ahead += bytes;
                }
                break;
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() || stop.load(Ordering::Relaxed) {
                state.queue(priority).retain(|other| *other != ticket);
                drop(state);
                self.0.changed.notify_all();
                return None;
            }
            state = wait(&self.0.changed, state, rest.min(TICK));
        }
        drop(state);
        // There may be room for the next in line, too.
        self.0.changed.notify_all();
        Some(Grant {
            budget: self.clone(),
            bytes,
            priority,
        })
    }
}

impl State {
    fn queue(&mut self, priority: Priority) -> &mut VecDeque<u64> {
        match priority {
            Priority::OnDemand => &mut self.readers,
            Priority::Speculation | Priority::Prefetch => &mut self.ahead,
        }
    }

    fn is_turn(&self, ticket: u64, priority: Priority) -> bool {
        match priority {
            Priority::OnDemand => self.readers.front() == Some(&ticket),
            Priority::Speculation | Priority::Prefetch => {
                self.readers.is_empty() && self.ahead.front() == Some(&ticket)
            }
        }
    }

    fn has_room(&self, bytes: u64, priority: Priority) -> bool {
        let ahead = priority == Priority::OnDemand
            || self.used_ahead == 0
            || self.used_ahead.saturating_add(bytes) <= self.limit / 2;
        ahead && self.used.saturating_add(bytes) <= self.limit
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let mut state = lock(&self.budget.0.state);
        state.used -= self.bytes;
        if self.priority != Priority::OnDemand {
            state.used_ahead -= self.bytes;
        }
        drop(state);
        self.budget.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(10)
    }

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn readers_overtake_background_work_which_gets_half() {
        let (budget, stop) = (Budget::new(100), AtomicBool::new(false));
        let first = budget.take(50, Priority::Prefetch, late(), &stop).unwrap();
        assert!(budget.take(1, Priority::Prefetch, soon(), &stop).is_none());
        let reader = budget.take(40, Priority::OnDemand, soon(), &stop).unwrap();
        assert!(budget.take(11, Priority::OnDemand, soon(), &stop).is_none());
        drop(reader);
        thread::scope(|scope| {
            let large = scope.spawn(|| budget.take(1000, Priority::OnDemand, late(), &stop));
            while lock(&budget.0.state).readers.is_empty() {
                thread::yield_now();
            }
            assert!(budget.take(1, Priority::Prefetch, soon(), &stop).is_none());
            drop(first);
            assert_eq!(large.join().unwrap().unwrap().bytes, 100);
        });
        assert_eq!(budget.used(), 0);
        let all = budget.take(80, Priority::Prefetch, soon(), &stop);
        assert!(all.is_some(), "alone, it may have more than half");
        assert!(budget.take(30, Priority::OnDemand, soon(), &stop).is_none());
        budget.clone().raise(110);
        budget.raise(50);
        assert!(budget.take(30, Priority::OnDemand, soon(), &stop).is_some());
        stop.store(true, Ordering::Relaxed);
        assert!(budget.take(80, Priority::OnDemand, late(), &stop).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn the_limit_holds_and_everybody_gets_through(
            wishes in prop::collection::vec((0_u64..150, any::<bool>()), 1..40),
        ) {
            let (budget, stop) = (Budget::new(100), AtomicBool::new(false));
            let held = crate::sync::AtomicU64::new(0);
            thread::scope(|scope| {
                for part in wishes.chunks(wishes.len().div_ceil(4)) {
                    let (budget, stop, held) = (&budget, &stop, &held);
                    scope.spawn(move || for (bytes, reader) in part {
                        let priority = if *reader { Priority::OnDemand } else { Priority::Prefetch };
                        let grant = budget.take(*bytes, priority, late(), stop).unwrap();
                        let sum = held.fetch_add(grant.bytes, Ordering::Relaxed) + grant.bytes;
                        assert!(sum <= 100, "{sum}");
                        thread::yield_now();
                        held.fetch_sub(grant.bytes, Ordering::Relaxed);
                    });
                }
            });
            prop_assert_eq!(budget.used(), 0);
        }
    }
}
