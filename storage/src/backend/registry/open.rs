//! One attempt at a request, up to the headers of a successful answer.
//!
//! A registry often redirects to an object store, with a signed URL that is good for
//! some minutes. The URL is remembered per blob and used directly until the store
//! refuses it; then the registry is asked again, which costs no attempt.

use std::collections::HashMap;
use std::ops::Range;

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderValue, LOCATION, RANGE};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use super::Client;
use super::answer::{public_name, sanitise, status_error, timed_out, transport};
use super::auth::denied;
use super::retry::Failure;
use crate::backend::BackendError;
use crate::blob_id::BlobId;
use crate::metrics::add;
use crate::sync::{Mutex, lock};

/// Most redirects of one request.
const MAX_REDIRECTS: u32 = 5;

/// Most challenges answered for one request: one, and one more if a remembered
/// token turned out to be stale.
const MAX_CHALLENGES: u32 = 2;

/// Most remembered redirects; an image has at most 254 blobs.
const MAX_REMEMBERED: usize = 1024;

/// Where blobs were found last, if not at the registry.
#[derive(Default)]
pub(super) struct Redirects(Mutex<HashMap<BlobId, Url>>);

impl Redirects {
    fn get(&self, blob: &BlobId) -> Option<Url> {
        lock(&self.0).get(blob).cloned()
    }

    fn remember(&self, blob: &BlobId, url: &Url) {
        let mut urls = lock(&self.0);
        if urls.len() >= MAX_REMEMBERED {
            urls.clear();
        }
        urls.insert(blob.clone(), url.clone());
    }

    fn forget(&self, blob: &BlobId) {
        lock(&self.0).remove(blob);
    }
}

impl Client {
    /// Sends a request for a blob and returns the answer (200 or 206) and its URL.
    ///
    /// * `range`: bytes of the blob, never empty.
    pub(super) async fn open(
        &self,
        method: &Method,
        blob: &BlobId,
        range: Range<u64>,
    ) -> Result<(Url, Response), Failure> {
        // A signed URL is good for one method only.
        if method == Method::GET
            && let Some(url) = self.redirects.get(blob)
        {
            match self.open_remembered(&url, blob, &range).await? {
                Some(answer) => return Ok((url, answer)),
                None => add(&self.metrics.redirects_renewed, 1),
            }
        }
        let home = self.blob_url(blob).map_err(Failure::never)?;
        let (url, answer) = self.open_at(method, home.clone(), &range).await?;
        if method == Method::GET && url != home {
            self.redirects.remember(blob, &url);
        }
        Ok((url, answer))
    }

    /// `None` if the remembered URL is good no more.
    async fn open_remembered(
        &self,
        url: &Url,
        blob: &BlobId,
        range: &Range<u64>,
    ) -> Result<Option<Response>, Failure> {
        let answer = match self.send(&Method::GET, url, range, None, false).await {
            Ok(answer) => answer,
            Err(failure) => {
                // The host may be gone for good; the registry may know a better one.
                self.redirects.forget(blob);
                return Err(failure);
            }
        };
        match answer.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(Some(answer)),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(status_error(url, answer, false).await)
            }
            _ => {
                self.redirects.forget(blob);
                Ok(None)
            }
        }
    }

    async fn open_at(
        &self,
        method: &Method,
        mut url: Url,
        range: &Range<u64>,
    ) -> Result<(Url, Response), Failure> {
        let (mut redirects, mut challenges) = (0, 0);
        loop {
            // Only the registry itself gets credentials and extra headers.
            let ours = url.origin() == self.base.origin();
            let authorization = if ours {
                self.auth.header(self).await?
            } else {
                None
            };
            let answer = self
                .send(method, &url, range, authorization.as_ref(), ours)
                .await?;
            match answer.status().as_u16() {
                200 | 206 => return Ok((url, answer)),
                301 | 302 | 303 | 307 | 308 if redirects < MAX_REDIRECTS => {
                    redirects += 1;
                    url = redirect_target(&url, &answer)?;
                }
                401 if ours && challenges < MAX_CHALLENGES => {
                    challenges += 1;
                    self.auth
                        .answer(self, &url, &answer, authorization.as_ref())
                        .await?;
                }
                401 if ours => {
                    return Err(denied(
                        &url,
                        "the credentials were accepted, but not for this",
                    ));
                }
                _ => return Err(status_error(&url, answer, ours).await),
            }
        }
    }

    async fn send(
        &self,
        method: &Method,
        url: &Url,
        range: &Range<u64>,
        authorization: Option<&HeaderValue>,
        ours: bool,
    ) -> Result<Response, Failure> {
        const ACTION: &str = "sending a request";
        let mut request = self.http.request(method.clone(), url.clone());
        if ours {
            request = request.headers(self.headers.clone());
        }
        if let Some(header) = authorization {
            request = request.header(AUTHORIZATION, header);
        }
        if method == Method::GET {
            let last = range.end.saturating_sub(1);
            request = request.header(RANGE, format!("bytes={}-{last}", range.start));
        }
        // Ranges count the bytes of the blob, not of an encoding of it.
        let request = request.header(ACCEPT_ENCODING, "identity");
        let limit = self.timeouts.connect + self.timeouts.read;
        match tokio::time::timeout(limit, request.send()).await {
            Ok(result) => result.map_err(|error| transport(url, ACTION, error)),
            Err(_elapsed) => Err(timed_out(url, ACTION, limit)),
        }
    }
}

fn redirect_target(from: &Url, answer: &Response) -> Result<Url, Failure> {
    let location = answer
        .headers()
        .get(LOCATION)
        .and_then(|value| value.to_str().ok());
    let target = location.and_then(|location| from.join(location).ok());
    target
        .filter(|target| matches!(target.scheme(), "http" | "https"))
        .ok_or_else(|| {
            let target = location.map(|location| location.split('?').next().unwrap_or_default());
            Failure::never(BackendError::Status {
                url: public_name(from),
                status: answer.status().as_u16(),
                detail: format!(
                    ": it redirects to {:?}",
                    sanitise(target.unwrap_or_default())
                ),
            })
        })
}
