//! Blobs in an OCI registry: ranged GETs, authentication, redirects, mirrors, retries.
//!
//! The outside is blocking. Requests run on a small runtime that the backend owns;
//! bytes come out through a bounded channel, so a slow receiver slows the transfer
//! down instead of filling memory. One fetch, top to bottom:
//!
//! * `transfer`: attempts until every byte is delivered; resumes where one broke;
//! * `client`: mirrors first, then the registry itself (`fallback`);
//! * `endpoint`, `health`, `distrust`: the registry and its mirrors, and which are worth
//!   asking;
//! * `dragonfly`, `pieces`: what is special about mirrors that pass blobs from node to node;
//! * `hedge`: a second request where the first takes too long for a reader;
//! * `open`: one attempt up to the headers, with credentials and redirects;
//! * `redirects`: where blobs were found last, until that expires;
//! * `auth`, `token`: answers challenges, keeps tokens and renews them in time;
//! * `retry`: what is worth another attempt, and when;
//! * `answer`: what an answer says, in success and in failure.
//!
//! Promises: credentials go to the registry, its token service and mirrors only,
//! never to the host that a redirect points at, and never into logs or errors;
//! nothing waits without a limit; a server that sends more, less or other bytes than
//! it was asked for cannot make a fetch succeed or memory grow.
//!
//! Limits on requests in flight are the caller's.

pub(super) mod answer;
mod auth;
mod client;
mod config;
mod distrust;
mod dragonfly;
mod endpoint;
mod fallback;
mod health;
pub(super) mod hedge;
mod open;
mod pieces;
pub(super) mod redirects;
pub(super) mod retry;
pub(super) mod tls;
mod token;
pub(super) mod transfer;

use std::fmt;

pub use auth::{CredentialProvider, Credentials};
pub use config::{ClientCertificate, Mirror, RegistryConfig, Scheme, Timeouts, Upstream};
pub use dragonfly::{AgentFault, Dragonfly, PIECE, Scheduling, TASK_DISK, Tasks, WholeBlob};
pub use fallback::{Fallback, WhoFallsBack};
pub use retry::RetryLimits;

use client::Allowance;
use endpoint::Endpoint;
use fallback::Detour;
use hedge::Latency;
use retry::Pause;

use tokio::sync::Notify;

use super::remote::Remote;
use super::{Backend, BackendError, Fetch, ServedBy, Sink};
use crate::blob_id::BlobId;
use crate::metrics::Metrics;
use crate::sync::{Arc, AtomicBool, Ordering};

/// Threads of the runtime. They move bytes and do TLS; decoding is done elsewhere.
const THREADS: usize = 2;

/// Connections that are opened in advance: a start makes a few requests at once.
const WARM_CONNECTIONS: usize = 3;

/// A repository of a registry. Must be used from threads that may block, which
/// tasks of an asynchronous runtime may not.
pub struct RegistryBackend {
    remote: Remote<Client>,
}

impl fmt::Debug for RegistryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RegistryBackend")
            .field(&self.remote.source().origin.base.as_str())
            .finish()
    }
}

/// What all requests of a backend share.
struct Client {
    /// Tried in this order before the registry itself.
    mirrors: Vec<Endpoint>,
    origin: Endpoint,
    detour: Detour,
    allowance: Allowance,
    /// Told when a mirror is left alone.
    changed: Arc<Notify>,
    timeouts: Timeouts,
    retry: RetryLimits,
    metrics: Arc<Metrics>,
    latency: Latency,
    pause: Pause,
    /// [`Backend::warm`] was called.
    warm: AtomicBool,
}

impl RegistryBackend {
    /// Sets up the backend. Makes no request.
    ///
    /// # Errors
    /// [`BackendError::Config`] for a host, mirror, repository or header that is not one,
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
        let changed = Arc::default();
        let mirrors = config.mirrors.iter();
        let client = Client {
            mirrors: mirrors
                .map(|mirror| Endpoint::mirror(&config, mirror, &changed))
                .collect::<Result<_, _>>()?,
            origin: Endpoint::origin(&config)?,
            detour: Detour::new(config.fallback),
            allowance: Allowance::default(),
            changed,
            timeouts: config.timeouts,
            retry: config.retry,
            metrics,
            latency: Latency::default(),
            pause: Pause::default(),
            warm: AtomicBool::default(),
        };
        let remote = Remote::new(client, "registry", THREADS)?;
        Ok(Self { remote })
    }

    /// Uses other credentials from the next request on; may be called at any time.
    /// Tokens that the old ones brought are not used any more.
    ///
    /// # Errors
    /// [`BackendError::Config`] for a token that cannot be sent; nothing changes then.
    pub fn set_credentials(&self, credentials: Credentials) -> Result<(), BackendError> {
        let mirrors = self.remote.source().mirrors.iter();
        for endpoint in mirrors.chain([&self.remote.source().origin]) {
            if endpoint.shares_credentials {
                endpoint.auth.replace(credentials.clone())?;
            }
        }
        Ok(())
    }
}

impl Backend for RegistryBackend {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        self.remote.fetch(request, sink)
    }

    fn place(&self) -> Option<String> {
        // Of all repositories: it is the host that has limits.
        let base = &self.remote.source().origin.base;
        Some(base.origin().ascii_serialization())
    }

    fn warm(&self) {
        if self.remote.source().warm.swap(true, Ordering::Relaxed) {
            return;
        }
        for _ in 0..WARM_CONNECTIONS {
            let client = Arc::clone(self.remote.source());
            self.remote.spawn(async move { client.greet().await });
        }
    }

    fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        self.remote.size(blob)
    }

    fn distrust(&self, blob: &BlobId, range: &std::ops::Range<u64>, served_by: &ServedBy) {
        // Pings need the runtime.
        let (client, blob, range) = (
            Arc::clone(self.remote.source()),
            blob.clone(),
            range.clone(),
        );
        let by = ServedBy::default();
        by.add(served_by);
        self.remote
            .spawn(async move { client.distrust(&blob, &range, &by) });
    }

    fn want_whole(&self, blob: &BlobId) {
        for mirror in &self.remote.source().mirrors {
            mirror.want_whole(blob, false);
        }
    }

    fn grain(&self) -> Option<u64> {
        let mut mirrors = self.remote.source().mirrors.iter();
        mirrors.any(Endpoint::is_dragonfly).then_some(PIECE)
    }

    fn renew_login(&self, user: &str, password: &str) -> Result<(), BackendError> {
        self.set_credentials(Credentials::Basic {
            username: user.to_owned(),
            password: password.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests;
