//! An OCI image layout: a directory with `oci-layout`, `index.json` and `blobs/`.
//!
//! Reading checks every object against its digest. Writing goes through a
//! temporary file and a rename, so an object exists completely or not at all.
//!
//! Promises: a layout that was opened for writing and dropped before
//! [`Layout::tag`] succeeded has no object that it did not have before, and a
//! directory that did not exist is gone again.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read as _, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::blob_source::BlobSource;
use super::content::{ContentDigest, Verifier, verify};
use super::error::OciError;
use super::manifest::{ANNOTATION_REF_NAME, Descriptor, Index, MAX_MANIFEST};
use super::reference::LayoutRef;

/// Pieces that blobs are read and written in.
const PIECE: usize = 256 << 10;
/// Name given to an image that is written without one, and preferred when reading without one.
const DEFAULT_NAME: &str = "latest";

/// One layout. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Layout {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    tag: Option<String>,
    /// What to remove if writing is given up: files, then directories, newest last.
    unfinished: Mutex<Vec<PathBuf>>,
}

impl Layout {
    /// The layout that `name` points into. Nothing is read or written yet.
    #[must_use]
    pub fn open(name: &LayoutRef) -> Self {
        let inner = Inner {
            dir: name.dir.clone(),
            tag: name.tag.clone(),
            unfinished: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Finds the named image; without a name, the only one or the one named `latest`.
    ///
    /// # Errors
    /// [`OciError::NotFound`] if there is no layout or no such image,
    /// [`OciError::Malformed`] if the name is missing and there are several, or if
    /// `index.json` is damaged.
    pub fn resolve(&self) -> Result<Descriptor, OciError> {
        let path = self.path("index.json");
        let index = self
            .read_index()?
            .ok_or_else(|| OciError::NotFound { at: shown(&path) })?;
        let named = |name: &str| {
            let mut found = index.manifests.iter();
            found.find(|entry| entry.annotation(ANNOTATION_REF_NAME) == Some(name))
        };
        if let Some(tag) = &self.inner.tag {
            return named(tag).cloned().ok_or_else(|| OciError::NotFound {
                at: format!("image {tag:?} in {}", path.display()),
            });
        }
        match index.manifests.as_slice() {
            [only] => Ok(only.clone()),
            [] => Err(OciError::NotFound {
                at: format!("any image in {}", path.display()),
            }),
            _ => named(DEFAULT_NAME).cloned().ok_or_else(|| {
                let names = index
                    .manifests
                    .iter()
                    .filter_map(|entry| entry.annotation(ANNOTATION_REF_NAME));
                let names = names.collect::<Vec<_>>().join(", ");
                OciError::malformed(
                    shown(&path),
                    format_args!("several images; choose one with oci:DIR:TAG: {names}"),
                )
            }),
        }
    }

    /// Reads a small object (manifest, index, config) and checks it.
    ///
    /// # Errors
    /// [`OciError::TooLarge`] above `limit` bytes, [`OciError::NotFound`],
    /// [`OciError::Size`], [`OciError::Digest`], [`OciError::Io`].
    pub fn read_small(&self, descriptor: &Descriptor, limit: u64) -> Result<Bytes, OciError> {
        let path = self.blob_path(&descriptor.digest);
        if descriptor.size > limit {
            return Err(OciError::TooLarge {
                at: shown(&path),
                limit,
            });
        }
        let bytes = read_bounded(&path, limit)?;
        verify(&shown(&path), &bytes, &descriptor.digest, descriptor.size)?;
        Ok(bytes)
    }

    /// Opens a blob for reading in pieces.
    ///
    /// # Errors
    /// [`OciError::NotFound`], [`OciError::Io`].
    pub fn open_blob(&self, descriptor: &Descriptor) -> Result<LayoutBlob, OciError> {
        let path = self.blob_path(&descriptor.digest);
        let file = open(&path)?;
        let verifier = Verifier::new(shown(&path), &descriptor.digest, descriptor.size);
        Ok(LayoutBlob {
            source: BlobSource::File(Arc::new(file)),
            path,
            verifier,
        })
    }

    /// Whether the layout has a blob of that digest and size.
    #[must_use]
    pub fn has_blob(&self, descriptor: &Descriptor) -> bool {
        let found = std::fs::metadata(self.blob_path(&descriptor.digest));
        found.is_ok_and(|metadata| metadata.is_file() && metadata.len() == descriptor.size)
    }

    /// Stores an object.
    ///
    /// # Errors
    /// [`OciError::Io`]; [`OciError::Size`] or [`OciError::Digest`] if `source` is not
    /// what it is said to be.
    pub async fn write_blob(
        &self,
        source: &BlobSource,
        digest: &ContentDigest,
        size: u64,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), OciError> {
        let path = self.blob_path(digest);
        let dir = self.path(&format!("blobs/{}", digest.algorithm()));
        self.create_dirs(&dir)?;
        let mut temporary = new_file(&dir)?;
        let mut verifier = Verifier::new(shown(&path), digest, size);
        while !verifier.is_complete() {
            let offset = verifier.seen();
            progress(offset);
            let piece = source.read_at(offset, PIECE).await;
            let piece = piece.map_err(OciError::io(&path, "reading what to write"))?;
            verifier.update(&piece)?;
            // A bounded write to a local file: not worth a thread of its own.
            temporary
                .write_all(&piece)
                .map_err(OciError::io(&path, "writing"))?;
        }
        verifier.finish()?;
        progress(size);
        let fresh = !path.exists();
        temporary
            .persist(&path)
            .map_err(|err| OciError::io(&path, "renaming into place")(err.error))?;
        if fresh {
            self.remember(path);
        }
        Ok(())
    }

    /// Names the image `descriptor` and so completes the layout. An image that had the
    /// name before loses it.
    ///
    /// # Errors
    /// [`OciError::Io`], [`OciError::Malformed`].
    pub fn tag(&self, descriptor: &Descriptor) -> Result<(), OciError> {
        let name = self.inner.tag.as_deref().unwrap_or(DEFAULT_NAME);
        let mut entry = descriptor.clone();
        entry.annotate(ANNOTATION_REF_NAME, name);
        let mut index = self.read_index()?.unwrap_or_else(|| Index {
            manifests: Vec::new(),
            rest: Map::from_iter([("schemaVersion".to_owned(), Value::from(2))]),
        });
        index.manifests.retain(|other| {
            other.annotation(ANNOTATION_REF_NAME) != Some(name) && other.digest != entry.digest
                || (other.digest == entry.digest
                    && other
                        .annotation(ANNOTATION_REF_NAME)
                        .is_some_and(|other| other != name))
        });
        index.manifests.push(entry);
        self.create_dirs(&self.inner.dir)?;
        let marker = self.path("oci-layout");
        if !marker.exists() {
            self.replace(
                &marker,
                json!({"imageLayoutVersion": "1.0.0"})
                    .to_string()
                    .as_bytes(),
            )?;
        }
        let path = self.path("index.json");
        let bytes =
            serde_json::to_vec(&index).map_err(|err| OciError::malformed(shown(&path), err))?;
        self.replace(&path, &bytes)?;
        self.unfinished().clear();
        Ok(())
    }

    /// `index.json`, or `None` if there is none.
    fn read_index(&self) -> Result<Option<Index>, OciError> {
        let path = self.path("index.json");
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read_bounded(&path, MAX_MANIFEST)?;
        let index = serde_json::from_slice(&bytes);
        index
            .map(Some)
            .map_err(|err| OciError::malformed(shown(&path), err))
    }

    /// Writes a small file in one step.
    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), OciError> {
        let mut temporary = new_file(&self.inner.dir)?;
        temporary
            .write_all(bytes)
            .map_err(OciError::io(path, "writing"))?;
        // The name of an image must not survive a power failure without its index.
        temporary
            .as_file()
            .sync_all()
            .map_err(OciError::io(path, "syncing"))?;
        let fresh = !path.exists();
        temporary
            .persist(path)
            .map_err(|err| OciError::io(path, "renaming into place")(err.error))?;
        if fresh {
            self.remember(path.to_owned());
        }
        Ok(())
    }

    /// Creates `dir` and its parents, noting which are new.
    fn create_dirs(&self, dir: &Path) -> Result<(), OciError> {
        let missing = |dir: &&Path| !dir.as_os_str().is_empty() && !dir.exists();
        let mut new: Vec<_> = dir
            .ancestors()
            .take_while(missing)
            .map(Path::to_owned)
            .collect();
        new.reverse();
        for dir in new {
            match std::fs::create_dir(&dir) {
                Ok(()) => self.remember(dir),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(OciError::io(dir, "creating the directory")(error)),
            }
        }
        Ok(())
    }

    fn remember(&self, path: PathBuf) {
        self.unfinished().push(path);
    }

    fn unfinished(&self) -> std::sync::MutexGuard<'_, Vec<PathBuf>> {
        self.inner
            .unfinished
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.inner.dir.join(name)
    }

