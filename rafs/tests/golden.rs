//! The golden image of `docs/format.md`, "Golden image": written by hand from
//! its description, it must come out byte for byte, and read back.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::BTreeMap;

use rafs::tree::{Attr, ChunkRecord, Content, Inode, InodeId, Tree};
use rafs::writer::{WriteOptions, write};
use rafs::{FileKind, Image};
use storage::blob_info::MetaLocation;
use storage::{
    BlobFeatures, BlobId, BlobIndex, BlobInfo, ChunkIndex, Compressor, Digest, Digester,
};

/// The image as another writer of the format produced it.
const GOLDEN: &[u8] = include_bytes!("data/tiny.boot");

/// SHA-256 of [`GOLDEN`].
const GOLDEN_SHA256: &str = "25e9716add6ee3a4630caa3a876491dbfcc99e67517f8ff86ad246e7ed3951f6";

fn blob() -> BlobInfo {
    let toc_digest = [
        0x45, 0xdd, 0x9c, 0x85, 0x1a, 0xcd, 0xf6, 0x2e, 0x89, 0xfb, 0x0f, 0xbe, 0xfe, 0x81, 0xc2,
        0x5d, 0x6b, 0x33, 0x39, 0xb1, 0x18, 0x3f, 0xdc, 0xee, 0xf7, 0x2c, 0x65, 0x0f, 0xbc, 0x1a,
        0x26, 0x46,
    ];
    BlobInfo {
        id: BlobId::new("44d6bea12e95e178233b95b8c249d0e49274a65e4c5316ac7b385eb7b7f91846")
            .unwrap(),
        chunk_size: 0x1000,
        chunk_count: 3,
        compressor: Compressor::None,
        digester: Digester::Blake3,
        features: BlobFeatures::from_bits(0x7000_0021),
        compressed_size: 11803,
        uncompressed_size: 12288,
        meta: MetaLocation {
            compressor: Compressor::None,
            offset: 5515,
            compressed_size: 48,
            uncompressed_size: 48,
        },
        toc_size: 1024,
        toc_digest: Digest::from_bytes(toc_digest),
        meta_blob_digest: Digest::default(),
        meta_blob_size: 0,
    }
}

fn chunk(index: u32, data: &[u8], compressed_offset: u64, file_offset: u64) -> ChunkRecord {
    let size = u32::try_from(data.len()).unwrap();
    ChunkRecord {
        digest: Digest::of(Digester::Blake3, data),
        blob: BlobIndex::new(0),
        index: ChunkIndex::new(index),
        compressed: false,
        compressed_size: size,
        uncompressed_size: size,
        compressed_offset,
        uncompressed_offset: u64::from(index) * 4096,
        file_offset,
        crc32c: Some(crc32c::crc32c(data)),
    }
}

fn attr(permissions: u16) -> Attr {
    Attr {
        permissions,
        mtime: 1_700_000_000,
        mtime_nsec: 123,
        ..Attr::default()
    }
}

fn add(tree: &mut Tree, path: &[u8], permissions: u16, content: Content) -> InodeId {
    let inode = Inode::new(attr(permissions), content);
    let (dir, name) = match path {
        [b'd', b'/', name @ ..] => (tree.lookup(b"d").unwrap(), name),
        name => (tree.root(), name),
    };
    tree.insert(dir, name, inode).unwrap()
}

fn tiny_tree() -> Tree {
    let mut tree = Tree::new(Attr {
        permissions: 0o755,
        ..Attr::default()
    });
    tree.blobs.push(blob());
    let f = vec![
        tree.add_chunk(chunk(0, &[b'A'; 4096], 0, 0)),
        tree.add_chunk(chunk(1, &[b'B'; 904], 4096, 4096)),
    ];
    let x = vec![tree.add_chunk(chunk(2, b"hi\n", 5000, 0))];
    add(&mut tree, b"c", 0o620, Content::CharDevice(0x103));
    add(&mut tree, b"d", 0o755, Content::directory());
    let empty = Content::File {
        size: 0,
        chunks: vec![],
    };
    add(&mut tree, b"d/e", 0o644, empty);
    let f = Content::File {
        size: 5000,
        chunks: f,
    };
    let f = add(&mut tree, b"f", 0o644, f);
    tree.inode_mut(f).attr.uid = 1000;
    tree.inode_mut(f).attr.gid = 100;
    tree.link(tree.root(), b"g", f).unwrap();
    add(
        &mut tree,
        b"l",
        0o777,
        Content::Symlink(b"target"[..].into()),
    );
    add(&mut tree, b"p", 0o600, Content::Fifo);
    let x = Content::File { size: 3, chunks: x };
    let x = add(&mut tree, b"x", 0o644, x);
    tree.inode_mut(x).xattrs = BTreeMap::from([(b"user.k"[..].into(), b"v1"[..].into())]);
    tree
}

fn options() -> WriteOptions {
    WriteOptions {
        chunk_size: 0x1000,
        compressor: Compressor::None,
        ..WriteOptions::default()
    }
}

#[test]
fn the_tiny_tree_is_written_byte_for_byte() {
    let bytes = write(&tiny_tree(), &options()).unwrap();
    if let Some((at, _)) = bytes
        .iter()
        .zip(GOLDEN)
        .enumerate()
        .find(|(_, (a, b))| a != b)
    {
        let line = at / 16 * 16;
        panic!(
            "differs at {at:#x}: {:02x?} instead of {:02x?}",
            &bytes[line..line + 16],
            &GOLDEN[line..line + 16]
        );
    }
    assert_eq!(bytes.len(), GOLDEN.len());
    let digest = Digest::of(Digester::Sha256, &bytes).to_string();
    assert_eq!(digest, GOLDEN_SHA256);
}

#[test]
fn the_golden_image_reads_back() {
    let image = Image::from_bytes(GOLDEN.to_vec()).unwrap();
    assert_eq!(image.blobs(), [blob()]);
    assert_eq!((image.inode_count(), image.chunk_size()), (9, 4096));
    assert_eq!(image.root().get(), 128);
    let find = |name: &[u8]| image.lookup(image.root(), name).unwrap().unwrap();

    let c = image.inode(find(b"c")).unwrap();
    assert_eq!((c.kind(), c.rdev()), (FileKind::CharDevice, 0x103));
    assert_eq!(c.mode(), 0o20620);
    assert_eq!(c.attr(), attr(0o620));
    assert_eq!(find(b"f"), find(b"g"));
    let f = image.inode(find(b"f")).unwrap();
    assert_eq!((f.nlink(), f.size(), f.attr().uid), (2, 5000, 1000));
    assert_eq!(image.readlink(find(b"l")).unwrap(), b"target");
    assert_eq!(
        image.xattr(find(b"x"), b"user.k").unwrap(),
        Some(&b"v1"[..])
    );
    assert_eq!(image.xattr(find(b"x"), b"user.").unwrap(), None);
    assert_eq!(image.lookup(image.root(), b"zzz").unwrap(), None);
    assert_eq!(image.parent(find(b"d")).unwrap(), image.root());
    assert_eq!(image.parent(image.root()).unwrap(), image.root());

    let extents: Vec<_> = image
        .extents(find(b"f"), 4000..9000)
        .map(Result::unwrap)
        .map(|e| (e.chunk.get(), e.plain, e.chunk_offset, e.file_offset))
        .collect();
    assert_eq!(
        extents,
        [(0, 4000..4096, 4000, 4000), (1, 4096..5000, 0, 4096)]
    );
}
