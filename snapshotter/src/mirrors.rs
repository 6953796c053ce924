//! Mirrors of registries, as containerd is told of them: a directory with one
//! `hosts.toml` per registry (`remote.mirrors_config.dir`, containerd's `config_path`).
//!
//! Daemons get them as mirrors of their registry, in the order of the file. So a node on
//! which Dragonfly's `dfinit`, or anybody, has set up containerd reads lazily through the
//! same mirrors as it pulls.
//!
//! All files are checked at the start; the one of a registry is read again whenever a
//! daemon of it is started. Keys: containerd's, and `ping_url`, `health_check_interval`
//! and `failure_limit` of Nydus v2.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json, json};
use storage::oci::RegistryRef;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use crate::error::Error;

/// The file of a registry, in its directory.
const FILE: &str = "hosts.toml";
/// The directory of registries that have none.
const DEFAULT: &str = "_default";
/// Bytes of the longest file; real ones have a few hundred.
const MAX_SIZE: u64 = 1 << 20;
/// Mirrors of one registry.
const MAX_MIRRORS: usize = 64;
/// By this header an agent of Dragonfly learns which registry is meant.
const REGISTRY_HEADER: &str = "X-Dragonfly-Registry";

/// Where mirrors are looked up; nowhere if nobody said so.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mirrors {
    dir: Option<PathBuf>,
}

impl Mirrors {
    /// Takes a directory, unless it is empty, and checks all files in it.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names file, key and value; a file that cannot be read.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        if dir.as_os_str().is_empty() {
            return Ok(Self::default());
        }
        match fs::read_dir(dir) {
            Ok(entries) => {
                for entry in entries {
                    let entry = entry.map_err(Error::io(dir, "cannot list"))?;
                    read(&entry.path().join(FILE))?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!("no {}: there are no mirrors yet", dir.display());
            }
            Err(error) => return Err(Error::io(dir, "cannot list")(error)),
        }
        Ok(Self {
            dir: Some(dir.to_owned()),
        })
    }

    /// Adds the mirrors of `place` to `backend`, the complete settings of a registry,
    /// before those that it has. A file that has become unreadable is no reason to have
    /// no container: the registry serves without mirrors.
    pub(crate) fn add_to(&self, backend: &mut Json, place: &RegistryRef) {
        let found = self.of(place).unwrap_or_else(|error| {
            tracing::warn!("mirrors of {} are not used: {error}", place.host);
            Vec::new()
        });
        if found.is_empty() {
            return;
        }
        let scheme = backend["scheme"].as_str().unwrap_or("https");
        let host = backend["host"].as_str().unwrap_or(&place.host);
        let registry = format!("{scheme}://{host}");
        let mut mirrors: Vec<_> = found
            .into_iter()
            .map(|mirror| mirror.to_json(&registry))
            .collect();
        if let Some(own) = backend["mirrors"].as_array() {
            mirrors.extend_from_slice(own);
        }
        backend["mirrors"] = Json::Array(mirrors);
    }

    fn of(&self, place: &RegistryRef) -> Result<Vec<Mirror>, Error> {
        let Some(dir) = &self.dir else {
            return Ok(Vec::new());
        };
        // As containerd does: the first directory that exists is the one that counts.
        let mut names = directories(&place.host).into_iter();
        let Some(at) = names.find(|name| dir.join(name).is_dir()) else {
            return Ok(Vec::new());
        };
        let mut mirrors = read(&dir.join(&at).join(FILE))?;
        for mirror in &mut mirrors {
            mirror.for_all_registries = at == DEFAULT;
        }
        Ok(mirrors)
    }
}

/// Directories for a registry, the most particular first.
fn directories(host: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((name, port)) = host.rsplit_once(':')
        && !port.contains(']')
    {
        names.push(format!("{name}_{port}_"));
    }
    names.extend([host.to_owned(), DEFAULT.to_owned()]);
    names
}

/// One mirror.
#[derive(Clone, Debug, Default, PartialEq)]
struct Mirror {
    /// Without the `/v2` of the registry's API.
    url: String,
    headers: Vec<(String, String)>,
    ping_url: Option<String>,
    health_check_interval: Option<i64>,
    failure_limit: Option<i64>,
    skip_verify: bool,
    ca: Vec<PathBuf>,
    for_all_registries: bool,
}

