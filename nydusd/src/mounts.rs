//! The parts of a mount: where an image's metadata and blobs come from, opened
//! and ready to be served.
//!
//! However an image was named, it becomes a [`Source`]; [`open`] turns that
//! into image and blobs, which the [`table`] of mounts has served by one of the
//! drivers. Opening reads the bootstrap only: no blob is touched before somebody
//! reads a file.

pub(crate) mod rehearsal;
pub(crate) mod saved;
pub(crate) mod table;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use rafs::image::Image;
use storage::BlobIndex;
use storage::backend::Backend;
use storage::backend::file::FileBackend;
use storage::backend::http_proxy::HttpProxyBackend;
use storage::backend::local::LocalBackend;
use storage::backend::localdisk::LocalDiskBackend;
use storage::backend::object::ObjectBackend;
use storage::backend::registry::{Credentials, RegistryBackend, RegistryConfig, Scheme};
use storage::blob::Blob;
use storage::cache::{CacheDir, CacheError, Limits, Settings};
use storage::gate;
use storage::metrics::Metrics;
use storage::oci::credentials::DockerConfig;
use storage::oci::{Access, RegistryRef};
use storage::prefetch::{Prefetch, Watch};

use crate::config::{self, Config, Login};
use crate::follow;
use crate::fuse::node::Slot;
use crate::fuse::{Background, RafsFs};
use crate::manager::About;
use crate::metered::Metered;
use crate::prefetch::{self, Wish};
use crate::record::Recorder;
use crate::shared::Shared;

/// Prefix of environment variables that become headers of backend requests.
const HEADER_PREFIX: &str = "NYDUS_HEADER_";

/// Environment variable with the credentials for the registry.
const AUTH_VARIABLE: &str = "IMAGE_PULL_AUTH";
/// How often is looked whether a list has been prefetched.
const LIST_POLL: Duration = Duration::from_millis(50);

/// Where the parts of one image are.
#[derive(Debug)]
pub(crate) struct Source {
    /// The image as the user named it, for messages.
    pub name: String,
    /// File with the image's metadata.
    pub bootstrap: PathBuf,
    /// Where its blobs come from.
    pub backend: Arc<dyn Backend>,
    /// What their server is asked for at a time; `None` leaves it as it is.
    pub limits: Option<gate::Limits>,
    /// Where the back end counts, and the cache will.
    pub metrics: Arc<Metrics>,
    /// The chunk cache.
    pub cache: config::Cache,
    /// What to fetch before it is read.
    pub prefetch: Wish,
    /// File for the list of files that are read.
    pub record: Option<PathBuf>,
    /// What is known about it; the rest is filled in by [`open`].
    pub about: About,
}

impl Source {
    /// An image whose blobs are files in `blobs`.
    pub(crate) fn local(bootstrap: PathBuf, blobs: &Path, cache: &Path) -> anyhow::Result<Self> {
        anyhow::ensure!(
            blobs.is_dir(),
            "blob directory {} does not exist",
            blobs.display()
        );
        Ok(Self {
            name: bootstrap.display().to_string(),
            bootstrap,
            backend: Arc::new(LocalBackend::new(vec![blobs.to_owned()])),
            limits: None,
            metrics: Arc::default(),
            cache: config::Cache::in_dir(cache),
            prefetch: Wish::default(),
            record: None,
            about: About {
                backend_kind: "localfs".to_owned(),
                ..About::default()
            },
        })
    }

    /// An image whose blobs come from where a configuration says.
    pub(crate) fn configured(bootstrap: PathBuf, config: &Config) -> anyhow::Result<Self> {
        let metrics = Arc::default();
        Ok(Self {
            name: bootstrap.display().to_string(),
            bootstrap,
            backend: backend(&config.backend, &metrics)?,
            limits: config.limits,
            metrics,
            cache: config.cache.clone(),
            prefetch: match &config.prefetch {
                Some(prefetch) => Wish::configured(prefetch),
                // Not enabled: not even what the image names.
                None => Wish {
                    files: Some(Vec::new()),
                    ..Wish::default()
                },
            },
            record: None,
            about: About {
                id: config.id.clone(),
                backend_kind: config.backend.kind().to_owned(),
                config: config.shown(),
                ..About::default()
            },
        })
    }
}

/// Reads a configuration file, credentials from the environment included, and
/// logs what is odd about it.
pub(crate) fn load_config(path: &Path) -> anyhow::Result<Config> {
    let mut config =
        Config::load(path).with_context(|| format!("configuration {}", path.display()))?;
    if let (Some(login), config::Backend::Registry(registry)) =
        (login_from_environment()?, &mut config.backend)
    {
        registry.login = login;
    }
    for warning in &config.warnings {
        tracing::warn!("configuration {}: {warning}", path.display());
    }
    Ok(config)
}

