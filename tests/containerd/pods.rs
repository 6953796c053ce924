//! Lazily started pods, as kubelet starts them: a registry, containerd, runc, the
//! plugin and nydusd, all real.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use support::binaries::nydus_image;
use support::command::succeed;
use support::containerd::Containerd;
use support::cri::{Cri, RunningPod};
use support::image::layer::{changes, write_tar};
use support::image::layout::{self, Image};
use support::plugin::{Mounted, Plugin};
use support::registry::{Auth, PASSWORD, Registry, USER};
use support::tree::nasty;
use tempfile::TempDir;

/// What a container of the test image does all the time.
const LOOP: &str = "while :; do sha256sum /data/used /data/text || exit 9; sleep 0.05; done";

/// Programs of the test image.
const PROGRAMS: [&str; 6] = ["sh", "sleep", "cat", "sha256sum", "ls", "head"];

/// A node with a registry that has the images `app:original`, `app:nydus` and `pause`.
struct Node {
    containerd: Containerd,
    plugin: Plugin,
    registry: Registry,
    /// The state that the layers of the image add up to.
    tree: PathBuf,
    // Dropped last: the others live in it.
    directory: TempDir,
}

impl Node {
    fn new(auth: Auth) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::start(auth).unwrap();
        let tree = push_images(directory.path(), &registry);
        let docker = registry.docker_config(registry.host()).unwrap();
        let mut convert = nydus_image().unwrap();
        convert.arg("convert").env("DOCKER_CONFIG", &docker);
        convert.args([
            registry.reference("app:original"),
            registry.reference("app:nydus"),
        ]);
        succeed(&mut convert).unwrap();
        let plugin = Plugin::start(directory.path(), "", &[("DOCKER_CONFIG", docker)]).unwrap();
        let pause = registry.reference("pause:1");
        let containerd =
            Containerd::start(directory.path(), &plugin.address(), "nydus", &pause).unwrap();
        Self {
            containerd,
            plugin,
            registry,
            tree,
            directory,
        }
    }

    fn logs(&self) -> PathBuf {
        let logs = self.directory.path().join("logs");
        fs::create_dir_all(&logs).unwrap();
        logs
    }

    /// The ids of the daemons, once there are `count`.
    #[track_caller]
    fn wait_for_daemons(&self, count: usize) -> Vec<i32> {
        let began = Instant::now();
        loop {
            let daemons = self.plugin.daemons().unwrap();
            if daemons.len() == count {
                return daemons;
            }
            let log = self.plugin.log();
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "{daemons:?}, not {count}:\n{log}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The output of `command` in a container, which must succeed.
    #[track_caller]
    fn exec(&self, cri: &mut Cri, container: &str, command: &[&str]) -> String {
        let done = cri.exec(container, command).unwrap();
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!(
            done.exit_code,
            0,
            "{command:?}: {stderr}\n{}",
            self.plugin.log()
        );
        String::from_utf8(done.stdout).unwrap()
    }
}

/// Makes the images and pushes them; returns the tree of `app`.
fn push_images(scratch: &Path, registry: &Registry) -> PathBuf {
    let base = scratch.join("state-1");
    copy_programs(&PROGRAMS, &base);
    let second = scratch.join("state-2");
    grow(&base, &second);
    fs::create_dir(second.join("data")).unwrap();
    fs::write(second.join("data/used"), nasty::noise(300_000, 1)).unwrap();
    fs::write(second.join("data/unused"), nasty::noise(8_000_000, 2)).unwrap();
    fs::write(second.join("data/gone"), "x").unwrap();
    let third = scratch.join("state-3");
    grow(&second, &third);
    fs::remove_file(third.join("data/gone")).unwrap();
    fs::write(third.join("data/text"), "read lazily\n").unwrap();
    let mut tars = Vec::new();
    let mut lower = None;
    for upper in [&base, &second, &third] {
        let tar = upper.with_extension("tar");
        write_tar(upper, &changes(lower, upper).unwrap(), &tar).unwrap();
        tars.push(tar);
        lower = Some(upper.as_path());
    }
    let tars: Vec<&Path> = tars.iter().map(PathBuf::as_path).collect();
    let app = scratch.join("app");
    layout::write(&app, "app", &[Image::new(&tars)]).unwrap();
    registry.push(&app, "app", "app:original").unwrap();

    let root = scratch.join("pause-root");
    copy_programs(&["sleep"], &root);
    let tar = scratch.join("pause.tar");
    write_tar(&root, &changes(None, &root).unwrap(), &tar).unwrap();
    let mut pause = Image::new(&[&tar]);
    pause.config = serde_json::json!({"Entrypoint": ["/usr/bin/sleep", "1000000"]});
    let at = scratch.join("pause");
    layout::write(&at, "pause", &[pause]).unwrap();
    registry.push(&at, "pause", "pause:1").unwrap();
    third
}

/// Programs of this machine and the libraries that they need, in a new tree.
fn copy_programs(programs: &[&str], root: &Path) {
    for directory in [
        "usr/bin",
        "usr/lib",
        "usr/lib64",
        "proc",
        "sys",
        "dev",
        "etc",
        "tmp",
    ] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    for name in ["bin", "lib", "lib64"] {
        std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name)).unwrap();
    }
    for name in programs {
        let program = PathBuf::from("/usr/bin").join(name);
        fs::copy(&program, root.join("usr/bin").join(name)).unwrap();
        let needed = succeed(Command::new("ldd").arg(program)).unwrap().stdout;
        for library in needed
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            let place = root.join(library.trim_start_matches('/'));
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::copy(library, place).unwrap();
        }
    }
}

