//! What a mount needs from an image: its Nydus manifest, and the bootstrap in it.
//!
//! [`find_nydus_manifest`] picks the manifest for a platform; [`fetch_bootstrap`]
//! unpacks `image/image.boot` and the `image/*.blob.meta` files of its last layer.
//!
//! Promises: members are recognised by their exact names, so nothing can be written
//! elsewhere; sizes are bounded; files appear only after the digest of the whole
//! layer was right. Layout of the layer: `docs/format-image.md`, "Bootstrap layer".
#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::content::ContentDigest;
use super::error::OciError;
use super::manifest::{Descriptor, Document, Manifest, Platform};
use super::{Images, layer};
use crate::BlobId;

/// Largest compressed bootstrap layer accepted, in bytes.
const MAX_LAYER: u64 = 4 << 30;
/// Largest bootstrap accepted, in bytes: metadata of some ten million files.
const MAX_BOOTSTRAP: u64 = 8 << 30;
/// Largest chunk table accepted, in bytes: 2^24 chunks of 24 bytes, contexts, header.
const MAX_BLOB_META: u64 = 1 << 30;
/// An archive of more members is no bootstrap layer.
const MAX_MEMBERS: usize = 4096;
/// Manifests of one index that are looked at.
const MAX_CANDIDATES: usize = 16;
/// Images of one index that are taken when all are wanted.
const MAX_IMAGES: usize = 128;

/// Name of the bootstrap file, in its directory.
const BOOTSTRAP: &str = "image.boot";
/// Suffix of chunk tables.
const BLOB_META: &str = ".blob.meta";

/// The manifest of a Nydus image, for one platform.
#[derive(Clone, Debug)]
pub struct NydusManifest {
    /// Points at the manifest.
    pub descriptor: Descriptor,
    /// Its content.
    pub manifest: Manifest,
    /// The layer that holds the bootstrap.
    pub bootstrap: Descriptor,
}

impl NydusManifest {
    /// Digests of the data blobs, lowest layer first.
    pub fn blobs(&self) -> impl Iterator<Item = &ContentDigest> {
        let count = self.manifest.layers.len().saturating_sub(1);
        self.manifest
            .layers
            .iter()
            .take(count)
            .map(|layer| &layer.digest)
    }
}

/// Files unpacked from a bootstrap layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapFiles {
    /// The bootstrap.
    pub bootstrap: PathBuf,
    /// Chunk tables (`<blob>.blob.meta`), by blob.
    pub blob_metas: Vec<(BlobId, PathBuf)>,
}

/// Finds the Nydus manifest for `platform` behind the reference of `images`.
///
/// In an index, entries marked as Nydus images come first, then all others for the
/// platform; the first whose last layer is a bootstrap is taken.
///
/// # Errors
/// [`OciError::NotNydus`] if there is none, and what [`Images::resolve`] may meet.
pub async fn find_nydus_manifest(
    images: &Images,
    reference: &super::ImageRef,
    platform: &Platform,
) -> Result<NydusManifest, OciError> {
    let at = reference.to_string();
    let (descriptor, bytes) = images.resolve().await?;
    let index = match Document::parse(&at, &bytes)? {
        Document::Manifest(manifest) => {
            return accept(descriptor, manifest).ok_or(OciError::NotNydus {
                at,
                detail: String::new(),
            });
        }
        Document::Index(index) => index,
    };
    let matches = |entry: &&Descriptor| {
        entry
            .platform()
            .is_none_or(|offered| platform.accepts(&offered))
    };
    let mut candidates: Vec<_> = index.manifests.iter().filter(matches).collect();
    // Stable: within both groups the order of the index decides.
    candidates.sort_by_key(|entry| !entry.is_marked_nydus());
    for entry in candidates
        .into_iter()
        .filter(|entry| !entry.is_index())
        .take(MAX_CANDIDATES)
    {
        let bytes = images.manifest(entry).await?;
        if let Document::Manifest(manifest) = Document::parse(entry.digest.as_str(), &bytes)?
            && let Some(found) = accept(entry.clone(), manifest)
        {
            return Ok(found);
        }
    }
    Err(OciError::NotNydus {
        at,
        detail: format!(" for {platform}"),
    })
}

