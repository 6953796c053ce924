//! Mounts pass from one daemon to another while programs read from them. The test plays
//! the supervisor, in the order of calls that `nydus-snapshotter` of Nydus v2 has.

use std::fs::{self, File};
use std::io::Read as _;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::api::{Answer, ask};
use support::binaries::nydusd;
use support::mount::is_mounted;
use support::process::Process;
use support::supervisor::{State, Supervisor};

use crate::scene::{Build, DRIVERS, Scene, assert_same_tree};

/// Readers at a time.
const READERS: usize = 8;

/// Unmounts what is at and below a directory when the test is over, however it ends.
struct Detach(PathBuf);

impl Drop for Detach {
    fn drop(&mut self) {
        for point in mounted_below(&self.0) {
            // Nothing can be reported from a destructor.
            let _ = umount2(&point, MntFlags::MNT_DETACH);
        }
    }
}

/// Mount points at and below a directory.
pub(crate) fn mounted_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.map(PathBuf::from);
    points
        .filter(|point| point.starts_with(directory))
        .collect()
}

/// One daemon.
pub(crate) struct Daemon {
    pub process: Process,
    pub socket: PathBuf,
}

/// Daemons that follow each other on one mount point.
pub(crate) struct Line {
    // Before the daemons end: they might wait for each other.
    _detach: Detach,
    pub daemons: Vec<Daemon>,
    pub point: PathBuf,
    supervisor: Supervisor,
    options: Vec<String>,
    directory: PathBuf,
}

impl Line {
    /// * `options`: of every daemon.
    pub(crate) fn new(scene: &Scene, options: &[&str]) -> Self {
        let point = scene.new_point();
        Self {
            _detach: Detach(point.clone()),
            daemons: Vec::new(),
            point,
            supervisor: Supervisor::new(&scene.path("supervisor.sock")),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            directory: scene.dir("line"),
        }
    }

    fn of_build(scene: &Scene, driver: &str, build: &Build) -> Self {
        let bootstrap = build.bootstrap.to_str().unwrap();
        let blobs = build.blob_dir.to_str().unwrap();
        let options = ["--bootstrap", bootstrap, "--localfs-dir", blobs];
        Self::new(scene, &[&options[..], &["--driver", driver]].concat())
    }

    /// Starts a daemon with one more control socket than there are.
    pub(crate) fn start(&mut self, upgrade: bool) {
        let socket = self
            .directory
            .join(format!("api{}.sock", self.daemons.len()));
        self.start_on(socket, upgrade, &[]);
    }

    pub(crate) fn start_on(&mut self, socket: PathBuf, upgrade: bool, more: &[&str]) {
        let number = self.daemons.len();
        let mut command: Command = nydusd().unwrap();
        command.arg("fuse");
        if upgrade {
            command.arg("--upgrade");
        }
        command.arg("--mountpoint").arg(&self.point);
        command.arg("--apisock").arg(&socket);
        command.args(["--id", "d1", "--supervisor"]);
        command.arg(self.supervisor.path());
        command.args(&self.options).args(more);
        let log = self.directory.join(format!("{number}.log"));
        let mut process = Process::start(&mut command, &log).unwrap();
        let there = socket.clone();
        // A socket of one that died may be there, too.
        process
            .wait_until(|_| UnixStream::connect(&there).is_ok())
            .unwrap();
        self.daemons.push(Daemon { process, socket });
    }

    pub(crate) fn daemon(&self, number: usize) -> &Daemon {
        &self.daemons[number]
    }

    pub(crate) fn last(&self) -> usize {
        self.daemons.len() - 1
    }

    fn send(&mut self, number: usize) -> Answer {
        let socket = self.daemons[number].socket.clone();
        let ask = || ask(&socket, "PUT", "/api/v1/daemon/fuse/sendfd", "").unwrap();
        self.supervisor.take(ask).unwrap()
    }

