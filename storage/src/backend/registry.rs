//! Blobs in an OCI registry: ranged GETs, authentication, redirects, retries.
//!
//! The outside is blocking. Requests run on a small runtime that the backend owns;
//! bytes come out through a bounded channel, so a slow receiver slows the transfer
//! down instead of filling memory. One fetch, top to bottom:
//!
//! * `transfer`: attempts until every byte is delivered; resumes where one broke;
//! * `open`: one attempt up to the headers, with credentials and redirects;
//! * `auth`: answers challenges, keeps tokens until they expire;
//! * `retry`: what is worth another attempt, and when;
//! * `answer`: what an answer says, in success and in failure.
//!
//! Promises: credentials go to the registry and its token service only, never to
//! the host that a redirect points at, and never into logs or errors; nothing waits
//! without a limit; a server that sends more, less or other bytes than it was asked
//! for cannot make a fetch succeed or memory grow.
//!
//! Not here yet: a limit on requests in flight that lets on-demand requests pass
//! prefetch, and hedging of slow ones; [`Backend::fetch`] is the place for both.

pub(super) mod answer;
mod auth;
mod open;
pub(super) mod retry;
pub(super) mod transfer;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use tokio::runtime::Runtime;
use url::Url;

pub use auth::Credentials;
pub use retry::RetryLimits;

use super::{Backend, BackendError, Fetch, Sink, bridge};
use crate::blob_id::BlobId;
use crate::metrics::Metrics;
use crate::sync::Arc;

/// Threads of the runtime. They move bytes and do TLS; decoding is done elsewhere.
const THREADS: usize = 2;

/// How to speak to the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Scheme {
    /// HTTP over TLS.
    #[default]
    Https,
    /// Without TLS.
    Http,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Https => "https",
            Self::Http => "http",
        })
    }
}

/// Longest waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, TLS included.
    pub connect: Duration,
    /// For the headers of an answer, and between two pieces of its body.
    pub read: Duration,
    /// For one fetch with all its attempts. Large fetches get a second more per
    /// 256 KiB.
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            read: Duration::from_secs(10),
            total: Duration::from_secs(60),
        }
    }
}

/// One repository of a registry, and how to reach it.
#[derive(Clone)]
pub struct RegistryConfig {
    /// Host with optional port: `registry.example.com:5000`, `[::1]:5000`.
    pub host: String,
    /// Name of the repository: `library/debian`.
    pub repo: String,
    /// How to speak to it.
    pub scheme: Scheme,
    /// Who we are.
    pub auth: Credentials,
    /// Longest waits.
    pub timeouts: Timeouts,
    /// How often and when to try again.
    pub retry: RetryLimits,
    /// Files with certificates (PEM) to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Accept any certificate. Chunks are verified nevertheless, but credentials
    /// may go to the wrong server.
    pub skip_verify: bool,
    /// Extra headers for requests to `host`; not sent anywhere else.
    pub headers: Vec<(String, String)>,
}

impl RegistryConfig {
    /// Anonymous access over HTTPS with default limits.
    #[must_use]
    pub fn new(host: &str, repo: &str) -> Self {
        Self {
            host: host.to_owned(),
            repo: repo.to_owned(),
            scheme: Scheme::default(),
            auth: Credentials::Anonymous,
            timeouts: Timeouts::default(),
            retry: RetryLimits::default(),
            ca_files: Vec::new(),
            skip_verify: false,
            headers: Vec::new(),
        }
    }
}

impl fmt::Debug for RegistryConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values of headers may be secrets.
        let headers: Vec<_> = self.headers.iter().map(|(name, _)| name).collect();
        f.debug_struct("RegistryConfig")
            .field("host", &self.host)
            .field("repo", &self.repo)
            .field("scheme", &self.scheme)
            .field("auth", &self.auth)
            .field("timeouts", &self.timeouts)
            .field("retry", &self.retry)
            .field("ca_files", &self.ca_files)
            .field("skip_verify", &self.skip_verify)
            .field("headers", &headers)
            .finish()
    }
}

/// A repository of a registry. Must be used from threads that may block, which
/// tasks of an asynchronous runtime may not.
pub struct RegistryBackend {
    client: Arc<Client>,
    /// `None` only while dropping.
    runtime: Option<Runtime>,
}

impl fmt::Debug for RegistryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RegistryBackend")
            .field(&self.client.base.as_str())
            .finish()
    }
}

/// What all requests of a backend share.
struct Client {
    http: reqwest::Client,
    /// `https://host/v2/repo/blobs/`.
    base: Url,
    headers: HeaderMap,
    auth: auth::Authenticator,
    redirects: open::Redirects,
    timeouts: Timeouts,
    retry: RetryLimits,
    metrics: Arc<Metrics>,
}

impl RegistryBackend {
    /// Sets up the backend. Makes no request.
    ///
    /// # Errors
    /// [`BackendError::Config`] for a host, repository or header that is not one,
    /// and for certificates that cannot be read.
    pub fn new(config: RegistryConfig) -> Result<Self, BackendError> {
        Self::with_metrics(config, Arc::default())
    }

