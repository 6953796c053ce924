//! Failures under a mounted file system: the affected range gives EIO, everything
//! else goes on, and all is well again when the cause goes away. And mounts that
//! cannot start, which say why.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::libc;
use support::binaries::{nydus_image, nydusd};
use support::command::succeed;
use support::image::layer::write_tree;
use support::image::layout::{self, Image};
use support::mount::{Nydusd, Tmpfs, is_mounted};
use support::proxy::{Fault, Proxy};
use support::registry::{Auth, Registry};

use crate::scene::{Build, Scene, assert_fails};

/// An image in a registry, mounted through a proxy.
pub(crate) struct Stage {
    pub scene: Scene,
    pub source: PathBuf,
    pub proxy: Proxy,
    _registry: Registry,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let scene = Scene::new();
        let source = scene.small_tree();
        let tar = scene.path("layer.tar");
        write_tree(&source, &tar).unwrap();
        layout::write(&scene.path("layout"), "test", &[Image::new(&[&tar])]).unwrap();
        let registry = Registry::start(Auth::Open).unwrap();
        let mut convert = nydus_image().unwrap();
        convert
            .arg("convert")
            .arg(format!("oci:{}:test", scene.path("layout").display()));
        succeed(convert.arg(registry.reference("app:nydus"))).unwrap();
        let proxy = Proxy::start(registry.host()).unwrap();
        Self {
            scene,
            source,
            proxy,
            _registry: registry,
        }
    }

    pub(crate) fn image(&self) -> String {
        format!("{}/app:nydus", self.proxy.host())
    }

    /// Starts with an empty cache.
    fn mount(&self) -> Nydusd {
        let cache = self.scene.path("cache");
        if cache.exists() {
            fs::remove_dir_all(cache).unwrap();
        }
        let point = self.scene.new_point();
        let mut command = self.scene.mount_command(&self.image(), &point);
        self.scene.start(command.args(["--driver", "fuse"]), &point)
    }

    pub(crate) fn assert_reads(&self, daemon: &Nydusd, name: &str) {
        let expected = fs::read(self.source.join(name)).unwrap();
        assert!(
            fs::read(daemon.point().join(name)).unwrap() == expected,
            "{name}: wrong bytes"
        );
    }
}

fn read_error(path: &Path) -> Option<i32> {
    fs::read(path)
        .err()
        .map(|error: io::Error| error.raw_os_error().unwrap_or_default())
}

#[test]
fn a_failing_registry_costs_only_what_is_not_there_yet() {
    let stage = Stage::new();
    for fault in [
        Fault::Status(401, Vec::new()),
        Fault::Status(404, Vec::new()),
        Fault::Status(416, Vec::new()),
        Fault::Status(429, Vec::new()),
        Fault::Status(500, Vec::new()),
        Fault::Hangup,
        Fault::CloseAfter(1000),
        Fault::Shorten(1000),
        Fault::Garble,
    ] {
        let daemon = stage.mount();
        stage.assert_reads(&daemon, "etc/name");
        stage.proxy.fail("/blobs/", fault.clone());
        let error = read_error(&daemon.point().join("second"));
        assert_eq!(error, Some(libc::EIO), "{fault:?}");
        // What is in the cache, and what needs no data, goes on.
        stage.assert_reads(&daemon, "etc/name");
        assert_eq!(
            fs::read_dir(daemon.point()).unwrap().count(),
            4,
            "{fault:?}"
        );
        assert_eq!(
            fs::metadata(daemon.point().join("third")).unwrap().len(),
            300_000
        );
        stage.proxy.heal();
        stage.assert_reads(&daemon, "second");
        stage.assert_reads(&daemon, "third");
        daemon.stop().unwrap();
    }
}

#[test]
fn a_failure_that_passes_is_not_seen() {
    let stage = Stage::new();
    for fault in [
        Fault::Status(500, Vec::new()),
        Fault::Status(429, vec![("Retry-After", "1".to_owned())]),
        Fault::Hangup,
        Fault::CloseAfter(1000),
        Fault::IgnoreRange,
    ] {
        let daemon = stage.mount();
        stage.proxy.fail_times(1, "/blobs/", fault.clone());
        stage.assert_reads(&daemon, "second");
        stage.proxy.heal();
        daemon.stop().unwrap();
    }
}

#[test]
fn a_damaged_blob_costs_only_the_damaged_chunk() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &["--compressor", "none"], &source);
    let blob = build.blob_dir.join(&build.blobs[0]);
    // Uncompressed, so the content of a file can be found in the blob.
    let content = fs::read(source.join("second")).unwrap();
    let bytes = fs::read(&blob).unwrap();
    let at = bytes
        .windows(64)
        .position(|window| window == &content[..64])
        .unwrap();
    let file = OpenOptions::new().write(true).open(&blob).unwrap();
    let at = u64::try_from(at).unwrap() + 1000;
    file.write_all_at(&[!content[1000]], at).unwrap();

    let daemon = mount_with_own_cache(&scene, &build);
    assert_eq!(read_error(&daemon.point().join("second")), Some(libc::EIO));
    for name in ["first", "third", "etc/name"] {
        let expected = fs::read(source.join(name)).unwrap();
        assert!(
            fs::read(daemon.point().join(name)).unwrap() == expected,
            "{name}"
        );
    }
    file.write_all_at(&content[1000..1001], at).unwrap();
    assert!(
        fs::read(daemon.point().join("second")).unwrap() == content,
        "not recovered"
    );
    daemon.stop().unwrap();
}

