//! Which server is asked for the bytes of a blob: mirrors that are well, in their order;
//! the registry itself, where that is allowed; and then, if it does not answer, mirrors
//! that are left alone.

use std::time::Duration;

use reqwest::Method;

use super::Client;
use super::answer::{self, chain, public_name};
use super::config::Timeouts;
use super::dragonfly::AgentFault;
use super::endpoint::Endpoint;
use super::health::Offence;
use super::hedge::{Latency, Manner, Route, UNKNOWN};
use super::retry::{Attempts, Failure, Pause, RetryLimits};
use super::transfer::{Source, stream};
use crate::backend::bridge::Output;
use crate::backend::{BackendError, Priority, ServedBy};
use crate::blob_id::BlobId;
use crate::metrics::{Metrics, add};
use crate::sync::{AtomicI64, Ordering};

/// Bytes that readers may fetch from the registry beside what an agent of Dragonfly is
/// fetching for them: at first, and for each byte that agents delivered (one in so many).
/// Each node of a large cluster does so, and the registry sends each of these bytes twice.
const DETOUR_ADVANCE: i64 = 256 << 10;
const DETOUR_SHARE: u64 = 50;

/// How long a reader waits for a piece that may be new to an agent of Dragonfly.
const NEW_PIECE: Duration = Duration::from_millis(150);

/// After this time a piece does not come because something is broken, and not because it is
/// new: whatever it costs, the registry is asked.
pub(super) const LOST_PIECE: Duration = Duration::from_secs(5);

/// A request that takes this long makes its agent suspicious.
const DOUBTFUL: Duration = Duration::from_secs(1);

/// Most of these bytes that may be saved up.
const DETOUR_MOST: i64 = 2 << 20;

/// The bytes that may be fetched twice so that nobody waits for a slow agent.
#[derive(Debug)]
pub(super) struct Allowance(AtomicI64);

impl Default for Allowance {
    fn default() -> Self {
        Self(AtomicI64::new(DETOUR_ADVANCE))
    }
}

impl Allowance {
    fn earn(&self, delivered: u64) {
        let part = i64::try_from(delivered / DETOUR_SHARE).unwrap_or(DETOUR_MOST);
        let sum = self
            .0
            .fetch_add(part, Ordering::Relaxed)
            .saturating_add(part);
        if sum > DETOUR_MOST {
            self.0.fetch_min(DETOUR_MOST, Ordering::Relaxed);
        }
    }

    fn spend(&self, len: u64) -> bool {
        let len = i64::try_from(len).unwrap_or(i64::MAX);
        let spend = |left: i64| left.checked_sub(len).filter(|left| *left >= 0);
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        self.0.fetch_update(set, fetch, spend).is_ok()
    }
}

