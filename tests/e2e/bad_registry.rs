//! Registries that fail, while an image is converted: what passes is ridden out,
//! what stays is reported once, and nothing half done becomes visible.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use support::binaries::nydus_image;
use support::command::succeed;
use support::image::layer::write_tree;
use support::image::layout::{self, Image};
use support::proxy::{Fault, Proxy};
use support::registry::{Auth, Registry};

use crate::scene::{Scene, assert_fails};

/// A registry with the image `app:v1`, and a proxy in front of it.
struct Stage {
    scene: Scene,
    registry: Registry,
    proxy: Proxy,
}

impl Stage {
    fn new() -> Self {
        let scene = Scene::new();
        let tar = scene.path("layer.tar");
        write_tree(&scene.small_tree(), &tar).unwrap();
        let layout = scene.path("layout");
        layout::write(&layout, "test", &[Image::new(&[&tar])]).unwrap();
        let registry = Registry::start(Auth::Open).unwrap();
        registry.push(&layout, "test", "app:v1").unwrap();
        let proxy = Proxy::start(registry.host()).unwrap();
        Self {
            scene,
            registry,
            proxy,
        }
    }

    /// From the registry, through the proxy, into a layout.
    fn download(&self) -> Command {
        let mut command = nydus_image().unwrap();
        command
            .arg("convert")
            .arg(format!("{}/app:v1", self.proxy.host()));
        command.arg(format!("oci:{}:x", self.target().display()));
        command
    }

    /// From a layout, through the proxy, into the registry as `app:nydus`.
    fn upload(&self) -> Command {
        let mut command = nydus_image().unwrap();
        command
            .arg("convert")
            .arg(format!("oci:{}:test", self.scene.path("layout").display()));
        command.arg(format!("{}/app:nydus", self.proxy.host()));
        command
    }

    fn target(&self) -> PathBuf {
        self.scene.path("target")
    }
}

fn status(code: u16) -> Fault {
    Fault::Status(code, Vec::new())
}

#[test]
fn downloads_that_fail_for_good() {
    let stage = Stage::new();
    for (path, fault, words) in [
        ("/manifests/", status(401), &["401"][..]),
        ("/manifests/", status(404), &["not found"]),
        ("/manifests/", status(500), &["500"]),
        ("/manifests/", Fault::Garble, &[]),
        ("/manifests/", Fault::Hangup, &[]),
        ("/blobs/", status(401), &["401"]),
        ("/blobs/", status(404), &["not found"]),
        ("/blobs/", status(416), &["416"]),
        ("/blobs/", status(429), &["429"]),
        ("/blobs/", status(500), &["500"]),
        ("/blobs/", Fault::Hangup, &[]),
        ("/blobs/", Fault::CloseAfter(0), &[]),
        ("/blobs/", Fault::Shorten(0), &[]),
        ("/blobs/", Fault::Garble, &[]),
    ] {
        let case = format!("{path} {fault:?}");
        stage.proxy.heal();
        stage.proxy.fail(path, fault);
        let mut words = words.to_vec();
        words.push(stage.proxy.host());
        assert_fails(&case, &mut stage.download(), &words);
        assert!(
            !stage.target().exists(),
            "{case}: the target was left behind"
        );
    }
    stage.proxy.heal();
    succeed(&mut stage.download()).unwrap();
}

#[test]
fn downloads_that_fail_once() {
    let stage = Stage::new();
    let slowly = Fault::Status(429, vec![("Retry-After", "1".to_owned())]);
    for fault in [
        slowly,
        status(500),
        status(503),
        Fault::Hangup,
        Fault::CloseAfter(100_000),
    ] {
        stage.proxy.heal();
        stage.proxy.fail_times(1, "/blobs/", fault.clone());
        let finished = support::command::run(&mut stage.download()).unwrap();
        assert_eq!(finished.code(), 0, "{fault:?}: {}", finished.stderr);
        std::fs::remove_dir_all(stage.target()).unwrap();
    }
}

#[test]
fn uploads_that_fail_for_good() {
    let stage = Stage::new();
    for (method, path, fault, words) in [
        ("POST", "/blobs/uploads/", status(401), &["401"][..]),
        ("POST", "/blobs/uploads/", status(403), &["403"]),
        ("POST", "/blobs/uploads/", status(500), &["500"]),
        ("PUT", "/blobs/uploads/", status(500), &["500"]),
        ("PUT", "/manifests/", status(400), &["400"]),
        ("PUT", "/manifests/", status(500), &["500"]),
        ("PUT", "/manifests/", Fault::Hangup, &[]),
    ] {
        let case = format!("{method} {path} {fault:?}");
        stage.proxy.heal();
        stage.proxy.fail_method(method, path, fault);
        let mut words = words.to_vec();
        words.push(stage.proxy.host());
        assert_fails(&case, &mut stage.upload(), &words);
        assert!(
            stage.registry.manifest("app:nydus").is_err(),
            "{case}: half an image is there"
        );
    }
    stage.proxy.heal();
    succeed(&mut stage.upload()).unwrap();
    stage.registry.manifest("app:nydus").unwrap();
}

#[test]
fn a_registry_that_is_not_there() {
    let scene = Scene::new();
    let mut command = nydus_image().unwrap();
    command.args(["convert", "127.0.0.1:1/app:v1"]);
    command.arg(format!("oci:{}:x", scene.path("target").display()));
    assert_fails("nobody listens", &mut command, &["127.0.0.1:1"]);
    assert!(!scene.path("target").exists());
}

#[test]
fn a_slow_registry_is_waited_for() {
    let stage = Stage::new();
    stage
        .proxy
        .fail_times(2, "/blobs/", Fault::Stall(Duration::from_secs(3)));
    succeed(&mut stage.download()).unwrap();
}

#[test]
fn references_that_are_none() {
    for reference in [
        "",
        "UPPER/case:tag",
        "host/repo:bad tag",
        "oci:/no/such/layout:x",
    ] {
        let scene = Scene::new();
        let mut command = nydus_image().unwrap();
        command.args(["convert", reference]);
        command.arg(format!("oci:{}:x", scene.path("target").display()));
        let finished = support::command::run(&mut command).unwrap();
        assert!(
            [1, 2].contains(&finished.code()),
            "{reference:?}: {}",
            finished.stderr
        );
        assert!(
            !finished.stderr.contains("panicked"),
            "{reference:?}: {}",
            finished.stderr
        );
        assert!(!scene.path("target").exists());
    }
}
