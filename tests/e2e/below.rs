//! Many images in one daemon, each mounted by the kernel below the daemon's directory:
//! what the control API says of them, and what becomes of them when processes die.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::mount::is_mounted;

use crate::scene::{Build, Scene, assert_same_tree};
use crate::upgrade::{Line, body, mounted_below, names, one_file, target, while_reading};

fn large(scene: &Scene) -> (PathBuf, Build) {
    let source = scene.small_tree();
    // Read by nobody: the blob stays incomplete, so the kernel goes on asking.
    fs::write(
        source.join("unread"),
        support::tree::nasty::noise(4 << 20, 3),
    )
    .unwrap();
    let build = scene.create("image", &["--chunk-size", "0x10000"], &source);
    (source, build)
}

fn kind_at(point: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let point = point.to_str().unwrap();
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(1) == Some(point));
    line.unwrap().split(' ').nth(2).unwrap().to_owned()
}

#[test]
fn images_come_and_go_below_the_directory() {
    let scene = Scene::new();
    let (source, build) = large(&scene);
    let one = one_file(&scene, "one");
    let cache = scene.dir("cache");
    let mut line = Line::new(&scene, &["--driver", "erofs"]);
    line.start(false);
    let point = line.point.clone();
    let daemon = line.daemon(0);
    assert_eq!(daemon.state(), "RUNNING");
    daemon.mount("/12", &build, &cache);
    daemon.mount("/a/b", &one, &cache);
    // The same blob twice.
    daemon.mount("/13", &build, &cache);
    assert_eq!(kind_at(&point.join("12")), "erofs");
    assert_same_tree(&source, &point.join("12"));
    assert_same_tree(&source, &point.join("13"));
    assert_eq!(fs::read(point.join("a/b/one")).unwrap(), b"one");
    let info = daemon.expect(200, "GET", "/api/v1/daemon", "");
    let images = info["backend_collection"].as_object().unwrap();
    assert_eq!(images.keys().collect::<Vec<_>>(), ["/12", "/13", "/a/b"]);
    daemon.expect(200, "GET", "/api/v1/metrics/blobcache?id=/12", "");

    for (method, path) in [
        ("POST", "/12"),
        ("POST", "/12/x"),
        ("POST", "/a"),
        ("PUT", "/12"),
    ] {
        daemon.expect(500, method, &target(path), &body(&one, &cache, path));
    }
    daemon.expect(500, "DELETE", &target("/absent"), "");
    // A way out of the directory is none.
    let outside = scene.dir("outside");
    std::os::unix::fs::symlink(&outside, point.join("link")).unwrap();
    let answer = daemon.expect(500, "POST", &target("/link"), &body(&one, &cache, "/x"));
    assert!(
        answer["message"].as_str().unwrap().contains("way out"),
        "{answer}"
    );
    assert!(!is_mounted(&outside));
    fs::remove_file(point.join("link")).unwrap();
    // Nothing is left of an image that cannot be had.
    let absent = body(&one, &cache, "/bad").replace("one.boot", "absent.boot");
    daemon.expect(500, "POST", &target("/bad"), &absent);

    // What is in use stays.
    let open = File::open(point.join("13/first")).unwrap();
    let answer = daemon.expect(500, "DELETE", &target("/13"), "");
    assert!(
        answer["message"].as_str().unwrap().contains("in use"),
        "{answer}"
    );
    drop(open);
    delete(&line, "/13");
    assert!(!is_mounted(&point.join("13")));
    assert_eq!(names(&point.join("13")), [] as [&str; 0]);
    assert_same_tree(&source, &point.join("12"));
    let daemon = line.daemon(0);
    daemon.mount("/13", &one, &cache);
    assert_eq!(fs::read(point.join("13/one")).unwrap(), b"one");
    let list = daemon.expect(200, "GET", "/api/v1/daemon", "");
    assert_eq!(list["backend_collection"].as_object().unwrap().len(), 3);
    line.stop();
}

