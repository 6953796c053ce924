//! What is prefetched needs no source any more, and nothing else was fetched.

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::{Duration, Instant};

use support::command::succeed;
use support::tree::nasty::noise;

use crate::scene::{Build, Scene, assert_same_tree};

/// Files that share neither chunk nor batch, and a link to one of them.
fn build(scene: &Scene) -> Build {
    let source = scene.dir("source");
    for (index, name) in ["first", "second", "third"].into_iter().enumerate() {
        let dir = source.join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("data"), noise(3_000_000, index)).unwrap();
    }
    symlink("/second/data", source.join("link")).unwrap();
    scene.create("image", &["--batch-size", "0"], &source)
}

/// Mounts with a cache of its own and waits until the prefetch is over.
fn prefetched(scene: &Scene, build: &Build, arguments: &[&str]) -> support::mount::Nydusd {
    let point = scene.new_point();
    let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
    command.arg("--localfs-dir").arg(&build.blob_dir);
    let mut daemon = scene.start(command.args(arguments), &point);
    daemon
        .process()
        .wait_until(|process| process.log().contains("bytes resident"))
        .unwrap();
    daemon
}

#[test]
fn a_list_is_fetched_and_nothing_else() {
    let scene = Scene::new();
    let build = build(&scene);
    let list = scene.path("list");
    fs::write(&list, "/link\n\n/third\n/missing\n").unwrap();
    let daemon = prefetched(
        &scene,
        &build,
        &["--prefetch-files", list.to_str().unwrap()],
    );
    fs::remove_file(build.blob_dir.join(&build.blobs[0])).unwrap();
    for name in ["second", "third"] {
        let expected = fs::read(scene.path("source").join(name).join("data")).unwrap();
        let actual = fs::read(daemon.point().join(name).join("data")).unwrap();
        assert!(actual == expected, "{name}");
    }
    fs::read(daemon.point().join("first/data")).unwrap_err();
    daemon.stop().unwrap();
}

#[test]
fn everything_is_fetched_if_asked_for() {
    let scene = Scene::new();
    let build = build(&scene);
    let daemon = prefetched(&scene, &build, &["--prefetch-all"]);
    fs::remove_file(build.blob_dir.join(&build.blobs[0])).unwrap();
    assert_same_tree(&scene.path("source"), daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn what_was_read_becomes_a_list() {
    let scene = Scene::new();
    let build = build(&scene);
    let (point, list) = (scene.new_point(), scene.path("list"));
    let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
    command.arg("--localfs-dir").arg(&build.blob_dir);
    let daemon = scene.start(command.arg("--record-files").arg(&list), &point);
    succeed(std::process::Command::new("cat").args([
        point.join("third/data"),
        point.join("link"),
        // Absolute links of an image lead out of the mount for those outside.
        point.join("first/data"),
    ]))
    .unwrap_err();
    let began = Instant::now();
    while fs::read_to_string(&list).unwrap() != "/third/data\n/first/data\n" {
        assert!(began.elapsed() < Duration::from_secs(10), "no list");
        thread::sleep(Duration::from_millis(10));
    }
    daemon.stop().unwrap();
}
