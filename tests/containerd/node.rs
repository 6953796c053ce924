//! A node with everything on it: registry, containerd, the plugin, and images.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use support::binaries::nydus_image;
use support::command::succeed;
use support::containerd::Containerd;
use support::cri::{Cri, RunningPod};
use support::image::layer::{changes, write_tar};
use support::image::layout::{self, Image};
use support::image::programs::{copy_programs, make_pause};
use support::plugin::Plugin;
use support::registry::{Auth, Registry};
use support::tree::nasty;
use tempfile::TempDir;

/// One daemon for all images, or one for each.
pub(crate) const MODES: [&str; 2] = ["shared", "dedicated"];

/// What serves images, by the types of their file systems.
pub(crate) const DRIVERS: [&str; 2] = ["fuse", "erofs"];

/// What a container of the test image does all the time.
pub(crate) const LOOP: &str =
    "while :; do sha256sum /data/used /data/text || exit 9; sleep 0.05; done";

/// The same, but nothing comes from the page cache, and what is wrong ends it. It counts.
/// A part of the layer is never read, so the kernel has to ask a daemon every time.
pub(crate) const COLD_LOOP: &str = "i=0; while :; do \
    dd if=/data/used iflag=nocache count=0 2>/dev/null; \
    sha256sum --status -c /data/sums || exit 9; \
    i=$((i+1)); echo $i; sleep 0.05; done";

/// Programs of the test image.
const PROGRAMS: [&str; 8] = [
    "sh",
    "sleep",
    "cat",
    "sha256sum",
    "ls",
    "head",
    "dd",
    "mkdir",
];

/// A node with a registry that has the images `app:original`, `app:nydus` and `pause`.
pub(crate) struct Node {
    pub containerd: Containerd,
    pub plugin: Plugin,
    pub registry: Registry,
    /// The state that the layers of the image add up to.
    pub tree: PathBuf,
    // Dropped last: the others live in it.
    pub directory: TempDir,
}

impl Node {
    pub(crate) fn new(auth: Auth) -> Self {
        Self::configured(auth, None)
    }

    /// * `driver`: what serves images; the plugin's own choice if none.
    pub(crate) fn configured(auth: Auth, driver: Option<&str>) -> Self {
        Self::in_mode(auth, driver, "shared")
    }

    /// * `mode`: `shared` for one daemon, `dedicated` for one per image.
    pub(crate) fn in_mode(auth: Auth, driver: Option<&str>, mode: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let configuration = configuration(directory.path(), driver, mode);
        Self::assemble(directory, auth, &configuration, true)
    }

    /// A node whose plugin has no credentials, but is the image service of kubelet.
    pub(crate) fn with_image_service(auth: Auth, mode: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let configuration = format!(
            "{}[remote.auth]\nenable_cri_keychain = true\nimage_service_address = {:?}\n",
            configuration(directory.path(), None, mode),
            directory.path().join("containerd.sock")
        );
        Self::assemble(directory, auth, &configuration, false)
    }

    /// A node whose plugin looks for mirrors in the directory that is returned as well.
    pub(crate) fn with_mirrors(auth: Auth) -> (Self, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let mirrors = directory.path().join("certs.d");
        let configuration = format!("[remote.mirrors_config]\ndir = {mirrors:?}\n");
        (
            Self::assemble(directory, auth, &configuration, true),
            mirrors,
        )
    }

