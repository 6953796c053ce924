//! How many requests a server gets at a time, and how fast: one [`Gate`] per server for
//! all mounts of a process.
//!
//! A fetch passes the gate before it begins, in the order of arrival, readers first, then
//! speculation, then prefetch. What nobody waits for gets a small part of the requests
//! ([`Limits::ahead`]) and only the bandwidth that readers leave.
//!
//! How much of the background is on its way at a time depends on the link (`Window`):
//! enough to keep it busy, but not so much that a reader has to share it with a crowd.
//!
//! Promises: a reader never waits here for background work, except that with a limit of
//! one request he waits for the end of that one; background work that waits has not
//! claimed a chunk yet, so nobody waits for it; every wait has a deadline.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::time::{Duration, Instant};

use crate::backend::Priority;
use crate::sync::{Arc, AtomicBool, Condvar, Mutex, Ordering, Weak, lock, wait};

/// How often a waiter looks whether its blob is being closed.
const TICK: Duration = Duration::from_millis(500);

/// How far the use of the bandwidth may run ahead of the clock. Waking up is not exact,
/// and without some slack every delay would be lost for good.
const SLACK: Duration = Duration::from_millis(50);

/// Bytes of the background on their way at a time: at the start, and the least and most.
const FIRST_WINDOW: u64 = 2 << 20;
const LEAST_WINDOW: u64 = 512 << 10;
const MOST_WINDOW: u64 = 16 << 20;

/// The same while the answer to a reader is on its way.
const BESIDE_READERS: u64 = 384 << 10;

/// A request of the background may take this much longer than the quickest did, times
/// two: whatever is beyond that waits in some queue, where readers will wait, too.
const TOLERANCE: Duration = Duration::from_millis(60);

/// What a server is asked for by one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests at a time; at least 1.
    pub requests: usize,
    /// Of these, for what nobody waits for; at least 1, at most half of them if there
    /// are several.
    pub ahead: usize,
    /// Bytes per second; 0 for no limit.
    pub bandwidth: u64,
}

impl Default for Limits {
    /// As many requests as a start of many programs makes; ahead of them enough to fill
    /// a link of 100 Mbit/s and 50 ms with requests of 20 KiB.
    fn default() -> Self {
        Self {
            requests: 64,
            ahead: 32,
            bandwidth: 0,
        }
    }
}

impl Limits {
    fn checked(self) -> Self {
        let requests = self.requests.max(1);
        Self {
            requests,
            ahead: self.ahead.clamp(1, (requests / 2).max(1)),
            ..self
        }
    }
}

/// The gates of a process, by server. Cheap to clone; clones are the same gates.
#[derive(Clone, Debug, Default)]
pub struct Gates(Arc<Mutex<HashMap<String, Weak<Inner>>>>);

impl Gates {
    /// The gate of the server at `place`.
    ///
    /// * `limits`: replace those of everybody who uses the gate; `None` to leave them
    ///   as they are.
    #[must_use]
    pub fn of(&self, place: &str, limits: Option<Limits>) -> Gate {
        let mut gates = lock(&self.0);
        gates.retain(|_, gate| gate.strong_count() > 0);
        let gate = gates.get(place).and_then(Weak::upgrade).map(Gate);
        let gate = gate.unwrap_or_else(|| {
            let gate = Gate::new(Limits::default());
            gates.insert(place.to_owned(), Arc::downgrade(&gate.0));
            gate
        });
        if let Some(limits) = limits {
            gate.set_limits(limits);
        }
        gate
    }
}

/// The way to one server. Cheap to clone; clones are the same gate.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    running: usize,
    /// Of these, for background work.
    ahead: usize,
    window: Window,
    next_ticket: u64,
    /// Tickets of those who wait, in order; the most urgent queue first.
    waiting: [VecDeque<u64>; 3],
    /// Until when readers use the bandwidth up, and until when all do.
    readers_until: Instant,
    all_until: Instant,
}

/// How many bytes the background may have on their way: as many as the link takes
/// without a queue. Requests that take long make it smaller, quick ones larger.
#[derive(Debug)]
struct Window {
    size: u64,
    used: u64,
    /// How long the quickest took.
    quickest: Duration,
}

impl Window {
    fn new() -> Self {
        Self {
            size: FIRST_WINDOW,
            used: 0,
            quickest: Duration::MAX,
        }
    }

    /// Whether so many bytes more may be on their way; one request always may.
    ///
    /// * `readers`: whether somebody's answer is on its way, too.
    fn has_room(&self, bytes: u64, readers: bool) -> bool {
        let size = if readers { BESIDE_READERS } else { self.size };
        self.used == 0 || self.used.saturating_add(bytes) <= size
    }

