//! The container format of a blob file, shared by reader and builder.
//!
//! One blob file is chunk data followed by the tables that explain it:
//!
//! * [`chunk_table`]: where each chunk is, in both address spaces; with
//!   [`header`] (the 4096 bytes after it), [`entry`] (one row) and [`context`]
//!   (what rows of batch and gzip blobs refer to);
//! * [`stored_table`]: from the table as a blob stores it to the form of the
//!   cache directory, which is what readers map;
//! * [`tar_header`] and [`toc`]: how the sections of a blob are found from its end.
//!
//! Promises: all of it takes untrusted bytes, checks every number before use,
//! allocates no more than the bytes at hand justify, and tells what is corrupt
//! from what is merely not supported. Nothing here does I/O.
//!
//! Normative description: `docs/format-blob.md`.
#![forbid(unsafe_code)]

pub mod chunk_table;
pub mod context;
pub mod entry;
#[cfg(test)]
mod foreign_images;
pub mod header;
pub mod stored_table;
pub mod tar_header;
pub mod toc;

use crate::codec::CodecError;

/// Why bytes are not the object they should be. The caller adds the blob or file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// A field has a value that it must not have.
    #[error("{object} {index}: {field} is {value}: {problem}")]
    Corrupt {
        /// The kind of object: "chunk", "batch context", ...
        object: &'static str,
        /// Which of them; 0 if there is only one.
        index: u64,
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// Which rule is broken.
        problem: &'static str,
    },
    /// Two places that must agree do not.
    #[error("{object}: {field} is {found}, expected {expected}")]
    Mismatch {
        /// The object read.
        object: &'static str,
        /// The field.
        field: &'static str,
        /// What it holds.
        found: u64,
        /// What another table says it is.
        expected: u64,
    },
    /// There are fewer or more bytes than the object has.
    #[error("{object}: {got} bytes, expected {expected}")]
    Size {
        /// The object.
        object: &'static str,
        /// Bytes it needs.
        expected: u64,
        /// Bytes present.
        got: u64,
    },
    /// Bytes that have a recorded digest do not match it.
    #[error("{object}: SHA-256 does not match")]
    Digest {
        /// The object.
        object: &'static str,
    },
    /// No object has this number.
    #[error("{object} {index} does not exist, there are {count}")]
    NoSuch {
        /// The kind of object.
        object: &'static str,
        /// Which was wanted.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// The data is valid but uses something that is not implemented.
    #[error("{object}: {feature} is not supported")]
    Unsupported {
        /// The object.
        object: &'static str,
        /// What would be needed.
        feature: &'static str,
    },
    /// A value cannot be written in this format.
    #[error("{object}: {field} {value} cannot be stored: {problem}")]
    Unrepresentable {
        /// The object.
        object: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        problem: &'static str,
    },
    /// A section does not decompress.
    #[error("{object}")]
    Codec {
        /// The section.
        object: &'static str,
        /// What the codec said.
        source: CodecError,
    },
    /// Writing the result somewhere failed.
    #[error("writing {object}")]
    Write {
        /// What was being written.
        object: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

impl FormatError {
    /// Shorthand for [`FormatError::Corrupt`].
    fn corrupt(
        object: &'static str,
        index: impl Into<u64>,
        field: &'static str,
        value: impl Into<u64>,
        problem: &'static str,
    ) -> Self {
        Self::Corrupt {
            object,
            index: index.into(),
            field,
            value: value.into(),
            problem,
        }
    }
}

/// `Ok` if both are equal, else [`FormatError::Mismatch`].
fn expect_equal(
    object: &'static str,
    field: &'static str,
    found: u64,
    expected: u64,
) -> Result<(), FormatError> {
    if found == expected {
        Ok(())
    } else {
        Err(FormatError::Mismatch {
            object,
            field,
            found,
            expected,
        })
    }
}
