//! Blobs behind a plain HTTP server: on a Unix socket, or at an address.
//!
//! Clients that hold the blobs themselves serve them this way while they run the
//! builder. `HEAD` tells the length, `GET` with `Range` delivers bytes. Such servers
//! are simple: many answer 200 where 206 belongs, with just the bytes that were
//! asked for. `wanted` finds out which bytes an answer holds.
//!
//! No credentials, no redirects. Retries, time-outs and the path of the bytes are
//! those of the [`registry`](super::registry) back end.
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use reqwest::header::{ACCEPT_ENCODING, CONTENT_LENGTH, RANGE};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use super::bridge::Output;
use super::registry::answer::{self, Body, public_name, status_error, timed_out, transport};
use super::registry::hedge::{Latency, Route};
use super::registry::retry::{Attempts, Failure, Pause};
use super::registry::transfer::{Source, stream};
use super::registry::{RetryLimits, Timeouts};
use super::remote::Remote;
use super::{Backend, BackendError, Fetch, Sink};
use crate::blob_id::BlobId;
use crate::metrics::Metrics;
use crate::sync::Arc;

/// Most bytes that are read and thrown away from a server that ignores ranges.
const MAX_SKIP: u64 = 512 << 20;

/// Where the server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket; the blob's id is the path of the request.
    Socket(PathBuf),
    /// `http://…` or `https://…`; the blob's id is appended to the path.
    Url(String),
}

/// A server of blobs, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpProxyConfig {
    /// Where it is.
    pub address: Address,
    /// Longest waits.
    pub timeouts: Timeouts,
    /// How often and when to try again.
    pub retry: RetryLimits,
    /// Files with certificates (PEM) to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Accept any certificate.
    pub skip_verify: bool,
}

impl HttpProxyConfig {
    /// Default limits.
    #[must_use]
    pub fn new(address: Address) -> Self {
        Self {
            address,
            timeouts: Timeouts::default(),
            retry: RetryLimits::default(),
            ca_files: Vec::new(),
            skip_verify: false,
        }
    }
}

/// A server of blobs. Must be used from threads that may block.
pub struct HttpProxyBackend {
    remote: Remote<Client>,
}

impl fmt::Debug for HttpProxyBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HttpProxyBackend")
            .field(&self.remote.source().base.as_str())
            .finish()
    }
}

struct Client {
    http: reqwest::Client,
    /// Ends with a slash.
    base: Url,
    /// See [`Backend::place`].
    place: String,
    timeouts: Timeouts,
    retry: RetryLimits,
    metrics: Arc<Metrics>,
    latency: Latency,
    pause: Pause,
}

impl HttpProxyBackend {
    /// Sets up the backend. Makes no request.
    ///
    /// # Errors
    /// [`BackendError::Config`] for an address that is none, and for certificates
    /// that cannot be read.
    pub fn new(config: HttpProxyConfig) -> Result<Self, BackendError> {
        Self::with_metrics(config, Arc::default())
    }

    /// The same, counting in `metrics`.
    ///
    /// # Errors
    /// As for [`HttpProxyBackend::new`].
    pub fn with_metrics(
        config: HttpProxyConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BackendError> {
        // An error means that the process has a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let base = base_url(&config.address)?;
        let client = Client {
            http: http_client(&config)?,
            place: match &config.address {
                Address::Socket(path) => format!("unix:{}", path.display()),
                Address::Url(_) => base.origin().ascii_serialization(),
            },
            base,
            timeouts: config.timeouts,
            retry: config.retry,
            metrics,
            latency: Latency::default(),
            pause: Pause::default(),
        };
        let remote = Remote::new(client, "http-proxy", 1)?;
        Ok(Self { remote })
    }
}

impl Backend for HttpProxyBackend {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        self.remote.fetch(request, sink)
    }

    fn place(&self) -> Option<String> {
        Some(self.remote.source().place.clone())
    }

    fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        self.remote.size(blob)
    }
}

impl Source for Client {
    async fn attempt(
        &self,
        blob: &BlobId,
        at: &mut u64,
        end: u64,
        _route: &Route,
        out: &Output,
    ) -> Result<(), Failure> {
        let range = *at..end;
        let (url, answer) = self.send(&Method::GET, blob, Some(&range)).await?;
        let body = wanted(&url, &answer, &range)?;
        stream(self.timeouts.read, &url, answer, body, at, out).await
    }

