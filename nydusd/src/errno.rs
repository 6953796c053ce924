//! The one place where an error becomes a number.
//!
//! Whatever goes wrong while a request is answered is a [`FsError`]; [`errno`]
//! translates it, and [`Failures`] also writes it to the log, once, at a rate
//! that a broken registry under a hundred readers cannot turn into a second problem.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use storage::BlobIndex;
use storage::error::ReadError;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FsError {
    /// The kernel asked about a node that belongs to no mount.
    #[error("no node {0:#x}")]
    UnknownNode(u64),
    /// The image breaks a rule of its format, or the request does not fit the inode.
    #[error(transparent)]
    Image(#[from] rafs::error::Error),
    /// An extent names a blob that the image does not have.
    #[error("the image has no blob {0}")]
    UnknownBlob(BlobIndex),
    /// Bytes of a blob could not be had.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The bytes could not be put into the reply.
    #[error("copying data into the reply")]
    Reply(#[source] io::Error),
    /// The inode has no such extended attribute.
    #[error("no such attribute")]
    NoSuchAttribute,
    /// An attribute or list of attributes does not fit the caller's buffer.
    #[error("attribute is larger than the buffer")]
    AttributeTooLarge,
    /// Somebody tried to change the image.
    #[error("the file system is read-only")]
    ReadOnly,
    /// A cache file that is mounted was deleted or shortened.
    #[error("the mounted cache file was replaced or shortened; unmount, and mount again")]
    CacheFileLost,
    /// A cache file cannot be inspected.
    #[error("inspecting a cache file")]
    Inspect(#[source] io::Error),
    /// The kernel need not ask this, now or later.
    #[error("not needed")]
    NotNeeded,
}

/// The number for an error. No catch-all: a new error has to be thought about.
pub(crate) fn errno(err: &FsError) -> i32 {
    use rafs::error::Error as Image;
    match err {
        FsError::UnknownNode(_) => libc::ESTALE,
        FsError::Image(Image::Corrupt(_)) => libc::EUCLEAN,
        FsError::Image(Image::Unsupported { .. }) => libc::EOPNOTSUPP,
        FsError::Image(Image::Io { .. }) => libc::EIO,
        FsError::Image(Image::WrongKind { expected, .. }) => match *expected {
            "directory" => libc::ENOTDIR,
            _ => libc::EINVAL,
        },
        FsError::UnknownBlob(_) => libc::EUCLEAN,
        FsError::Read(_) | FsError::Reply(_) | FsError::CacheFileLost | FsError::Inspect(_) => {
            libc::EIO
        }
        FsError::NoSuchAttribute => libc::ENODATA,
        FsError::AttributeTooLarge => libc::ERANGE,
        FsError::ReadOnly => libc::EROFS,
        FsError::NotNeeded => libc::ENOSYS,
    }
}

/// Whether the operator should hear of it: data or metadata could not be served.
fn is_failure(err: &FsError) -> bool {
    match err {
        FsError::UnknownNode(_)
        | FsError::Image(_)
        | FsError::UnknownBlob(_)
        | FsError::Read(_)
        | FsError::Reply(_)
        | FsError::CacheFileLost
        | FsError::Inspect(_) => true,
        FsError::NoSuchAttribute
        | FsError::AttributeTooLarge
        | FsError::ReadOnly
        | FsError::NotNeeded => false,
    }
}

/// Failed requests that are logged in one [`LOG_WINDOW`].
const LOG_BURST: u32 = 10;
const LOG_WINDOW: Duration = Duration::from_secs(1);

/// Turns the failures of one mount into answers, and logs them.
#[derive(Debug, Default)]
pub(crate) struct Failures(Mutex<Option<Window>>);

/// What was logged since `start`, and what was not.
#[derive(Debug)]
struct Window {
    start: Instant,
    logged: u32,
    left_out: u64,
}

impl Failures {
    /// The answer to a request `op` about `node` that failed, after logging why.
    pub(crate) fn answer(&self, op: &'static str, node: u64, err: FsError) -> io::Error {
        let number = errno(&err);
        if is_failure(&err)
            && let Some(left_out) = self.may_log()
        {
            let more = match left_out {
                0 => String::new(),
                count => format!(" ({count} messages like this were left out)"),
            };
            tracing::warn!(
                "{op} of inode {node:#x}: {:#}{more}",
                anyhow::Error::new(err)
            );
        }
        io::Error::from_raw_os_error(number)
    }

    /// Whether a message may pass, and how many did not in the last window.
    fn may_log(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match state.as_mut() {
            Some(window) if now.duration_since(window.start) < LOG_WINDOW => {
                window.logged = window.logged.saturating_add(1);
                if window.logged > LOG_BURST {
                    window.left_out = window.left_out.saturating_add(1);
                    return None;
                }
                Some(0)
            }
            old => {
                let left_out = old.map_or(0, |window| window.left_out);
                *state = Some(Window {
                    start: now,
                    logged: 1,
                    left_out: 0,
                });
                Some(left_out)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (err, number) in [
            (FsError::UnknownNode(5), libc::ESTALE),
            (FsError::UnknownBlob(BlobIndex::new(3)), libc::EUCLEAN),
            (
                FsError::Reply(io::ErrorKind::UnexpectedEof.into()),
                libc::EIO,
            ),
            (FsError::NoSuchAttribute, libc::ENODATA),
            (FsError::AttributeTooLarge, libc::ERANGE),
            (FsError::ReadOnly, libc::EROFS),
            (FsError::NotNeeded, libc::ENOSYS),
            (
                FsError::Image(rafs::error::Error::WrongKind {
                    nid: rafs::units::Nid::new(1),
                    expected: "directory",
                }),
                libc::ENOTDIR,
            ),
        ] {
            assert_eq!(
                Failures::default().answer("test", 1, err).raw_os_error(),
                Some(number)
            );
        }
    }

    #[test]
    fn a_storm_of_messages_is_cut() {
        let failures = Failures::default();
        let passed = (0..1000).filter(|_| failures.may_log().is_some()).count();
        assert!(
            passed <= 2 * usize::try_from(LOG_BURST).unwrap(),
            "{passed}"
        );
        failures.0.lock().unwrap().as_mut().unwrap().start -= LOG_WINDOW;
        assert!(failures.may_log().is_some_and(|left_out| left_out > 0));
    }
}
