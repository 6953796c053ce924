//! Whether a mirror is worth asking.
//!
//! A mirror that failed several times in a row, or did not answer at all, is left
//! alone, so that readers do not wait for it. With a ping URL a task asks that until
//! it answers; without one, a single request is let through after each interval.

use std::time::{Duration, Instant};

use super::config::Mirror;
use crate::sync::{Arc, Mutex, Weak, lock};

/// Longest wait for the answer to a ping.
const PING_LIMIT: Duration = Duration::from_secs(3);

/// The state of one mirror.
pub(super) struct Health {
    name: String,
    ping_url: Option<String>,
    interval: Duration,
    limit: u32,
    state: Mutex<State>,
    me: Weak<Self>,
}

#[derive(Default)]
struct State {
    failures: u32,
    /// Set while it is left alone: when the next request may try, if any may.
    down: Option<Option<Instant>>,
}

impl Health {
    pub(super) fn new(mirror: &Mirror) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            name: mirror.url.clone(),
            ping_url: mirror.ping_url.clone(),
            // Never a busy loop, never beyond what a clock can add.
            interval: mirror
                .health_check_interval
                .clamp(Duration::from_millis(10), Duration::from_secs(86_400)),
            limit: mirror.failure_limit.max(1),
            state: Mutex::default(),
            me: Weak::clone(me),
        })
    }

    /// Whether to ask it now.
    pub(super) fn usable(&self) -> bool {
        let mut state = lock(&self.state);
        match &mut state.down {
            None => true,
            Some(None) => false,
            Some(Some(next)) => {
                let now = Instant::now();
                let turn = *next <= now;
                if turn {
                    *next = now + self.interval;
                }
                turn
            }
        }
    }

    /// Whether nothing bad is known about it.
    pub(super) fn is_well(&self) -> bool {
        lock(&self.state).down.is_none()
    }

    pub(super) fn succeeded(&self) {
        let mut state = lock(&self.state);
        state.failures = 0;
        if state.down.take().is_some() {
            tracing::info!("mirror {} is back", self.name);
        }
    }

    /// Notes a failure.
    ///
    /// * `dead`: it did not answer at all.
    /// * `http`: sends the pings.
    pub(super) fn failed(&self, dead: bool, http: &reqwest::Client, reason: &str) {
        let mut state = lock(&self.state);
        state.failures = if dead {
            self.limit
        } else {
            state.failures.saturating_add(1)
        };
        if state.failures < self.limit || state.down.is_some() {
            return;
        }
        tracing::warn!("mirror {} is left alone for now: {reason}", self.name);
        let Some(ping) = self.ping_url.clone() else {
            state.down = Some(Some(Instant::now() + self.interval));
            return;
        };
        state.down = Some(None);
        drop(state);
        let (me, http, interval) = (Weak::clone(&self.me), http.clone(), self.interval);
        // Ends with the backend's runtime at the latest.
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(interval).await;
                let answer = http.get(&ping).timeout(PING_LIMIT).send().await;
                let well = answer.is_ok_and(|answer| answer.status().is_success());
                match me.upgrade() {
                    Some(me) if well => return me.succeeded(),
                    Some(_) => {}
                    None => return,
                }
            }
        });
    }
}
