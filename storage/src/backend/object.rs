//! Blobs in an object store: S3 and what speaks its language, OSS, Azure Blob
//! Storage, Google Cloud Storage.
//!
//! The blob with id `ID` is the object `<prefix>ID`. A request goes to a signed URL
//! (`sign`), which is kept until it ends, like the target of a registry's redirect.
//! Attempts, limits and the path of the bytes are those of the
//! [`registry`](super::registry) back end.
//!
//! Promises: keys never leave this process, only signatures do; signatures and
//! tokens appear in no error and no log line.
#![forbid(unsafe_code)]

mod sign;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderName, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};
use url::Url;

use super::bridge::Output;
use super::registry::answer::{self, public_name, status_error, timed_out, transport};
use super::registry::hedge::{Latency, Route};
use super::registry::redirects::Redirects;
use super::registry::retry::{Attempts, Failure, Pause};
use super::registry::tls::{Tls, http_client};
use super::registry::transfer::{Source, stream};
use super::registry::{RetryLimits, Scheme, Timeouts};
use super::remote::Remote;
use super::{Backend, BackendError, Fetch, Sink};
use crate::blob_id::BlobId;
use crate::metrics::Metrics;
use crate::sync::Arc;
use sign::Signer;

/// Threads of the runtime. They move bytes and do TLS; decoding is done elsewhere.
const THREADS: usize = 2;

/// Most bytes that are read and thrown away from a server that ignores ranges.
const MAX_SKIP: u64 = 64 << 20;

/// A user's name and secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    /// Access key id; for Azure the name of the account.
    pub id: String,
    /// The secret that belongs to it.
    pub secret: String,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(..)")
    }
}

/// Who we are to the store.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum Login {
    /// Nobody: the objects are public.
    #[default]
    Anonymous,
    /// A user with a secret key.
    Keys(Keys),
    /// A shared access signature of Azure: the query of a URL.
    SharedAccess(String),
    /// A file with the key of a service account (Google).
    KeyFile(PathBuf),
    /// What the environment and the machine say: variables, workload identities,
    /// the identity that the cloud gave to the machine.
    Environment,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Keys(_) => "Keys(..)",
            Self::SharedAccess(_) => "SharedAccess(..)",
            Self::KeyFile(_) => "KeyFile(..)",
            Self::Environment => "Environment",
        })
    }
}

/// Which language the store speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Store {
    /// S3, with the bucket in the path.
    S3 {
        /// `us-east-1`; most servers that are not Amazon's accept any.
        region: String,
    },
    /// Alibaba's OSS, with the bucket in the name of the host.
    Oss,
    /// Azure Blob Storage; the bucket is a container.
    Azure {
        /// Name of the account.
        account: String,
    },
    /// Google Cloud Storage.
    Gcs,
}

/// A bucket, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectConfig {
    /// Which language the store speaks.
    pub store: Store,
    /// How to speak to it.
    pub scheme: Scheme,
    /// Host with optional port; empty for the usual one of Azure and Google.
    pub endpoint: String,
    /// Bucket or container.
    pub bucket: String,
    /// Goes before the blob id as it is: `blobs/`.
    pub prefix: String,
    /// Who we are.
    pub login: Login,
    /// Longest waits.
    pub timeouts: Timeouts,
    /// How often and when to try again.
    pub retry: RetryLimits,
    /// Files with certificates (PEM) to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Accept any certificate.
    pub skip_verify: bool,
}

impl ObjectConfig {
    /// Public objects over HTTPS with default limits.
    #[must_use]
    pub fn new(store: Store, endpoint: &str, bucket: &str) -> Self {
        Self {
            store,
            scheme: Scheme::default(),
            endpoint: endpoint.to_owned(),
            bucket: bucket.to_owned(),
            prefix: String::new(),
            login: Login::default(),
            timeouts: Timeouts::default(),
            retry: RetryLimits::default(),
            ca_files: Vec::new(),
            skip_verify: false,
        }
    }
}

/// A bucket of an object store. Must be used from threads that may block.
pub struct ObjectBackend {
    remote: Remote<Client>,
}

impl fmt::Debug for ObjectBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ObjectBackend")
            .field(&self.remote.source().signer.base().as_str())
            .finish()
    }
}

struct Client {
    http: reqwest::Client,
    signer: Signer,
    /// Signed URLs that are still good.
    signed: Redirects,
    timeouts: Timeouts,
    retry: RetryLimits,
    metrics: Arc<Metrics>,
    latency: Latency,
    pause: Pause,
}

impl ObjectBackend {
    /// Sets up the backend. Makes no request.
    ///
    /// # Errors
    /// [`BackendError::Config`] for settings that do not fit each other or the
    /// store, and for certificates and keys that cannot be read.
    pub fn new(config: &ObjectConfig) -> Result<Self, BackendError> {
        Self::with_metrics(config, Arc::default())
    }

