//! Where the compressed bytes of blobs come from: the one dynamic seam of the data path.
//!
//! An implementation hides everything about its source: credentials, redirects,
//! retries, timeouts. It promises complete answers: [`Backend::fetch`] either
//! delivers every byte of the range in order, or fails.

mod bridge;
pub mod file;
pub mod http_proxy;
pub mod local;
pub mod localdisk;
pub mod object;
pub mod registry;
mod remote;

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::blob_id::BlobId;
use crate::sync::{Mutex, lock};

/// Why bytes are wanted; the more urgent overtakes the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody asked for them in advance: a list, or everything.
    Prefetch,
    /// A guess what a reader will want next.
    Speculation,
    /// A reader waits.
    OnDemand,
}

/// One ranged request for the compressed bytes of a blob.
#[derive(Clone, Debug)]
pub struct Fetch<'a> {
    /// The blob, named as the backend stores it.
    pub blob: &'a BlobId,
    /// Bytes of the stored (compressed) blob; never empty.
    pub range: Range<u64>,
    /// Why they are wanted.
    pub priority: Priority,
    /// Is told which server delivered, if somebody wants to know.
    pub served_by: Option<&'a ServedBy>,
    /// Ask the source itself, by way of nobody else: what others delivered was wrong.
    pub direct: bool,
    /// Length of the stored blob, as the image has it; it is the same for all who read
    /// this image.
    pub blob_len: Option<u64>,
}

/// The servers that delivered a fetch.
#[derive(Debug, Default)]
pub struct ServedBy(Mutex<Servers>);

#[derive(Clone, Debug, Default)]
struct Servers {
    last: String,
    /// A bit for each mirror; the last one stands for all that there are beyond it.
    mirrors: u64,
}

impl ServedBy {
    /// The host that delivered the last bytes; empty if there is none, or nothing has come.
    #[must_use]
    pub fn host(&self) -> String {
        lock(&self.0).last.clone()
    }

    /// Whether bytes came from somebody else than the source itself.
    #[must_use]
    pub fn is_second_hand(&self) -> bool {
        lock(&self.0).mirrors != 0
    }

    pub(crate) fn has_mirror(&self, number: usize) -> bool {
        lock(&self.0).mirrors & Self::bit(number) != 0
    }

    pub(crate) fn set(&self, host: &str) {
        host.clone_into(&mut lock(&self.0).last);
    }

    /// Bytes come from the mirror with this number.
    pub(crate) fn set_mirror(&self, number: usize) {
        lock(&self.0).mirrors |= Self::bit(number);
    }

    /// All that delivered to `other`, too.
    pub(crate) fn add(&self, other: &Self) {
        let other = lock(&other.0).clone();
        let mut servers = lock(&self.0);
        servers.last = other.last;
        servers.mirrors |= other.mirrors;
    }

    fn bit(number: usize) -> u64 {
        1 << number.min(63)
    }
}

/// Receives the bytes of a fetch in order; an error ends the fetch early with
/// [`BackendError::Stopped`]. Empty pieces mean nothing: a backend sends them while
/// it waits, several times a second, so that a receiver can end that as well.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<(), Stop> + 'a;

/// The receiver wants no more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop;

/// A source of blobs. Methods block and may be called from many threads.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Delivers exactly the bytes of `request.range`, in order, in pieces of any size.
    ///
    /// Retries what may pass; resumes a broken transfer where it broke, so that
    /// `sink` never sees a byte twice.
    ///
    /// # Errors
    /// See [`BackendError`]; bytes delivered before an error are valid but incomplete.
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError>;

    /// The server that requests go to, by a name that all backends for it have in
    /// common; `None` if there is none to be spared, as for local files.
    fn place(&self) -> Option<String> {
        None
    }

    /// Gets ready for the first requests in the background: opens connections, logs in;
    /// once, however often it is called.
    /// What goes wrong is left to the first request.
    fn warm(&self) {}

    /// Length of the stored blob, in bytes.
    ///
    /// # Errors
    /// As for [`Backend::fetch`].
    fn size(&self, blob: &BlobId) -> Result<u64, BackendError>;

    /// Bytes that came through others were not what the image was made of: they are not
    /// asked for these again for a while.
    fn distrust(&self, blob: &BlobId, range: &Range<u64>, served_by: &ServedBy) {
        let _ = (blob, range, served_by);
    }

    /// Most of this blob will be asked for soon.
    fn want_whole(&self, blob: &BlobId) {
        let _ = blob;
    }

    /// Requests that nobody waits for should not cross multiples of this many bytes;
    /// `None` if it makes no difference.
    fn grain(&self) -> Option<u64> {
        None
    }

    /// Uses this user name and password from the next request on.
    ///
    /// # Errors
    /// [`BackendError::Config`] from a backend that has no such thing, or cannot use them.
    fn renew_login(&self, user: &str, password: &str) -> Result<(), BackendError> {
        let _ = (user, password);
        Err(BackendError::Config(
            "this kind of backend has no credentials to replace".to_owned(),
        ))
    }
}