/// The back end that a configuration describes.
fn backend(config: &config::Backend, metrics: &Arc<Metrics>) -> anyhow::Result<Arc<dyn Backend>> {
    let count = Arc::clone(metrics);
    match config {
        config::Backend::LocalFs(dirs) => Ok(Arc::new(LocalBackend::new(dirs.clone()))),
        config::Backend::BlobFile(file) => Ok(Arc::new(FileBackend::open(file)?)),
        config::Backend::LocalDisk { path, with_table } => {
            Ok(Arc::new(LocalDiskBackend::open(path, *with_table)?))
        }
        config::Backend::Registry(registry) => self::registry(registry, count),
        config::Backend::HttpProxy(server) => {
            let backend = HttpProxyBackend::with_metrics(server.clone(), count)?;
            Ok(Arc::new(backend))
        }
        config::Backend::Object(bucket) => {
            Ok(Arc::new(ObjectBackend::with_metrics(bucket, count)?))
        }
    }
}

fn registry(config: &config::Registry, metrics: Arc<Metrics>) -> anyhow::Result<Arc<dyn Backend>> {
    let mut settings = RegistryConfig::new(&config.host, &config.repo);
    settings.scheme = if config.plain_http {
        Scheme::Http
    } else {
        Scheme::Https
    };
    settings.auth = match config.login.clone() {
        Login::Anonymous => Credentials::Anonymous,
        Login::Basic { user, password } => Credentials::Basic {
            username: user,
            password,
        },
        Login::Bearer(token) => Credentials::Bearer(token),
    };
    let defaults = settings.timeouts;
    settings.timeouts.connect = config.connect_timeout.unwrap_or(defaults.connect);
    settings.timeouts.read = config.timeout.unwrap_or(defaults.read);
    settings.retry.retries = config.retry_limit.map_or(settings.retry.retries, u32::from);
    settings.ca_files.clone_from(&config.ca_cert_files);
    settings.skip_verify = config.skip_verify;
    settings
        .client_certificate
        .clone_from(&config.client_certificate);
    settings.mirrors.clone_from(&config.mirrors);
    settings.fallback = config.fallback;
    settings.redirect_host.clone_from(&config.redirect_host);
    settings.redirect_scheme = config.redirect_scheme;
    start_registry(settings, metrics)
}

/// The repository of an image reference as back end.
///
/// # Errors
/// When the reference or the credentials cannot be used.
pub(crate) fn registry_of(
    name: &RegistryRef,
    access: &Access,
    metrics: Arc<Metrics>,
) -> anyhow::Result<Arc<dyn Backend>> {
    // The well-known name of this registry is not the name of its host.
    let host = if name.host == "docker.io" {
        "registry-1.docker.io"
    } else {
        &name.host
    };
    let mut settings = RegistryConfig::new(host, &name.repository);
    let plain = access.plain_http || name.is_loopback();
    settings.scheme = if plain { Scheme::Http } else { Scheme::Https };
    settings.auth = access.credentials.clone().unwrap_or_default();
    if login_from_environment()?.is_none() {
        // Helpers hand out credentials that end while an image is mounted.
        settings.provider = Some(Arc::new(DockerConfig::new(&name.host)));
    }
    start_registry(settings, metrics)
}

fn start_registry(
    mut settings: RegistryConfig,
    metrics: Arc<Metrics>,
) -> anyhow::Result<Arc<dyn Backend>> {
    settings.headers = extra_headers();
    let at = format!("registry {}, repository {}", settings.host, settings.repo);
    let backend = RegistryBackend::with_metrics(settings, metrics).context(at)?;
    Ok(Arc::new(backend))
}

/// Credentials given by `IMAGE_PULL_AUTH`, if it is set.
///
/// # Errors
/// When it cannot be decoded.
pub(crate) fn login_from_environment() -> anyhow::Result<Option<Login>> {
    match std::env::var(AUTH_VARIABLE) {
        Ok(auth) if !auth.is_empty() => Ok(Some(Login::from_auth(&auth)?)),
        _ => Ok(None),
    }
}

/// Headers that the environment adds to every request of a back end.
fn extra_headers() -> Vec<(String, String)> {
    std::env::vars()
        .filter_map(|(name, value)| Some((name.strip_prefix(HEADER_PREFIX)?.to_owned(), value)))
        .filter(|(name, _)| !name.is_empty())
        .collect()
}

fn open_cache(
    cache: &config::Cache,
    metrics: Arc<Metrics>,
    shared: &Shared,
) -> Result<CacheDir, CacheError> {
    let settings = Settings {
        metrics,
        limits: Limits {
            max_bytes: cache.max_bytes,
            min_free_percent: cache.min_free_percent,
        },
        memory: shared.memory(cache.memory),
        cores: shared.cores(),
        slow_read: shared.slow_read(),
        ..Settings::default()
    };
    CacheDir::open_as(&cache.dir, settings)
}