    /// The same, counting in `metrics`.
    ///
    /// # Errors
    /// As for [`ObjectBackend::new`].
    pub fn with_metrics(
        config: &ObjectConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BackendError> {
        let tls = Tls {
            host: &config.endpoint,
            plain: config.scheme == Scheme::Http,
            ca_files: &config.ca_files,
            certificate: None,
            skip_verify: config.skip_verify,
            proxy: None,
        };
        if config.skip_verify && !tls.plain {
            tracing::warn!("{}: certificates are not verified", config.endpoint);
        }
        let client = Client {
            http: http_client(tls, &config.timeouts)?,
            signer: Signer::new(config)?,
            signed: Redirects::default(),
            timeouts: config.timeouts,
            retry: config.retry,
            metrics,
            latency: Latency::default(),
            pause: Pause::default(),
        };
        let remote = Remote::new(client, "object-store", THREADS)?;
        Ok(Self { remote })
    }
}

impl Backend for ObjectBackend {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        self.remote.fetch(request, sink)
    }

    fn place(&self) -> Option<String> {
        Some(
            self.remote
                .source()
                .signer
                .base()
                .origin()
                .ascii_serialization(),
        )
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
        let asked = *at..end;
        let (url, answer) = self.open(blob, &asked).await?;
        let body = answer::body(&url, &answer, &asked, MAX_SKIP)?;
        stream(self.timeouts.read, &url, answer, body, at, out).await
    }

    /// Length of a blob, from the answer to a request for its first byte: a
    /// signature is good for one method.
    async fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        let mut attempts = Attempts::new(&self.retry, &self.metrics, self.timeouts.total);
        loop {
            let failure = match self.open(blob, &(0..1)).await {
                Ok((url, answer)) => match answer::total_size(&answer) {
                    Some(size) => return Ok(size),
                    None => Failure::never(BackendError::WrongRange {
                        url: public_name(&url),
                        asked: 0..1,
                        sent: "an answer that does not tell the length of the blob".to_owned(),
                    }),
                },
                Err(failure) => failure,
            };
            attempts.after(failure, false).await?;
        }
    }

    fn name(&self, blob: &BlobId) -> String {
        public_name(&self.signer.url(blob))
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
    /// Sends a request and returns the answer (200 or 206) and its URL. A signature
    /// that is good no more is replaced, which costs no attempt.
    async fn open(&self, blob: &BlobId, range: &Range<u64>) -> Result<(Url, Response), Failure> {
        if let Some(url) = self.signed.get(blob) {
            let answer = self.send(&url, None, range).await?;
            match answer.status().as_u16() {
                400 | 401 | 403 => self.signed.forget(blob, &url),
                _ => return self.checked(url, answer).await,
            }
        }
        let (url, header) = self.sign(blob).await?;
        if header.is_none() {
            self.signed.remember(blob, &url);
        }
        let answer = self.send(&url, header, range).await?;
        if !answer.status().is_success() {
            self.signed.forget(blob, &url);
        }
        self.checked(url, answer).await
    }

    async fn checked(&self, url: Url, answer: Response) -> Result<(Url, Response), Failure> {
        match answer.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok((url, answer)),
            _ => Err(status_error(&url, answer, false).await),
        }
    }

    async fn sign(&self, blob: &BlobId) -> Result<sign::Signed, Failure> {
        let limit = self.timeouts.connect + self.timeouts.read;
        let name = self.signer.url(blob);
        match tokio::time::timeout(limit, self.signer.sign(blob)).await {
            Ok(Ok(signed)) => Ok(signed),
            Ok(Err(reason)) => Err(Failure::later(BackendError::Auth {
                url: public_name(&name),
                reason,
            })),
            Err(_elapsed) => Err(timed_out(&name, "asking for credentials", limit)),
        }
    }

    async fn send(
        &self,
        url: &Url,
        header: Option<HeaderValue>,
        range: &Range<u64>,
    ) -> Result<Response, Failure> {
        const ACTION: &str = "sending a request";
        let last = range.end.saturating_sub(1);
        let mut request = self
            .http
            .get(url.clone())
            .header(RANGE, format!("bytes={}-{last}", range.start))
            // Ranges count the bytes of the blob, not of an encoding of it.
            .header(ACCEPT_ENCODING, "identity");
        if matches!(self.signer, Signer::Azure { .. }) {
            // Ranges and tokens want a version of the protocol that knows them.
            request = request.header(HeaderName::from_static("x-ms-version"), "2021-12-02");
        }
        if let Some(header) = header {
            request = request.header(AUTHORIZATION, header);
        }
        let limit = self.timeouts.connect + self.timeouts.read;
        match tokio::time::timeout(limit, request.send()).await {
            Ok(result) => result.map_err(|error| transport(url, ACTION, error)),
            Err(_elapsed) => Err(timed_out(url, ACTION, limit)),
        }
    }
}
