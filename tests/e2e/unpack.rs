//! What `unpack` and `export` write, judged by GNU tar, by the kernel's EROFS and by
//! `veritysetup`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::binaries::nydus_image;
use support::command::{run, succeed};
use support::fixtures;
use support::image::layout::{self, Image};
use support::matrix;
use support::mount::KernelMount;
use support::registry::{Auth, Registry};
use support::tree::nasty::Options;
use support::tree::{Detail, describe};

use crate::merge::{layer_tars, three_states};
use crate::scene::{Build, Scene, assert_same_tree};

/// Extracts an archive with everything that it records.
fn extract(scene: &Scene, tar: &Path) -> PathBuf {
    let to = scene.new_point();
    let mut command = Command::new("tar");
    command.args(["--extract", "--preserve-permissions", "--same-owner"]);
    command.args(["--xattrs", "--xattrs-include=*", "--numeric-owner"]);
    succeed(command.arg("--file").arg(tar).arg("--directory").arg(&to)).unwrap();
    to
}

fn unpack(build: &Build, tar: &Path) {
    let mut command = nydus_image().unwrap();
    command.arg("unpack").arg(&build.bootstrap);
    command.arg("--blob-dir").arg(&build.blob_dir);
    succeed(command.arg("--output").arg(tar)).unwrap();
}

fn export(build: &Build, disk: &Path, more: &[&str]) -> String {
    let mut command = nydus_image().unwrap();
    command.args(["export", "--block", "--bootstrap"]);
    command.arg(&build.bootstrap);
    command.arg("--localfs-dir").arg(&build.blob_dir);
    command.arg("--output").arg(disk);
    succeed(command.args(more)).unwrap().stdout
}

#[test]
fn a_nasty_tree_unpacks_to_itself() {
    let scene = Scene::new();
    let source = scene.nasty_tree(Options {
        without_sockets: true,
        ..Options::default()
    });
    let build = scene.create("image", &[], &source);
    let tar = scene.path("image.tar");
    unpack(&build, &tar);
    assert_same_tree(&source, &extract(&scene, &tar));
}

#[test]
fn the_kernel_mounts_an_exported_disk() {
    let scene = Scene::new();
    let source = scene.nasty_tree(Options::default());
    let options = ["--batch-size", "0x10000", "--compressor", "lz4_block"];
    let build = scene.create("image", &options, &source);
    let disk = scene.path("image.disk");
    assert_eq!(export(&build, &disk, &[]), "");
    let point = scene.new_point();
    let mount = KernelMount::erofs(&disk, &[], &point).unwrap();
    assert_same_tree(&source, &point);
    drop(mount);
}

/// Two layers: two devices behind the bootstrap.
#[test]
fn a_merged_image_exports_as_one_disk() {
    let scene = Scene::new();
    let lower = scene.small_tree();
    let upper = scene.dir("upper");
    fs::write(upper.join("added"), vec![b'u'; 700_000]).unwrap();
    fs::write(upper.join("first"), "replaced\n").unwrap();
    let first = scene.create("lower", &[], &lower);
    let second = scene.create("upper-layer", &[], &upper);
    // The name of a bootstrap says what its blob is called.
    let mut merge = nydus_image().unwrap();
    merge
        .args(["merge", "--bootstrap"])
        .arg(scene.path("merged.boot"));
    let blobs = scene.dir("blobs");
    for build in [&first, &second] {
        let id = &build.blobs[0];
        fs::copy(build.blob_dir.join(id), blobs.join(id)).unwrap();
        let named = scene.dir("named").join(id);
        fs::copy(&build.bootstrap, &named).unwrap();
        merge.arg(named);
    }
    succeed(&mut merge).unwrap();
    let merged = Build {
        bootstrap: scene.path("merged.boot"),
        blob_dir: blobs,
        blobs: Vec::new(),
    };
    let disk = scene.path("merged.disk");
    export(&merged, &disk, &["--threads", "2"]);
    let point = scene.new_point();
    let mount = KernelMount::erofs(&disk, &[], &point).unwrap();
    let read = |name: &str| fs::read(point.join(name)).unwrap();
    assert_eq!(read("first"), b"replaced\n");
    assert_eq!(read("added"), vec![b'u'; 700_000]);
    assert_eq!(read("second"), fs::read(lower.join("second")).unwrap());
    assert_eq!(read("etc/name"), b"small\n");
    drop(mount);

    let tar = scene.path("merged.tar");
    unpack(&merged, &tar);
    let extracted = extract(&scene, &tar);
    assert_eq!(
        fs::read(extracted.join("added")).unwrap(),
        vec![b'u'; 700_000]
    );
}

/// A converted image of three layers, its data straight from the registry.
#[test]
fn an_image_unpacks_from_a_registry() {
    let scene = Scene::new();
    let states = three_states(&scene);
    let tars = layer_tars(&scene, &states);
    let tars: Vec<&Path> = tars.iter().map(PathBuf::as_path).collect();
    let layout = scene.path("layout");
    layout::write(&layout, "test", &[Image::new(&tars)]).unwrap();
    let registry = Registry::start(Auth::Open).unwrap();
    let target = registry.reference("app:nydus");
    let mut convert = nydus_image().unwrap();
    convert
        .arg("convert")
        .arg(format!("oci:{}:test", layout.display()));
    convert.env("DOCKER_CONFIG", scene.dir("no-credentials"));
    succeed(convert.arg(&target)).unwrap();

    let manifest = registry.manifest_json("app:nydus").unwrap();
    let bootstrap = manifest["layers"].as_array().unwrap().last().unwrap();
    let layer = registry
        .blob_file(bootstrap["digest"].as_str().unwrap())
        .unwrap();
    let metadata = scene.dir("metadata");
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(layer).arg("-C").arg(&metadata);
    succeed(&mut tar).unwrap();

    let output = scene.path("image.tar");
    let mut unpack = nydus_image().unwrap();
    unpack.arg("unpack").arg(metadata.join("image/image.boot"));
    unpack.args(["--backend-type", "registry", "--backend-config"]);
    let config = serde_json::json!({"host": registry.host(), "repo": "app", "scheme": "http"});
    unpack.arg(config.to_string()).arg("--output").arg(&output);
    succeed(&mut unpack).unwrap();
    assert_same_tree(&states[2], &extract(&scene, &output));
}

