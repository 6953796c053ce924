//! `nydus-image convert` and `nydusd mount`: an image goes through registries and
//! layouts and stays what it was.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::binaries::nydus_image;
use support::command::{Finished, run, succeed};
use support::image::layer::{write_tree, write_tree_without_holes};
use support::image::layout::{self, Image};
use support::process::Process;
use support::proxy::{Fault, Proxy};
use support::registry::{Auth, Registry};
use support::tokens::TokenServer;
use support::tree::{Detail, describe, nasty};

use crate::merge::{layer_tars, three_states};
use crate::scene::{Scene, assert_same_tree};

const BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// An image of three layers as a layout with the tag `test`, and the tree it makes.
struct Source {
    layout: PathBuf,
    tree: PathBuf,
}

impl Source {
    fn new(scene: &Scene) -> Self {
        let states = three_states(scene);
        let tars = layer_tars(scene, &states);
        let tars: Vec<&Path> = tars.iter().map(PathBuf::as_path).collect();
        let layout = scene.path("layout");
        layout::write(&layout, "test", &[Image::new(&tars)]).unwrap();
        let [_, _, tree] = states;
        Self { layout, tree }
    }

    /// Two layers, as tar programs write them that do not look for holes.
    fn without_holes(scene: &Scene) -> Self {
        let tree = scene.nasty_tree(nasty::Options {
            without_sockets: true,
            without_huge: true,
        });
        let tars = [scene.path("lower.tar"), scene.path("upper.tar")];
        write_tree_without_holes(&tree, &tars[0]).unwrap();
        fs::write(tree.join("extra"), "in the upper layer\n").unwrap();
        let mut upper = Command::new("tar");
        upper.args(["--no-recursion", "--format=pax", "-cf"]);
        upper.arg(&tars[1]).arg("-C").arg(&tree);
        succeed(upper.args([".", "extra"])).unwrap();
        let layout = scene.path("layout");
        let image = Image::new(&[&tars[0], &tars[1]]);
        layout::write(&layout, "test", &[image]).unwrap();
        Self { layout, tree }
    }

    fn reference(&self) -> String {
        format!("oci:{}:test", self.layout.display())
    }
}

/// The command; without a docker configuration unless the caller names one.
fn convert(scene: &Scene, from: &str, to: &str) -> Command {
    let mut command = nydus_image().unwrap();
    command
        .args(["convert", from, to])
        .env("DOCKER_CONFIG", scene.dir("no-credentials"));
    command
}

#[test]
fn registry_to_registry_and_nothing_twice() {
    let scene = Scene::new();
    let source = Source::new(&scene);
    let registry = Registry::start(Auth::Open).unwrap();
    registry.push(&source.layout, "test", "app:v1").unwrap();
    let (from, to) = (
        registry.reference("app:v1"),
        registry.reference("app:nydus"),
    );
    succeed(&mut convert(&scene, &from, &to)).unwrap();
    let manifest = registry.manifest("app:nydus").unwrap();

    let daemon = scene.mount_image(&to);
    assert_same_tree(&source.tree, daemon.point());
    daemon.stop().unwrap();

    let mark = registry.log().len();
    succeed(&mut convert(
        &scene,
        &from,
        &registry.reference("app:again"),
    ))
    .unwrap();
    assert_eq!(
        registry.traffic_since(mark).blobs_written,
        0,
        "{}",
        &registry.log()[mark..]
    );
    assert_eq!(registry.manifest("app:again").unwrap(), manifest);
}

#[test]
fn the_manifest_is_what_clients_expect() {
    let scene = Scene::new();
    let source = Source::new(&scene);
    let target = scene.path("target");
    let to = format!("oci:{}:nydus", target.display());
    succeed(&mut convert(&scene, &source.reference(), &to)).unwrap();

    let before = image_in(&source.layout);
    let after = image_in(&target);
    let layers = after.manifest["layers"].as_array().unwrap();
    let (bootstrap, blobs) = layers.split_last().unwrap();
    assert_eq!(blobs.len(), 3);
    for blob in blobs {
        assert_eq!(blob["mediaType"], BLOB);
        assert_eq!(
            blob["annotations"]["containerd.io/snapshot/nydus-blob"],
            "true"
        );
    }
    assert_eq!(bootstrap["mediaType"], GZIP);
    let annotations = &bootstrap["annotations"];
    assert_eq!(
        annotations["containerd.io/snapshot/nydus-bootstrap"],
        "true"
    );
    assert_eq!(annotations["containerd.io/snapshot/nydus-fs-version"], "6");

    assert_eq!(after.config["config"], before.config["config"]);
    assert_eq!(after.config["architecture"], before.config["architecture"]);
    let diff_ids = after.config["rootfs"]["diff_ids"].as_array().unwrap();
    assert_eq!(diff_ids.len(), 4);
    assert_eq!(diff_ids[0], blobs[0]["digest"]);
    let history = after.config["history"].as_array().unwrap();
    assert_eq!(history.len(), 4);
    assert_eq!(history[3]["created_by"], "Nydus Converter");
    assert_eq!(history[3]["comment"], "Nydus Bootstrap Layer");

    let listing = list_tar_gz(&blob_file(&target, bootstrap));
    let names: Vec<&str> = listing
        .lines()
        .filter_map(|l| l.split_whitespace().last())
        .collect();
    assert!(names.contains(&"image/image.boot"), "{listing}");
    let metas = names
        .iter()
        .filter(|name| name.ends_with(".blob.meta"))
        .count();
    assert_eq!(metas, 3, "{listing}");
}

