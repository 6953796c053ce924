//! What can be set about a registry: the registry itself, its mirrors, limits.
//!
//! Plain data; [`RegistryBackend`](super::RegistryBackend) checks it. Nothing here
//! prints a secret.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::answer::public_name;
use super::auth::{CredentialProvider, Credentials};
use super::dragonfly::Dragonfly;
use super::fallback::Fallback;
use super::retry::RetryLimits;
use crate::sync::Arc;

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

/// A certificate that shows a server who we are (TLS client authentication).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// File with the certificate chain (PEM), our own first.
    pub certificate: PathBuf,
    /// File with its private key (PEM); may be the same file.
    pub key: PathBuf,
}

/// Another server with the same blobs, tried before the registry itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Mirror {
    /// `http://127.0.0.1:4001`, or with a path that goes before `/v2`.
    pub url: String,
    /// Extra headers for requests to the mirror; not sent anywhere else.
    pub headers: Vec<(String, String)>,
    /// Answers 2xx while the mirror is well. Asked only while it is believed not to
    /// be; without one the mirror gets a blob request to prove itself.
    pub ping_url: Option<String>,
    /// How long a mirror that failed is left alone, and between two pings.
    pub health_check_interval: Duration,
    /// Failures in a row after which it is left alone. One that does not answer at
    /// all is left alone at once.
    pub failure_limit: u32,
    /// Accept any certificate of the mirror.
    pub skip_verify: bool,
    /// Files with certificates (PEM) to trust for the mirror, beside the registry's.
    pub ca_files: Vec<PathBuf>,
    /// Answer the mirror's challenges with the registry's credentials, as a mirror
    /// that forwards them needs. Never done without TLS if the registry has it,
    /// except to this machine itself.
    pub share_credentials: bool,
    /// How the mirror is told which registry is meant.
    pub upstream: Upstream,
    /// It is an agent of a Dragonfly network.
    pub dragonfly: Option<Dragonfly>,
    /// Longest waits for a connection and for the headers of an answer, where they
    /// differ from the registry's.
    pub connect_timeout: Option<Duration>,
    /// The same.
    pub first_byte_timeout: Option<Duration>,
}

/// How a mirror is told which registry is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Upstream {
    /// Not at all, or by a header in [`Mirror::headers`].
    #[default]
    Fixed,
    /// By the query `ns=HOST`, as containerd does.
    Query,
    /// The mirror is a forward proxy: requests name the registry themselves. `plain`
    /// makes them plain HTTP even if the registry has TLS, which the proxy then adds.
    Proxy {
        /// Whether to do that.
        plain: bool,
    },
}

impl Mirror {
    /// A mirror with default settings.
    #[must_use]
    pub fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            headers: Vec::new(),
            ping_url: None,
            health_check_interval: Duration::from_secs(5),
            failure_limit: 5,
            skip_verify: false,
            ca_files: Vec::new(),
            share_credentials: true,
            upstream: Upstream::default(),
            dragonfly: None,
            connect_timeout: None,
            first_byte_timeout: None,
        }
    }
}

impl Mirror {
    /// The URL as it may be shown: that of a proxy may hold a password.
    pub(super) fn shown_url(&self) -> String {
        match Url::parse(&self.url) {
            Ok(url) => public_name(&url),
            Err(_) => "(no URL)".to_owned(),
        }
    }

    /// An agent of a Dragonfly network with default settings.
    ///
    /// * `upstream`: the registry that it stands for, as `https://host`.
    #[must_use]
    pub fn dragonfly(url: &str, upstream: &str) -> Self {
        Self {
            headers: vec![("X-Dragonfly-Registry".to_owned(), upstream.to_owned())],
            dragonfly: Some(Dragonfly::default()),
            // It is on this machine or near it: what takes longer will not come.
            connect_timeout: Some(Duration::from_secs(1)),
            ..Self::new(url)
        }
    }
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror")
            .field("url", &self.shown_url())
            .field("headers", &names(&self.headers))
            .field("ping_url", &self.ping_url)
            .field("health_check_interval", &self.health_check_interval)
            .field("failure_limit", &self.failure_limit)
            .field("skip_verify", &self.skip_verify)
            .field("ca_files", &self.ca_files)
            .field("share_credentials", &self.share_credentials)
            .field("upstream", &self.upstream)
            .field("dragonfly", &self.dragonfly)
            .field("connect_timeout", &self.connect_timeout)
            .field("first_byte_timeout", &self.first_byte_timeout)
            .finish()
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
    /// Who we are. Can be replaced later:
    /// [`RegistryBackend::set_credentials`](super::RegistryBackend::set_credentials).
    pub auth: Credentials,
    /// Asked for other credentials when those in use are refused.
    pub provider: Option<Arc<dyn CredentialProvider>>,
    /// Longest waits.
    pub timeouts: Timeouts,
    /// How often and when to try again.
    pub retry: RetryLimits,
    /// Files with certificates (PEM) to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Shown to the registry if it asks, and to no host that it redirects to.
    pub client_certificate: Option<ClientCertificate>,
    /// Accept any certificate. Chunks are verified nevertheless, but credentials
    /// may go to the wrong server.
    pub skip_verify: bool,
    /// Extra headers for requests to `host`; not sent anywhere else.
    pub headers: Vec<(String, String)>,
    /// Tried in this order before the registry itself.
    pub mirrors: Vec<Mirror>,
    /// What may be asked of the registry itself when no mirror delivers.
    pub fallback: Fallback,
    /// Replaces the host (with optional port) of every redirect.
    pub redirect_host: Option<String>,
    /// Replaces the scheme of every redirect.
    pub redirect_scheme: Option<Scheme>,
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
            provider: None,
            timeouts: Timeouts::default(),
            retry: RetryLimits::default(),
            ca_files: Vec::new(),
            client_certificate: None,
            skip_verify: false,
            headers: Vec::new(),
            mirrors: Vec::new(),
            fallback: Fallback::default(),
            redirect_host: None,
            redirect_scheme: None,
        }
    }
}

impl fmt::Debug for RegistryConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryConfig")
            .field("host", &self.host)
            .field("repo", &self.repo)
            .field("scheme", &self.scheme)
            .field("auth", &self.auth)
            .field("provider", &self.provider.is_some())
            .field("timeouts", &self.timeouts)
            .field("retry", &self.retry)
            .field("ca_files", &self.ca_files)
            .field("client_certificate", &self.client_certificate)
            .field("skip_verify", &self.skip_verify)
            .field("headers", &names(&self.headers))
            .field("mirrors", &self.mirrors)
            .field("fallback", &self.fallback)
            .field("redirect_host", &self.redirect_host)
            .field("redirect_scheme", &self.redirect_scheme)
            .finish()
    }
}

/// Values of headers may be secrets.
fn names(headers: &[(String, String)]) -> Vec<&str> {
    headers.iter().map(|(name, _)| name.as_str()).collect()
}
