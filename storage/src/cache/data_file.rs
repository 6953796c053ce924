//! Opens data file and ready map of a blob so that the map never says more than
//! the data file holds.
//!
//! Both are opened under an advisory lock on the data file, which the kernel
//! releases when its owner dies. It is held for a few system calls and never
//! during a fetch.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{CacheDir, CacheError, OpenFiles};
use crate::blob_id::BlobId;
use crate::ready_map::{BootId, DataFile, ReadyMap};

/// Longest wait for another process that is opening the same files.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Attempts to open a file that others keep deleting.
const ATTEMPTS: u32 = 5;

pub(super) fn open(
    dir: &CacheDir,
    blob: &BlobId,
    size: u64,
    chunks: u32,
    boot: &BootId,
) -> Result<OpenFiles, CacheError> {
    let (data_path, map_path) = (dir.data_path(blob), dir.map_path(blob));
    let failed = |action| {
        let path = &data_path;
        move |source| CacheError::new(path, action, source)
    };
    for _ in 0..ATTEMPTS {
        let data = open_data(&data_path).map_err(failed("opening"))?;
        let guard = take_lock(&data).map_err(failed("locking"))?;
        let meta = data.metadata().map_err(failed("reading the length"))?;
        if meta.nlink() == 0 {
            continue; // Deleted between opening and locking.
        }
        if meta.len() > size {
            // Another blob of the same name. Whoever uses the file keeps it.
            tracing::warn!(
                path = %data_path.display(),
                found = meta.len(),
                expected = size,
                "cache file is too long; starting from empty"
            );
            discard(&map_path, &data_path)?;
            continue;
        }
        let state =
            prepare(&data, meta.len(), size, &map_path).map_err(failed("setting the length"))?;
        let map = ReadyMap::open(&map_path, chunks, state, boot)
            .map_err(|source| CacheError::new(&map_path, "opening", source))?;
        drop(guard);
        return Ok(OpenFiles { data, map });
    }
    Err(failed("opening")(io::Error::other(
        "the file keeps vanishing",
    )))
}

fn open_data(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        // A pipe in this place must not block the open.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(super::unwatched::reopen(file))
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

/// Gives the data file its length. The map of a file that is too short goes first:
/// after a crash in between there is no map, rather than one that is believed.
fn prepare(data: &File, len: u64, size: u64, map_path: &Path) -> io::Result<DataFile> {
    if len == size && size > 0 {
        return Ok(DataFile::Kept);
    }
    remove(map_path)?;
    data.set_len(size)?;
    Ok(DataFile::Fresh)
}

fn discard(map_path: &Path, data_path: &Path) -> Result<(), CacheError> {
    for path in [map_path, data_path] {
        remove(path).map_err(|source| CacheError::new(path, "removing", source))?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes an advisory lock that ends when the returned value is dropped, or with
/// this process.
fn take_lock(file: &File) -> io::Result<Flock<File>> {
    let start = Instant::now();
    let mut file = file.try_clone()?;
    loop {
        let (unlocked, errno) = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err(failed) => failed,
        };
        match errno {
            Errno::EINTR => {}
            Errno::EWOULDBLOCK if start.elapsed() < LOCK_TIMEOUT => {
                thread::sleep(Duration::from_millis(5));
            }
            _ => return Err(errno.into()),
        }
        file = unlocked;
    }
}