    fn blob_path(&self, digest: &ContentDigest) -> PathBuf {
        self.inner
            .dir
            .join("blobs")
            .join(digest.algorithm())
            .join(digest.hex())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let unfinished = self
            .unfinished
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // Newest first: files before the directories they are in. A directory that
        // someone else put something into stays.
        for path in unfinished.drain(..).rev() {
            let _ = if path.is_dir() {
                std::fs::remove_dir(&path)
            } else {
                std::fs::remove_file(&path)
            };
        }
    }
}

/// A blob being read.
#[derive(Debug)]
pub struct LayoutBlob {
    source: BlobSource,
    path: PathBuf,
    verifier: Verifier,
}

impl LayoutBlob {
    /// The next bytes; `None` at the verified end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, OciError> {
        match self.source.read_at(self.verifier.seen(), PIECE).await {
            Ok(piece) => {
                self.verifier.update(&piece)?;
                Ok(Some(piece))
            }
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.verifier.clone().finish()?;
                Ok(None)
            }
            Err(error) => Err(OciError::io(&self.path, "reading")(error)),
        }
    }
}

/// Opens a file, telling a missing one apart.
fn open(path: &Path) -> Result<File, OciError> {
    File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => OciError::NotFound { at: shown(path) },
        _ => OciError::io(path, "opening")(error),
    })
}

