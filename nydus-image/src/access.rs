//! Where a command finds an image: options that several commands share.
//!
//! The bootstrap is a file; blobs are in a file, in a directory, or behind a back
//! end whose configuration has the keys of the daemon's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use rafs::Image;
use rafs::units::len64;
use serde::Deserialize;
use storage::backend::Backend;
use storage::backend::file::FileBackend;
use storage::backend::http_proxy::{Address, HttpProxyBackend, HttpProxyConfig};
use storage::backend::local::LocalBackend;
use storage::backend::object::{Keys, Login, ObjectBackend, ObjectConfig, Store};
use storage::backend::registry::{Credentials, RegistryBackend, RegistryConfig, Scheme, Timeouts};
use storage::format::tar_header;
use storage::format::toc::{self, Tail};
use storage::mapped::Mapped;
use storage::{BlobFeatures, BlobIndex, BlobInfo, Digest};

use crate::cli::UsageError;
use crate::merge::parse_digest;
use crate::reuse::id_from_name;

/// Largest bootstrap that is taken out of a layer, in bytes.
const MAX_BOOTSTRAP: u64 = 1 << 30;

/// Longest configuration file, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Loads a bootstrap and checks all of it. A layer blob that carries its bootstrap
/// will do as well; what it could not say is its own id, which its name says then.
///
/// # Errors
/// It cannot be read or breaks a rule; the message names the file.
pub fn open_verified(path: &Path) -> anyhow::Result<Arc<Image>> {
    let open = || -> anyhow::Result<Image> {
        let image = match embedded(path)? {
            Some(bytes) => named(Image::from_bytes(bytes)?, path)?,
            None => Image::open(path)?,
        };
        image.verify_tree()?;
        Ok(image)
    };
    let image = open().with_context(|| format!("{} is not a valid bootstrap", path.display()))?;
    Ok(Arc::new(image))
}

/// An image that was embedded in the blob `path`. The bootstrap is part of what the
/// blob is named by, so it cannot have that name; the file has.
fn named(mut image: Image, path: &Path) -> anyhow::Result<Image> {
    let Ok(id) = id_from_name(path) else {
        return Ok(image);
    };
    for (index, info) in (0..).map(BlobIndex::new).zip(image.blobs().to_vec()) {
        // Other layers, of a parent, are known by their digests.
        let unknown = info.features.contains(BlobFeatures::SEPARATE)
            && info.meta_blob_digest == Digest::default();
        if info.id.is_placeholder() {
            image.set_blob_id(index, id.clone());
        } else if unknown && let Ok(digest) = parse_digest(id.as_str()) {
            image.set_meta_blob_digest(index, digest);
        }
    }
    Ok(image)
}

/// The bootstrap that a layer blob carries; `None` if the file is none of that kind.
fn embedded(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let Ok(file) = Mapped::open(path) else {
        // Whoever opens it as a bootstrap says what is wrong.
        return Ok(None);
    };
    let len = u64::try_from(file.len())?;
    let tail = file.len() - usize::try_from(toc::tail_size(len))?;
    let slice = |start: u64, size: u64| {
        let start = usize::try_from(start).ok()?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        file.get(start..end)
    };
    let outside = "its table of contents points outside the file";
    match toc::locate(&file[tail..]) {
        Err(_) => Ok(None),
        Ok(Tail::Bootstrap { size }) => {
            let start = (len - len64(tar_header::SIZE)).checked_sub(size);
            let bytes = start
                .and_then(|start| slice(start, size))
                .context(outside)?;
            Ok(Some(bytes.to_vec()))
        }
        Ok(Tail::Toc(toc)) => {
            let Some(entry) = toc.entry(tar_header::names::BOOTSTRAP) else {
                bail!("it is a layer without a bootstrap in it");
            };
            let stored = slice(entry.offset, entry.stored_size).context(outside)?;
            Ok(Some(entry.extract(stored, MAX_BOOTSTRAP)?))
        }
    }
}

/// The bootstrap of a command that takes it in two forms.
///
/// # Errors
/// [`UsageError`] if neither is given; clap refuses both.
pub fn either<'a>(
    positional: Option<&'a PathBuf>,
    option: Option<&'a PathBuf>,
) -> Result<&'a Path, UsageError> {
    let path = positional.or(option);
    path.map(PathBuf::as_path)
        .ok_or_else(|| UsageError("no bootstrap is given".to_owned()))
}

