//! Blobs in an OCI registry: ranged GETs, redirects, authentication, retries.
//!
//! A fetch is `GET /v2/<repo>/blobs/sha256:<id>` with a `Range`. Registries
//! often answer with a redirect to an object store; the target is remembered
//! until it is refused, so that most requests take one round trip. Credentials
//! go to the registry only, never to a redirect's target ([`auth`]).
//!
//! Failures that may pass are tried again after a growing, jittered pause
//! ([`retry`]), from the byte where the transfer broke.
//!
//! The HTTP client is asynchronous; its runtime lives and dies with the
//! backend. Received bytes are handed to the sink on the caller's own thread,
//! so decoding never slows the network down.

mod auth;
mod response;
mod retry;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, RwLock};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode};
use tokio::runtime::Runtime;
use url::Url;

use self::auth::Authorizer;
use self::response::{Failure, check_content_range, refusal, shown, total_length, transport};
use self::retry::Backoff;
use super::{Backend, BackendError, Fetch, Sink};
use crate::blob_id::BlobId;
use crate::oci::credentials::Credentials;
use crate::sync::lock;

/// Longest chain of redirects that is followed.
const MAX_REDIRECTS: u32 = 5;

/// Where a registry is and how to talk to it.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// `https` or `http`.
    pub scheme: String,
    /// Host, with a port if it is not the scheme's own.
    pub host: String,
    /// Repository, such as `library/nginx`.
    pub repo: String,
    /// How to log in.
    pub credentials: Credentials,
    /// Time to establish a connection.
    pub connect_timeout: Duration,
    /// Longest pause between two pieces of an answer.
    pub read_timeout: Duration,
    /// Attempts after the first one.
    pub retry_limit: u32,
    /// PEM files of further certificate authorities.
    pub ca_files: Vec<PathBuf>,
    /// Accept any certificate; only ever by explicit wish.
    pub skip_verify: bool,
    /// Sent with every request.
    pub headers: HeaderMap,
}

impl RegistryConfig {
    /// A registry with default time-outs: 5 s to connect, 15 s between bytes, 4 retries.
    #[must_use]
    pub fn new(scheme: &str, host: &str, repo: &str, credentials: Credentials) -> Self {
        Self {
            scheme: scheme.to_owned(),
            host: host.to_owned(),
            repo: repo.to_owned(),
            credentials,
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(15),
            retry_limit: 4,
            ca_files: Vec::new(),
            skip_verify: false,
            headers: HeaderMap::new(),
        }
    }
}

/// Blobs of one repository of a registry.
pub struct RegistryBackend {
    base: Url,
    client: reqwest::Client,
    authorizer: Authorizer,
    /// Where the registry sent us for a blob last.
    redirects: RwLock<HashMap<BlobId, Url>>,
    retry_limit: u32,
    handle: tokio::runtime::Handle,
    /// Taken only by `drop`.
    runtime: Mutex<Option<Runtime>>,
}

