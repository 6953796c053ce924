//! Read-only bytes of a file or of memory; the only place of the crate that maps files.
//!
//! A [`Mapped`] is cheap to clone and frees its map with the last clone. Tables
//! of any size can so be read without loading them: only touched pages cost memory.
//!
//! Promises: the length never changes, and reading never writes to the file.
//! What it cannot promise: a file truncated by another process while it is
//! mapped raises SIGBUS on access. Files of the cache directory are therefore
//! replaced by renaming, never shortened (`docs/format-blob.md`, "Cache directory").

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapOptions};

/// Shared read-only bytes, mapped from a file or owned in memory.
#[derive(Clone)]
pub struct Mapped(Arc<Source>);

enum Source {
    Map(Mmap),
    Memory(Vec<u8>),
}

impl Mapped {
    /// Maps the whole file at `path`.
    ///
    /// # Errors
    /// What opening or mapping says; the caller adds the path.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::from_file(&File::open(path)?)
    }

    /// Maps the whole of an open file; the file may be closed afterwards.
    ///
    /// # Errors
    /// What the system says, for instance for a directory or a pipe.
    pub fn from_file(file: &File) -> io::Result<Self> {
        // An empty file cannot be mapped, and says so differently per kernel.
        if file.metadata()?.len() == 0 {
            return Ok(Self::from_vec(Vec::new()));
        }
        // SAFETY: the map is read-only and shared, and its bytes are only ever
        // handed out as `&[u8]`. Another process may still write to the file;
        // every reader of these bytes treats them as untrusted, checks offsets
        // against the length of the map, and needs no two reads to agree for
        // memory safety. Truncation, see the header, ends in SIGBUS.
        let map = unsafe { MmapOptions::new().map(file) }?;
        Ok(Self(Arc::new(Source::Map(map))))
    }

    /// Shares bytes that are in memory already.
    #[must_use]
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Source::Memory(bytes)))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &*self.0 {
            Source::Map(map) => map,
            Source::Memory(bytes) => bytes,
        }
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &*self.0 {
            Source::Map(_) => "map",
            Source::Memory(_) => "memory",
        };
        write!(f, "Mapped({kind}, {} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn maps_a_file_and_outlives_its_name() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"some bytes").unwrap();
        let mapped = Mapped::open(file.path()).unwrap();
        let clone = mapped.clone();
        drop(mapped);
        file.close().unwrap();
        assert_eq!(&*clone, b"some bytes");
        assert_eq!(format!("{clone:?}"), "Mapped(map, 10 bytes)");
    }

    #[test]
    fn an_empty_file_is_an_empty_slice() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(Mapped::open(file.path()).unwrap().is_empty());
    }

    #[test]
    fn a_directory_is_an_error() {
        assert!(Mapped::open(Path::new("/")).is_err());
    }
}
