//! Prefetch: a list of ranges made resident in the background, in its order.
//!
//! [`Prefetch::start`] cuts the ranges into steps and lets a few threads work through
//! them with [`Blob::ensure`], at the priority of prefetching. A reader who needs a
//! chunk that is not on its way yet fetches it himself, so he waits for one step at most.
//!
//! Promises: memory for the list alone; a step that fails is tried again after a pause
//! and given up after `ATTEMPTS`; a paused or stopped prefetch ends its running steps
//! and begins no other, and so does one whose cache has no room; a closed blob ends those of its steps that are left.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::backend::Priority;
use crate::blob::Blob;
use crate::error::ReadError;
use crate::metrics::{Metrics, add};
use crate::sync::{Arc, AtomicU64, Condvar, Mutex, Ordering, Weak, lock, wait};

/// Attempts for each step.
const ATTEMPTS: u32 = 5;

/// Pause before a failed step is tried again; doubles with every attempt.
const PAUSE: Duration = Duration::from_secs(1);

/// Time between two lines about the progress.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Longest sleep of a thread that waits, so that it hears of the end without a signal.
const POLL: Duration = Duration::from_millis(500);

/// How to prefetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Steps at a time; at least 1.
    pub threads: usize,
    /// Length of a step, in bytes of the uncompressed address space.
    pub step: u64,
    /// Limit in bytes of stored blobs per second; 0 for none.
    pub bandwidth: u64,
}

impl Default for Settings {
    /// Short steps, since readers may wait for them, and so many that even small files keep
    /// the link busy: how many bytes are on their way is up to the [`gate`](crate::gate).
    fn default() -> Self {
        Self {
            threads: 16,
            step: 1 << 20,
            bandwidth: 0,
        }
    }
}

/// How far a prefetch has come, in bytes of uncompressed address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// All of it.
    pub total: u64,
    /// Resident now.
    pub done: u64,
    /// Given up.
    pub failed: u64,
}

impl Progress {
    /// Whether nothing is left to do.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.done + self.failed >= self.total
    }
}

/// A running prefetch; stops when dropped.
#[derive(Debug)]
pub struct Prefetch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    settings: Settings,
    /// Of the image that is prefetched.
    metrics: Arc<Metrics>,
    total: u64,
    done: AtomicU64,
    failed: AtomicU64,
    began: Instant,
    work: Mutex<Work>,
    changed: Condvar,
}

#[derive(Debug)]
struct Work {
    steps: VecDeque<Step>,
    state: State,
    /// Until when the bandwidth is used up.
    free_at: Instant,
    /// When progress was logged last.
    logged: Instant,
    /// Whether the cache had no room when somebody looked.
    no_room: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    Stopped,
}

#[derive(Debug)]
struct Step {
    blob: Arc<Blob>,
    plain: Range<u64>,
    attempts: u32,
    not_before: Option<Instant>,
}

impl Step {
    fn len(&self) -> u64 {
        self.plain.end - self.plain.start
    }

    /// About what it weighs on the link.
    fn stored_len(&self) -> u64 {
        let info = self.blob.info();
        let scaled = u128::from(self.len()) * u128::from(info.compressed_size)
            / u128::from(info.uncompressed_size.max(1));
        u64::try_from(scaled).unwrap_or(u64::MAX)
    }
}

impl Prefetch {
    /// Starts to fetch `ranges`, each in the uncompressed address space of its blob.
    ///
    /// If a thread cannot be started the others do its work; without any, nothing is
    /// prefetched, which is logged.
    #[must_use]
    pub fn start(
        ranges: impl IntoIterator<Item = (Arc<Blob>, Range<u64>)>,
        settings: Settings,
    ) -> Self {
        let began = Instant::now();
        let mut steps = VecDeque::new();
        for (blob, plain) in ranges {
            cut(&mut steps, &blob, &plain, settings.step.max(4096));
        }
        announce(&steps);
        let total = steps.iter().map(Step::len).sum();
        let metrics = steps.front().map(|step| Arc::clone(step.blob.metrics()));
        let metrics = metrics.unwrap_or_default();
        metrics.prefetch_total.store(total, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            settings,
            metrics,
            total,
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            began,
            work: Mutex::new(Work {
                steps,
                state: State::Running,
                free_at: began,
                logged: began,
                no_room: false,
            }),
            changed: Condvar::new(),
        });
        let threads = settings
            .threads
            .clamp(1, lock(&shared.work).steps.len().max(1));
        for _ in 0..threads {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("prefetch".to_owned());
            if let Err(error) = thread.spawn(move || shared.work()) {
                tracing::warn!("cannot start a thread for prefetching: {error}");
            }
        }
        Self(shared)
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.0.progress()
    }

    /// For those who want to know when it has ended.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch(Arc::downgrade(&self.0))
    }

    /// Begins no further steps until [`Prefetch::resume`]. May be called at any time.
    pub fn pause(&self) {
        self.0.change(State::Running, State::Paused);
    }

    /// Whether no step is begun at the moment: paused, or the cache has no room.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.0.is_held()
    }

    /// Goes on after [`Prefetch::pause`].
    pub fn resume(&self) {
        self.0.change(State::Paused, State::Running);
    }
}

/// Looks at a prefetch without keeping it.
#[derive(Clone, Debug)]
pub struct Watch(Weak<Shared>);

impl Watch {
    /// Whether steps are left and being worked on.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.0
            .upgrade()
            .is_some_and(|shared| !shared.progress().is_over() && !shared.is_held())
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        lock(&self.0.work).state = State::Stopped;
        self.0.changed.notify_all();
    }
}

