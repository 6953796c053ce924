//! From the name of an image to the parts of a mount.
//!
//! A name is a registry reference, a directory in OCI layout (`oci:DIR[:TAG]`),
//! or simply a bootstrap file. The metadata of the first two is kept in the cache
//! directory, so that it is fetched once:
//!
//! * `images/<manifest digest>/image.boot`: the bootstrap of one image;
//! * `images/<digest>.<platform>`: which manifest that digest (of a manifest or
//!   an index) means for a platform, so that `IMAGE@digest` needs no network;
//! * `<blob id>.blob.meta`: chunk tables that came with the bootstrap.
//!
//! Promises: nothing is used before its digest was checked; a directory below
//! `images` is complete and on disk, or does not exist.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use storage::backend::Backend;
use storage::backend::local::LocalBackend;
use storage::metrics::Metrics;
use storage::oci::bootstrap::{BootstrapFiles, fetch_bootstrap, find_nydus_manifest};
use storage::oci::{Access, ContentDigest, Credentials, ImageRef, Images, Platform, credentials};

use crate::cli::MountOptions;
use crate::config::Login;
use crate::daemon::Stop;
use crate::manager::About;
use crate::mounts::{self, Source};
use crate::prefetch::{self, Wish};

/// Where images' metadata is kept in the cache directory.
const IMAGES: &str = "images";
/// The bootstrap in an image's directory.
const BOOTSTRAP: &str = "image.boot";

