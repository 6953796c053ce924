//! Data file and ready map of one blob, while it is open.
//!
//! Files that cannot be opened, or that somebody shortened, are opened anew later;
//! until then reads go on from memory. Files once handed out stay open until the blob
//! is closed, so a reader never loses what it is reading from.
//!
//! Promises: bytes first, then the bit; questions take no lock; trouble is reported
//! when it begins and when it ends, not in between.

use std::fs::{File, FileTimes};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use super::data_file::{self, Paths};
use super::locks::ChunkLock;
use super::vouched::{self, View};
use super::{CacheDir, CacheError};
use crate::blob_id::BlobId;
use crate::blob_info::BlobInfo;
use crate::codec::as_u64;
use crate::digest::ChunkDigests;
use crate::metrics::add;
use crate::ready_map::ReadyMap;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, OnceLock, Ordering, lock};
use crate::units::ChunkIndex;

/// How long to leave files alone that could not be opened.
const REOPEN_AFTER: Duration = Duration::from_secs(2);

/// Times that files are opened anew because somebody shortened them. Each time costs
/// two descriptors until the blob is closed.
const MAX_GENERATIONS: usize = 8;

/// Most bytes that closing a blob waits for to reach the disk. Beyond that, chunks are
/// checked after a restart of the machine: cheaper than to hold up an unmount.
const MAX_SYNC_AT_CLOSE: u64 = 64 << 20;

/// After that time without a write, hardly anything is left to wait for.
const IDLE: Duration = Duration::from_secs(60);

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
pub(crate) struct BlobFiles {
    dir: CacheDir,
    blob: BlobId,
    size: u64,
    chunks: u32,
    digests: Arc<dyn ChunkDigests>,
    /// The last one is used; a new one is added when that one is found damaged.
    generations: [OnceLock<OpenFiles>; MAX_GENERATIONS],
    trouble: Mutex<Trouble>,
    /// Whether `trouble` holds an error: saves the lock when all is well.
    troubled: AtomicBool,
}

/// The files as they were opened.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    pub(crate) data: File,
    /// The same file, opened for [`ChunkLock`]s alone. Copies of `data` are handed to
    /// other processes, which outlive this one and what it was about to fetch.
    chunk_locks: File,
    pub(crate) map: ReadyMap,
    paths: Paths,
    /// Set when the data file turned out to be shorter than it must be.
    damaged: AtomicBool,
    /// Bytes stored since the map was last known to be on the disk with its data.
    unsynced: AtomicU64,
}

#[derive(Debug, Default)]
struct Trouble {
    error: Option<CacheError>,
    /// When the files could not be opened, and whether somebody is trying again.
    tried: Option<Instant>,
}

impl OpenFiles {
    pub(super) fn new(data: File, chunk_locks: File, map: ReadyMap, paths: Paths) -> Self {
        let files = Self {
            data,
            chunk_locks,
            map,
            paths,
            damaged: AtomicBool::new(false),
            unsynced: AtomicU64::new(0),
        };
        files.touch();
        files
    }

    /// Takes note that the blob is used now, for the next one who needs space.
    fn touch(&self) {
        // Not the time of the last read, which many systems do not keep.
        let now = FileTimes::new().set_accessed(SystemTime::now());
        let _ = self.data.set_times(now);
    }

    /// Whether the last write is so long ago that the system has put it on the disk
    /// by itself, usually.
    fn is_idle(&self) -> bool {
        let written = self.data.metadata().and_then(|meta| meta.modified());
        let age = written.ok().and_then(|at| at.elapsed().ok());
        age.is_some_and(|age| age > IDLE)
    }

    /// Marks a chunk of an earlier boot that was found good.
    pub(crate) fn believe(&self, index: ChunkIndex, size: u32) {
        self.unsynced.fetch_add(size.into(), Ordering::Relaxed);
        self.map.mark(index);
    }

    /// Writes the bytes, then sets the bit.
    fn store(&self, index: ChunkIndex, at: u64, bytes: &[u8], size: u64) -> io::Result<()> {
        // Writing behind the end of a file that somebody shortened would make a hole
        // out of chunks that are marked ready.
        if self.data.metadata()?.len() != size {
            self.damaged.store(true, Ordering::Relaxed);
            return Err(io::Error::other("the file was shortened"));
        }
        self.data.write_all_at(bytes, at)?;
        self.unsynced
            .fetch_add(as_u64(bytes.len()), Ordering::Relaxed);
        // Only now, and never before: a marked hole would be served as zeros.
        self.map.mark(index);
        Ok(())
    }

