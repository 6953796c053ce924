//! One server that has the blobs: the registry itself, or a mirror of it.
//!
//! Each has its own headers, credentials, remembered redirects and habits.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use tokio::sync::Notify;
use url::Url;

use super::answer::sanitise;
use super::auth::{Authenticator, Credentials};
use super::client::LOST_PIECE;
use super::config::{Mirror, RegistryConfig, Scheme, Timeouts, Upstream};
use super::distrust::Distrust;
use super::dragonfly::{Dragonfly, PIECE, WholeBlob};
use super::health::{Health, Probe};
use super::hedge::Manner;
use super::pieces::Pieces;
use super::redirects::Redirects;
use super::tls::{Tls, http_client, is_loopback};
use crate::backend::{BackendError, Priority};
use crate::blob_id::BlobId;
use crate::sync::{Arc, AtomicBool, Mutex, lock};
use crate::{Digest, Digester};

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
    /// Longest wait for the headers of an answer.
    pub(super) patience: Duration,
    pub(super) distrust: Distrust,
    pub(super) pieces: Pieces,
    dragonfly: Option<Dragonfly>,
    /// Blobs that the agent is to fetch whole, and whether it was told.
    whole: Mutex<HashMap<BlobId, bool>>,
    /// The registry as a query, for mirrors that want it.
    upstream: Option<String>,
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
            proxy: None,
        };
        if config.skip_verify && config.scheme == Scheme::Https {
            warn_insecure(&config.host);
        }
        let host = &config.host;
        let base = base_url(&format!("{}://{host}", config.scheme), host, &config.repo)?;
        let (headers, auth) = (&config.headers, config.auth.clone());
        Self::new(config, config.timeouts, tls, base, headers, auth)
    }

    /// A mirror of it.
    ///
    /// * `changed`: is told when it is left alone.
    pub(super) fn mirror(
        config: &RegistryConfig,
        mirror: &Mirror,
        changed: &Arc<Notify>,
    ) -> Result<Self, BackendError> {
        let (scheme, host) = mirror
            .url
            .split_once("://")
            .filter(|(scheme, _)| matches!(*scheme, "http" | "https"))
            .ok_or_else(|| bad("address of a mirror", &mirror.url))?;
        let (host, path) = host.split_once('/').unwrap_or((host, ""));
        let base = match (mirror.upstream, path.trim_end_matches('/')) {
            (Upstream::Proxy { plain }, _) => {
                let scheme = if plain { Scheme::Http } else { config.scheme };
                base_url(
                    &format!("{scheme}://{}", config.host),
                    &config.host,
                    &config.repo,
                )?
            }
            (_, "") => base_url(&format!("{scheme}://{host}"), host, &config.repo)?,
            (_, path) => base_url(&format!("{scheme}://{host}/{path}"), host, &config.repo)?,
        };
        let ca_files = [config.ca_files.as_slice(), &mirror.ca_files].concat();
        let plain = scheme == "http";
        let tls = Tls {
            host,
            plain,
            ca_files: &ca_files,
            certificate: None,
            skip_verify: mirror.skip_verify,
            proxy: matches!(mirror.upstream, Upstream::Proxy { .. }).then_some(&mirror.url),
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
        let timeouts = Timeouts {
            connect: mirror.connect_timeout.unwrap_or(config.timeouts.connect),
            ..config.timeouts
        };
        let mut endpoint = Self::new(config, timeouts, tls, base, &mirror.headers, credentials)?;
        endpoint.shares_credentials = shares;
        endpoint.health = Some(Health::new(mirror, changed));
        endpoint.max_skip = MAX_SKIP_OF_MIRROR;
        endpoint.patience = mirror
            .first_byte_timeout
            .map_or(endpoint.patience, |limit| timeouts.connect + limit);
        endpoint.upstream = (mirror.upstream == Upstream::Query).then(|| config.host.clone());
        if let Some(dragonfly) = &mirror.dragonfly {
            add_missing(&mut endpoint.headers, dragonfly.fixed_headers()?);
            endpoint.dragonfly = Some(dragonfly.clone());
        }
        Ok(endpoint)
    }

    fn new(
        config: &RegistryConfig,
        timeouts: Timeouts,
        tls: Tls<'_>,
        base: Url,
        headers: &[(String, String)],
        credentials: Credentials,
    ) -> Result<Self, BackendError> {
        let http = http_client(tls, &timeouts)?;
        let away = match tls.certificate {
            None => http.clone(),
            Some(_) => {
                let certificate = None;
                http_client(Tls { certificate, ..tls }, &timeouts)?
            }
        };
        // Tokens never come by way of a proxy.
        let login = match tls.proxy {
            None => http.clone(),
            Some(_) => http_client(Tls { proxy: None, ..tls }, &timeouts)?,
        };
        let (provider, repo) = (config.provider.clone(), &config.repo);
        Ok(Self {
            auth: Authenticator::new(login, timeouts, repo, credentials, provider)?,
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
            patience: timeouts.connect + timeouts.read,
            distrust: Distrust::default(),
            pieces: Pieces::default(),
            dragonfly: None,
            whole: Mutex::default(),
            upstream: None,
        })
    }

    /// Where the server has the blob.
    pub(super) fn blob_url(&self, blob: &BlobId) -> Result<Url, BackendError> {
        // The colon would make a relative reference look like a scheme.
        let mut url = self
            .base
            .join(&format!("./sha256:{blob}"))
            .map_err(|error| BackendError::Config(format!("blob {blob}: {error}")))?;
        if let Some(host) = &self.upstream {
            url.query_pairs_mut().append_pair("ns", host);
        }
        Ok(url)
    }

    /// Whether nothing bad is known about it.
    pub(super) fn is_well(&self) -> bool {
        self.health.as_ref().is_none_or(|health| health.is_well())
    }

    /// How long to wait for the headers of an answer. A reader is helped otherwise, but one
    /// who waits for what was a guess waits as long as that takes.
    pub(super) fn patience_for(&self, manner: Manner) -> Duration {
        let guess = manner.priority == Priority::Speculation && self.is_dragonfly();
        match guess {
            true => self.patience.min(LOST_PIECE),
            false => self.patience,
        }
    }

    /// Whether it is an agent of a Dragonfly network.
    pub(super) fn is_dragonfly(&self) -> bool {
        self.dragonfly.is_some()
    }

    /// The part of a blob that its agents share as one thing, if it is not all of it. What
    /// is fetched whole is one thing, also for those who ask for parts of it later.
    pub(super) fn window(&self, blob: &BlobId, manner: Manner, at: u64) -> Option<Range<u64>> {
        let tasks = self.dragonfly.as_ref()?.tasks;
        let parted = !lock(&self.whole).contains_key(blob);
        tasks.window(manner.blob_len, at).filter(|_| parted)
    }

    /// Where a seed peer comes among all, for a part of a blob: each has its own first
    /// one, so that all seeds have something to do and none has everything.
    pub(super) fn rank(&self, blob: &BlobId, at: u64) -> u64 {
        if !self.dragonfly.as_ref().is_some_and(|it| it.seed) {
            return 0;
        }
        let text = format!("{blob} {} {}", at / PIECE, self.base);
        let digest = Digest::of(Digester::Sha256, text.as_bytes());
        let first = digest.as_bytes().first_chunk::<8>().copied();
        // Never 0: what has no rank of its own keeps its place.
        u64::from_le_bytes(first.unwrap_or_default()) | 1
    }

    /// Headers for a request to the server itself.
    pub(super) fn headers_for(&self, blob: &BlobId, manner: Manner, at: u64) -> HeaderMap {
        let mut headers = self.headers.clone();
        if let Some(dragonfly) = &self.dragonfly {
            let whole = lock(&self.whole).get(blob) == Some(&false);
            let window = self.window(blob, manner, at);
            let more = dragonfly.headers(blob, manner.priority, whole, window.as_ref());
            add_missing(&mut headers, more);
        }
        headers
    }

    /// Has the agent fetch all of a blob, with the next request for it.
    ///
    /// * `first`: because it is the first request, and not because most is wanted.
    pub(super) fn want_whole(&self, blob: &BlobId, first: bool) {
        let when = self.dragonfly.as_ref().map(|it| it.whole_blob);
        let wanted = match when {
            Some(WholeBlob::FirstRead) => first,
            Some(WholeBlob::Profile) => !first,
            Some(WholeBlob::Never) | None => false,
        };
        if wanted {
            lock(&self.whole).entry(blob.clone()).or_insert(false);
        }
    }

    /// It delivered some of the blob.
    pub(super) fn delivered(&self, blob: &BlobId) {
        if let Some(told) = lock(&self.whole).get_mut(blob) {
            *told = true;
        }
    }

    /// How to find out whether it is well; `None` for a blob that has no URL.
    pub(super) fn probe(&self, blob: &BlobId) -> Option<Probe> {
        let manner = Manner {
            priority: Priority::OnDemand,
            direct: false,
            blob_len: None,
        };
        Some(Probe {
            http: self.http.clone(),
            headers: self.headers_for(blob, manner, 0),
            url: self.blob_url(blob).ok()?,
            auth: Arc::clone(&self.auth),
            limit: self.patience,
        })
    }
}

/// What the configuration says itself comes first.
fn add_missing(headers: &mut HeaderMap, more: HeaderMap) {
    for (name, value) in more {
        if let Some(name) = name
            && !headers.contains_key(&name)
        {
            headers.insert(name, value);
        }
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
