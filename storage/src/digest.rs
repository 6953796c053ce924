//! Digests of chunks: what every byte is verified against before it is served.
#![forbid(unsafe_code)]

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::algorithm::Digester;

/// A 256-bit digest, by the blob's [`Digester`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Length on disk, in bytes.
    pub const LEN: usize = 32;

    /// Wraps the raw bytes of a digest.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Digest of `data` by `digester`.
    #[must_use]
    pub fn of(digester: Digester, data: &[u8]) -> Self {
        match digester {
            Digester::Blake3 => Self(*blake3::hash(data).as_bytes()),
            Digester::Sha256 => Self(Sha256::digest(data).into()),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where the digest of a chunk comes from: the bootstrap that names the blob.
pub trait ChunkDigests: Send + Sync {
    /// Digest of the uncompressed bytes of chunk `index`; `None` if the
    /// bootstrap records none, in which case the chunk must not be served.
    fn chunk_digest(&self, index: crate::ChunkIndex) -> Option<Digest>;

    /// Where the bootstrap says that chunk `index` starts in the uncompressed
    /// address space, in bytes; `None` if it does not say.
    ///
    /// A digest proves what a chunk holds, not where it belongs: with this, a chunk
    /// table that puts good chunks in wrong places is noticed too.
    fn chunk_plain_offset(&self, index: crate::ChunkIndex) -> Option<u64> {
        let _ = index;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        assert_eq!(
            Digest::of(Digester::Sha256, b"").to_string(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        // The chunk `hi\n` of the golden image (docs/format.md, "Golden image").
        assert!(
            Digest::of(Digester::Blake3, b"hi\n")
                .to_string()
                .starts_with("0b8b60248fad7ac6")
        );
    }
}
