//! Names of images: `host/repo:tag` in a registry, `oci:DIR:TAG` in a directory.
//!
//! Short names follow what container users expect: `nginx` is
//! `docker.io/library/nginx:latest`. A first component is a host only if it has a
//! dot or a port, or is `localhost`.
#![forbid(unsafe_code)]

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::content::ContentDigest;
use super::error::OciError;

/// Longest repository name, in bytes (distribution specification).
const MAX_REPOSITORY: usize = 255;
/// Longest tag, in bytes (distribution specification).
const MAX_TAG: usize = 128;

/// An image, wherever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageRef {
    /// In a registry.
    Registry(RegistryRef),
    /// In an OCI image layout, a directory.
    Layout(LayoutRef),
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryRef {
    /// Host and, if given, port: `docker.io`, `127.0.0.1:5000`, `[::1]:5000`.
    pub host: String,
    /// Repository, with slashes.
    pub repository: String,
    /// Tag; `None` only if there is a digest.
    pub tag: Option<String>,
    /// Digest of the manifest or index; wins over the tag.
    pub digest: Option<ContentDigest>,
}

/// An image in an OCI image layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutRef {
    /// The directory that holds `oci-layout` and `index.json`.
    pub dir: PathBuf,
    /// Name of the image in the layout (`org.opencontainers.image.ref.name`).
    pub tag: Option<String>,
}

impl RegistryRef {
    /// Whether the host is this machine: such registries speak plain HTTP.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let name = split_port(&self.host).0;
        let name = name
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(name);
        name == "localhost"
            || name
                .parse::<IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for ImageRef {
    type Err = OciError;

    fn from_str(text: &str) -> Result<Self, OciError> {
        let parsed = match text.strip_prefix("oci:") {
            Some(rest) => parse_layout(rest).map(Self::Layout),
            None => parse_registry(text).map(Self::Registry),
        };
        parsed.map_err(|reason| OciError::Reference {
            reference: text.to_owned(),
            reason,
        })
    }
}

/// The directory ends at the first colon; what follows names the image in it.
fn parse_layout(rest: &str) -> Result<LayoutRef, &'static str> {
    let (dir, tag) = match rest.split_once(':') {
        Some((dir, tag)) => (dir, Some(tag)),
        None => (rest, None),
    };
    if dir.is_empty() {
        return Err("oci: must be followed by a directory");
    }
    if tag.is_some_and(|tag| !is_layout_name(tag)) {
        return Err("the tag of a layout has characters that are not allowed");
    }
    Ok(LayoutRef {
        dir: PathBuf::from(dir),
        tag: tag.map(str::to_owned),
    })
}

/// The grammar of `org.opencontainers.image.ref.name`, a little wider.
fn is_layout_name(tag: &str) -> bool {
    let allowed = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'-' | b'.' | b'_' | b':' | b'@' | b'/' | b'+')
    };
    !tag.is_empty() && tag.len() <= MAX_REPOSITORY && tag.bytes().all(allowed)
}

fn parse_registry(text: &str) -> Result<RegistryRef, &'static str> {
    if text.contains("://") {
        return Err("leave out the scheme; --plain-http selects HTTP");
    }
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => {
            let digest = digest.parse().map_err(
                |_err| "after @ a digest is expected: sha256: and 64 lower-case hexadecimal digits",
            )?;
            (name, Some(digest))
        }
        None => (text, None),
    };
    let (host, path) = split_host(name);
    let (repository, tag) = match path.rsplit_once(':') {
        Some((repository, tag)) => (repository, Some(tag.to_owned())),
        None => (path, None),
    };
    if tag.as_deref().is_some_and(|tag| !is_tag(tag)) {
        return Err("a tag is 1 to 128 letters, digits, dots, dashes and underscores");
    }
    let mut repository = repository.to_owned();
    let host = host.unwrap_or("docker.io");
    let host = if host == "index.docker.io" {
        "docker.io"
    } else {
        host
    };
    if host == "docker.io" && !repository.contains('/') && !repository.is_empty() {
        repository.insert_str(0, "library/");
    }
    check_host(host)?;
    check_repository(&repository)?;
    let tag = tag.or_else(|| digest.is_none().then(|| "latest".to_owned()));
    Ok(RegistryRef {
        host: host.to_owned(),
        repository,
        tag,
        digest,
    })
}

/// Splits off the first component if it is a host.
fn split_host(name: &str) -> (Option<&str>, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            (Some(first), rest)
        }
        _ => (None, name),
    }
}

