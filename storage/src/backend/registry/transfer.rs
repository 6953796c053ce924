//! Delivers every byte of a range, in as many attempts as it takes.

use std::ops::Range;
use std::time::Duration;

use bytes::Buf as _;
use reqwest::{Method, Response};
use url::Url;

use super::Client;
use super::answer::{self, Body, public_name, timed_out, transport};
use super::retry::{Attempts, Failure};
use crate::backend::BackendError;
use crate::backend::bridge::Output;
use crate::blob_id::BlobId;
use crate::codec::as_u64;

/// Bytes per second that even a slow link carries: for each, large fetches get a
/// second more.
pub(in crate::backend) const SLOW_LINK: u64 = 256 << 10;

/// Bytes that an attempt must have brought to count as progress. Less would let a
/// broken server keep us busy for long.
pub(in crate::backend) const PROGRESS: u64 = 4096;

impl Client {
    /// Sends the bytes of `range` to `out`, in order and each once, then closes it.
    pub(super) async fn transfer(&self, blob: &BlobId, range: Range<u64>, out: Output) {
        let len = range.end.saturating_sub(range.start);
        let total = self.timeouts.total + Duration::from_secs(len / SLOW_LINK);
        let mut attempts = Attempts::new(&self.retry, &self.metrics, total);
        let deadline = attempts.deadline;
        let mut at = range.start;
        let work = self.deliver(blob, &mut at, range.end, &out, &mut attempts);
        let result = match tokio::time::timeout_at(deadline, work).await {
            Ok(result) => result,
            Err(_elapsed) => {
                let error = BackendError::Transport {
                    url: format!("{}sha256:{blob}", self.base),
                    action: "transferring a range",
                    source: format!("{} of {len} bytes came in {total:?}", at - range.start).into(),
                };
                Err(attempts.gave_up(error))
            }
        };
        if let Err(error) = result {
            // Nobody there: then nobody cares about the error either.
            let _ = out.send(Err(error)).await;
        }
    }

    async fn deliver(
        &self,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        out: &Output,
        attempts: &mut Attempts<'_>,
    ) -> Result<(), BackendError> {
        while *at < end {
            let before = *at;
            if let Err(failure) = self.attempt(blob, at, end, out).await {
                attempts.after(failure, *at - before >= PROGRESS).await?;
            }
        }
        Ok(())
    }

    /// One request. `at` moves past what was delivered, also on error.
    async fn attempt(
        &self,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        out: &Output,
    ) -> Result<(), Failure> {
        let (url, answer) = self.open(&Method::GET, blob, *at..end).await?;
        let body = answer::body(&url, &answer, &(*at..end))?;
        stream(self.timeouts.read, &url, answer, body, at, out).await
    }

    /// Length of a blob: by HEAD, or where that is refused by asking for one byte.
    pub(super) async fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        let mut attempts = Attempts::new(&self.retry, &self.metrics, self.timeouts.total);
        loop {
            let failure = match self.size_once(blob).await {
                Ok(size) => return Ok(size),
                Err(failure) => failure,
            };
            attempts.after(failure, false).await?;
        }
    }

    async fn size_once(&self, blob: &BlobId) -> Result<u64, Failure> {
        if let Ok((_, answer)) = self.open(&Method::HEAD, blob, 0..0).await
            && let Some(size) = answer::total_size(&answer)
        {
            return Ok(size);
        }
        let (url, answer) = self.open(&Method::GET, blob, 0..1).await?;
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