    /// The same, counting in `metrics`.
    ///
    /// # Errors
    /// As for [`RegistryBackend::new`].
    pub fn with_metrics(
        config: RegistryConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BackendError> {
        let base = base_url(&config)?;
        let http = http_client(&config)?;
        let client = Client {
            http,
            base,
            headers: headers(&config.headers)?,
            auth: auth::Authenticator::new(config.auth, &config.repo)?,
            redirects: open::Redirects::default(),
            timeouts: config.timeouts,
            retry: config.retry,
            metrics,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("registry")
            .enable_all()
            .build()
            .map_err(|error| BackendError::Config(format!("starting threads: {error}")))?;
        Ok(Self {
            client: Arc::new(client),
            runtime: Some(runtime),
        })
    }

    fn runtime(&self) -> Result<&Runtime, BackendError> {
        let stopped = || BackendError::Config("the backend is shutting down".to_owned());
        self.runtime.as_ref().ok_or_else(stopped)
    }
}

impl Drop for RegistryBackend {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Does not wait for transfers that nobody wants any more.
            runtime.shutdown_background();
        }
    }
}

impl Backend for RegistryBackend {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        let (client, blob) = (Arc::clone(&self.client), request.blob.clone());
        let range = request.range.clone();
        bridge::fetch(self.runtime()?, request, sink, |out| async move {
            client.transfer(&blob, range, out).await;
        })
        .unwrap_or_else(|bridge::Vanished| Err(self.client.vanished(request.blob)))
    }

    fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        let (client, id) = (Arc::clone(&self.client), blob.clone());
        bridge::answer(self.runtime()?, async move { client.size(&id).await })
            .unwrap_or_else(|bridge::Vanished| Err(self.client.vanished(blob)))
    }
}

impl Client {
    /// Where the registry has the blob.
    fn blob_url(&self, blob: &BlobId) -> Result<Url, BackendError> {
        // The colon would make a relative reference look like a scheme.
        self.base
            .join(&format!("./sha256:{blob}"))
            .map_err(|error| BackendError::Config(format!("blob {blob}: {error}")))
    }

    fn vanished(&self, blob: &BlobId) -> BackendError {
        BackendError::Transport {
            url: format!("{}sha256:{blob}", self.base),
            action: "the transfer ended without a result",
            source: "its task is gone".into(),
        }
    }
}

fn base_url(config: &RegistryConfig) -> Result<Url, BackendError> {
    let bad = |what: &str, value: &str| {
        BackendError::Config(format!("{value:?} is no {what} of a registry"))
    };
    let host_ok = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    let repo_ok = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
    let (host, repo) = (&config.host, &config.repo);
    if host.is_empty() || !host.chars().all(host_ok) {
        return Err(bad("host", host));
    }
    let segment_ok = |segment: &str| !segment.is_empty() && segment.chars().any(|c| c != '.');
    if !repo.chars().all(repo_ok) || !repo.split('/').all(segment_ok) {
        return Err(bad("repository", repo));
    }
    Url::parse(&format!("{}://{host}/v2/{repo}/blobs/", config.scheme))
        .ok()
        .ok_or_else(|| bad("host", host))
}

fn headers(list: &[(String, String)]) -> Result<HeaderMap, BackendError> {
    let mut headers = HeaderMap::new();
    for (name, value) in list {
        let (Ok(key), Ok(mut value)) = (
            HeaderName::from_bytes(name.as_bytes()),
            HeaderValue::from_str(value),
        ) else {
            return Err(BackendError::Config(format!(
                "{name:?}: not a valid header"
            )));
        };
        value.set_sensitive(true);
        headers.append(key, value);
    }
    Ok(headers)
}

fn http_client(config: &RegistryConfig) -> Result<reqwest::Client, BackendError> {
    // An error means that the process has a provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let failed = |error: reqwest::Error| {
        BackendError::Config(format!(
            "HTTP client: {}",
            answer::chain(&error.without_url())
        ))
    };
    let mut builder = client_builder(config);
    for path in &config.ca_files {
        let unusable = |cause: String| {
            BackendError::Config(format!("certificates {}: {cause}", path.display()))
        };
        let pem = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
        let certificates = reqwest::Certificate::from_pem_bundle(&pem)
            .map_err(|error| unusable(answer::chain(&error)))?;
        if certificates.is_empty() {
            return Err(unusable("there are none in it".to_owned()));
        }
        builder = builder.tls_certs_merge(certificates);
    }
    match builder.build() {
        // A machine without certificates can use a plain registry all the same.
        Err(_) if config.scheme == Scheme::Http && config.ca_files.is_empty() => {
            client_builder(config)
                .tls_certs_only([])
                .build()
                .map_err(failed)
        }
        result => result.map_err(failed),
    }
}

fn client_builder(config: &RegistryConfig) -> reqwest::ClientBuilder {
    let builder = reqwest::Client::builder()
        .user_agent(concat!("nydus/", env!("CARGO_PKG_VERSION")))
        // Followed by hand: credentials stay here, and targets are remembered.
        .redirect(reqwest::redirect::Policy::none())
        // Done by hand as well, with one limit for everything.
        .retry(reqwest::retry::never())
        .connect_timeout(config.timeouts.connect)
        .pool_max_idle_per_host(16)
        .pool_idle_timeout(Duration::from_secs(60))
        .tcp_keepalive(Duration::from_secs(30))
        .http2_adaptive_window(true)
        .tls_danger_accept_invalid_certs(config.skip_verify);
    let host = config.host.trim_start_matches('[');
    if ["localhost", "127.", "::1"]
        .iter()
        .any(|local| host.starts_with(local))
    {
        // A proxy of the environment does not reach our own loopback.
        return builder.no_proxy();
    }
    builder
}

#[cfg(test)]
mod tests;
