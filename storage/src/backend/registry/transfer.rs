//! Delivers every byte of a range, in as many attempts as it takes.

use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use bytes::Buf as _;
use reqwest::{Method, Response};
use url::Url;

use super::Client;
use super::answer::{self, Body, chain, public_name, timed_out, transport};
use super::config::Timeouts;
use super::endpoint::Endpoint;
use super::health::Health;
use super::hedge::{self, Latency, Route};
use super::retry::{Attempts, Failure, Pause, RetryLimits};
use crate::backend::bridge::Output;
use crate::backend::{BackendError, Priority};
use crate::blob_id::BlobId;
use crate::codec::as_u64;
use crate::metrics::{Metrics, add};
use crate::sync::{Arc, Ordering};

/// Bytes per second that even a slow link carries: for each, large fetches get a
/// second more.
const SLOW_LINK: u64 = 256 << 10;

/// Bytes that an attempt must have brought to count as progress. Less would let a
/// broken server keep us busy for long.
const PROGRESS: u64 = 4096;

/// Something that delivers bytes of blobs in several attempts.
pub(in crate::backend) trait Source: Send + Sync + 'static {
    /// One attempt. `at` moves past what was delivered, also on error.
    ///
    /// * `route`: which server to ask, if there are several.
    fn attempt(
        &self,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        route: &Route,
        out: &Output,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// How long a blob is, in bytes.
    fn size(&self, blob: &BlobId) -> impl Future<Output = Result<u64, BackendError>> + Send;

    /// The blob's URL as it may be shown.
    fn name(&self, blob: &BlobId) -> String;

    /// What bounds the attempts of one fetch.
    fn limits(&self) -> (&RetryLimits, &Timeouts, &Metrics);

    /// What is known about how long answers take.
    fn latency(&self) -> &Latency;

    /// What the server that is asked last said about when to come back.
    fn pause(&self) -> &Pause;

    /// Whether there is somebody else to ask during that pause.
    fn has_others(&self) -> bool {
        false
    }

    /// The server on this route was slower than another one that was asked later.
    fn lost(&self, _route: &Route) {}
}

/// Sends the bytes of `range` to `out`, in order and each once, then closes it.
pub(in crate::backend) async fn transfer(
    source: &impl Source,
    blob: &BlobId,
    range: Range<u64>,
    priority: Priority,
    out: Output,
) {
    let len = range.end.saturating_sub(range.start);
    let (retry, timeouts, metrics) = source.limits();
    let total = timeouts.total + Duration::from_secs(len / SLOW_LINK);
    let mut attempts = Attempts::new(retry, metrics, total);
    let deadline = attempts.deadline;
    let mut at = range.start;
    let work = async {
        while at < range.end {
            if !source.has_others() {
                source.pause().over(retry).await;
            }
            let before = at;
            let result = if priority == Priority::OnDemand {
                hedge::attempt(source, blob, &mut at, range.end, &out).await
            } else {
                let route = Route::default();
                source.attempt(blob, &mut at, range.end, &route, &out).await
            };
            if let Err(failure) = result {
                source.pause().heed(&failure, retry);
                attempts.after(failure, at - before >= PROGRESS).await?;
            }
        }
        Ok(())
    };
    let result = match tokio::time::timeout_at(deadline, work).await {
        Ok(result) => result,
        Err(_elapsed) => Err(attempts.gave_up(BackendError::Transport {
            url: source.name(blob),
            action: "transferring a range",
            source: format!("{} of {len} bytes came in {total:?}", at - range.start).into(),
        })),
    };
    if let Err(error) = result {
        // Nobody there: then nobody cares about the error either.
        let _ = out.send(Err(error)).await;
    }
}

impl Source for Client {
    /// Asks the mirrors that are well, in their order, then the registry.
    async fn attempt(
        &self,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        route: &Route,
        out: &Output,
    ) -> Result<(), Failure> {
        for (number, mirror) in self.mirrors.iter().enumerate() {
            let usable = |health: &&Arc<Health>| route.takes(number) && health.usable();
            let Some(health) = mirror.health.as_ref().filter(usable) else {
                continue;
            };
            match self.attempt_at(mirror, blob, at, end, out).await {
                Ok(()) => {
                    health.succeeded();
                    return Ok(());
                }
                Err(failure) => self.mirror_failed(mirror, failure)?,
            }
        }
        // There is nothing beyond it.
        let _ = route.takes(self.mirrors.len());
        self.attempt_at(&self.origin, blob, at, end, out).await
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
        let well = |mirror: &Endpoint| mirror.health.as_ref().is_some_and(|it| it.is_well());
        self.mirrors.iter().any(well)
    }

