//! HTTP clients: which certificates they trust, and which one they show.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::answer;
use super::config::{ClientCertificate, Timeouts};
use crate::backend::BackendError;

/// What one client is for.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct Tls<'a> {
    /// Names the server in messages, and tells whether it is this machine.
    pub(in crate::backend) host: &'a str,
    /// Whether the server is spoken to without TLS; then a machine without any
    /// certificates will do.
    pub(in crate::backend) plain: bool,
    pub(in crate::backend) ca_files: &'a [PathBuf],
    pub(in crate::backend) certificate: Option<&'a ClientCertificate>,
    pub(in crate::backend) skip_verify: bool,
    /// All requests go through this forward proxy.
    pub(in crate::backend) proxy: Option<&'a String>,
}

/// Builds a client that follows no redirects and repeats nothing: both are done by
/// hand, with one limit for everything.
///
/// # Errors
/// [`BackendError::Config`] for certificates that cannot be read.
pub(in crate::backend) fn http_client(
    tls: Tls<'_>,
    timeouts: &Timeouts,
) -> Result<reqwest::Client, BackendError> {
    // An error means that the process has a provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let failed = |error: reqwest::Error| {
        let cause = answer::chain(&error.without_url());
        BackendError::Config(format!("HTTP client: {cause}"))
    };
    let mut builder = builder(tls, timeouts);
    if let Some(proxy) = tls.proxy {
        builder = builder.proxy(reqwest::Proxy::all(proxy).map_err(failed)?);
    }
    for path in tls.ca_files {
        let certificates = reqwest::Certificate::from_pem_bundle(&read(path)?)
            .map_err(|error| unusable(path, &answer::chain(&error)))?;
        if certificates.is_empty() {
            return Err(unusable(path, "there are none in it"));
        }
        builder = builder.tls_certs_merge(certificates);
    }
    if let Some(certificate) = tls.certificate {
        builder = builder.identity(identity(certificate)?);
    }
    match builder.build() {
        // A machine without certificates can use a plain registry all the same.
        Err(_) if tls.plain && tls.ca_files.is_empty() && tls.proxy.is_none() => {
            self::builder(tls, timeouts)
                .tls_certs_only([])
                .build()
                .map_err(failed)
        }
        result => result.map_err(failed),
    }
}

fn builder(tls: Tls<'_>, timeouts: &Timeouts) -> reqwest::ClientBuilder {
    let builder = reqwest::Client::builder()
        .user_agent(concat!("nydus/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(timeouts.connect)
        .pool_max_idle_per_host(16)
        .pool_idle_timeout(Duration::from_secs(60))
        .tcp_keepalive(Duration::from_secs(30))
        .http2_adaptive_window(true)
        .tls_danger_accept_invalid_certs(tls.skip_verify);
    if is_loopback(tls.host) && tls.proxy.is_none() {
        // A proxy of the environment does not reach our own loopback.
        return builder.no_proxy();
    }
    builder
}

/// Whether `host`, with or without port, is this machine.
pub(in crate::backend) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[');
    ["localhost", "127.", "::1"]
        .iter()
        .any(|local| host.starts_with(local))
}

fn identity(from: &ClientCertificate) -> Result<reqwest::Identity, BackendError> {
    let mut pem = read(&from.certificate)?;
    if from.key != from.certificate {
        pem.push(b'\n');
        pem.extend(read(&from.key)?);
    }
    reqwest::Identity::from_pem(&pem)
        .map_err(|error| unusable(&from.certificate, &answer::chain(&error)))
}

fn read(path: &Path) -> Result<Vec<u8>, BackendError> {
    std::fs::read(path).map_err(|error| unusable(path, &error.to_string()))
}

fn unusable(path: &Path, cause: &str) -> BackendError {
    BackendError::Config(format!("certificates {}: {cause}", path.display()))
}
