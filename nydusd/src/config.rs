//! The configuration file: one parser for every syntax and version in use.
//!
//! Text becomes a tree of values ([`node`]), the tree is read through
//! [`section`] by the rules of its version ([`v1`], [`v2`]; back ends are the
//! same in both: [`backend`], [`p2p`]), and the result is one [`Config`] that the rest
//! of the daemon can trust. Keys nobody knows become warnings; values that make
//! no sense, and features this daemon does not have, are errors that name the
//! key, the value and what is allowed.
//!
//! What the keys mean to a user: `docs/nydusd.md`, "Configuration file".

mod backend;
mod node;
mod p2p;
mod section;
mod shown;
mod v1;
mod v2;

use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use storage::backend::http_proxy::HttpProxyConfig;
use storage::backend::object::ObjectConfig;
use storage::backend::registry::{ClientCertificate, Fallback, Mirror, Scheme};

use node::{Node, Table};
use section::Section;
use storage::cache::Limits;
use storage::gate;

use crate::driver::Choice;

/// Larger files are refused before they are parsed, in bytes.
const MAX_FILE_SIZE: u64 = 1 << 20;

/// Least memory for fetches that may be configured, in bytes: the largest chunk.
const MIN_MEMORY: u64 = 16 << 20;

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// Name of the instance; may be empty.
    pub id: String,
    /// Where blobs come from.
    pub backend: Backend,
    /// What their server is asked for at a time, if anything was chosen.
    pub limits: Option<gate::Limits>,
    /// The chunk cache.
    pub cache: Cache,
    /// Background fetching, if wanted.
    pub prefetch: Option<Prefetch>,
    /// What serves the mount, if one was chosen.
    pub driver: Option<Choice>,
    /// What the user should hear about: unknown keys, settings without effect.
    pub warnings: Vec<String>,
}

/// The chunk cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cache {
    /// Its directory.
    pub dir: PathBuf,
    /// Most disk space it takes, in bytes; `None` for no limit.
    pub max_bytes: Option<u64>,
    /// Part of the file system that it leaves free, in percent.
    pub min_free_percent: u8,
    /// Memory for fetches in progress, in bytes.
    pub memory: u64,
}

impl Cache {
    /// A cache in `dir` with the usual limits.
    pub(crate) fn in_dir(dir: &Path) -> Self {
        let limits = Limits::default();
        Self {
            dir: dir.to_owned(),
            max_bytes: limits.max_bytes,
            min_free_percent: limits.min_free_percent,
            memory: storage::budget::DEFAULT,
        }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self::in_dir(Path::new("."))
    }
}

/// Where blobs come from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Backend {
    /// Files named by blob id, in the first of these directories that has them.
    LocalFs(Vec<PathBuf>),
    /// One file, which is the only blob.
    BlobFile(PathBuf),
    /// Partitions of a disk.
    LocalDisk {
        /// The disk, or an image of one.
        path: PathBuf,
        /// Whether it has a partition table; else it is one blob.
        with_table: bool,
    },
    /// An OCI registry.
    Registry(Registry),
    /// A plain HTTP server.
    HttpProxy(HttpProxyConfig),
    /// A bucket of an object store.
    Object(ObjectConfig),
}

/// Settings of the registry back end.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Registry {
    /// Host, with port if it is not the default one.
    pub host: String,
    /// Repository, without host and tag.
    pub repo: String,
    /// Whether requests go over plain HTTP.
    pub plain_http: bool,
    /// Who we are to the registry.
    pub login: Login,
    /// Accept any TLS certificate.
    pub skip_verify: bool,
    /// PEM files with further trusted authorities.
    pub ca_cert_files: Vec<PathBuf>,
    /// What we show to a registry that wants to know who connects.
    pub client_certificate: Option<ClientCertificate>,
    /// Tried before the registry itself, in this order.
    pub mirrors: Vec<Mirror>,
    /// What may be asked of the registry itself when no mirror delivers.
    pub fallback: Fallback,
    /// Replaces the host of redirects.
    pub redirect_host: Option<String>,
    /// Replaces the scheme of redirects.
    pub redirect_scheme: Option<Scheme>,
    /// Limit for the silence between two pieces of an answer, if one was chosen.
    pub timeout: Option<Duration>,
    /// Limit for setting up a connection, if one was chosen.
    pub connect_timeout: Option<Duration>,
    /// Further attempts after a failed one; `None` leaves it to the back end.
    pub retry_limit: Option<u8>,
}

/// Credentials given in a configuration.
#[derive(Clone, PartialEq, Eq, Default)]
pub(crate) enum Login {
    /// None.
    #[default]
    Anonymous,
    /// User name and password.
    Basic {
        /// User name.
        user: String,
        /// Password or access token.
        password: String,
    },
    /// A bearer token, sent as it is.
    Bearer(String),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic(..)",
            Self::Bearer(_) => "Bearer(..)",
        })
    }
}