/// Where the blobs of an image are.
#[derive(Debug, Default, clap::Args)]
pub struct BlobArgs {
    /// The data of an image that has one blob: a file, whatever its name
    #[arg(
        short = 'b',
        long,
        value_name = "blob",
        conflicts_with_all = ["blob_dir", "backend_type"],
        help_heading = "Blobs"
    )]
    blob: Option<PathBuf>,

    /// Directory with the blobs, each in a file named by its id
    #[arg(
        short = 'D',
        long,
        value_name = "blob-dir",
        conflicts_with = "backend_type",
        help_heading = "Blobs"
    )]
    blob_dir: Option<PathBuf>,

    /// Back end that has the blobs: registry, s3, oss or http-proxy
    #[arg(long, value_name = "backend-type", help_heading = "Blobs")]
    backend_type: Option<String>,

    /// Configuration of the back end as JSON, like {"host": "…", "repo": "…"}
    #[arg(
        long,
        value_name = "backend-config",
        requires = "backend_type",
        conflicts_with = "backend_config_file",
        help_heading = "Blobs"
    )]
    backend_config: Option<String>,

    /// File with the configuration of the back end
    #[arg(
        long,
        value_name = "backend-config-file",
        requires = "backend_type",
        help_heading = "Blobs"
    )]
    backend_config_file: Option<PathBuf>,
}

impl BlobArgs {
    /// Opens what the options name.
    ///
    /// # Errors
    /// [`UsageError`] if `image` has blobs and no option says where; what is wrong
    /// with the file or configuration otherwise.
    pub fn open(&self, image: &Image) -> anyhow::Result<Arc<dyn Backend>> {
        if let Some(kind) = &self.backend_type {
            return remote(kind, &self.config()?);
        }
        let blobs = image.blobs().len();
        if let (Some(path), false) = (&self.blob, blobs == 0) {
            if blobs > 1 {
                bail!(
                    "the image has {blobs} blobs, and --blob gives one; put them into a directory, each named by its id, and give it with --blob-dir"
                );
            }
            let separate = |blob: &BlobInfo| blob.features.contains(BlobFeatures::SEPARATE);
            if image.blobs().iter().any(separate) {
                bail!(
                    "the data of this image is an OCI layer and its chunk table another file; put both into a directory, each named by its SHA-256, and give it with --blob-dir"
                );
            }
            return Ok(Arc::new(FileBackend::open(path)?));
        }
        if self.blob_dir.is_none() && blobs > 0 {
            let text = "say where the blobs are: --blob, --blob-dir or --backend-type";
            return Err(UsageError(text.to_owned()).into());
        }
        Ok(Arc::new(LocalBackend::new(
            self.blob_dir.clone().into_iter().collect(),
        )))
    }

    fn config(&self) -> anyhow::Result<String> {
        if let Some(text) = &self.backend_config {
            return Ok(text.clone());
        }
        let Some(path) = &self.backend_config_file else {
            let text = "--backend-type needs --backend-config or --backend-config-file";
            return Err(UsageError(text.to_owned()).into());
        };
        let read = || -> anyhow::Result<String> {
            let size = std::fs::metadata(path)?.len();
            if size > MAX_CONFIG {
                bail!("it has {size} bytes; a configuration has at most {MAX_CONFIG}");
            }
            Ok(std::fs::read_to_string(path)?)
        };
        read().with_context(|| format!("cannot read the configuration {}", path.display()))
    }
}

/// Keys that the back ends have in common, and those of each. Others are ignored,
/// as everywhere in configurations: clients send what older releases knew.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    host: String,
    repo: String,
    scheme: String,
    auth: String,
    registry_token: String,
    addr: String,
    path: String,
    endpoint: String,
    region: String,
    bucket_name: String,
    object_prefix: String,
    access_key_id: String,
    access_key_secret: String,
    skip_verify: bool,
    ca_cert_files: Vec<PathBuf>,
    timeout: u64,
    connect_timeout: u64,
    retry_limit: u8,
}

fn remote(kind: &str, config: &str) -> anyhow::Result<Arc<dyn Backend>> {
    let make: fn(Config) -> anyhow::Result<Arc<dyn Backend>> = match kind {
        "registry" => registry,
        "http-proxy" => http_proxy,
        "s3" => s3,
        "oss" => oss,
        "localfs" => bail!("the back end localfs is not used here; give --blob-dir"),
        "localdisk" => {
            bail!("the back end {kind} is not supported; download the blobs and give --blob-dir")
        }
        _ => {
            let text = format!("`{kind}` is no back end: use registry, s3, oss or http-proxy");
            return Err(UsageError(text).into());
        }
    };
    let config = serde_json::from_str(config)
        .with_context(|| format!("the configuration of the back end {kind} is not valid"))?;
    make(config).with_context(|| format!("the configuration of the back end {kind} is not valid"))
}

impl Config {
    fn scheme(&self) -> anyhow::Result<Scheme> {
        match self.scheme.as_str() {
            "" | "https" => Ok(Scheme::Https),
            "http" => Ok(Scheme::Http),
            other => bail!("the scheme is {other:?}; it must be http or https"),
        }
    }

