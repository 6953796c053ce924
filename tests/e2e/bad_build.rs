//! Bad input of the builder: one clear message, exit code 1, nothing left behind.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::binaries::nydus_image;
use support::command::succeed;
use support::image::layer::write_tree;
use support::mount::Tmpfs;

use crate::scene::{Build, Scene, assert_empty, assert_fails};

/// A tar of the small tree.
fn tar(scene: &Scene) -> PathBuf {
    let tar = scene.path("source.tar");
    write_tree(&scene.small_tree(), &tar).unwrap();
    tar
}

/// `nydus-image create` with all its output in the directory `out`.
fn create(scene: &Scene, kind: &str, source: &Path) -> Command {
    let out = scene.dir("out");
    let mut command = nydus_image().unwrap();
    command
        .args(["create", "--type", kind, "--bootstrap"])
        .arg(out.join("boot"));
    command.arg("--blob-dir").arg(out).arg(source);
    command
}

/// Changes one byte of a file.
fn flip(file: &Path, offset: u64) {
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let mut byte = [0];
    open.read_exact_at(&mut byte, offset).unwrap();
    open.write_all_at(&[byte[0] ^ 0xff], offset).unwrap();
}

fn cut(file: &Path, length: u64) {
    OpenOptions::new()
        .write(true)
        .open(file)
        .unwrap()
        .set_len(length)
        .unwrap();
}

#[test]
fn damaged_archives() {
    for (case, kind, damage) in [
        ("cut inside a file", "tar-rafs", cut as fn(&Path, u64)),
        ("header changed", "tar-rafs", flip),
        ("cut inside a gzip", "targz-rafs", cut),
        ("gzip changed", "targz-rafs", flip),
    ] {
        let scene = Scene::new();
        let mut source = tar(&scene);
        let mut offset = 100_000;
        if kind == "targz-rafs" {
            succeed(Command::new("gzip").arg(&source)).unwrap();
            source = scene.path("source.tar.gz");
        } else if case == "header changed" {
            // Into the name of the first entry: its checksum is wrong now.
            offset = 3;
        }
        damage(&source, offset);
        let name = source.file_name().unwrap().to_str().unwrap();
        assert_fails(case, &mut create(&scene, kind, &source), &[name]);
        assert_empty(case, &scene.path("out"));
    }
}

#[test]
fn what_is_no_archive_at_all() {
    let scene = Scene::new();
    let source = scene.path("text.tar");
    fs::write(&source, "this is not a tar\n".repeat(1000)).unwrap();
    assert_fails(
        "text",
        &mut create(&scene, "tar-rafs", &source),
        &["text.tar"],
    );
    assert_fails(
        "text as gzip",
        &mut create(&scene, "targz-rafs", &source),
        &["text.tar"],
    );
    let missing = scene.path("missing.tar");
    assert_fails(
        "missing",
        &mut create(&scene, "tar-rafs", &missing),
        &["missing.tar"],
    );
    assert_fails(
        "missing",
        &mut create(&scene, "dir-rafs", &missing),
        &["missing.tar"],
    );
    assert_empty("no archive", &scene.path("out"));
}

#[test]
fn names_that_lead_out_of_the_image() {
    for (case, transform, word) in [
        ("parent", "s,second,../second,", ".."),
        ("inner parent", "s,second,a/../../second,", ".."),
    ] {
        let scene = Scene::new();
        let source = scene.small_tree();
        let archive = scene.path("evil.tar");
        let mut tar = Command::new("tar");
        tar.args(["--absolute-names", "--transform", transform, "-cf"])
            .arg(&archive);
        succeed(tar.arg("-C").arg(source).args(["first", "second"])).unwrap();
        assert_fails(
            case,
            &mut create(&scene, "tar-rafs", &archive),
            &["evil.tar", word],
        );
        assert_empty(case, &scene.path("out"));
    }
}