/// Background fetching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefetch {
    /// Threads that fetch.
    pub threads: u64,
    /// Bytes fetched at once.
    pub batch_size: u64,
    /// Bytes per second; 0 is unlimited.
    pub bandwidth: u64,
    /// Fetch everything, not only what the image asks for.
    pub all: bool,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("invalid configuration: longer than {MAX_FILE_SIZE} bytes")]
    TooLarge,
    #[error("failed to parse configuration information as JSON: {reason}")]
    Json { reason: String },
    #[error("failed to parse configuration information as JSON or TOML: {reason}")]
    Toml { reason: String },
    #[error("invalid configuration: `{key}` is missing")]
    Missing { key: String },
    #[error("invalid configuration: `{key}` is {value}, allowed is {allowed}")]
    Wrong {
        key: String,
        value: String,
        allowed: String,
    },
    #[error("invalid configuration: `{key}`: {feature} is not supported yet; {hint}")]
    Unsupported {
        key: String,
        feature: &'static str,
        hint: &'static str,
    },
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// See [`ConfigError`]; the path is in the error when the file is at fault.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(read)?;
        // One byte more than allowed is enough to see that it is too much.
        file.take(MAX_FILE_SIZE + 1)
            .read_to_string(&mut text)
            .map_err(read)?;
        Self::parse(&text)
    }

    /// Checks a configuration given as text: version 2 as JSON or TOML, or version 1 as JSON.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub(crate) fn parse(text: &str) -> Result<Self, ConfigError> {
        let size = u64::try_from(text.len()).unwrap_or(u64::MAX);
        if size > MAX_FILE_SIZE {
            return Err(ConfigError::TooLarge);
        }
        let (table, is_json) = parse_table(text)?;
        let mut root = Section::root(&table);
        let mut config = match table.get("version") {
            Some(Node::Number(2)) => v2::read(&mut root)?,
            None if is_json => v1::read(&mut root)?,
            None => {
                return Err(ConfigError::Missing {
                    key: "version".to_owned(),
                });
            }
            Some(_) => return Err(root.wrong("version", "2, or no `version` at all in version 1")),
        };
        config.warnings = root.into_warnings();
        Ok(config)
    }
}

impl Login {
    /// Reads `auth`, the base64 form of `user:password`, as the environment
    /// variable `IMAGE_PULL_AUTH` holds it.
    ///
    /// # Errors
    /// [`ConfigError::Wrong`] if it cannot be decoded; its text is not repeated.
    pub(crate) fn from_auth(auth: &str) -> Result<Self, ConfigError> {
        backend::decode_auth(auth).ok_or_else(|| ConfigError::Wrong {
            key: "IMAGE_PULL_AUTH".to_owned(),
            value: "(not shown)".to_owned(),
            allowed: "the base64 form of `user:password`".to_owned(),
        })
    }
}

/// The text as a table, and whether it was JSON.
fn parse_table(text: &str) -> Result<(Table, bool), ConfigError> {
    let json = match serde_json::from_str::<Node>(text) {
        Ok(Node::Table(table)) => return Ok((table, true)),
        Ok(other) => ConfigError::Json {
            reason: format!("found {other}, not an object"),
        },
        Err(err) => ConfigError::Json {
            reason: err.to_string(),
        },
    };
    // What starts like an object was meant as JSON: TOML's opinion would only confuse.
    if text.trim_start().starts_with('{') {
        return Err(json);
    }
    match toml::from_str::<Node>(text) {
        Ok(Node::Table(table)) => Ok((table, false)),
        Ok(other) => Err(ConfigError::Toml {
            reason: format!("found {other}, not a table"),
        }),
        // Not the error's own display: it quotes the line, which may hold a password.
        Err(err) => {
            let before = err
                .span()
                .and_then(|span| text.get(..span.start))
                .unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            Err(ConfigError::Toml {
                reason: format!("line {line}: {}", err.message()),
            })
        }
    }
}

/// What serves the mount.
fn driver(section: &mut Section<'_>) -> Result<Option<Choice>, ConfigError> {
    match section.text("driver")?.map(Choice::named) {
        None => Ok(None),
        Some(Some(choice)) => Ok(Some(choice)),
        Some(None) => Err(section.wrong("driver", Choice::NAMES)),
    }
}

/// The kind of cache: for RAFS v6 only a file cache will do.
fn cache_type(section: &mut Section<'_>) -> Result<(), ConfigError> {
    match section.text("type")?.unwrap_or_default() {
        "blobcache" | "filecache" => Ok(()),
        "fscache" => Err(ConfigError::Unsupported {
            key: section.path_of("type"),
            feature: "the kernel cache (fscache)",
            hint: "use `filecache`",
        }),
        // Also what an absent or empty type means.
        _ => Err(section.wrong(
            "type",
            "\"filecache\" or \"blobcache\": RAFS v6 images are served from a file cache",
        )),
    }
}

/// Keys of a file cache that are the same in both versions.
fn file_cache(section: &mut Section<'_>) -> Result<Cache, ConfigError> {
    let dir = section
        .text("work_dir")?
        .filter(|dir| !dir.is_empty())
        .unwrap_or(".");
    if section.flag("disable_indexed_map", false)? {
        section.warn(
            "disable_indexed_map",
            "no effect, the chunk map is always kept",
        );
    }
    if section.flag("enable_encryption", false)? {
        return Err(ConfigError::Unsupported {
            key: section.path_of("enable_encryption"),
            feature: "an encrypted cache",
            hint: "put the cache directory on an encrypted file system",
        });
    }
    section.ignore(&["enable_convergent_encryption", "encryption_key"]);
    let usual = Cache::default();
    let max_bytes = section.number("max_bytes", 0, 0..=u64::MAX)?;
    let min_free = u64::from(usual.min_free_percent);
    let min_free = section.number("min_free_percent", min_free, 0..=99)?;
    Ok(Cache {
        dir: PathBuf::from(dir),
        max_bytes: (max_bytes > 0).then_some(max_bytes),
        // Never fails: it is less than 100.
        min_free_percent: u8::try_from(min_free).unwrap_or(usual.min_free_percent),
        memory: section.number("memory_bytes", usual.memory, MIN_MEMORY..=u64::MAX)?,
    })
}

#[cfg(test)]
mod tests;
