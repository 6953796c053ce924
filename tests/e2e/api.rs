//! The control socket, by clients from outside: what they see, and what becomes of the
//! mount.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::api::{Answer, ask};
use support::binaries::nydusd;
use support::command::{run, succeed};
use support::mount::{Nydusd, unmount};

use crate::scene::{Build, Scene, assert_same_tree};

/// A daemon with a control socket.
struct Controlled {
    daemon: Nydusd,
    socket: PathBuf,
}

impl Controlled {
    /// Without any image.
    fn empty(scene: &Scene) -> Self {
        Self::start(scene, |_| {})
    }

    fn start(scene: &Scene, options: impl FnOnce(&mut Command)) -> Self {
        let point = scene.new_point();
        let socket = scene.path("sockets/api.sock");
        let mut command = nydusd().unwrap();
        command.arg("--mountpoint").arg(&point);
        command.arg("--apisock").arg(&socket);
        options(&mut command);
        let mut daemon = scene.start(&mut command, &point);
        let there = socket.clone();
        daemon.process().wait_until(|_| there.exists()).unwrap();
        Self { daemon, socket }
    }

    fn ask(&self, method: &str, target: &str, body: &str) -> Answer {
        ask(&self.socket, method, target, body).unwrap()
    }

    #[track_caller]
    fn expect(&self, status: u16, method: &str, target: &str, body: &str) -> Value {
        let answer = self.ask(method, target, body);
        assert_eq!(answer.status, status, "{method} {target}: {}", answer.body);
        answer.json()
    }

    #[track_caller]
    fn mount(&self, path: &str, build: &Build, cache: &Path) {
        self.expect(204, "POST", &target(path), &body(build, cache, path));
    }

    fn at(&self, path: &str) -> PathBuf {
        self.daemon.point().join(path.trim_start_matches('/'))
    }

    /// A command on the socket.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = nydusd().unwrap();
        command.args(arguments).arg("--apisock").arg(&self.socket);
        command
    }
}

fn target(path: &str) -> String {
    format!("/api/v1/mount?mountpoint={}", path.replace('/', "%2F"))
}

/// What the snapshotter sends, with keys that nobody knows.
fn body(build: &Build, cache: &Path, id: &str) -> String {
    let config = json!({
        "device": {
            "id": id,
            "backend": { "type": "localfs", "config": { "dir": build.blob_dir, "readahead": false } },
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        },
        "mode": "direct",
        "enable_xattr": true,
        "warmup": 1,
    });
    json!({ "fs_type": "rafs", "source": build.bootstrap, "config": config.to_string() })
        .to_string()
}

