//! Every byte of an image, read in every way that programs read.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::sync::Arc;

use storage::Compressor;

use crate::daemon::Daemon;
use crate::image::{Image, boundary_files, build, build_with};

const CHUNK: u32 = 64 << 10;

fn mount(image: &Image, source: &Path) -> Daemon {
    image.write_to(source);
    let (boot, blobs) = (source.join("boot"), source.join("blobs"));
    let (boot, blobs) = (boot.to_str().unwrap(), blobs.to_str().unwrap());
    Daemon::start(&[
        "--bootstrap",
        boot,
        "--localfs-dir",
        blobs,
        "--mountpoint",
        "MNT",
    ])
}

fn sample(compressor: Compressor) -> Image {
    build(
        compressor,
        CHUNK,
        boundary_files(usize::try_from(CHUNK).unwrap()),
    )
}

#[test]
fn every_compressor_reads_back() {
    for compressor in [Compressor::Zstd, Compressor::Lz4, Compressor::None] {
        let source = tempfile::tempdir().unwrap();
        let image = sample(compressor);
        let daemon = mount(&image, source.path());
        image.check(&daemon.mountpoint);
        daemon.stop();
    }
}

#[test]
fn a_second_daemon_reads_from_the_cache_of_the_first() {
    let source = tempfile::tempdir().unwrap();
    let image = sample(Compressor::Zstd);
    let daemon = mount(&image, source.path());
    image.check(&daemon.mountpoint);
    daemon.stop();
    // The blob is gone; what was read before is in the cache beside it.
    let blobs = source.path().join("blobs");
    fs::remove_file(blobs.join(&image.blob_id)).unwrap();
    let (boot, blobs) = (
        source.path().join("boot"),
        blobs.to_str().unwrap().to_owned(),
    );
    let boot = boot.to_str().unwrap();
    let daemon = Daemon::start(&["-B", boot, "-D", &blobs, "-M", "MNT"]);
    image.check(&daemon.mountpoint);
    daemon.stop();
}

#[test]
fn metadata_is_exact() {
    let source = tempfile::tempdir().unwrap();
    let image = sample(Compressor::Zstd);
    let daemon = mount(&image, source.path());
    let root = &daemon.mountpoint;
    let meta = fs::symlink_metadata(root.join("twin")).unwrap();
    assert_eq!(meta.permissions().mode(), 0o100_644);
    assert_eq!((meta.uid(), meta.gid(), meta.nlink()), (12, 34, 1));
    assert_eq!(
        (meta.size(), meta.blocks(), meta.blksize()),
        (4095, 8, 4096)
    );
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_700_000_000, 5));
    let link = fs::symlink_metadata(root.join("hard")).unwrap();
    let first = fs::symlink_metadata(root.join(&image.files[0].0)).unwrap();
    assert_eq!((link.ino(), link.nlink()), (first.ino(), 2));
    assert_eq!(first.ino() >> 56, 1);
    let mut names: Vec<_> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["dir", "hard", "soft", "twin", "zeros"]);
    for absent in ["nothing", "dir/nothing"] {
        let err = fs::symlink_metadata(root.join(absent)).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::NotFound);
    }
    daemon.stop();
}

/// Reads at odd places and lengths, from several threads, in random order.
#[test]
fn random_and_parallel_reads() {
    let source = tempfile::tempdir().unwrap();
    let image = Arc::new(sample(Compressor::Zstd));
    let daemon = mount(&image, source.path());
    let threads: Vec<_> = (0..8u64)
        .map(|seed| {
            let (image, root) = (Arc::clone(&image), daemon.mountpoint.clone());
            std::thread::spawn(move || {
                let mut state = seed;
                let mut random = move |below: usize| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(99);
                    usize::try_from(state >> 33).unwrap() % below
                };
                for _ in 0..300 {
                    let (path, data) = &image.files[random(image.files.len())];
                    let file = File::open(root.join(path)).unwrap();
                    let at = random(data.len() + 10);
                    let mut buffer = vec![0; random(200_000) + 1];
                    let len = file.read_at(&mut buffer, at.try_into().unwrap()).unwrap();
                    let wanted = data.get(at..).unwrap_or(&[]);
                    let wanted = &wanted[..wanted.len().min(buffer.len())];
                    assert!(buffer[..len] == *wanted, "{path} at {at}");
                }
            })
        })
        .collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    daemon.stop();
}

#[test]
fn reads_without_page_cache() {
    let source = tempfile::tempdir().unwrap();
    let image = sample(Compressor::Zstd);
    let daemon = mount(&image, source.path());
    for (path, data) in &image.files {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(daemon.mountpoint.join(path))
            .unwrap();
        let mut found = vec![0; data.len() + 4096];
        let mut len = 0;
        loop {
            let read = file
                .read_at(&mut found[len..], len.try_into().unwrap())
                .unwrap();
            if read == 0 {
                break;
            }
            len += read;
        }
        assert!(found[..len] == *data, "{path}");
    }
    daemon.stop();
}

/// A user who is let in by the access control list, and one who is not.
#[test]
fn access_control_lists_count() {
    const NOBODY: u32 = 65534;
    // Owner rw-, user 65534 r--, group ---, mask r--, others ---.
    let entries = [
        (1u16, 6u16, u32::MAX),
        (2, 4, NOBODY),
        (4, 0, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ];
    let mut list = vec![2, 0, 0, 0];
    for (tag, permissions, id) in entries {
        list.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        list.extend(id.to_le_bytes());
    }
    let files = vec![("secret".to_owned(), b"content".to_vec())];
    let image = build_with(Compressor::None, 4096, files, |tree| {
        let id = tree.lookup(b"secret").unwrap();
        let inode = tree.inode_mut(id);
        inode.attr.permissions = 0o640;
        inode
            .xattrs
            .insert((*b"system.posix_acl_access").into(), list.into());
    });
    let source = tempfile::tempdir().unwrap();
    let daemon = mount(&image, source.path());
    fs::set_permissions(daemon.scratch(), fs::Permissions::from_mode(0o755)).unwrap();
    for (user, allowed) in [(NOBODY, true), (NOBODY - 1, false)] {
        let path = daemon.mountpoint.join("secret");
        let mut cat = std::process::Command::new("cat");
        let output = cat.arg(path).uid(user).gid(user).output().unwrap();
        assert_eq!(output.status.success(), allowed, "{output:?}");
        assert_eq!(output.stdout == b"content", allowed);
    }
    daemon.stop();
}

#[test]
fn every_change_is_refused() {
    let source = tempfile::tempdir().unwrap();
    let image = sample(Compressor::None);
    let daemon = mount(&image, source.path());
    let root = &daemon.mountpoint;
    let file = root.join("twin");
    let results = [
        fs::write(&file, "x"),
        fs::write(root.join("new"), "x"),
        fs::create_dir(root.join("new")),
        fs::remove_file(&file),
        fs::remove_dir(root.join("dir")),
        fs::rename(&file, root.join("other")),
        fs::hard_link(&file, root.join("other")),
        std::os::unix::fs::symlink("a", root.join("other")),
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)),
        std::os::unix::fs::lchown(&file, Some(1), None),
        File::open(&file).and_then(|file| file.set_modified(std::time::SystemTime::now())),
    ];
    for (index, result) in results.into_iter().enumerate() {
        let number = result.unwrap_err().raw_os_error();
        assert_eq!(number, Some(libc::EROFS), "change {index}");
    }
    image.check(root);
    daemon.stop();
}
