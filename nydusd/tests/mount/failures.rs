//! What goes wrong, and what the user sees of it.

use std::fs;
use std::path::Path;

use storage::Compressor;

use crate::daemon::{Daemon, is_mounted, run};
use crate::image::{Image, build, content};

fn sample(dir: &Path) -> Image {
    let files = vec![
        ("a".to_owned(), content(1, 20_000)),
        ("b".to_owned(), content(2, 20_000)),
    ];
    let image = build(Compressor::Zstd, 4096, files);
    image.write_to(dir);
    image
}

/// Runs a mount that must fail: exit code 1, the parts in the message, no mount.
fn fails(args: &[&str], mountpoint: &Path, parts: &[&str]) {
    let (code, text) = run(args);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("Error: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
    assert!(!text.contains("panicked"), "{text}");
    assert!(!is_mounted(mountpoint));
}

#[test]
fn bad_mount_points() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    let (boot, blobs) = (boot.to_str().unwrap(), blobs.to_str().unwrap());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let absent = dir.path().join("absent");
    for (place, parts) in [
        (
            file.as_path(),
            &["mount point", "/file is not a directory"][..],
        ),
        (
            absent.as_path(),
            &["mount point", "/absent", "No such file"],
        ),
        (Path::new("/"), &["root of the system"]),
    ] {
        fails(
            &["-B", boot, "-D", blobs, "-M", place.to_str().unwrap()],
            place,
            parts,
        );
    }
}

#[test]
fn bad_bootstraps() {
    let dir = tempfile::tempdir().unwrap();
    let image = sample(dir.path());
    let blobs = dir.path().join("blobs");
    let boot = dir.path().join("boot");
    let mnt = dir.path().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let (blobs, mnt_text) = (blobs.to_str().unwrap(), mnt.to_str().unwrap());
    let args = ["-B", boot.to_str().unwrap(), "-D", blobs, "-M", mnt_text];
    let mut broken = image.bootstrap.clone();
    broken[1024] ^= 1;
    for (bytes, parts) in [
        (&[][..], &["bootstrap", "/boot"][..]),
        (
            &image.bootstrap[..1500],
            &["/boot", "corrupt bootstrap", "at byte"],
        ),
        (&broken, &["/boot", "corrupt bootstrap", "at byte 1024"]),
        (b"no bootstrap at all", &["/boot", "corrupt bootstrap"]),
    ] {
        fs::write(&boot, bytes).unwrap();
        fails(&args, &mnt, parts);
    }
    fs::remove_file(&boot).unwrap();
    fails(&args, &mnt, &["/boot", "No such file"]);
}

#[test]
fn bad_configurations() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let (boot, config) = (dir.path().join("boot"), dir.path().join("config"));
    let mnt = dir.path().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let mnt_text = mnt.to_str().unwrap();
    let (boot, config_text) = (boot.to_str().unwrap(), config.to_str().unwrap());
    let args = ["--config", config_text, "-B", boot, "-M", mnt_text];
    fails(&args, &mnt, &["/config", "No such file"]);
    fs::write(&config, r#"{"version":2,"backend":{"type":"ftp"}}"#).unwrap();
    fails(
        &args,
        &mnt,
        &["/config", "`backend.type`", "ftp", "registry"],
    );
    fails(
        &["-B", boot, "-M", mnt_text],
        &mnt,
        &["--config or --localfs-dir"],
    );
    fails(&["-M", mnt_text], &mnt, &["--bootstrap"]);
    fails(
        &["-M", mnt_text, "--writable", "-B", boot],
        &mnt,
        &["--writable", "not supported"],
    );
    fails(
        &["-M", mnt_text, "--apisock", boot],
        &mnt,
        &["--apisock", "something else than a socket"],
    );
    fails(
        &["singleton", "--fscache", "x"],
        &mnt,
        &["`singleton` is not supported"],
    );
}

#[test]
fn an_unusable_cache_directory() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    let mnt = dir.path().join("mnt");
    fs::create_dir(&mnt).unwrap();
    // A file where the directory should be: no privilege gets past that.
    let cache = dir.path().join("cache");
    fs::write(&cache, "").unwrap();
    let args = ["mount", boot.to_str().unwrap(), mnt.to_str().unwrap()];
    let more = [
        "--localfs-dir",
        blobs.to_str().unwrap(),
        "--cache-dir",
        cache.to_str().unwrap(),
    ];
    fails(&[&args[..], &more].concat(), &mnt, &["/cache"]);
}

/// Damage answers EIO for the files it touches, and heals with its cause.
#[test]
fn a_damaged_blob_fails_for_its_range_only_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let image = sample(dir.path());
    let blob = dir.path().join("blobs").join(&image.blob_id);
    let mut damaged = image.blob.clone();
    // Somewhere inside the data of the first file.
    damaged[2_000] ^= 0x55;
    fs::write(&blob, &damaged).unwrap();
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    let daemon = Daemon::start(&[
        "-B",
        boot.to_str().unwrap(),
        "-D",
        blobs.to_str().unwrap(),
        "-M",
        "MNT",
    ]);
    let err = fs::read(daemon.mountpoint.join("a")).unwrap_err();
    assert_eq!(err.raw_os_error(), Some(libc::EIO));
    assert!(daemon.log().contains(&image.blob_id), "{}", daemon.log());
    assert_eq!(
        fs::read(daemon.mountpoint.join("b")).unwrap(),
        image.files[1].1
    );
    fs::write(&blob, &image.blob).unwrap();
    image.check(&daemon.mountpoint);
    daemon.stop();
}

#[test]
fn a_missing_blob_fails_reads_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let image = sample(dir.path());
    let blob = dir.path().join("blobs").join(&image.blob_id);
    fs::rename(&blob, dir.path().join("hidden")).unwrap();
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    let daemon = Daemon::start(&[
        "-B",
        boot.to_str().unwrap(),
        "-D",
        blobs.to_str().unwrap(),
        "-M",
        "MNT",
    ]);
    assert_eq!(fs::read_dir(&daemon.mountpoint).unwrap().count(), 4);
    let err = fs::read(daemon.mountpoint.join("a")).unwrap_err();
    assert_eq!(err.raw_os_error(), Some(libc::EIO));
    fs::rename(dir.path().join("hidden"), &blob).unwrap();
    image.check(&daemon.mountpoint);
    daemon.stop();
}