    /// Puts everything on the disk, so that it is believed after a restart of the machine.
    fn sync(&self) -> io::Result<()> {
        let unsynced = self.unsynced.load(Ordering::Relaxed);
        self.map.synced(|| {
            self.data.sync_data()?;
            vouched::sync(&self.paths.vouched)
        })?;
        self.unsynced.fetch_sub(unsynced, Ordering::Relaxed);
        Ok(())
    }
}

impl std::fmt::Debug for BlobFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlobFiles")
            .field("blob", &self.blob)
            .field("open", &self.get())
            .finish_non_exhaustive()
    }
}

impl BlobFiles {
    /// Opens the files of a blob; if that fails, it is tried again later.
    pub(crate) fn open(dir: &CacheDir, info: &BlobInfo, digests: Arc<dyn ChunkDigests>) -> Self {
        let files = Self {
            dir: dir.clone(),
            blob: info.id.clone(),
            size: info.uncompressed_size,
            chunks: info.chunk_count,
            digests,
            generations: std::array::from_fn(|_| OnceLock::new()),
            trouble: Mutex::default(),
            troubled: AtomicBool::new(false),
        };
        files.try_open();
        files
    }

    /// The open files. No lock; `None` while they cannot be opened.
    pub(crate) fn get(&self) -> Option<&OpenFiles> {
        let healthy = |files: &&OpenFiles| !files.damaged.load(Ordering::Relaxed);
        let mut opened = self.generations.iter().map_while(OnceLock::get);
        opened.find(healthy)
    }

    /// Whether the chunk is in the data file. No lock.
    pub(crate) fn is_ready(&self, index: ChunkIndex) -> bool {
        self.get().is_some_and(|files| files.map.is_ready(index))
    }

    /// The data file, where it is or will be.
    pub(crate) fn data_path(&self) -> PathBuf {
        let usual = || self.dir.data_path(&self.blob);
        self.get()
            .map_or_else(usual, |files| files.paths.data.clone())
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
        if self.get().is_none() {
            self.try_open();
        }
        let Some(files) = self.get() else {
            return Err(self.last_error());
        };
        if let Err(source) = files.store(index, plain_offset, bytes, self.size) {
            let error = CacheError::new(&files.paths.data, "writing a chunk", source);
            self.note_failure(&error);
            return Err(error);
        }
        self.note_success();
        self.dir.wrote(as_u64(bytes.len()));
        Ok(())
    }

    /// The duty to fetch a chunk for all processes that use this directory.
    ///
    /// `Some(None)` if another one has it. `None` if there is nothing to agree about:
    /// no files, or a file system without locks.
    pub(crate) fn lock_chunk(&self, index: ChunkIndex) -> Option<Option<ChunkLock<'_>>> {
        ChunkLock::try_take(&self.get()?.chunk_locks, index).ok()
    }

    /// Takes note that the data file ended before its length: what the map says about
    /// it means nothing any more.
    pub(crate) fn found_short(&self) {
        if let Some(files) = self.get() {
            let len = files.data.metadata().map_or(0, |meta| meta.len());
            if len < self.size {
                files.damaged.store(true, Ordering::Relaxed);
                let source = io::Error::other("the file was shortened");
                let error = CacheError::new(&files.paths.data, "reading resident data", source);
                self.note_failure(&error);
            }
        }
    }

    /// Does not wait until files that could not be opened are tried again.
    #[cfg(test)]
    pub(super) fn retry_now(&self) {
        lock(&self.trouble).tried = None;
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
        let Some(place) = self.generations.iter().find(|place| place.get().is_none()) else {
            return;
        };
        let view = View {
            size: self.size,
            chunks: self.chunks,
            digests: &*self.digests,
        };
        match data_file::open(&self.dir, &self.blob, &view, &self.dir.0.boot) {
            Ok(files) => {
                // If another thread was faster, its files are as good.
                let _ = place.set(files);
                self.note_success();
            }
            Err(error) => self.note_failure(&error),
        }
    }

    fn note_failure(&self, error: &CacheError) {
        if error.source.kind() == io::ErrorKind::StorageFull {
            // Blobs that nobody uses may make room for this one.
            self.dir.look_again();
        }
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
        if let Some(files) = self.get() {
            let idle = files.is_idle();
            files.touch();
            let unsynced = files.unsynced.load(Ordering::Relaxed);
            if unsynced > 0 && (idle || unsynced <= MAX_SYNC_AT_CLOSE) {
                // If it fails, chunks are checked after a restart of the machine.
                if let Err(error) = files.sync() {
                    tracing::debug!(blob = %self.blob, %error, "cannot sync the cache file");
                }
            }
        }
        if lock(&self.trouble).error.take().is_some() {
            self.dir
                .metrics()
                .unwritable
                .fetch_sub(1, Ordering::Relaxed);
        }
    }
}
