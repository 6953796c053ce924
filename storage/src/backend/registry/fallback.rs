//! Who may go past the mirrors to the registry itself, and how often: when a whole
//! cluster's mirrors fail, all its nodes turn to one registry.

use std::time::Duration;

use tokio::time::Instant;

use crate::backend::Priority;
use crate::sync::{Mutex, lock};

/// Which requests may go to the registry itself when no mirror delivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WhoFallsBack {
    /// All.
    #[default]
    Always,
    /// What readers wait for or will probably want; not what a list asks for in advance.
    OnDemand,
    /// None.
    Never,
}

/// The way around the mirrors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Fallback {
    /// Which requests may take it.
    pub who: WhoFallsBack,
    /// Requests per second; 0 for no limit.
    pub rate: u32,
    /// Requests that may be made at once, after a time without any.
    pub burst: u32,
}

/// A [`Fallback`] in use.
#[derive(Debug)]
pub(super) struct Detour {
    settings: Fallback,
    /// Requests that may be made at this moment; below 0 for those that wait.
    left: Mutex<(f64, Instant)>,
}

impl Detour {
    pub(super) fn new(settings: Fallback) -> Self {
        let burst = f64::from(settings.burst.max(1));
        Self {
            settings,
            left: Mutex::new((burst, Instant::now())),
        }
    }

    pub(super) fn is_open_to(&self, priority: Priority) -> bool {
        match self.settings.who {
            WhoFallsBack::Always => true,
            WhoFallsBack::OnDemand => priority != Priority::Prefetch,
            WhoFallsBack::Never => false,
        }
    }

    /// Waits for a turn.
    pub(super) async fn turn(&self) {
        let wait = self.wait_at(Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Takes a turn, and says how long to wait for it.
    fn wait_at(&self, now: Instant) -> Duration {
        if self.settings.rate == 0 {
            return Duration::ZERO;
        }
        let (rate, burst) = (
            f64::from(self.settings.rate),
            f64::from(self.settings.burst.max(1)),
        );
        let mut state = lock(&self.left);
        let (left, then) = *state;
        let earned = now.saturating_duration_since(then).as_secs_f64() * rate;
        let left = (left + earned).min(burst) - 1.0;
        *state = (left, now.max(then));
        Duration::from_secs_f64((-left).max(0.0) / rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_the_rest_comes_at_the_rate() {
        let detour = Detour::new(Fallback {
            who: WhoFallsBack::OnDemand,
            rate: 10,
            burst: 3,
        });
        let now = Instant::now();
        let waits: Vec<_> = (0..6).map(|_| detour.wait_at(now).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200, 300]);
        // What was promised is paid for first, then a burst is saved up again.
        let later = now + Duration::from_secs(10);
        let waits: Vec<_> = (0..4).map(|_| detour.wait_at(later).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100]);
        assert!(detour.is_open_to(Priority::Speculation) && !detour.is_open_to(Priority::Prefetch));
    }

    #[test]
    fn without_a_rate_nobody_waits() {
        let detour = Detour::new(Fallback::default());
        let now = Instant::now();
        assert!((0..1000).all(|_| detour.wait_at(now).is_zero()));
    }
}