/// Host and port of `host`; an IPv6 address is in brackets.
fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = split_port(host);
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err("the port of the registry is no number from 0 to 65535");
    }
    let valid = match name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => name.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        }),
    };
    if valid {
        Ok(())
    } else {
        Err("the name of the registry is no host name")
    }
}

fn check_repository(repository: &str) -> Result<(), &'static str> {
    if repository.is_empty() {
        return Err("the repository is missing: HOST/REPOSITORY[:TAG][@DIGEST] is expected");
    }
    if repository.len() > MAX_REPOSITORY {
        return Err("the repository name is longer than 255 characters");
    }
    if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("repository names are lower case");
    }
    if repository.split('/').all(is_component) {
        return Ok(());
    }
    Err(
        "repository names are lower-case letters and digits, separated by single . _ - or / characters",
    )
}

/// Alphanumeric runs joined by `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().copied().is_some_and(alphanumeric)
        || !bytes.last().copied().is_some_and(alphanumeric)
    {
        return false;
    }
    component
        .split(|char: char| char.is_ascii_lowercase() || char.is_ascii_digit())
        .all(|joint| {
            matches!(joint, "" | "." | "_" | "__") || joint.bytes().all(|byte| byte == b'-')
        })
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag
            .bytes()
            .all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Layout(reference) => reference.fmt(f),
        }
    }
}

impl fmt::Display for RegistryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for LayoutRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oci:{}", self.dir.display())?;
        match &self.tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(text: &str) -> String {
        text.parse::<ImageRef>().unwrap().to_string()
    }

    #[test]
    fn short_names_are_completed_as_users_expect() {
        for (given, full) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("user/app", "docker.io/user/app:latest"),
            (
                "index.docker.io/library/nginx",
                "docker.io/library/nginx:latest",
            ),
            ("localhost/app", "localhost/app:latest"),
            (
                "localhost:5000/a/b-c__d.e:V1.0_x",
                "localhost:5000/a/b-c__d.e:V1.0_x",
            ),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("ghcr.io/o/app", "ghcr.io/o/app:latest"),
            ("oci:/tmp/dir", "oci:/tmp/dir"),
            ("oci:dir:v1", "oci:dir:v1"),
            (
                "oci:dir:docker.io/library/a:1",
                "oci:dir:docker.io/library/a:1",
            ),
        ] {
            assert_eq!(shown(given), full, "{given}");
        }
        let digest = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(
            shown(&format!("a/b@{digest}")),
            format!("docker.io/a/b@{digest}")
        );
        assert_eq!(
            shown(&format!("r.io/b:t@{digest}")),
            format!("r.io/b:t@{digest}")
        );
    }

    #[test]
    fn what_names_no_image_is_refused_with_a_reason() {
        for (given, reason) in [
            ("", "repository is missing"),
            ("host.io/", "repository is missing"),
            ("https://host.io/a", "scheme"),
            ("host.io/App", "lower case"),
            ("host.io/a..b", "separated"),
            ("host.io/../a", "separated"),
            ("host.io/a/", "separated"),
            ("host.io/a b", "separated"),
            ("host.io:99999/a", "port"),
            ("-x.io/a", "host name"),
            ("a:", "tag"),
            ("a:-x", "tag"),
            ("a@sha256:00", "digest"),
            ("oci:", "directory"),
            ("oci::tag", "directory"),
            ("oci:dir:a b", "tag"),
        ] {
            let error = given.parse::<ImageRef>().unwrap_err().to_string();
            assert!(error.contains(reason), "{given}: {error}");
        }
    }

    #[test]
    fn only_this_machine_is_loopback() {
        let loopback = |host: &str| match format!("{host}/a").parse().unwrap() {
            ImageRef::Registry(reference) => reference.is_loopback(),
            ImageRef::Layout(_) => panic!("no layout"),
        };
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.9.9.9:1",
            "[::1]:5000",
        ] {
            assert!(loopback(host), "{host}");
        }
        for host in [
            "docker.io",
            "127.0.0.1.example.com",
            "10.0.0.1:5000",
            "localhost.io",
            "[::2]:1",
        ] {
            assert!(!loopback(host), "{host}");
        }
    }

    proptest! {
        /// Whatever is accepted can be shown and read again, and leaves no way out of a URL path.
        #[test]
        fn accepted_references_round_trip(text in "[a-zA-Z0-9._:/@-]{0,40}") {
            if let Ok(reference) = text.parse::<ImageRef>() {
                prop_assert_eq!(&reference.to_string().parse::<ImageRef>().unwrap(), &reference);
                if let ImageRef::Registry(registry) = reference {
                    prop_assert!(registry.repository.split('/').all(|part| part != ".." && !part.is_empty()));
                }
            }
        }
    }
}