impl RegistryBackend {
    /// Prepares a client; makes no request.
    ///
    /// # Errors
    /// [`BackendError::Config`] for an impossible URL, an unreadable CA file, or
    /// when the client cannot be set up.
    pub fn new(config: &RegistryConfig) -> Result<Self, BackendError> {
        let base = format!("{}://{}/v2/{}/", config.scheme, config.host, config.repo);
        let base = Url::parse(&base)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| BackendError::Config(format!("{base} is no registry URL")))?;
        // Fails if the process has chosen a provider already, which then serves as well.
        drop(rustls::crypto::ring::default_provider().install_default());
        let client = client(config)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("registry")
            .enable_all()
            .build()
            .map_err(|error| BackendError::Config(format!("starting the HTTP client: {error}")))?;
        Ok(Self {
            authorizer: Authorizer::new(config.credentials.clone(), &base, &config.repo),
            base,
            client,
            redirects: RwLock::default(),
            retry_limit: config.retry_limit,
            handle: runtime.handle().clone(),
            runtime: Mutex::new(Some(runtime)),
        })
    }

    /// Replaces the credentials; requests in flight keep the old ones.
    pub fn set_credentials(&self, credentials: Credentials) {
        self.authorizer.set_credentials(credentials);
    }

    fn blob_url(&self, blob: &BlobId) -> Result<Url, Failure> {
        // The leading `./` keeps the colon of the digest from looking like a scheme.
        let path = format!("./blobs/sha256:{blob}");
        self.base.join(&path).map_err(|error| {
            Failure::lasting(BackendError::Config(format!(
                "{}{path}: {error}",
                self.base
            )))
        })
    }

    /// One attempt to deliver the rest of a range; moves `range.start` as bytes arrive.
    async fn attempt(
        &self,
        blob: &BlobId,
        range: &mut Range<u64>,
        sink: &mut Sink<'_>,
    ) -> Result<(), Failure> {
        let mut response = self.get(blob, range).await?;
        let url = response.url().clone();
        // A server that ignores `Range` sends the blob from its start.
        let mut skip = match response.status() {
            StatusCode::OK => range.start,
            _ => check_content_range(&response, range)?,
        };
        while range.start < range.end {
            let piece = match response.chunk().await {
                Ok(Some(piece)) => piece,
                Ok(None) => {
                    return Err(Failure::passing(BackendError::Short {
                        name: shown(&url),
                        offset: range.start,
                        len: range.end - range.start,
                        got: 0,
                    }));
                }
                Err(source) => return Err(transport(&url, "receiving data", source)),
            };
            let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
            skip -= skipped as u64;
            let left = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
            let piece = &piece[skipped..];
            let piece = &piece[..piece.len().min(left)];
            if !piece.is_empty() {
                sink(piece).map_err(|_stop| Failure::lasting(BackendError::Stopped))?;
                range.start += piece.len() as u64;
            }
        }
        Ok(())
    }

    /// The answer to a ranged GET: 200 or 206.
    async fn get(&self, blob: &BlobId, range: &Range<u64>) -> Result<Response, Failure> {
        if let Some(url) = self.known_redirect(blob) {
            let response = self.send(&url, range, None).await?;
            match response.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
                StatusCode::RANGE_NOT_SATISFIABLE => return Err(refusal(response).await),
                // Signed URLs expire; the registry gives a new one.
                _ => self.remember_redirect(blob, None),
            }
        }
        let origin = self.blob_url(blob)?;
        let response = self.get_authorized(&origin, range).await?;
        let response = self.follow(&origin, response, range).await?;
        if !matches!(
            response.status(),
            StatusCode::OK | StatusCode::PARTIAL_CONTENT
        ) {
            return Err(refusal(response).await);
        }
        // A target on the registry itself needs credentials, which a remembered one does not get.
        if response.url().origin() != origin.origin() {
            self.remember_redirect(blob, Some(response.url().clone()));
        }
        Ok(response)
    }

    /// Asks the registry itself, logging in if it wants that.
    async fn get_authorized(&self, url: &Url, range: &Range<u64>) -> Result<Response, Failure> {
        let header = self.authorizer.header();
        let response = self.send(url, range, header.clone()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<&str> = challenges.iter().filter_map(|c| c.to_str().ok()).collect();
        let header = self
            .authorizer
            .log_in(&self.client, url, &challenges, header)
            .await?;
        let response = self.send(url, range, Some(header)).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.authorizer.forget();
            return Err(Failure::lasting(BackendError::Auth {
                url: shown(url),
                reason: "the registry refuses the credentials: check docker's config.json".into(),
            }));
        }
        Ok(response)
    }

    /// Follows redirects; credentials stay with the registry's own origin.
    async fn follow(
        &self,
        origin: &Url,
        mut response: Response,
        range: &Range<u64>,
    ) -> Result<Response, Failure> {
        for _ in 0..MAX_REDIRECTS {
            if !response.status().is_redirection() {
                break;
            }
            let target = redirect_target(origin, &response)?;
            let own = target.origin() == origin.origin();
            let header = self.authorizer.header().filter(|_| own);
            response = self.send(&target, range, header).await?;
        }
        Ok(response)
    }

    async fn send(
        &self,
        url: &Url,
        range: &Range<u64>,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, Failure> {
        let bytes = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
        let mut request = self.client.get(url.clone()).header(RANGE, bytes);
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value);
        }
        request
            .send()
            .await
            .map_err(|source| transport(url, "sending the request", source))
    }

    fn known_redirect(&self, blob: &BlobId) -> Option<Url> {
        let known = self
            .redirects
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        known.get(blob).cloned()
    }

    fn remember_redirect(&self, blob: &BlobId, url: Option<Url>) {
        let mut known = self
            .redirects
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        match url {
            Some(url) => known.insert(blob.clone(), url),
            None => known.remove(blob),
        };
    }
}

