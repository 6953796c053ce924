//! The name of a blob: opaque, but safe to use as a file name.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use crate::digest::Digest;

/// Name of a blob, 1 to 64 bytes; usually the SHA-256 of its file in hexadecimal.
///
/// It becomes a file name in the cache directory and a path segment of a URL,
/// so nothing that could leave the directory is accepted.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(Arc<str>);

/// Why a string is no blob id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is no blob id: 1 to 64 of the characters A-Z a-z 0-9 . _ - are allowed, not starting with a dot"
)]
pub struct InvalidBlobId(String);

impl BlobId {
    /// Longest id that fits the blob table, in bytes.
    pub const MAX_LEN: usize = 64;

    /// Checks and wraps an id.
    ///
    /// # Errors
    /// [`InvalidBlobId`] for an empty or too long id, and for any character
    /// that could be special in a path or a URL.
    pub fn new(id: &str) -> Result<Self, InvalidBlobId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if id.is_empty()
            || id.len() > Self::MAX_LEN
            || id.starts_with('.')
            || !id.bytes().all(allowed)
        {
            return Err(InvalidBlobId(id.to_owned()));
        }
        Ok(Self(id.into()))
    }

    /// The usual name of a blob: a SHA-256 in hexadecimal.
    #[must_use]
    pub fn from_digest(digest: &Digest) -> Self {
        // 64 hexadecimal digits are always allowed.
        Self(digest.to_string().into())
    }

    /// What the blob table of a bootstrap that is embedded in its own blob holds,
    /// because the real id is not known while it is written.
    #[must_use]
    pub fn placeholder() -> Self {
        Self("x".repeat(Self::MAX_LEN).into())
    }

    /// Whether this is [`BlobId::placeholder`].
    #[must_use]
    pub fn is_placeholder(&self) -> bool {
        self.0.len() == Self::MAX_LEN && self.0.bytes().all(|b| b == b'x')
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_never_leaves_its_directory() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\0",
            ".hidden",
            &"a".repeat(65),
            "é",
            "a b",
        ] {
            assert!(BlobId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", &"f".repeat(64), "layer-1.tar_gz"] {
            assert_eq!(BlobId::new(good).unwrap().as_str(), good);
        }
        assert!(BlobId::placeholder().is_placeholder());
        let id = BlobId::from_digest(&Digest::from_bytes([0xab; 32]));
        assert_eq!(BlobId::new(&"ab".repeat(32)), Ok(id));
    }
}
