//! Directories into images, and back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic_in_result_fn,
    clippy::cast_possible_truncation,
    reason = "helpers of tests fail like tests; generated data may wrap"
)]

mod support;

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nydus_image::build::BuildOptions;
use nydus_image::pipeline::Engine;
use nydus_image::prefetch::{Policy, Prefetch};
use nydus_image::source::{Progress, Source};
use proptest::prelude::*;
use rafs::merge::WhiteoutSpec;
use storage::{Compressor, Digest, Digester};
use support::arbitrary::{made, make, noise, options, set_mode, set_time};
use support::{Built, build, build_on, chain, list_directory};

/// The tree of `docs/format.md`, "Golden image". Needs root, for the device.
fn golden_tree(root: &Path) {
    let at = |name: &str| root.join(name);
    std::fs::create_dir(at("d")).unwrap();
    mknod(
        &at("c"),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o620),
        makedev(1, 3),
    )
    .expect("making a device node; run the tests as root");
    set_mode(&at("c"), 0o620);
    std::fs::write(at("d/e"), "").unwrap();
    std::fs::write(at("f"), ["A".repeat(4096), "B".repeat(904)].concat()).unwrap();
    std::os::unix::fs::chown(at("f"), Some(1000), Some(100)).unwrap();
    std::fs::hard_link(at("f"), at("g")).unwrap();
    symlink("target", at("l")).unwrap();
    nix::unistd::mkfifo(&at("p"), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    std::fs::write(at("x"), "hi\n").unwrap();
    xattr::set(at("x"), "user.k", b"v1").unwrap();
    for name in ["d/e", "f", "x"] {
        set_mode(&at(name), 0o644);
    }
    for name in ["", "d"] {
        set_mode(&at(name), 0o755);
    }
    for name in ["c", "d/e", "d", "f", "l", "p", "x", ""] {
        set_time(&at(name), 1_700_000_000, 123);
    }
    // The builder that made the golden image stores no time for the root.
    set_time(root, 0, 0);
}

#[test]
fn the_golden_image_is_reproduced() {
    let dir = tempfile::tempdir().unwrap();
    golden_tree(dir.path());
    let options = BuildOptions {
        compressor: Compressor::None,
        chunk_size: 0x1000,
        blob_toc: true,
        ..BuildOptions::default()
    };
    let built = build(Source::Directory(dir.path().to_owned()), &options, 2).unwrap();
    assert_eq!(built.bootstrap.len(), 20480);
    assert_eq!(
        Digest::of(Digester::Sha256, &built.bootstrap).to_string(),
        "25e9716add6ee3a4630caa3a876491dbfcc99e67517f8ff86ad246e7ed3951f6"
    );
    assert_eq!(built.blob.len(), 11803);
    assert_eq!(
        built.layer.blob.id.as_str(),
        "44d6bea12e95e178233b95b8c249d0e49274a65e4c5316ac7b385eb7b7f91846"
    );
    assert_eq!(
        built.layer.blob.file_sha256.to_string(),
        "da0cdc52133dbe196caa944b910596f959facfed240cfcc167004cfffe19d994"
    );
    assert_eq!(built.listing(), list_directory(dir.path()));
}

fn assert_same_bytes(one: &Built, other: &Built) {
    assert_eq!(one.blob, other.blob, "blobs differ");
    assert_eq!(one.bootstrap, other.bootstrap, "bootstraps differ");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Every tree reads back as it was, and the bytes do not depend on the number of
    /// threads or the memory.
    #[test]
    fn trees_survive(tree in prop::collection::vec(made(), 0..40), options in options()) {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), &tree);
        let source = || Source::Directory(dir.path().to_owned());
        let built = build(source(), &options, 2).unwrap();
        let (found, expected) = (built.listing(), list_directory(dir.path()));
        prop_assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (path, node) in &expected {
            prop_assert!(&found[path] == node, "{}: {:?}", path.escape_ascii(), node.kind);
        }
        assert_same_bytes(&built, &build(source(), &options, 1).unwrap());
        assert_same_bytes(&built, &build_on(&Engine::new(5, 1), source(), &options).unwrap());
    }
}

