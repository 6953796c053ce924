//! Back-end settings: the same keys under `backend.<type>` of version 2 and
//! `device.backend.config` of version 1.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use storage::backend::http_proxy::{Address, HttpProxyConfig};
use storage::backend::registry::{
    ClientCertificate, Dragonfly, Fallback, Mirror, RetryLimits, Scheme, Timeouts, WhoFallsBack,
};
use storage::gate::Limits;

use super::section::Section;
use super::{Backend, ConfigError, Login, Registry, p2p};

mod object;

/// Longest time-out that makes sense, in seconds: a day.
const MAX_SECONDS: u64 = 86_400;

/// Most requests at a time that may be configured.
const MAX_REQUESTS: u64 = 65_536;

/// Every back end that there is.
pub(super) const KINDS: &[&str] = &[
    "localfs",
    "localdisk",
    "registry",
    "oss",
    "s3",
    "azure",
    "gcs",
    "http-proxy",
];

/// Reads the settings of back end `kind`; `type_key` names where the kind came from.
pub(super) fn read(
    kind: &str,
    type_key: &str,
    section: &mut Section<'_>,
) -> Result<Backend, ConfigError> {
    match kind {
        "localfs" => local(section),
        "localdisk" => local_disk(section),
        "registry" => registry(section).map(Backend::Registry),
        "oss" | "s3" | "azure" | "gcs" => object::read(kind, section).map(Backend::Object),
        "http-proxy" => http_proxy(section).map(Backend::HttpProxy),
        other => Err(unsupported(other, type_key)),
    }
}

/// The error for a back end that is unknown.
pub(super) fn unsupported(kind: &str, type_key: &str) -> ConfigError {
    ConfigError::Wrong {
        key: type_key.to_owned(),
        value: format!("\"{}\"", kind.escape_debug()),
        allowed: "\"localfs\", \"localdisk\", \"registry\", \"oss\", \"s3\", \"azure\", \"gcs\" or \"http-proxy\""
            .to_owned(),
    }
}

fn local(section: &mut Section<'_>) -> Result<Backend, ConfigError> {
    section.ignore(&["readahead", "readahead_sec"]);
    if let Some(file) = filled(section, "blob_file")? {
        section.ignore(&["dir", "alt_dirs"]);
        return Ok(Backend::BlobFile(file.into()));
    }
    let mut dirs = vec![PathBuf::from(section.required_text("dir")?)];
    dirs.extend(section.texts("alt_dirs")?.into_iter().map(PathBuf::from));
    Ok(Backend::LocalFs(dirs))
}

fn local_disk(section: &mut Section<'_>) -> Result<Backend, ConfigError> {
    Ok(Backend::LocalDisk {
        path: section.required_text("device_path")?.into(),
        with_table: !section.flag("disable_gpt", false)?,
    })
}

fn http_proxy(section: &mut Section<'_>) -> Result<HttpProxyConfig, ConfigError> {
    let addr = section.required_text("addr")?;
    let path = section.text("path")?.unwrap_or_default().trim_matches('/');
    let address = match addr {
        socket if socket.starts_with('/') => Address::Socket(socket.into()),
        url if url.starts_with("http://") || url.starts_with("https://") => {
            Address::Url(format!("{}/{path}", url.trim_end_matches('/')))
        }
        _ => {
            return Err(section.wrong(
                "addr",
                "an address that starts with http:// or https://, or the path of a socket",
            ));
        }
    };
    let network = Network::read(section)?;
    let mut config = HttpProxyConfig::new(address);
    (config.timeouts, config.retry) = (network.timeouts, network.retry);
    (config.ca_files, config.skip_verify) = (network.ca_files, network.skip_verify);
    Ok(config)
}