impl Source for Client {
    async fn attempt(
        &self,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        route: &Route,
        out: &Output,
    ) -> Result<(), Failure> {
        let mut refusal = None;
        if !route.manner.direct {
            for (number, mirror) in self.in_order(blob, *at) {
                if !mirror.is_well() || mirror.distrust.covers(blob, &(*at..end)) {
                    continue;
                }
                if !route.takes(number) {
                    continue;
                }
                match self
                    .ask_mirror((number, mirror), blob, at, end, (route, out))
                    .await
                {
                    Ok(()) => return Ok(()),
                    Err(failure) => refusal = Some(self.mirror_failed(mirror, blob, failure)?),
                }
            }
        }
        let has_mirrors = !self.mirrors.is_empty();
        // There is nothing beyond it.
        if !route.takes_last(self.mirrors.len()) {
            return Err(Failure::never(BackendError::Stopped));
        }
        let allowed =
            !has_mirrors || route.manner.direct || self.detour.is_open_to(route.manner.priority);
        let failure = if allowed {
            if has_mirrors && !route.is_second() {
                add(&self.metrics.fallbacks, 1);
                self.detour.turn().await;
            }
            let asked = (at.to_owned()..end, route.manner);
            match self.attempt_at(&self.origin, blob, at, asked, out).await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            }
        } else {
            Failure::later(BackendError::NoDetour {
                url: self.name(blob),
                source: refusal.map(Box::new),
            })
        };
        if route.manner.direct || matches!(failure.error, BackendError::Stopped) {
            return Err(failure);
        }
        self.ask_the_sick(blob, at, end, (route, out), failure)
            .await
    }

    /// Length of a blob: by HEAD, or where that is refused by asking for one byte.
    async fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        let mut attempts = Attempts::new(&self.retry, &self.metrics, self.timeouts.total);
        let deadline = attempts.deadline;
        let work = async {
            loop {
                let failure = match self.size_once(blob).await {
                    Ok(size) => return Ok(size),
                    Err(failure) => failure,
                };
                attempts.after(failure, false).await?;
            }
        };
        match tokio::time::timeout_at(deadline, work).await {
            Ok(result) => result,
            Err(_elapsed) => Err(BackendError::Transport {
                url: format!("{}sha256:{blob}", self.origin.base),
                action: "asking for the length of a blob",
                source: format!("no answer in {:?}", self.timeouts.total).into(),
            }),
        }
    }

    fn name(&self, blob: &BlobId) -> String {
        format!("{}sha256:{blob}", self.origin.base)
    }

    fn limits(&self) -> (&RetryLimits, &Timeouts, &Metrics) {
        (&self.retry, &self.timeouts, &self.metrics)
    }

    fn latency(&self) -> &Latency {
        &self.latency
    }

    fn pause(&self) -> &Pause {
        &self.pause
    }

    fn has_others(&self) -> bool {
        self.mirrors.iter().any(Endpoint::is_well)
    }

    /// How long an agent of Dragonfly needs for a piece that it has says nothing about
    /// one that is new to it; the registry delivers a few chunks sooner.
    fn patience(&self) -> Duration {
        let first = self.mirrors.iter().find(|mirror| mirror.is_well());
        match first {
            Some(mirror) if mirror.is_dragonfly() => {
                self.latency.patience(NEW_PIECE).min(NEW_PIECE)
            }
            _ => self.latency.patience(UNKNOWN),
        }
    }

    /// An agent that is well may wait for another one that is not.
    fn last_patience(&self, route: &Route) -> Option<Duration> {
        let agent = self.mirrors.get(route.asked())?;
        let open = agent.is_dragonfly() && self.detour.is_open_to(route.manner.priority);
        open.then_some(LOST_PIECE)
    }

    /// Is it only slow, or dead? What waits for it goes on at once if it is.
    fn doubt(&self, blob: &BlobId, route: &Route) {
        let agent = self.mirrors.get(route.asked());
        if let Some(agent) = agent.filter(|agent| agent.is_dragonfly())
            && let (Some(health), Some(probe)) = (&agent.health, agent.probe(blob))
        {
            health.doubt(probe);
        }
    }

    /// Beside an agent of Dragonfly it is bytes that count: a piece that takes long costs
    /// the registry 4 MiB already.
    fn may_hedge(&self, route: &Route, len: u64) -> bool {
        let mirror = self.mirrors.get(route.asked());
        if !mirror.is_some_and(Endpoint::is_dragonfly) {
            return self.latency.spend();
        }
        self.detour.is_open_to(route.manner.priority) && self.allowance.spend(len)
    }

    async fn hopeless(&self, route: &Route) {
        loop {
            // Before the look: what changes between the two is not missed.
            let changed = self.changed.notified();
            match self.mirrors.get(route.asked()) {
                Some(mirror) if !mirror.is_well() => return,
                Some(_) => changed.await,
                None => std::future::pending().await,
            }
        }
    }

    /// A mirror that is often slow is left alone like one that fails. An agent of
    /// Dragonfly may be slow because the piece is new to the network; what it fetches
    /// serves the next reader, here or elsewhere.
    fn lost(&self, blob: &BlobId, route: &Route) -> bool {
        let Some(mirror) = self.mirrors.get(route.asked()) else {
            return false;
        };
        let (Some(health), Some(probe)) = (&mirror.health, mirror.probe(blob)) else {
            return false;
        };
        if mirror.is_dragonfly() {
            return true;
        }
        health.failed(Offence::Failure, probe, "another source was faster");
        false
    }
}

impl Client {
    /// Bytes that `served_by` delivered were wrong.
    pub(super) fn distrust(
        &self,
        blob: &BlobId,
        range: &std::ops::Range<u64>,
        served_by: &ServedBy,
    ) {
        for (number, mirror) in self.mirrors.iter().enumerate() {
            if !served_by.has_mirror(number) {
                continue;
            }
            add(&self.metrics.mirror_wrong_bytes, 1);
            mirror.distrust.add(blob, range);
            let host = mirror.base.origin().ascii_serialization();
            tracing::error!(
                "mirror {host} delivered wrong bytes for {range:?} of blob {blob}; \
                 it is not asked for them for some time"
            );
            if let (Some(health), Some(probe)) = (&mirror.health, mirror.probe(blob)) {
                health.failed(Offence::Failure, probe, "it delivers wrong bytes");
            }
        }
    }

