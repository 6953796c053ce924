//! Why an image could not be read or written.
//!
//! Every variant says where (`at`: a URL or a path), so that one line is enough
//! to act on. Credentials never become part of an error.

use std::path::PathBuf;

use super::content::ContentDigest;

/// Whatever an HTTP client, a parser or a stream said.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why an image could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// The text names no image.
    #[error("{reference:?} is no image reference: {reason}")]
    Reference {
        /// What was given.
        reference: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The manifest, blob or layout does not exist.
    #[error("{at}: not found")]
    NotFound {
        /// URL or path.
        at: String,
    },
    /// The registry wants other credentials.
    #[error(
        "{at}: the registry refuses access (HTTP {status}){detail}; log in with `docker login`, or set DOCKER_CONFIG to the directory of a config.json that has credentials"
    )]
    Unauthorized {
        /// URL.
        at: String,
        /// 401 or 403.
        status: u16,
        /// What the server added, with a leading `: `, or nothing.
        detail: String,
    },
    /// The server answered something else than expected.
    #[error("{at}: the registry answers HTTP {status}{detail}")]
    Status {
        /// URL.
        at: String,
        /// HTTP status.
        status: u16,
        /// What the server added, with a leading `: `, or nothing.
        detail: String,
    },
    /// The request got no usable answer: no connection, a time-out, a broken stream.
    #[error("{at}: {op} failed{} after {attempts} attempts", at_byte(*offset))]
    Request {
        /// URL.
        at: String,
        /// What was being done.
        op: &'static str,
        /// Bytes that had been transferred.
        offset: u64,
        /// How often it was tried.
        attempts: u32,
        /// The last failure.
        source: Cause,
    },
    /// The bytes are not the ones that were asked for.
    #[error("{at}: the content has the digest {actual}, not {expected}")]
    Digest {
        /// URL or path.
        at: String,
        /// What the reference or manifest says.
        expected: ContentDigest,
        /// What arrived.
        actual: ContentDigest,
    },
    /// The content ends early or goes on too long.
    #[error("{at}: the content has {actual} bytes, not {expected}")]
    Size {
        /// URL or path.
        at: String,
        /// What the manifest says.
        expected: u64,
        /// What arrived (at least).
        actual: u64,
    },
    /// A document or file is larger than anything sensible.
    #[error("{at}: larger than the {limit} bytes accepted")]
    TooLarge {
        /// URL, path or archive member.
        at: String,
        /// The bound.
        limit: u64,
    },
    /// A document does not follow its specification.
    #[error("{at}: {reason}")]
    Malformed {
        /// URL or path.
        at: String,
        /// What is wrong.
        reason: String,
    },
    /// The image is none that Nydus can mount.
    #[error("{at}: no Nydus image{detail}; convert it with `nydus-image convert`")]
    NotNydus {
        /// The reference.
        at: String,
        /// Platform that was asked for, with a leading space, or nothing.
        detail: String,
    },
    /// A local file failed.
    #[error("{path}: {op}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        op: &'static str,
        /// The failure.
        source: std::io::Error,
    },
    /// The HTTP client cannot be set up, which needs the certificates of the system.
    #[error("{at}: HTTP and HTTPS need CA certificates; install the package ca-certificates")]
    Setup {
        /// The registry.
        at: String,
        /// The failure.
        source: Cause,
    },
    /// The docker configuration cannot be used.
    #[error("credentials for {host}: {reason}")]
    Credentials {
        /// The registry.
        host: String,
        /// What is wrong, without any secret.
        reason: String,
    },
}

/// Where a transfer stopped, if it had begun.
fn at_byte(offset: u64) -> String {
    match offset {
        0 => String::new(),
        offset => format!(" at byte {offset}"),
    }
}

impl OciError {
    /// A closure for `map_err` on file operations.
    pub(crate) fn io(
        path: impl Into<PathBuf>,
        op: &'static str,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, op, source }
    }

    /// A document at `at` that breaks its specification.
    pub(crate) fn malformed(at: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Malformed {
            at: at.into(),
            reason: reason.to_string(),
        }
    }
}
