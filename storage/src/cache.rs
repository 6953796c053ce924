//! The cache directory and the files of one blob in it.
//!
//! Per blob there is a sparse file with the uncompressed address space, a
//! [`ReadyMap`] that says which chunks of it are there, and a copy of the chunk
//! table. Names and layout: `docs/format-blob.md`, "Cache directory".
//!
//! Promises: a chunk is marked ready only after its bytes are in the data file; a
//! data file that had to be created or extended voids an existing map, so that a
//! lost file never reads as zeros; a directory that cannot be written is reported
//! once, and used again by itself when it can. Several processes may use one
//! directory: bits are shared, and a file is only ever replaced, never shortened.
//!
//! Not here yet: a lock per chunk between processes (two may fetch the same chunk,
//! with the same result; `BlobFiles::store` is the place) and eviction.

mod data_file;
mod unwatched;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::blob_id::BlobId;
use crate::blob_info::BlobInfo;
use crate::metrics::{Metrics, add};
use crate::ready_map::{BootId, ReadyMap};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, OnceLock, Ordering, lock};
use crate::units::ChunkIndex;

/// How long to leave files alone that could not be opened.
const REOPEN_AFTER: Duration = Duration::from_secs(2);

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

/// A directory with cached blobs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CacheDir(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    boot: BootId,
    metrics: Arc<Metrics>,
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
        let boot = BootId::current().unwrap_or_else(|error| {
            tracing::warn!(%error, "no boot id: cached chunks are checked before they are used");
            BootId::unknown()
        });
        Self::open_in_boot(path, metrics, boot)
    }

    pub(crate) fn open_in_boot(
        path: &Path,
        metrics: Arc<Metrics>,
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
            metrics,
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
        &self.0.metrics
    }

    /// The file with the uncompressed address space of a blob.
    #[must_use]
    pub fn data_path(&self, blob: &BlobId) -> PathBuf {
        self.0.path.join(format!("{blob}.blob.data"))
    }

    /// The ready map of a blob.
    #[must_use]
    pub fn map_path(&self, blob: &BlobId) -> PathBuf {
        self.0.path.join(format!("{blob}.blob.data.chunk_map"))
    }

    /// The chunk table of a blob, for `SEPARATE` blobs too.
    #[must_use]
    pub fn table_path(&self, blob: &BlobId) -> PathBuf {
        self.0.path.join(format!("{blob}.blob.meta"))
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

/// Whether the cache of a blob takes new chunks.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CacheState {
    /// As far as known, it does.
    Writable,
    /// It does not; reads go on from memory.
    Unwritable(CacheError),
}

/// Data file and map of one blob.
#[derive(Debug)]
pub(crate) struct BlobFiles {
    dir: CacheDir,
    blob: BlobId,
    size: u64,
    chunks: u32,
    open: OnceLock<OpenFiles>,
    trouble: Mutex<Trouble>,
    /// Whether `trouble` holds an error: saves the lock when all is well.
    troubled: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct OpenFiles {
    pub(crate) data: File,
    pub(crate) map: ReadyMap,
}

#[derive(Debug, Default)]
struct Trouble {
    error: Option<CacheError>,
    /// When the files could not be opened, and whether somebody is trying again.
    tried: Option<Instant>,
}

impl BlobFiles {
    /// Opens the files of a blob; if that fails, it is tried again later.
    pub(crate) fn open(dir: &CacheDir, info: &BlobInfo) -> Self {
        let files = Self {
            dir: dir.clone(),
            blob: info.id.clone(),
            size: info.uncompressed_size,
            chunks: info.chunk_count,
            open: OnceLock::new(),
            trouble: Mutex::default(),
            troubled: AtomicBool::new(false),
        };
        files.try_open();
        files
    }

    /// The open files. No lock; `None` while they cannot be opened.
    pub(crate) fn get(&self) -> Option<&OpenFiles> {
        self.open.get()
    }

    /// Whether the chunk is in the data file. No lock.
    pub(crate) fn is_ready(&self, index: ChunkIndex) -> bool {
        self.get().is_some_and(|files| files.map.is_ready(index))
    }

    pub(crate) fn state(&self) -> CacheState {
        match &lock(&self.trouble).error {
            None => CacheState::Writable,
            Some(error) => CacheState::Unwritable(error.clone()),
        }
    }

    /// Writes the verified bytes of a chunk, then marks it ready.
    ///
    /// # Errors
    /// If the bytes could not be written; the chunk is not ready then.
    pub(crate) fn store(
        &self,
        index: ChunkIndex,
        plain_offset: u64,
        bytes: &[u8],
    ) -> Result<(), CacheError> {
        use std::os::unix::fs::FileExt as _;
        if self.get().is_none() {
            self.try_open();
        }
        let Some(files) = self.get() else {
            return Err(self.last_error());
        };
        if let Err(source) = files.data.write_all_at(bytes, plain_offset) {
            let path = self.dir.data_path(&self.blob);
            let error = CacheError::new(&path, "writing a chunk", source);
            self.note_failure(&error);
            return Err(error);
        }
        // Only now, and never before: a marked hole would be served as zeros.
        files.map.mark(index);
        self.note_success();
        Ok(())
    }

    fn last_error(&self) -> CacheError {
        lock(&self.trouble).error.clone().unwrap_or_else(|| {
            let path = self.dir.data_path(&self.blob);
            CacheError::new(&path, "opening", io::ErrorKind::Other.into())
        })
    }

    fn try_open(&self) {
        {
            let mut trouble = lock(&self.trouble);
            if trouble
                .tried
                .is_some_and(|tried| tried.elapsed() < REOPEN_AFTER)
            {
                return;
            }
            trouble.tried = Some(Instant::now());
        }
        match data_file::open(
            &self.dir,
            &self.blob,
            self.size,
            self.chunks,
            &self.dir.0.boot,
        ) {
            Ok(files) => {
                // If another thread was faster, its files are as good.
                let _ = self.open.set(files);
                self.note_success();
            }
            Err(error) => self.note_failure(&error),
        }
    }

    fn note_failure(&self, error: &CacheError) {
        let first = lock(&self.trouble).error.replace(error.clone()).is_none();
        self.troubled.store(true, Ordering::Relaxed);
        if first {
            add(&self.dir.metrics().unwritable, 1);
            tracing::warn!(
                blob = %self.blob,
                path = %error.path.display(),
                cause = %error.source,
                "the cache cannot be written ({}); reads go on from memory", error.action
            );
        }
    }

    fn note_success(&self) {
        if self.troubled.swap(false, Ordering::Relaxed)
            && lock(&self.trouble).error.take().is_some()
        {
            self.dir
                .metrics()
                .unwritable
                .fetch_sub(1, Ordering::Relaxed);
            tracing::info!(blob = %self.blob, "the cache can be written again");
        }
    }
}

impl Drop for BlobFiles {
    fn drop(&mut self) {
        if lock(&self.trouble).error.take().is_some() {
            self.dir
                .metrics()
                .unwritable
                .fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