    /// Takes note of a request that has ended.
    fn ended(&mut self, bytes: u64, time: Duration) {
        // What takes long although hardly anything is on its way is no queue of ours:
        // the server, or the way to it, has become slower.
        if self.size == LEAST_WINDOW {
            self.quickest = self.quickest.saturating_add(self.quickest / 16);
        }
        self.quickest = self.quickest.min(time);
        let limit = self.quickest.saturating_add(TOLERANCE).saturating_mul(2);
        let full = self.used.saturating_mul(2) > self.size;
        self.used = self.used.saturating_sub(bytes);
        if time > limit {
            self.size = self.size.saturating_sub(bytes / 2);
        } else if full {
            self.size = self.size.saturating_add(bytes / 2);
        }
        self.size = self.size.clamp(LEAST_WINDOW, MOST_WINDOW);
    }
}

/// A request that may be made, until dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Gate,
    priority: Priority,
    bytes: u64,
    began: Instant,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.0.state);
        f.debug_struct("Gate")
            .field("limits", &state.limits)
            .field("running", &state.running)
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// A gate that nobody else uses.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let now = Instant::now();
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                limits: limits.checked(),
                running: 0,
                ahead: 0,
                window: Window::new(),
                next_ticket: 0,
                waiting: Default::default(),
                readers_until: now,
                all_until: now,
            }),
            changed: Condvar::new(),
        }))
    }

    /// Has other limits from now on; what is running goes on.
    pub fn set_limits(&self, limits: Limits) {
        let mut state = lock(&self.0.state);
        state.limits = limits.checked();
        // What was used before counts no more: it may be far more than fits the new ones.
        let now = Instant::now();
        (state.readers_until, state.all_until) = (now, now);
        drop(state);
        self.0.changed.notify_all();
    }

    /// The limits, after those that make no sense were put right.
    #[must_use]
    pub fn limits(&self) -> Limits {
        lock(&self.0.state).limits
    }

    /// Requests that are being made now.
    #[must_use]
    pub fn running(&self) -> usize {
        lock(&self.0.state).running
    }

    /// Waits for permission to make a request; `None` at the deadline or once `stop` is
    /// set.
    ///
    /// * `bytes`: about what it will bring.
    #[must_use]
    pub fn enter(
        &self,
        bytes: u64,
        priority: Priority,
        deadline: Instant,
        stop: &AtomicBool,
    ) -> Option<Pass> {
        let mut state = lock(&self.0.state);
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.queue(priority).push_back(ticket);
        loop {
            let now = Instant::now();
            let pause = match state.obstacle(ticket, (bytes, priority), now) {
                None => break,
                Some(pause) => pause,
            };
            let rest = deadline.saturating_duration_since(now);
            if rest.is_zero() || stop.load(Ordering::Relaxed) {
                state.queue(priority).retain(|other| *other != ticket);
                drop(state);
                self.0.changed.notify_all();
                return None;
            }
            state = wait(&self.0.changed, state, rest.min(pause));
        }
        state.admit(bytes, priority, Instant::now());
        drop(state);
        // There may be room for the next in line, too.
        self.0.changed.notify_all();
        Some(Pass {
            gate: self.clone(),
            priority,
            bytes,
            began: Instant::now(),
        })
    }
}

impl State {
    fn queue(&mut self, priority: Priority) -> &mut VecDeque<u64> {
        let [readers, speculation, prefetch] = &mut self.waiting;
        match priority {
            Priority::OnDemand => readers,
            Priority::Speculation => speculation,
            Priority::Prefetch => prefetch,
        }
    }

    /// How long to wait before it makes sense to look again; `None` for no obstacle.
    fn obstacle(
        &self,
        ticket: u64,
        (bytes, priority): (u64, Priority),
        now: Instant,
    ) -> Option<Duration> {
        let first = self.waiting.iter().find_map(VecDeque::front);
        if first != Some(&ticket) || self.running >= self.limits.requests {
            return Some(TICK);
        }
        let until = if priority == Priority::OnDemand {
            self.readers_until
        } else if self.ahead >= self.limits.ahead
            || !self.window.has_room(bytes, self.running > self.ahead)
        {
            return Some(TICK);
        } else {
            self.all_until
        };
        let early = until.saturating_duration_since(now);
        (self.limits.bandwidth > 0 && early > SLACK).then(|| (early - SLACK).min(TICK))
    }

    fn admit(&mut self, bytes: u64, priority: Priority, now: Instant) {
        self.queue(priority).pop_front();
        self.running += 1;
        let nanoseconds = u128::from(bytes) * 1_000_000_000;
        let time = nanoseconds.checked_div(self.limits.bandwidth.into());
        let time =
            Duration::from_nanos(time.map_or(0, |time| u64::try_from(time).unwrap_or(u64::MAX)));
        // A limit that is changed must not be waited for until the end of time.
        let later = |until: Instant| until.max(now).checked_add(time).unwrap_or(now);
        self.all_until = later(self.all_until);
        if priority == Priority::OnDemand {
            self.readers_until = later(self.readers_until);
        } else {
            self.ahead += 1;
            self.window.used = self.window.used.saturating_add(bytes);
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = lock(&self.gate.0.state);
        state.running -= 1;
        if self.priority != Priority::OnDemand {
            state.ahead -= 1;
            state.window.ended(self.bytes, self.began.elapsed());
        }
        drop(state);
        self.gate.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