/// What the server is asked for at a time, if the settings say anything about it.
pub(super) fn limits(section: &mut Section<'_>) -> Result<Option<Limits>, ConfigError> {
    let usual = Limits::default();
    let count = |count: u64, usual: usize| match count {
        0 => usual,
        // Never fails: it is in range.
        count => usize::try_from(count).unwrap_or(usual),
    };
    let limits = Limits {
        requests: count(
            section.number("max_requests", 0, 0..=MAX_REQUESTS)?,
            usual.requests,
        ),
        ahead: count(
            section.number("max_background_requests", 0, 0..=MAX_REQUESTS)?,
            usual.ahead,
        ),
        bandwidth: section.number("bandwidth_limit", 0, 0..=u64::MAX)?,
    };
    Ok((limits != usual).then_some(limits))
}

/// What all back ends behind a network have in common.
struct Network {
    timeouts: Timeouts,
    retry: RetryLimits,
    ca_files: Vec<PathBuf>,
    skip_verify: bool,
}

impl Network {
    fn read(section: &mut Section<'_>) -> Result<Self, ConfigError> {
        no_proxy(section)?;
        let (mut timeouts, mut retry) = (Timeouts::default(), RetryLimits::default());
        timeouts.read = seconds(section, "timeout")?.unwrap_or(timeouts.read);
        timeouts.connect = seconds(section, "connect_timeout")?.unwrap_or(timeouts.connect);
        if let Some(limit) = retry_limit(section)? {
            retry.retries = limit.into();
        }
        Ok(Self {
            timeouts,
            retry,
            ca_files: files(section, "ca_cert_files")?,
            skip_verify: section.flag("skip_verify", false)?,
        })
    }
}

pub(super) fn files(
    section: &mut Section<'_>,
    key: &'static str,
) -> Result<Vec<PathBuf>, ConfigError> {
    let files = section.texts(key)?;
    Ok(files.into_iter().map(PathBuf::from).collect())
}

/// A string that is there and not empty.
pub(super) fn filled<'a>(
    section: &mut Section<'a>,
    key: &'static str,
) -> Result<Option<&'a str>, ConfigError> {
    Ok(section.text(key)?.filter(|text| !text.is_empty()))
}

fn retry_limit(section: &mut Section<'_>) -> Result<Option<u8>, ConfigError> {
    match section.number("retry_limit", 0, 0..=255)? {
        // What every client sends when nobody chose anything.
        0 => Ok(None),
        limit => Ok(u8::try_from(limit).ok()),
    }
}

fn registry(section: &mut Section<'_>) -> Result<Registry, ConfigError> {
    let host = section.required_text("host")?.to_owned();
    let repo = section.required_text("repo")?.to_owned();
    if host.contains('/') {
        return Err(section.wrong(
            "host",
            "a host name with an optional port, like \"ghcr.io\"",
        ));
    }
    let plain_http = scheme(section, "scheme")? == Some(Scheme::Http);
    let login = login(section)?;
    let skip_verify = section.flag("skip_verify", false)?;
    let mut mirrors = mirrors(section)?;
    let mut fallback = Fallback::default();
    if let Some((mut proxy, who)) = p2p::proxy(section)? {
        proxy.skip_verify = skip_verify;
        mirrors.push(proxy);
        fallback = who;
    }
    Ok(Registry {
        host,
        repo,
        plain_http,
        login,
        skip_verify,
        ca_cert_files: files(section, "ca_cert_files")?,
        client_certificate: client_certificate(section)?,
        mirrors,
        fallback,
        redirect_host: filled(section, "blob_redirected_host")?.map(str::to_owned),
        redirect_scheme: scheme(section, "blob_url_scheme")?,
        timeout: seconds(section, "timeout")?,
        connect_timeout: seconds(section, "connect_timeout")?,
        retry_limit: retry_limit(section)?,
    })
}

fn client_certificate(section: &mut Section<'_>) -> Result<Option<ClientCertificate>, ConfigError> {
    let certificate = filled(section, "client_cert_file")?;
    let key = filled(section, "client_key_file")?;
    match (certificate, key) {
        (None, None) => Ok(None),
        (Some(certificate), key) => Ok(Some(ClientCertificate {
            certificate: certificate.into(),
            key: key.unwrap_or(certificate).into(),
        })),
        (None, Some(_)) => Err(ConfigError::Missing {
            key: section.path_of("client_cert_file"),
        }),
    }
}