    #[track_caller]
    pub(crate) fn must_send(&mut self, number: usize) {
        let answer = self.send(number);
        assert_eq!(answer.status, 204, "{}", answer.body);
    }

    fn take_over(&self, number: usize) -> Answer {
        let socket = &self.daemons[number].socket;
        let ask = || ask(socket, "PUT", "/api/v1/daemon/fuse/takeover", "").unwrap();
        self.supervisor.offer(ask).unwrap()
    }

    #[track_caller]
    pub(crate) fn must_take_over(&self, number: usize) {
        let answer = self.take_over(number);
        let log = self.daemon(number).process.log();
        assert_eq!(answer.status, 204, "{}\n{log}", answer.body);
        assert_eq!(self.daemon(number).state(), "READY");
    }

    /// Tells a daemon to leave its mounts, and waits for its end.
    #[track_caller]
    pub(crate) fn leave(&mut self, number: usize) {
        let daemon = &mut self.daemons[number];
        daemon.expect(204, "PUT", "/api/v1/daemon/exit", "");
        let status = daemon.process.wait().unwrap();
        assert!(status.success(), "{}", daemon.process.log());
        assert!(
            !mounted_below(&self.point).is_empty(),
            "{}",
            daemon.process.log()
        );
    }

    #[track_caller]
    pub(crate) fn run(&self, number: usize) {
        let daemon = self.daemon(number);
        daemon.expect(204, "PUT", "/api/v1/daemon/start", "");
        daemon.wait_for("RUNNING");
    }

    /// The whole way from the last daemon to a new one.
    #[track_caller]
    pub(crate) fn upgrade(&mut self) {
        let old = self.last();
        self.start(true);
        assert_eq!(self.daemon(old + 1).state(), "INIT");
        self.must_take_over(old + 1);
        self.leave(old);
        self.run(old + 1);
    }

    /// Ends the last daemon as a service manager would.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        let last = self.last();
        let process = &mut self.daemons[last].process;
        let began = Instant::now();
        // A child of another test, before it becomes a program, has our files open.
        while process.ended().unwrap().is_none() {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "{}",
                process.log()
            );
            // It may have ended by now.
            let _ = process.signal(Signal::SIGTERM);
            thread::sleep(Duration::from_millis(500));
        }
        assert!(process.wait().unwrap().success(), "{}", process.log());
        assert_eq!(mounted_below(&self.point), [] as [PathBuf; 0]);
    }
}

impl Daemon {
    #[track_caller]
    pub(crate) fn expect(&self, status: u16, method: &str, target: &str, body: &str) -> Value {
        let answer = ask(&self.socket, method, target, body).unwrap();
        let log = self.process.log();
        assert_eq!(
            answer.status, status,
            "{method} {target}: {}\n{log}",
            answer.body
        );
        answer.json()
    }