    /// A mirror that is often slow is left alone like one that fails.
    fn lost(&self, route: &Route) {
        let mirror = self.mirrors.get(route.asked());
        if let Some((mirror, health)) = mirror.and_then(|it| Some((it, it.health.as_ref()?))) {
            health.failed(false, &mirror.http, "another source was faster");
        }
    }
}

impl Client {
    /// Notes what went wrong; an error if there is no point in going on.
    fn mirror_failed(&self, mirror: &Endpoint, failure: Failure) -> Result<(), Failure> {
        if matches!(failure.error, BackendError::Stopped) {
            return Err(failure);
        }
        add(&self.metrics.mirror_failures, 1);
        let text = chain(&failure.error);
        tracing::debug!("mirror: {text}; trying the next source");
        // That it has not got the blob, or must not give it, is no sign of illness.
        let well = matches!(
            failure.error,
            BackendError::Status {
                status: 400..=428,
                ..
            } | BackendError::Auth { .. }
        );
        if let Some(health) = &mirror.health
            && !well
        {
            let dead = matches!(failure.error, BackendError::Transport { .. });
            health.failed(dead, &mirror.http, &text);
        }
        Ok(())
    }

    async fn attempt_at(
        &self,
        endpoint: &Endpoint,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        out: &Output,
    ) -> Result<(), Failure> {
        let asked = *at..end;
        let (url, answer) = self
            .open(endpoint, &Method::GET, blob, asked.clone())
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
            if mirror.health.as_ref().is_some_and(|health| health.usable()) {
                match self.size_at(mirror, blob).await {
                    Ok(size) => return Ok(size),
                    Err(failure) => self.mirror_failed(mirror, failure)?,
                }
            }
        }
        self.size_at(&self.origin, blob).await
    }

    async fn size_at(&self, endpoint: &Endpoint, blob: &BlobId) -> Result<u64, Failure> {
        if !endpoint.refuses_head.load(Ordering::Relaxed) {
            let refused = match self.open(endpoint, &Method::HEAD, blob, 0..0).await {
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
        let (url, answer) = self.open(endpoint, &Method::GET, blob, 0..1).await?;
        answer::total_size(&answer).ok_or_else(|| {
            Failure::never(BackendError::WrongRange {
                url: public_name(&url),
                asked: 0..1,
                sent: "an answer that does not tell the length of the blob".to_owned(),
            })
        })
    }
}

/// Sends the wanted part of a body to `out`. `at` moves past what was delivered,
/// also on error.
///
/// * `limit`: longest wait between two pieces.
pub(in crate::backend) async fn stream(
    limit: Duration,
    url: &Url,
    mut answer: Response,
    body: Body,
    at: &mut u64,
    out: &Output,
) -> Result<(), Failure> {
    const ACTION: &str = "reading the body of an answer";
    let (start, end) = (*at, at.saturating_add(body.len));
    let mut skip = body.skip;
    out.comes_from(url.host_str().unwrap_or_default());
    while *at < end {
        let piece = match tokio::time::timeout(limit, answer.chunk()).await {
            Ok(piece) => piece.map_err(|error| transport(url, ACTION, error))?,
            Err(_elapsed) => return Err(timed_out(url, ACTION, limit)),
        };
        let Some(mut piece) = piece else {
            return Err(Failure::later(BackendError::Short {
                name: public_name(url),
                offset: start,
                len: end - start,
                got: *at - start,
            }));
        };
        let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
        piece.advance(skipped);
        skip -= as_u64(skipped);
        piece.truncate(usize::try_from(end - *at).unwrap_or(usize::MAX));
        if piece.is_empty() {
            continue;
        }
        let len = as_u64(piece.len());
        if out.send(Ok(piece)).await.is_err() {
            return Err(Failure::never(BackendError::Stopped));
        }
        *at += len;
    }
    Ok(())
}
