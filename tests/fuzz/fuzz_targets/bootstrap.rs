//! A hostile bootstrap: open, verify, and use everything a mount would use.
//!
//! Beyond "no panic" and bounded memory: what `verify_tree` accepts can be listed, looked up, read
//! and planned without an error.
#![no_main]

use std::ops::ControlFlow;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use rafs::units::Nid;
use rafs::{FileKind, Image, Tree};
use storage::digest::ChunkDigests;
use storage::{BlobIndex, ChunkIndex};

/// Memory that an input may take: what the lists below hold at most, and so many
/// times its length. A directory entry of 13 bytes becomes an inode of the tree.
const BASE: usize = 16 << 20;
const FACTOR: usize = 64;

/// Entries visited at most: a small image can name one directory many times.
const VISITS: usize = 10_000;

/// Extents taken of one file: a file of one block can claim exabytes of one chunk.
const EXTENTS: usize = 1_000;

fuzz_target!(|data: &[u8]| fuzz::memory::bounded(data.len(), BASE, FACTOR, || check(data)));

fn check(data: &[u8]) {
    let Ok(image) = Image::from_bytes(data.to_vec()) else {
        return;
    };
    let image = Arc::new(image);
    let valid = image.verify_tree().is_ok();
    let mut visits = VISITS;
    let mut pending = vec![image.root()];
    while let (Some(nid), Some(left)) = (pending.pop(), visits.checked_sub(1)) {
        visits = left;
        let used = visit(&image, nid, &mut pending);
        assert!(used.is_ok() || !valid, "verified, but {used:?}");
    }
    for nid in image.prefetch().take(EXTENTS) {
        let _ = image.inode(nid);
    }
    for index in 0..image.blobs().len().try_into().unwrap_or(u32::MAX) {
        let digests = image.digests(BlobIndex::new(index));
        let _ = digests.chunk_digest(ChunkIndex::new(0));
        let _ = digests.chunk_digest(ChunkIndex::new(u32::MAX));
    }
    let _ = rafs::dump::dump(&image);
    let tree = Tree::from_image(&image);
    assert!(tree.is_ok() || !valid, "verified, but {:?}", tree.err());
}

fn visit(image: &Image, nid: Nid, pending: &mut Vec<Nid>) -> Result<(), rafs::Error> {
    let inode = image.inode(nid)?;
    for xattr in image.xattrs(nid)? {
        let found = image.xattr(nid, &xattr.key())?;
        assert!(found.is_some(), "a listed attribute is not found");
    }
    match inode.kind() {
        FileKind::Directory => list(image, nid, pending)?,
        FileKind::Symlink => {
            image.readlink(nid)?;
        }
        FileKind::File => {
            let size = inode.size();
            for extent in image.extents(nid, 0..size).take(EXTENTS) {
                let extent = extent?;
                assert!(extent.plain.start < extent.plain.end, "empty extent");
            }
            // The end of the file, and beyond it.
            for extent in image.extents(nid, size.saturating_sub(1)..u64::MAX).take(2) {
                extent?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn list(image: &Image, dir: Nid, pending: &mut Vec<Nid>) -> Result<(), rafs::Error> {
    let mut names = Vec::new();
    image.readdir(dir, 0, |entry| {
        names.push((entry.name.to_vec(), entry.nid, entry.next));
        if names.len() < VISITS {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })?;
    for (name, nid, cookie) in &names {
        image.lookup(dir, name)?;
        if pending.len() < VISITS && name != b"." && name != b".." {
            pending.push(*nid);
        }
        if names.len() < 100 {
            image.readdir(dir, *cookie, |_| ControlFlow::Break(()))?;
        }
    }
    image.lookup(dir, b"no such name")?;
    let _ = image.parent(dir);
    Ok(())
}