impl Mirror {
    /// In the daemon's words. What serves all registries must be told which one is meant:
    /// containerd says it in its URLs, Dragonfly knows this header as well.
    fn to_json(&self, registry: &str) -> Json {
        let mut headers: Map<String, Json> = self
            .headers
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect();
        let names_it = |name: &String| name.eq_ignore_ascii_case(REGISTRY_HEADER);
        if self.for_all_registries && !headers.keys().any(names_it) {
            headers.insert(REGISTRY_HEADER.to_owned(), json!(registry));
        }
        let mut mirror = json!({"host": self.url, "headers": headers});
        if let Some(url) = &self.ping_url {
            mirror["ping_url"] = json!(url);
        }
        if let Some(seconds) = self.health_check_interval {
            mirror["health_check_interval"] = json!(seconds);
        }
        if let Some(limit) = self.failure_limit {
            mirror["failure_limit"] = json!(limit);
        }
        if self.skip_verify {
            mirror["skip_verify"] = json!(true);
        }
        if !self.ca.is_empty() {
            mirror["ca_cert_files"] = json!(self.ca);
        }
        mirror
    }
}

/// The mirrors in a file that pulls may use, in its order; none if there is no such file.
fn read(path: &Path) -> Result<Vec<Mirror>, Error> {
    let mut text = String::new();
    let opened = fs::File::open(path).and_then(|file| {
        let length = file.take(MAX_SIZE + 1).read_to_string(&mut text)?;
        Ok(length as u64)
    });
    match opened {
        Ok(length) if length > MAX_SIZE => {
            let reason = format!("{}: more than {MAX_SIZE} bytes", path.display());
            Err(Error::Invalid(reason))
        }
        Ok(_) => parse(&text, path)
            .map_err(|reason| Error::Invalid(format!("{}: {reason}", path.display()))),
        // Neither is a plain file where others have directories of registries.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(Error::io(path, "cannot read")(error)),
    }
}

fn parse(text: &str, path: &Path) -> Result<Vec<Mirror>, String> {
    let not_toml = |error: toml::de::Error| error.to_string();
    let table: Table = toml::from_str(text).map_err(not_toml)?;
    for key in table.keys() {
        match key.as_str() {
            // What containerd does with the registry itself is its own affair.
            "host" | "server" | "capabilities" | "ca" | "client" | "skip_verify" | "header"
            | "override_path" | "dial_timeout" => {}
            _ => tracing::warn!("{}: `{key}` is unknown and ignored", path.display()),
        }
    }
    let Some(hosts) = table.get("host") else {
        return Ok(Vec::new());
    };
    let hosts = hosts.as_table().ok_or("`host` must be a table")?;
    if hosts.len() > MAX_MIRRORS {
        return Err(format!("`host`: more than {MAX_MIRRORS} mirrors"));
    }
    let mut mirrors = Vec::new();
    for name in order(text).map_err(not_toml)? {
        let Some(settings) = hosts.get(&name) else {
            continue;
        };
        let at = format!("host.{name:?}");
        let settings = settings
            .as_table()
            .ok_or_else(|| format!("`{at}` must be a table"))?;
        let host = Host { at, settings, path };
        mirrors.extend(host.mirror(&name)?);
    }
    Ok(mirrors)
}

/// The names of hosts as they follow each other in the file, which tables forget.
fn order(text: &str) -> Result<Vec<String>, toml::de::Error> {
    let table = DeTable::parse(text)?;
    let hosts = table
        .get_ref()
        .iter()
        .find(|(key, _)| *key.get_ref() == "host");
    let mut names = Vec::new();
    if let Some((_, value)) = hosts
        && let DeValue::Table(hosts) = value.get_ref()
    {
        names.extend(
            hosts
                .keys()
                .map(|key| (key.span().start, key.get_ref().to_string())),
        );
    }
    names.sort();
    Ok(names.into_iter().map(|(_, name)| name).collect())
}

/// What a file says about one host.
struct Host<'a> {
    /// Its place in the file, for errors.
    at: String,
    settings: &'a Table,
    path: &'a Path,
}