/// Manifest and configuration of the one image of a layout.
struct Parsed {
    manifest: Value,
    config: Value,
}

fn image_in(layout: &Path) -> Parsed {
    let read =
        |file: PathBuf| -> Value { serde_json::from_slice(&fs::read(file).unwrap()).unwrap() };
    let index = read(layout.join("index.json"));
    let manifest = read(blob_file(layout, &index["manifests"][0]));
    let config = read(blob_file(layout, &manifest["config"]));
    Parsed { manifest, config }
}

fn blob_file(layout: &Path, descriptor: &Value) -> PathBuf {
    let digest = descriptor["digest"].as_str().unwrap();
    layout
        .join("blobs/sha256")
        .join(digest.strip_prefix("sha256:").unwrap())
}

fn list_tar_gz(file: &Path) -> String {
    succeed(Command::new("tar").arg("-tvzf").arg(file))
        .unwrap()
        .stdout
}

#[test]
fn layouts_and_registries_in_every_direction() {
    let scene = Scene::new();
    let source = Source::new(&scene);
    let registry = Registry::start(Auth::Open).unwrap();
    registry.push(&source.layout, "test", "app:v1").unwrap();
    let in_registry = registry.reference("app:v1");
    let to_registry = registry.reference("app:from-layout");
    let [one, two] = ["one", "two"].map(|name| format!("oci:{}:x", scene.path(name).display()));
    succeed(&mut convert(&scene, &source.reference(), &to_registry)).unwrap();
    succeed(&mut convert(&scene, &source.reference(), &one)).unwrap();
    succeed(&mut convert(&scene, &in_registry, &two)).unwrap();

    let in_layout = |name: &str| {
        let index = fs::read(scene.path(name).join("index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        let file = blob_file(&scene.path(name), &index["manifests"][0]);
        serde_json::from_slice::<Value>(&fs::read(file).unwrap()).unwrap()["layers"].clone()
    };
    let expected = registry.manifest_json("app:from-layout").unwrap()["layers"].clone();
    assert_eq!(in_layout("one"), expected);
    assert_eq!(in_layout("two"), expected);

    for image in [&to_registry, &one, &two] {
        let daemon = scene.mount_image(image);
        assert_same_tree(&source.tree, daemon.point());
        daemon.stop().unwrap();
    }
}

#[test]
fn layers_may_be_plain_tars() {
    let scene = Scene::new();
    let tree = scene.small_tree();
    let tar = scene.path("layer.tar");
    write_tree(&tree, &tar).unwrap();
    let mut image = Image::new(&[&tar]);
    image.gzip = false;
    layout::write(&scene.path("layout"), "test", &[image]).unwrap();
    let from = format!("oci:{}:test", scene.path("layout").display());
    let to = format!("oci:{}:test", scene.path("target").display());
    succeed(&mut convert(&scene, &from, &to)).unwrap();
    let daemon = scene.mount_image(&to);
    assert_same_tree(&tree, daemon.point());
    daemon.stop().unwrap();
}

/// Some tools write layers that have a file and not the directories around it.
#[test]
fn directories_that_a_layer_does_not_list_stay_as_they_are() {
    let scene = Scene::new();
    let tree = scene.dir("source");
    fs::create_dir_all(tree.join("private/tmp")).unwrap();
    fs::set_permissions(tree.join("private"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(tree.join("private/tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    lchown(tree.join("private"), Some(1000), Some(1000)).unwrap();
    let lower = scene.path("lower.tar");
    write_tree(&tree, &lower).unwrap();
    let before = describe(&tree, Detail::All).unwrap();

    fs::write(tree.join("private/tmp/file"), "x").unwrap();
    let upper = scene.path("upper.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf")
        .arg(&upper)
        .arg("-C")
        .arg(&tree)
        .arg("private/tmp/file");
    succeed(&mut tar).unwrap();

    layout::write(
        &scene.path("layout"),
        "test",
        &[Image::new(&[&lower, &upper])],
    )
    .unwrap();
    let from = format!("oci:{}:test", scene.path("layout").display());
    let to = format!("oci:{}:test", scene.path("target").display());
    succeed(&mut convert(&scene, &from, &to)).unwrap();
    let daemon = scene.mount_image(&to);
    let mut after = describe(daemon.point(), Detail::All).unwrap();
    let added = after.pop().unwrap();
    assert!(added.contains("/private/tmp/file"), "{added}");
    assert_eq!(after, before);
    daemon.stop().unwrap();
}

#[test]
fn an_index_keeps_its_platforms() {
    let scene = Scene::new();
    let tar = scene.path("layer.tar");
    write_tree(&scene.small_tree(), &tar).unwrap();
    let platforms = ["amd64", "arm64"].map(|architecture| {
        let mut image = Image::new(&[&tar]);
        image.architecture = architecture.to_owned();
        image
    });
    layout::write(&scene.path("layout"), "test", &platforms).unwrap();
    let registry = Registry::start(Auth::Open).unwrap();
    registry
        .push(&scene.path("layout"), "test", "app:v1")
        .unwrap();
    let from = registry.reference("app:v1");

    succeed(&mut convert(&scene, &from, &registry.reference("app:all"))).unwrap();
    let index = registry.manifest_json("app:all").unwrap();
    let listed: Vec<&Value> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["platform"]["architecture"])
        .collect();
    assert_eq!(listed, ["amd64", "arm64"]);

    let mut one = convert(&scene, &from, &registry.reference("app:arm"));
    succeed(one.args(["--platform", "linux/arm64"])).unwrap();
    let only = registry.manifest_json("app:arm").unwrap();
    let config = registry
        .blob_file(only["config"]["digest"].as_str().unwrap())
        .unwrap();
    let config: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    assert_eq!(config["architecture"], "arm64");

    let mut none = convert(&scene, &from, &registry.reference("app:none"));
    let finished = run(none.args(["--platform", "linux/riscv64"])).unwrap();
    assert_eq!(finished.code(), 1);
    assert!(
        finished.stderr.contains("linux/amd64, linux/arm64"),
        "{}",
        finished.stderr
    );
    assert!(registry.manifest("app:none").is_err());
}

#[test]
fn user_name_and_password() {
    with_credentials(Auth::Basic);
}

#[test]
fn bearer_tokens() {
    with_credentials(Auth::Bearer(TokenServer::start().unwrap()));
}

fn with_credentials(auth: Auth) {
    let scene = Scene::new();
    let source = Source::new(&scene);
    let registry = Registry::start(auth).unwrap();
    registry.push(&source.layout, "test", "app:v1").unwrap();
    let (from, to) = (
        registry.reference("app:v1"),
        registry.reference("app:nydus"),
    );
    let config = registry.docker_config(registry.host()).unwrap();

    let refused = run(&mut convert(&scene, &from, &to)).unwrap();
    assert_eq!(refused.code(), 1);
    assert!(refused.stderr.contains("401"), "{}", refused.stderr);

    let finished = succeed(convert(&scene, &from, &to).env("DOCKER_CONFIG", &config)).unwrap();
    assert_no_secrets(&finished);
    let point = scene.new_point();
    let mut command = scene.mount_command(&to, &point);
    let mut daemon = scene.start(command.env("DOCKER_CONFIG", &config), &point);
    assert_same_tree(&source.tree, daemon.point());
    assert!(!daemon.process().log().contains(support::registry::PASSWORD));
    daemon.stop().unwrap();
}

fn assert_no_secrets(finished: &Finished) {
    for text in [&finished.stdout, &finished.stderr] {
        assert!(
            !text.contains(support::registry::PASSWORD),
            "password in:\n{text}"
        );
        assert!(!text.contains("Bearer ey"), "token in:\n{text}");
    }
}

/// Credentials are for the registry, not for the storage that it sends us to.
#[test]
fn redirects_to_object_storage() {
    let scene = Scene::new();
    let source = Source::new(&scene);
    let open = Registry::start(Auth::Open).unwrap();
    open.push(&source.layout, "test", "app:v1").unwrap();
    succeed(&mut convert(
        &scene,
        &source.reference(),
        &open.reference("app:nydus"),
    ))
    .unwrap();

    let storage = Proxy::start(open.host()).unwrap();
    let front = Proxy::start(open.host()).unwrap();
    front.fail("/blobs/sha256:", Fault::Redirect(storage.host().to_owned()));
    let daemon = scene.mount_image(&format!("{}/app:nydus", front.host()));
    assert_same_tree(&source.tree, daemon.point());
    daemon.stop().unwrap();
    assert!(!storage.requests().is_empty());
    for request in storage.requests() {
        assert!(request.header("authorization").is_none(), "{request:?}");
    }
}

#[test]
fn lazy_means_that_little_is_fetched() {
    let scene = Scene::new();
    let tree = scene.dir("source");
    for index in 0..32 {
        fs::write(
            tree.join(format!("file-{index:02}")),
            nasty::noise(1 << 20, index),
        )
        .unwrap();
    }
    let tar = scene.path("layer.tar");
    write_tree(&tree, &tar).unwrap();
    layout::write(&scene.path("layout"), "test", &[Image::new(&[&tar])]).unwrap();
    let registry = Registry::start(Auth::Open).unwrap();
    let from = format!("oci:{}:test", scene.path("layout").display());
    let to = registry.reference("app:nydus");
    succeed(&mut convert(&scene, &from, &to)).unwrap();

    let mark = registry.log().len();
    let daemon = scene.mount_image(&to);
    assert_eq!(fs::read_dir(daemon.point()).unwrap().count(), 32);
    let listed = registry.traffic_since(mark).bytes;
    assert!(
        listed < 256 << 10,
        "mounting and listing fetched {listed} bytes"
    );
    fs::read(daemon.point().join("file-07")).unwrap();
    let read = registry.traffic_since(mark).bytes;
    assert!(read < 8 << 20, "one file of 1 MiB fetched {read} bytes");
    daemon.stop().unwrap();

    // What was fetched once is there after a restart.
    let mark = registry.log().len();
    let daemon = scene.mount_image(&to);
    fs::read(daemon.point().join("file-07")).unwrap();
    let again = registry.traffic_since(mark).bytes;
    assert!(again < 256 << 10, "reading it again fetched {again} bytes");
    daemon.stop().unwrap();
}

#[test]
fn memory_does_not_grow_with_the_image() {
    const LIMIT_KIB: u64 = 256 << 10;
    let scene = Scene::new();
    let mut tars = Vec::new();
    for layer in 0..3 {
        let tree = scene.dir(&format!("layer-{layer}"));
        // One file larger than the limit, and many beside it.
        fs::write(
            tree.join(format!("big-{layer}")),
            nasty::noise(300 << 20, layer),
        )
        .unwrap();
        let tar = scene.path(&format!("layer-{layer}.tar"));
        write_tree(&tree, &tar).unwrap();
        fs::remove_dir_all(tree).unwrap();
        tars.push(tar);
    }
    let tars: Vec<&Path> = tars.iter().map(PathBuf::as_path).collect();
    let mut image = Image::new(&tars);
    image.gzip = false;
    layout::write(&scene.path("layout"), "test", &[image]).unwrap();
    let from = format!("oci:{}:test", scene.path("layout").display());
    let to = format!("oci:{}:test", scene.path("target").display());

    let mut process = Process::start(&mut convert(&scene, &from, &to), &scene.path("log")).unwrap();
    let mut peak = 0;
    let status = loop {
        peak = peak.max(peak_memory_kib(process.id()));
        if let Some(status) = process.ended().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    assert!(status.success(), "{}", process.log());
    assert!(peak > 0 && peak <= LIMIT_KIB, "{peak} KiB at the peak");
}

/// The most memory that the process ever had resident, as far as the kernel tells.
fn peak_memory_kib(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[test]
fn layers_used_in_place() {
    let scene = Scene::new();
    let source = Source::without_holes(&scene);
    let registry = Registry::start(Auth::Open).unwrap();
    registry.push(&source.layout, "test", "app:v1").unwrap();
    let from = registry.reference("app:v1");
    let originals: Vec<String> = image_in(&source.layout).manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect();

    // In one repository, the layers stay where they are; in another one, they are needed too.
    for (name, written) in [("app:ref", 4), ("other:ref", 6)] {
        let to = registry.reference(name);
        let mark = registry.log().len();
        succeed(convert(&scene, &from, &to).arg("--oci-ref")).unwrap();
        let traffic = registry.traffic_since(mark);
        assert_eq!(traffic.blobs_written, written, "{name}");

        let manifest = registry.manifest_json(name).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        let (_, blobs) = layers.split_last().unwrap();
        for (blob, original) in blobs.iter().zip(&originals) {
            assert_eq!(blob["mediaType"], BLOB);
            let annotations = &blob["annotations"];
            assert_eq!(annotations["containerd.io/snapshot/nydus-blob"], "true");
            assert_eq!(annotations["containerd.io/snapshot/nydus-ref"], *original);
        }
        let daemon = scene.mount_image(&to);
        assert_same_tree(&source.tree, daemon.point());
        daemon.stop().unwrap();
    }

    let target = scene.path("target");
    let to = format!("oci:{}:ref", target.display());
    succeed(convert(&scene, &source.reference(), &to).arg("--oci-ref")).unwrap();
    for original in &originals {
        let hex = original.strip_prefix("sha256:").unwrap();
        assert!(target.join("blobs/sha256").join(hex).exists());
    }
    let daemon = scene.mount_image(&to);
    assert_same_tree(&source.tree, daemon.point());
    daemon.stop().unwrap();
}

/// The lowest layer has a file with holes, which no index can describe.
#[test]
fn a_layer_with_holes_is_converted_beside_others() {
    let scene = Scene::new();
    let source = Source::new(&scene);
    let registry = Registry::start(Auth::Open).unwrap();
    registry.push(&source.layout, "test", "app:v1").unwrap();
    let (from, to) = (registry.reference("app:v1"), registry.reference("app:ref"));
    let finished = succeed(convert(&scene, &from, &to).arg("--oci-ref")).unwrap();
    let warnings = finished.stderr.matches("a file with holes").count();
    assert_eq!(warnings, 1, "{}", finished.stderr);

    let manifest = registry.manifest_json("app:ref").unwrap();
    let (_, blobs) = manifest["layers"].as_array().unwrap().split_last().unwrap();
    let stays = |blob: &Value| !blob["annotations"]["containerd.io/snapshot/nydus-ref"].is_null();
    let stays: Vec<bool> = blobs.iter().map(stays).collect();
    assert_eq!(stays, [false, true, true]);
    let daemon = scene.mount_image(&to);
    assert_same_tree(&source.tree, daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn a_chunk_dictionary_saves_blobs() {
    let scene = Scene::new();
    let source = Source::new(&scene);
    let registry = Registry::start(Auth::Open).unwrap();
    registry.push(&source.layout, "test", "app:v1").unwrap();
    let (from, first) = (
        registry.reference("app:v1"),
        registry.reference("app:first"),
    );
    succeed(&mut convert(&scene, &from, &first)).unwrap();
    let manifest = registry.manifest_json("app:first").unwrap();
    let layer = manifest["layers"].as_array().unwrap().last().unwrap();
    let packed = registry
        .blob_file(layer["digest"].as_str().unwrap())
        .unwrap();
    let boot = scene.dir("boot");
    succeed(
        Command::new("tar")
            .arg("-xzf")
            .arg(packed)
            .arg("-C")
            .arg(&boot),
    )
    .unwrap();
    let boot = boot.join("image/image.boot");

    let again = registry.reference("app:again");
    let mut command = convert(&scene, &from, &again);
    succeed(command.arg("--chunk-dict").arg(&boot)).unwrap();
    let second = registry.manifest_json("app:again").unwrap();
    let blobs = |manifest: &Value| -> Vec<(String, u64)> {
        let layers = manifest["layers"].as_array().unwrap().iter();
        let blobs = layers.filter(|layer| layer["mediaType"] == BLOB);
        blobs
            .map(|blob| {
                let digest = blob["digest"].as_str().unwrap();
                (digest.to_owned(), blob["size"].as_u64().unwrap())
            })
            .collect()
    };
    let (known, used) = (blobs(&manifest), blobs(&second));
    let size = |blobs: &[(String, u64)]| -> u64 { blobs.iter().map(|(_, size)| size).sum() };
    let new: Vec<_> = used
        .iter()
        .filter(|blob| !known.contains(blob))
        .cloned()
        .collect();
    assert!(used.len() > new.len(), "blobs of the dictionary are listed");
    assert!(size(&new) * 2 < size(&known), "{second}");
    let daemon = scene.mount_image(&again);
    assert_same_tree(&source.tree, daemon.point());
    daemon.stop().unwrap();

    // Where its blobs are not, the dictionary is of no use.
    let elsewhere = registry.reference("elsewhere:again");
    let mut command = convert(&scene, &from, &elsewhere);
    let finished = run(command.arg("--chunk-dict").arg(&boot)).unwrap();
    assert_eq!(finished.code(), 1);
    assert!(
        finished.stderr.contains("chunk dictionary"),
        "{}",
        finished.stderr
    );
}