    /// 0 stands for the default, which is what clients mean by it.
    fn timeouts(&self) -> Timeouts {
        let or = |seconds, default| match seconds {
            0 => default,
            seconds => Duration::from_secs(seconds),
        };
        let default = Timeouts::default();
        Timeouts {
            connect: or(self.connect_timeout, default.connect),
            read: or(self.timeout, default.read),
            ..default
        }
    }
}

fn registry(config: Config) -> anyhow::Result<Arc<dyn Backend>> {
    let mut to = RegistryConfig::new(&config.host, &config.repo);
    to.scheme = config.scheme()?;
    to.timeouts = config.timeouts();
    if config.retry_limit > 0 {
        to.retry.retries = config.retry_limit.into();
    }
    to.auth = if !config.registry_token.is_empty() {
        Credentials::Bearer(config.registry_token)
    } else if !config.auth.is_empty() {
        basic(&config.auth).context("`auth` is not the base64 form of user:password")?
    } else {
        Credentials::Anonymous
    };
    to.ca_files = config.ca_cert_files;
    to.skip_verify = config.skip_verify;
    Ok(Arc::new(RegistryBackend::new(to)?))
}

fn basic(text: &str) -> Option<Credentials> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(text.trim());
    let text = String::from_utf8(bytes.ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    Some(Credentials::Basic {
        username: user.to_owned(),
        password: password.to_owned(),
    })
}

fn s3(config: Config) -> anyhow::Result<Arc<dyn Backend>> {
    if config.region.is_empty() {
        bail!("`region` is missing");
    }
    let region = config.region.clone();
    object(Store::S3 { region }, config)
}

fn oss(config: Config) -> anyhow::Result<Arc<dyn Backend>> {
    object(Store::Oss, config)
}

fn object(store: Store, config: Config) -> anyhow::Result<Arc<dyn Backend>> {
    let mut to = ObjectConfig::new(store, &config.endpoint, &config.bucket_name);
    to.scheme = config.scheme()?;
    to.timeouts = config.timeouts();
    if config.retry_limit > 0 {
        to.retry.retries = config.retry_limit.into();
    }
    to.prefix = config.object_prefix;
    if !config.access_key_id.is_empty() {
        to.login = Login::Keys(Keys {
            id: config.access_key_id,
            secret: config.access_key_secret,
        });
    }
    to.ca_files = config.ca_cert_files;
    to.skip_verify = config.skip_verify;
    Ok(Arc::new(ObjectBackend::new(&to)?))
}

fn http_proxy(config: Config) -> anyhow::Result<Arc<dyn Backend>> {
    let address = match config.addr.as_str() {
        "" => bail!("`addr` is missing: a URL or the path of a Unix socket"),
        // The path is only for addresses: behind a socket there is one server.
        socket if socket.starts_with('/') => Address::Socket(socket.into()),
        url => Address::Url(format!(
            "{}/{}",
            url.trim_end_matches('/'),
            config.path.trim_matches('/')
        )),
    };
    let mut to = HttpProxyConfig::new(address);
    to.timeouts = config.timeouts();
    if config.retry_limit > 0 {
        to.retry.retries = config.retry_limit.into();
    }
    to.ca_files = config.ca_cert_files;
    to.skip_verify = config.skip_verify;
    Ok(Arc::new(HttpProxyBackend::new(to)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(kind: &str, config: &str) -> String {
        format!("{:#}", remote(kind, config).unwrap_err())
    }

    #[test]
    fn back_ends_are_made_from_their_section() {
        let registry = r#"{"host": "localhost:5000", "repo": "a/b", "scheme": "http",
            "auth": "dXNlcjpzZWNyZXQ=", "timeout": 3, "mirrors": [], "proxy": {"fallback": true}}"#;
        let made = format!("{:?}", remote("registry", registry).unwrap());
        assert!(made.contains("http://localhost:5000/v2/a/b/"), "{made}");
        let made = remote("http-proxy", r#"{"addr": "http://h:1/", "path": "/p/"}"#).unwrap();
        assert!(format!("{made:?}").contains("http://h:1/p/"), "{made:?}");
        remote("http-proxy", r#"{"addr": "/run/socket"}"#).unwrap();
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        for kind in ["oss", "s3", "localdisk", "localfs", "ftp"] {
            assert!(problem(kind, "{}").contains(kind), "{kind}");
        }
        assert!(problem("http-proxy", "{}").contains("addr"));
        assert!(problem("registry", "{").contains("registry"));
        assert!(problem("registry", r#"{"host": "h", "repo": "r", "auth": "*"}"#).contains("auth"));
        assert!(
            problem("registry", r#"{"host": "h", "repo": "r", "scheme": "ftp"}"#).contains("ftp")
        );
        assert!(problem("registry", r#"{"repo": "r"}"#).contains("host"));
    }
}