    pub(crate) fn state(&self) -> String {
        let info = self.expect(200, "GET", "/api/v1/daemon", "");
        info["state"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, state: &str) {
        let began = Instant::now();
        loop {
            // Between two workers a call may be cut off.
            let answer = ask(&self.socket, "GET", "/api/v1/daemon", "").ok();
            if answer.is_some_and(|answer| answer.json()["state"] == state) {
                return;
            }
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "{}",
                self.process.log()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills the process that does the work, and waits for the next one.
    #[track_caller]
    pub(crate) fn kill_worker(&self) {
        const WORKER: &str = "worker is process ";
        let log = self.process.log();
        let (_, after) = log.rsplit_once(WORKER).unwrap();
        let pid = after.lines().next().unwrap().parse().unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        let count = log.matches(WORKER).count();
        let began = Instant::now();
        while self.process.log().matches(WORKER).count() == count {
            assert!(began.elapsed() < Duration::from_secs(30));
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills all of it.
    #[track_caller]
    pub(crate) fn kill(&mut self) {
        self.process.kill_group().unwrap();
        let began = Instant::now();
        while UnixStream::connect(&self.socket).is_ok() {
            assert!(began.elapsed() < Duration::from_secs(30));
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[track_caller]
    pub(crate) fn mount(&self, path: &str, build: &Build, cache: &Path) {
        self.expect(204, "POST", &target(path), &body(build, cache, path));
    }
}

pub(crate) fn target(path: &str) -> String {
    format!("/api/v1/mount?mountpoint={}", path.replace('/', "%2F"))
}

pub(crate) fn body(build: &Build, cache: &Path, id: &str) -> String {
    let config = json!({
        "device": {
            "id": id,
            "backend": { "type": "localfs", "config": { "dir": build.blob_dir } },
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        },
        "mode": "direct",
    });
    json!({ "fs_type": "rafs", "source": build.bootstrap, "config": config.to_string() })
        .to_string()
}

/// Reads the files of `source` in `mount` over and over, past the page cache, until
/// `over`: never an error, never a wrong byte.
fn read_on(source: &Path, mount: &Path, over: &AtomicBool, rounds: &AtomicUsize) {
    let names = ["first", "second", "third", "etc/name"];
    let files = names.map(|name| (name, fs::read(source.join(name)).unwrap()));
    while !over.load(Ordering::Relaxed) {
        for (name, expected) in &files {
            let path = mount.join(name);
            let file = File::open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            let mut bytes = vec![0; expected.len()];
            file.read_exact_at(&mut bytes, 0)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(bytes == *expected, "{name}");
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Has [`READERS`] read in `places` while `act` acts; it is called with what waits
/// until all of them came on.
pub(crate) fn while_reading(source: &Path, places: &[PathBuf], act: impl FnOnce(&dyn Fn())) {
    let over = AtomicBool::new(false);
    let rounds: Vec<AtomicUsize> = (0..READERS).map(|_| AtomicUsize::new(0)).collect();
    /// Readers must not go on for ever when a test fails.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    thread::scope(|scope| {
        let readers: Vec<_> = rounds
            .iter()
            .enumerate()
            .map(|(number, rounds)| {
                let place = &places[number % places.len()];
                let over = &over;
                scope.spawn(move || read_on(source, place, over, rounds))
            })
            .collect();
        let stop = Over(&over);
        let wait = || {
            let before: Vec<_> = rounds
                .iter()
                .map(|count| count.load(Ordering::Relaxed))
                .collect();
            let began = Instant::now();
            // One round may have been all but over.
            while rounds
                .iter()
                .zip(&before)
                .any(|(now, before)| now.load(Ordering::Relaxed) < before + 2)
            {
                assert!(began.elapsed() < Duration::from_secs(60), "readers hang");
                assert!(!readers.iter().any(|reader| reader.is_finished()));
                thread::sleep(Duration::from_millis(2));
            }
        };
        wait();
        act(&wait);
        drop(stop);
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub(crate) fn one_file(scene: &Scene, name: &str) -> Build {
    let root = scene.dir(&format!("{name}.root"));
    fs::write(root.join(name), name).unwrap();
    scene.create(name, &[], &root)
}

#[test]
fn images_of_the_api_pass_on_while_they_are_read() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let small = scene.create("image", &["--chunk-size", "0x10000"], &source);
    let (one, two) = (one_file(&scene, "one"), one_file(&scene, "two"));
    let cache = scene.dir("cache");
    let mut line = Line::new(&scene, &[]);
    line.start(false);
    let point = line.point.clone();
    line.daemon(0).mount("/1", &small, &cache);
    line.daemon(0).mount("/a/b", &small, &cache);
    line.daemon(0).mount("/one", &one, &cache);
    // The way in which the snapshotter notices a death.
    let mut silent = UnixStream::connect(&line.daemon(0).socket).unwrap();
    let places = [point.join("1"), point.join("a/b")];
    let open = File::open(point.join("1/first")).unwrap();
    while_reading(&source, &places, |came_on| {
        for round in 1..=3 {
            line.must_send(line.last());
            line.upgrade();
            came_on();
            let info = line.daemon(round).expect(200, "GET", "/api/v1/daemon", "");
            let mounted = info["backend_collection"].as_object().unwrap();
            assert!(mounted.contains_key("/1"), "{info}");
            // What was mounted is left; what comes now works, too.
            assert_eq!(fs::read(point.join("one/one")).unwrap(), b"one");
            let path = format!("/two-{round}");
            line.daemon(round).mount(&path, &two, &cache);
            let file = point.join(format!("two-{round}/two"));
            assert_eq!(fs::read(file).unwrap(), b"two");
        }
    });
    let mut content = vec![0; 1000];
    open.read_exact_at(&mut content, 5000).unwrap();
    assert!(content == fs::read(source.join("first")).unwrap()[5000..6000]);
    drop(open);
    silent
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    assert_eq!(silent.read(&mut [0]).unwrap(), 0, "the first one is gone");

    let last = line.daemon(line.last());
    last.expect(204, "DELETE", &target("/two-1"), "");
    assert_eq!(names(&point.join("two-1")), [] as [&str; 0]);
    last.expect(204, "PUT", &target("/one"), &body(&two, &cache, "/one"));
    assert_eq!(names(&point.join("one")), ["two"]);
    assert_same_tree(&source, &point.join("1"));
    // Its own worker may die as ever.
    last.kill_worker();
    assert_eq!(fs::read(point.join("two-3/two")).unwrap(), b"two");
    assert_same_tree(&source, &point.join("a/b"));
    last.wait_for("RUNNING");
    line.stop();
}

#[test]
fn an_image_of_either_driver_passes_on_while_it_is_read() {
    for driver in DRIVERS {
        let scene = Scene::new();
        let source = scene.small_tree();
        // Read by nobody: the blob stays incomplete, so the kernel goes on asking.
        let rest = support::tree::nasty::noise(4 << 20, 3);
        fs::write(source.join("unread"), rest).unwrap();
        let build = scene.create("image", &["--chunk-size", "0x10000"], &source);
        let mut line = Line::of_build(&scene, driver, &build);
        line.start(false);
        let place = [line.point.clone()];
        while_reading(&source, &place, |came_on| {
            for _ in 0..2 {
                line.must_send(line.last());
                line.upgrade();
                came_on();
            }
        });
        assert_same_tree(&source, &line.point);
        line.stop();
    }
}

/// The same state serves as often as it is needed, until the daemons come that live.
#[test]
fn a_new_daemon_goes_on_after_everybody_died() {
    for driver in DRIVERS {
        let scene = Scene::new();
        let source = scene.small_tree();
        let rest = support::tree::nasty::noise(4 << 20, 3);
        fs::write(source.join("unread"), rest).unwrap();
        let build = scene.create("image", &["--chunk-size", "0x10000"], &source);
        let mut line = Line::of_build(&scene, driver, &build);
        line.start(false);
        let socket = line.daemon(0).socket.clone();
        line.must_send(0);
        let place = [line.point.clone()];
        while_reading(&source, &place, |came_on| {
            for round in 0..2 {
                let dead = line.last();
                line.daemons[dead].kill();
                // It finds what the dead one has left.
                line.start_on(socket.clone(), false, &[]);
                assert_eq!(line.daemon(dead + 1).state(), "INIT", "{driver}");
                line.must_take_over(dead + 1);
                if round == 0 {
                    // Once more, before anything is served.
                    line.daemons[dead + 1].kill();
                    line.start_on(socket.clone(), false, &[]);
                    line.must_take_over(dead + 2);
                    line.must_send(dead + 2);
                }
                line.run(line.last());
                came_on();
            }
        });
        assert_same_tree(&source, &line.point);
        line.stop();
    }
}

/// Until a state is taken whole, nothing has changed, and the old daemon serves.
#[test]
fn a_state_that_cannot_be_used_changes_nothing() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let cache = scene.dir("cache");
    let mut line = Line::new(&scene, &[]);
    line.start(false);
    line.daemon(0).mount("/1", &build, &cache);
    line.must_send(0);
    line.start(true);
    let good = line.supervisor.state.take().unwrap();
    let text = String::from_utf8(good.text.clone()).unwrap();
    let half = good.text[..good.text.len() / 2].to_vec();
    let upstream = b"\x00\x00\x64\x86\x84\x19\x10\x07\x01\x00\x00\x00".to_vec();
    let changed = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}: {text}");
        text.replacen(from, to, 1).into_bytes()
    };
    let null = || File::open("/dev/null").unwrap().into();
    let bundle = || good.file.as_ref().unwrap().try_clone().unwrap();
    let other = scene.dir("other");
    let (here, there) = (line.point.to_str().unwrap(), other.to_str().unwrap());
    for (case, text, file, words) in [
        ("nothing", Vec::new(), Some(bundle()), "no state"),
        ("garbage", vec![7; 100_000], Some(bundle()), "07 07 07"),
        ("half", half, Some(bundle()), "damaged"),
        ("upstream", upstream, Some(null()), "Nydus v2"),
        (
            "version",
            changed("\"version\":1,", "\"version\":9,"),
            Some(bundle()),
            "version 9",
        ),
        (
            "version of a note",
            changed("\\\"version\\\":1,", "\\\"version\\\":5,"),
            Some(bundle()),
            "version 5",
        ),
        (
            "unknown deposit",
            changed("\"name\":\"mount-1\"", "\"name\":\"novelty\""),
            Some(bundle()),
            "novelty",
        ),
        (
            "more descriptors",
            changed("\"files\":1", "\"files\":2"),
            Some(bundle()),
            "descriptors",
        ),
        ("another mount", changed(here, there), Some(bundle()), there),
        ("no descriptor", good.text.clone(), None, "no descriptor"),
        (
            "wrong descriptor",
            good.text.clone(),
            Some(null()),
            "no bundle",
        ),
    ] {
        line.supervisor.state = Some(State { text, file });
        let answer = line.take_over(1);
        assert_eq!(answer.status, 500, "{case}: {}", answer.body);
        assert!(answer.body.contains(words), "{case}: {}", answer.body);
        assert_eq!(line.daemon(1).state(), "INIT", "{case}");
        assert_eq!(line.daemon(0).state(), "RUNNING", "{case}");
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert_same_tree(&source, &line.point.join("1"));
    }
    // An image that cannot be opened by the new one.
    let file = build.blob_dir.join("moved");
    fs::rename(&cache, &file).unwrap();
    fs::write(&cache, "no directory").unwrap();
    line.supervisor.state = Some(State {
        text: good.text.clone(),
        file: Some(bundle()),
    });
    let answer = line.take_over(1);
    assert_eq!(answer.status, 500, "{}", answer.body);
    assert!(answer.body.contains("cache"), "{}", answer.body);
    fs::remove_file(&cache).unwrap();
    fs::rename(&file, &cache).unwrap();
    // The same state is good all the time.
    line.must_take_over(1);
    line.leave(0);
    line.run(1);
    assert_same_tree(&source, &line.point.join("1"));
    line.stop();
}

#[test]
fn steps_come_in_their_order() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let (one, two) = (one_file(&scene, "one"), one_file(&scene, "two"));
    let cache = scene.dir("cache");
    let mut line = Line::new(&scene, &[]);
    line.start(false);
    let takeover = "/api/v1/daemon/fuse/takeover";
    let start = "/api/v1/daemon/start";
    let old = line.daemon(0);
    old.expect(400, "PUT", takeover, "");
    old.expect(400, "PUT", start, "");
    // Nobody listens.
    let sendfd = "/api/v1/daemon/fuse/sendfd";
    let refusal = old.expect(500, "PUT", sendfd, "");
    assert!(
        refusal["message"]
            .as_str()
            .unwrap()
            .contains("no supervisor listens"),
        "{refusal}"
    );
    old.mount("/1", &build, &cache);
    old.mount("/2", &one, &cache);
    line.must_send(0);

    line.start(true);
    let new = line.daemon(1);
    assert_eq!(new.state(), "INIT");
    let info = new.expect(200, "GET", "/api/v1/daemon", "");
    assert_eq!(info["id"], "d1");
    new.expect(400, "PUT", start, "");
    new.expect(503, "PUT", sendfd, "");
    new.expect(
        503,
        "PUT",
        "/api/v1/config?id=/1",
        "{\"registry_auth\":\"dTpw\"}",
    );
    // Mounts are accepted, and made at the start.
    new.mount("/1", &build, &cache);
    new.mount("/new", &two, &cache);
    new.mount("/never", &two, &cache);
    new.expect(500, "POST", &target("/new"), &body(&two, &cache, "/new"));
    new.expect(204, "DELETE", &target("/never"), "");
    new.expect(500, "DELETE", &target("/never"), "");
    let mut bad = body(&two, &cache, "/bad");
    bad = bad.replace("two.boot", "absent.boot");
    new.expect(500, "POST", &target("/bad"), &bad);
    assert_eq!(names(&line.point), ["1", "2"]);
    let listed = |daemon: &Daemon| -> Vec<String> {
        let info = daemon.expect(200, "GET", "/api/v1/daemon", "");
        let images = info["backend_collection"].as_object().unwrap();
        let kinds = images
            .values()
            .map(|it| it["config"]["backend"]["type"].as_str());
        assert!(
            kinds.into_iter().all(|kind| kind == Some("localfs")),
            "{info}"
        );
        images.keys().cloned().collect()
    };
    assert_eq!(listed(new), ["/1", "/new"]);

    line.must_take_over(1);
    assert_eq!(listed(line.daemon(1)), ["/1", "/2", "/new"]);
    // A worker that dies now is followed by one that waits.
    line.daemon(1).kill_worker();
    line.daemon(1).wait_for("READY");
    let new = line.daemon(1);
    new.expect(400, "PUT", takeover, "");
    line.must_send(1);
    // Not while the old one serves.
    let refusal = line.daemon(1).expect(500, "PUT", start, "");
    let text = refusal["message"].as_str().unwrap();
    assert!(text.contains("has to exit first"), "{text}");
    assert_eq!(line.daemon(1).state(), "READY");
    assert_same_tree(&source, &line.point.join("1"));
    // Silent from the moment at which it was made, and never closed.
    let mut silent = UnixStream::connect(&line.daemon(1).socket).unwrap();
    line.daemon(1).state();
    line.leave(0);
    line.run(1);
    silent
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let still = silent.read(&mut [0]).unwrap_err().kind();
    assert_eq!(still, std::io::ErrorKind::WouldBlock, "closed by the start");
    assert_eq!(names(&line.point), ["1", "2", "new"]);
    assert_same_tree(&source, &line.point.join("1"));
    assert_eq!(fs::read(line.point.join("2/one")).unwrap(), b"one");
    assert_eq!(fs::read(line.point.join("new/two")).unwrap(), b"two");
    line.daemon(1).expect(400, "PUT", start, "");
    line.stop();
}

/// Exit leaves the mount to those who hold the state, and to nobody else.
#[test]
fn exit_unmounts_what_nobody_holds() {
    for driver in DRIVERS {
        let scene = Scene::new();
        let build = scene.create("image", &[], &scene.small_tree());
        let mut line = Line::of_build(&scene, driver, &build);
        line.start(false);
        line.must_send(0);
        line.supervisor.state = None;
        let daemon = &mut line.daemons[0];
        daemon.expect(204, "PUT", "/api/v1/daemon/exit", "");
        let status = daemon.process.wait().unwrap();
        assert!(status.success(), "{}", daemon.process.log());
        assert!(!is_mounted(&line.point));
    }
}

/// A daemon that waits ends when it is told to, and takes nothing away from the old one.
#[test]
fn a_waiting_daemon_can_be_sent_away() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let mut line = Line::of_build(&scene, "fuse", &build);
    line.start(false);
    line.must_send(0);
    for (ready, by_signal) in [(false, false), (false, true), (true, false), (true, true)] {
        line.start(true);
        let last = line.last();
        if ready {
            line.must_take_over(last);
        }
        let daemon = &mut line.daemons[last];
        if by_signal {
            daemon.process.signal(Signal::SIGTERM).unwrap();
        } else {
            daemon.expect(204, "PUT", "/api/v1/daemon/exit", "");
        }
        assert!(daemon.process.wait().unwrap().success());
        assert!(!daemon.socket.exists());
        assert_eq!(line.daemon(0).state(), "RUNNING");
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert_same_tree(&source, &line.point);
    }
    // When there is no old one any more, a signal means the mount.
    line.daemons[0].kill();
    let socket = line.daemon(0).socket.clone();
    line.start_on(socket, false, &[]);
    line.must_take_over(line.last());
    line.stop();
}

/// A mount that is gone is not brought back by its state.
#[test]
fn a_state_without_its_mount_is_refused() {
    let scene = Scene::new();
    let build = scene.create("image", &[], &scene.small_tree());
    let mut line = Line::of_build(&scene, "fuse", &build);
    line.start(false);
    line.must_send(0);
    line.stop();
    line.start(true);
    let answer = line.take_over(1);
    assert_eq!(answer.status, 500);
    assert!(
        answer.body.contains("not there any more"),
        "{}",
        answer.body
    );
}

/// What is becoming of requests that the dead daemon had taken is a matter of choice.
#[test]
fn requests_in_flight_can_be_flushed() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    // Takes connections and never says a word.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", mute.local_addr().unwrap());
    let config = json!({
        "version": 2,
        "backend": { "type": "http-proxy", "http-proxy": {
            "addr": address, "timeout": 600, "connect_timeout": 600, "retry_limit": 0 } },
        "cache": { "type": "filecache", "filecache": { "work_dir": scene.dir("cache") } },
        "rafs": { "mode": "direct" },
    });
    let file = scene.path("config.json");
    fs::write(&file, config.to_string()).unwrap();
    let bootstrap = build.bootstrap.to_str().unwrap();
    let options = ["--bootstrap", bootstrap, "--config", file.to_str().unwrap()];
    let mut line = Line::new(&scene, &options);
    line.start(false);
    line.must_send(0);
    // From now on the kernel knows that closing a file is nothing to ask about: a process
    // that ends could not be killed while it waits for that.
    drop(File::open(line.point.join("first")).unwrap());
    let path = line.point.join("first");
    // Past the page cache: the kernel would ask again for a page that it did not get.
    let reader = thread::spawn(move || {
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_DIRECT).open(path)?;
        file.read_at(&mut [0; 4096], 0)
    });
    let began = Instant::now();
    while line.daemon(0).expect(200, "GET", "/debug", "")["reads"]
        .as_array()
        .unwrap()
        .is_empty()
    {
        assert!(began.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(5));
    }
    line.daemons[0].kill();
    assert!(!reader.is_finished());
    let socket = line.daemon(0).socket.clone();
    line.start_on(socket, false, &["--failover-policy", "flush"]);
    line.must_take_over(1);
    assert!(!reader.is_finished());
    line.run(1);
    let error = reader.join().unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    // Whoever comes now is served as ever.
    assert_eq!(names(&line.point), ["etc", "first", "second", "third"]);
    line.stop();
}