fn read_bounded(path: &Path, limit: u64) -> Result<Bytes, OciError> {
    let mut bytes = Vec::new();
    let file = open(path)?;
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    let read = read.map_err(OciError::io(path, "reading"))?;
    if u64::try_from(read).is_ok_and(|read| read > limit) {
        return Err(OciError::TooLarge {
            at: shown(path),
            limit,
        });
    }
    Ok(bytes.into())
}

/// A temporary file in `dir` that others may read once it has its name.
fn new_file(dir: &Path) -> Result<tempfile::NamedTempFile, OciError> {
    use std::os::unix::fs::PermissionsExt as _;
    tempfile::Builder::new()
        .prefix(".nydus-")
        .permissions(std::fs::Permissions::from_mode(0o644))
        .tempfile_in(dir)
        .map_err(OciError::io(dir, "creating a file"))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::manifest::{OCI_CONFIG, OCI_MANIFEST};

    fn layout(dir: &Path, tag: Option<&str>) -> Layout {
        Layout::open(&LayoutRef {
            dir: dir.to_owned(),
            tag: tag.map(str::to_owned),
        })
    }

    async fn put(layout: &Layout, bytes: &'static [u8]) -> Descriptor {
        let descriptor = Descriptor::of(OCI_MANIFEST, bytes);
        let source = BlobSource::Bytes(Bytes::from_static(bytes));
        layout
            .write_blob(&source, &descriptor.digest, descriptor.size, &|_| {})
            .await
            .unwrap();
        descriptor
    }

    #[tokio::test]
    async fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new/layout");
        let written = layout(&dir, Some("v1"));
        let descriptor = put(&written, b"content").await;
        written.tag(&descriptor).unwrap();
        drop(written);

        let read = layout(&dir, None);
        let found = read.resolve().unwrap();
        assert_eq!(found.digest, descriptor.digest);
        assert_eq!(read.read_small(&found, 100).unwrap(), "content");
        assert!(read.has_blob(&found));
        let mut blob = read.open_blob(&found).unwrap();
        assert_eq!(blob.next().await.unwrap().unwrap(), "content");
        assert!(blob.next().await.unwrap().is_none());
        assert!(matches!(
            layout(&dir, Some("v2")).resolve(),
            Err(OciError::NotFound { .. })
        ));
        assert!(matches!(
            read.read_small(&found, 6),
            Err(OciError::TooLarge { .. })
        ));
        let marker = std::fs::read_to_string(dir.join("oci-layout")).unwrap();
        assert_eq!(marker, r#"{"imageLayoutVersion":"1.0.0"}"#);
    }

    #[tokio::test]
    async fn a_name_moves_to_the_newest_image() {
        let dir = tempfile::tempdir().unwrap();
        for (tag, bytes) in [
            ("a", &b"1"[..]),
            ("b", b"2"),
            ("a", b"3"),
            ("a", b"3"),
            ("c", b"3"),
        ] {
            let layout = layout(dir.path(), Some(tag));
            let descriptor = put(&layout, bytes).await;
            layout.tag(&descriptor).unwrap();
        }
        let index: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("index.json")).unwrap()).unwrap();
        let names: Vec<_> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["annotations"][ANNOTATION_REF_NAME].as_str().unwrap())
            .collect();
        assert_eq!(names, ["b", "a", "c"]);
        let error = layout(dir.path(), None).resolve().unwrap_err().to_string();
        assert!(error.contains("b, a, c"), "{error}");
    }

    #[tokio::test]
    async fn an_unfinished_layout_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = layout(&dir.path().join("a/b"), None);
        put(&fresh, b"1").await;
        drop(fresh);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

        let kept = layout(dir.path(), None);
        let descriptor = put(&kept, b"1").await;
        kept.tag(&descriptor).unwrap();
        let given_up = layout(dir.path(), None);
        put(&given_up, b"1").await;
        let other = put(&given_up, b"2").await;
        drop(given_up);
        assert!(kept.has_blob(&descriptor));
        assert!(!kept.has_blob(&other));
    }

    #[tokio::test]
    async fn damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path(), None);
        let descriptor = put(&layout, b"content").await;
        let path = dir
            .path()
            .join("blobs/sha256")
            .join(descriptor.digest.hex());
        for (damaged, is_digest) in [("CONTENT", true), ("conten", false), ("contents", false)] {
            std::fs::write(&path, damaged).unwrap();
            let mut blob = layout.open_blob(&descriptor).unwrap();
            let error = loop {
                match blob.next().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("{damaged} accepted"),
                    Err(error) => break error,
                }
            };
            assert_eq!(
                matches!(error, OciError::Digest { .. }),
                is_digest,
                "{error}"
            );
            assert!(layout.read_small(&descriptor, 100).is_err());
        }
        let wrong = Descriptor::of(OCI_CONFIG, b"other");
        let source = BlobSource::Bytes(Bytes::from_static(b"thing"));
        let error = layout
            .write_blob(&source, &wrong.digest, 5, &|_| {})
            .await
            .unwrap_err();
        assert!(matches!(error, OciError::Digest { .. }));
        assert_eq!(
            std::fs::read_dir(dir.path().join("blobs/sha256"))
                .unwrap()
                .count(),
            1
        );
        layout.tag(&descriptor).unwrap();
    }
}