#[test]
fn veritysetup_accepts_the_hash_tree() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let disk = scene.path("image.disk");
    let line = export(&build, &disk, &["--verity"]);
    let options = line.strip_prefix("dm-verity options: ").unwrap();
    let mut words: Vec<_> = options
        .split_whitespace()
        .map(|word| if word == "\"\"" { "" } else { word })
        .collect();
    let root = words.pop().unwrap();
    let verify = || {
        let mut command = Command::new("veritysetup");
        // `-` is how it is told that there is no salt.
        command.arg("verify").arg(&disk).arg(&disk).arg(root);
        command.args(
            words
                .iter()
                .map(|word| if word.is_empty() { "-" } else { word }),
        );
        run(&mut command).unwrap()
    };
    let finished = verify();
    assert_eq!(finished.code(), 0, "{}", finished.stderr);

    let point = scene.new_point();
    let mount = KernelMount::erofs(&disk, &[], &point).unwrap();
    assert_same_tree(&source, &point);
    drop(mount);

    let mut bytes = fs::read(&disk).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&disk, bytes).unwrap();
    assert_ne!(verify().code(), 0);
}

/// Whatever the options, the archive and the disk hold the same tree.
#[test]
fn all_kinds_of_images_unpack_and_export() {
    let scene = Scene::new();
    let source = scene.nasty_tree(Options {
        without_sockets: true,
        without_huge: true,
    });
    for (number, options) in matrix::pairwise().into_iter().enumerate() {
        if options.source != matrix::Source::Dir || options.inline_meta {
            continue;
        }
        let arguments = options.arguments();
        let words: Vec<_> = arguments.iter().map(String::as_str).collect();
        let build = scene.create(&format!("image-{number}"), &words, &source);
        let (tar, disk) = (scene.path("one.tar"), scene.path("one.disk"));
        unpack(&build, &tar);
        assert_same_tree(&source, &extract(&scene, &tar));
        export(&build, &disk, &[]);
        let point = scene.new_point();
        let mount = KernelMount::erofs(&disk, &[], &point).unwrap();
        assert_same_tree(&source, &point);
        drop(mount);
    }
}

/// Images that Nydus v2.4 wrote, those with batches, with the bootstrap inside and
/// with an OCI layer as data included.
#[test]
fn foreign_images_unpack_and_export() {
    let Some(directory) = fixtures::directory().unwrap() else {
        return;
    };
    let text = fs::read_to_string(directory.join("tree.jsonl")).unwrap();
    // From a directory, Nydus v2.4 does not keep the time of the root.
    let is_root = |line: &&str| line.contains("\"path\": \"/\",");
    let expected: Vec<_> = text.lines().filter(|line| !is_root(line)).collect();
    let scene = Scene::new();
    let mut images = 0;
    for entry in fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() || path.ends_with("merged") {
            continue;
        }
        images += 1;
        let build = foreign(&scene, &path);
        let tar = scene.path("foreign.tar");
        let mut command = nydus_image().unwrap();
        command
            .arg("unpack")
            .arg(&build.bootstrap)
            .arg("--output")
            .arg(&tar);
        let inline = build.bootstrap.file_name().unwrap() != "boot";
        match inline {
            true => command.arg("--blob").arg(&build.bootstrap),
            false => command.arg("--blob-dir").arg(&build.blob_dir),
        };
        succeed(&mut command).unwrap();
        let same = |root: &Path| {
            let lines = describe(root, Detail::All).unwrap();
            let lines: Vec<_> = lines.iter().map(String::as_str).collect();
            let lines: Vec<_> = lines.into_iter().filter(|line| !is_root(line)).collect();
            assert_eq!(lines, expected, "{}", path.display());
        };
        same(&extract(&scene, &tar));
        if !inline {
            let (disk, point) = (scene.path("foreign.disk"), scene.new_point());
            export(&build, &disk, &[]);
            let mount = KernelMount::erofs(&disk, &[], &point).unwrap();
            same(&point);
            drop(mount);
        }
    }
    assert!(images > 10, "{images} images in {}", directory.display());
}

/// Where bootstrap and blobs of a fixture are. A layer that is used in place is
/// copied to the name that a directory of blobs has for it.
fn foreign(scene: &Scene, path: &Path) -> Build {
    let boot = path.join("boot");
    let mut build = Build {
        bootstrap: boot.clone(),
        blob_dir: path.to_owned(),
        blobs: Vec::new(),
    };
    for entry in fs::read_dir(path).unwrap() {
        let file = entry.unwrap().path();
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        if !boot.exists() {
            build.bootstrap = file;
        } else if name.contains('.') || path.ends_with("targz-ref") {
            let id = name.split('.').next().unwrap();
            build.blob_dir = scene.dir("in-place");
            fs::copy(&file, build.blob_dir.join(id)).unwrap();
        }
    }
    build
}
