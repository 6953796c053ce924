//! What one kernel mount needs on disk: a directory `mounts/<name>` in the cache
//! directory.
//!
//! * `lock`: locked for as long as a process lives that can answer the kernel. The
//!   lock belongs to the open file, so whoever holds a copy of the descriptor holds it;
//! * `mount.json`: where it is mounted, and from what;
//! * `image.boot`: a copy of the bootstrap, unless that is in the cache directory
//!   anyway. The kernel reads metadata from it without asking anybody, so it must be
//!   whole, and must not change while somebody replaces the original.
//!
//! A directory whose lock is free belongs to a mount that nobody can answer for any
//! more: the kernel now lets every read pass, and what was not fetched reads as zeros.
//! [`sweep`] takes such mounts down.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use crate::busy;
use crate::mountinfo;

/// Where the directories are, in the cache directory.
const MOUNTS: &str = "mounts";
const LOCK: &str = "lock";
const RECORD: &str = "mount.json";
const BOOTSTRAP: &str = "image.boot";
/// Name of a directory that is being made.
const NEW: &str = ".new-";

/// What a mount leaves behind for those who come after everybody died.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    mountpoint: PathBuf,
    /// The source that the mount table shows.
    bootstrap: PathBuf,
}

/// The directory of one mount.
#[derive(Debug)]
pub(crate) struct Place {
    dir: PathBuf,
    bootstrap: PathBuf,
    lock: File,
}

impl Place {
    /// Makes the directory, with a copy of the bootstrap if need be.
    ///
    /// # Errors
    /// When the cache directory cannot be written.
    pub(crate) fn new(cache: &Path, bootstrap: &Path, mountpoint: &Path) -> anyhow::Result<Self> {
        let mounts = cache.join(MOUNTS);
        fs::create_dir_all(&mounts)
            .with_context(|| format!("cannot create {}", mounts.display()))?;
        let dir = tempfile::Builder::new()
            .prefix(NEW)
            .tempdir_in(&mounts)
            .with_context(|| format!("cannot create a directory in {}", mounts.display()))?;
        let failed = || format!("cannot write to {}", mounts.display());
        let lock = File::create_new(dir.path().join(LOCK)).with_context(failed)?;
        lock.lock().with_context(failed)?;
        let name = dir.path().file_name().unwrap_or_default();
        let name = name.to_string_lossy().replacen(NEW, "", 1);
        let place = mounts.join(name);
        let bootstrap = bootstrap
            .canonicalize()
            .with_context(|| format!("bootstrap {}", bootstrap.display()))?;
        let inside = bootstrap.starts_with(cache);
        let record = Record {
            mountpoint: mountpoint.to_owned(),
            bootstrap: match inside {
                true => bootstrap.clone(),
                false => place.join(BOOTSTRAP),
            },
        };
        fs::write(dir.path().join(RECORD), serde_json::to_vec(&record)?).with_context(failed)?;
        fs::rename(dir.path(), &place).with_context(failed)?;
        let _ = dir.keep();
        let place = Self {
            dir: place,
            bootstrap: record.bootstrap,
            lock,
        };
        if !inside && let Err(error) = fs::copy(&bootstrap, &place.bootstrap) {
            let from = format!("cannot copy {}", bootstrap.display());
            place.remove();
            return Err(error).context(from);
        }
        Ok(place)
    }

