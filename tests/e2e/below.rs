//! Many images in one daemon, each with a mount of its own below the daemon's directory,
//! by the kernel or by FUSE: what the control API says of them, and what becomes of them
//! when processes die.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
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
        ("PUT", "/absent"),
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

/// Has an image on a path replaced; a call that a death cuts off is made again.
fn replace(line: &Line, path: &str, build: &Build, cache: &Path) {
    let socket = &line.daemon(line.last()).socket;
    let body = body(build, cache, path);
    let began = Instant::now();
    loop {
        match support::api::ask(socket, "PUT", &target(path), &body) {
            Ok(answer) => {
                let log = line.daemon(line.last()).process.log();
                assert_eq!(answer.status, 204, "{}\n{log}", answer.body);
                return;
            }
            Err(error) => assert!(began.elapsed() < Duration::from_secs(60), "{error:#}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// The body of a mount whose own configuration names the driver.
fn body_for(driver: &str, build: &Build, cache: &Path) -> String {
    let mut request: Value = serde_json::from_str(&body(build, cache, "/1")).unwrap();
    let mut config: Value = serde_json::from_str(request["config"].as_str().unwrap()).unwrap();
    config["driver"] = driver.into();
    request["config"] = config.to_string().into();
    request.to_string()
}

/// Waits until nothing but `count` mounts are left with the daemon.
#[track_caller]
fn wait_for_mounts(line: &Line, path: &str, count: usize) {
    let began = Instant::now();
    loop {
        let point = line.point.join(path);
        let there = mounted_below(&point).len();
        if there == count {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{there} mounts");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The same tree, in other blobs.
fn rebuilt(scene: &Scene, source: &Path) -> Build {
    scene.create("again", &["--chunk-size", "0x20000"], source)
}

#[test]
fn an_image_is_replaced_while_it_is_read() {
    for driver in ["erofs", "fuse"] {
        let scene = Scene::new();
        let (source, build) = large(&scene);
        let again = rebuilt(&scene, &source);
        let one = one_file(&scene, "one");
        let cache = scene.dir("cache");
        let mut line = Line::new(&scene, &["--driver", "auto"]);
        line.start(false);
        let point = line.point.join("1");
        let daemon = line.daemon(0);
        let with_driver = |build: &Build| body_for(driver, build, &cache);
        daemon.expect(204, "POST", &target("/1"), &with_driver(&build));
        assert_eq!(kind_at(&point), driver);
        let open = File::open(point.join("first")).unwrap();
        while_reading(&source, std::slice::from_ref(&point), |came_on| {
            for round in 0..20 {
                let next = [&again, &build][round % 2];
                daemon.expect(204, "PUT", &target("/1"), &with_driver(next));
                came_on();
            }
        });
        // From one driver to the other.
        let other = if driver == "fuse" { "erofs" } else { "fuse" };
        let other = body_for(other, &again, &cache);
        daemon.expect(204, "PUT", &target("/1"), &other);
        assert_ne!(kind_at(&point), driver);
        daemon.expect(204, "PUT", &target("/1"), &with_driver(&one));
        assert_eq!(fs::read(point.join("one")).unwrap(), b"one");
        assert!(!point.join("first").exists());
        // What cannot be had changes nothing.
        let absent = with_driver(&one).replace("one.boot", "absent.boot");
        daemon.expect(500, "PUT", &target("/1"), &absent);
        assert_eq!(fs::read(point.join("one")).unwrap(), b"one");
        // Whoever had a file open has it, of the first of all, in any worker.
        daemon.kill_worker();
        daemon.wait_for("RUNNING");
        let mut content = vec![0; 300_000];
        open.read_exact_at(&mut content, 0).unwrap();
        assert!(content == fs::read(source.join("first")).unwrap());
        drop(open);
        assert_eq!(fs::read(point.join("one")).unwrap(), b"one");
        wait_for_mounts(&line, "1", 1);
        let info = daemon.expect(200, "GET", "/api/v1/daemon", "");
        let images = info["backend_collection"].as_object().unwrap();
        assert_eq!(images.keys().collect::<Vec<_>>(), ["/1"]);
        delete(&line, "/1");
        assert_eq!(names(&point), [] as [&str; 0]);
        line.stop();
    }
}

/// Whenever the worker dies, a change has happened or it has not.
#[test]
fn a_death_while_an_image_is_replaced_is_not_noticed() {
    for driver in ["erofs", "fuse"] {
        let scene = Scene::new();
        let (source, build) = large(&scene);
        let again = rebuilt(&scene, &source);
        let cache = scene.dir("cache");
        let mut line = Line::new(&scene, &["--driver", "auto"]);
        line.start(false);
        let point = line.point.join("1");
        let daemon = line.daemon(0);
        let named = |build: &Build| body_for(driver, build, &cache);
        daemon.expect(204, "POST", &target("/1"), &named(&build));
        while_reading(&source, std::slice::from_ref(&point), |came_on| {
            for round in 0..24u64 {
                let next = named([&again, &build][usize::from(round % 2 == 1)]);
                thread::scope(|scope| {
                    scope.spawn(|| {
                        // Cut off, perhaps.
                        let _ = support::api::ask(&daemon.socket, "PUT", &target("/1"), &next);
                    });
                    thread::sleep(Duration::from_micros(round * 700));
                    daemon.kill_worker();
                });
                daemon.wait_for("RUNNING");
                came_on();
                assert_eq!(mounted_below(&point).len(), 1, "{}", daemon.process.log());
                assert_eq!(kind_at(&point), driver);
            }
        });
        assert_same_tree(&source, &point);
        replace(&line, "/1", &again, &cache);
        line.stop();
    }
}

#[test]
fn auto_chooses_for_each_image_and_says_why() {
    let scene = Scene::new();
    let (source, build) = large(&scene);
    let cache = scene.dir("cache");
    // The kernel cannot be asked to wait for files here.
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut line = Line::new(&scene, &["--driver", "auto"]);
    line.start(false);
    let point = line.point.clone();
    line.daemon(0).mount("/kernel", &build, &cache);
    line.daemon(0).mount("/daemon", &build, memory.path());
    assert_eq!(kind_at(&point.join("kernel")), "erofs");
    assert_eq!(kind_at(&point.join("daemon")), "fuse");
    let log = line.daemon(0).process.log();
    for reason in [
        "driver erofs: a scratch image",
        "driver fuse: erofs does not work here",
    ] {
        assert!(log.contains(reason), "no `{reason}` in:\n{log}");
    }
    let places = [point.join("kernel"), point.join("daemon")];
    let inode = |place: &PathBuf| fs::metadata(place.join("first")).unwrap().ino();
    let before: Vec<_> = places.iter().map(inode).collect();
    while_reading(&source, &places, |came_on| {
        for _ in 0..2 {
            line.daemon(line.last()).kill_worker();
            came_on();
            line.must_send(line.last());
            line.start(true);
            line.must_take_over(line.last());
            // Listed, although it serves nothing yet.
            let daemon = line.daemon(line.last());
            let info = daemon.expect(200, "GET", "/api/v1/daemon", "");
            let images = info["backend_collection"].as_object().unwrap();
            assert_eq!(images.keys().collect::<Vec<_>>(), ["/daemon", "/kernel"]);
            line.leave(line.last() - 1);
            line.run(line.last());
            came_on();
        }
    });
    assert_eq!(places.iter().map(inode).collect::<Vec<_>>(), before);
    assert_same_tree(&source, &places[1]);
    let last = line.last();
    // From one rung to the other.
    replace(&line, "/daemon", &build, &cache);
    assert_eq!(kind_at(&point.join("daemon")), "erofs");
    replace(&line, "/kernel", &build, memory.path());
    assert_eq!(kind_at(&point.join("kernel")), "fuse");
    assert_same_tree(&source, &places[0]);
    let daemon = line.daemon(last);
    let metrics = daemon.expect(200, "GET", "/api/v1/metrics?id=/kernel", "");
    assert!(metrics["data_read"].as_u64().unwrap() > 0, "{metrics}");
    line.stop();
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
