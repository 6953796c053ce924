//! Read-only memory maps, the only place that creates them.
//!
//! A [`Mapped`] is a shared, immutable run of bytes: the pages of a file, or a
//! vector. Cloning it shares the bytes.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

/// Shared read-only bytes of a file or a vector.
#[derive(Clone)]
pub struct Mapped(Arc<Bytes>);

enum Bytes {
    File(Mmap),
    Memory(Vec<u8>),
}

impl Mapped {
    /// Maps the whole file at `path`.
    ///
    /// # Errors
    /// Those of opening and mapping a file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Self::from_vec(Vec::new()));
        }
        // SAFETY: the map is private to this value and only ever read. Metadata
        // files are written once under another name and renamed into place, so
        // nobody shortens or changes a file that is mapped.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(Arc::new(Bytes::File(map))))
    }

    /// Wraps bytes that are in memory already.
    #[must_use]
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Bytes::Memory(bytes)))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &*self.0 {
            Bytes::File(map) => map,
            Bytes::Memory(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({} bytes)", self.len())
    }
}