/// A directory with one file.
fn one_file(scene: &Scene, name: &str, content: &str) -> PathBuf {
    let root = scene.dir(name);
    fs::write(root.join(name), content).unwrap();
    root
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// With a large directory, of which the kernel asks for more than once.
#[test]
fn a_walk_asks_for_directories_and_not_for_each_entry() {
    let scene = Scene::new();
    let source = scene.dir("source");
    let entries = 3000;
    for number in 0..entries {
        fs::write(
            source.join(format!("a-name-of-some-length-{number:06}")),
            "",
        )
        .unwrap();
    }
    let build = scene.create("image", &[], &source);
    let daemon = Controlled::start(&scene, |command| {
        command.arg("--bootstrap").arg(&build.bootstrap);
        command.arg("--localfs-dir").arg(&build.blob_dir);
    });
    // All names come before the first question about one of them.
    let names = names(daemon.daemon.point());
    assert_eq!(names.len(), entries);
    for name in &names {
        let file = daemon.daemon.point().join(name);
        assert_eq!(fs::symlink_metadata(file).unwrap().len(), 0);
    }
    let metrics = daemon.expect(200, "GET", "/api/v1/metrics?id=/", "");
    let hits = metrics["fop_hits"].as_array().unwrap();
    let hits: Vec<u64> = hits.iter().map(|count| count.as_u64().unwrap()).collect();
    let (getattr, lookup, readdir, plus) = (hits[0], hits[9], hits[10], hits[11]);
    assert!(plus > 1, "{hits:?}");
    assert!(getattr + lookup + readdir < 20, "{hits:?}");
}

#[test]
fn the_socket_is_private_and_its_answers_look_as_clients_expect() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let daemon = Controlled::start(&scene, |command| {
        command.arg("--bootstrap").arg(&build.bootstrap);
        command.arg("--localfs-dir").arg(&build.blob_dir);
    });
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&daemon.socket), 0o600);
    assert_eq!(mode(daemon.socket.parent().unwrap()), 0o700);

    // The way in which the snapshotter notices a death: a silent connection.
    let mut silent = UnixStream::connect(&daemon.socket).unwrap();
    let answer = daemon.ask("GET", "/api/v1/daemon", "");
    assert!(
        answer.head.starts_with("HTTP/1.1 200 \r\n"),
        "{}",
        answer.head
    );
    let head = answer.head.to_lowercase();
    assert!(head.contains("\r\nserver: nydus api"), "{head}");
    assert!(
        head.contains("\r\ncontent-type: application/json"),
        "{head}"
    );
    let info = answer.json();
    assert_eq!(info["state"], "RUNNING");
    assert_eq!(info["backend_collection"]["/"]["backend_type"], "Rafs");
    let version = succeed(nydusd().unwrap().arg("--version")).unwrap().stdout;
    let commit = version
        .lines()
        .find_map(|line| line.strip_prefix("Git Commit: "));
    assert_eq!(info["version"]["git_commit"], commit.unwrap().trim());

    let nothing = daemon.ask("GET", "/api/v1/metrics/inflight", "");
    assert_eq!(nothing.status, 204);
    assert!(!nothing.head.to_lowercase().contains("content-type"));
    let refusal = daemon.expect(404, "GET", "/nowhere", "");
    assert_eq!(
        refusal,
        json!({ "code": "UNDEFINED", "message": "NoRoute" })
    );
    daemon.expect(400, "DELETE", "/api/v1/daemon", "");

    assert_same_tree(&source, daemon.daemon.point());
    let numbers = daemon.expect(200, "GET", "/api/v1/metrics", "");
    assert!(
        numbers["data_read"].as_u64().unwrap() >= 900_000,
        "{numbers}"
    );
    assert_eq!(numbers["block_count_read"].as_array().unwrap().len(), 8);
    assert_eq!(numbers["id"], "/");
    let backend = daemon.expect(200, "GET", "/api/v1/metrics/backend?id=/", "");
    assert!(
        backend["read_amount_total"].as_u64().unwrap() >= 900_000,
        "{backend}"
    );
    let cache = daemon.expect(200, "GET", "/api/v1/metrics/blobcache", "");
    assert_eq!(
        cache["underlying_files"],
        json!([format!("{}.blob.data", build.blobs[0])])
    );
    let page = daemon.ask("GET", "/metrics", "");
    let sample = "nydusd_fuse_requests_total{mountpoint=\"/\",op=\"read\"} ";
    assert!(page.body.contains(sample), "{}", page.body);

    silent
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let still = silent.read(&mut [0]).unwrap_err().kind();
    assert_eq!(still, std::io::ErrorKind::WouldBlock, "closed while idle");
    silent
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    daemon.expect(204, "PUT", "/api/v1/daemon/exit", "");
    daemon.daemon.expect_clean_end().unwrap();
    assert_eq!(silent.read(&mut [0]).unwrap(), 0, "hung up");
    assert!(!daemon.socket.exists(), "the socket is removed");
}

#[test]
fn many_images_in_one_daemon() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let small = scene.create("image", &[], &source);
    let one = scene.create("one", &[], &one_file(&scene, "first-file", "one\n"));
    let two = scene.create("two", &[], &one_file(&scene, "other-file", "two\n"));
    let cache = scene.dir("cache");
    let daemon = Controlled::empty(&scene);
    assert!(names(daemon.daemon.point()).is_empty());

    daemon.mount("/1", &small, &cache);
    assert_eq!(names(daemon.daemon.point()), ["1"]);
    daemon.mount("/a/b/c", &one, &cache);
    assert_eq!(names(daemon.daemon.point()), ["1", "a"]);
    assert_same_tree(&source, &daemon.at("/1"));
    assert_eq!(names(&daemon.at("/a/b/c")), ["first-file"]);
    assert_eq!(fs::read(daemon.at("/a/b/c/first-file")).unwrap(), b"one\n");

    let again = daemon.expect(500, "POST", &target("/1"), &body(&small, &cache, "/1"));
    let text = again["message"].as_str().unwrap();
    assert_eq!(
        text,
        "Mount(MountFilesystem(Other(\"object or filesystem already exists\")))"
    );
    daemon.expect(500, "POST", &target("/1/below"), &body(&one, &cache, "/x"));
    daemon.expect(500, "PUT", &target("/9"), &body(&one, &cache, "/9"));

    // Replaced while the kernel knows the old one.
    daemon.expect(204, "PUT", &target("/a/b/c"), &body(&two, &cache, "/a/b/c"));
    assert_eq!(names(&daemon.at("/a/b/c")), ["other-file"]);
    fs::read(daemon.at("/a/b/c/first-file")).unwrap_err();
    assert_eq!(fs::read(daemon.at("/a/b/c/other-file")).unwrap(), b"two\n");
    let metrics = daemon.expect(200, "GET", "/api/v1/metrics?id=%2Fa%2Fb%2Fc", "");
    assert!(metrics["data_read"].as_u64().unwrap() >= 4, "{metrics}");
    daemon.expect(404, "GET", "/api/v1/metrics", "");
    daemon.expect(200, "GET", "/api/v1/metrics/blobcache?id=/a/b/c", "");

    daemon.expect(204, "DELETE", "/api/v1/mount?mountpoint=/a/b/c", "");
    assert!(
        names(&daemon.at("/a/b/c")).is_empty(),
        "an empty directory stays"
    );
    daemon.expect(500, "DELETE", &target("/a/b/c"), "");
    assert_same_tree(&source, &daemon.at("/1"));
    daemon.daemon.stop().unwrap();
}