    async fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        let mut attempts = Attempts::new(&self.retry, &self.metrics, self.timeouts.total);
        loop {
            let failure = match self.send(&Method::HEAD, blob, None).await {
                Ok((url, answer)) => {
                    return header(&answer, CONTENT_LENGTH.as_str()).ok_or_else(|| {
                        BackendError::WrongRange {
                            url: public_name(&url),
                            asked: 0..0,
                            sent: "an answer that does not tell the length of the blob".to_owned(),
                        }
                    });
                }
                Err(failure) => failure,
            };
            attempts.after(failure, false).await?;
        }
    }

    fn name(&self, _blob: &BlobId) -> String {
        public_name(&self.base)
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
}

impl Client {
    /// One request, up to the headers of a successful answer.
    async fn send(
        &self,
        method: &Method,
        blob: &BlobId,
        range: Option<&Range<u64>>,
    ) -> Result<(Url, Response), Failure> {
        const ACTION: &str = "sending a request";
        let url = self.base.join(&format!("./{blob}")).map_err(|error| {
            Failure::never(BackendError::Config(format!("blob {blob}: {error}")))
        })?;
        let mut request = self.http.request(method.clone(), url.clone());
        if let Some(range) = range {
            let last = range.end.saturating_sub(1);
            request = request.header(RANGE, format!("bytes={}-{last}", range.start));
        }
        // Ranges count the bytes of the blob, not of an encoding of it.
        let request = request.header(ACCEPT_ENCODING, "identity");
        let limit = self.timeouts.connect + self.timeouts.read;
        let answer = match tokio::time::timeout(limit, request.send()).await {
            Ok(result) => result.map_err(|error| transport(&url, ACTION, error))?,
            Err(_elapsed) => return Err(timed_out(&url, ACTION, limit)),
        };
        match answer.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok((url, answer)),
            _ => Err(status_error(&url, answer, true).await),
        }
    }
}

/// Which part of the answer's body are the bytes of `asked`.
///
/// A 206 says it. A 200 with as many bytes as were asked for holds just those;
/// with more it is the whole blob. Where the length is not told, it is taken for
/// the range: whoever reads chunks verifies them.
fn wanted(url: &Url, answer: &Response, asked: &Range<u64>) -> Result<Body, Failure> {
    if answer.status() == StatusCode::PARTIAL_CONTENT {
        return answer::body(url, answer, asked, MAX_SKIP);
    }
    let len = asked.end - asked.start;
    match header(answer, CONTENT_LENGTH.as_str()) {
        Some(got) if got != len => answer::body(url, answer, asked, MAX_SKIP),
        _ => Ok(Body { skip: 0, len }),
    }
}

fn header(answer: &Response, name: &str) -> Option<u64> {
    let value = answer.headers().get(name)?.to_str().ok()?;
    value.trim().parse().ok()
}

fn base_url(address: &Address) -> Result<Url, BackendError> {
    let text = match address {
        // The host is never looked up; servers want one in the request, though.
        Address::Socket(_) => "http://localhost/",
        Address::Url(text) => text,
    };
    let bad = || BackendError::Config(format!("{text:?} is no address of an HTTP server"));
    let url = Url::parse(&format!("{}/", text.trim_end_matches('/'))).ok();
    url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(bad)
}

fn http_client(config: &HttpProxyConfig) -> Result<reqwest::Client, BackendError> {
    let failed = |error: reqwest::Error| {
        BackendError::Config(format!(
            "HTTP client: {}",
            answer::chain(&error.without_url())
        ))
    };
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("nydus/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        // Done by hand, with one limit for everything.
        .retry(reqwest::retry::never())
        .connect_timeout(config.timeouts.connect)
        // The server is this one, not a proxy of the environment.
        .no_proxy();
    for path in &config.ca_files {
        let unusable = |cause: String| {
            BackendError::Config(format!("certificates {}: {cause}", path.display()))
        };
        let pem = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
        let certificates = reqwest::Certificate::from_pem_bundle(&pem)
            .map_err(|error| unusable(answer::chain(&error)))?;
        builder = builder.tls_certs_merge(certificates);
    }
    builder = match &config.address {
        Address::Socket(path) => builder.unix_socket(path.as_path()).tls_certs_only([]),
        Address::Url(text) if text.starts_with("http:") => builder.tls_certs_only([]),
        Address::Url(_) => builder.tls_danger_accept_invalid_certs(config.skip_verify),
    };
    builder.build().map_err(failed)
}

#[cfg(test)]
mod tests;
