//! Delivers every byte of a range, in as many attempts as it takes.

use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use bytes::Buf as _;
use reqwest::Response;
use url::Url;

use super::answer::{Body, public_name, timed_out, transport};
use super::config::Timeouts;
use super::hedge::{self, Latency, Manner, Route};
use super::retry::{Attempts, Failure, Pause, RetryLimits};
use crate::backend::bridge::Output;
use crate::backend::{BackendError, Priority};
use crate::blob_id::BlobId;
use crate::codec::as_u64;
use crate::metrics::Metrics;
use crate::sync::Arc;

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

    /// How long a reader waits for a first byte before there is a second request.
    fn patience(&self) -> Duration {
        self.latency().patience(hedge::UNKNOWN)
    }

    /// How long a reader waits at most who may not make a second request; `None` for as
    /// long as a request may take.
    fn last_patience(&self, _route: &Route) -> Option<Duration> {
        None
    }

    /// The server on this route takes longer than usual.
    fn doubt(&self, _blob: &BlobId, _route: &Route) {}

    /// Whether a second request may be made for `len` bytes that did not come in time on
    /// this route; it is counted then.
    fn may_hedge(&self, _route: &Route, _len: u64) -> bool {
        self.latency().spend()
    }

    /// Waits until there is no hope left for what was asked on this route.
    fn hopeless(&self, _route: &Route) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// The server on this route was slower than another one that was asked later. Says
    /// whether the request is to be brought to its end nevertheless, because what it
    /// fetches serves others.
    fn lost(&self, _blob: &BlobId, _route: &Route) -> bool {
        false
    }
}

/// Sends the bytes of `range` to `out`, in order and each once, then closes it.
pub(in crate::backend) async fn transfer<S: Source>(
    source: &Arc<S>,
    blob: &BlobId,
    range: Range<u64>,
    manner: Manner,
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
            let route = Route::new(manner);
            let result = if manner.priority == Priority::OnDemand {
                hedge::attempt(source, blob, &mut at, range.end, (route, &out)).await
            } else {
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
    out.served_by().set(url.host_str().unwrap_or_default());
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
