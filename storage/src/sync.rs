//! Locks and atomics of the data path, in one place.
//!
//! Everything that [`fill`](crate::fill) and [`ready_map`](crate::ready_map)
//! synchronise with comes from here, so that a model checker can be put in place
//! of the standard library by changing this file only.
//!
//! Promise: a lock whose holder panicked stays usable. Critical sections of this
//! crate are a few lines over plain data that is valid after every statement, and
//! a reader must not fail because another one did.

pub use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, AtomicUsize, Ordering};
pub use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use std::time::Duration;

/// Takes a lock, whether or not an earlier holder panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification for at most `timeout`; may return early.
pub(crate) fn wait<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
) -> MutexGuard<'a, T> {
    match condvar.wait_timeout(guard, timeout) {
        Ok((guard, _)) => guard,
        Err(poisoned) => poisoned.into_inner().0,
    }
}
