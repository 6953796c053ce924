//! Names of the compression and digest algorithms, with their on-disk numbers
//! (`docs/format.md`, "Algorithms").
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

/// How chunk data is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Compressor {
    /// Stored raw.
    None,
    /// One raw LZ4 block: no frame, no size prefix.
    Lz4,
    /// gzip: only in blobs that refer to an original OCI layer.
    Gzip,
    /// One standard Zstandard frame.
    #[default]
    Zstd,
}

impl Compressor {
    /// The number in blob tables and chunk table headers.
    #[must_use]
    pub const fn to_disk(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Gzip => 2,
            Self::Zstd => 3,
        }
    }

    /// `None` for a number that names no algorithm.
    #[must_use]
    pub const fn from_disk(id: u32) -> Option<Self> {
        match id {
            0 => Some(Self::None),
            1 => Some(Self::Lz4),
            2 => Some(Self::Gzip),
            3 => Some(Self::Zstd),
            _ => None,
        }
    }
}

impl fmt::Display for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Lz4 => "lz4_block",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// How chunks are identified and verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Digester {
    /// BLAKE3 with 256 bits.
    #[default]
    Blake3,
    /// SHA-256.
    Sha256,
}

impl Digester {
    /// The number in blob tables.
    #[must_use]
    pub const fn to_disk(self) -> u32 {
        match self {
            Self::Blake3 => 0,
            Self::Sha256 => 1,
        }
    }

    /// `None` for a number that names no algorithm.
    #[must_use]
    pub const fn from_disk(id: u32) -> Option<Self> {
        match id {
            0 => Some(Self::Blake3),
            1 => Some(Self::Sha256),
            _ => None,
        }
    }
}

impl fmt::Display for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blake3 => "blake3",
            Self::Sha256 => "sha256",
        })
    }
}

/// A name given by the user that is no known algorithm.
#[derive(Debug, thiserror::Error)]
#[error("`{name}` is not one of {allowed}")]
pub struct UnknownAlgorithm {
    name: String,
    allowed: &'static str,
}

impl FromStr for Compressor {
    type Err = UnknownAlgorithm;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "none" => Ok(Self::None),
            "lz4" | "lz4_block" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            _ => Err(UnknownAlgorithm {
                name: name.to_owned(),
                allowed: "none, lz4_block, zstd",
            }),
        }
    }
}

impl FromStr for Digester {
    type Err = UnknownAlgorithm;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "blake3" => Ok(Self::Blake3),
            "sha256" => Ok(Self::Sha256),
            _ => Err(UnknownAlgorithm {
                name: name.to_owned(),
                allowed: "blake3, sha256",
            }),
        }
    }
}