/// Slots, node numbers and the kernel's memory of both.
#[test]
fn three_hundred_mounts_one_after_the_other() {
    let scene = Scene::new();
    one_file(&scene, "same-name", "");
    let cache = scene.dir("cache");
    let contents = ["a", "bb"];
    let builds: Vec<Build> = contents
        .iter()
        .enumerate()
        .map(|(index, content)| {
            fs::write(scene.path("same-name").join("same-name"), content).unwrap();
            scene.create(&format!("build-{index}"), &[], &scene.path("same-name"))
        })
        .collect();
    let daemon = Controlled::empty(&scene);
    let mut held = Vec::new();
    for round in 0..300 {
        let index = round % 2;
        daemon.mount("/x", &builds[index], &cache);
        let path = daemon.at("/x/same-name");
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            contents[index],
            "{round}"
        );
        if round % 50 == 0 {
            held.push(fs::File::open(&path).unwrap());
        }
        daemon.expect(204, "DELETE", &target("/x"), "");
        assert!(!path.exists(), "{round}");
    }
    drop(held);
    daemon.daemon.stop().unwrap();
}

#[test]
fn an_image_on_the_root_can_be_replaced() {
    let scene = Scene::new();
    let one = scene.create("one", &[], &one_file(&scene, "first-file", "one\n"));
    let two = scene.create("two", &[], &one_file(&scene, "other-file", "two\n"));
    let cache = scene.dir("cache");
    let daemon = Controlled::start(&scene, |command| {
        command.arg("--bootstrap").arg(&one.bootstrap);
        command.arg("--localfs-dir").arg(&one.blob_dir);
    });
    assert_eq!(names(daemon.daemon.point()), ["first-file"]);
    assert!(!daemon.at("/other-file").exists());
    daemon.expect(204, "PUT", &target("/"), &body(&two, &cache, "/"));
    assert_eq!(names(daemon.daemon.point()), ["other-file"]);
    assert_eq!(fs::read(daemon.at("/other-file")).unwrap(), b"two\n");
    assert!(!daemon.at("/first-file").exists());
    daemon.expect(204, "DELETE", &target("/"), "");
    assert!(names(daemon.daemon.point()).is_empty());
    unmount(daemon.daemon.point()).unwrap();
    daemon.daemon.expect_clean_end().unwrap();
    assert!(!daemon.socket.exists(), "the socket is removed");
}

