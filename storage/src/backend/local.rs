//! Blobs in local directories: each is the file named by its id.
//!
//! The first directory that has the file wins. Every fetch opens it anew, so a
//! blob may be put in place, or replaced, while an image is mounted.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::{Backend, BackendError, Fetch, Sink, Stop};
use crate::blob_id::BlobId;

/// Bytes read at once: large enough to make system calls cheap, small enough to
/// stay in the processor's cache until they are decoded.
const PIECE: usize = 256 << 10;

/// A list of directories with blob files.
#[derive(Debug)]
pub struct LocalBackend {
    dirs: Vec<PathBuf>,
}

impl LocalBackend {
    /// * `dirs`: searched in this order.
    #[must_use]
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self { dirs }
    }

    fn open(&self, blob: &BlobId) -> Result<(PathBuf, File), BackendError> {
        let mut first = None;
        for dir in &self.dirs {
            let path = dir.join(blob.as_str());
            match open_regular(&path) {
                Ok(file) => return Ok((path, file)),
                Err(source) => {
                    let missing = source.kind() == io::ErrorKind::NotFound;
                    let error = file_error(path, 0, 0, source);
                    if !missing {
                        return Err(error);
                    }
                    first = first.or(Some(error));
                }
            }
        }
        Err(first
            .unwrap_or_else(|| BackendError::Config("no directory of blobs is set".to_owned())))
    }
}

pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    // Opening a pipe must not wait for its writer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

pub(super) fn file_error(path: PathBuf, offset: u64, len: u64, source: io::Error) -> BackendError {
    BackendError::File {
        path,
        offset,
        len,
        source,
    }
}

/// Delivers the bytes of `range`, all of them or an error.
pub(super) fn read_range(
    path: &Path,
    file: &File,
    range: &Range<u64>,
    sink: &mut Sink<'_>,
) -> Result<(), BackendError> {
    let wanted = range.end.saturating_sub(range.start);
    let mut buffer = vec![0; PIECE.min(usize::try_from(wanted).unwrap_or(PIECE))];
    let mut at = range.start;
    while at < range.end {
        let rest = range.end - at;
        let len = buffer
            .len()
            .min(usize::try_from(rest).unwrap_or(usize::MAX));
        let piece = buffer.get_mut(..len).unwrap_or_default();
        let got = match file.read_at(piece, at) {
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(file_error(path.to_owned(), at, rest, source)),
        };
        if got == 0 {
            return Err(BackendError::Short {
                name: path.display().to_string(),
                offset: range.start,
                len: wanted,
                got: at - range.start,
            });
        }
        sink(piece.get(..got).unwrap_or_default()).map_err(|Stop| BackendError::Stopped)?;
        at += crate::codec::as_u64(got);
    }
    Ok(())
}

impl Backend for LocalBackend {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        let (path, file) = self.open(request.blob)?;
        read_range(&path, &file, &request.range, sink)
    }

    fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        let (path, file) = self.open(blob)?;
        match file.metadata() {
            Ok(meta) => Ok(meta.len()),
            Err(source) => Err(file_error(path, 0, 0, source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::backend::{Priority, fetch_to_vec};

    fn fetch(backend: &LocalBackend, id: &str, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
        let blob = BlobId::new(id).unwrap();
        let request = Fetch {
            blob: &blob,
            range,
            priority: Priority::OnDemand,
            served_by: None,
            direct: false,
            blob_len: None,
        };
        fetch_to_vec(backend, &request, 1 << 30)
    }

    #[test]
    fn the_first_directory_that_has_the_file_is_read_exactly() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let data: Vec<u8> = (0..1_000_000_u32).map(|i| i.to_le_bytes()[1]).collect();
        fs::write(b.path().join("one"), &data).unwrap();
        fs::write(a.path().join("two"), b"a").unwrap();
        fs::write(b.path().join("two"), b"b").unwrap();
        let backend = LocalBackend::new(vec![a.path().to_owned(), b.path().to_owned()]);
        for range in [0..1, 7..999_999, 999_999..1_000_000, 0..1_000_000] {
            let expected =
                &data[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
            assert_eq!(fetch(&backend, "one", range).unwrap(), expected);
        }
        assert_eq!(fetch(&backend, "two", 0..1).unwrap(), b"a");
        assert_eq!(
            backend.size(&BlobId::new("one").unwrap()).unwrap(),
            1_000_000
        );
    }

    #[test]
    fn errors_name_file_and_position() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("short"), b"abc").unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let backend = LocalBackend::new(vec![dir.path().to_owned()]);
        let error = fetch(&backend, "short", 1..9).unwrap_err();
        assert!(matches!(
            error,
            BackendError::Short {
                offset: 1,
                len: 8,
                got: 2,
                ..
            }
        ));
        assert!(error.to_string().contains("/short"));
        for bad in ["dir", "pipe", "missing"] {
            let error = fetch(&backend, bad, 0..1).unwrap_err();
            assert!(error.to_string().contains(bad), "{error}");
        }
    }
}