fn mirrors(section: &mut Section<'_>) -> Result<Vec<Mirror>, ConfigError> {
    let mut mirrors = Vec::new();
    for mut table in section.sections("mirrors")? {
        let host = table.required_text("host")?;
        if !host.starts_with("http://") && !host.starts_with("https://") {
            return Err(table.wrong("host", "an address that starts with http:// or https://"));
        }
        let mut mirror = Mirror::new(host);
        mirror.headers = table.pairs("headers")?;
        mirror.ping_url = filled(&mut table, "ping_url")?.map(str::to_owned);
        mirror.health_check_interval =
            seconds(&mut table, "health_check_interval")?.unwrap_or(mirror.health_check_interval);
        let limit = table.number("failure_limit", 0, 0..=255)?;
        if let Some(limit) = u32::try_from(limit).ok().filter(|limit| *limit > 0) {
            mirror.failure_limit = limit;
        }
        mirror.skip_verify = table.flag("skip_verify", false)?;
        mirror.ca_files = files(&mut table, "ca_cert_files")?;
        mirror.share_credentials = table.flag("share_credentials", true)?;
        // What Dragonfly's own tools set up for a node.
        let names_dragonfly =
            |(name, _): &(String, String)| name.to_ascii_lowercase().starts_with("x-dragonfly-");
        if mirror.headers.iter().any(names_dragonfly) {
            mirror.dragonfly = Some(Dragonfly::default());
        }
        // Always so: a mirror is asked like the registry.
        table.ignore(&["auth_through"]);
        section.close(table);
        mirrors.push(mirror);
    }
    Ok(mirrors)
}

fn scheme(section: &mut Section<'_>, key: &'static str) -> Result<Option<Scheme>, ConfigError> {
    match section.text(key)?.unwrap_or_default() {
        "" => Ok(None),
        "http" => Ok(Some(Scheme::Http)),
        "https" => Ok(Some(Scheme::Https)),
        _ => Err(section.wrong(key, "\"http\" or \"https\"")),
    }
}

/// 0 would make every request fail; clients mean the default by it.
pub(super) fn seconds(
    section: &mut Section<'_>,
    key: &'static str,
) -> Result<Option<Duration>, ConfigError> {
    let seconds = section.number(key, 0, 0..=MAX_SECONDS)?;
    Ok((seconds > 0).then(|| Duration::from_secs(seconds)))
}

fn login(section: &mut Section<'_>) -> Result<Login, ConfigError> {
    let token = section
        .text("registry_token")?
        .filter(|token| !token.is_empty());
    let auth = section.text("auth")?.filter(|auth| !auth.is_empty());
    match (auth, token) {
        (_, Some(token)) => Ok(Login::Bearer(token.to_owned())),
        (Some(auth), None) => decode_auth(auth)
            .ok_or_else(|| section.wrong("auth", "the base64 form of `user:password`")),
        (None, None) => Ok(Login::Anonymous),
    }
}

/// Credentials from the base64 form of `user:password`.
pub(super) fn decode_auth(text: &str) -> Option<Login> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text.trim())
        .ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    Some(Login::Basic {
        user: user.to_owned(),
        password: password.to_owned(),
    })
}

/// A proxy that may be by-passed is by-passed; one that must be used is refused.
fn no_proxy(section: &mut Section<'_>) -> Result<(), ConfigError> {
    let path = section.path_of("proxy.url");
    match p2p::proxy(section)? {
        Some((_, fallback)) if fallback.who == WhoFallsBack::Never => {
            Err(ConfigError::Unsupported {
                key: path,
                feature: "fetching through a proxy from what is no registry",
                hint: "remove `proxy.url` to fetch directly",
            })
        }
        Some(_) => {
            let text = "proxies are for back end `registry`, fetching directly";
            section.warn("proxy.url", text);
            Ok(())
        }
        None => Ok(()),
    }
}