/// What was mounted, replaced and set at run time outlives workers and keepers.
#[test]
fn images_of_the_api_survive_the_death_of_any_process() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let small = scene.create("image", &[], &source);
    let one = scene.create("one", &[], &one_file(&scene, "first-file", "one\n"));
    let two = scene.create("two", &[], &one_file(&scene, "other-file", "two\n"));
    let cache = scene.dir("cache");
    let daemon = Controlled::empty(&scene);
    let mut silent = UnixStream::connect(&daemon.socket).unwrap();
    daemon.mount("/1", &small, &cache);
    daemon.mount("/a/b", &one, &cache);
    daemon.mount("/gone", &one, &cache);
    daemon.expect(204, "DELETE", &target("/gone"), "");
    daemon.expect(204, "PUT", &target("/a/b"), &body(&two, &cache, "/a/b"));
    let settings = json!({ "registry_auth": "dTpw" }).to_string();
    daemon.expect(204, "PUT", "/api/v1/config?id=/7", &settings);
    let open = fs::File::open(daemon.at("/1/first")).unwrap();
    let expected = fs::read(source.join("first")).unwrap();
    let inode = |path| fs::symlink_metadata(daemon.at(path)).unwrap().ino();
    let inodes = [inode("/a"), inode("/a/b/other-file"), inode("/gone")];
    // Bootstraps are not read again from where they were.
    for build in [&small, &one, &two] {
        fs::remove_file(&build.bootstrap).unwrap();
    }
    // The silent connection is known to be one.
    std::thread::sleep(Duration::from_millis(1500));

    let log = || fs::read_to_string(daemon.daemon.point().with_extension("log")).unwrap();
    let kill = |pid: u32| {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    };
    let wait = |what: &str, count| {
        let began = std::time::Instant::now();
        while log().matches(what).count() < count {
            assert!(began.elapsed() < Duration::from_secs(30), "{}", log());
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    for round in 1..=3 {
        if round == 3 {
            kill(daemon.daemon.process_id());
            wait("keeper is process", 1);
            std::thread::sleep(Duration::from_millis(200));
        }
        kill(daemon.daemon.worker().unwrap());
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        wait("is served again", round);
        assert_same_tree(&source, &daemon.at("/1"));
        assert_eq!(names(daemon.daemon.point()), ["1", "a", "gone"]);
        assert!(names(&daemon.at("/gone")).is_empty());
        assert_eq!(fs::read(daemon.at("/a/b/other-file")).unwrap(), b"two\n");
        assert_eq!(
            [inode("/a"), inode("/a/b/other-file"), inode("/gone")],
            inodes
        );
        let mut bytes = vec![0; expected.len()];
        std::os::unix::fs::FileExt::read_exact_at(&open, &mut bytes, 0).unwrap();
        assert!(bytes == expected, "a file that was open");
        let info = daemon.expect(200, "GET", "/api/v1/daemon", "");
        let mounted = info["backend_collection"].as_object().unwrap();
        assert_eq!(mounted.keys().collect::<Vec<_>>(), ["/1", "/a/b"]);
        let settings = daemon.expect(200, "GET", "/api/v1/config", "");
        assert_eq!(settings, json!({ "/7:registry_auth": "(set)" }));
    }
    // Life goes on: slots and generations, too.
    silent
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let still = silent.read(&mut [0]).unwrap_err().kind();
    assert_eq!(still, std::io::ErrorKind::WouldBlock, "closed by a death");
    silent
        .write_all(b"GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    silent
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut answer = String::new();
    silent.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"RUNNING\""), "{answer}");
    let again = scene.create("again", &[], &scene.path("first-file"));
    daemon.mount("/gone", &again, &cache);
    assert_eq!(names(&daemon.at("/gone")), ["first-file"]);
    daemon.expect(204, "DELETE", &target("/1"), "");
    assert!(!daemon.at("/1/first").exists());
    // It would keep the daemon with its mount.
    drop(open);
    daemon.expect(204, "PUT", "/api/v1/daemon/exit", "");
    let began = std::time::Instant::now();
    while support::mount::is_mounted(daemon.daemon.point()) || daemon.socket.exists() {
        assert!(began.elapsed() < Duration::from_secs(30), "{}", log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The kernel's own mount can be asked about, and not be changed.
#[test]
fn an_image_of_the_kernel_is_shown() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let daemon = Controlled::start(&scene, |command| {
        command.args(["--driver", "erofs", "--bootstrap"]);
        command.arg(&build.bootstrap);
        command.arg("--localfs-dir").arg(&build.blob_dir);
    });
    assert_same_tree(&source, daemon.daemon.point());
    let info = daemon.expect(200, "GET", "/api/v1/daemon", "");
    assert_eq!(info["backend_collection"]["/"]["backend_type"], "Rafs");
    let blobs = daemon.expect(200, "GET", "/api/v2/blobs", "");
    assert_eq!(blobs[0]["complete"], true, "{blobs}");
    let cache = scene.dir("cache");
    for (method, path) in [("POST", "/1"), ("POST", "/"), ("PUT", "/")] {
        daemon.expect(500, method, &target(path), &body(&build, &cache, path));
    }
    let refusal = daemon.expect(500, "DELETE", &target("/"), "");
    let text = refusal["message"].as_str().unwrap();
    assert!(text.contains("only be unmounted"), "{text}");
    assert_same_tree(&source, daemon.daemon.point());
    daemon.daemon.stop().unwrap();
}

#[test]
fn commands_talk_to_the_daemon() {
    let scene = Scene::new();
    let build = scene.create("image", &[], &scene.small_tree());
    let cache = scene.dir("cache");
    let daemon = Controlled::empty(&scene);
    daemon.mount("/1", &build, &cache);
    fs::read(daemon.at("/1/first")).unwrap();
    let output = |arguments: &[&str]| succeed(&mut daemon.command(arguments)).unwrap().stdout;
    let json = |arguments: &[&str]| serde_json::from_str::<Value>(&output(arguments)).unwrap();
    assert!(output(&["status"]).contains("state     RUNNING"));
    assert_eq!(json(&["status", "--json"])["state"], "RUNNING");
    assert!(output(&["mounts"]).starts_with("/1\tlocalfs\t"));
    assert_eq!(json(&["mounts", "--json"])[0]["mountpoint"], "/1");
    assert!(output(&["metrics"]).contains("nydusd_mounts 1"));
    let numbers = json(&["metrics", "--json"]);
    assert_eq!(numbers["/1"]["files"]["data_read"], 300_000);
    assert!(
        numbers["/1"]["cache"]["total"].as_u64().unwrap() > 0,
        "{numbers}"
    );
    output(&["umount", "/1"]);
    let refused = run(&mut daemon.command(&["umount", "/1"])).unwrap();
    assert_eq!(refused.code(), 1);
    assert!(
        refused.stderr.contains("doesn't exist"),
        "{}",
        refused.stderr
    );
    output(&["umount"]);
    daemon.daemon.expect_clean_end().unwrap();
    let gone = run(nydusd()
        .unwrap()
        .args(["status", "--apisock"])
        .arg(&daemon.socket))
    .unwrap();
    assert!(gone.stderr.contains("is it running?"), "{}", gone.stderr);
}

#[test]
fn clients_that_misbehave_harm_nobody() {
    let scene = Scene::new();
    let daemon = Controlled::empty(&scene);
    let send = |text: &[u8]| {
        let mut stream = UnixStream::connect(&daemon.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        // It may hang up in the middle.
        let _ = stream.write_all(text);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000));
    let answer = send(long.as_bytes());
    assert!(
        answer.starts_with("HTTP/1.1 4") || answer.is_empty(),
        "{answer}"
    );
    let answer = send(b"\x16\x03\x01nonsense\r\n\r\n");
    assert!(
        answer.starts_with("HTTP/1.1 400") || answer.is_empty(),
        "{answer}"
    );
    let large = format!(
        "POST /api/v1/mount?mountpoint=/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Content-Length: 100000000\r\n\r\n{}",
        "x".repeat(4 << 20)
    );
    let answer = send(large.as_bytes());
    assert!(
        answer.starts_with("HTTP/1.1 400") || answer.is_empty(),
        "{answer}"
    );
    // A head that never ends and a body that never comes keep nobody waiting.
    let mut slow = UnixStream::connect(&daemon.socket).unwrap();
    slow.write_all(b"GET /api").unwrap();
    let mut bodyless = UnixStream::connect(&daemon.socket).unwrap();
    bodyless
        .write_all(b"PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        .unwrap();
    daemon.expect(200, "GET", "/api/v1/daemon", "");
    daemon.daemon.stop().unwrap();
}

#[test]
fn configuration_files_are_checked() {
    let scene = Scene::new();
    let file = scene.path("config.toml");
    let check = |text: &str| {
        fs::write(&file, text).unwrap();
        run(nydusd().unwrap().args(["config", "check"]).arg(&file)).unwrap()
    };
    let good = "version = 2\nnonsense = 1\n[backend]\ntype = 'localfs'\n[backend.localfs]\n\
                dir = '/blobs'\n[cache]\ntype = 'filecache'\n[rafs]\nmode = 'direct'\n";
    let finished = check(good);
    assert_eq!(finished.code(), 0, "{}", finished.stderr);
    assert!(finished.stdout.contains("warning: nonsense: unknown key"));
    assert!(finished.stdout.contains("config.toml: good"));
    let finished = check(&good.replace("'direct'", "'upside-down'"));
    assert_eq!(finished.code(), 1);
    for word in ["rafs.mode", "upside-down", "\"direct\" or \"cached\""] {
        assert!(
            finished.stderr.contains(word),
            "{word}: {}",
            finished.stderr
        );
    }
}
