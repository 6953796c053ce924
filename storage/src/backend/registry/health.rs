//! Whether a mirror is worth asking.
//!
//! A mirror that failed several times in a row, or did not answer at all, is left
//! alone, so that readers do not wait for it. Those who wait for an answer of it are
//! told at once. A task finds out when it is well again: by the ping URL, if there is
//! one, and by a request for one byte of what it could not deliver.

use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, RANGE};
use tokio::sync::Notify;
use url::Url;

use super::auth::Authenticator;
use super::config::Mirror;
use super::dragonfly::{self, AgentFault};
use crate::sync::{Arc, Mutex, Weak, lock};

/// Longest wait for the answer to a ping, and for any sign of life.
const PING_LIMIT: Duration = Duration::from_secs(3);

/// A mirror without disk space is left alone for this many intervals.
const LONG: u32 = 12;

/// What a mirror did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offence {
    /// It failed, as anything may now and then.
    Failure,
    /// It did not answer at all.
    Silence,
    /// It will fail for some time.
    Lasting,
}

/// The state of one mirror.
#[derive(Debug)]
pub(super) struct Health {
    name: String,
    ping_url: Option<String>,
    interval: Duration,
    limit: u32,
    state: Mutex<State>,
    /// Whoever waits for this mirror or another one of the same registry.
    changed: Arc<Notify>,
    me: Weak<Self>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// Whether it is left alone.
    down: bool,
    /// Whether somebody is finding out if it is alive.
    checked: bool,
}

/// How to find out whether a mirror is well.
pub(super) struct Probe {
    pub(super) http: reqwest::Client,
    pub(super) headers: HeaderMap,
    /// Of a blob.
    pub(super) url: Url,
    pub(super) auth: Arc<Authenticator>,
    /// Longest wait for an answer.
    pub(super) limit: Duration,
}

impl Probe {
    /// Whether it delivers, or says for a good reason that it does not.
    async fn delivers(&self) -> bool {
        let authorization = self.auth.header().await.ok().flatten();
        let mut request = self
            .http
            .get(self.url.clone())
            .headers(self.headers.clone());
        if let Some(header) = authorization {
            request = request.header(AUTHORIZATION, header);
        }
        let request = request
            .header(RANGE, "bytes=0-0")
            .header(ACCEPT_ENCODING, "identity");
        let Ok(answer) = request.timeout(self.limit).send().await else {
            return false;
        };
        match dragonfly::fault(&answer) {
            Some(fault) => matches!(fault, AgentFault::Registry | AgentFault::Forbidden),
            None => !answer.status().is_server_error() && answer.status().as_u16() != 429,
        }
    }

    /// Whether it says anything: a closed connection is something.
    async fn answers(&self) -> bool {
        let Ok(url) = self.url.join("/v2/") else {
            return false;
        };
        let request = self.http.get(url).headers(self.headers.clone());
        match request.timeout(PING_LIMIT).send().await {
            Ok(_) => true,
            Err(error) => !error.is_timeout() && !error.is_connect(),
        }
    }

    async fn pings(&self, ping: Option<&str>) -> bool {
        let Some(ping) = ping else {
            return true;
        };
        let answer = self.http.get(ping).timeout(PING_LIMIT).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }
}

impl Health {
    /// * `changed`: is told when it is left alone.
    pub(super) fn new(mirror: &Mirror, changed: &Arc<Notify>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            name: mirror.shown_url(),
            ping_url: mirror.ping_url.clone(),
            // Never a busy loop, never beyond what a clock can add.
            interval: mirror
                .health_check_interval
                .clamp(Duration::from_millis(10), Duration::from_secs(86_400)),
            limit: mirror.failure_limit.max(1),
            state: Mutex::default(),
            changed: Arc::clone(changed),
            me: Weak::clone(me),
        })
    }

    /// Whether nothing bad is known about it.
    pub(super) fn is_well(&self) -> bool {
        !lock(&self.state).down
    }

    pub(super) fn succeeded(&self) {
        let mut state = lock(&self.state);
        state.failures = 0;
        if std::mem::take(&mut state.down) {
            tracing::info!("mirror {} is back", self.name);
        }
    }

    /// Notes what it did wrong.
    pub(super) fn failed(&self, offence: Offence, probe: Probe, reason: &str) {
        let mut state = lock(&self.state);
        state.failures = match offence {
            Offence::Failure => state.failures.saturating_add(1),
            Offence::Silence | Offence::Lasting => self.limit,
        };
        if state.failures < self.limit || state.down {
            return;
        }
        state.down = true;
        drop(state);
        tracing::warn!("mirror {} is left alone for now: {reason}", self.name);
        self.changed.notify_waiters();
        let first = match offence {
            Offence::Lasting => self.interval.saturating_mul(LONG),
            Offence::Failure | Offence::Silence => self.interval,
        };
        let (me, interval) = (Weak::clone(&self.me), self.interval);
        let ping = self.ping_url.clone();
        // Ends with the backend's runtime at the latest.
        tokio::spawn(async move {
            tokio::time::sleep(first).await;
            loop {
                let well = probe.pings(ping.as_deref()).await && probe.delivers().await;
                match me.upgrade() {
                    Some(me) if well || me.is_well() => return me.succeeded(),
                    Some(_) => {}
                    None => return,
                }
                tokio::time::sleep(interval).await;
            }
        });
    }

    /// Has somebody find out whether it is alive, if nobody does: one that accepts
    /// connections and says nothing would hold up everybody for as long as a request may
    /// take.
    pub(super) fn doubt(&self, probe: Probe) {
        let mut state = lock(&self.state);
        if state.down || std::mem::replace(&mut state.checked, true) {
            return;
        }
        drop(state);
        let me = Weak::clone(&self.me);
        tokio::spawn(async move {
            let alive = probe.answers().await;
            let Some(me) = me.upgrade() else {
                return;
            };
            lock(&me.state).checked = false;
            if !alive {
                me.failed(Offence::Silence, probe, "it does not answer");
            }
        });
    }
}
