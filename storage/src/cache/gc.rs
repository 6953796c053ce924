//! Keeps the cache within its limits: whole blobs go, the least recently used first.
//!
//! A blob that any process has open is never touched, and a blob is deleted under the
//! same lock under which it would be opened. So a limit can be exceeded by what is in
//! use; [`CacheDir::has_room`] then tells background work to stop.
//!
//! The work is done by whoever writes: every so many bytes, and when the disk is full,
//! a thread looks at the directory. Processes that share it take turns.
//!
//! Two later steps have their place here. Chunks that another cached blob holds could
//! be copied instead of fetched, in `fill`'s `local`, under that blob's shared lock.
//! Single chunks could go: under the lock of the chunk, its bit first and then its
//! bytes; the reader's check of the bit would have to be repeated after the read.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::data_file::Paths;
use super::inventory::{CachedBlob, open_existing};
use super::locks::{self, Mode};
use super::{CacheDir, CacheError};
use crate::blob_id::BlobId;
use crate::metrics::add;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, lock};

/// Bytes written between two looks at the directory, at most.
const STEP: u64 = 64 << 20;

/// Shortest time between two looks that something other than writing asks for.
const PAUSE: Duration = Duration::from_secs(2);

/// How large the cache may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most disk space of all blobs together, in bytes; `None` for no limit.
    pub max_bytes: Option<u64>,
    /// Part of the file system that stays free, in percent; 0 for all may be used.
    pub min_free_percent: u8,
}

impl Limits {
    /// Nothing is ever deleted.
    pub const NONE: Self = Self {
        max_bytes: None,
        min_free_percent: 0,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_bytes: None,
            min_free_percent: 5,
        }
    }
}

/// What [`CacheDir::remove`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The files are gone; this many bytes of disk space with them.
    Removed(u64),
    /// Some process has the blob open.
    InUse,
    /// There was no such blob.
    Absent,
}

/// What [`CacheDir::gc`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Blobs that were deleted.
    pub blobs: u64,
    /// Disk space they took, in bytes.
    pub bytes: u64,
    /// Whether the limits are kept now.
    pub within_limits: bool,
}

/// When to look at the directory next.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    written: AtomicU64,
    running: AtomicBool,
    /// Whether the limits were exceeded after the last look.
    tight: AtomicBool,
    last: Mutex<Option<Instant>>,
}

impl CacheDir {
    /// Deletes idle blobs until the limits are kept, and files that processes which
    /// died left behind. Returns at once if another process is doing so.
    ///
    /// Chunk tables (`.blob.meta`) stay: they are small, and other programs put them
    /// there in advance. So do files that no process of this program made.
    ///
    /// # Errors
    /// If the directory cannot be read. Blobs that cannot be deleted are passed over.
    pub fn gc(&self) -> Result<Collected, CacheError> {
        let dir = File::open(self.path())
            .map_err(|source| self.failed("opening the directory", source))?;
        let Ok(_turn) = Flock::lock(dir, FlockArg::LockExclusiveNonblock) else {
            let within_limits = !self.0.upkeep.tight.load(Ordering::Relaxed);
            return Ok(Collected {
                within_limits,
                ..Collected::default()
            });
        };
        self.clear_up()?;
        let blobs = self.list()?;
        let mut total: u64 = blobs.iter().map(|blob| blob.bytes).sum();
        let mut done = Collected::default();
        let mut idle = blobs.iter().filter(|blob| blob.collectable && !blob.in_use);
        loop {
            done.within_limits = self.is_within(total)?;
            if done.within_limits {
                break;
            }
            let Some(blob) = idle.next() else { break };
            match self.evict(blob, false) {
                Ok(Removal::Removed(bytes)) => {
                    total = total.saturating_sub(bytes);
                    done.blobs += 1;
                    done.bytes += bytes;
                }
                Ok(Removal::InUse | Removal::Absent) => {}
                Err(error) => {
                    tracing::warn!(%error, cause = %error.source, "cannot evict a cached blob");
                }
            }
        }
        self.report(&done, total);
        Ok(done)
    }

    /// Deletes all files of a blob, its chunk table and what was cached for images
    /// that contradict each other included, unless some process has it open.
    ///
    /// # Errors
    /// If a file cannot be deleted.
    pub fn remove(&self, blob: &BlobId) -> Result<Removal, CacheError> {
        let name = blob.to_string();
        let belongs = |cached: &CachedBlob| {
            let rest = cached.name.strip_prefix(&name);
            rest.is_some_and(|rest| rest.is_empty() || is_fingerprint(rest))
        };
        let mut result = Removal::Absent;
        for cached in self.list()?.iter().filter(|cached| belongs(cached)) {
            match (self.evict(cached, true)?, result) {
                (Removal::InUse, _) => result = Removal::InUse,
                (Removal::Removed(bytes), Removal::Removed(sum)) => {
                    result = Removal::Removed(sum.saturating_add(bytes));
                }
                (removed @ Removal::Removed(_), Removal::Absent) => result = removed,
                _ => {}
            }
        }
        Ok(result)
    }