/// Equal chunks all over, so that workers race for them.
#[test]
fn duplicates_are_stored_once_whatever_the_timing() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..400_u64 {
        let data = [noise(i % 7, 3 * 4096), noise(i, 4096), vec![0; 5000]].concat();
        std::fs::write(dir.path().join(format!("{i:03}")), data).unwrap();
    }
    let options = BuildOptions {
        chunk_size: 0x1000,
        ..BuildOptions::default()
    };
    let source = || Source::Directory(dir.path().to_owned());
    let first = build(source(), &options, 1).unwrap();
    // 7 files of 3 chunks, of which seeds share nothing; 400 single ones; zeros of
    // one chunk and of the rest.
    let chunks = first.layer.tree.chunks().len();
    assert_eq!(chunks, 7 * 3 + 400 - 7 + 2);
    for threads in [2, 3, 8] {
        for _ in 0..5 {
            assert_same_bytes(&first, &build(source(), &options, threads).unwrap());
        }
    }
}

#[test]
fn a_large_hole_costs_one_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hole");
    File::create(&path).unwrap().set_len(5 << 30).unwrap();
    let source = Source::Directory(dir.path().to_owned());
    let mut blob = Vec::new();
    let layer = nydus_image::build::build_layer(
        &Engine::new(2, Engine::DEFAULT_MEMORY),
        source,
        &BuildOptions::default(),
        &mut blob,
    )
    .unwrap();
    assert_eq!(layer.tree.chunks().len(), 1);
    assert_eq!(layer.tree.chunks()[0].file_offset, (5 << 30) - (1 << 20));
    assert!(blob.len() < 8192, "{} bytes", blob.len());
}

#[test]
fn whiteouts_are_dropped_unless_kept() {
    let dir = tempfile::tempdir().unwrap();
    for name in [".wh.gone", ".wh..wh..opq", "kept"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    let device = dir.path().join("device");
    mknod(&device, SFlag::S_IFCHR, Mode::empty(), 0).expect("run the tests as root");
    let names = |whiteouts| {
        let options = BuildOptions {
            whiteouts,
            ..BuildOptions::default()
        };
        let built = build(Source::Directory(dir.path().to_owned()), &options, 1).unwrap();
        let names = built.listing().into_keys().filter(|path| !path.is_empty());
        names
            .map(|name| String::from_utf8(name).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(WhiteoutSpec::Oci), ["/device", "/kept"]);
    assert_eq!(
        names(WhiteoutSpec::Overlayfs),
        ["/.wh..wh..opq", "/.wh.gone", "/kept"]
    );
    assert_eq!(
        names(WhiteoutSpec::None),
        ["/.wh..wh..opq", "/.wh.gone", "/device", "/kept"]
    );
}

#[test]
fn prefetched_files_come_first_in_the_blob() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        std::fs::write(dir.path().join(name), name.repeat(100)).unwrap();
    }
    let options = BuildOptions {
        prefetch: Prefetch::read(Policy::Fs, "/c\n/b\n".as_bytes()).unwrap(),
        ..BuildOptions::default()
    };
    let built = build(Source::Directory(dir.path().to_owned()), &options, 1).unwrap();
    let first: Vec<_> = ["c", "b", "a"]
        .map(|name| Digest::of(Digester::Blake3, name.repeat(100).as_bytes()))
        .into();
    let stored: Vec<_> = built
        .layer
        .tree
        .chunks()
        .iter()
        .map(|chunk| chunk.digest)
        .collect();
    assert_eq!(stored, first);
    let image = rafs::Image::from_bytes(built.bootstrap).unwrap();
    let listed: Vec<_> = image.prefetch().collect();
    let lookup = |name: &[u8]| image.lookup(image.root(), name).unwrap().unwrap();
    assert_eq!(listed, [lookup(b"c"), lookup(b"b")]);
}

#[test]
fn what_cannot_be_stored_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let failure = |path: &Path| {
        let source = Source::Directory(path.to_owned());
        chain(&build(source, &BuildOptions::default(), 1).unwrap_err())
    };
    assert!(
        failure(&missing).contains("missing: No such file"),
        "{}",
        failure(&missing)
    );
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(
        failure(&file).contains("file: Not a directory"),
        "{}",
        failure(&file)
    );
    File::create(dir.path().join("huge"))
        .unwrap()
        .set_len(1 << 43)
        .unwrap();
    let options = BuildOptions {
        chunk_size: 0x1000,
        ..BuildOptions::default()
    };
    let source = Source::Directory(dir.path().to_owned());
    let error = chain(&build(source, &options, 1).unwrap_err());
    assert!(
        error.contains("huge") && error.contains("16777215 chunks"),
        "{error}"
    );
}

/// An output that takes some bytes and then fails.
struct FullDisk(usize);

