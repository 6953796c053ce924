//! One blob as a stream that survives broken connections.
//!
//! When the connection breaks, the download goes on from the byte it had reached
//! (or, if the server ignores ranges, skips to it). Progress resets the count of
//! failures; a number of them in a row, or very many in all, ends it.
//!
//! Promises: `Ok(None)` is returned only after the length and digest were right.

use bytes::{Buf as _, Bytes};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use oci_client::RegistryOperation;
use reqwest::{Method, StatusCode, header};

use super::retry::{self, ATTEMPTS, Attempt, Failure};
use super::{Registry, refusal};
use crate::oci::content::{Verifier, byte_len};
use crate::oci::error::OciError;
use crate::oci::manifest::Descriptor;

/// Connections that may break during one download, progress or not.
const MAX_BREAKS: u32 = 50;

type Body = BoxStream<'static, std::io::Result<Bytes>>;

/// A download in progress.
pub struct Download {
    registry: Registry,
    descriptor: Descriptor,
    at: String,
    verifier: Verifier,
    body: Option<Body>,
    /// Bytes at the start of the body that have been delivered before.
    skip: u64,
    /// Breaks since the last byte arrived, and ever.
    breaks: (u32, u32),
    done: bool,
}

impl std::fmt::Debug for Download {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Download")
            .field("at", &self.at)
            .field("seen", &self.verifier.seen())
            .finish()
    }
}

impl Download {
    pub(crate) fn new(registry: &Registry, descriptor: &Descriptor) -> Self {
        let at = registry.blob_url(&descriptor.digest);
        Self {
            registry: registry.clone(),
            descriptor: descriptor.clone(),
            verifier: Verifier::new(at.as_str(), &descriptor.digest, descriptor.size),
            at,
            body: None,
            skip: 0,
            breaks: (0, 0),
            // An empty blob needs no request, only the right digest.
            done: descriptor.size == 0,
        }
    }

    /// The next bytes; `None` at the verified end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, OciError> {
        while !self.done {
            let body = match &mut self.body {
                Some(body) => body,
                None => {
                    let (body, skip) = {
                        let offset = self.verifier.seen();
                        connect(&self.registry, &self.descriptor, &self.at, offset).await?
                    };
                    self.skip = skip;
                    self.body.insert(body)
                }
            };
            match body.next().await {
                Some(Ok(bytes)) => {
                    if let Some(bytes) = self.accept(bytes)? {
                        return Ok(Some(bytes));
                    }
                }
                // All bytes are here: whatever else the connection does is of no interest.
                None | Some(Err(_)) if self.verifier.is_complete() => self.done = true,
                Some(Err(error)) => self.broken(Failure::Broken(error.into())).await?,
                None => {
                    let reason = format!(
                        "the server ended the answer after {} of {} bytes",
                        self.verifier.seen(),
                        self.descriptor.size
                    );
                    self.broken(Failure::Broken(reason.into())).await?;
                }
            }
        }
        self.body = None;
        self.verifier.clone().finish()?;
        Ok(None)
    }

    /// Drops what was delivered before, and hashes the rest.
    fn accept(&mut self, mut bytes: Bytes) -> Result<Option<Bytes>, OciError> {
        let skipped = self.skip.min(byte_len(&bytes));
        self.skip -= skipped;
        // `skipped` is at most the length, so the conversion succeeds.
        bytes.advance(usize::try_from(skipped).unwrap_or(bytes.len()));
        if bytes.is_empty() {
            return Ok(None);
        }
        self.verifier.update(&bytes)?;
        self.breaks.0 = 0;
        Ok(Some(bytes))
    }

    /// Forgets the connection and waits, or gives up.
    async fn broken(&mut self, failure: Failure) -> Result<(), OciError> {
        self.body = None;
        self.breaks = (self.breaks.0 + 1, self.breaks.1 + 1);
        let offset = self.verifier.seen();
        if self.breaks.0 >= ATTEMPTS || self.breaks.1 >= MAX_BREAKS {
            return Err(failure.into_error(&self.at, "the download", offset, self.breaks.1));
        }
        tracing::debug!(at = self.at, offset, ?failure, "download broken; resuming");
        retry::pause(self.breaks.0, &failure).await;
        Ok(())
    }
}

/// Asks for the bytes from `offset` on. Returns the answer's body, and how many of
/// its first bytes are not among them.
async fn connect(
    registry: &Registry,
    descriptor: &Descriptor,
    at: &str,
    offset: u64,
) -> Result<(Body, u64), OciError> {
    let answer = retry::run(at, "the download", |attempt: Attempt| async move {
        let authorization = registry
            .login(RegistryOperation::Pull, attempt.renew_login)
            .await?;
        let mut request = registry
            .request(Method::GET, at, authorization)
            // Digest and ranges are those of the blob, not of an encoding of it.
            .header(header::ACCEPT_ENCODING, "identity");
        if offset > 0 {
            request = request.header(header::RANGE, format!("bytes={offset}-"));
        }
        let response = request.send().await.map_err(Failure::of_request)?;
        let skip = match response.status() {
            StatusCode::OK => offset,
            StatusCode::PARTIAL_CONTENT if offset > 0 => 0,
            status => return Err(refusal(status, response).await),
        };
        let pieces = response.bytes_stream();
        let body = pieces.map_err(|error| std::io::Error::other(error.without_url()));
        Ok((body.boxed(), skip))
    });
    answer.await.map_err(|error| match error {
        // The server has fewer bytes than the manifest promises.
        OciError::Status {
            status: 416, at, ..
        } if offset > 0 => OciError::Size {
            at,
            expected: descriptor.size,
            actual: offset,
        },
        other => other,
    })
}