/// An image, ready to be served.
#[derive(Debug)]
pub(crate) struct Opened {
    /// The metadata.
    pub image: Arc<Image>,
    /// One for each entry of the image's blob table, in its order.
    pub blobs: Vec<Arc<Blob>>,
    /// Where content is kept.
    pub cache: CacheDir,
    /// Where it comes from.
    pub backend: Arc<Metered>,
}

impl Opened {
    /// The image as a file system, with what goes on beside it, and what is known
    /// about it.
    ///
    /// # Errors
    /// When reads are to be recorded and cannot.
    pub(crate) fn into_files(self, source: &Source, slot: Slot) -> anyhow::Result<(RafsFs, About)> {
        let prefetch = prefetch::start(&self.image, &self.blobs, &source.prefetch);
        // Who names files knows more than can be guessed; who wants everything, less.
        let list = prefetch.as_ref().filter(|_| !source.prefetch.all);
        guess(&self.image, &self.blobs, list.map(Prefetch::watch));
        let recorder = source.record.as_deref();
        let background = Background {
            prefetch,
            recorder: recorder
                .map(|path| Recorder::new(&self.image, path))
                .transpose()?,
        };
        let about = About {
            image: source.name.clone(),
            backend: Some(self.backend),
            cache: Arc::clone(self.cache.metrics()),
            cache_dir: self.cache.path().to_owned(),
            mounted: Some(SystemTime::now()),
            ..source.about.clone()
        };
        Ok((RafsFs::new(slot, self.image, self.blobs, background), about))
    }
}

/// Opens image and blobs.
///
/// * `shared`: what all images of the process share.
///
/// # Errors
/// When the bootstrap is unusable, or the cache directory is not writable.
pub(crate) fn open(source: &Source, shared: &Shared) -> anyhow::Result<Opened> {
    let metered = Arc::new(Metered::new(Arc::clone(&source.backend)));
    let backend: Arc<dyn Backend> = Arc::<Metered>::clone(&metered);
    let path = &source.bootstrap;
    let image = Image::open(path).with_context(|| format!("bootstrap {}", path.display()))?;
    let image = Arc::new(image);
    let gate = shared.gate(&*source.backend, source.limits);
    let cache = open_cache(&source.cache, Arc::clone(&source.metrics), shared)
        .with_context(|| format!("cache directory {}", source.cache.dir.display()))?;
    let blobs = (0u32..)
        .zip(image.blobs())
        .map(|(index, info)| {
            let digests = Arc::new(image.digests(BlobIndex::new(index)));
            Blob::open(&cache, info.clone(), Arc::clone(&backend), digests)
                .with_context(|| format!("blob {}", info.id))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    // What was used before will probably do without the network.
    if blobs.iter().all(|blob| blob.resident_chunks() == 0) {
        source.backend.warm();
    }
    if let Some(gate) = gate {
        blobs.iter().for_each(|blob| blob.set_gate(gate.clone()));
    }
    tracing::info!(
        "image {}: {} inodes, {} blobs",
        source.name,
        image.inode_count(),
        blobs.len()
    );
    Ok(Opened {
        image,
        blobs,
        cache,
        backend: metered,
    })
}

/// Has what readers want next guessed from the image, once `list` has been fetched:
/// until then, guesses would compete with it for the link.
fn guess(image: &Arc<Image>, blobs: &[Arc<Blob>], list: Option<Watch>) {
    if list.is_none() {
        follow::start(image, blobs);
    }
    let image = Arc::clone(image);
    // Weak: this may outlast the mount.
    let blobs: Vec<_> = blobs.iter().map(Arc::downgrade).collect();
    let thread = std::thread::Builder::new().name("guess".to_owned());
    let started = thread.spawn(move || {
        let neighbourhoods = image.neighbourhoods();
        while list.as_ref().is_some_and(Watch::is_running) {
            std::thread::sleep(LIST_POLL);
        }
        let Some(blobs) = blobs.iter().map(Weak::upgrade).collect::<Option<Vec<_>>>() else {
            return;
        };
        match neighbourhoods {
            Ok(found) => blobs
                .iter()
                .zip(found)
                .for_each(|(blob, found)| blob.set_neighbourhoods(found)),
            Err(error) => tracing::debug!("no speculation on neighbours: {error}"),
        }
        if list.is_some() {
            follow::start(&image, &blobs);
        }
    });
    if let Err(error) = started {
        tracing::debug!("no speculation on files: {error}");
    }
}
