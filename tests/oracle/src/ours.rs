//! Reads an image with our library, in the same form as `read.rs`.
//!
//! The tree comes from `rafs`; content comes through extents from the expanded
//! blobs, so each extent is also compared with the chunk table. Every inode is
//! found both by listing and by lookup.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rafs::units::Nid;
use rafs::{FileKind, Image};
use storage::BlobIndex;

use crate::describe::{Entry, FileFacts, hash, join, name_hard_links, text};
use crate::expand::{self, Blob};

/// Reads the image at `boot` (a bootstrap, or a blob with an inlined one) whose
/// blobs are in `blob_dir`, and describes all of it.
pub fn image(boot: &Path, blob_dir: &Path) -> Result<Vec<Entry>> {
    let image = expand::open(boot)?;
    image.verify_tree().context("verify")?;
    let mut blobs = Vec::new();
    for index in (0..image.blobs().len()).map(u32::try_from) {
        let blob = Blob::open(&image, BlobIndex::new(index?), blob_dir)?;
        let plain = blob
            .plain()
            .with_context(|| format!("blob {}", blob.info().id))?;
        blobs.push((blob, plain));
    }
    let reader = Reader { image, blobs };
    let mut found = Vec::new();
    reader.walk(reader.image.root(), b"/", &mut found)?;
    found.sort_by(|a, b| a.0.path.cmp(&b.0.path));
    let (mut tree, inodes): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    name_hard_links(&mut tree, &inodes);
    Ok(tree)
}

struct Reader {
    image: Arc<Image>,
    /// Each blob with its uncompressed address space.
    blobs: Vec<(Blob, Vec<u8>)>,
}

impl Reader {
    fn walk(&self, nid: Nid, path: &[u8], found: &mut Vec<(Entry, u64)>) -> Result<()> {
        let entry = self.entry(nid, path).with_context(|| text(path))?;
        let is_dir = entry.is_dir();
        found.push((entry, nid.get()));
        if is_dir {
            for (name, child) in self.children(nid).with_context(|| text(path))? {
                let path = join(path, &name);
                let looked_up = self.image.lookup(nid, &name).with_context(|| text(&path))?;
                ensure!(
                    looked_up == Some(child),
                    "{}: lookup finds {looked_up:?}",
                    text(&path)
                );
                self.walk(child, &path, found)?;
            }
        }
        Ok(())
    }

    fn children(&self, dir: Nid) -> Result<BTreeMap<Vec<u8>, Nid>> {
        let mut all = BTreeMap::new();
        self.image.readdir(dir, 0, |entry| {
            if entry.name != b"." && entry.name != b".." {
                all.insert(entry.name.to_vec(), entry.nid);
            }
            ControlFlow::Continue(())
        })?;
        Ok(all)
    }

    fn entry(&self, nid: Nid, path: &[u8]) -> Result<Entry> {
        let inode = self.image.inode(nid)?;
        let attr = inode.attr();
        let mut entry = Entry {
            path: path.to_vec(),
            mode: inode.mode().into(),
            uid: attr.uid,
            gid: attr.gid,
            mtime_ns: i128::from(attr.mtime) * 1_000_000_000 + i128::from(attr.mtime_nsec),
            ..Entry::default()
        };
        match inode.kind() {
            FileKind::File => {
                let content = self.content(nid, inode.size())?;
                let (size, sha256) = hash(content.as_slice())?;
                let nlink = inode.nlink().into();
                entry.file = Some(FileFacts {
                    size,
                    sha256,
                    nlink,
                    same_as: None,
                });
            }
            FileKind::Symlink => entry.target = Some(self.image.readlink(nid)?),
            FileKind::CharDevice | FileKind::BlockDevice => {
                let dev = u64::from(inode.rdev());
                entry.rdev = Some(((dev >> 8) & 0xfff, dev & 0xff | (dev >> 12) & 0xf_ff00));
            }
            FileKind::Directory | FileKind::Fifo | FileKind::Socket => {}
        }
        for xattr in self.image.xattrs(nid)? {
            entry.xattrs.insert(xattr.key(), xattr.value.to_vec());
        }
        Ok(entry)
    }

    fn content(&self, nid: Nid, size: u64) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        for extent in self.image.extents(nid, 0..size) {
            let extent = extent?;
            let at = u64::try_from(content.len())?;
            ensure!(
                extent.file_offset == at,
                "extent at {}, expected {at}",
                extent.file_offset
            );
            let (blob, plain) = self
                .blobs
                .get(extent.blob.as_usize())
                .context("extent of an unknown blob")?;
            let start = blob.plain_offset(extent.chunk)? + extent.chunk_offset;
            ensure!(
                start == extent.plain.start,
                "extent and chunk table disagree: {extent:?}"
            );
            let range = usize::try_from(extent.plain.start)?..usize::try_from(extent.plain.end)?;
            content.extend_from_slice(plain.get(range).context("extent leaves its blob")?);
        }
        Ok(content)
    }
}
