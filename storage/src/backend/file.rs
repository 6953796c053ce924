//! One local file, whatever the blob is called.
//!
//! For a bootstrap with a single blob whose id is not known, or whose file has
//! another name: a bootstrap that was embedded in its own blob only holds a
//! placeholder.
#![forbid(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};

use super::local::{file_error, open_regular, read_range};
use super::{Backend, BackendError, Fetch, Sink};
use crate::blob_id::BlobId;

/// A file that stands for every blob.
#[derive(Debug)]
pub struct FileBackend {
    path: PathBuf,
    file: File,
}

impl FileBackend {
    /// Opens the file, which must be a regular one.
    ///
    /// # Errors
    /// [`BackendError::File`].
    pub fn open(path: &Path) -> Result<Self, BackendError> {
        let file =
            open_regular(path).map_err(|source| file_error(path.to_owned(), 0, 0, source))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }
}

impl Backend for FileBackend {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        read_range(&self.path, &self.file, &request.range, sink)
    }

    fn size(&self, _blob: &BlobId) -> Result<u64, BackendError> {
        match self.file.metadata() {
            Ok(meta) => Ok(meta.len()),
            Err(source) => Err(file_error(self.path.clone(), 0, 0, source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Priority, fetch_to_vec};

    #[test]
    fn every_name_is_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("any.name");
        std::fs::write(&path, b"0123456789").unwrap();
        let backend = FileBackend::open(&path).unwrap();
        for blob in ["a", "b"] {
            let blob = BlobId::new(blob).unwrap();
            let fetch = |range| {
                let request = Fetch {
                    blob: &blob,
                    range,
                    priority: Priority::OnDemand,
                    served_by: None,
                    direct: false,
                    blob_len: None,
                };
                fetch_to_vec(&backend, &request, 100)
            };
            assert_eq!(fetch(3..6).unwrap(), b"345");
            assert_eq!(backend.size(&blob).unwrap(), 10);
            let error = fetch(8..12).unwrap_err();
            assert!(
                matches!(error, BackendError::Short { got: 2, .. }),
                "{error}"
            );
        }
        assert!(FileBackend::open(dir.path()).is_err());
    }
}
