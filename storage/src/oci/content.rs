//! Digests of whole objects (`sha256:…`), and checking content against them.
//!
//! Everything that comes from a registry or a layout passes a [`Verifier`]
//! before its end is believed: the length and the digest must both be the ones
//! that the parent object promised.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

use super::error::OciError;

/// Hash of a manifest, config or blob: `sha256:` or `sha512:` and lower-case hexadecimal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContentDigest(Arc<str>);

/// Why a string is no digest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is no digest: sha256: and 64, or sha512: and 128, lower-case hexadecimal digits are expected"
)]
pub struct InvalidDigest(String);

impl ContentDigest {
    /// SHA-256 of `data`.
    #[must_use]
    pub fn of(data: &[u8]) -> Self {
        Self::from_sha256(&crate::Digest::of(crate::Digester::Sha256, data))
    }

    /// Names a SHA-256 computed elsewhere.
    #[must_use]
    pub fn from_sha256(digest: &crate::Digest) -> Self {
        Self(format!("sha256:{digest}").into())
    }

    /// `sha256:…` as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the algorithm.
    #[must_use]
    pub fn algorithm(&self) -> &str {
        self.0
            .split_once(':')
            .map_or("", |(algorithm, _)| algorithm)
    }

    /// The hexadecimal part.
    #[must_use]
    pub fn hex(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, hex)| hex)
    }
}

impl FromStr for ContentDigest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let length = match text.split_once(':') {
            Some(("sha256", _)) => 64,
            Some(("sha512", _)) => 128,
            _ => return Err(InvalidDigest(text.to_owned())),
        };
        let hex = &text["sha256:".len()..];
        let lower_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if hex.len() != length || !hex.bytes().all(lower_hex) {
            return Err(InvalidDigest(text.to_owned()));
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for ContentDigest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<ContentDigest> for String {
    fn from(digest: ContentDigest) -> Self {
        digest.0.as_ref().to_owned()
    }
}

impl fmt::Display for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A hash in progress.
#[derive(Debug, Clone)]
enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

/// Checks a stream of bytes against the digest and length it should have.
#[derive(Debug, Clone)]
pub struct Verifier {
    at: String,
    expected: ContentDigest,
    /// `None` if only the digest is known.
    size: Option<u64>,
    seen: u64,
    hasher: Hasher,
}

impl Verifier {
    /// Expects `size` bytes with the digest `expected`; `at` names the source in errors.
    #[must_use]
    pub fn new(at: impl Into<String>, expected: &ContentDigest, size: u64) -> Self {
        Self {
            size: Some(size),
            ..Self::of_any_size(at, expected)
        }
    }

    /// Expects bytes with the digest `expected`, however many.
    #[must_use]
    pub fn of_any_size(at: impl Into<String>, expected: &ContentDigest) -> Self {
        let hasher = match expected.algorithm() {
            "sha512" => Hasher::Sha512(Sha512::new()),
            // `ContentDigest` admits no third algorithm.
            _ => Hasher::Sha256(Sha256::new()),
        };
        Self {
            at: at.into(),
            expected: expected.clone(),
            size: None,
            seen: 0,
            hasher,
        }
    }

    /// Bytes seen so far.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Whether as many bytes have arrived as were announced.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.size.is_none_or(|size| self.seen == size)
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`OciError::Size`] as soon as there are more than expected.
    pub fn update(&mut self, data: &[u8]) -> Result<(), OciError> {
        let seen = self.seen.saturating_add(byte_len(data));
        if let Some(expected) = self.size.filter(|size| seen > *size) {
            return Err(OciError::Size {
                at: self.at.clone(),
                expected,
                actual: seen,
            });
        }
        self.seen = seen;
        match &mut self.hasher {
            Hasher::Sha256(hasher) => hasher.update(data),
            Hasher::Sha512(hasher) => hasher.update(data),
        }
        Ok(())
    }

    /// Judges the whole content.
    ///
    /// # Errors
    /// [`OciError::Size`] if it is short, [`OciError::Digest`] if it is other content.
    pub fn finish(self) -> Result<(), OciError> {
        if let Some(expected) = self.size.filter(|size| self.seen != *size) {
            return Err(OciError::Size {
                at: self.at,
                expected,
                actual: self.seen,
            });
        }
        let hex = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        let actual = match self.hasher {
            Hasher::Sha256(hasher) => format!("sha256:{}", hex(&hasher.finalize())),
            Hasher::Sha512(hasher) => format!("sha512:{}", hex(&hasher.finalize())),
        };
        if actual == self.expected.as_str() {
            return Ok(());
        }
        let actual = ContentDigest(actual.into());
        Err(OciError::Digest {
            at: self.at,
            expected: self.expected,
            actual,
        })
    }
}

/// Length of `data` as the 64-bit number that formats and protocols use.
#[must_use]
pub(crate) fn byte_len(data: &[u8]) -> u64 {
    // Never saturates: usize has at most 64 bits.
    u64::try_from(data.len()).unwrap_or(u64::MAX)
}

/// Checks `data` in one go.
///
/// # Errors
/// As [`Verifier::finish`].
pub fn verify(at: &str, data: &[u8], digest: &ContentDigest, size: u64) -> Result<(), OciError> {
    let mut verifier = Verifier::new(at, digest, size);
    verifier.update(data)?;
    verifier.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_digests_parse() {
        let good = format!("sha256:{}", "0a".repeat(32));
        let digest: ContentDigest = good.parse().unwrap();
        assert_eq!((digest.algorithm(), digest.hex().len()), ("sha256", 64));
        assert!(
            format!("sha512:{}", "0".repeat(128))
                .parse::<ContentDigest>()
                .is_ok()
        );
        for bad in [
            "",
            "sha256:",
            "sha256",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            &format!("sha256:{}", "0A".repeat(32)),
            &format!("sha256:{}", "0".repeat(63)),
            &format!("sha512:{}", "0".repeat(64)),
            &format!("sha256:../{}", "0".repeat(61)),
        ] {
            assert!(bad.parse::<ContentDigest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_verifier_wants_the_length_and_the_digest() {
        let digest = ContentDigest::of(b"hello");
        assert!(verify("x", b"hello", &digest, 5).is_ok());
        assert!(matches!(
            verify("x", b"hell", &digest, 5),
            Err(OciError::Size { actual: 4, .. })
        ));
        assert!(matches!(
            verify("x", b"hello!", &digest, 5),
            Err(OciError::Size { .. })
        ));
        assert!(matches!(
            verify("x", b"hallo", &digest, 5),
            Err(OciError::Digest { .. })
        ));

        let sha512 = format!(
            "sha512:{}",
            Sha512::digest(b"hello")
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect::<String>()
        );
        assert!(verify("x", b"hello", &sha512.parse().unwrap(), 5).is_ok());
    }
}
