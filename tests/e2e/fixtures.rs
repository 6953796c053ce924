//! Images that Nydus v2.4 wrote mount, and read back as what they were made from.

use std::fs;
use std::path::Path;
use std::process::Command;

use support::binaries::nydus_image;
use support::command::succeed;
use support::fixtures::directory;
use support::tree::{Detail, describe, difference};

use crate::scene::{Build, Scene};

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
    // The description was made with another idea of the times of directories.
    compare("merged", "merged/tree.jsonl", |line| {
        line.contains("\"mode\": \"0o4")
    });
}

/// Images that were made from the tree that `tree.jsonl` describes.
fn reads_back(name: &str) {
    // From a directory, Nydus v2.4 does not keep the time of the root.
    compare(name, "tree.jsonl", |line| {
        name != "tar" && line.contains("\"path\": \"/\",")
    });
}

/// Checks and mounts a fixture and compares it with its description, but for the
/// times of the entries that `timeless` names.
fn compare(name: &str, description: &str, timeless: impl Fn(&str) -> bool) {
    let Some(directory) = directory().unwrap() else {
        return;
    };
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
    let comparable = |line: &str| {
        if timeless(line) {
            without_time(line)
        } else {
            line.to_owned()
        }
    };
    let text = fs::read_to_string(directory.join(description)).unwrap();
    let expected: Vec<String> = text.lines().map(comparable).collect();
    let actual = describe(daemon.point(), Detail::All).unwrap();
    let actual: Vec<String> = actual.iter().map(|line| comparable(line)).collect();
    if let Some(difference) = difference(&expected, &actual) {
        panic!("trees differ:\n{difference}");
    }
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

fn without_time(line: &str) -> String {
    let (before, rest) = line.split_once("\"mtime_ns\": ").unwrap();
    let (_, after) = rest.split_once(", ").unwrap();
    format!("{before}{after}")
}