impl Host<'_> {
    /// As a mirror, if it can be one.
    fn mirror(&self, name: &str) -> Result<Option<Mirror>, String> {
        for key in self.settings.keys() {
            match key.as_str() {
                "capabilities"
                | "ca"
                | "client"
                | "skip_verify"
                | "header"
                | "override_path"
                | "ping_url"
                | "health_check_interval"
                | "failure_limit" => {}
                "dial_timeout" => self.warn(&format!("`{}.{key}` has no effect", self.at)),
                _ => self.warn(&format!("`{}.{key}` is unknown and ignored", self.at)),
            }
        }
        let capabilities = self.texts("capabilities")?;
        let mirror = Mirror {
            url: self.url(name)?,
            headers: self.headers()?,
            ping_url: self.ping_url()?,
            health_check_interval: self.number("health_check_interval", 86_400)?,
            failure_limit: self.number("failure_limit", 255)?,
            skip_verify: self.flag("skip_verify")?,
            ca: self.files("ca")?,
            for_all_registries: false,
        };
        if self.settings.contains_key("client") {
            let at = &self.at;
            self.warn(&format!(
                "`{at}` is left out: daemons show no certificate to mirrors (`client`)"
            ));
            return Ok(None);
        }
        let pulls = capabilities.is_none_or(|list| list.iter().any(|text| text == "pull"));
        Ok(pulls.then_some(mirror))
    }

    /// The address without the path of the API, which daemons add.
    fn url(&self, name: &str) -> Result<String, String> {
        let wrong = |what: &str| format!("`{}`: {what}", self.at);
        let url = match name.split_once("://") {
            Some(("http" | "https", _)) => name.to_owned(),
            Some(_) => return Err(wrong("neither http:// nor https://")),
            None => format!("https://{name}"),
        };
        let rest = url.split_once("://").map_or("", |(_, rest)| rest);
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let odd = |c: char| !(c.is_ascii_alphanumeric() || "-._:[]".contains(c));
        if host.is_empty() || host.contains(odd) || path.contains(['?', '#']) {
            return Err(wrong("no address of a server"));
        }
        let url = url.trim_end_matches('/');
        match url.strip_suffix("/v2") {
            Some(url) => Ok(url.to_owned()),
            None if self.flag("override_path")? && !path.is_empty() => Err(wrong(
                "with `override_path` the path must end in /v2: daemons add nothing else",
            )),
            None => Ok(url.to_owned()),
        }
    }

    fn headers(&self) -> Result<Vec<(String, String)>, String> {
        let Some(value) = self.settings.get("header") else {
            return Ok(Vec::new());
        };
        let allowed = "a table of strings, or of lists of strings";
        let table = value
            .as_table()
            .ok_or_else(|| self.wrong("header", value, allowed))?;
        let mut headers = Vec::new();
        for (name, value) in table {
            let values = texts(value).ok_or_else(|| {
                // Not the value, which may be a secret.
                format!("`{}.header.{name}`: allowed is {allowed}", self.at)
            })?;
            let clean = |text: &str| !text.is_empty() && text.chars().all(|c| !c.is_control());
            if !clean(name) || name.contains([' ', ':']) || !values.iter().all(|it| clean(it)) {
                return Err(format!("`{}.header`: {name:?} is no header", self.at));
            }
            headers.push((name.clone(), values.join(", ")));
        }
        Ok(headers)
    }

    fn ping_url(&self) -> Result<Option<String>, String> {
        let Some(value) = self.settings.get("ping_url") else {
            return Ok(None);
        };
        match value.as_str() {
            Some("") => Ok(None),
            Some(url) if url.starts_with("http://") || url.starts_with("https://") => {
                Ok(Some(url.to_owned()))
            }
            _ => Err(self.wrong("ping_url", value, "a URL, http:// or https://")),
        }
    }

    /// Files, from the directory of this one unless they say otherwise.
    fn files(&self, key: &str) -> Result<Vec<PathBuf>, String> {
        let names = self.texts(key)?.unwrap_or_default();
        let here = self.path.parent().unwrap_or(Path::new("/"));
        Ok(names.iter().map(|name| here.join(name)).collect())
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<String>>, String> {
        let Some(value) = self.settings.get(key) else {
            return Ok(None);
        };
        let list = texts(value);
        list.map(Some)
            .ok_or_else(|| self.wrong(key, value, "a string or a list of strings"))
    }

    fn flag(&self, key: &str) -> Result<bool, String> {
        match self.settings.get(key) {
            None => Ok(false),
            Some(Value::Boolean(flag)) => Ok(*flag),
            Some(value) => Err(self.wrong(key, value, "true or false")),
        }
    }

    fn number(&self, key: &str, most: i64) -> Result<Option<i64>, String> {
        match self.settings.get(key) {
            None => Ok(None),
            Some(Value::Integer(number)) if (0..=most).contains(number) => Ok(Some(*number)),
            Some(value) => Err(self.wrong(key, value, &format!("0 to {most}"))),
        }
    }

    fn wrong(&self, key: &str, value: &Value, allowed: &str) -> String {
        format!("`{}.{key}` is {value}: allowed is {allowed}", self.at)
    }

    fn warn(&self, text: &str) {
        tracing::warn!("{}: {text}", self.path.display());
    }
}

/// A string, or all strings of a list.
fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(values) => {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            values.iter().map(text).collect()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
