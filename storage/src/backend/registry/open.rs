//! One attempt at a request, up to the headers of a successful answer.
//!
//! A registry often redirects to an object store, with a signed URL that is good for
//! some minutes. The URL is remembered per blob and used directly until it ends or
//! the store refuses it; then the registry is asked again, which costs no attempt.

use std::ops::Range;
use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE, WWW_AUTHENTICATE,
};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use super::Client;
use super::answer::{public_name, sanitise, status_error, timed_out, transport};
use super::auth::denied;
use super::dragonfly::{self, AgentFault};
use super::endpoint::Endpoint;
use super::hedge::Manner;
use super::retry::{Again, Failure};
use crate::backend::BackendError;
use crate::blob_id::BlobId;
use crate::metrics::add;

/// Most redirects of one request.
const MAX_REDIRECTS: u32 = 5;

/// Most challenges answered for one request: one, one more if a remembered token
/// turned out to be stale, and one if the credentials themselves had to be replaced.
const MAX_CHALLENGES: u32 = 3;

/// Most bytes of an answer that nobody wants.
const MAX_GREETING: usize = 64 << 10;

/// What a request says to the server itself.
struct Asked<'a> {
    method: &'a Method,
    range: &'a Range<u64>,
    headers: HeaderMap,
    /// Longest wait for the headers of the answer.
    limit: Duration,
}

impl Client {
    /// Sends a request for a blob and returns the answer (200 or 206) and its URL.
    ///
    /// * `range`: bytes of the blob, never empty, and why they are wanted.
    pub(super) async fn open(
        &self,
        endpoint: &Endpoint,
        method: &Method,
        blob: &BlobId,
        (range, manner): (Range<u64>, Manner),
    ) -> Result<(Url, Response), Failure> {
        // A signed URL is good for one method only.
        if method == Method::GET
            && let Some(url) = endpoint.redirects.get(blob)
        {
            match self.open_remembered(endpoint, &url, blob, &range).await? {
                Some(answer) => return Ok((url, answer)),
                None => add(&self.metrics.redirects_renewed, 1),
            }
        }
        let home = endpoint.blob_url(blob).map_err(Failure::never)?;
        let asked = Asked {
            method,
            range: &range,
            headers: endpoint.headers_for(blob, manner, range.start),
            limit: endpoint.patience_for(manner),
        };
        let (url, answer) = self.open_at(endpoint, home.clone(), &asked).await?;
        if method == Method::GET && url != home {
            endpoint.redirects.remember(blob, &url);
        }
        Ok((url, answer))
    }