/// Tells those who deliver which blobs they will be asked for most of.
fn announce(steps: &VecDeque<Step>) {
    let mut wanted = HashMap::new();
    for step in steps {
        let (_, len) = wanted
            .entry(step.blob.info().id.clone())
            .or_insert_with(|| (Arc::clone(&step.blob), 0_u64));
        *len = len.saturating_add(step.stored_len());
    }
    for (blob, len) in wanted.values() {
        if *len > blob.info().compressed_size / 2 {
            blob.will_be_read_whole();
        }
    }
}

/// Cuts a range into steps that begin at multiples of their length, so that two ranges
/// do not cut a chunk in two.
fn cut(steps: &mut VecDeque<Step>, blob: &Arc<Blob>, plain: &Range<u64>, len: u64) {
    let end = plain.end.min(blob.info().uncompressed_size);
    let mut start = plain.start;
    while start < end {
        let border = (start / len).saturating_add(1).saturating_mul(len);
        let step = start..border.min(end);
        start = step.end;
        steps.push_back(Step {
            blob: Arc::clone(blob),
            plain: step,
            attempts: 0,
            not_before: None,
        });
    }
}

impl Shared {
    fn is_held(&self) -> bool {
        let work = lock(&self.work);
        work.state != State::Running || work.no_room
    }

    fn progress(&self) -> Progress {
        Progress {
            total: self.total,
            done: self.done.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    fn change(&self, from: State, to: State) {
        let mut work = lock(&self.work);
        if work.state == from {
            work.state = to;
            let held = u64::from(to == State::Paused || work.no_room);
            self.metrics.prefetch_held.store(held, Ordering::Relaxed);
        }
        drop(work);
        self.changed.notify_all();
    }

    fn work(&self) {
        while let Some(step) = self.next() {
            let result = step.blob.ensure(step.plain.clone(), Priority::Prefetch);
            self.finish(step, result);
        }
    }

    /// The next step when its time has come; `None` at the end.
    fn next(&self) -> Option<Step> {
        let mut work = lock(&self.work);
        loop {
            let now = Instant::now();
            let state = work.state;
            let pause = match state {
                State::Stopped => return None,
                State::Paused => POLL,
                State::Running if self.progress().is_over() => return None,
                State::Running if work.free_at > now => work.free_at - now,
                State::Running if self.has_no_room(&mut work) => POLL,
                State::Running => {
                    let is_due = |step: &Step| step.not_before.is_none_or(|time| time <= now);
                    let due = work.steps.iter().position(is_due);
                    if let Some(step) = due.and_then(|index| work.steps.remove(index)) {
                        work.free_at = now + self.time_for(&step);
                        return Some(step);
                    }
                    // Others may fail and come back.
                    POLL
                }
            };
            work = wait(&self.changed, work, pause.min(POLL));
        }
    }

    /// Whether the cache is full of what is in use. Looks again every time.
    fn has_no_room(&self, work: &mut Work) -> bool {
        let no_room = work.steps.front().is_some_and(|step| !step.blob.has_room());
        if no_room != work.no_room {
            work.no_room = no_room;
            self.metrics
                .prefetch_held
                .store(no_room.into(), Ordering::Relaxed);
            if no_room {
                tracing::warn!("prefetch waits: the cache has no room for more");
            } else {
                tracing::info!("prefetch goes on: the cache has room again");
            }
        }
        no_room
    }

    /// How long a step takes at the limit of the bandwidth.
    fn time_for(&self, step: &Step) -> Duration {
        let nanoseconds = u128::from(step.stored_len()) * 1_000_000_000;
        let time = nanoseconds.checked_div(self.settings.bandwidth.into());
        Duration::from_nanos(time.map_or(0, |time| u64::try_from(time).unwrap_or(u64::MAX)))
    }

    fn finish(&self, mut step: Step, result: Result<(), ReadError>) {
        match result {
            Ok(()) => {
                self.done.fetch_add(step.len(), Ordering::Relaxed);
                add(&self.metrics.prefetch_done, step.len());
            }
            Err(error) => {
                step.attempts += 1;
                let blob = &step.blob.info().id;
                let is_last =
                    step.attempts == ATTEMPTS || matches!(error, ReadError::Stopped { .. });
                if is_last {
                    tracing::warn!("prefetch of {:?} of {blob} given up: {error}", step.plain);
                    self.failed.fetch_add(step.len(), Ordering::Relaxed);
                    add(&self.metrics.prefetch_failed, step.len());
                } else {
                    tracing::debug!("prefetch of {:?} of {blob}: {error}", step.plain);
                    let pause = PAUSE * 2_u32.saturating_pow(step.attempts - 1);
                    step.not_before = Some(Instant::now() + pause);
                    lock(&self.work).steps.push_back(step);
                    return;
                }
            }
        }
        let progress = self.progress();
        if progress.is_over() {
            self.changed.notify_all();
            let Progress { done, failed, .. } = progress;
            let elapsed = self.began.elapsed().as_secs_f64();
            tracing::info!("prefetch: {done} bytes resident, {failed} given up, {elapsed:.2} s");
            return;
        }
        let mut work = lock(&self.work);
        if work.logged.elapsed() >= LOG_EVERY {
            work.logged = Instant::now();
            drop(work);
            let Progress { total, done, .. } = progress;
            tracing::info!("prefetch: {done} of {total} bytes resident");
        }
    }
}