/// All Nydus manifests behind the reference of `images` that are for one of `platforms`,
/// or for any if there are none.
///
/// # Errors
/// As for [`find_nydus_manifest`].
pub async fn find_nydus_manifests(
    images: &Images,
    reference: &super::ImageRef,
    platforms: &[Platform],
) -> Result<Vec<NydusManifest>, OciError> {
    let at = reference.to_string();
    let (descriptor, bytes) = images.resolve().await?;
    let entries = match Document::parse(&at, &bytes)? {
        Document::Manifest(manifest) => {
            let found = accept(descriptor, manifest).into_iter().collect();
            return some_of(found, at, platforms);
        }
        Document::Index(index) => index.manifests,
    };
    let wanted = |entry: &Descriptor| match entry.platform() {
        Some(offered) if !platforms.is_empty() => platforms.iter().any(|it| it.accepts(&offered)),
        _ => true,
    };
    let mut found = Vec::new();
    for entry in entries.iter().filter(|entry| !entry.is_index()) {
        if !wanted(entry) {
            continue;
        }
        if found.len() >= MAX_IMAGES {
            let reason = format!("more than {MAX_IMAGES} images");
            return Err(OciError::malformed(at, reason));
        }
        let bytes = images.manifest(entry).await?;
        if let Document::Manifest(manifest) = Document::parse(entry.digest.as_str(), &bytes)? {
            found.extend(accept(entry.clone(), manifest));
        }
    }
    some_of(found, at, platforms)
}

/// Nothing found is an error.
fn some_of(
    found: Vec<NydusManifest>,
    at: String,
    platforms: &[Platform],
) -> Result<Vec<NydusManifest>, OciError> {
    if !found.is_empty() {
        return Ok(found);
    }
    let names: Vec<_> = platforms.iter().map(Platform::to_string).collect();
    let detail = match names.is_empty() {
        true => String::new(),
        false => format!(" for {}", names.join(" or ")),
    };
    Err(OciError::NotNydus { at, detail })
}

fn accept(descriptor: Descriptor, manifest: Manifest) -> Option<NydusManifest> {
    let bootstrap = manifest.bootstrap_layer()?.clone();
    Some(NydusManifest {
        descriptor,
        manifest,
        bootstrap,
    })
}

/// Downloads the bootstrap layer and unpacks it into `dir`, which must exist.
///
/// Files of the same names in `dir` are replaced.
///
/// # Errors
/// What the download may meet, [`OciError::Malformed`] for an archive that is none or
/// lacks the bootstrap, [`OciError::TooLarge`], [`OciError::Io`].
pub async fn fetch_bootstrap(
    images: &Images,
    image: &NydusManifest,
    dir: &Path,
) -> Result<BootstrapFiles, OciError> {
    let layer = &image.bootstrap;
    let at = format!("bootstrap layer {}", layer.digest);
    if layer.size > MAX_LAYER {
        return Err(OciError::TooLarge {
            at,
            limit: MAX_LAYER,
        });
    }
    let reader = images.blob_stream(layer)?.into_reader();
    let dir = dir.to_owned();
    let work = tokio::task::spawn_blocking(move || extract(&at, reader, &dir));
    work.await
        .map_err(|err| OciError::malformed("bootstrap layer", err))?
}

/// Unpacks the bootstrap layer `layer` into `dir`; `at` names it in errors.
///
/// # Errors
/// As [`fetch_bootstrap`]. An [`OciError`] inside an error of `layer` is passed on as it is.
pub fn extract(at: &str, layer: impl Read + Send, dir: &Path) -> Result<BootstrapFiles, OciError> {
    let unreadable = |error: io::Error| match error.downcast::<OciError>() {
        Ok(error) => error,
        Err(error) => OciError::malformed(at, format_args!("cannot be unpacked: {error}")),
    };
    let mut tar = tar::Archive::new(layer::decode(layer).map_err(unreadable)?);
    let mut unpacked = Vec::new();
    for (count, member) in tar.entries().map_err(unreadable)?.enumerate() {
        let mut member = member.map_err(unreadable)?;
        if count >= MAX_MEMBERS {
            return Err(OciError::malformed(
                at,
                format_args!("more than {MAX_MEMBERS} members"),
            ));
        }
        let Some(name) =
            wanted(&member.path_bytes()).filter(|_| member.header().entry_type().is_file())
        else {
            continue;
        };
        let limit = if name == BOOTSTRAP {
            MAX_BOOTSTRAP
        } else {
            MAX_BLOB_META
        };
        if member.size() > limit {
            return Err(OciError::TooLarge {
                at: format!("{name} in {at}"),
                limit,
            });
        }
        if unpacked.iter().any(|(known, _)| *known == name) {
            return Err(OciError::malformed(
                at,
                format_args!("{name} is in it twice"),
            ));
        }
        let size = member.size();
        let mut file = NamedTempFile::new_in(dir).map_err(OciError::io(dir, "creating a file"))?;
        if copy(&mut member, &mut file, dir, unreadable)? != size {
            return Err(OciError::malformed(at, format_args!("{name} is cut off")));
        }
        unpacked.push((name, file));
    }
    // Reading on to the end makes the reader check the digest.
    io::copy(&mut tar.into_inner(), &mut io::sink()).map_err(unreadable)?;
    if !unpacked.iter().any(|(name, _)| name == BOOTSTRAP) {
        return Err(OciError::malformed(
            at,
            format_args!("no image/{BOOTSTRAP} in it"),
        ));
    }
    publish(unpacked, dir)
}

