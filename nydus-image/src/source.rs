//! Where the files of a layer come from.
//!
//! A source builds the tree of a layer and feeds the data of its regular files to
//! the pipeline, both in one pass for a [`tar`] stream, one after the other for a
//! [`dir`]ectory. It never follows a symbolic link and never trusts a name.

use std::fmt;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rafs::tree::{InodeId, Tree};
use sha2::{Digest as _, Sha256};
use storage::Digest;
use storage::original::{self, LayerReader, Place, Summary};

use crate::build::BuildOptions;
use crate::pipeline::feeder::Feeder;

pub mod compressed;
pub mod dir;
pub mod tar;

/// What a layer is built from.
pub enum Source {
    /// The files below a directory.
    Directory(PathBuf),
    /// A tar stream, read once to its end.
    Tar {
        /// Its name in messages.
        name: String,
        /// The archive, uncompressed; see [`compressed::open`] for others.
        reader: Box<dyn Read + Send>,
    },
    /// A tar or tar.gz stream that stays the data blob of its layer.
    InPlace {
        /// Its name in messages.
        name: String,
        /// The archive as stored.
        layer: InPlace,
    },
}

/// An archive whose data is used in place: read by the tar parser, and asked for the
/// places of chunks. Cheap to clone; clones share the stream.
#[derive(Clone)]
pub struct InPlace {
    reader: Arc<Mutex<LayerReader<Box<dyn Read + Send>>>>,
    kind: original::Kind,
    /// Of the tar, if wanted.
    hasher: Option<Arc<Mutex<Sha256>>>,
}

impl InPlace {
    /// Looks at the first bytes of `reader` to find out how the archive is stored.
    ///
    /// # Errors
    /// As for [`LayerReader::open`].
    pub fn open(reader: impl Read + Send + 'static) -> io::Result<Self> {
        let reader = LayerReader::open(Box::new(reader) as Box<dyn Read + Send>)?;
        let kind = reader.kind();
        let reader = Arc::new(Mutex::new(reader));
        Ok(Self {
            reader,
            kind,
            hasher: None,
        })
    }

    /// Lets [`InPlace::tar_digest`] know the digest of the tar.
    #[must_use]
    pub fn hashing_tar(self) -> Self {
        Self {
            hasher: Some(Arc::default()),
            ..self
        }
    }

    /// SHA-256 of the tar as far as it was read, after [`InPlace::hashing_tar`].
    #[must_use]
    pub fn tar_digest(&self) -> Option<Digest> {
        let hasher = self.hasher.as_ref()?;
        let hasher = hasher.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Digest::from_bytes(hasher.clone().finalize().into()))
    }

    /// Fills `buf` with the next bytes of the tar, which are one chunk, by `read`, and
    /// tells where they are.
    pub(crate) fn chunk<E>(
        &self,
        buf: &mut [u8],
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
        failed: impl Fn(io::Error) -> E,
    ) -> Result<Place, E> {
        let len = u32::try_from(buf.len()).unwrap_or(u32::MAX);
        self.lock().begin_chunk(len).map_err(&failed)?;
        read(buf)?;
        self.lock().end_chunk().map_err(&failed)
    }

    fn summary(&self) -> Summary {
        self.lock().summary()
    }

    fn lock(&self) -> MutexGuard<'_, LayerReader<Box<dyn Read + Send>>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for InPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InPlace({:?})", self.kind)
    }
}

impl Read for InPlace {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.lock().read(buf)?;
        if let Some(hasher) = &self.hasher {
            let mut hasher = hasher.lock().unwrap_or_else(PoisonError::into_inner);
            hasher.update(&buf[..count]);
        }
        Ok(count)
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "directory {}", path.display()),
            Self::Tar { name, .. } | Self::InPlace { name, .. } => write!(f, "archive {name}"),
        }
    }
}