/// Finds the parts of the image that `options` names; fetches what is missing.
///
/// # Errors
/// When the name is none, the image cannot be read or is no Nydus image, the
/// cache directory cannot be written, or a signal asks for the end.
pub(crate) fn source(options: &MountOptions, stop: &Stop) -> anyhow::Result<Source> {
    let file = Path::new(&options.image);
    if options.localfs_dir.is_some() || file.is_absolute() || file.is_file() {
        return bootstrap_file(file, options);
    }
    let reference: ImageRef = options.image.parse()?;
    let platform = match &options.platform {
        None => Platform::host(),
        Some(text) => text
            .parse()
            .map_err(|reason| anyhow::anyhow!("--platform: {reason}"))?,
    };
    let store = Store::open(&options.cache_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the network runtime")?;
    let metrics = Arc::default();
    let found = runtime.block_on(async {
        tokio::select! {
            found = find(options, &reference, &platform, &store, &metrics) => found,
            signal = stop.requested() => bail!("stopped by {signal}"),
        }
    });
    // Ends its threads; what is fetched later is the back end's business.
    drop(runtime);
    let (bootstrap, backend) = found?;
    Ok(Source {
        name: options.image.clone(),
        bootstrap,
        backend,
        limits: options.limits(),
        metrics,
        cache: crate::config::Cache::in_dir(&options.cache_dir),
        prefetch: wish(options)?,
        driver: None,
        record: options.record_files.clone(),
        about: About {
            backend_kind: "registry".to_owned(),
            ..About::default()
        },
    })
}

/// The parts of an image whose bootstrap is known, because a predecessor has mounted
/// it: as [`source`], but without asking anybody what the name means today.
///
/// # Errors
/// When credentials cannot be read, or the back end cannot be set up.
pub(crate) fn again(options: &MountOptions, bootstrap: PathBuf) -> anyhow::Result<Source> {
    if options.localfs_dir.is_some() {
        let mut source = bootstrap_file(&bootstrap, options)?;
        source.name.clone_from(&options.image);
        return Ok(source);
    }
    let reference: ImageRef = options.image.parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the network runtime")?;
    let access = Access {
        plain_http: options.plain_http,
        credentials: runtime.block_on(credentials_of(&reference))?,
    };
    let metrics = Arc::default();
    Ok(Source {
        name: options.image.clone(),
        bootstrap,
        backend: backend(&reference, &access, options, &metrics)?,
        limits: options.limits(),
        metrics,
        cache: crate::config::Cache::in_dir(&options.cache_dir),
        prefetch: wish(options)?,
        driver: None,
        record: None,
        about: About {
            backend_kind: "registry".to_owned(),
            ..About::default()
        },
    })
}

/// The bootstrap, and where the blobs come from.
async fn find(
    options: &MountOptions,
    reference: &ImageRef,
    platform: &Platform,
    store: &Store,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<(PathBuf, Arc<dyn Backend>)> {
    let access = Access {
        plain_http: options.plain_http,
        credentials: credentials_of(reference).await?,
    };
    let backend = backend(reference, &access, options, metrics)?;
    let bootstrap = match store.known(reference, platform) {
        Some(path) => path,
        None => pull(reference, platform, &access, store, &*backend).await?,
    };
    Ok((bootstrap, backend))
}

fn bootstrap_file(file: &Path, options: &MountOptions) -> anyhow::Result<Source> {
    let Some(blobs) = &options.localfs_dir else {
        bail!("a bootstrap file needs --localfs-dir, the directory with its blobs");
    };
    if options.platform.is_some() || options.plain_http {
        tracing::warn!("--platform and --plain-http have no effect on a bootstrap file");
    }
    let mut source = Source::local(file.to_owned(), blobs, &options.cache_dir)?;
    source.prefetch = wish(options)?;
    source.record.clone_from(&options.record_files);
    Ok(source)
}

/// What to prefetch.
fn wish(options: &MountOptions) -> anyhow::Result<Wish> {
    let files = options.prefetch_files.as_deref();
    Ok(Wish {
        files: files.map(prefetch::read_list).transpose()?,
        all: options.prefetch_all,
        ..Wish::default()
    })
}

/// Who we are: the environment first, then docker's configuration.
async fn credentials_of(reference: &ImageRef) -> anyhow::Result<Option<Credentials>> {
    let ImageRef::Registry(name) = reference else {
        return Ok(None);
    };
    if let Some(Login::Basic { user, password }) = mounts::login_from_environment()? {
        return Ok(Some(Credentials::of_pair(&user, &password)));
    }
    Ok(Some(credentials::lookup(&name.host).await?))
}

/// Where blobs of the image come from.
fn backend(
    reference: &ImageRef,
    access: &Access,
    options: &MountOptions,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<Arc<dyn Backend>> {
    let agent = options.dragonfly.as_deref();
    match reference {
        ImageRef::Registry(name) => mounts::registry_of(name, access, agent, Arc::clone(metrics)),
        ImageRef::Layout(layout) => Ok(Arc::new(LocalBackend::new(vec![
            layout.dir.join("blobs/sha256"),
        ]))),
    }
}

/// Resolves the image and fetches its bootstrap unless it is there already.
async fn pull(
    reference: &ImageRef,
    platform: &Platform,
    access: &Access,
    store: &Store,
    backend: &dyn Backend,
) -> anyhow::Result<PathBuf> {
    let images = Images::open(reference, access).await?;
    let image = find_nydus_manifest(&images, reference, platform).await?;
    let digest = &image.descriptor.digest;
    tracing::info!("{reference} is manifest {digest}");
    let bootstrap = match store.bootstrap(digest) {
        Some(path) => path,
        None => {
            // It will be needed as soon as this is done.
            backend.warm();
            let dir = store.scratch()?;
            let files = fetch_bootstrap(&images, &image, dir.path()).await?;
            store.keep(digest, dir, &files)?
        }
    };
    store.remember(reference, platform, digest);
    Ok(bootstrap)
}

/// The metadata of images in the cache directory.
#[derive(Debug)]
struct Store {
    cache: PathBuf,
    images: PathBuf,
}

impl Store {
    /// Opens it, and creates it if need be, for nobody else to read.
    fn open(cache: &Path) -> anyhow::Result<Self> {
        let images = cache.join(IMAGES);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&images)
            .with_context(|| format!("cannot create {}", images.display()))?;
        Ok(Self {
            cache: cache.to_owned(),
            images,
        })
    }

    /// The bootstrap of the image with this manifest digest, if it was kept.
    fn bootstrap(&self, manifest: &ContentDigest) -> Option<PathBuf> {
        let path = self.images.join(manifest.hex()).join(BOOTSTRAP);
        path.is_file().then_some(path)
    }

    /// The bootstrap of a reference by digest, if everything about it is known.
    fn known(&self, reference: &ImageRef, platform: &Platform) -> Option<PathBuf> {
        let text = fs::read_to_string(self.note(reference, platform)?).ok()?;
        let digest: ContentDigest = text.trim().parse().ok()?;
        self.bootstrap(&digest)
    }

    /// Notes which manifest a reference by digest means. That this fails costs
    /// a request next time, nothing else.
    fn remember(&self, reference: &ImageRef, platform: &Platform, manifest: &ContentDigest) {
        let Some(path) = self.note(reference, platform) else {
            return;
        };
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.images)?;
            std::io::Write::write_all(&mut file, manifest.as_str().as_bytes())?;
            file.persist(&path)?;
            Ok(())
        };
        if let Err(err) = write() {
            tracing::debug!("cannot write {}: {err}", path.display());
        }
    }

    fn note(&self, reference: &ImageRef, platform: &Platform) -> Option<PathBuf> {
        let ImageRef::Registry(name) = reference else {
            return None;
        };
        // A platform given by the user may hold any bytes but slashes.
        let platform = platform.to_string().replace('/', "-");
        Some(
            self.images
                .join(format!("{}.{platform}", name.digest.as_ref()?.hex())),
        )
    }

    /// An empty directory that disappears unless it is kept.
    fn scratch(&self) -> anyhow::Result<tempfile::TempDir> {
        tempfile::Builder::new()
            .prefix(".fetch-")
            .tempdir_in(&self.images)
            .with_context(|| format!("cannot create a directory in {}", self.images.display()))
    }

    /// Gives fetched files their place: chunk tables beside the cached blobs, the
    /// rest under the digest of its manifest.
    fn keep(
        &self,
        manifest: &ContentDigest,
        dir: tempfile::TempDir,
        files: &BootstrapFiles,
    ) -> anyhow::Result<PathBuf> {
        for (id, path) in &files.blob_metas {
            let place = self.cache.join(format!("{id}.blob.meta"));
            if !place.exists() {
                fs::rename(path, &place)
                    .with_context(|| format!("cannot write {}", place.display()))?;
            }
        }
        let failed = || format!("cannot write {}", files.bootstrap.display());
        File::open(&files.bootstrap)
            .and_then(|file| file.sync_all())
            .with_context(failed)?;
        let place = self.images.join(manifest.hex());
        let moved = fs::rename(dir.path(), &place);
        match (moved, self.bootstrap(manifest)) {
            // Kept: it must not be removed under its old name. Or: another
            // process was faster, with the same bytes, and ours are not needed.
            (Ok(()), Some(path)) => {
                let _ = dir.keep();
                Ok(path)
            }
            (Err(_), Some(path)) => Ok(path),
            (Err(err), None) => {
                Err(err).with_context(|| format!("cannot write {}", place.display()))
            }
            (Ok(()), None) => bail!("{} disappeared", place.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: char) -> ContentDigest {
        format!("sha256:{}", byte.to_string().repeat(64))
            .parse()
            .unwrap()
    }

    fn fetched(store: &Store, content: &str) -> (tempfile::TempDir, BootstrapFiles) {
        let dir = store.scratch().unwrap();
        let bootstrap = dir.path().join(BOOTSTRAP);
        fs::write(&bootstrap, content).unwrap();
        let table = dir.path().join("aa.blob.meta");
        fs::write(&table, content).unwrap();
        let id = storage::BlobId::new("aa").unwrap();
        let files = BootstrapFiles {
            bootstrap,
            blob_metas: vec![(id, table)],
        };
        (dir, files)
    }

    #[test]
    fn metadata_is_kept_once() {
        let cache = tempfile::tempdir().unwrap();
        let store = Store::open(cache.path()).unwrap();
        let (first, files) = fetched(&store, "one");
        let (second, other) = fetched(&store, "two");
        assert_eq!(store.bootstrap(&digest('a')), None);
        let kept = store.keep(&digest('a'), first, &files).unwrap();
        // A slower process with the same image changes nothing and leaves nothing.
        assert_eq!(store.keep(&digest('a'), second, &other).unwrap(), kept);
        assert_eq!(fs::read_to_string(&kept).unwrap(), "one");
        let table = cache.path().join("aa.blob.meta");
        assert_eq!(fs::read_to_string(table).unwrap(), "one");
        assert_eq!(fs::read_dir(&store.images).unwrap().count(), 1);
        assert_eq!(store.bootstrap(&digest('a')), Some(kept));
    }

    #[test]
    fn a_reference_by_digest_is_remembered_for_its_platform() {
        let cache = tempfile::tempdir().unwrap();
        let store = Store::open(cache.path()).unwrap();
        let (dir, files) = fetched(&store, "one");
        let kept = store.keep(&digest('a'), dir, &files).unwrap();
        let by_digest: ImageRef = format!("h.example/r@{}", digest('b')).parse().unwrap();
        let by_tag: ImageRef = "h.example/r:t".parse().unwrap();
        let (amd, arm) = (
            "linux/amd64".parse().unwrap(),
            "linux/arm64/v8".parse().unwrap(),
        );
        assert_eq!(store.known(&by_digest, &amd), None);
        store.remember(&by_digest, &amd, &digest('a'));
        store.remember(&by_tag, &amd, &digest('a'));
        assert_eq!(store.known(&by_digest, &amd), Some(kept));
        assert_eq!(store.known(&by_digest, &arm), None);
        assert_eq!(store.known(&by_tag, &amd), None, "a tag can move");
        // A damaged note, or one whose image was removed, is as good as none.
        store.remember(&by_digest, &arm, &digest('c'));
        assert_eq!(store.known(&by_digest, &arm), None);
    }
}