    /// The directory that a predecessor has made, with the lock that it held.
    pub(crate) fn adopt(dir: PathBuf, bootstrap: PathBuf, lock: File) -> Self {
        Self {
            dir,
            bootstrap,
            lock,
        }
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The bootstrap that is mounted.
    pub(crate) fn bootstrap(&self) -> &Path {
        &self.bootstrap
    }

    /// The lock, for a process that can answer in our place.
    pub(crate) fn lock(&self) -> &File {
        &self.lock
    }

    /// Removes the directory, after the mount is gone.
    pub(crate) fn remove(&self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::warn!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

/// Takes down the mounts of this cache directory that nobody can answer for.
///
/// # Errors
/// When there is one that cannot be taken down: nothing must be built on top of it.
pub(crate) fn sweep(cache: &Path) -> anyhow::Result<()> {
    let mounts = cache.join(MOUNTS);
    let entries = match fs::read_dir(&mounts) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("cannot list {}", mounts.display()))?,
    };
    let mut dead = Vec::new();
    for entry in entries {
        let entry = entry.context("cannot list mounts")?;
        // Not locked yet, perhaps, and nothing is mounted from it.
        if entry.file_name().to_string_lossy().starts_with(NEW) {
            continue;
        }
        let dir = entry.path();
        let Ok(lock) = File::open(dir.join(LOCK)) else {
            continue;
        };
        // Locked: somebody lives. Otherwise the lock is ours until we are done.
        if lock.try_lock().is_err() {
            continue;
        }
        let record = fs::read(dir.join(RECORD)).ok();
        let record = record.and_then(|record| serde_json::from_slice::<Record>(&record).ok());
        dead.push((dir, record, lock));
    }
    // One that was about to replace another is below it.
    let mut left = usize::MAX;
    while dead.len() < left {
        left = dead.len();
        for (dir, record, lock) in std::mem::take(&mut dead) {
            if let Some(record) = &record
                && !take_down(record)?
            {
                dead.push((dir, Some(record.clone()), lock));
                continue;
            }
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    if let Some((_, Some(record), _)) = dead.first() {
        bail!(
            "{}: the mount of a dead daemon is below another one; unmount that first",
            record.mountpoint.display()
        );
    }
    Ok(())
}

/// Returns whether the mount is gone: it may be below another one.
fn take_down(record: &Record) -> anyhow::Result<bool> {
    let is_it =
        |entry: &mountinfo::Entry| entry.kind == "erofs" && entry.source == record.bootstrap;
    // Mounted twice on the same place, by whatever accident: twice taken down.
    while let Some(entry) = mountinfo::at(&record.mountpoint) {
        if !is_it(&entry) {
            break;
        }
        let point = record.mountpoint.display();
        tracing::error!(
            "{point}: all processes that served this mount have died. What they had not \
             fetched reads as ZEROS; whoever has used it since may have wrong data. \
             Taking it down"
        );
        let flags = MntFlags::UMOUNT_NOFOLLOW;
        let mut done = umount2(&record.mountpoint, flags);
        if done == Err(Errno::EBUSY) {
            tracing::error!(
                "{point} is still in use, and its users read zeros; end them: {}",
                busy::list(&busy::processes(entry.device_number()))
            );
            done = umount2(&record.mountpoint, flags | MntFlags::MNT_DETACH);
        }
        ensure!(
            done.is_ok(),
            "{point}: the mount of a dead daemon cannot be taken down: {done:?}"
        );
    }
    Ok(!mountinfo::stack(&record.mountpoint).iter().any(is_it))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_lives_as_long_as_its_lock() {
        let cache = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let bootstrap = outside.path().join("boot");
        fs::write(&bootstrap, "metadata").unwrap();
        let place = Place::new(cache.path(), &bootstrap, Path::new("/nowhere")).unwrap();
        fs::remove_file(&bootstrap).unwrap();
        assert_eq!(fs::read(place.bootstrap()).unwrap(), b"metadata");
        let other = place.lock().try_clone().unwrap();
        let dir = place.dir().to_owned();
        drop(place);
        // Its owner died, a holder of its lock did not.
        sweep(cache.path()).unwrap();
        assert!(dir.exists());
        drop(other);
        sweep(cache.path()).unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn a_bootstrap_in_the_cache_is_not_copied() {
        let cache = tempfile::tempdir().unwrap();
        let bootstrap = cache.path().join("images.boot");
        fs::write(&bootstrap, "metadata").unwrap();
        let cache = cache.path().canonicalize().unwrap();
        let place = Place::new(&cache, &bootstrap, Path::new("/nowhere")).unwrap();
        assert_eq!(place.bootstrap(), cache.join("images.boot"));
        place.remove();
        assert!(bootstrap.exists() && !place.dir().exists());
    }
}