    /// The registry could not be asked, or did not answer: whoever has the bytes is
    /// welcome, even if he was of no use lately.
    async fn ask_the_sick(
        &self,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        (route, out): (&Route, &Output),
        failure: Failure,
    ) -> Result<(), Failure> {
        let vain = match &failure.error {
            BackendError::Transport { .. } | BackendError::NoDetour { .. } => true,
            BackendError::Status { status, .. } => *status >= 500 || *status == 429,
            _ => false,
        };
        for (number, mirror) in self.mirrors.iter().enumerate() {
            if !vain || mirror.is_well() || mirror.distrust.covers(blob, &(*at..end)) {
                continue;
            }
            let to = (number, mirror);
            match self.ask_mirror(to, blob, at, end, (route, out)).await {
                Ok(()) => return Ok(()),
                Err(failure) => {
                    self.mirror_failed(mirror, blob, failure)?;
                }
            }
        }
        Err(failure)
    }

    /// Mirrors by number, in the order in which they are asked: seed peers take turns,
    /// the others keep their places.
    fn in_order(&self, blob: &BlobId, at: u64) -> Vec<(usize, &Endpoint)> {
        let mut order: Vec<_> = self.mirrors.iter().enumerate().collect();
        let is_seed = |(_, mirror): &(usize, &Endpoint)| mirror.rank(blob, at) != 0;
        for group in order.chunk_by_mut(|a, b| is_seed(a) && is_seed(b)) {
            group.sort_by_key(|(_, mirror)| mirror.rank(blob, at));
        }
        order
    }

    async fn ask_mirror(
        &self,
        (number, mirror): (usize, &Endpoint),
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        (route, out): (&Route, &Output),
    ) -> Result<(), Failure> {
        out.served_by().set_mirror(number);
        while *at < end {
            let window = mirror.window(blob, route.manner, *at);
            let stop = window.map_or(end, |window| window.end.min(end));
            self.ask_for_window(mirror, blob, at, stop, (route, out))
                .await?;
        }
        if let Some(health) = &mirror.health {
            health.succeeded();
        }
        Ok(())
    }

    /// Waits until an agent is left alone, after having had somebody look at it: who waits
    /// for what nobody was in a hurry to fetch would wait as long as that may take.
    async fn death_of(&self, mirror: &Endpoint, blob: &BlobId) {
        if !mirror.is_dragonfly() || !mirror.is_well() {
            return std::future::pending().await;
        }
        tokio::time::sleep(DOUBTFUL).await;
        if let (Some(health), Some(probe)) = (&mirror.health, mirror.probe(blob)) {
            health.doubt(probe);
        }
        loop {
            let changed = self.changed.notified();
            if !mirror.is_well() {
                return;
            }
            changed.await;
        }
    }

    /// Asks for a range that does not go beyond what agents share as one thing.
    async fn ask_for_window(
        &self,
        mirror: &Endpoint,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        (route, out): (&Route, &Output),
    ) -> Result<(), Failure> {
        let alone = match mirror.is_dragonfly() {
            true => Some(mirror.pieces.enter(blob, *at..end).await),
            false => None,
        };
        mirror.want_whole(blob, true);
        add(&self.metrics.mirror_requests, 1);
        let start = *at;
        let asked = (start..end, route.manner);
        let result = tokio::select! {
            biased;
            result = self.attempt_at(mirror, blob, at, asked, out) => result,
            () = self.death_of(mirror, blob) => {
                let source = "meanwhile it was found to be dead".into();
                let (url, action) = (self.name(blob), "waiting for a mirror");
                Err(Failure::later(BackendError::Transport { url, action, source }))
            }
        };
        let delivered = *at - start;
        add(&self.metrics.mirror_bytes, delivered);
        if mirror.is_dragonfly() {
            self.allowance.earn(delivered);
        }
        result?;
        mirror.delivered(blob);
        if let Some(fetching) = alone {
            fetching.arrived();
        }
        Ok(())
    }

