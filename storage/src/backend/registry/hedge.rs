//! Hedging: a second request for what a reader waits for and the first one does not
//! bring in time.
//!
//! Of a server's answers most are quick and a few are very slow, for reasons that a
//! second request does not meet: a busy machine behind a load balancer, a lost packet.
//! So when nothing has come for longer than 95 % of the answers before took, another
//! request is made, at the next mirror if there is one; whichever brings a byte first
//! is kept, and the other one ends.
//!
//! Promises: no byte is delivered twice; a hedge is made for readers only, one per
//! attempt, and on the whole for at most one request in [`SHARE`], unless the source has
//! another measure or the first server turns out to be dead; if one of the two fails the
//! other one goes on.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::retry::Failure;
use super::transfer::Source;
use crate::backend::bridge::Output;
use crate::backend::{BackendError, Fetch, Priority, ServedBy};
use crate::blob_id::BlobId;
use crate::codec::as_u64;
use crate::metrics::add;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Mutex, Ordering, lock};

/// Latencies that are remembered.
const SAMPLES: usize = 128;

/// With fewer than these, nothing is known about a server.
const ENOUGH: usize = 20;

/// The least and, as long as nothing is known, the usual time for a first byte.
const FLOOR: Duration = Duration::from_millis(50);
pub(super) const UNKNOWN: Duration = Duration::from_secs(1);

/// An answer this many times slower than half of them is slow, however many are.
const TIMES_MEDIAN: u32 = 4;

/// Least silence within a body that is taken for a stall: the link may be busy.
const STALL: Duration = Duration::from_millis(500);

/// Requests for each of which there may be a hedge.
const SHARE: u32 = 20;

/// Hedges that may be saved up for bad times.
const SAVED: u32 = 10;

/// Hedges that may be made at the start.
const ADVANCE: u32 = 2;

/// Pieces of a body that wait to be passed on.
const PIECES: usize = 2;

/// Why bytes are wanted, and how.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct Manner {
    pub(super) priority: Priority,
    /// Of the last server only.
    pub(super) direct: bool,
    pub(super) blob_len: Option<u64>,
}

impl Manner {
    pub(in crate::backend) fn of(request: &Fetch<'_>) -> Self {
        Self {
            priority: request.priority,
            direct: request.direct,
            blob_len: request.blob_len,
        }
    }
}

/// Which of several servers to ask: they are numbered in the order of preference.
#[derive(Debug)]
pub(in crate::backend) struct Route {
    pub(super) manner: Manner,
    skip: usize,
    asked: AtomicUsize,
    /// Another request was faster: the servers beyond the one that is asked would be
    /// asked for nobody.
    abandoned: AtomicBool,
}

impl Route {
    pub(super) fn new(manner: Manner) -> Self {
        Self {
            manner,
            skip: 0,
            asked: AtomicUsize::new(0),
            abandoned: AtomicBool::new(false),
        }
    }

    /// Whether server `number` may be asked; it is the one then.
    pub(super) fn takes(&self, number: usize) -> bool {
        let takes = number >= self.skip && !self.abandoned.load(Ordering::Relaxed);
        if takes {
            self.asked.store(number, Ordering::Relaxed);
        }
        takes
    }

    /// Whether the last server may be asked, whose number is `number`: a second request
    /// goes there, too, if there is nobody else.
    pub(super) fn takes_last(&self, number: usize) -> bool {
        self.asked.store(number, Ordering::Relaxed);
        !self.abandoned.load(Ordering::Relaxed)
    }

    /// The server that was asked last.
    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// Whether it begins beyond the first server, as a second request does.
    pub(super) fn is_second(&self) -> bool {
        self.skip > 0
    }

    /// To the servers after the one that `other` leads to.
    fn beyond(other: &Self) -> Self {
        Self {
            skip: other.asked() + 1,
            ..Self::new(other.manner)
        }
    }
}

/// What is known about the latency of a server.
#[derive(Debug)]
pub(in crate::backend) struct Latency(Mutex<Known>);

