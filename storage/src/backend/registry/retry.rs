//! Which failures are worth another attempt, and when it is made.
//!
//! A server that names a time to come back ([`Again::After`]) means all of us, so nobody
//! asks it until then ([`Pause`]).

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::time::Duration;

use tokio::time::Instant;

use crate::backend::BackendError;
use crate::metrics::{Metrics, add};
use crate::sync::{Mutex, lock};

/// How often and when to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryLimits {
    /// Attempts after the first that may bring nothing new; an attempt that
    /// delivered some bytes starts the count anew.
    pub retries: u32,
    /// Longest wait before the first retry; doubles with each. The wait is random
    /// up to that, so that many nodes do not come back at once.
    pub first_delay: Duration,
    /// Longest wait, whatever the number of retries.
    pub max_delay: Duration,
    /// Longest `Retry-After` that is honoured; a longer one is cut to this.
    pub max_retry_after: Duration,
}

impl Default for RetryLimits {
    fn default() -> Self {
        Self {
            retries: 5,
            first_delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(5),
            max_retry_after: Duration::from_secs(30),
        }
    }
}

/// Whether another attempt makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) enum Again {
    /// The answer will be the same.
    Never,
    /// After a while.
    Later,
    /// After the time that the server named.
    After(Duration),
}

/// An attempt that failed.
#[derive(Debug)]
pub(in crate::backend) struct Failure {
    pub(in crate::backend) error: BackendError,
    pub(in crate::backend) again: Again,
}

impl Failure {
    pub(in crate::backend) fn never(error: BackendError) -> Self {
        Self {
            error,
            again: Again::Never,
        }
    }

    pub(in crate::backend) fn later(error: BackendError) -> Self {
        Self {
            error,
            again: Again::Later,
        }
    }
}

/// The time until which a server wants to be left alone.
#[derive(Debug, Default)]
pub(in crate::backend) struct Pause(Mutex<Option<Instant>>);

impl Pause {
    /// Notes what an answer said; an earlier answer that asked for more still counts.
    pub(in crate::backend) fn heed(&self, failure: &Failure, limits: &RetryLimits) {
        let Again::After(time) = failure.again else {
            return;
        };
        let until = Instant::now().checked_add(time.min(limits.max_retry_after));
        let mut pause = lock(&self.0);
        *pause = (*pause).max(until);
    }

    /// Waits for its end, and a little longer: all that wait should not come at once.
    pub(in crate::backend) async fn over(&self, limits: &RetryLimits) {
        loop {
            let until = *lock(&self.0);
            match until.filter(|until| *until > Instant::now()) {
                None => return,
                Some(until) => {
                    tokio::time::sleep_until(until + jitter(limits.first_delay)).await;
                }
            }
        }
    }
}

/// The attempts of one fetch.
pub(in crate::backend) struct Attempts<'a> {
    limits: &'a RetryLimits,
    metrics: &'a Metrics,
    start: Instant,
    /// When to give up at the latest.
    pub(in crate::backend) deadline: Instant,
    made: u32,
    /// Failures since the last progress.
    fruitless: u32,
}

impl<'a> Attempts<'a> {
    pub(in crate::backend) fn new(
        limits: &'a RetryLimits,
        metrics: &'a Metrics,
        total: Duration,
    ) -> Self {
        let start = Instant::now();
        Self {
            limits,
            metrics,
            start,
            // Far enough in the future if somebody asked for eternity.
            deadline: start
                .checked_add(total)
                .unwrap_or(start + Duration::from_secs(86_400)),
            made: 0,
            fruitless: 0,
        }
    }

    /// Waits before the next attempt.
    ///
    /// # Errors
    /// The failure itself if it is final, else [`BackendError::GaveUp`] once there
    /// were too many, or the next attempt would be too late.
    pub(in crate::backend) async fn after(
        &mut self,
        failure: Failure,
        progress: bool,
    ) -> Result<(), BackendError> {
        self.made += 1;
        self.fruitless = if progress { 1 } else { self.fruitless + 1 };
        let delay = match failure.again {
            Again::Never => return Err(failure.error),
            Again::Later => jitter(self.backoff()),
            // A little more, or all that were turned away come at the same moment.
            Again::After(time) => {
                time.min(self.limits.max_retry_after) + jitter(self.limits.first_delay)
            }
        };
        let next = Instant::now() + delay;
        if self.fruitless > self.limits.retries || next >= self.deadline {
            return Err(self.gave_up(failure.error));
        }
        tracing::debug!(error = %failure.error, attempt = self.made, ?delay, "trying again");
        add(&self.metrics.retries, 1);
        tokio::time::sleep_until(next).await;
        Ok(())
    }

    fn backoff(&self) -> Duration {
        let doublings = self.fruitless.saturating_sub(1).min(20);
        let delay = self.limits.first_delay.saturating_mul(1 << doublings);
        delay.min(self.limits.max_delay)
    }

    pub(in crate::backend) fn gave_up(&self, error: BackendError) -> BackendError {
        BackendError::GaveUp {
            attempts: self.made.max(1),
            elapsed: self.start.elapsed(),
            source: Box::new(error),
        }
    }
}

/// Between half of `limit` and all of it.
fn jitter(limit: Duration) -> Duration {
    // Each new state is seeded by the system's randomness; nothing here is secret.
    let random = RandomState::new().build_hasher().finish() % 1024;
    let part = u32::try_from(random).unwrap_or(0);
    limit / 2 + limit.saturating_mul(part) / 2048
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_limit_and_differ() {
        let (limits, metrics) = (RetryLimits::default(), Metrics::default());
        let mut attempts = Attempts::new(&limits, &metrics, Duration::from_secs(1));
        let delays: Vec<_> = (1..12)
            .map(|n| {
                attempts.fruitless = n;
                attempts.backoff()
            })
            .collect();
        assert_eq!(delays[0], limits.first_delay);
        assert_eq!(delays[1], limits.first_delay * 2);
        assert_eq!(delays[10], limits.max_delay);
        let jitters: std::collections::HashSet<_> =
            (0..50).map(|_| jitter(Duration::from_secs(1))).collect();
        assert!(jitters.len() > 10);
        assert!(
            jitters
                .iter()
                .all(|d| (500..=1000).contains(&d.as_millis()))
        );
    }
}
