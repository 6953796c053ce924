//! The cache directory and the files of one blob in it.
//!
//! Per blob there is a sparse file with the uncompressed address space, a
//! `ReadyMap` that says which chunks of it are there, and a copy of the chunk
//! table. Names and layout: `docs/format-blob.md`, "Cache directory".
//!
//! Promises: a chunk is marked ready only after its bytes are in the data file; a
//! data file that is new, short or not the one the map speaks of voids the map, so
//! that a lost file never reads as zeros; a directory that cannot be written is
//! reported once, and used again by itself when it can. Several processes may use one
//! directory: bits are shared, and a file is only ever replaced, never shortened.
//!
//! Where to read next: `data_file` for how files are opened, `files` for how they are
//! used, `gc` for how the directory is kept within limits, `vouched` for why one image may believe what another one fetched, `locks` for
//! what processes agree on.

mod data_file;
mod files;
mod gc;
mod inventory;
mod locks;
mod unwatched;
mod vouched;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use files::CacheState;
pub(crate) use files::{BlobFiles, OpenFiles};
pub use gc::{Collected, Limits, Removal};
pub use inventory::{CachedBlob, Usage};
pub(crate) use locks::ChunkLock;

use crate::blob_id::BlobId;
use crate::budget::Budget;
use crate::cores::Cores;
use crate::metrics::Metrics;
use crate::ready_map::BootId;
use crate::sync::{Arc, AtomicU64, Ordering};

/// Ends of the names of the files of a blob, `docs/format-blob.md`, "Cache directory".
const DATA: &str = ".blob.data";
const MAP: &str = ".blob.data.chunk_map";
const SUSPECTS: &str = ".blob.data.suspects";
const VOUCHED: &str = ".blob.data.vouched";
const TABLE: &str = ".blob.meta";

/// A file or directory of the cache could not be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{path}: {action}")]
pub struct CacheError {
    /// The file or directory.
    pub path: PathBuf,
    /// What was being done.
    pub action: &'static str,
    /// What the system said.
    pub source: Arc<io::Error>,
}

impl CacheError {
    pub(crate) fn new(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self {
            path: path.to_owned(),
            action,
            source: Arc::new(source),
        }
    }
}

/// How a cache directory is used.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where things are counted.
    pub metrics: Arc<Metrics>,
    /// How large the cache may become.
    pub limits: Limits,
    /// Memory for fetches; give all directories of a process the same.
    pub memory: Budget,
    /// Turns at the processor; give all directories of a process the same.
    pub cores: Cores,
    /// A read that waits longer is logged, with chunk and source.
    pub slow_read: Duration,
    /// The run of the machine, if it is not what the system says: for tests.
    pub boot: Option<BootId>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            metrics: Arc::default(),
            limits: Limits::default(),
            memory: Budget::default(),
            cores: Cores::default(),
            slow_read: Duration::from_secs(1),
            boot: None,
        }
    }
}

/// A directory with cached blobs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CacheDir(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    boot: BootId,
    settings: Settings,
    upkeep: gc::Upkeep,
}

impl CacheDir {
    /// Opens the directory, and makes it with mode 0700 if it is missing.
    ///
    /// A directory that exists but cannot be written is accepted: blobs are then
    /// served from memory.
    ///
    /// # Errors
    /// If there is no directory and none can be made.
    pub fn open(path: &Path) -> Result<Self, CacheError> {
        Self::open_with(path, Arc::default())
    }

    /// The same, counting in `metrics`.
    ///
    /// # Errors
    /// As for [`CacheDir::open`].
    pub fn open_with(path: &Path, metrics: Arc<Metrics>) -> Result<Self, CacheError> {
        let settings = Settings {
            metrics,
            ..Settings::default()
        };
        Self::open_as(path, settings)
    }

    /// The same, with other settings than the usual ones. Limits are kept by every
    /// process for itself: let those that share a directory have the same.
    ///
    /// # Errors
    /// As for [`CacheDir::open`].
    pub fn open_as(path: &Path, settings: Settings) -> Result<Self, CacheError> {
        let current = || {
            BootId::current().unwrap_or_else(|error| {
                tracing::warn!(%error, "no boot id: cached chunks are checked before they are used");
                BootId::unknown()
            })
        };
        let boot = settings.boot.unwrap_or_else(current);
        let dir = Self::open_in_boot(path, settings, boot)?;
        dir.look_soon();
        Ok(dir)
    }

    pub(crate) fn open_in_boot(
        path: &Path,
        settings: Settings,
        boot: BootId,
    ) -> Result<Self, CacheError> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|error| CacheError::new(path, "making the cache directory", error))?;
        // An absolute path stays right when the process changes its directory.
        let path = fs::canonicalize(path)
            .map_err(|error| CacheError::new(path, "opening the cache directory", error))?;
        Ok(Self(Arc::new(Inner {
            path,
            boot,
            settings,
            upkeep: gc::Upkeep::default(),
        })))
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// What is counted about the blobs of this directory.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.0.settings.metrics
    }

    /// Waits that are worth a line in the log.
    pub(crate) fn slow_read(&self) -> Duration {
        self.0.settings.slow_read
    }

    /// Memory for fetches into this directory.
    pub(crate) fn memory(&self) -> &Budget {
        &self.0.settings.memory
    }

    /// Turns at the processor for what is fetched into this directory.
    pub(crate) fn cores(&self) -> &Cores {
        &self.0.settings.cores
    }

    /// The file with the uncompressed address space of a blob. An image that
    /// contradicts the one it was made for has another: [`Blob::data_path`].
    ///
    /// [`Blob::data_path`]: crate::blob::Blob::data_path
    #[must_use]
    pub fn data_path(&self, blob: &BlobId) -> PathBuf {
        self.0.path.join(format!("{blob}{DATA}"))
    }

    /// The ready map of a blob.
    #[must_use]
    pub fn map_path(&self, blob: &BlobId) -> PathBuf {
        self.0.path.join(format!("{blob}{MAP}"))
    }

    /// The chunk table of a blob, for `SEPARATE` blobs too.
    #[must_use]
    pub fn table_path(&self, blob: &BlobId) -> PathBuf {
        self.0.path.join(format!("{blob}{TABLE}"))
    }
}

/// A name beside `path` that nobody else uses, for a file that is renamed when complete.
pub(crate) fn temporary_name(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    // Process ids repeat (in containers that share a directory, for instance):
    // creation with O_EXCL fails then, and is tried again later.
    name.push(format!(".{}-{number}.tmp", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests;