#[derive(Debug)]
struct Known {
    recent: [Duration; SAMPLES],
    count: usize,
    /// In parts of a hedge: each request earns one of [`SHARE`].
    credit: u32,
}

impl Default for Latency {
    fn default() -> Self {
        Self(Mutex::new(Known {
            recent: [Duration::ZERO; SAMPLES],
            count: 0,
            credit: ADVANCE * SHARE,
        }))
    }
}

impl Latency {
    fn observe(&self, time: Duration) {
        let mut known = lock(&self.0);
        let place = known.count % SAMPLES;
        if let Some(sample) = known.recent.get_mut(place) {
            *sample = time;
        }
        known.count += 1;
    }

    /// How long a first byte may take.
    ///
    /// * `unknown`: the answer as long as there were few.
    pub(super) fn patience(&self, unknown: Duration) -> Duration {
        let known = lock(&self.0);
        let (mut recent, count) = (known.recent, known.count.min(SAMPLES));
        drop(known);
        let recent = recent.get_mut(..count).unwrap_or_default();
        if count < ENOUGH {
            return unknown;
        }
        recent.sort_unstable();
        let at = |percent: usize| recent.get(count * percent / 100).copied();
        let p95 = at(95).unwrap_or(UNKNOWN);
        let slow = at(50).unwrap_or(UNKNOWN).saturating_mul(TIMES_MEDIAN);
        p95.min(slow).max(FLOOR)
    }

    fn earn(&self) {
        let mut known = lock(&self.0);
        known.credit = (known.credit + 1).min(SAVED * SHARE);
    }

    /// Whether another hedge may be made; it is counted then.
    pub(super) fn spend(&self) -> bool {
        let mut known = lock(&self.0);
        let rest = known.credit.checked_sub(SHARE);
        known.credit = rest.unwrap_or(known.credit);
        rest.is_some()
    }
}

/// One of two requests for the same bytes.
struct Lane {
    route: Arc<Route>,
    began: Instant,
    work: Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>,
    pieces: mpsc::Receiver<Result<Bytes, BackendError>>,
    served_by: Arc<ServedBy>,
    result: Option<Result<(), Failure>>,
}

impl Lane {
    fn new<S: Source>(
        source: &Arc<S>,
        blob: &BlobId,
        range: std::ops::Range<u64>,
        route: Route,
    ) -> Self {
        let (sender, pieces) = mpsc::channel(PIECES);
        let out = Output::new(sender);
        let (source, blob, route) = (Arc::clone(source), blob.clone(), Arc::new(route));
        Self {
            served_by: Arc::clone(out.served_by()),
            route: Arc::clone(&route),
            began: Instant::now(),
            work: Box::pin(async move {
                let mut at = range.start;
                source
                    .attempt(&blob, &mut at, range.end, &route, &out)
                    .await
            }),
            pieces,
            result: None,
        }
    }

    /// The next bytes; `None` at the end, when there is a result. May be dropped and
    /// called again.
    async fn next(&mut self) -> Option<Bytes> {
        while self.result.is_none() {
            tokio::select! {
                biased;
                Some(piece) = self.pieces.recv() => return piece.ok(),
                result = &mut self.work => self.result = Some(result),
            }
        }
        // The sender ended with the work: this does not wait.
        self.pieces.recv().await?.ok()
    }

    /// Goes on with nobody waiting for it.
    fn finish(mut self, limit: Duration) {
        self.route.abandoned.store(true, Ordering::Relaxed);
        tokio::spawn(tokio::time::timeout(limit, async move {
            while self.next().await.is_some() {}
        }));
    }
}