impl Backend for RegistryBackend {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        let mut range = request.range.clone();
        self.handle.block_on(async {
            let mut backoff = Backoff::new(self.retry_limit);
            while range.start < range.end {
                let before = range.start;
                let Err(failure) = self.attempt(request.blob, &mut range, sink).await else { break };
                if range.start > before {
                    // The transfer moved: it is alive, and gets its full number of attempts again.
                    backoff.restart();
                }
                tracing::debug!(blob = %request.blob, ?range, error = %failure.error, "attempt failed");
                backoff.pause(failure).await?;
            }
            Ok(())
        })
    }

    fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        self.handle.block_on(async {
            let mut backoff = Backoff::new(self.retry_limit);
            loop {
                // One byte rather than HEAD, which object stores refuse behind signed URLs.
                match self
                    .get(blob, &(0..1))
                    .await
                    .and_then(|response| total_length(&response))
                {
                    Ok(size) => return Ok(size),
                    Err(failure) => backoff.pause(failure).await?,
                }
            }
        })
    }
}

impl Drop for RegistryBackend {
    fn drop(&mut self) {
        // A plain drop would block, and panic in an asynchronous caller.
        if let Some(runtime) = lock(&self.runtime).take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for RegistryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryBackend")
            .field("base", &self.base.as_str())
            .finish_non_exhaustive()
    }
}

fn redirect_target(origin: &Url, response: &Response) -> Result<Url, Failure> {
    let refused = |reason: &str| {
        Failure::lasting(BackendError::Status {
            url: shown(response.url()),
            status: response.status().as_u16(),
            detail: format!(": {reason}"),
        })
    };
    let location = response
        .headers()
        .get(LOCATION)
        .and_then(|location| location.to_str().ok());
    let target = location
        .and_then(|location| response.url().join(location).ok())
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| refused("redirect without a usable location"))?;
    if origin.scheme() == "https" && target.scheme() != "https" {
        return Err(refused("redirect from https to plain http refused"));
    }
    Ok(target)
}

fn client(config: &RegistryConfig) -> Result<reqwest::Client, BackendError> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("nydusd/", env!("CARGO_PKG_VERSION")))
        .default_headers(config.headers.clone())
        .connect_timeout(config.connect_timeout)
        .read_timeout(config.read_timeout)
        .redirect(reqwest::redirect::Policy::none())
        .tcp_nodelay(true)
        .tls_danger_accept_invalid_certs(config.skip_verify);
    for path in &config.ca_files {
        let unusable = |why: String| BackendError::Config(format!("{}: {why}", path.display()));
        let pem = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
        let bundle = reqwest::Certificate::from_pem_bundle(&pem)
            .map_err(|error| unusable(error.to_string()))?;
        builder = builder.tls_certs_merge(bundle);
    }
    builder
        .build()
        .map_err(|error| BackendError::Config(format!("setting up the HTTP client: {error}")))
}