    /// Whether background work may fetch more: `false` after the limits could not be
    /// kept because too much is in use. Costs an atomic load while there is room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        if !self.0.upkeep.tight.load(Ordering::Relaxed) {
            return true;
        }
        self.look_again();
        false
    }

    /// Takes note that bytes were written, and looks at the directory now and then.
    pub(super) fn wrote(&self, bytes: u64) {
        let step = self
            .0
            .settings
            .limits
            .max_bytes
            .map_or(STEP, |max| STEP.min(max / 16));
        let upkeep = &self.0.upkeep;
        if upkeep.written.fetch_add(bytes, Ordering::Relaxed) + bytes >= step.max(1) {
            self.collect_in_background(Duration::ZERO);
        }
    }

    /// Looks, once the blobs are open for which the directory was opened: what a mount
    /// is about to use must not go.
    pub(super) fn look_soon(&self) {
        if self.0.settings.limits != Limits::NONE {
            self.collect_in_background(PAUSE);
        }
    }

    /// Looks at the directory, unless that was done a moment ago.
    pub(super) fn look_again(&self) {
        if self.0.settings.limits == Limits::NONE {
            return;
        }
        let recent = lock(&self.0.upkeep.last).is_some_and(|last| last.elapsed() < PAUSE);
        if !recent {
            self.collect_in_background(Duration::ZERO);
        }
    }

    /// * `after`: time to wait first.
    fn collect_in_background(&self, after: Duration) {
        let upkeep = &self.0.upkeep;
        if upkeep.running.swap(true, Ordering::Relaxed) {
            return;
        }
        upkeep.written.store(0, Ordering::Relaxed);
        *lock(&upkeep.last) = Some(Instant::now());
        let dir = self.clone();
        let thread = thread::Builder::new().name("cache-gc".to_owned());
        let started = thread.spawn(move || {
            thread::sleep(after);
            if let Err(error) = dir.gc() {
                tracing::warn!(%error, cause = %error.source, "cannot look at the cache");
            }
            dir.0.upkeep.running.store(false, Ordering::Relaxed);
        });
        if let Err(error) = started {
            tracing::warn!("cannot start a thread to look at the cache: {error}");
            upkeep.running.store(false, Ordering::Relaxed);
        }
    }

    fn is_within(&self, total: u64) -> Result<bool, CacheError> {
        let limits = &self.0.settings.limits;
        if limits.max_bytes.is_some_and(|max| total > max) {
            return Ok(false);
        }
        if limits.min_free_percent == 0 {
            return Ok(true);
        }
        let (size, free) = self.disk()?;
        Ok(free >= size / 100 * u64::from(limits.min_free_percent))
    }

    fn report(&self, done: &Collected, total: u64) {
        let metrics = self.metrics();
        metrics.bytes_cached.store(total, Ordering::Relaxed);
        add(&metrics.blobs_evicted, done.blobs);
        add(&metrics.bytes_evicted, done.bytes);
        if done.blobs > 0 {
            tracing::info!(
                blobs = done.blobs,
                bytes = done.bytes,
                "evicted cached blobs that nobody uses"
            );
        }
        let was_tight = (self.0.upkeep.tight).swap(!done.within_limits, Ordering::Relaxed);
        if !done.within_limits && !was_tight {
            tracing::warn!(
                dir = %self.path().display(),
                bytes = total,
                "the cache exceeds its limits and everything in it is in use"
            );
        }
    }

    /// Deletes the files of a blob that nobody has open.
    fn evict(&self, blob: &CachedBlob, with_table: bool) -> Result<Removal, CacheError> {
        let paths = Paths::new(self, &blob.name);
        let data = open_existing(&paths.data);
        if let Some(data) = &data {
            let free = || -> io::Result<bool> {
                // Somebody is opening it: as good as in use.
                Ok(locks::try_lock(data, locks::OPENING, Mode::Exclusive)?
                    && locks::try_lock(data, locks::IN_USE, Mode::Exclusive)?)
            };
            if !free().map_err(|source| CacheError::new(&paths.data, "locking", source))? {
                return Ok(Removal::InUse);
            }
            // Another process was faster; these may be the files of a new user.
            if data.metadata().is_ok_and(|meta| meta.nlink() == 0) {
                return Ok(Removal::Absent);
            }
        }
        if data.is_some() || with_table {
            paths.discard()?;
        }
        if with_table {
            let table = self.path().join(format!("{}{}", blob.name, super::TABLE));
            super::data_file::remove(&table)
                .map_err(|source| CacheError::new(&table, "removing", source))?;
        }
        Ok(Removal::Removed(blob.bytes))
    }
}

/// Whether this follows the id in the name of files that an image has of its own.
fn is_fingerprint(rest: &str) -> bool {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    rest.strip_prefix('.')
        .is_some_and(|print| print.len() == 32 && print.bytes().all(hex))
}

#[cfg(test)]
mod tests;
