//! Files that have no final name yet, and that no end of the program leaves behind.
//!
//! * An error drops the [`Temporary`], which removes its file.
//! * SIGINT, SIGTERM and SIGHUP remove all such files, then end the program as if
//!   nobody had caught them.
//! * SIGKILL and a power failure leave them. Each is locked while its writer lives, so
//!   the next program that writes into the directory removes those that are not locked
//!   and were not written to for an hour. The hour is for file systems whose locks other
//!   machines do not see.

use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use tempfile::NamedTempFile;

/// How the names begin.
const PREFIX: &str = ".nydus-image-";

/// How long a file without a lock must have been left alone to be taken for dead.
const STALE: Duration = Duration::from_secs(60 * 60);

/// What a signal has to remove. Files get and lose their temporary name under its lock,
/// so that none is missed and none is removed under its final name.
static PENDING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A file in a directory, until it gets its name or is dropped.
#[derive(Debug)]
pub(super) struct Temporary {
    file: NamedTempFile,
    /// Dropped after the file is gone.
    _pending: Pending,
}

/// An entry of [`PENDING`].
#[derive(Debug)]
struct Pending(PathBuf);

impl Temporary {
    /// A new file in `dir`, with the permissions of one that is created the ordinary way.
    pub(super) fn new_in(dir: &Path) -> io::Result<Self> {
        static FIRST: Once = Once::new();
        FIRST.call_once(remove_on_signals);
        remove_stale(dir);
        let mut pending = pending();
        let file = tempfile::Builder::new()
            .prefix(PREFIX)
            // The umask applies.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(dir)?;
        let path = file.path().to_owned();
        pending.insert(path.clone());
        drop(pending);
        // Where the file system has no locks, nobody can remove it by one.
        let _ = file.as_file().try_lock();
        Ok(Self {
            file,
            _pending: Pending(path),
        })
    }

    pub(super) fn file(&self) -> &File {
        self.file.as_file()
    }

    pub(super) fn file_mut(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Gives the file its name, in place of what had it before.
    pub(super) fn persist(self, path: &Path) -> io::Result<()> {
        let guard = pending();
        let result = self.file.persist(path);
        drop(guard);
        result.map(drop).map_err(|error| error.error)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        pending().remove(&self.0);
    }
}

fn pending() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a thread that waits for a signal to end the program.
fn remove_on_signals() {
    let started = Signals::new([SIGHUP, SIGINT, SIGTERM]).and_then(|mut signals| {
        let wait = move || {
            for signal in signals.forever() {
                // Held to the end: no file appears and none gets its name any more.
                let pending = pending();
                for path in pending.iter() {
                    let _ = std::fs::remove_file(path);
                }
                let _ = emulate_default_handler(signal);
            }
        };
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(wait)
    });
    if let Err(error) = started {
        tracing::warn!("a signal will leave temporary files behind: {error}");
    }
}

/// Removes the files of programs that did not end in an orderly way.
fn remove_stale(dir: &Path) {
    // Who cannot list the directory finds out soon enough whether it can be written.
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| {
        entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PREFIX.as_bytes())
    });
    for path in ours.map(|entry| entry.path()) {
        if is_stale(&path).unwrap_or(false) && std::fs::remove_file(&path).is_ok() {
            tracing::info!("removed {}, which a killed program left", path.display());
        }
    }
}

fn is_stale(path: &Path) -> io::Result<bool> {
    let metadata = path.symlink_metadata()?;
    let age = metadata.modified()?.elapsed().unwrap_or_default();
    Ok(metadata.is_file() && age > STALE && File::open(path)?.try_lock().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn names(dir: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn only_dead_files_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - 2 * STALE;
        let alive = Temporary::new_in(dir.path()).unwrap();
        alive.file.as_file().set_modified(old).unwrap();
        let dead = dir.path().join(".nydus-image-dead");
        let young = dir.path().join(".nydus-image-young");
        let other = dir.path().join("other");
        for (path, time) in [(&dead, old), (&young, SystemTime::now()), (&other, old)] {
            File::create(path).unwrap().set_modified(time).unwrap();
        }
        let new = Temporary::new_in(dir.path()).unwrap();
        assert!(alive.file.path().exists() && young.exists() && other.exists());
        assert!(!dead.exists());
        drop((alive, new));
        assert_eq!(names(dir.path()).len(), 2);
    }

    #[test]
    fn only_files_without_a_name_are_pending() {
        let dir = tempfile::tempdir().unwrap();
        let is_pending = || pending().iter().any(|path| path.starts_with(dir.path()));
        let named = Temporary::new_in(dir.path()).unwrap();
        assert!(is_pending());
        named.persist(&dir.path().join("name")).unwrap();
        assert!(!is_pending());
        drop(Temporary::new_in(dir.path()).unwrap());
        assert!(!is_pending());
        assert_eq!(names(dir.path()), [dir.path().join("name")]);
    }
}