#[test]
fn hard_links_that_lead_out_of_the_image() {
    for (case, transform) in [
        ("absolute", "s,^a$,/etc/passwd,RSh"),
        ("parent", "s,^a$,../a,RSh"),
        ("to nothing", "s,^a$,nowhere,RSh"),
    ] {
        let scene = Scene::new();
        let source = scene.dir("source");
        fs::write(source.join("a"), "a").unwrap();
        fs::hard_link(source.join("a"), source.join("b")).unwrap();
        let archive = scene.path("evil.tar");
        let mut tar = Command::new("tar");
        tar.args(["--absolute-names", "--transform", transform, "-cf"])
            .arg(&archive);
        succeed(tar.arg("-C").arg(source).args(["a", "b"])).unwrap();
        let listing = succeed(Command::new("tar").arg("-tvPf").arg(&archive))
            .unwrap()
            .stdout;
        assert!(listing.contains("link to"), "{listing}");
        assert_fails(
            case,
            &mut create(&scene, "tar-rafs", &archive),
            &["evil.tar", "b"],
        );
        assert_empty(case, &scene.path("out"));
    }
}

#[test]
fn a_full_disk() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let out = scene.dir("out");
    let tmpfs = Tmpfs::mount(&out, 256 << 10).unwrap();
    assert_fails(
        "full disk",
        &mut create(&scene, "dir-rafs", &source),
        &["No space left on device", out.to_str().unwrap()],
    );
    assert_empty("full disk", &out);
    drop(tmpfs);
}

#[test]
fn an_output_directory_that_is_not_there() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let mut command = nydus_image().unwrap();
    command
        .args(["create", "--bootstrap"])
        .arg(scene.path("boot"));
    command
        .arg("--blob-dir")
        .arg(scene.path("no-such-dir"))
        .arg(source);
    assert_fails("no directory", &mut command, &["no-such-dir"]);
    assert!(!scene.path("boot").exists());
}

fn check(build: &Build) -> Command {
    let mut command = nydus_image().unwrap();
    command
        .arg("check")
        .arg(&build.bootstrap)
        .arg("--blob-dir")
        .arg(&build.blob_dir);
    command
}

#[test]
fn damaged_bootstraps_do_not_pass_the_check() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let good = fs::read(&build.bootstrap).unwrap();
    let length = u64::try_from(good.len()).unwrap();
    for (case, damage) in [
        (
            "empty",
            Box::new(|file: &Path| cut(file, 0)) as Box<dyn Fn(&Path)>,
        ),
        ("half", Box::new(move |file: &Path| cut(file, length / 2))),
        (
            "one block short",
            Box::new(move |file: &Path| cut(file, length - 4096)),
        ),
        ("magic", Box::new(|file: &Path| flip(file, 1024))),
        ("block size", Box::new(|file: &Path| flip(file, 1036))),
    ] {
        damage(&build.bootstrap);
        assert_fails(case, &mut check(&build), &["image.boot"]);
        let mut merge = nydus_image().unwrap();
        merge
            .arg("merge")
            .arg("--bootstrap")
            .arg(scene.path("merged"))
            .arg(&build.bootstrap);
        assert_fails(case, &mut merge, &["image.boot"]);
        assert!(!scene.path("merged").exists(), "{case}");
        fs::write(&build.bootstrap, &good).unwrap();
    }
    succeed(&mut check(&build)).unwrap();
}

#[test]
fn damaged_blobs_do_not_pass_the_check() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let id = build.blobs[0].as_str();
    let blob = build.blob_dir.join(id);
    let good = fs::read(&blob).unwrap();
    for (case, damage) in [("data changed", flip as fn(&Path, u64)), ("cut", cut)] {
        damage(&blob, 150_000);
        assert_fails(case, &mut check(&build), &[id]);
        fs::write(&blob, &good).unwrap();
    }
    fs::remove_file(&blob).unwrap();
    assert_fails("missing", &mut check(&build), &[id]);
}
