//! One image mounted by the kernel's own EROFS: metadata from the bootstrap file, data
//! from the blobs' cache files, which are filled as the kernel is about to read them.
//!
//! The kernel gets the bootstrap as the file system's image and one cache file per
//! blob, in the order of the blob table, as its devices. A cache file is the blob's
//! uncompressed address space, which is what a device of such an image has to be. So
//! everything that was fetched once is read at the kernel's own speed; [`events`] is
//! asked only about blobs that are not complete.
//!
//! The order matters: watch first, mount then, because a mount keeps the files as they
//! were when it was made; unmount first, stop watching then, because the kernel lets
//! every read pass when nobody watches. And a file system lives on below an overlay or
//! in another namespace after it was unmounted here: it is over when [`EndWatch`] says so.
//!
//! What the kernel can do is found out by doing: [`probe`].

mod event;
pub(crate) mod events;
pub(crate) mod journal;
pub(crate) mod place;
pub(crate) mod probe;
pub(crate) mod sys;

use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use storage::blob::Blob;

use events::Watch;
use place::Place;
use sys::{Detached, EndWatch, FsContext};

/// Longest value that `fsconfig(2)` takes, in bytes.
const MAX_VALUE: usize = 255;

/// An image that the kernel serves.
#[derive(Debug)]
pub(crate) struct ErofsMount {
    mountpoint: PathBuf,
    device: u64,
    place: Place,
    blobs: Vec<Arc<Blob>>,
    watch: Arc<Watch>,
    end: EndWatch,
}

impl ErofsMount {
    /// Mounts the image of `place` where nobody sees it yet.
    ///
    /// * `blobs`: one for each entry of the image's blob table, in its order, all of
    ///   which are watched already;
    /// * `mountpoint`: where it will be, an absolute path.
    ///
    /// # Errors
    /// When the kernel refuses, with its own words; nothing is left mounted, and the
    /// place is removed.
    pub(crate) fn prepare(
        place: Place,
        blobs: Vec<Arc<Blob>>,
        watch: &Arc<Watch>,
        mountpoint: &Path,
    ) -> anyhow::Result<(Self, Detached)> {
        let made = make(&place, &blobs).and_then(|detached| {
            let end = EndWatch::new(&detached.path()).context("cannot watch for its end")?;
            Ok((detached, end))
        });
        match made {
            Ok((detached, end)) => {
                let mount = Self {
                    mountpoint: mountpoint.to_owned(),
                    device: detached.device(),
                    place,
                    blobs,
                    watch: Arc::clone(watch),
                    end,
                };
                Ok((mount, detached))
            }
            Err(error) => {
                watch.remove(&blobs);
                place.remove();
                Err(error)
            }
        }
    }

    /// The mount of a predecessor. Its blobs have been added to the watch.
    pub(crate) fn adopt(
        place: Place,
        blobs: Vec<Arc<Blob>>,
        watch: &Arc<Watch>,
        mountpoint: &Path,
        device: u64,
        end: EndWatch,
    ) -> Self {
        Self {
            mountpoint: mountpoint.to_owned(),
            device,
            place,
            blobs,
            watch: Arc::clone(watch),
            end,
        }
    }

    /// What says that the file system is gone.
    pub(crate) fn end(&self) -> &EndWatch {
        &self.end
    }

    /// The mount's directory.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Device number of the file system, as `stat` shows it.
    pub(crate) fn device(&self) -> u64 {
        self.device
    }

    /// Waits at most `timeout` milliseconds, and says whether the file system is gone:
    /// here, below overlays and in all namespaces.
    pub(crate) fn wait_for_end(&self, timeout: u16) -> bool {
        self.end.wait(timeout)
    }

    /// Releases what the mount needed. Only after its end.
    pub(crate) fn release(&self) {
        tracing::debug!("{} is gone", self.mountpoint.display());
        self.watch.remove(&self.blobs);
        self.place.remove();
    }
}

fn make(place: &Place, blobs: &[Arc<Blob>]) -> anyhow::Result<Detached> {
    let files = FsContext::open(c"erofs").context("the kernel has no EROFS")?;
    let explained = |error: std::io::Error, what: &str| match files.explain() {
        words if words.is_empty() => anyhow!("{what}: {error}"),
        words => anyhow!("{what}: {error} ({words})"),
    };
    let source = place.bootstrap();
    let source = match source.to_str() {
        Some(path) if path.len() <= MAX_VALUE => path.to_owned(),
        _ => return Err(anyhow!("path {} is too long for EROFS", source.display())),
    };
    files
        .set(c"source", &source)
        .map_err(|error| explained(error, "bootstrap refused"))?;
    for blob in blobs {
        let file = blob.cache_file().context("a cache file is missing")?;
        // By descriptor: it is this file that is watched, and no path is too long.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        files
            .set(c"device", &path)
            .map_err(|error| explained(error, "blob refused"))?;
    }
    files
        .mount()
        .map_err(|error| explained(error, "EROFS refused the image"))
}