/// A child of another test, before it becomes a program, has our files open.
fn delete(line: &Line, path: &str) {
    let began = Instant::now();
    let socket = &line.daemon(0).socket;
    loop {
        let answer = support::api::ask(socket, "DELETE", &target(path), "").unwrap();
        if answer.status == 204 {
            return;
        }
        assert!(answer.body.contains("in use"), "{}", answer.body);
        assert!(began.elapsed() < Duration::from_secs(30), "{}", answer.body);
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn they_survive_the_death_of_any_process() {
    let scene = Scene::new();
    let (source, build) = large(&scene);
    let one = one_file(&scene, "one");
    let cache = scene.dir("cache");
    let mut line = Line::new(&scene, &["--driver", "erofs"]);
    line.start(false);
    let point = line.point.clone();
    let daemon = line.daemon(0);
    daemon.mount("/1", &build, &cache);
    daemon.mount("/deep/2", &build, &cache);
    let settings = json!({ "registry_auth": "dTpw" }).to_string();
    daemon.expect(204, "PUT", "/api/v1/config?id=/7", &settings);
    // Bootstraps are not read again from where they were.
    fs::remove_file(&build.bootstrap).unwrap();
    let places = [point.join("1"), point.join("deep/2")];
    while_reading(&source, &places, |came_on| {
        for round in 0..3 {
            if round == 2 {
                let keeper = i32::try_from(daemon.process.id()).unwrap();
                kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
                let began = Instant::now();
                while !daemon.process.log().contains("keeper is process") {
                    assert!(began.elapsed() < Duration::from_secs(30));
                    thread::sleep(Duration::from_millis(5));
                }
                // It has everything that it needs by the time that it says so.
                thread::sleep(Duration::from_millis(200));
            }
            daemon.kill_worker();
            came_on();
            let path = format!("/new-{round}");
            daemon.mount(&path, &one, &cache);
            let file = point.join(format!("new-{round}/one"));
            assert_eq!(fs::read(file).unwrap(), b"one");
        }
    });
    assert_same_tree(&source, &point.join("deep/2"));
    let info = daemon.expect(200, "GET", "/api/v1/daemon", "");
    assert_eq!(info["backend_collection"].as_object().unwrap().len(), 5);
    let settings = daemon.expect(200, "GET", "/api/v1/config", "");
    assert_eq!(settings, json!({ "/7:registry_auth": "(set)" }));
    delete(&line, "/new-0");
    assert_eq!(mounted_below(&point).len(), 4);
    daemon.expect(204, "PUT", "/api/v1/daemon/exit", "");
    let began = Instant::now();
    while !mounted_below(&point).is_empty() || daemon.socket.exists() {
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{}",
            daemon.process.log()
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn they_pass_on_to_another_daemon() {
    let scene = Scene::new();
    let (source, build) = large(&scene);
    let one = one_file(&scene, "one");
    let cache = scene.dir("cache");
    // The driver can be said in a file, too.
    let config = json!({
        "version": 2,
        "backend": { "type": "localfs", "localfs": { "dir": build.blob_dir } },
        "cache": { "type": "filecache", "filecache": { "work_dir": cache } },
        "rafs": { "mode": "direct", "driver": "erofs" },
    });
    let file = scene.path("config.json");
    fs::write(&file, config.to_string()).unwrap();
    let mut line = Line::new(&scene, &["--config", file.to_str().unwrap()]);
    line.start(false);
    let point = line.point.clone();
    line.daemon(0).mount("/1", &build, &cache);
    line.daemon(0).mount("/one", &one, &cache);
    assert_eq!(kind_at(&point.join("1")), "erofs");
    let places = [point.join("1")];
    while_reading(&source, &places, |came_on| {
        for _ in 0..2 {
            line.must_send(line.last());
            line.upgrade();
            came_on();
        }
        // And after the death of everybody.
        line.must_send(line.last());
        let dead = line.last();
        line.daemons[dead].kill();
        let socket = line.daemon(dead).socket.clone();
        line.start_on(socket, false, &[]);
        assert_eq!(line.daemon(dead + 1).state(), "INIT");
        line.daemon(dead + 1).mount("/asked-for", &one, &cache);
        line.must_take_over(dead + 1);
        line.run(dead + 1);
        came_on();
    });
    assert_same_tree(&source, &point.join("1"));
    assert_eq!(fs::read(point.join("one/one")).unwrap(), b"one");
    assert_eq!(fs::read(point.join("asked-for/one")).unwrap(), b"one");
    line.stop();
}