/// Collects a whole range into memory.
///
/// # Errors
/// As for [`Backend::fetch`]. A range longer than `limit` bytes is refused
/// before anything is allocated.
pub fn fetch_to_vec(
    backend: &dyn Backend,
    request: &Fetch<'_>,
    limit: u64,
) -> Result<Vec<u8>, BackendError> {
    let len = request.range.end.saturating_sub(request.range.start);
    let capacity = usize::try_from(len)
        .ok()
        .filter(|_| len <= limit)
        .ok_or_else(|| BackendError::TooLarge {
            blob: request.blob.clone(),
            len,
            limit,
        })?;
    let mut bytes = Vec::with_capacity(capacity);
    backend.fetch(request, &mut |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(bytes)
}

/// Why a backend could not deliver. The text names the file or URL, the range and the cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A file of a local backend could not be read.
    #[error("{path}: reading {len} bytes at {offset}")]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// Position of the read.
        offset: u64,
        /// Length of the read.
        len: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// The blob ends before the range does.
    #[error("{name}: wanted {len} bytes at {offset}, got only {got}")]
    Short {
        /// File or URL, without credentials.
        name: String,
        /// Position of the read.
        offset: u64,
        /// Length of the read.
        len: u64,
        /// Bytes delivered.
        got: u64,
    },
    /// The server answered with a status that is no answer to the request.
    #[error("{url}: server answered {status}{detail}")]
    Status {
        /// URL without credentials or query.
        url: String,
        /// HTTP status code.
        status: u16,
        /// A short excerpt of the answer, starting with ": ", or empty.
        detail: String,
    },
    /// The server answered 206 with a range that was not asked for.
    #[error("{url}: asked for bytes {asked:?}, server sent {sent}")]
    WrongRange {
        /// URL without credentials or query.
        url: String,
        /// The range of the request.
        asked: Range<u64>,
        /// What the answer's headers say.
        sent: String,
    },
    /// A Dragonfly agent could not deliver, whatever its status says.
    #[error("{url}: {fault} (status {status})")]
    Agent {
        /// URL without credentials or query.
        url: String,
        /// HTTP status code.
        status: u16,
        /// Whose fault it is.
        fault: registry::AgentFault,
    },
    /// No mirror delivered, and the registry itself must not be asked.
    #[error("{url}: no mirror delivers, and the configuration forbids to ask the registry itself")]
    NoDetour {
        /// URL without credentials or query.
        url: String,
        /// What the last mirror that was asked said, if one was.
        source: Option<Box<BackendError>>,
    },
    /// Credentials were refused, or a token could not be had.
    #[error("{url}: not authorised: {reason}")]
    Auth {
        /// URL without credentials or query.
        url: String,
        /// What is wrong and what to try.
        reason: String,
    },
    /// The connection failed, broke or timed out.
    #[error("{url}: {action}")]
    Transport {
        /// URL without credentials or query.
        url: String,
        /// What was being done.
        action: &'static str,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// All attempts failed; the last error is the source.
    #[error("gave up after {attempts} attempts in {elapsed:?}")]
    GaveUp {
        /// Requests made.
        attempts: u32,
        /// Time spent.
        elapsed: Duration,
        /// The last failure.
        source: Box<BackendError>,
    },
    /// More bytes were asked for than the caller allows in memory.
    #[error("blob {blob}: {len} bytes wanted at once, limit is {limit}")]
    TooLarge {
        /// The blob.
        blob: BlobId,
        /// Length of the range.
        len: u64,
        /// The caller's limit.
        limit: u64,
    },
    /// The sink asked to stop.
    #[error("stopped by the receiver")]
    Stopped,
    /// The backend's own set-up is wrong.
    #[error("backend configuration: {0}")]
    Config(String),
}
