//! What can go wrong, by what the caller can do about it, and the gRPC code that
//! tells containerd.

use std::io;
use std::path::{Path, PathBuf};

use tonic::{Code, Status};

/// A request that was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No snapshot has this name.
    #[error("snapshot {0:?} does not exist")]
    NotFound(String),
    /// The name is taken; also the answer for layers that need no unpacking.
    #[error("snapshot {0:?} already exists")]
    AlreadyExists(String),
    /// The snapshot is not in the state that the request needs.
    #[error("snapshot {key:?} {reason}")]
    Precondition {
        /// Its name.
        key: String,
        /// What is in the way.
        reason: String,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// An image cannot be mounted now; trying again may help.
    #[error("image {image:?} cannot be mounted: {reason}")]
    Mount {
        /// The reference it was pulled by.
        image: String,
        /// What failed, the whole chain.
        reason: String,
    },
    /// A daemon goes on with the program that it had.
    #[error("the daemon of image {image:?} was not replaced: {reason}")]
    Upgrade {
        /// The reference it was pulled by.
        image: String,
        /// What failed, the whole chain.
        reason: String,
    },
    /// The records cannot be read or written.
    #[error("records of snapshots: {0}")]
    Records(String),
    /// A file or directory failed.
    #[error("{path}: {action}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: a file or directory that failed.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }

    /// For snapshots in the wrong state.
    pub(crate) fn precondition(key: &str, reason: impl Into<String>) -> Self {
        Self::Precondition {
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::Precondition { .. } => Code::FailedPrecondition,
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Mount { .. } | Self::Upgrade { .. } => Code::Unavailable,
            Self::Records(_) | Self::Io { .. } => Code::Internal,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::new(error.code(), chain(&error))
    }
}

/// An error with all its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

macro_rules! from_redb {
    ($($kind:ident)*) => {
        $(impl From<redb::$kind> for Error {
            fn from(error: redb::$kind) -> Self {
                Self::Records(error.to_string())
            }
        })*
    };
}

from_redb!(DatabaseError TransactionError TableError StorageError CommitError);

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::Records(error.to_string())
    }
}