    /// Notes what went wrong, and returns it.
    ///
    /// # Errors
    /// The failure itself if there is no point in going on.
    fn mirror_failed(
        &self,
        mirror: &Endpoint,
        blob: &BlobId,
        failure: Failure,
    ) -> Result<BackendError, Failure> {
        if matches!(failure.error, BackendError::Stopped) {
            return Err(failure);
        }
        add(&self.metrics.mirror_failures, 1);
        let text = chain(&failure.error);
        tracing::debug!("mirror: {text}; trying the next source");
        let offence = match failure.error {
            // That it has not got the blob, or must not give it, is no sign of illness.
            BackendError::Status {
                status: 400..=428, ..
            }
            | BackendError::Auth { .. } => None,
            BackendError::Agent { fault, .. } => self.agent_failed(fault),
            BackendError::Transport { .. } => Some(Offence::Silence),
            _ => Some(Offence::Failure),
        };
        if let (Some(offence), Some(health)) = (offence, &mirror.health)
            && let Some(probe) = mirror.probe(blob)
        {
            health.failed(offence, probe, &text);
        }
        Ok(failure.error)
    }

    /// Counts a failure of a Dragonfly agent; says what it means for its health.
    fn agent_failed(&self, fault: AgentFault) -> Option<Offence> {
        match fault {
            AgentFault::Throttled => {
                add(&self.metrics.mirror_throttled, 1);
                None
            }
            // Nothing is wrong with the agent.
            AgentFault::Registry | AgentFault::Forbidden => None,
            AgentFault::NoSpace => Some(Offence::Lasting),
            AgentFault::Agent | AgentFault::Refused | AgentFault::Slow => Some(Offence::Failure),
        }
    }

    async fn attempt_at(
        &self,
        endpoint: &Endpoint,
        blob: &BlobId,
        at: &mut u64,
        (asked, manner): (std::ops::Range<u64>, Manner),
        out: &Output,
    ) -> Result<(), Failure> {
        let (url, answer) = self
            .open(endpoint, &Method::GET, blob, (asked.clone(), manner))
            .await?;
        let body = answer::body(&url, &answer, &asked, endpoint.max_skip)?;
        if body.skip > 0 && !endpoint.ignores_ranges.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{} ignores ranges: everything before a range is read and thrown away",
                endpoint.base.host_str().unwrap_or_default()
            );
        }
        add(&self.metrics.bytes_skipped, body.skip);
        stream(self.timeouts.read, &url, answer, body, at, out).await
    }

    async fn size_once(&self, blob: &BlobId) -> Result<u64, Failure> {
        for mirror in &self.mirrors {
            if mirror.is_well() {
                match self.size_at(mirror, blob).await {
                    Ok(size) => return Ok(size),
                    Err(failure) => {
                        self.mirror_failed(mirror, blob, failure)?;
                    }
                }
            }
        }
        self.size_at(&self.origin, blob).await
    }

    async fn size_at(&self, endpoint: &Endpoint, blob: &BlobId) -> Result<u64, Failure> {
        let manner = Manner {
            priority: Priority::OnDemand,
            direct: false,
            blob_len: None,
        };
        let asked = |range| (range, manner);
        if !endpoint.refuses_head.load(Ordering::Relaxed) {
            let refused = match self.open(endpoint, &Method::HEAD, blob, asked(0..0)).await {
                Ok((_, answer)) => match answer::total_size(&answer) {
                    Some(size) => return Ok(size),
                    None => true,
                },
                Err(failure) => matches!(
                    failure.error,
                    BackendError::Status {
                        status: 403 | 405 | 501,
                        ..
                    }
                ),
            };
            endpoint.refuses_head.store(refused, Ordering::Relaxed);
        }
        let (url, answer) = self.open(endpoint, &Method::GET, blob, asked(0..1)).await?;
        answer::total_size(&answer).ok_or_else(|| {
            Failure::never(BackendError::WrongRange {
                url: public_name(&url),
                asked: 0..1,
                sent: "an answer that does not tell the length of the blob".to_owned(),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_fetched_twice_is_a_small_part() {
        let allowance = Allowance::default();
        assert!(allowance.spend(256 << 10), "the advance");
        assert!(!allowance.spend(1));
        allowance.earn(50 << 20);
        assert!(allowance.spend(1 << 19) && allowance.spend(1 << 19));
        assert!(!allowance.spend(1));
        (0..1000).for_each(|_| allowance.earn(1 << 30));
        let most = u64::try_from(DETOUR_MOST).unwrap();
        assert!(!allowance.spend(most + 1));
        assert!(allowance.spend(most) && !allowance.spend(1));
    }
}
