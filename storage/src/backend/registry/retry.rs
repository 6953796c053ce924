//! When to try again, and when to give up.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::BackendError;
use super::response::Failure;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A server may ask for more patience than we would have, up to this.
const LONGEST_ASKED: Duration = Duration::from_secs(30);
/// A reader is blocked all this time.
const DEADLINE: Duration = Duration::from_secs(60);

/// Counts attempts and the pauses between them.
#[derive(Debug)]
pub(super) struct Backoff {
    limit: u32,
    attempts: u32,
    in_a_row: u32,
    started: Instant,
}

impl Backoff {
    /// Allows `limit` further attempts after the first.
    pub(super) fn new(limit: u32) -> Self {
        Self {
            limit,
            attempts: 0,
            in_a_row: 0,
            started: Instant::now(),
        }
    }

    /// Something was achieved: count the failures anew.
    pub(super) fn restart(&mut self) {
        self.in_a_row = 0;
        self.started = Instant::now();
    }

    /// Waits before the next attempt.
    ///
    /// # Errors
    /// The failure, if another attempt is pointless or not allowed.
    pub(super) async fn pause(&mut self, failure: Failure) -> Result<(), BackendError> {
        self.attempts += 1;
        self.in_a_row += 1;
        let Failure {
            error,
            passing,
            pause,
        } = failure;
        if !passing {
            return Err(error);
        }
        let asked = pause.map(|pause| pause.min(LONGEST_ASKED));
        let pause = asked.unwrap_or_else(|| jittered(exponential(self.in_a_row)));
        let elapsed = self.started.elapsed();
        if self.in_a_row > self.limit || elapsed + pause > DEADLINE {
            return Err(BackendError::GaveUp {
                attempts: self.attempts,
                elapsed,
                source: Box::new(error),
            });
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// Doubles with every failure, up to the longest pause.
fn exponential(failures: u32) -> Duration {
    let factor = 1_u32
        .checked_shl(failures.saturating_sub(1))
        .unwrap_or(u32::MAX);
    FIRST_PAUSE.saturating_mul(factor).min(LONGEST_PAUSE)
}

/// Between half and all of `pause`, so that clients which failed together do
/// not come back together.
fn jittered(pause: Duration) -> Duration {
    // The clock's nanoseconds are random enough for this.
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos());
    pause / 2 + (pause / 2).mul_f64(f64::from(nanos % 1024) / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_are_spread() {
        assert_eq!(exponential(1), FIRST_PAUSE);
        assert_eq!(exponential(3), FIRST_PAUSE * 4);
        assert_eq!(exponential(4_000_000), LONGEST_PAUSE);
        for _ in 0..100 {
            let pause = jittered(FIRST_PAUSE);
            assert!(pause >= FIRST_PAUSE / 2 && pause <= FIRST_PAUSE);
        }
    }
}