fn mount_with_own_cache(scene: &Scene, build: &Build) -> Nydusd {
    let point = scene.new_point();
    let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
    command.args(["--driver", "fuse"]);
    scene.start(command.arg("--localfs-dir").arg(&build.blob_dir), &point)
}

/// Right bytes or EIO; never wrong bytes, never another error.
fn assert_right_or_eio(case: &str, expected: &[u8], path: &Path) {
    match fs::read(path) {
        Ok(bytes) => assert!(bytes == expected, "{case}: wrong bytes"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO), "{case}: {error}"),
    }
}

#[test]
fn a_full_or_read_only_cache_disk() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let cache = scene.dir("cache");
    let tmpfs = Tmpfs::mount(&cache, 400 << 10).unwrap();
    let daemon = mount_with_own_cache(&scene, &build);
    for name in ["first", "second", "third"] {
        let expected = fs::read(source.join(name)).unwrap();
        assert_right_or_eio("full disk", &expected, &daemon.point().join(name));
    }
    assert_eq!(fs::read_dir(daemon.point()).unwrap().count(), 4);
    tmpfs.resize(8 << 20).unwrap();
    for name in ["first", "second", "third"] {
        let expected = fs::read(source.join(name)).unwrap();
        assert!(
            fs::read(daemon.point().join(name)).unwrap() == expected,
            "{name}: not recovered"
        );
    }
    daemon.stop().unwrap();
}

#[test]
fn mounts_that_cannot_start() {
    let scene = Scene::new();
    let build = scene.create("image", &[], &scene.small_tree());
    let file = scene.path("file");
    fs::write(&file, "x").unwrap();
    let point = scene.dir("point");
    let bootstrap = build.bootstrap.to_str().unwrap();
    let damaged = scene.path("damaged.boot");
    let mut bytes = fs::read(bootstrap).unwrap();
    bytes.truncate(5000);
    fs::write(&damaged, bytes).unwrap();

    let mount = |image: &str, point: &Path, cache: &Path| {
        let mut command = nydusd().unwrap();
        command
            .args(["mount", image])
            .arg(point)
            .arg("--cache-dir")
            .arg(cache);
        command.arg("--localfs-dir").arg(&build.blob_dir);
        command
    };
    let cache = scene.path("cache");
    for (case, command, word) in [
        (
            "mount point is a file",
            mount(bootstrap, &file, &cache),
            "file",
        ),
        (
            "no mount point",
            mount(bootstrap, &scene.path("nowhere"), &cache),
            "nowhere",
        ),
        (
            "no bootstrap",
            mount("/no/such/boot", &point, &cache),
            "/no/such/boot",
        ),
        (
            "damaged bootstrap",
            mount(damaged.to_str().unwrap(), &point, &cache),
            "damaged.boot",
        ),
        ("cache is a file", mount(bootstrap, &point, &file), "file"),
        (
            "cache cannot be made",
            mount(bootstrap, &point, Path::new("/proc/nydus")),
            "/proc/nydus",
        ),
    ] {
        let mut command: Command = command;
        assert_fails(case, &mut command, &[word]);
        assert!(!is_mounted(&point), "{case}");
    }
}

#[test]
fn images_that_cannot_be_mounted() {
    let stage = Stage::new();
    let point = stage.scene.dir("point");
    for (path, fault, word) in [
        ("/manifests/", Fault::Status(404, Vec::new()), "not found"),
        ("/manifests/", Fault::Status(401, Vec::new()), "401"),
        ("/manifests/", Fault::Status(500, Vec::new()), "500"),
        ("/manifests/", Fault::Garble, "app"),
        ("/blobs/", Fault::Status(404, Vec::new()), "not found"),
        ("/blobs/", Fault::Garble, "sha256"),
        ("/blobs/", Fault::CloseAfter(0), "sha256"),
    ] {
        let case = format!("{path} {fault:?}");
        stage.proxy.heal();
        stage.proxy.fail(path, fault);
        let mut command = stage.scene.mount_command(&stage.image(), &point);
        assert_fails(&case, &mut command, &[word]);
        assert!(!is_mounted(&point), "{case}");
    }
}

/// Nothing has converted it: the message should say so.
#[test]
fn an_image_that_is_not_ours() {
    let stage = Stage::new();
    let point = stage.scene.dir("point");
    let image = format!("oci:{}:test", stage.scene.path("layout").display());
    let mut command = stage.scene.mount_command(&image, &point);
    assert_fails("not converted", &mut command, &["convert"]);
}