fn grow(from: &Path, to: &Path) {
    succeed(Command::new("cp").arg("-a").args([from, to])).unwrap();
}

/// What the loop of the test image prints once.
fn sums(tree: &Path) -> String {
    let mut command = Command::new("sha256sum");
    succeed(
        command
            .current_dir(tree.join("data"))
            .args(["used", "text"]),
    )
    .unwrap()
    .stdout
    .replace("  ", "  /data/")
}

fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let began = Instant::now();
    while !ready() {
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "waiting for {what}"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// A container that reads for ever, which has read at least once.
fn reader(node: &Node, cri: &mut Cri, pod: &RunningPod, name: &str) -> String {
    let image = node.registry.reference("app:nydus");
    let began = Instant::now();
    let container = loop {
        match cri.run(pod, name, &image, &["sh", "-c", LOOP]) {
            Ok(container) => break container,
            // containerd learns of a plugin's death from a request of its own, and
            // then pauses for some seconds before it connects again.
            Err(error)
                if began.elapsed() < Duration::from_secs(20)
                    && format!("{error:#}").contains("Unavailable") =>
            {
                thread::sleep(Duration::from_millis(200));
            }
            Err(error) => panic!("{error:#}"),
        }
    };
    let log = node.logs().join(format!("{name}.log"));
    wait_for("the first output", || {
        fs::read_to_string(&log).is_ok_and(|text| text.contains("/data/text"))
    });
    container
}

#[test]
fn a_pod_starts_without_its_data() {
    let node = Node::new(Auth::Open);
    let mut cri = node.containerd.cri().unwrap();
    let image = node.registry.reference("app:nydus");
    let pod = cri.run_pod("lazy", &node.logs()).unwrap();

    let mark = node.registry.log().len();
    cri.pull(&image, None).unwrap();
    let pulled = node.registry.traffic_since(mark).bytes;
    assert_eq!(
        node.plugin.daemons().unwrap().len(),
        0,
        "nothing is mounted for a pull"
    );
    let first = reader(&node, &mut cri, &pod, "first");
    let started = node.registry.traffic_since(mark).bytes;
    println!("fetched {pulled} bytes to pull and {started} to run; 8000000 are never read");
    assert!(pulled < 200_000, "{pulled}");
    assert!(started < 6_000_000, "{started}");

    let expected = sums(&node.tree);
    let log = fs::read_to_string(node.logs().join("first.log")).unwrap();
    for line in expected.lines() {
        assert!(log.contains(line), "no {line:?} in\n{log}");
    }
    let gone = cri.exec(&first, &["cat", "/data/gone"]).unwrap();
    assert_ne!(gone.exit_code, 0);
    node.exec(
        &mut cri,
        &first,
        &["sh", "-c", "echo x > /data/new && cat /data/new"],
    );

    // One daemon for all containers of an image.
    let daemon = node.wait_for_daemons(1);
    let second = reader(&node, &mut cri, &pod, "second");
    assert_eq!(node.wait_for_daemons(1), daemon);
    cri.remove(&first).unwrap();
    assert_eq!(
        node.exec(&mut cri, &second, &["cat", "/data/text"]),
        "read lazily\n"
    );
    assert_eq!(node.wait_for_daemons(1), daemon);
    cri.remove(&second).unwrap();
    node.wait_for_daemons(0);

    // The cache is warm: nothing is fetched again.
    let mark = node.registry.log().len();
    reader(&node, &mut cri, &pod, "third");
    assert_eq!(node.registry.traffic_since(mark).bytes, 0);

    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
    cri.remove_image(&image).unwrap();
    // containerd collects its garbage soon, and with the last snapshot goes the cache.
    let cache = node.plugin.root().join("cache");
    wait_for("an empty cache", || {
        fs::read_dir(&cache).unwrap().count() == 0
    });
}

#[test]
fn ordinary_images_and_the_other_snapshotter() {
    let mut node = Node::new(Auth::Open);
    let image = node.registry.reference("app:original");
    let pause = node.registry.reference("pause:1");
    let logs = node.logs();
    let expected = sums(&node.tree);
    for snapshotter in ["nydus", "overlayfs", "nydus"] {
        node.containerd.kill().unwrap();
        node.containerd
            .configure(&node.plugin.address(), snapshotter, &pause)
            .unwrap();
        node.containerd.start_again().unwrap();
        let mut cri = node.containerd.cri().unwrap();
        // Also an image whose layers were unpacked for the other one only.
        cri.pull(&image, None).unwrap();
        let pod = cri.run_pod("ordinary", &logs).unwrap();
        let container = cri.run(&pod, "c", &image, &["sleep", "1000"]).unwrap();
        let found = node.exec(
            &mut cri,
            &container,
            &["sha256sum", "/data/used", "/data/text"],
        );
        assert_eq!(found, expected, "{snapshotter}");
        assert_eq!(node.plugin.daemons().unwrap().len(), 0);
        cri.remove_pod(&pod).unwrap();
    }
}

#[test]
fn credentials_are_used_and_never_written() {
    let node = Node::new(Auth::Basic);
    let mut cri = node.containerd.cri().unwrap();
    let login = Some((USER, PASSWORD));
    cri.pull(&node.registry.reference("pause:1"), login)
        .unwrap();
    cri.pull(&node.registry.reference("app:nydus"), login)
        .unwrap();
    let pod = cri.run_pod("private", &node.logs()).unwrap();
    reader(&node, &mut cri, &pod, "c");
    // Neither as they are nor encoded, in no file of the plugin and on no command line.
    let mut grep = Command::new("grep");
    grep.args([
        "-rlaF",
        "-e",
        PASSWORD,
        "-e",
        "c29tZW9uZTpwNHNz",
        "--exclude-dir=snapshots",
        "--exclude-dir=cache",
    ]);
    let found = support::command::run(grep.arg(node.plugin.root())).unwrap();
    assert_eq!(found.code(), 1, "{}", found.stdout);
    for pid in node.plugin.daemons().unwrap() {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(!String::from_utf8_lossy(&line).contains(PASSWORD));
    }
    cri.remove_pod(&pod).unwrap();
}

/// Plugin and containerd die and come back; containers read on, and what is found
/// is found again.
#[test]
fn restarts_are_not_noticed() {
    let mut node = Node::new(Auth::Open);
    let mut cri = node.containerd.cri().unwrap();
    cri.pull(&node.registry.reference("app:nydus"), None)
        .unwrap();
    let pod = cri.run_pod("steady", &node.logs()).unwrap();
    let container = reader(&node, &mut cri, &pod, "steady");
    let daemon = node.wait_for_daemons(1);
    for round in 0..2 {
        node.plugin.kill().unwrap();
        assert_eq!(
            node.exec(&mut cri, &container, &["cat", "/data/text"]),
            "read lazily\n"
        );
        node.plugin.start_again().unwrap();
        if round == 1 {
            node.containerd.kill().unwrap();
            node.containerd.start_again().unwrap();
            cri = node.containerd.cri().unwrap();
        }
        assert_eq!(
            node.exec(&mut cri, &container, &["cat", "/data/text"]),
            "read lazily\n"
        );
        wait_for("the daemon to be found", || {
            node.plugin.log().contains("still runs")
        });
        assert_eq!(node.wait_for_daemons(1), daemon);
        let name = format!("after-{round}");
        let other = reader(&node, &mut cri, &pod, &name);
        assert_eq!(node.wait_for_daemons(1), daemon);
        cri.remove(&other).unwrap();
    }
    assert_eq!(cri.exit_code(&container).unwrap(), None);
    let log = fs::read_to_string(node.logs().join("steady.log")).unwrap();
    let expected = sums(&node.tree);
    for line in log.lines() {
        // Time, stream and a mark come first.
        let text = line.splitn(4, ' ').nth(3).unwrap();
        assert!(expected.lines().any(|wanted| wanted == text), "{line}");
    }
    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
}

/// After a reboot, nothing runs and nothing is mounted; the registry is away. What
/// was read before can be read again.
#[test]
fn after_a_reboot_without_network() {
    let mut node = Node::new(Auth::Open);
    let mut cri = node.containerd.cri().unwrap();
    cri.pull(&node.registry.reference("app:nydus"), None)
        .unwrap();
    let pod = cri.run_pod("before", &node.logs()).unwrap();
    let container = reader(&node, &mut cri, &pod, "before");
    cri.remove(&container).unwrap();
    // containerd removes the snapshot a little later.
    node.wait_for_daemons(0);
    let mut client = node.plugin.client().unwrap();
    let images = [r#"labels."containerd.io/snapshot/nydus-bootstrap""#];
    let parent = client.list(&images).unwrap().remove(0).name;
    client.prepare("kept", &parent, &[]).unwrap();

    node.containerd.kill().unwrap();
    node.plugin.kill().unwrap();
    node.plugin.kill_daemons(&node.wait_for_daemons(1)).unwrap();
    node.wait_for_daemons(0);
    let began = Instant::now();
    node.plugin.start_again().unwrap();
    let mut client = node.plugin.client().unwrap();
    let mounts = client.mounts("kept").unwrap();
    println!(
        "mounted again {} ms after the start",
        began.elapsed().as_millis()
    );
    assert!(began.elapsed() < Duration::from_secs(5));
    let mark = node.registry.log().len();
    let mounted = Mounted::new(
        &mounts,
        &node.plugin.root(),
        &node.directory.path().join("point"),
    )
    .unwrap();
    assert_eq!(
        fs::read(mounted.path().join("data/text")).unwrap(),
        b"read lazily\n"
    );
    assert_eq!(
        fs::read(mounted.path().join("data/used")).unwrap(),
        nasty::noise(300_000, 1)
    );
    assert_eq!(node.registry.traffic_since(mark).requests, 0);
    drop(mounted);

    // And a daemon that dies is replaced.
    let old = node.wait_for_daemons(1);
    node.plugin.kill_daemons(&old).unwrap();
    wait_for("another daemon", || {
        let daemons = node.plugin.daemons().unwrap();
        daemons.len() == 1 && daemons != old
    });
    let mounts = client.mounts("kept").unwrap();
    let mounted = Mounted::new(
        &mounts,
        &node.plugin.root(),
        &node.directory.path().join("point"),
    )
    .unwrap();
    assert_eq!(
        fs::read(mounted.path().join("data/text")).unwrap(),
        b"read lazily\n"
    );
    drop(mounted);
    client.remove("kept").unwrap();
    node.wait_for_daemons(0);
}
