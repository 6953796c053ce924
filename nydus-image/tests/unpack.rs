//! Images back into archives: what was packed comes out again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic_in_result_fn,
    reason = "helpers of tests fail like tests"
)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use nydus_image::access::open_verified;
use nydus_image::build::BuildOptions;
use nydus_image::data::{ImageData, Span};
use nydus_image::source::Source;
use nydus_image::unpack;
use proptest::prelude::*;
use rafs::Image;
use rafs::merge::WhiteoutSpec;
use rafs::tree::{Attr, Content, Inode, Tree};
use rafs::writer::{WriteOptions, write};
use storage::backend::file::FileBackend;
use storage::backend::local::LocalBackend;
use storage::{BlobIndex, ChunkIndex};
use support::arbitrary::{made, make, options};
use support::{Built, build, list_directory, tar_source};

/// Unpacks with the blob as one file under `dir`.
fn unpacked(built: &Built, blob: &[u8], dir: &Path, threads: usize) -> Result<Vec<u8>, String> {
    let image = Arc::new(Image::from_bytes(built.bootstrap.clone()).unwrap());
    image.verify_tree().unwrap();
    let path = dir.join("blob");
    std::fs::write(&path, blob).unwrap();
    let backend = Arc::new(FileBackend::open(&path).unwrap());
    let data = ImageData::new(Arc::clone(&image), backend);
    let mut tar = Vec::new();
    match unpack::write(&image, &data, threads, &mut tar) {
        Ok(()) => Ok(tar),
        Err(error) => Err(format!("{error:#}")),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Tree → image → archive → image has the same tree, for all options; the bytes
    /// of the archive do not depend on the number of threads.
    #[test]
    fn archives_hold_the_tree(tree in prop::collection::vec(made(), 0..40), options in options()) {
        let dir = tempfile::tempdir().unwrap();
        let scratch = tempfile::tempdir().unwrap();
        make(dir.path(), &tree);
        let built = build(Source::Directory(dir.path().to_owned()), &options, 2).unwrap();
        let tar = unpacked(&built, &built.blob, scratch.path(), 3).unwrap();
        prop_assert!(tar == unpacked(&built, &built.blob, scratch.path(), 1).unwrap());
        let again = build(tar_source(tar), &BuildOptions::default(), 2).unwrap();
        let (found, expected) = (again.listing(), list_directory(dir.path()));
        prop_assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (path, node) in &expected {
            prop_assert!(&found[path] == node, "{}: {:?}", path.escape_ascii(), node.kind);
        }
    }

    /// A damaged blob never unpacks to other data.
    #[test]
    fn damage_is_an_error(at in any::<prop::sample::Index>(), bit in 0..8_u32, options in options()) {
        let dir = tempfile::tempdir().unwrap();
        let scratch = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "some text that compresses ".repeat(900)).unwrap();
        std::fs::write(dir.path().join("b"), support::arbitrary::noise(3, 9000)).unwrap();
        let built = build(Source::Directory(dir.path().to_owned()), &options, 2).unwrap();
        let good = unpacked(&built, &built.blob, scratch.path(), 1).unwrap();
        let mut blob = built.blob.clone();
        let at = at.index(blob.len());
        blob[at] ^= 1 << bit;
        if let Ok(tar) = unpacked(&built, &blob, scratch.path(), 2) {
            prop_assert!(tar == good, "byte {}", at);
        }
    }
}

/// Clients hand over the data section of a layer without anything behind it.
#[test]
fn the_data_alone_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a"), "0123456789".repeat(100_000)).unwrap();
    std::fs::write(dir.path().join("b"), support::arbitrary::noise(1, 50_000)).unwrap();
    let options = BuildOptions {
        blob_toc: true,
        inline_bootstrap: true,
        ..BuildOptions::default()
    };
    let built = build(Source::Directory(dir.path().to_owned()), &options, 2).unwrap();
    let image = Image::from_bytes(built.bootstrap.clone()).unwrap();
    let len = usize::try_from(image.blobs()[0].data_size()).unwrap();
    assert!(len < built.blob.len());
    let whole = unpacked(&built, &built.blob, scratch.path(), 2).unwrap();
    let data = unpacked(&built, &built.blob[..len], scratch.path(), 2).unwrap();
    assert!(data == whole);
    let error = unpacked(&built, &built.blob[..len - 1], scratch.path(), 2).unwrap_err();
    assert!(error.contains("wanted"), "{error}");
}

#[test]
fn marks_of_overlayfs_become_whiteouts() {
    let mut tree = Tree::new(Attr::default());
    let dir = tree.mkdir_all(b"/d", Attr::default()).unwrap();
    tree.inode_mut(dir)
        .xattrs
        .insert((*b"trusted.overlay.opaque").into(), (*b"y").into());
    tree.insert(
        dir,
        b"gone",
        Inode::new(Attr::default(), Content::CharDevice(0)),
    )
    .unwrap();
    tree.insert(
        tree.root(),
        b"socket",
        Inode::new(Attr::default(), Content::Socket),
    )
    .unwrap();
    let bootstrap = write(&tree, &WriteOptions::default()).unwrap();
    let image = Arc::new(Image::from_bytes(bootstrap).unwrap());
    let data = ImageData::new(Arc::clone(&image), Arc::new(LocalBackend::new(Vec::new())));
    let mut tar = Vec::new();
    unpack::write(&image, &data, 2, &mut tar).unwrap();
    let mut archive = tar::Archive::new(&tar[..]);
    let members: BTreeMap<_, _> = archive
        .entries()
        .unwrap()
        .map(|member| {
            let member = member.unwrap();
            let path = String::from_utf8(member.path_bytes().into_owned()).unwrap();
            (
                path,
                (member.header().entry_type().as_byte(), member.size()),
            )
        })
        .collect();
    let expected = [
        ("./", (b'5', 0)),
        ("d/", (b'5', 0)),
        ("d/.wh..wh..opq", (b'0', 0)),
        ("d/.wh.gone", (b'0', 0)),
    ];
    let expected = expected.map(|(path, rest)| (path.to_owned(), rest));
    assert_eq!(members, BTreeMap::from(expected));
    assert!(!tar.windows(7).any(|window| window == b"overlay"));
}

#[test]
fn spans_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a"), [7; 5000]).unwrap();
    let options = BuildOptions {
        whiteouts: WhiteoutSpec::None,
        ..BuildOptions::default()
    };
    let built = build(Source::Directory(dir.path().to_owned()), &options, 1).unwrap();
    let (boot, blob) = (dir.path().join("boot"), dir.path().join("blob"));
    std::fs::write(&boot, &built.bootstrap).unwrap();
    std::fs::write(&blob, &built.blob).unwrap();
    let image = open_verified(&boot).unwrap();
    let data = ImageData::new(image, Arc::new(FileBackend::open(&blob).unwrap()));
    let mut reader = data.reader();
    let span = |chunk, within| Span {
        blob: BlobIndex::new(0),
        chunk: ChunkIndex::new(chunk),
        within,
    };
    let mut got = Vec::new();
    reader
        .read(&[span(0, 4990..5000), span(0, 0..1)], |index, bytes| {
            got.push((index, bytes.len()));
        })
        .unwrap();
    assert_eq!(got, [(0, 10), (1, 1)]);
    for bad in [span(0, 0..5001), span(0, 5001..5001), span(1, 0..1)] {
        assert!(
            reader.read(std::slice::from_ref(&bad), |_, _| {}).is_err(),
            "{bad:?}"
        );
    }
}
