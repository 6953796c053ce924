//! The bootstrap layer: layers merged into one bootstrap, packed as a tar.gz.
//!
//! Promises: equal layers give equal bytes: nothing in the archive depends on the
//! time, the user or the machine.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use flate2::{Compression, GzBuilder};
use rafs::merge::{WhiteoutSpec, apply};
use rafs::tree::{Attr, Tree};
use rafs::writer::{BlobOrder, WriteOptions, write};
use sha2::{Digest as _, Sha256};
use storage::Digest;
use storage::oci::ContentDigest;

use super::layer::Converted;
use crate::build::BuildOptions;

/// Attributes of the root of an image without any layer.
const EMPTY_ROOT: Attr = Attr {
    permissions: 0o755,
    uid: 0,
    gid: 0,
    mtime: 0,
    mtime_nsec: 0,
};

/// A bootstrap layer, ready to be sent.
#[derive(Debug)]
pub(super) struct Packed {
    /// The tar.gz, without a name.
    pub(super) file: Arc<File>,
    /// Its length.
    pub(super) size: u64,
    /// Its digest.
    pub(super) digest: ContentDigest,
    /// The digest of the tar inside.
    pub(super) diff_id: ContentDigest,
}

/// Merges `layers`, lowest first, into the bootstrap of an image.
pub(super) fn merged(layers: &[Arc<Converted>], options: &BuildOptions) -> anyhow::Result<Vec<u8>> {
    let mut tree: Option<Tree> = None;
    for layer in layers {
        match &mut tree {
            None => tree = Some(layer.tree.clone()),
            Some(lower) => apply(lower, layer.tree.clone(), WhiteoutSpec::Oci)
                .with_context(|| format!("cannot merge layer {}", layer.source))?,
        }
    }
    let tree = tree.unwrap_or_else(|| Tree::new(EMPTY_ROOT));
    let options = WriteOptions {
        blob_order: BlobOrder::FirstUse,
        ..options.write_options(&tree)
    };
    write(&tree, &options).context("cannot write the merged bootstrap")
}

/// Packs a bootstrap and the chunk tables of `layers` into a file in `work_dir`.
pub(super) fn pack(
    bootstrap: &[u8],
    layers: &[Arc<Converted>],
    work_dir: &Path,
) -> anyhow::Result<Packed> {
    let in_dir = || format!("cannot write a temporary file in {}", work_dir.display());
    let file = tempfile::tempfile_in(work_dir).with_context(in_dir)?;
    let stored = Hashing::new(BufWriter::new(&file));
    // No name and no time in the header; the level is part of what makes digests equal.
    let gzip = GzBuilder::new().mtime(0).write(stored, Compression::new(6));
    let mut tar = tar::Builder::new(Hashing::new(gzip));
    let append = |tar: &mut tar::Builder<_>, name: &str, data: &[u8]| {
        tar.append(&header(name, data, tar::EntryType::Regular, 0o444)?, data)
    };
    let mut write = || -> io::Result<()> {
        tar.append(
            &header("image/", &[], tar::EntryType::Directory, 0o755)?,
            io::empty(),
        )?;
        append(&mut tar, "image/image.boot", bootstrap)?;
        let mut done: Vec<&ContentDigest> = Vec::new();
        for layer in layers.iter().filter(|layer| !layer.chunk_table.is_empty()) {
            // Equal layers have one blob.
            if !done.contains(&layer.data()) {
                done.push(layer.data());
                let name = format!("image/{}.blob.meta", layer.data().hex());
                append(&mut tar, &name, &layer.chunk_table)?;
            }
        }
        Ok(())
    };
    write().with_context(in_dir)?;
    let (gzip, diff_id, _) = tar.into_inner().with_context(in_dir)?.finish();
    let (mut stored, digest, size) = gzip.finish().with_context(in_dir)?.finish();
    stored.flush().with_context(in_dir)?;
    drop(stored);
    Ok(Packed {
        file: Arc::new(file),
        size,
        digest,
        diff_id,
    })
}

/// A header without owner and time.
fn header(name: &str, data: &[u8], kind: tar::EntryType, mode: u32) -> io::Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(data.len() as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    Ok(header)
}

/// Passes bytes on, and hashes and counts them.
struct Hashing<W> {
    inner: W,
    hasher: Sha256,
    count: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            count: 0,
        }
    }

    fn finish(self) -> (W, ContentDigest, u64) {
        let digest = Digest::from_bytes(self.hasher.finalize().into());
        (self.inner, ContentDigest::from_sha256(&digest), self.count)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(data)?;
        self.hasher.update(&data[..written]);
        self.count += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};

    use super::*;

    fn converted(byte: &str, chunk_table: &[u8]) -> Arc<Converted> {
        Arc::new(Converted {
            source: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
            tree: Tree::new(EMPTY_ROOT),
            in_place: false,
            digest: format!("sha256:{}", byte.repeat(32)).parse().unwrap(),
            size: 1,
            chunk_table: chunk_table.to_vec(),
            file: None,
        })
    }

    #[test]
    fn the_archive_is_exactly_what_snapshotters_expect() {
        let dir = tempfile::tempdir().unwrap();
        let layers = [
            converted("11", b"one"),
            converted("22", b""),
            converted("11", b"one"),
        ];
        let packed = pack(b"boot", &layers, dir.path()).unwrap();
        let again = pack(b"boot", &layers, dir.path()).unwrap();
        assert_eq!(packed.digest, again.digest);

        let mut file = &*packed.file;
        file.rewind().unwrap();
        let mut stored = Vec::new();
        file.read_to_end(&mut stored).unwrap();
        assert_eq!(stored.len() as u64, packed.size);
        assert_eq!(ContentDigest::of(&stored), packed.digest);
        assert_eq!(stored[3..8], [0; 5], "no name, no time");
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(stored.as_slice())
            .read_to_end(&mut plain)
            .unwrap();
        assert_eq!(ContentDigest::of(&plain), packed.diff_id);

        let mut found = Vec::new();
        for entry in tar::Archive::new(plain.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut data = String::new();
            entry.read_to_string(&mut data).unwrap();
            let header = entry.header();
            assert_eq!(
                (
                    header.uid().unwrap(),
                    header.gid().unwrap(),
                    header.mtime().unwrap()
                ),
                (0, 0, 0)
            );
            let path = entry.path().unwrap().display().to_string();
            found.push((
                path,
                header.entry_type().is_dir(),
                header.mode().unwrap(),
                data,
            ));
        }
        let meta = format!("image/{}.blob.meta", "11".repeat(32));
        let expected = [
            ("image/".to_owned(), true, 0o755, String::new()),
            (
                "image/image.boot".to_owned(),
                false,
                0o444,
                "boot".to_owned(),
            ),
            (meta, false, 0o444, "one".to_owned()),
        ];
        assert_eq!(found, expected);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
