//! Why a bootstrap could not be read or written.
//!
//! [`Error`] is about bytes from outside: damaged, of a kind not handled here,
//! or not readable at all. [`WriteError`] is about a tree that the format
//! cannot hold. Neither picks an errno; that is the front end's business.

use std::fmt;
use std::path::PathBuf;

use crate::units::Nid;

/// Why a bootstrap could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes break a rule of the format.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The image is (or may be) well-formed, but uses something that is not handled here.
    #[error("the image needs {feature}, which is not supported")]
    Unsupported {
        /// What the image needs.
        feature: &'static str,
    },
    /// The file could not be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The caller asked something of an inode that its type does not have.
    #[error("inode {nid} is not a {expected}")]
    WrongKind {
        /// The inode.
        nid: Nid,
        /// The type that the operation needs.
        expected: &'static str,
    },
}

/// A field of a bootstrap that breaks a rule of the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("corrupt bootstrap: {field} at byte {offset} is {found}, expected {expected}")]
pub struct Corrupt {
    /// Name of the field or structure.
    pub field: &'static str,
    /// Where it is: a byte offset in the bootstrap.
    pub offset: u64,
    /// Its value.
    pub found: Found,
    /// The rule, in words.
    pub expected: &'static str,
}

/// The value of a field that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A number.
    Number(u64),
    /// A run of bytes.
    Bytes(Box<[u8]>),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(n) => write!(f, "{n} ({n:#x})"),
            Self::Bytes(b) => write!(f, "\"{}\"", b.escape_ascii()),
        }
    }
}

impl<N: Into<u64>> From<N> for Found {
    fn from(number: N) -> Self {
        Self::Number(number.into())
    }
}

impl Found {
    /// A value that is text, at most the first 255 bytes of it.
    #[must_use]
    pub fn bytes(bytes: &[u8]) -> Self {
        Self::Bytes(bytes.get(..255).unwrap_or(bytes).into())
    }
}

/// The error for a field that breaks a rule.
pub(crate) fn corrupt(
    field: &'static str,
    offset: u64,
    found: impl Into<Found>,
    expected: &'static str,
) -> Error {
    Error::Corrupt(Corrupt {
        field,
        offset,
        found: found.into(),
        expected,
    })
}

/// Why a tree could not be changed, merged or written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A name that no directory entry can have.
    #[error("\"{}\" is no file name: 1 to 255 bytes without `/` and NUL, not `.` or `..`", name.escape_ascii())]
    BadName {
        /// The name.
        name: Vec<u8>,
    },
    /// Something other than a directory where a directory is needed.
    #[error("\"{}\" is not a directory", path.escape_ascii())]
    NotADirectory {
        /// The name or path.
        path: Vec<u8>,
    },
    /// A directory that has two names, or contains itself.
    #[error("directory \"{}\" has more than one name", name.escape_ascii())]
    DirectoryLinkedTwice {
        /// The second name.
        name: Vec<u8>,
    },
    /// An inode that the format cannot hold.
    #[error("\"{}\": {reason}", name.escape_ascii())]
    BadInode {
        /// The last component of its path; empty for the root.
        name: Vec<u8>,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// An extended attribute that the format cannot hold.
    #[error("\"{}\": extended attribute \"{}\" {reason}", name.escape_ascii(), key.escape_ascii())]
    BadXattr {
        /// The last component of the inode's path; empty for the root.
        name: Vec<u8>,
        /// The full key.
        key: Vec<u8>,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// A chunk record that the format cannot hold, or that contradicts its blob.
    #[error("chunk {index} of blob {blob}: {reason}")]
    BadChunk {
        /// The blob's index in the tree.
        blob: u32,
        /// The chunk's index in the blob.
        index: u32,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// A blob that the format cannot hold.
    #[error("blob {id}: {reason}")]
    BadBlob {
        /// The blob's id.
        id: storage::BlobId,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// More of something than the format can count.
    #[error("the image has more than {limit} {what}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many there may be.
        limit: u64,
    },
    /// Options that contradict each other or the format.
    #[error("{option}: {reason}")]
    BadOption {
        /// The option.
        option: &'static str,
        /// The rule that it breaks.
        reason: &'static str,
    },
}
