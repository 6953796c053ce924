//! One server that has the blobs: the registry itself, or a mirror of it.
//!
//! Each has its own headers, credentials, remembered redirects and habits.

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use super::answer::sanitise;
use super::auth::{Authenticator, Credentials};
use super::config::{Mirror, RegistryConfig, Scheme};
use super::health::Health;
use super::redirects::Redirects;
use super::tls::{Tls, http_client, is_loopback};
use crate::backend::BackendError;
use crate::blob_id::BlobId;
use crate::sync::{Arc, AtomicBool};

/// Most bytes that are read and thrown away from a registry that ignores ranges.
const MAX_SKIP: u64 = 512 << 20;
/// The same for a mirror, which there is something better than.
const MAX_SKIP_OF_MIRROR: u64 = 1 << 20;

pub(super) struct Endpoint {
    /// For requests to the server itself.
    pub(super) http: reqwest::Client,
    /// For hosts that it redirects to.
    pub(super) away: reqwest::Client,
    /// `https://host/v2/repo/blobs/`.
    pub(super) base: Url,
    pub(super) headers: HeaderMap,
    pub(super) auth: Arc<Authenticator>,
    /// Whether replaced credentials concern it.
    pub(super) shares_credentials: bool,
    pub(super) redirects: Redirects,
    /// `None` for the registry itself, which is always asked.
    pub(super) health: Option<Arc<Health>>,
    pub(super) max_skip: u64,
    /// It answered a request for a range with the whole blob.
    pub(super) ignores_ranges: AtomicBool,
    /// It does not answer HEAD.
    pub(super) refuses_head: AtomicBool,
    pub(super) redirect_host: Option<String>,
    pub(super) redirect_scheme: Option<Scheme>,
}

impl Endpoint {
    /// The registry itself.
    pub(super) fn origin(config: &RegistryConfig) -> Result<Self, BackendError> {
        let tls = Tls {
            host: &config.host,
            plain: config.scheme == Scheme::Http,
            ca_files: &config.ca_files,
            certificate: config.client_certificate.as_ref(),
            skip_verify: config.skip_verify,
        };
        if config.skip_verify && config.scheme == Scheme::Https {
            warn_insecure(&config.host);
        }
        let host = &config.host;
        let base = base_url(&format!("{}://{host}", config.scheme), host, &config.repo)?;
        let endpoint = Self::new(config, tls, base, &config.headers, config.auth.clone())?;
        Ok(endpoint)
    }

    /// A mirror of it.
    pub(super) fn mirror(config: &RegistryConfig, mirror: &Mirror) -> Result<Self, BackendError> {
        let (scheme, host) = mirror
            .url
            .split_once("://")
            .filter(|(scheme, _)| matches!(*scheme, "http" | "https"))
            .ok_or_else(|| bad("address of a mirror", &mirror.url))?;
        let (host, path) = host.split_once('/').unwrap_or((host, ""));
        let prefix = match path.trim_end_matches('/') {
            "" => format!("{scheme}://{host}"),
            path => format!("{scheme}://{host}/{path}"),
        };
        let base = base_url(&prefix, host, &config.repo)?;
        let ca_files = [config.ca_files.as_slice(), &mirror.ca_files].concat();
        let plain = scheme == "http";
        let tls = Tls {
            host,
            plain,
            ca_files: &ca_files,
            certificate: None,
            skip_verify: mirror.skip_verify,
        };
        if mirror.skip_verify && !plain {
            warn_insecure(host);
        }
        let safe = !plain || config.scheme == Scheme::Http || is_loopback(host);
        let shares = mirror.share_credentials && safe;
        let credentials = if shares {
            config.auth.clone()
        } else {
            Credentials::Anonymous
        };
        let mut endpoint = Self::new(config, tls, base, &mirror.headers, credentials)?;
        endpoint.shares_credentials = shares;
        endpoint.health = Some(Health::new(mirror));
        endpoint.max_skip = MAX_SKIP_OF_MIRROR;
        Ok(endpoint)
    }

    fn new(
        config: &RegistryConfig,
        tls: Tls<'_>,
        base: Url,
        headers: &[(String, String)],
        credentials: Credentials,
    ) -> Result<Self, BackendError> {
        let http = http_client(tls, &config.timeouts)?;
        let away = match tls.certificate {
            None => http.clone(),
            Some(_) => {
                let certificate = None;
                http_client(Tls { certificate, ..tls }, &config.timeouts)?
            }
        };
        let provider = config.provider.clone();
        let (timeouts, repo) = (config.timeouts, &config.repo);
        Ok(Self {
            auth: Authenticator::new(http.clone(), timeouts, repo, credentials, provider)?,
            http,
            away,
            base,
            headers: header_map(headers)?,
            shares_credentials: true,
            redirects: Redirects::default(),
            health: None,
            max_skip: MAX_SKIP,
            ignores_ranges: AtomicBool::new(false),
            refuses_head: AtomicBool::new(false),
            redirect_host: config.redirect_host.clone().filter(|host| !host.is_empty()),
            redirect_scheme: config.redirect_scheme,
        })
    }

    /// Where the server has the blob.
    pub(super) fn blob_url(&self, blob: &BlobId) -> Result<Url, BackendError> {
        // The colon would make a relative reference look like a scheme.
        self.base
            .join(&format!("./sha256:{blob}"))
            .map_err(|error| BackendError::Config(format!("blob {blob}: {error}")))
    }
}

fn warn_insecure(host: &str) {
    tracing::warn!(
        "{host}: certificates are not verified; whoever is in between sees the credentials"
    );
}

fn bad(what: &str, value: &str) -> BackendError {
    BackendError::Config(format!("{:?} is no {what}", sanitise(value)))
}

/// * `prefix`: scheme, host and perhaps a path.
fn base_url(prefix: &str, host: &str, repo: &str) -> Result<Url, BackendError> {
    let host_ok = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    let repo_ok = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
    if host.is_empty() || !host.chars().all(host_ok) {
        return Err(bad("host of a registry", host));
    }
    let segment_ok = |segment: &str| !segment.is_empty() && segment.chars().any(|c| c != '.');
    if !repo.chars().all(repo_ok) || !repo.split('/').all(segment_ok) {
        return Err(bad("repository of a registry", repo));
    }
    Url::parse(&format!("{prefix}/v2/{repo}/blobs/"))
        .ok()
        .ok_or_else(|| bad("host of a registry", host))
}

fn header_map(list: &[(String, String)]) -> Result<HeaderMap, BackendError> {
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