impl std::io::Write for FullDisk {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0 = self
            .0
            .checked_sub(buf.len())
            .ok_or(std::io::ErrorKind::StorageFull)?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_stops_the_build() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..200_u64 {
        std::fs::write(dir.path().join(i.to_string()), noise(i, 300_000)).unwrap();
    }
    let engine = Engine::new(2, 4 << 20);
    let source = Source::Directory(dir.path().to_owned());
    let options = BuildOptions::default();
    let error =
        nydus_image::build::build_layer(&engine, source, &options, FullDisk(1 << 20)).unwrap_err();
    let text = chain(&error);
    assert!(text.contains("writing the blob at byte"), "{text}");
    // The engine is as good as new.
    let source = Source::Directory(dir.path().to_owned());
    build_on(&engine, source, &options).unwrap();
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a"), "first").unwrap();
    let victim = dir.path().join("b");
    std::fs::write(&victim, noise(1, 100_000)).unwrap();
    // Called when `a` was read; `b` is open by then.
    let shrink = Progress::new(move |_| {
        File::options()
            .write(true)
            .open(&victim)
            .unwrap()
            .set_len(10)
            .unwrap()
    });
    let options = BuildOptions {
        progress: Some(shrink),
        ..BuildOptions::default()
    };
    let source = Source::Directory(dir.path().to_owned());
    let error = chain(&build(source, &options, 2).unwrap_err());
    assert!(
        error.contains("b changed while it was being read: it became shorter"),
        "{error}"
    );
}

/// One of everything that a file system holds. Needs root.
#[test]
fn a_nasty_tree_survives() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("many")).unwrap();
    for i in 0..3000 {
        std::fs::write(at("many").join(format!("{:0>200}", i)), i.to_string()).unwrap();
    }
    for name in [" before the dot", "!", "-", "z", &"n".repeat(255), "ümläut"] {
        std::fs::write(at(name), name).unwrap();
    }
    for len in [1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 1, 3 << 20] {
        std::fs::write(at(&format!("size {len}")), noise(len as u64, len)).unwrap();
    }
    std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    nix::unistd::mkfifo(&at("fifo"), Mode::S_IRUSR).unwrap();
    let block = makedev(0xabc, 0x12345);
    mknod(&at("block"), SFlag::S_IFBLK, Mode::S_IRUSR, block).expect("run the tests as root");
    symlink("x".repeat(4095), at("long link")).unwrap();
    symlink("/absolute/../target", at("link")).unwrap();
    std::fs::hard_link(at("z"), at("many/z")).unwrap();
    std::fs::write(at("setuid"), "").unwrap();
    std::os::unix::fs::chown(at("setuid"), Some(3_000_000_000), Some(100_000)).unwrap();
    set_mode(&at("setuid"), 0o7755);
    // Version 2, then (tag, permissions, id) of owner, a user, group, mask, others.
    let acl: Vec<u8> = std::iter::once(2_u32.to_le_bytes().to_vec())
        .chain(
            [
                (1, 7, u32::MAX),
                (2, 5, 1234),
                (4, 5, u32::MAX),
                (16, 5, u32::MAX),
                (32, 0, u32::MAX),
            ]
            .map(|(tag, permissions, id): (u16, u16, u32)| {
                [
                    &tag.to_le_bytes()[..],
                    &permissions.to_le_bytes(),
                    &id.to_le_bytes(),
                ]
                .concat()
            }),
        )
        .flatten()
        .collect();
    xattr::set(at("many"), "system.posix_acl_access", &acl).unwrap();
    xattr::set(at("many"), "system.posix_acl_default", &acl).unwrap();
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    xattr::set(at("z"), "security.capability", &capability).unwrap();
    xattr::set(at("link"), "trusted.on-a-link", b"").unwrap();
    xattr::set(at("!"), "user.large", &noise(1, 3000)).unwrap();
    set_time(&at("!"), -5_000_000_000, 999_999_999);
    let options = BuildOptions::default();
    let built = build(Source::Directory(dir.path().to_owned()), &options, 2).unwrap();
    let (found, expected) = (built.listing(), list_directory(dir.path()));
    assert_eq!(found.len(), expected.len());
    for (path, node) in &expected {
        let same = found.get(path) == Some(node);
        assert!(
            same,
            "{}: {:?}",
            path.escape_ascii(),
            found.get(path).map(|node| (&node.xattrs, node.device))
        );
    }
}
