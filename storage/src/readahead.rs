//! Readahead: what a sequential reader asks for next, fetched before it asks.
//!
//! [`Streams`] watches the ranges that readers of one blob ask for and recognises
//! those that go on where an earlier one ended. Such a reader gets a window ahead of
//! it, which doubles up to [`MAX_WINDOW`]; a random reader gets nothing. [`submit`]
//! hands the window to a few background threads, shared by all blobs of the process.
//!
//! Promises: nobody waits here: with the queue full, or another reader in the middle
//! of [`Streams::advise`], the advice is dropped; what is fetched is verified and
//! cached like anything else, at the priority of speculation; a failure is left to
//! the reader who really needs the bytes.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::backend::Priority;
use crate::blob::Blob;
use crate::sync::{Arc, Mutex, OnceLock, lock};

/// First window, in bytes.
const FIRST_WINDOW: u64 = 1 << 20;

/// Largest window, in bytes: two requests of the largest size, so that one is always
/// under way while the other is read.
pub(crate) const MAX_WINDOW: u64 = 8 << 20;

/// Requests in a row that make a reader sequential.
const RUN: u32 = 8;

/// How far a request may lie from where its stream ended, in bytes: the kernel sends
/// several at a time, which arrive in any order, and files have gaps to the next block.
const SLACK: u64 = 256 << 10;

/// Readers of one blob that are told apart.
const STREAMS: usize = 8;

/// Background threads. Each waits for one request at a time.
const THREADS: usize = 4;

/// Windows that may wait for a thread.
const QUEUE: usize = 32;

/// The sequential readers of one blob.
#[derive(Debug, Default)]
pub(crate) struct Streams(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    streams: [Stream; STREAMS],
    /// Counts requests, to find the stream that was idle longest.
    clock: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// End of the furthest request.
    next: u64,
    /// Requests in a row.
    run: u32,
    /// End of what was asked for ahead.
    ahead: u64,
    window: u64,
    used: u64,
}

impl Streams {
    /// Takes note of a request; the range to fetch ahead of it, if any.
    ///
    /// * `plain`: the bytes of the uncompressed address space that a reader wants.
    /// * `end`: of that space.
    pub(crate) fn advise(&self, plain: &Range<u64>, end: u64) -> Option<Range<u64>> {
        // Somebody else is here: the next request will do.
        let mut known = self.0.try_lock().ok()?;
        known.clock += 1;
        let clock = known.clock;
        let near = |stream: &&mut Stream| {
            stream.run > 0
                && plain.start <= stream.next.saturating_add(SLACK)
                && plain.start >= stream.next.saturating_sub(SLACK)
        };
        if let Some(stream) = known.streams.iter_mut().find(near) {
            stream.used = clock;
            return stream.advance(plain, end);
        }
        let oldest = known.streams.iter_mut().min_by_key(|stream| stream.used)?;
        *oldest = Stream {
            next: plain.end,
            run: 1,
            used: clock,
            ..Stream::default()
        };
        None
    }
}

impl Stream {
    fn advance(&mut self, plain: &Range<u64>, end: u64) -> Option<Range<u64>> {
        if plain.end <= self.next {
            // Asked for before, or late: no progress.
            return None;
        }
        self.next = plain.end;
        self.run = self.run.saturating_add(1);
        if self.run < RUN {
            return None;
        }
        // A new window when half of the last one is used up.
        if self.ahead > self.next.saturating_add(self.window / 2) {
            return None;
        }
        self.window = (self.window * 2).clamp(FIRST_WINDOW, MAX_WINDOW);
        let from = self.ahead.max(self.next);
        let to = self.next.saturating_add(self.window).min(end);
        self.ahead = to.max(self.ahead);
        (from < to).then_some(from..to)
    }
}

/// A window to be fetched.
struct Window {
    blob: Arc<Blob>,
    plain: Range<u64>,
}

/// Hands a window to the background; drops it if they are busy.
pub(crate) fn submit(blob: Arc<Blob>, plain: Range<u64>) {
    static WINDOWS: OnceLock<SyncSender<Window>> = OnceLock::new();
    let windows = WINDOWS.get_or_init(start);
    // Full, or no thread could be started: reading works without.
    let _ = windows.try_send(Window { blob, plain });
}

fn start() -> SyncSender<Window> {
    let (sender, receiver) = sync_channel(QUEUE);
    let receiver = Arc::new(Mutex::new(receiver));
    for _ in 0..THREADS {
        let receiver = Arc::clone(&receiver);
        let thread = std::thread::Builder::new().name("readahead".to_owned());
        if let Err(error) = thread.spawn(move || work(&receiver)) {
            tracing::warn!("cannot start a thread for readahead: {error}");
        }
    }
    sender
}

fn work(windows: &Mutex<Receiver<Window>>) {
    loop {
        // Held while waiting: the others queue for the lock instead of the channel.
        let Ok(Window { blob, plain }) = lock(windows).recv() else {
            return;
        };
        if let Err(error) = blob.ensure(plain.clone(), Priority::Speculation) {
            tracing::debug!("readahead of {plain:?} of {}: {error}", blob.info().id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u64 = 1 << 30;
    const STEP: u64 = 128 << 10;

    #[test]
    fn a_sequential_reader_is_kept_ahead_of() {
        let streams = Streams::default();
        let (mut fetched, mut largest) = (0, 0);
        for number in 0..800 {
            let at = number * STEP;
            if number > u64::from(RUN) {
                assert!(fetched > at, "request {number} was not fetched before");
            }
            if let Some(window) = streams.advise(&(at..at + STEP), END) {
                assert!(window.start >= at + STEP && window.start >= fetched);
                assert!(window.end - (at + STEP) <= MAX_WINDOW);
                // Without gaps, after the first.
                assert!(fetched == 0 || window.start == fetched);
                largest = largest.max(window.end - window.start);
                fetched = window.end;
            }
        }
        assert!(largest >= 4 << 20, "{largest}");
    }

    #[test]
    fn requests_out_of_order_are_one_stream() {
        let streams = Streams::default();
        let order = [0, 2, 1, 4, 3, 5, 7, 6, 8, 10, 9, 12, 11, 13];
        let windows = order
            .iter()
            .filter_map(|number| streams.advise(&(number * STEP..(number + 1) * STEP), END));
        assert!(windows.count() >= 1);
    }

    #[test]
    fn a_random_reader_gets_nothing() {
        let streams = Streams::default();
        let mut at = 1_u64;
        for _ in 0..1000 {
            at = at
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695);
            let start = ((at >> 20) % (1 << 40)) & !4095;
            assert_eq!(streams.advise(&(start..start + 4096), 1 << 41), None);
        }
    }

    #[test]
    fn the_end_is_the_end() {
        let streams = Streams::default();
        for number in 0..4 {
            let window = streams.advise(&(number * STEP..(number + 1) * STEP), 5 * STEP);
            assert!(window.is_none_or(|window| window.end == 5 * STEP));
        }
        assert_eq!(streams.advise(&(4 * STEP..5 * STEP), 5 * STEP), None);
    }

    #[test]
    fn readers_side_by_side_are_told_apart() {
        let streams = Streams::default();
        let mut windows = [0; 4];
        for number in 0..16 {
            for (reader, count) in (0_u64..).zip(&mut windows) {
                let at = (reader << 28) + number * STEP;
                *count += u32::from(streams.advise(&(at..at + STEP), END).is_some());
            }
        }
        assert!(windows.iter().all(|count| *count > 0), "{windows:?}");
    }
}
