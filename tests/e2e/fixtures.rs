//! Images that Nydus v2.4 wrote mount, and read back as what they were made from.

use std::fs;
use std::path::Path;
use std::process::Command;

use support::binaries::nydus_image;
use support::command::succeed;
use support::fixtures::directory;
use support::tree::Detail;

use crate::scene::{Build, Scene, assert_described};

#[test]
fn zstd() {
    reads_back("zstd");
}

#[test]
fn lz4() {
    reads_back("lz4");
}

#[test]
fn none() {
    reads_back("none");
}

#[test]
fn sha256() {
    reads_back("sha256");
}

#[test]
fn chunk_4k() {
    reads_back("chunk-4k");
}

#[test]
fn chunk_64k() {
    reads_back("chunk-64k");
}

#[test]
fn tar() {
    reads_back("tar");
}

#[test]
fn merged() {
    let Some(directory) = directory().unwrap() else {
        return;
    };
    let text = fs::read_to_string(directory.join("merged/tree.jsonl")).unwrap();
    let scene = Scene::new();
    let daemon = scene.mount(&fixture(&scene, &directory, "merged"));
    // The description was made with another idea of the times of directories.
    let lines: Vec<String> = text.lines().map(without_directory_time).collect();
    assert_described(&lines, daemon.point(), Detail::WithoutDirectoryTimes);
    daemon.stop().unwrap();
}

fn reads_back(name: &str) {
    let Some(directory) = directory().unwrap() else {
        return;
    };
    let text = fs::read_to_string(directory.join("tree.jsonl")).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let scene = Scene::new();
    let build = fixture(&scene, &directory, name);

    let mut check = nydus_image().unwrap();
    check
        .arg("check")
        .arg(&build.bootstrap)
        .arg("--blob-dir")
        .arg(&build.blob_dir);
    succeed(&mut check).unwrap();

    let daemon = scene.mount(&build);
    assert_described(&lines, daemon.point(), Detail::All);
    daemon.stop().unwrap();
}

/// A copy: the daemon keeps its cache beside the blobs.
fn fixture(scene: &Scene, directory: &Path, name: &str) -> Build {
    let copy = scene.path(name);
    succeed(
        Command::new("cp")
            .arg("-r")
            .arg(directory.join(name))
            .arg(&copy),
    )
    .unwrap();
    succeed(Command::new("chmod").args(["-R", "u+w"]).arg(&copy)).unwrap();
    Build {
        bootstrap: copy.join("boot"),
        blob_dir: copy,
        blobs: Vec::new(),
    }
}

fn without_directory_time(line: &str) -> String {
    let Some((before, rest)) = line.split_once("\"mtime_ns\": ") else {
        return line.to_owned();
    };
    if !before.contains("\"mode\": \"0o4") {
        return line.to_owned();
    }
    let (_, after) = rest.split_once(", ").unwrap();
    format!("{before}{after}")
}

#[test]
fn only_directories_lose_their_time() {
    let file = r#"{"gid": 0, "mode": "0o100644", "mtime_ns": 5, "nlink": 1}"#;
    let directory = r#"{"gid": 0, "mode": "0o40755", "mtime_ns": 5, "path": "/"}"#;
    assert_eq!(without_directory_time(file), file);
    let expected = r#"{"gid": 0, "mode": "0o40755", "path": "/"}"#;
    assert_eq!(without_directory_time(directory), expected);
}
