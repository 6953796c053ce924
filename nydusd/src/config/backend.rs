//! Back-end settings: the same keys under `backend.<type>` of version 2 and
//! `device.backend.config` of version 1.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;

use super::section::Section;
use super::{Backend, ConfigError, Login, Registry};

/// Longest time-out that makes sense, in seconds: a day.
const MAX_SECONDS: u64 = 86_400;

/// Reads the settings of back end `kind`; `type_key` names where the kind came from.
pub(super) fn read(
    kind: &str,
    type_key: &str,
    section: &mut Section<'_>,
) -> Result<Backend, ConfigError> {
    match kind {
        "localfs" => local(section),
        "registry" => registry(section).map(Backend::Registry),
        other => Err(unsupported(other, type_key)),
    }
}

/// The error for a back end that is unknown, or known and not there yet.
pub(super) fn unsupported(kind: &str, type_key: &str) -> ConfigError {
    let feature = match kind {
        "localdisk" => "the local disk back end",
        "oss" => "the OSS back end",
        "s3" => "the S3 back end",
        "http-proxy" => "the HTTP proxy back end",
        _ => {
            return ConfigError::Wrong {
                key: type_key.to_owned(),
                value: format!("\"{}\"", kind.escape_debug()),
                allowed: "\"localfs\" or \"registry\"".to_owned(),
            };
        }
    };
    ConfigError::Unsupported {
        key: type_key.to_owned(),
        feature,
        hint: "use `localfs` or `registry`",
    }
}

fn local(section: &mut Section<'_>) -> Result<Backend, ConfigError> {
    if section
        .text("blob_file")?
        .is_some_and(|file| !file.is_empty())
    {
        return Err(ConfigError::Unsupported {
            key: section.path_of("blob_file"),
            feature: "a single blob file",
            hint: "give the directory that holds it as `dir`; the file must be named by the blob id",
        });
    }
    let mut dirs = vec![PathBuf::from(section.required_text("dir")?)];
    dirs.extend(section.texts("alt_dirs")?.into_iter().map(PathBuf::from));
    section.ignore(&["readahead", "readahead_sec"]);
    Ok(Backend::LocalFs(dirs))
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
    let plain_http = scheme(section, "scheme")?.is_some_and(|scheme| scheme == "http");
    let login = login(section)?;
    proxy(section)?;
    scheme(section, "blob_url_scheme")?;
    section.text("blob_redirected_host")?;
    for key in ["blob_url_scheme", "blob_redirected_host"] {
        if section.text(key)?.is_some_and(|text| !text.is_empty()) {
            section.warn(key, "rewriting redirects is not supported yet");
        }
    }
    Ok(Registry {
        host,
        repo,
        plain_http,
        login,
        skip_verify: section.flag("skip_verify", false)?,
        ca_cert_files: section
            .texts("ca_cert_files")?
            .into_iter()
            .map(PathBuf::from)
            .collect(),
        timeout: seconds(section, "timeout")?,
        connect_timeout: seconds(section, "connect_timeout")?,
        retry_limit: match section.number("retry_limit", 0, 0..=255)? {
            // What every client sends when nobody chose anything.
            0 => None,
            limit => u8::try_from(limit).ok(),
        },
    })
}

fn scheme(section: &mut Section<'_>, key: &'static str) -> Result<Option<String>, ConfigError> {
    match section.text(key)?.unwrap_or_default() {
        "" => Ok(None),
        scheme @ ("http" | "https") => Ok(Some(scheme.to_owned())),
        _ => Err(section.wrong(key, "\"http\" or \"https\"")),
    }
}

/// 0 would make every request fail; clients mean the default by it.
fn seconds(section: &mut Section<'_>, key: &'static str) -> Result<Option<Duration>, ConfigError> {
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
fn proxy(section: &mut Section<'_>) -> Result<(), ConfigError> {
    let Some(mut proxy) = section.section("proxy")? else {
        return Ok(());
    };
    let url = proxy.text("url")?.unwrap_or_default();
    let fallback = proxy.flag("fallback", true)?;
    proxy.ignore(&[
        "ping_url",
        "check_interval",
        "check_pause_elapsed",
        "use_http",
        "dragonfly_scheduler_endpoint",
    ]);
    if !url.is_empty() && !fallback {
        return Err(ConfigError::Unsupported {
            key: proxy.path_of("url"),
            feature: "fetching through a proxy",
            hint: "remove `proxy.url` to fetch from the registry directly",
        });
    }
    if !url.is_empty() {
        proxy.warn(
            "url",
            "proxies are not supported yet, fetching from the registry directly",
        );
    }
    section.close(proxy);
    Ok(())
}
