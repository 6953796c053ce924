//! Readers that are killed while their data is on the way.
//!
//! A read that the kernel does not buffer (`O_DIRECT`, and a few paths of `mmap`)
//! cannot be abandoned by its reader: a process that is killed stays until the
//! request has been answered, which can take as long as a server is patient. The
//! kernel sends INTERRUPT once, for the first signal of any kind, and nothing
//! when a deadly one follows. So a request that was interrupted is *watched*: as
//! soon as its reader is being killed, it is answered with `EINTR`. For a reader
//! that lives on (a timer, a `SIGSTOP`, the signals that runtimes send to their
//! threads) the answer is the data; a page fault would turn an error into a crash.
//!
//! The fetch itself goes on: others may wait for the same chunk.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often watched readers are looked at. Nobody waits for it but the dying.
pub(super) const PERIOD: Duration = Duration::from_millis(100);
/// `SIGKILL` in the mask that `proc_pid_status(5)` prints.
const KILL: u64 = 1 << (libc::SIGKILL - 1);

/// The requests that wait for data, by the kernel's number of the request.
#[derive(Debug, Default)]
pub(super) struct Waiting(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    requests: HashMap<u64, Waiter>,
    /// A thread calls [`Waiting::dying`] every [`PERIOD`].
    watched: bool,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    /// Thread that reads, in our process namespace; 0 if it is in none we see.
    thread: u32,
    interrupted: bool,
}

/// What an INTERRUPT asks us to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupted {
    /// Not known yet, or not any more: the kernel knows which, and may send it again.
    Unknown,
    /// Watched, by a thread that has to be started.
    Watch,
    /// Watched, by the thread that exists.
    Watched,
}

impl Waiting {
    /// The request will be answered by whoever [`Waiting::take`]s it.
    pub(super) fn insert(&self, unique: u64, thread: u32) {
        let interrupted = false;
        let waiter = Waiter {
            thread,
            interrupted,
        };
        self.lock().requests.insert(unique, waiter);
    }

    /// Whether anybody still waits for the answer.
    pub(super) fn contains(&self, unique: u64) -> bool {
        self.lock().requests.contains_key(&unique)
    }

    /// Whether the request still has to be answered; asked once, by the one who will.
    pub(super) fn take(&self, unique: u64) -> bool {
        self.lock().requests.remove(&unique).is_some()
    }

    /// Notes that the reader of `unique` got a signal.
    pub(super) fn interrupt(&self, unique: u64) -> Interrupted {
        let mut state = self.lock();
        let Some(waiter) = state.requests.get_mut(&unique) else {
            return Interrupted::Unknown;
        };
        waiter.interrupted = true;
        if std::mem::replace(&mut state.watched, true) {
            Interrupted::Watched
        } else {
            Interrupted::Watch
        }
    }

    /// Takes the requests whose readers are being killed. `None`: nobody is left to
    /// watch, and the thread that watches has to end.
    pub(super) fn dying(&self) -> Option<Vec<u64>> {
        let mut state = self.lock();
        let interrupted = |waiter: &Waiter| waiter.interrupted;
        state.watched = state.requests.values().any(interrupted);
        if !state.watched {
            return None;
        }
        let dying = state
            .requests
            .extract_if(|_, waiter| waiter.interrupted && is_dying(waiter.thread))
            .map(|(unique, _)| unique)
            .collect();
        Some(dying)
    }

    /// The thread that should watch does not exist.
    pub(super) fn unwatched(&self) {
        self.lock().watched = false;
    }

    /// The state is valid whatever a panicking thread did.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a thread has `SIGKILL` pending, as every thread of a process has that a
/// deadly signal reached.
fn is_dying(thread: u32) -> bool {
    if thread == 0 {
        return false;
    }
    std::fs::read_to_string(format!("/proc/{thread}/status"))
        .is_ok_and(|status| pending(&status) & KILL != 0)
}

/// The signals that wait for a thread, from the text of its `status` file.
fn pending(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigPnd:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_of_signals() {
        assert_eq!(pending("Name:\tx\nSigPnd:\t0000000000000100\n"), KILL);
        assert_eq!(pending("SigPnd:\tnonsense"), 0);
        assert_eq!(pending(""), 0);
        assert!(!is_dying(std::process::id()));
        assert!(!is_dying(0));
    }

    #[test]
    fn a_request_is_answered_once() {
        let waiting = Waiting::default();
        assert_eq!(waiting.interrupt(7), Interrupted::Unknown);
        waiting.insert(7, 0);
        assert_eq!(waiting.interrupt(7), Interrupted::Watch);
        assert_eq!(waiting.interrupt(7), Interrupted::Watched);
        assert_eq!(waiting.dying(), Some(Vec::new()));
        assert!(waiting.take(7));
        assert!(!waiting.take(7));
        assert_eq!(waiting.dying(), None, "nobody is watched any more");
        waiting.insert(8, 0);
        assert_eq!(waiting.interrupt(8), Interrupted::Watch);
    }
}
