//! Locks between the processes that share a cache directory.
//!
//! They are open-file-description locks on the data file of a blob. The kernel ends
//! them when the last descriptor of the open file is closed: with their owner, however
//! it dies, or with the last process that it handed the descriptor to. So chunks, which
//! nobody fetches any more after such a death, are locked through an open file that is
//! handed to nobody. The ranges are only names and have nothing to do with the bytes of
//! the file:
//!
//! | range | shared | exclusive |
//! |---|---|---|
//! | [`OPENING`] | | somebody opens, replaces or deletes the files of the blob |
//! | [`IN_USE`] | somebody has the blob open | somebody deletes it |
//! | chunk number | | somebody fetches that chunk |
//!
//! Two opens in one process count like two processes. A file system without locks
//! costs double fetches and never correctness: nothing here is trusted for that,
//! except that a blob in use is not deleted, which then nothing is.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::units::ChunkIndex;

/// Beyond any chunk number.
pub(super) const OPENING: u64 = 1 << 40;

/// See [`OPENING`].
pub(super) const IN_USE: u64 = OPENING + 1;

/// Longest wait for another process that opens or deletes the same files.
const OPENING_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a lock is tried: the system call that waits has no deadline.
const POLL: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Shared,
    Exclusive,
    Unlocked,
}

/// Takes or gives back a lock without waiting; `false` if another one is in the way.
///
/// # Errors
/// If the file system has no locks, or the file is not open for writing.
pub(super) fn try_lock(file: &File, name: u64, mode: Mode) -> io::Result<bool> {
    let lock = range(name, mode)?;
    loop {
        return match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => Ok(true),
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(errno) => Err(errno.into()),
        };
    }
}

/// Whether another open file has the lock, in any mode.
///
/// # Errors
/// If the file system has no locks.
pub(super) fn is_locked(file: &File, name: u64) -> io::Result<bool> {
    let mut lock = range(name, Mode::Exclusive)?;
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn range(name: u64, mode: Mode) -> io::Result<libc::flock> {
    let kind = match mode {
        Mode::Shared => libc::F_RDLCK,
        Mode::Exclusive => libc::F_WRLCK,
        Mode::Unlocked => libc::F_UNLCK,
    };
    Ok(libc::flock {
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: i64::try_from(name).map_err(io::Error::other)?,
        l_len: 1,
        l_pid: 0,
    })
}

/// The right to open, replace or delete the files of a blob, until dropped.
#[derive(Debug)]
pub(super) struct Opening<'a>(&'a File);

impl<'a> Opening<'a> {
    /// Waits for it, for a few seconds at most.
    pub(super) fn take(file: &'a File) -> io::Result<Self> {
        let start = Instant::now();
        while !try_lock(file, OPENING, Mode::Exclusive)? {
            if start.elapsed() > OPENING_TIMEOUT {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(POLL);
        }
        Ok(Self(file))
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        // At the latest it goes with the file.
        let _ = try_lock(self.0, OPENING, Mode::Unlocked);
    }
}

/// The duty to fetch a chunk, for all processes of the machine; until dropped.
#[derive(Debug)]
pub(crate) struct ChunkLock<'a> {
    file: &'a File,
    index: ChunkIndex,
}

impl<'a> ChunkLock<'a> {
    /// Takes the lock if nobody else has it.
    ///
    /// # Errors
    /// If the file system has no locks.
    pub(super) fn try_take(file: &'a File, index: ChunkIndex) -> io::Result<Option<Self>> {
        let taken = try_lock(file, index.get().into(), Mode::Exclusive)?;
        Ok(taken.then_some(Self { file, index }))
    }
}

impl Drop for ChunkLock<'_> {
    fn drop(&mut self) {
        let _ = try_lock(self.file, self.index.get().into(), Mode::Unlocked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_end_with_the_last_descriptor() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).open(path.path()).unwrap()
        };
        let (mine, other) = (open(), open());
        assert!(try_lock(&mine, IN_USE, Mode::Shared).unwrap());
        assert!(try_lock(&other, IN_USE, Mode::Shared).unwrap());
        assert!(!try_lock(&other, IN_USE, Mode::Exclusive).unwrap());
        let handed_over = mine.try_clone().unwrap();
        drop(mine);
        assert!(!try_lock(&other, IN_USE, Mode::Exclusive).unwrap());
        drop(handed_over);
        assert!(try_lock(&other, IN_USE, Mode::Exclusive).unwrap());
    }

    #[test]
    fn a_chunk_is_locked_once() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).open(path.path()).unwrap()
        };
        let (mine, other) = (open(), open());
        let chunk = ChunkIndex::new(7);
        let lock = ChunkLock::try_take(&mine, chunk).unwrap().unwrap();
        assert!(ChunkLock::try_take(&other, chunk).unwrap().is_none());
        assert!(
            ChunkLock::try_take(&other, ChunkIndex::new(8))
                .unwrap()
                .is_some()
        );
        drop(lock);
        assert!(ChunkLock::try_take(&other, chunk).unwrap().is_some());
        let opening = Opening::take(&mine).unwrap();
        assert!(!try_lock(&other, OPENING, Mode::Exclusive).unwrap());
        drop(opening);
        assert!(try_lock(&other, OPENING, Mode::Exclusive).unwrap());
    }
}