/// Why a source could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A directory tree.
    #[error(transparent)]
    Directory(#[from] dir::DirError),
    /// A tar stream.
    #[error(transparent)]
    Tar(#[from] tar::TarError),
    /// The pipeline failed; its own error says why.
    #[error("the build was stopped")]
    Stopped,
}

/// The files of a source. The chunks of regular files are not filled in.
#[derive(Debug)]
pub(crate) struct Scanned {
    pub(crate) tree: Tree,
    /// Regular files in the order in which their data was fed, with their number
    /// of chunks.
    pub(crate) files: Vec<(InodeId, u64)>,
    /// The archive, if it is used in place.
    pub(crate) original: Option<Summary>,
}

impl Source {
    /// How the archive is stored, if it is used in place.
    pub(crate) fn original(&self) -> Option<original::Kind> {
        match self {
            Self::InPlace { layer, .. } => Some(layer.kind),
            _ => None,
        }
    }

    pub(crate) fn scan(
        self,
        feeder: &mut Feeder,
        options: &BuildOptions,
    ) -> Result<Scanned, SourceError> {
        match self {
            Self::Directory(path) => dir::scan(&path, feeder, options),
            Self::Tar { name, reader } => {
                let reader = Counting {
                    reader,
                    progress: options.progress.clone(),
                };
                tar::scan(name, reader, None, feeder)
            }
            Self::InPlace { name, layer } => {
                let reader = Counting {
                    reader: layer.clone(),
                    progress: options.progress.clone(),
                };
                let mut scanned = tar::scan(name, reader, Some(&layer), feeder)?;
                // The tar was read to its end, hence the layer too.
                scanned.original = Some(layer.summary());
                Ok(scanned)
            }
        }
    }
}

/// Told how many more bytes of a source were read.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(u64) + Send + Sync>);

impl Progress {
    /// Calls `report` with the number of bytes read since its last call, from the
    /// thread that reads the source. It should return at once.
    pub fn new(report: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self(Arc::new(report))
    }

    pub(crate) fn add(&self, bytes: u64) {
        (self.0)(bytes);
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

struct Counting<R> {
    reader: R,
    progress: Option<Progress>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buf)?;
        if let Some(progress) = &self.progress {
            progress.add(read as u64);
        }
        Ok(read)
    }
}

/// Why an extended attribute cannot be stored in an image; `None` if it can.
pub(crate) fn xattr_problem(key: &[u8], value: &[u8]) -> Option<String> {
    let known = rafs::xattr::split_key(key).is_some();
    let problem = if !known {
        "has a name that the image format cannot store"
    } else if key.len() > 255 {
        "has a name of more than 255 bytes"
    } else if value.len() > 65_535 {
        "is longer than 65535 bytes"
    } else {
        return None;
    };
    Some(format!("extended attribute {} {problem}", printable(key)))
}

/// Linux's 32-bit device number; `None` if a part does not fit.
pub(crate) fn encode_device(major: u64, minor: u64) -> Option<u32> {
    let major = u32::try_from(major).ok().filter(|major| *major <= 0xfff)?;
    let minor = u32::try_from(minor)
        .ok()
        .filter(|minor| *minor <= 0xf_ffff)?;
    Some((minor & 0xff) | (major << 8) | ((minor & 0xf_ff00) << 12))
}

/// A name for messages: escapes what is not printable text.
pub(crate) fn printable(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) => text.escape_debug().to_string(),
        Err(_) => path.escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_linux_numbers() {
        assert_eq!(encode_device(1, 3), Some(0x103));
        assert_eq!(encode_device(0xabc, 0x12345), Some(0x123a_bc45));
        assert_eq!(encode_device(0x1000, 0), None);
        assert_eq!(encode_device(0, 0x10_0000), None);
    }

    #[test]
    fn attributes_that_do_not_fit_are_named() {
        assert_eq!(xattr_problem(b"user.k", b""), None);
        assert_eq!(xattr_problem(b"system.posix_acl_access", b"x"), None);
        for (key, len) in [
            (&b"btrfs.x"[..], 1),
            (b"system.nfs4_acl", 1),
            (b"user.", 1),
            (b"user.k", 65_536),
        ] {
            let problem = xattr_problem(key, &vec![0; len]).unwrap();
            assert!(problem.contains(&printable(key)), "{problem}");
        }
    }
}