    /// `None` if the remembered URL is good no more.
    async fn open_remembered(
        &self,
        endpoint: &Endpoint,
        url: &Url,
        blob: &BlobId,
        range: &Range<u64>,
    ) -> Result<Option<Response>, Failure> {
        let asked = Asked {
            method: &Method::GET,
            range,
            headers: HeaderMap::new(),
            limit: endpoint.patience,
        };
        let sent = self.send(endpoint, url, &asked, None, false).await;
        let answer = match sent {
            Ok(answer) => answer,
            Err(failure) => {
                // The host may be gone for good; the registry may know a better one.
                endpoint.redirects.forget(blob, url);
                return Err(failure);
            }
        };
        match answer.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(Some(answer)),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(status_error(url, answer, false).await)
            }
            _ => {
                endpoint.redirects.forget(blob, url);
                Ok(None)
            }
        }
    }

    /// Asks the first server that is well whether it is there, and answers what it
    /// demands. That leaves an open connection, and a token where one is needed.
    pub(super) async fn greet(&self) {
        let first = self.mirrors.iter().find(|mirror| mirror.is_well());
        let first = first.unwrap_or(&self.origin);
        let Ok(url) = first.base.join("/v2/") else {
            return;
        };
        let asked = Asked {
            method: &Method::GET,
            range: &(0..1),
            headers: first.headers.clone(),
            limit: first.patience,
        };
        match self.open_at(first, url, &asked).await {
            Ok((_, mut answer)) => {
                // The connection is free again once the answer has been read.
                let mut left = MAX_GREETING;
                while let Ok(Some(piece)) = answer.chunk().await
                    && piece.len() < left
                {
                    left -= piece.len();
                }
            }
            Err(failure) => tracing::debug!("no early connection: {}", failure.error),
        }
    }

    async fn open_at(
        &self,
        endpoint: &Endpoint,
        mut url: Url,
        asked: &Asked<'_>,
    ) -> Result<(Url, Response), Failure> {
        let (mut redirects, mut challenges) = (0, 0);
        loop {
            // Only the registry itself gets credentials and extra headers.
            let ours = url.origin() == endpoint.base.origin();
            let authorization = if ours {
                endpoint.auth.header().await?
            } else {
                None
            };
            let answer = self
                .send(endpoint, &url, asked, authorization.as_ref(), ours)
                .await?;
            if let Some(fault) = fault_of(endpoint, &answer) {
                return Err(dragonfly::failure(&url, &answer, fault));
            }
            match answer.status().as_u16() {
                200 | 206 => return Ok((url, answer)),
                301 | 302 | 303 | 307 | 308 if redirects < MAX_REDIRECTS => {
                    redirects += 1;
                    url = redirect_target(endpoint, &url, &answer)?;
                }
                401 if ours && challenges < MAX_CHALLENGES => {
                    challenges += 1;
                    endpoint
                        .auth
                        .answer(&url, &answer, authorization.as_ref())
                        .await?;
                }
                401 if ours => {
                    return Err(denied(
                        &url,
                        "the credentials were accepted, but not for this",
                    ));
                }
                // A registry, or a cache in front of it, may hand out a signed URL
                // that has just ended.
                401 | 403 if !ours => {
                    let failure = status_error(&url, answer, ours).await;
                    let again = Again::Later;
                    return Err(Failure { again, ..failure });
                }
                _ => return Err(status_error(&url, answer, ours).await),
            }
        }
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        url: &Url,
        asked: &Asked<'_>,
        authorization: Option<&HeaderValue>,
        ours: bool,
    ) -> Result<Response, Failure> {
        const ACTION: &str = "sending a request";
        let http = if ours { &endpoint.http } else { &endpoint.away };
        let mut request = http.request(asked.method.clone(), url.clone());
        if ours {
            request = request.headers(asked.headers.clone());
        }
        if let Some(header) = authorization {
            request = request.header(AUTHORIZATION, header);
        }
        if asked.method == Method::GET {
            let (start, last) = (asked.range.start, asked.range.end.saturating_sub(1));
            request = request.header(RANGE, format!("bytes={start}-{last}"));
        }
        // Ranges count the bytes of the blob, not of an encoding of it.
        let request = request.header(ACCEPT_ENCODING, "identity");
        match tokio::time::timeout(asked.limit, request.send()).await {
            Ok(result) => result.map_err(|error| transport(url, ACTION, error)),
            // It may be well, and wait for others.
            Err(_elapsed) if endpoint.is_dragonfly() => Err(dragonfly::too_slow(url)),
            Err(_elapsed) => Err(timed_out(url, ACTION, asked.limit)),
        }
    }
}

/// What an agent of Dragonfly says that went wrong; `None` if the answer can be taken as
/// it is. A registry's demand for credentials comes through the agent unchanged.
fn fault_of(endpoint: &Endpoint, answer: &Response) -> Option<AgentFault> {
    endpoint.health.as_ref()?;
    let fault = dragonfly::fault(answer)?;
    let demand = fault == AgentFault::Registry
        && answer.status() == StatusCode::UNAUTHORIZED
        && answer.headers().contains_key(WWW_AUTHENTICATE);
    (!demand).then_some(fault)
}

fn redirect_target(endpoint: &Endpoint, from: &Url, answer: &Response) -> Result<Url, Failure> {
    let location = answer
        .headers()
        .get(LOCATION)
        .and_then(|value| value.to_str().ok());
    let target = location.and_then(|location| from.join(location).ok());
    target
        .and_then(|target| rewritten(endpoint, target))
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

/// The target with host and scheme replaced, where the configuration says so.
fn rewritten(endpoint: &Endpoint, mut target: Url) -> Option<Url> {
    if let Some(scheme) = endpoint.redirect_scheme {
        target.set_scheme(&scheme.to_string()).ok()?;
    }
    if let Some(host) = &endpoint.redirect_host {
        let other = Url::parse(&format!("{}://{host}/", target.scheme())).ok()?;
        target.set_host(other.host_str()).ok()?;
        target.set_port(other.port()).ok()?;
    }
    Some(target)
}
