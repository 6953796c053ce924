//! The bootstrap layer of an image: a gzip-compressed tar with the image's
//! metadata, unpacked into the cache directory.
//!
//! Two kinds of members matter (`docs/format.md`, "Images in registries"):
//! `image/image.boot`, the bootstrap, and `image/<blob id>.blob.meta`, the chunk
//! tables that save a request per blob later. Everything else is skipped; no
//! path of the archive is ever used as a path.
//!
//! Promises: a file appears under its name complete and on disk, or not at all;
//! no member, and no bomb, writes more than [`MAX_MEMBER`] bytes.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context as _, bail};
use flate2::read::MultiGzDecoder;
use storage::BlobId;

/// Largest member that is unpacked, in bytes: a bootstrap of some ten million files.
const MAX_MEMBER: u64 = 4 << 30;
/// Most members that are looked at: a bootstrap and 254 chunk tables, and a margin.
const MAX_MEMBERS: usize = 4096;

/// Name of the bootstrap in its directory.
pub(super) const BOOTSTRAP: &str = "image.boot";
/// What the name of a chunk table file ends in.
const CHUNK_TABLE: &str = ".blob.meta";

/// What a member is.
#[derive(Debug, PartialEq, Eq)]
enum Member {
    Bootstrap,
    /// File name of a chunk table.
    ChunkTable(String),
    Other,
}

/// Unpacks the verified layer file `layer`: the bootstrap into `image_dir`, and
/// chunk tables that are not there yet into `cache_dir`. Both must exist.
///
/// # Errors
/// When the archive is damaged or has no bootstrap, or a file cannot be written.
pub(super) fn unpack(layer: File, image_dir: &Path, cache_dir: &Path) -> anyhow::Result<()> {
    let mut archive = tar::Archive::new(MultiGzDecoder::new(io::BufReader::new(layer)));
    let mut found = false;
    let entries = archive
        .entries()
        .context("bootstrap layer: no tar archive")?;
    for (index, entry) in entries.enumerate() {
        if index >= MAX_MEMBERS {
            bail!("bootstrap layer: more than {MAX_MEMBERS} members");
        }
        let mut entry = entry.context("bootstrap layer: damaged tar or gzip data")?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        match classify(&entry.path_bytes()) {
            Member::Bootstrap => {
                store(&mut entry, &image_dir.join(BOOTSTRAP), true)?;
                found = true;
            }
            Member::ChunkTable(name) => store(&mut entry, &cache_dir.join(name), false)?,
            Member::Other => {}
        }
    }
    anyhow::ensure!(found, "bootstrap layer: it has no image/{BOOTSTRAP}");
    Ok(())
}

fn classify(path: &[u8]) -> Member {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let name = path.strip_prefix(b"image/").unwrap_or(path);
    if name == BOOTSTRAP.as_bytes() {
        return Member::Bootstrap;
    }
    let table = std::str::from_utf8(name).ok().filter(|name| {
        // A blob id is safe as a file name; that is what its type is for.
        name.strip_suffix(CHUNK_TABLE)
            .is_some_and(|id| BlobId::new(id).is_ok())
    });
    table.map_or(Member::Other, |name| Member::ChunkTable(name.to_owned()))
}

/// Writes a member under `path`, by way of a temporary file beside it.
///
/// * `replace`: whether an existing file is replaced; otherwise it is left alone.
fn store(member: &mut impl Read, path: &Path, replace: bool) -> anyhow::Result<()> {
    if !replace && path.exists() {
        return Ok(());
    }
    let dir = path.parent().context("a file needs a directory")?;
    let failed = || format!("cannot write {}", path.display());
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(failed)?;
    // One byte more than allowed is enough to see that it is too much.
    let copied = io::copy(&mut member.take(MAX_MEMBER + 1), &mut file).with_context(failed)?;
    anyhow::ensure!(copied > 0, "bootstrap layer: {} is empty", path.display());
    anyhow::ensure!(
        copied <= MAX_MEMBER,
        "bootstrap layer: {} is larger than {MAX_MEMBER} bytes",
        path.display()
    );
    file.as_file().sync_all().with_context(failed)?;
    file.persist(path)
        .map_err(|err| err.error)
        .with_context(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn layer(members: &[(&str, &[u8])]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        let mut tar = tar::Builder::new(GzEncoder::new(&mut file, Compression::fast()));
        for (name, data) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len().try_into().unwrap());
            // Not `append_data`: it refuses the paths that this is about.
            let field = &mut header.as_old_mut().name;
            field[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(tar::EntryType::Regular);
            header.set_cksum();
            tar.append(&header, *data).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap();
        file.rewind().unwrap();
        file
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn bootstrap_and_chunk_tables_are_stored() {
        let (image, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(cache.path().join("bb.blob.meta"), "kept").unwrap();
        let layer = layer(&[
            ("image/image.boot", b"boot"),
            ("image/aa.blob.meta", b"table"),
            ("image/bb.blob.meta", b"other"),
            ("image/backend.json", b"{}"),
            ("image/../../evil.blob.meta", b"no"),
            ("image/.hidden.blob.meta", b"no"),
        ]);
        unpack(layer, image.path(), cache.path()).unwrap();
        assert_eq!(files(image.path()), ["image.boot"]);
        assert_eq!(files(cache.path()), ["aa.blob.meta", "bb.blob.meta"]);
        assert_eq!(
            std::fs::read(cache.path().join("bb.blob.meta")).unwrap(),
            b"kept"
        );
        assert_eq!(
            std::fs::read(image.path().join("image.boot")).unwrap(),
            b"boot"
        );
    }

    #[test]
    fn bad_layers_are_refused_without_a_trace() {
        let (image, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut noise = tempfile::tempfile().unwrap();
        noise.write_all(b"no gzip at all").unwrap();
        noise.rewind().unwrap();
        let long = vec![7; 1 << 20];
        let mut cut = layer(&[("image.boot", &long)]);
        let len = cut.seek(io::SeekFrom::End(0)).unwrap();
        cut.set_len(len / 2).unwrap();
        cut.rewind().unwrap();
        for (layer, wanted) in [
            (noise, "damaged"),
            (layer(&[("image/other", b"x")]), "has no image/image.boot"),
            (layer(&[("image/image.boot", b"")]), "is empty"),
            (cut, "cannot write"),
        ] {
            let err = format!(
                "{:#}",
                unpack(layer, image.path(), cache.path()).unwrap_err()
            );
            assert!(err.contains(wanted), "{err}");
            assert_eq!(files(image.path()), Vec::<String>::new());
        }
    }
}
