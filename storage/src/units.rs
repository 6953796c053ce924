//! Numbers that must not be mixed up: positions in the two address spaces of a
//! blob, and the indexes by which blobs and chunks are named.
#![forbid(unsafe_code)]

use std::fmt;

/// Bytes in one block of the uncompressed address space (`docs/format.md`, "Address spaces").
pub const BLOCK_SIZE: u64 = 4096;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident($inner:ty), $from:ident, $get:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($inner);

        impl $name {
            /// Wraps the plain number.
            #[must_use]
            pub const fn $from(value: $inner) -> Self {
                Self(value)
            }

            /// The plain number.
            #[must_use]
            pub const fn $get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

unit! {
    /// Byte position in the *compressed* blob, as a registry stores it.
    ///
    /// Only this type may become a `Range:` header.
    BlobOffset(u64), from_bytes, bytes
}
unit! {
    /// Byte position in a blob's uncompressed address space, which is also the
    /// position in its cache file and in the device given to the kernel.
    PlainOffset(u64), from_bytes, bytes
}
unit! {
    /// Position of a chunk in its blob's chunk table, in order of first storage.
    /// At most 24 bits on disk.
    ChunkIndex(u32), new, get
}
unit! {
    /// Position of a blob in the blob table of one bootstrap, 0 to 253.
    BlobIndex(u32), new, get
}

impl BlobOffset {
    /// `None` past `u64::MAX`: the table it came from is corrupt.
    #[must_use]
    pub fn checked_add(self, len: u64) -> Option<Self> {
        self.0.checked_add(len).map(Self)
    }
}

impl PlainOffset {
    /// `None` past `u64::MAX`: the table it came from is corrupt.
    #[must_use]
    pub fn checked_add(self, len: u64) -> Option<Self> {
        self.0.checked_add(len).map(Self)
    }
}

impl ChunkIndex {
    /// The index as a position in a slice.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "usize has at least 32 bits on Linux"
    )]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl BlobIndex {
    /// The index as a position in a slice.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "usize has at least 32 bits on Linux"
    )]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

/// Rounds `bytes` up to whole blocks; `None` on overflow.
#[must_use]
pub fn round_up_to_block(bytes: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(BLOCK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_saturates_into_none() {
        assert_eq!(round_up_to_block(0), Some(0));
        assert_eq!(round_up_to_block(1), Some(4096));
        assert_eq!(round_up_to_block(4096), Some(4096));
        assert_eq!(round_up_to_block(u64::MAX), None);
    }
}
