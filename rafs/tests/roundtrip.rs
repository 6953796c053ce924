//! What is written reads back equal, through the tree and through the file system view.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

#[allow(dead_code, reason = "every test uses its part")]
mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use common::{CHUNK, FlatContent, build, flatten, nodes, options};
use proptest::prelude::*;
use rafs::tree::{Attr, Content, Inode, Tree};
use rafs::writer::{BlobOrder, WriteOptions, write};
use rafs::{FileKind, Image, Nid};

/// All paths of an image with their inode numbers, by listing directories.
fn paths(image: &Image) -> BTreeMap<Vec<u8>, Nid> {
    let mut all = BTreeMap::from([(b"/".to_vec(), image.root())]);
    let mut pending = vec![(Vec::new(), image.root())];
    while let Some((path, dir)) = pending.pop() {
        image
            .readdir(dir, 0, |entry| {
                if entry.name != b"." && entry.name != b".." {
                    let path = [&path[..], b"/", entry.name].concat();
                    if entry.kind == FileKind::Directory {
                        pending.push((path.clone(), entry.nid));
                    }
                    all.insert(path, entry.nid);
                }
                ControlFlow::Continue(())
            })
            .unwrap();
    }
    all
}

/// The image shows exactly the tree, entry by entry.
fn assert_shows(image: &Image, tree: &Tree) {
    let expected = flatten(tree);
    let paths = paths(image);
    assert!(paths.keys().eq(expected.keys()));
    for (path, entry) in &expected {
        let nid = paths[path];
        let inode = image.inode(nid).unwrap();
        assert_eq!(inode.attr(), entry.attr);
        assert_eq!(nid, paths[&entry.first_link]);
        let names = expected.values().filter(|e| e.first_link == *path).count();
        let xattrs: BTreeMap<_, _> = image
            .xattrs(nid)
            .unwrap()
            .into_iter()
            .map(|x| (x.key().into_boxed_slice(), x.value.into()))
            .collect();
        assert_eq!(xattrs, entry.xattrs);
        for (key, value) in &entry.xattrs {
            assert_eq!(image.xattr(nid, key).unwrap(), Some(&value[..]));
        }
        match &entry.content {
            FlatContent::Directory => assert_eq!(inode.kind(), FileKind::Directory),
            FlatContent::File(size, chunks) => {
                assert_eq!((inode.kind(), inode.size()), (FileKind::File, *size));
                if entry.first_link == *path {
                    assert_eq!(inode.nlink(), u32::try_from(names).unwrap());
                }
                let extents: Vec<_> = image
                    .extents(nid, 0..u64::MAX)
                    .map(|e| e.unwrap())
                    .map(|e| {
                        let blob = image.blobs()[e.blob.as_usize()].id.clone();
                        (blob, e.chunk, e.plain, e.file_offset)
                    })
                    .collect();
                let records: Vec<_> = chunks
                    .iter()
                    .zip(0..)
                    .map(|((blob, record), position)| {
                        let start = record.uncompressed_offset;
                        let plain = start..start + u64::from(record.uncompressed_size);
                        (
                            blob.clone(),
                            record.index,
                            plain,
                            position * u64::from(CHUNK),
                        )
                    })
                    .collect();
                assert_eq!(extents, records);
            }
            FlatContent::Other(Content::Symlink(target)) => {
                assert_eq!(image.readlink(nid).unwrap(), &target[..]);
            }
            FlatContent::Other(content) => {
                assert_eq!(inode.kind(), content.kind());
                if let Content::CharDevice(number) | Content::BlockDevice(number) = content {
                    assert_eq!(inode.rdev(), *number);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn trees_read_back(nodes in nodes(60), root: u16) {
        let root = Attr { permissions: root & 0o7777, ..Attr::default() };
        let tree = build("blob", root, &nodes);
        let bytes = write(&tree, &options()).unwrap();
        prop_assert_eq!(&bytes, &write(&tree, &options()).unwrap());
        let image = Image::from_bytes(bytes.clone()).unwrap();
        let summary = image.verify_tree().unwrap();
        prop_assert_eq!(summary.names(), image.inode_count());
        assert_shows(&image, &tree);
        let loaded = Tree::from_image(&image).unwrap();
        prop_assert_eq!(flatten(&loaded), flatten(&tree));
        prop_assert_eq!(loaded.blobs.clone(), tree.blobs.clone());
        // Writing what was read gives the same image again.
        prop_assert_eq!(write(&loaded, &options()).unwrap(), bytes);
        rafs::dump::dump(&image).unwrap();
    }

    /// Every cookie resumes behind its entry; any other cookie is harmless.
    #[test]
    fn listings_resume_anywhere(count in 0_usize..700, cookie: u64) {
        let mut tree = Tree::new(Attr::default());
        for i in 0..count {
            let inode = Inode::new(Attr::default(), Content::Fifo);
            let name = format!("{i:05}-a-name-that-fills-blocks");
            tree.insert(tree.root(), name.as_bytes(), inode).unwrap();
        }
        let image = Image::from_bytes(write(&tree, &options()).unwrap()).unwrap();
        let mut all = Vec::new();
        image.readdir(image.root(), 0, |e| {
            all.push((e.name.to_vec(), e.next));
            ControlFlow::Continue(())
        }).unwrap();
        prop_assert_eq!(all.len(), count + 2);
        for (position, (name, next)) in all.iter().enumerate() {
            prop_assert!(image.lookup(image.root(), name).unwrap().is_some());
            let mut following = None;
            image.readdir(image.root(), *next, |e| {
                following = Some(e.name.to_vec());
                ControlFlow::Break(())
            }).unwrap();
            prop_assert_eq!(following.as_ref(), all.get(position + 1).map(|e| &e.0));
        }
        image.readdir(image.root(), cookie, |_| ControlFlow::Continue(())).unwrap();
    }
}

/// Data lengths around the limits of inline placement.
#[test]
fn placement_at_its_limits() {
    for len in [1, 4027, 4032, 4033, 4059, 4060, 4095] {
        let mut tree = Tree::new(Attr::default());
        let link = Content::Symlink(vec![b't'; len].into());
        for name in [b"a", b"b"] {
            let inode = Inode::new(Attr::default(), link.clone());
            tree.insert(tree.root(), name, inode).unwrap();
        }
        let image = Image::from_bytes(write(&tree, &options()).unwrap()).unwrap();
        image.verify_tree().unwrap();
        assert_shows(&image, &tree);
    }
}

/// Directories whose data ends at, just before and just behind a block boundary.
#[test]
fn directories_around_block_boundaries() {
    // `.` and `..` take 27 bytes, every entry 12 and its name.
    for (count, last) in [(20, 0), (40, 0), (15, 30), (15, 84), (15, 85), (15, 200)] {
        let mut tree = Tree::new(Attr::default());
        let mut add = |name: Vec<u8>| {
            let inode = Inode::new(Attr::default(), Content::Fifo);
            tree.insert(tree.root(), &name, inode).unwrap();
        };
        for i in 0..count {
            add(format!("{i:0255}").into_bytes());
        }
        if last > 0 {
            add(vec![b'z'; last]);
        }
        let image = Image::from_bytes(write(&tree, &options()).unwrap()).unwrap();
        image.verify_tree().unwrap();
        assert_shows(&image, &tree);
    }
}

#[test]
fn an_empty_tree_needs_two_blocks() {
    let tree = Tree::new(Attr::default());
    let bytes = write(&tree, &options()).unwrap();
    let image = Image::from_bytes(bytes).unwrap();
    assert_eq!(image.bytes().len(), 8192);
    assert_eq!(image.root().get(), 128);
    assert_eq!(image.blobs(), []);
    assert_eq!(image.verify_tree().unwrap().names(), 1);
}

#[test]
fn prefetch_lists_files_and_directories_in_order() {
    let mut tree = build("blob", Attr::default(), &[]);
    tree.blobs.push(common::blob_info("blob", 1));
    let dir = tree.mkdir_all(b"d", Attr::default()).unwrap();
    let file = Inode::new(Attr::default(), Content::Fifo);
    let file = tree.insert(tree.root(), b"f", file).unwrap();
    let options = WriteOptions {
        prefetch: vec![file, dir],
        ..options()
    };
    let image = Image::from_bytes(write(&tree, &options).unwrap()).unwrap();
    let find = |name: &[u8]| image.lookup(image.root(), name).unwrap().unwrap();
    let prefetch: Vec<_> = image.prefetch().collect();
    assert_eq!(prefetch, [find(b"f"), find(b"d")]);
}

#[test]
fn blobs_follow_their_first_use() {
    let file = |name: &str, size| {
        let kind = common::Kind::File {
            size,
            contiguous: true,
        };
        let node = common::Node {
            attr: Attr::default(),
            xattrs: BTreeMap::new(),
            kind,
        };
        (0, name.as_bytes().to_vec(), node)
    };
    let mut tree = build("last", Attr::default(), &[file("z", 5000)]);
    for (blob, name) in [("unused", "y"), ("first", "a")] {
        let upper = build(blob, Attr::default(), &[file(name, 9000)]);
        rafs::merge::apply(&mut tree, upper, rafs::merge::WhiteoutSpec::Oci).unwrap();
    }
    tree.unlink(tree.root(), b"y");
    let options = WriteOptions {
        blob_order: BlobOrder::FirstUse,
        ..options()
    };
    let image = Image::from_bytes(write(&tree, &options).unwrap()).unwrap();
    let ids: Vec<_> = image.blobs().iter().map(|b| b.id.as_str()).collect();
    assert_eq!(ids, ["first", "last"]);
    image.verify_tree().unwrap();
    assert_shows(&image, &tree);
}

#[test]
fn digests_are_found_by_blob_and_chunk() {
    use storage::digest::ChunkDigests;
    let kind = common::Kind::File {
        size: 40_000,
        contiguous: false,
    };
    let node = common::Node {
        attr: Attr::default(),
        xattrs: BTreeMap::new(),
        kind,
    };
    let tree = build("blob", Attr::default(), &[(0, b"f".to_vec(), node)]);
    let image = Image::from_bytes(write(&tree, &options()).unwrap()).unwrap();
    let digests = std::sync::Arc::new(image).digests(storage::BlobIndex::new(0));
    for chunk in tree.chunks() {
        assert_eq!(digests.chunk_digest(chunk.index), Some(chunk.digest));
    }
    assert_eq!(digests.chunk_digest(storage::ChunkIndex::new(0)), None);
}

/// A sparse file of 5 GiB is one stored chunk, named again and again.
#[test]
fn files_above_4_gib() {
    let size = (5 << 30) + 5;
    let mut tree = build("blob", Attr::default(), &[]);
    tree.blobs.push(common::blob_info("blob", 2));
    let full = tree.add_chunk(common::chunk(0, CHUNK, 0));
    let last = tree.add_chunk(common::chunk(1, 5, 5 << 30));
    let mut chunks = vec![full; (5 << 30) / 4096];
    chunks.push(last);
    let inode = Inode::new(Attr::default(), Content::File { size, chunks });
    tree.insert(tree.root(), b"f", inode).unwrap();
    let image = Image::from_bytes(write(&tree, &options()).unwrap()).unwrap();
    image.verify_tree().unwrap();
    let nid = image.lookup(image.root(), b"f").unwrap().unwrap();
    assert_eq!(image.inode(nid).unwrap().size(), size);
    let extents: Vec<_> = image
        .extents(nid, size - 6..size + 1)
        .map(|e| e.unwrap())
        .map(|e| (e.chunk.get(), e.plain, e.chunk_offset, e.file_offset))
        .collect();
    assert_eq!(
        extents,
        [
            (0, 4095..4096, 4095, size - 6),
            (1, 4096..4101, 0, size - 5)
        ]
    );
}

/// What a tree may hold but the format cannot.
#[test]
fn impossible_trees_are_refused() {
    use rafs::WriteError;
    let add = |content| {
        let mut tree = Tree::new(Attr::default());
        let inode = Inode::new(Attr::default(), content);
        let id = tree.insert(tree.root(), b"f", inode).unwrap();
        (tree, id)
    };
    let refused = |tree: &Tree| write(tree, &options()).unwrap_err();

    let (tree, _) = add(Content::File {
        size: 1,
        chunks: vec![],
    });
    assert!(matches!(refused(&tree), WriteError::BadInode { .. }));
    for target in [vec![], vec![b't'; 4096], b"a\0".to_vec()] {
        let (tree, _) = add(Content::Symlink(target.into()));
        assert!(matches!(refused(&tree), WriteError::BadInode { .. }));
    }
    let (mut tree, id) = add(Content::Fifo);
    tree.inode_mut(id)
        .xattrs
        .insert(b"btrfs.x"[..].into(), b""[..].into());
    assert!(matches!(refused(&tree), WriteError::BadXattr { .. }));
    let (mut tree, id) = add(Content::directory());
    tree.link(id, b"loop", id).unwrap();
    assert!(matches!(
        refused(&tree),
        WriteError::DirectoryLinkedTwice { .. }
    ));
    let first_use = WriteOptions {
        blob_order: BlobOrder::FirstUse,
        ..options()
    };
    assert!(matches!(
        write(&tree, &first_use),
        Err(WriteError::DirectoryLinkedTwice { .. })
    ));
    let (mut tree, _) = add(Content::directory());
    tree.link(tree.root(), b"g", tree.lookup(b"f").unwrap())
        .unwrap();
    assert!(matches!(
        refused(&tree),
        WriteError::DirectoryLinkedTwice { .. }
    ));
    let chunk = |tree: &mut Tree, index| {
        let id = tree.add_chunk(common::chunk(index, 1, 0));
        let file = Content::File {
            size: 1,
            chunks: vec![id],
        };
        tree.insert(tree.root(), b"c", Inode::new(Attr::default(), file))
            .unwrap();
    };
    let (mut tree, _) = add(Content::Fifo);
    chunk(&mut tree, 0);
    assert!(matches!(refused(&tree), WriteError::BadChunk { .. }));
    tree.blobs.push(common::blob_info("blob", 1));
    write(&tree, &options()).unwrap();
    chunk(&mut tree, 1);
    assert!(matches!(refused(&tree), WriteError::BadChunk { .. }));
    tree.unlink(tree.root(), b"c");
    for _ in 0..254 {
        let id = format!("b{}", tree.blobs.len());
        tree.blobs.push(common::blob_info(&id, 1));
    }
    assert!(matches!(refused(&tree), WriteError::TooMany { .. }));
}
