//! Starting and ending: signals, foreign unmounts, command lines, configurations.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use storage::Compressor;

use crate::daemon::{Daemon, command, is_mounted, run};
use crate::image::{Image, build};

fn sample(dir: &Path) -> Image {
    let image = build(
        Compressor::Zstd,
        4096,
        vec![("a".to_owned(), b"hello".to_vec())],
    );
    image.write_to(dir);
    image
}

fn local(dir: &Path) -> Daemon {
    let (boot, blobs) = (dir.join("boot"), dir.join("blobs"));
    Daemon::start(&[
        "-B",
        boot.to_str().unwrap(),
        "-D",
        blobs.to_str().unwrap(),
        "-M",
        "MNT",
    ])
}

#[test]
fn both_signals_unmount() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = local(dir.path());
        assert!(is_mounted(&daemon.mountpoint));
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
        assert!(!is_mounted(&daemon.mountpoint));
    }
}

#[test]
fn a_foreign_unmount_ends_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let mut daemon = local(dir.path());
    assert!(
        Command::new("umount")
            .arg(&daemon.mountpoint)
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(daemon.log().contains("was unmounted"), "{}", daemon.log());
}

#[test]
fn a_mount_in_use_stays_and_the_next_signal_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let mut daemon = local(dir.path());
    let user = fs::File::open(daemon.mountpoint.join("a")).unwrap();
    daemon.signal(Signal::SIGTERM);
    for _ in 0..1000 {
        if daemon.log().contains("is in use and goes on being served") {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(is_mounted(&daemon.mountpoint), "{}", daemon.log());
    assert_eq!(fs::read(daemon.mountpoint.join("a")).unwrap(), b"hello");
    drop(user);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(!is_mounted(&daemon.mountpoint));
}

/// What the mount table says, as clients expect it.
#[test]
fn mount_options() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let daemon = local(dir.path());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let place = daemon.mountpoint.to_str().unwrap();
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(1) == Some(place))
        .unwrap();
    let fields: Vec<&str> = line.split(' ').collect();
    assert_eq!((fields[0], fields[2]), ("rafs", "fuse"));
    for option in [
        "ro",
        "nosuid",
        "nodev",
        "noatime",
        "default_permissions",
        "allow_other",
        "max_read=1052672",
    ] {
        assert!(
            fields[3].split(',').any(|found| found == option),
            "{option} in {line}"
        );
    }
    daemon.stop();
}

#[test]
fn configurations_of_both_versions() {
    let dir = tempfile::tempdir().unwrap();
    let image = sample(dir.path());
    let blobs = dir.path().join("blobs");
    let boot = dir.path().join("boot");
    for (index, text) in [
        r#"{"version":2,"backend":{"type":"localfs","localfs":{"dir":"BLOBS"}},
           "cache":{"type":"filecache","filecache":{"work_dir":"CACHE"}},"rafs":{"mode":"direct"}}"#,
        "version=2\n[backend]\ntype='localfs'\n[backend.localfs]\ndir='BLOBS'\n[cache]\n\
         type='blobcache'\n[cache.filecache]\nwork_dir='CACHE'\n[rafs]\nodd=1\n",
        r#"{"device":{"backend":{"type":"localfs","config":{"dir":"BLOBS"}},
           "cache":{"type":"blobcache","config":{"work_dir":"CACHE"}}},"mode":"direct"}"#,
    ]
    .iter()
    .enumerate()
    {
        let cache = dir.path().join(format!("cache-{index}"));
        let text = text
            .replace("BLOBS", blobs.to_str().unwrap())
            .replace("CACHE", cache.to_str().unwrap());
        let config = dir.path().join("config");
        fs::write(&config, text).unwrap();
        let (config, boot) = (config.to_str().unwrap(), boot.to_str().unwrap());
        let daemon =
            Daemon::start(&["fuse", "--config", config, "--bootstrap", boot, "--mountpoint", "MNT"]);
        image.check(&daemon.mountpoint);
        let data = cache.join(format!("{}.blob.data", image.blob_id));
        assert!(data.exists(), "the cache is where the configuration says");
        assert_eq!(daemon.log().contains("rafs.odd: unknown key"), index == 1, "{}", daemon.log());
        daemon.stop();
    }
}

#[test]
fn log_file_and_level() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let log = dir.path().join("the-log");
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    let mountpoint = dir.path().join("mnt");
    fs::create_dir(&mountpoint).unwrap();
    let place = mountpoint.to_str().unwrap();
    let mut child = command(&["-B", boot.to_str().unwrap(), "-D", blobs.to_str().unwrap()])
        .args([
            "-M",
            place,
            "--log-file",
            log.to_str().unwrap(),
            "--log-level",
            "info",
        ])
        .spawn()
        .unwrap();
    let log = log.with_extension("log");
    for _ in 0..1000 {
        if fs::read_to_string(&log).is_ok_and(|text| text.contains("ready: ")) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let unmounted = Command::new("umount")
        .arg(&mountpoint)
        .status()
        .unwrap()
        .success();
    if !unmounted {
        child.kill().unwrap();
    }
    assert!(child.wait().unwrap().success());
    let text = fs::read_to_string(&log).unwrap();
    let ready = text
        .lines()
        .find(|line| line.contains("ready: "))
        .expect(&text);
    assert!(
        ready.starts_with('[') && ready.contains(" +00:00] INFO ready: "),
        "{ready}"
    );
}

#[test]
fn help_version_and_usage() {
    let version = command(&["--version"]).output().unwrap();
    let text = String::from_utf8(version.stdout).unwrap();
    assert!(
        version.status.success() && text.contains("Git Commit: \t"),
        "{text}"
    );
    for help in [&["--help"][..], &["mount", "--help"], &["fuse", "--help"]] {
        let output = command(help).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty());
    }
    for usage in [
        &[][..],
        &["mount"],
        &["--no-such-option"],
        &["fuse", "--fuse-threads", "0"],
    ] {
        let (code, text) = run(usage);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.starts_with("error: "), "{text}");
    }
}