/// One attempt, hedged. `at` moves past what was delivered, also on error.
pub(super) async fn attempt<S: Source>(
    source: &Arc<S>,
    blob: &BlobId,
    at: &mut u64,
    end: u64,
    (route, out): (Route, &Output),
) -> Result<(), Failure> {
    let (latency, (_, timeouts, metrics)) = (source.latency(), source.limits());
    latency.earn();
    let start = *at;
    let mut lane = Lane::new(source, blob, *at..end, route);
    let mut rival: Option<Lane> = None;
    let mut silent_since = lane.began;
    let mut hedged = false;
    // Set once it was too early for a second request.
    let mut at_last = None;
    let patience = source.patience();
    loop {
        let limit = match at_last {
            Some(limit) => limit,
            None if *at == start => patience,
            None => patience.max(STALL),
        };
        let alone = rival.is_none();
        let rival_next = async {
            match &mut rival {
                Some(rival) => rival.next().await,
                None => std::future::pending().await,
            }
        };
        let route = Arc::clone(&lane.route);
        let asks = |reason: &str| {
            add(&metrics.hedges, 1);
            let after = silent_since.elapsed();
            tracing::debug!(%blob, at = *at, ?after, reason, "asking again");
            Lane::new(source, blob, *at..end, Route::beyond(&route))
        };
        let piece = tokio::select! {
            biased;
            piece = lane.next() => match (piece, lane.result.take()) {
                (Some(piece), result) => {
                    lane.result = result;
                    rival = None;
                    piece
                }
                (None, Some(Err(failure))) => match rival.take() {
                    Some(rival) => {
                        tracing::debug!(error = %failure.error, "left to the second request");
                        lane = rival;
                        continue;
                    }
                    None => return Err(failure),
                },
                (None, _) => return Ok(()),
            },
            piece = rival_next => match (piece, rival.take()) {
                (Some(piece), Some(winner)) => {
                    add(&metrics.hedges_won, 1);
                    // It takes that long at least.
                    latency.observe(lane.began.elapsed());
                    let loser = std::mem::replace(&mut lane, winner);
                    if source.lost(blob, &loser.route) {
                        loser.finish(timeouts.total);
                    }
                    piece
                }
                // Failed: the first one goes on alone.
                _ => continue,
            },
            () = tokio::time::sleep_until(silent_since + limit), if !hedged => {
                source.doubt(blob, &route);
                if at_last.is_some() || source.may_hedge(&route, end - *at) {
                    hedged = true;
                    rival = Some(asks("it takes long"));
                } else {
                    at_last = source.last_patience(&route);
                    hedged = at_last.is_none();
                }
                continue;
            }
            // Whatever hedges may cost: nothing else brings these bytes soon.
            () = source.hopeless(&route), if alone => {
                hedged = true;
                rival = Some(asks("the server is left alone"));
                continue;
            }
        };
        if *at == start {
            latency.observe(lane.began.elapsed());
        }
        out.comes_from(&lane.served_by);
        *at += as_u64(piece.len());
        if out.send(Ok(piece)).await.is_err() {
            return Err(Failure::never(BackendError::Stopped));
        }
        silent_since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_follows_the_answers_but_not_the_stalls() {
        let latency = Latency::default();
        for _ in 0..ENOUGH - 1 {
            latency.observe(Duration::from_millis(100));
        }
        assert_eq!(latency.patience(UNKNOWN), UNKNOWN);
        (0..100).for_each(|n| latency.observe(Duration::from_millis(100 + n)));
        let patience = latency.patience(UNKNOWN);
        assert!((190..200).contains(&patience.as_millis()), "{patience:?}");
        // A third of all answers hangs: what is usual is still what the others take.
        for number in 0..300 {
            let slow = number % 3 == 0;
            latency.observe(Duration::from_millis(if slow { 9000 } else { 100 }));
        }
        assert_eq!(latency.patience(UNKNOWN), Duration::from_millis(400));
        (0..SAMPLES).for_each(|_| latency.observe(Duration::from_micros(300)));
        assert_eq!(latency.patience(UNKNOWN), FLOOR);
    }

    #[test]
    fn hedges_are_a_small_part_of_all_requests() {
        let latency = Latency::default();
        let mut hedges = 0;
        for _ in 0..1000 {
            latency.earn();
            hedges += u32::from(latency.spend());
        }
        assert_eq!(hedges, 1000 / SHARE + ADVANCE);
        (0..100_000).for_each(|_| latency.earn());
        let saved = (0..100).filter(|_| latency.spend()).count();
        assert_eq!(saved, usize::try_from(SAVED).unwrap());
    }
}
