//! A sink that counts and hashes what goes through it.

use std::io::{BufWriter, Write};

use sha2::{Digest as _, Sha256};

use super::WriteError;
use crate::codec::as_u64;
use crate::digest::Digest;
use crate::format::FormatError;
use crate::format::entry::MAX_OFFSET;

/// Small chunks are gathered to this many bytes per `write`.
const BUFFER: usize = 256 << 10;

/// Writes front to back and computes two digests of it: of everything, and of
/// everything that counts for the blob id.
#[derive(Debug)]
pub(super) struct HashingSink<W: Write> {
    out: BufWriter<W>,
    len: u64,
    file: Sha256,
    /// `None` as long as both digests are the same.
    id: Option<Sha256>,
}

impl<W: Write> HashingSink<W> {
    pub(super) fn new(out: W) -> Self {
        Self {
            out: BufWriter::with_capacity(BUFFER, out),
            len: 0,
            file: Sha256::new(),
            id: None,
        }
    }

    /// Bytes written so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if let Some(id) = &mut self.id {
            id.update(bytes);
        }
        self.write_excluded(bytes)
    }

    /// Writes bytes that do not count for the blob id.
    pub(super) fn exclude(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.id.get_or_insert_with(|| self.file.clone());
        self.write_excluded(bytes)
    }

    fn write_excluded(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let at = self.len;
        let len = at.saturating_add(as_u64(bytes.len()));
        if len > MAX_OFFSET {
            return Err(WriteError::from(FormatError::Unrepresentable {
                object: "blob",
                field: "size",
                value: len,
                problem: "a blob has at most 1 TiB",
            }));
        }
        self.file.update(bytes);
        self.out
            .write_all(bytes)
            .map_err(|source| WriteError::Io { at, source })?;
        self.len = len;
        Ok(())
    }

    /// Digest of everything so far.
    pub(super) fn digest(&self) -> Digest {
        Digest::from_bytes(self.file.clone().finalize().into())
    }

    /// Hands all bytes to the writer below; returns the digest for the id and that
    /// of the file.
    pub(super) fn finish(mut self) -> Result<(Digest, Digest), WriteError> {
        let at = self.len;
        self.out
            .flush()
            .map_err(|source| WriteError::Io { at, source })?;
        let file = self.digest();
        let id = self
            .id
            .map_or(file, |id| Digest::from_bytes(id.finalize().into()));
        Ok((id, file))
    }
}