/// Copies, and tells failures of the archive from failures of the disk.
fn copy(
    from: &mut impl Read,
    to: &mut NamedTempFile,
    dir: &Path,
    unreadable: impl Fn(io::Error) -> OciError,
) -> Result<u64, OciError> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(error)),
        };
        io::Write::write_all(to, &buffer[..count]).map_err(OciError::io(dir, "writing"))?;
        total += super::content::byte_len(&buffer[..count]);
    }
}

/// The plain file name of a member that belongs to a bootstrap layer.
fn wanted(path: &[u8]) -> Option<String> {
    let path = std::str::from_utf8(path).ok()?;
    let path = path.strip_prefix("./").unwrap_or(path);
    // The oldest images have the bootstrap at the top.
    if path == BOOTSTRAP {
        return Some(path.to_owned());
    }
    let name = path.strip_prefix("image/")?;
    let is_meta = name
        .strip_suffix(BLOB_META)
        .is_some_and(|id| BlobId::new(id).is_ok());
    (name == BOOTSTRAP || is_meta).then(|| name.to_owned())
}

/// Gives the files their names.
fn publish(unpacked: Vec<(String, NamedTempFile)>, dir: &Path) -> Result<BootstrapFiles, OciError> {
    let mut files = BootstrapFiles {
        bootstrap: dir.join(BOOTSTRAP),
        blob_metas: Vec::new(),
    };
    for (name, file) in unpacked {
        let path = dir.join(&name);
        file.persist(&path)
            .map_err(|err| OciError::io(&path, "renaming into place")(err.error))?;
        if let Some(id) = name
            .strip_suffix(BLOB_META)
            .and_then(|id| BlobId::new(id).ok())
        {
            files.blob_metas.push((id, path));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tar with the given members; `kind` overrides the type of entry.
    fn tar_of(members: &[(&str, &[u8], tar::EntryType)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, data, kind) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(u64::try_from(data.len()).unwrap());
            header.set_entry_type(*kind);
            header.set_mode(0o444);
            // `set_path` refuses the names that matter most here.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;

    #[test]
    fn the_two_kinds_of_files_are_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let layer = tar_of(&[
            ("image/", b"", tar::EntryType::Directory),
            ("image/image.boot", b"boot", FILE),
            ("image/abc.blob.meta", b"meta", FILE),
            ("image/backend.json", b"{}", FILE),
        ]);
        let files = extract("x", layer.as_slice(), dir.path()).unwrap();
        assert_eq!(std::fs::read(&files.bootstrap).unwrap(), b"boot");
        let (id, path) = &files.blob_metas[0];
        assert_eq!(
            (id.as_str(), std::fs::read(path).unwrap()),
            ("abc", b"meta".to_vec())
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn nothing_is_written_outside_or_through_links() {
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("dir");
        std::fs::create_dir(&dir).unwrap();
        let layer = tar_of(&[
            ("../escaped", b"x", FILE),
            ("/etc/escaped", b"x", FILE),
            ("image/../../escaped.blob.meta", b"x", FILE),
            ("image/..blob.meta", b"x", FILE),
            ("image/a/b.blob.meta", b"x", FILE),
            ("image/link.blob.meta", b"", tar::EntryType::Symlink),
            ("image/dir.blob.meta", b"", tar::EntryType::Directory),
            ("./image/image.boot", b"boot", FILE),
        ]);
        let files = extract("x", layer.as_slice(), &dir).unwrap();
        assert_eq!(files.blob_metas, []);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
        assert_eq!(std::fs::read_dir(outer.path()).unwrap().count(), 1);
    }

    #[test]
    fn damaged_layers_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let good = tar_of(&[("image/image.boot", &[7; 2000], FILE)]);
        let mut huge = good.clone();
        let mut header = tar::Header::from_byte_slice(&good[..512]).clone();
        header.set_size(MAX_BOOTSTRAP + 1);
        header.set_cksum();
        huge[..512].copy_from_slice(header.as_bytes());
        let mut noise = good.clone();
        noise[..512].fill(b'x');
        for bad in [
            &good[..700],
            &good[..512],
            &huge,
            &noise,
            &tar_of(&[("image/x", b"", FILE)]),
            b"",
        ] {
            assert!(extract("x", bad, dir.path()).is_err());
        }
        let twice = tar_of(&[("image.boot", b"1", FILE), ("image/image.boot", b"2", FILE)]);
        assert!(extract("x", twice.as_slice(), dir.path()).is_err());

        /// Ends like a stream whose digest is wrong.
        struct Wrong<'a>(&'a [u8]);
        impl Read for Wrong<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                match self.0.read(buffer)? {
                    0 => Err(io::Error::other(OciError::NotFound {
                        at: "digest".into(),
                    })),
                    count => Ok(count),
                }
            }
        }
        let error = extract("x", Wrong(&good), dir.path()).unwrap_err();
        assert!(
            matches!(error, OciError::NotFound { .. }),
            "the inner error survives: {error}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
