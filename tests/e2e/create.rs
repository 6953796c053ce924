//! `nydus-image create`: whatever the source is, the mount equals it.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use support::binaries::nydus_image;
use support::command::{run_within, succeed};
use support::image::layer::write_tree;
use support::tree::nasty::Options;

use crate::scene::{Scene, assert_same_tree};

/// What a tar can carry.
const TAR: Options = Options {
    without_sockets: true,
    without_huge: false,
};
const SMALL: Options = Options {
    without_sockets: false,
    without_huge: true,
};

#[test]
fn a_directory_with_one_of_everything() {
    let scene = Scene::new();
    let source = scene.nasty_tree(Options::default());
    let build = scene.create("image", &[], &source);
    let daemon = scene.mount(&build);
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn every_compressor_digester_and_chunk_size() {
    let scene = Scene::new();
    let source = scene.nasty_tree(SMALL);
    for (name, arguments) in [
        ("lz4", &["--compressor", "lz4_block"][..]),
        ("none", &["--compressor", "none"]),
        ("sha256", &["--digester", "sha256"]),
        ("small-chunks", &["--chunk-size", "0x1000"]),
        (
            "large-chunks",
            &["--chunk-size", "0x1000000", "--digester", "sha256"],
        ),
    ] {
        let build = scene.create(name, arguments, &source);
        check(&build.bootstrap, &build.blob_dir);
        let daemon = scene.mount(&build);
        assert_same_tree(&source, daemon.point());
        daemon.stop().unwrap();
    }
}

/// `nydus-image check` reads every chunk and agrees.
fn check(bootstrap: &Path, blob_dir: &Path) {
    let mut check = nydus_image().unwrap();
    let finished = succeed(
        check
            .arg("check")
            .arg(bootstrap)
            .arg("--blob-dir")
            .arg(blob_dir),
    );
    assert!(
        finished
            .unwrap()
            .stdout
            .starts_with("RAFS filesystem metadata is valid")
    );
}

#[test]
fn the_same_source_gives_the_same_bytes() {
    let scene = Scene::new();
    let source = scene.nasty_tree(SMALL);
    let (one, two) = (
        scene.create("one", &[], &source),
        scene.create("two", &[], &source),
    );
    assert_eq!(one.blobs, two.blobs);
    assert_eq!(
        fs::read(one.bootstrap).unwrap(),
        fs::read(two.bootstrap).unwrap()
    );
}

#[test]
fn a_tar_from_standard_input() {
    let scene = Scene::new();
    let source = scene.nasty_tree(TAR);
    let tar = scene.path("source.tar");
    write_tree(&source, &tar).unwrap();
    let mut command = scene.create_command("image");
    command.args(["--type", "tar-rafs", "/dev/stdin"]);
    // A pipe: what reads it cannot seek, and must not know the size.
    let mut cat = Command::new("cat")
        .arg(&tar)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = cat.stdout.take().unwrap().into();
    let finished = run_within(&mut command, stdin, Duration::from_secs(300)).unwrap();
    assert!(cat.wait().unwrap().success());
    assert!(finished.status.success(), "{}", finished.stderr);
    let daemon = scene.mount(&scene.build("image"));
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn a_tar_and_its_blob_through_fifos() {
    let scene = Scene::new();
    let source = scene.nasty_tree(Options {
        without_sockets: true,
        without_huge: true,
    });
    let (tar, blob) = (scene.path("tar.fifo"), scene.path("blob.fifo"));
    for fifo in [&tar, &blob] {
        mkfifo(fifo, Mode::S_IRWXU).unwrap();
    }
    let (from, to) = (source.clone(), tar.clone());
    let writer = thread::spawn(move || write_tree(&from, &to).unwrap());
    let (from, to) = (blob.clone(), scene.path("blob"));
    let reader = thread::spawn(move || {
        std::io::copy(
            &mut File::open(from).unwrap(),
            &mut File::create(to).unwrap(),
        )
        .unwrap();
    });
    let mut command = scene.create_command("image");
    succeed(
        command
            .args(["--type", "tar-rafs", "--blob"])
            .arg(&blob)
            .arg(&tar),
    )
    .unwrap();
    writer.join().unwrap();
    reader.join().unwrap();

    let build = scene.build("image");
    fs::rename(scene.path("blob"), build.blob_dir.join(&build.blobs[0])).unwrap();
    let daemon = scene.mount(&build);
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn a_gzipped_tar() {
    let scene = Scene::new();
    let source = scene.nasty_tree(Options {
        without_sockets: true,
        without_huge: true,
    });
    let tar = scene.path("source.tar");
    write_tree(&source, &tar).unwrap();
    succeed(Command::new("gzip").arg(&tar)).unwrap();
    let build = scene.create(
        "image",
        &["--type", "targz-rafs"],
        &scene.path("source.tar.gz"),
    );
    let daemon = scene.mount(&build);
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn an_empty_directory() {
    let scene = Scene::new();
    let source = scene.dir("source");
    let build = scene.create("image", &[], &source);
    assert!(
        build.blobs.is_empty(),
        "no data, no blob: {:?}",
        build.blobs
    );
    let daemon = scene.mount(&build);
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
}