    fn assemble(directory: TempDir, auth: Auth, configuration: &str, login: bool) -> Self {
        let registry = Registry::start(auth).unwrap();
        let tree = push_images(directory.path(), &registry);
        let docker = registry.docker_config(registry.host()).unwrap();
        convert(&registry, "app:original", "app:nydus", &[]);
        let environment = login.then_some(("DOCKER_CONFIG", docker));
        let environment = environment.as_slice();
        let plugin = Plugin::start(directory.path(), configuration, environment).unwrap();
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

    pub(crate) fn logs(&self) -> PathBuf {
        let logs = self.directory.path().join("logs");
        fs::create_dir_all(&logs).unwrap();
        logs
    }

    /// The ids of the daemons, once there are `count`.
    #[track_caller]
    pub(crate) fn wait_for_daemons(&self, count: usize) -> Vec<i32> {
        let began = Instant::now();
        let mut last_look = began;
        loop {
            let daemons = self.plugin.daemons().unwrap();
            if daemons.len() == count {
                return daemons;
            }
            if count == 0 && last_look.elapsed() > Duration::from_secs(2) {
                // It need not run.
                let _ = self.containerd.collect_garbage();
                last_look = Instant::now();
            }
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "{daemons:?}, not {count}:\n{}\ncontainerd:\n{}",
                self.plugin.log(),
                self.containerd.log()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// File system types of the images that are mounted.
    pub(crate) fn mounted_as(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let snapshots = self.plugin.root().join("snapshots");
        let shared = self.plugin.root().join("mnt");
        let mut images = Vec::new();
        for (place, kind) in table.lines().filter_map(|line| line.split_once(" - ")) {
            let point = Path::new(place.split(' ').nth(4).unwrap_or_default());
            let kind = kind.split(' ').next().unwrap_or_default().to_owned();
            let own = point.starts_with(&snapshots) && point.ends_with("mnt");
            if own || point.parent() == Some(&shared) {
                images.push(kind);
            } else if point == shared {
                // One mount, with a directory for each image, which stays empty after it.
                let entries = fs::read_dir(point).into_iter().flatten();
                let full = entries.filter(|entry| !is_empty(&entry.as_ref().unwrap().path()));
                images.extend(full.map(|_| kind.clone()));
            }
        }
        images
    }

    /// A blob that is complete is not asked about any more, and a reader of it proves
    /// nothing: checks that there is one that is not.
    #[track_caller]
    pub(crate) fn check_that_daemons_are_needed(&self) {
        let cache = fs::read_dir(self.plugin.root().join("cache")).unwrap();
        let files = cache.map(|entry| entry.unwrap().metadata().unwrap());
        let largest = files.max_by_key(|file| file.len()).unwrap();
        assert!(
            largest.blocks() * 512 + (1 << 20) < largest.len(),
            "{largest:?}"
        );
    }

    /// How often the [`COLD_LOOP`] of this container has found everything right.
    pub(crate) fn rounds(&self, name: &str) -> u64 {
        let log = fs::read_to_string(self.logs().join(format!("{name}.log"))).unwrap_or_default();
        let last = log.lines().last().and_then(|line| line.rsplit(' ').next());
        last.and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    /// Waits until each of these containers has read everything twice more: once may
    /// have been under way before.
    #[track_caller]
    pub(crate) fn wait_for_progress(&self, cri: &mut Cri, containers: &[(String, String)]) {
        let before: Vec<u64> = containers
            .iter()
            .map(|(name, _)| self.rounds(name))
            .collect();
        for ((name, id), before) in containers.iter().zip(before) {
            let began = Instant::now();
            while self.rounds(name) < before + 2 {
                // containerd may be away.
                let ended = cri.exit_code(id).ok().flatten();
                assert_eq!(ended, None, "{name} has ended:\n{}", self.plugin.log());
                assert!(
                    began.elapsed() < Duration::from_secs(60),
                    "{name} has stopped after {before} rounds:\n{}",
                    self.plugin.log()
                );
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// The output of `command` in a container, which must succeed.
    #[track_caller]
    pub(crate) fn exec(&self, cri: &mut Cri, container: &str, command: &[&str]) -> String {
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

/// What a plugin in `directory` is told: which driver, if any, and which daemons.
pub(crate) fn configuration(directory: &Path, driver: Option<&str>, mode: &str) -> String {
    let mode = format!("daemon_mode = {mode:?}\n");
    let Some(driver) = driver else {
        return mode;
    };
    let template = directory.join("template.json");
    let settings = serde_json::json!({
        "device": {"backend": {"type": "registry"}},
        "mode": "direct",
        "driver": driver,
    });
    fs::write(&template, settings.to_string()).unwrap();
    format!("{mode}[daemon]\nnydusd_config = {template:?}\n")
}

/// Converts an image of the registry.
pub(crate) fn convert(registry: &Registry, source: &str, target: &str, options: &[&str]) {
    let mut convert = nydus_image().unwrap();
    let docker = registry.docker_config(registry.host()).unwrap();
    convert.arg("convert").env("DOCKER_CONFIG", docker);
    convert.args(options);
    convert.args([registry.reference(source), registry.reference(target)]);
    succeed(&mut convert).unwrap();
}

/// Makes the images and pushes them; returns the tree of `app`.
fn push_images(scratch: &Path, registry: &Registry) -> PathBuf {
    let base = scratch.join("state-1");
    copy_programs(&PROGRAMS, &base).unwrap();
    let second = scratch.join("state-2");
    grow(&base, &second);
    fs::create_dir(second.join("data")).unwrap();
    fs::write(second.join("data/used"), nasty::noise(300_000, 1)).unwrap();
    fs::write(second.join("data/unused"), nasty::noise(8_000_000, 2)).unwrap();
    fs::write(second.join("data/gone"), "x").unwrap();
    // In a directory of its own, so that nobody takes it for what is read next.
    fs::create_dir(second.join("spare")).unwrap();
    fs::write(second.join("spare/never"), nasty::noise(4_000_000, 3)).unwrap();
    let third = scratch.join("state-3");
    grow(&second, &third);
    fs::remove_file(third.join("data/gone")).unwrap();
    fs::write(third.join("data/text"), "read lazily\n").unwrap();
    fs::write(third.join("data/sums"), sums(&third)).unwrap();
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

    let at = make_pause(scratch).unwrap();
    registry.push(&at, "pause", "pause:1").unwrap();
    third
}

fn grow(from: &Path, to: &Path) {
    succeed(Command::new("cp").arg("-a").args([from, to])).unwrap();
}

/// What the loop of the test image prints once.
pub(crate) fn sums(tree: &Path) -> String {
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

pub(crate) fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
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
pub(crate) fn reader(node: &Node, cri: &mut Cri, pod: &RunningPod, name: &str) -> String {
    let container = start(node, cri, pod, name, LOOP);
    let log = node.logs().join(format!("{name}.log"));
    wait_for("the first output", || {
        fs::read_to_string(&log).is_ok_and(|text| text.contains("/data/text"))
    });
    container
}

/// A container that reads for ever past the page cache, which has read at least once:
/// its name and its id.
pub(crate) fn cold_reader(
    node: &Node,
    cri: &mut Cri,
    pod: &RunningPod,
    name: &str,
) -> (String, String) {
    let container = start(node, cri, pod, name, COLD_LOOP);
    wait_for("the first round", || node.rounds(name) > 0);
    (name.to_owned(), container)
}

/// Starts a container with this script.
fn start(node: &Node, cri: &mut Cri, pod: &RunningPod, name: &str, script: &str) -> String {
    start_image(node, cri, pod, name, ("app:nydus", script))
}

/// Starts a container of this image with this script.
pub(crate) fn start_image(
    node: &Node,
    cri: &mut Cri,
    pod: &RunningPod,
    name: &str,
    (image, script): (&str, &str),
) -> String {
    let image = node.registry.reference(image);
    patiently(|| cri.run(pod, name, &image, &["sh", "-c", script]))
}

/// What a request brings, once the plugin can be reached: containerd learns of its death
/// from a request of its own, and then pauses for some seconds before it connects again.
#[track_caller]
pub(crate) fn patiently<T>(mut request: impl FnMut() -> Result<T>) -> T {
    let began = Instant::now();
    loop {
        match request() {
            Ok(answer) => return answer,
            Err(error)
                if began.elapsed() < Duration::from_secs(30)
                    && format!("{error:#}").contains("Unavailable") =>
            {
                thread::sleep(Duration::from_millis(200));
            }
            Err(error) => panic!("{error:#}"),
        }
    }
}

/// Whether nothing is in a directory, or it is not there.
pub(crate) fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none())
}

/// Reads a part of the image, in MiB, that nobody has read yet.
pub(crate) fn check_part(node: &Node, cri: &mut Cri, container: &str, at: usize) {
    let sum = |file: &str| format!("dd if={file} bs=1M skip={at} count=1 2>/dev/null | sha256sum");
    let file = node.tree.join("data/unused");
    let script = sum(file.to_str().unwrap());
    let right = succeed(Command::new("sh").args(["-c", &script]))
        .unwrap()
        .stdout;
    let read = node.exec(cri, container, &["sh", "-c", &sum("/data/unused")]);
    assert_eq!(read, right, "part {at}:\n{}", node.plugin.log());
}

/// Kills every process of the only daemon, and waits for another one.
pub(crate) fn kill_the_daemon(node: &Node) {
    let old = node.wait_for_daemons(1);
    node.plugin.kill_daemons(&old).unwrap();
    wait_for("another daemon", || {
        let daemons = node.plugin.daemons().unwrap();
        daemons.len() == 1 && daemons != old
    });
}
