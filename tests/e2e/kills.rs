//! Processes of a daemon are killed at random moments while everybody reads: nobody
//! gets an error or a wrong byte. What each death costs: `docs/crash-safety.md`.
//!
//! The number of kills per driver is `NYDUS_KILLS`, or [`KILLS`].

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::mount::{Nydusd, is_mounted, unmount};
use support::notify::ServiceManager;
use support::process::Process;
use support::tree::nasty;
use support::tree::{Detail, describe, difference};

use crate::scene::{DRIVERS, Scene, assert_same_tree};

/// Kills in a normal run: both drivers together are 200.
const KILLS: usize = 100;
/// Bytes of a big file.
const BIG: usize = 3 << 20;
const PAGE: usize = 4096;

/// Bytes that are the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(limit).unwrap()).unwrap()
    }
}

/// What all readers share.
struct Stage {
    source: PathBuf,
    mount: PathBuf,
    over: AtomicBool,
    /// Longest step of any reader since it was last looked at, in milliseconds.
    longest: AtomicU64,
    steps: AtomicU64,
}

impl Stage {
    /// Repeats `step` until the test is over. Steps are short: one system call or a few.
    fn repeat(&self, mut step: impl FnMut()) {
        while !self.over.load(Ordering::Relaxed) {
            let began = Instant::now();
            step();
            let took = u64::try_from(began.elapsed().as_millis()).unwrap();
            self.longest.fetch_max(took, Ordering::Relaxed);
            self.steps.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Opens a file of the mount and forgets what the kernel has cached of it.
    fn open(&self, name: &str) -> File {
        let file = File::open(self.mount.join(name)).unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        file
    }

    fn sequential(&self, name: &str) {
        let expected = fs::read(self.source.join(name)).unwrap();
        let mut buffer = vec![0; 128 << 10];
        self.repeat(|| {
            let file = self.open(name);
            let mut at = 0;
            while at < expected.len() {
                let len = file.read_at(&mut buffer, u64::try_from(at).unwrap());
                let len = len.unwrap_or_else(|error| panic!("{name} at {at}: {error}"));
                assert!(len > 0, "{name} ends at {at}");
                assert!(buffer[..len] == expected[at..at + len], "{name} at {at}");
                at += len;
            }
        });
    }

    fn random(&self, name: &str, seed: u64) {
        let expected = fs::read(self.source.join(name)).unwrap();
        let mut random = Random(seed);
        let mut page = [0; PAGE];
        self.repeat(|| {
            let at = random.below(expected.len() / PAGE) * PAGE;
            let file = self.open(name);
            let read = file.read_exact_at(&mut page, u64::try_from(at).unwrap());
            read.unwrap_or_else(|error| panic!("{name} at {at}: {error}"));
            assert!(page == expected[at..at + PAGE], "{name} at {at}");
        });
    }

    /// A page that cannot be had would end the whole test program with SIGBUS.
    fn mapped(&self, name: &str, seed: u64) {
        let expected = fs::read(self.source.join(name)).unwrap();
        let mut random = Random(seed);
        self.repeat(|| {
            let file = self.open(name);
            // SAFETY: nobody can change a file of a read-only file system.
            let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
            for _ in 0..8 {
                let at = random.below(expected.len());
                assert_eq!(map[at], expected[at], "{name} at {at}");
            }
        });
    }

    /// Lists and inspects everything. Describes no content: others do that.
    fn walk(&self) {
        fn entries(dir: &Path, found: &mut Vec<(PathBuf, u64)>, root: &Path) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                found.push((path.strip_prefix(root).unwrap().to_owned(), meta.len()));
                if meta.is_dir() {
                    found.last_mut().unwrap().1 = 0;
                    entries(&path, found, root);
                }
            }
        }
        let list = |root: &Path| {
            let mut found = Vec::new();
            entries(root, &mut found, root);
            found.sort();
            found
        };
        let expected = list(&self.source);
        self.repeat(|| {
            // So that names and attributes are asked for again.
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
            assert_eq!(list(&self.mount), expected);
            thread::sleep(Duration::from_millis(100));
        });
    }
}

fn tree(scene: &Scene) -> PathBuf {
    let root = scene.dir("source");
    for (index, name) in ["big-1", "big-2", "big-3"].into_iter().enumerate() {
        fs::write(root.join(name), nasty::noise(BIG, index + 1)).unwrap();
    }
    for dir in 0..4 {
        let path = root.join(format!("dir-{dir}"));
        fs::create_dir(&path).unwrap();
        for file in 0..25 {
            fs::write(path.join(format!("{file}")), format!("{dir} {file}")).unwrap();
        }
    }
    // Read by nobody: the blob stays incomplete, so the kernel goes on asking.
    fs::write(root.join("unread"), nasty::noise(16 << 20, 9)).unwrap();
    root
}

fn kills() -> usize {
    let number = std::env::var("NYDUS_KILLS").ok();
    number.map_or(KILLS, |number| number.parse().unwrap())
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// Kills the worker, waits for its successor, and again.
fn kill_workers(daemon: &mut Nydusd, stage: &Stage, count: usize) -> Vec<u64> {
    let mut random = Random(0x5eed);
    let mut stalls = Vec::new();
    for number in 1..=count {
        let pause = random.below(60);
        thread::sleep(Duration::from_millis(u64::try_from(pause).unwrap()));
        stage.longest.store(0, Ordering::Relaxed);
        signal(daemon.worker().unwrap(), Signal::SIGKILL);
        daemon
            .process()
            .wait_until(|process| process.log().matches("is served again").count() == number)
            .unwrap();
        let steps = stage.steps.load(Ordering::Relaxed);
        let began = Instant::now();
        while stage.steps.load(Ordering::Relaxed) < steps + 8 {
            assert!(began.elapsed() < Duration::from_secs(30), "readers hang");
            thread::sleep(Duration::from_millis(1));
        }
        stalls.push(stage.longest.load(Ordering::Relaxed));
    }
    stalls.sort_unstable();
    stalls
}

#[allow(clippy::print_stdout, reason = "figures for whoever runs it by hand")]
fn readers_survive(driver: &str) {
    let scene = Scene::new();
    let source = tree(&scene);
    let build = scene.create("image", &["--chunk-size", "0x10000"], &source);
    let mut daemon = scene.mount_with(driver, &build);
    let stage = Stage {
        source: source.clone(),
        mount: daemon.point().to_owned(),
        over: AtomicBool::new(false),
        longest: AtomicU64::new(0),
        steps: AtomicU64::new(0),
    };
    let stalls = thread::scope(|scope| {
        let stage = &stage;
        let readers = [
            scope.spawn(|| stage.sequential("big-1")),
            scope.spawn(|| stage.sequential("big-2")),
            scope.spawn(|| stage.random("big-2", 1)),
            scope.spawn(|| stage.random("big-3", 2)),
            scope.spawn(|| stage.mapped("big-3", 3)),
            scope.spawn(|| stage.walk()),
        ];
        let killer = scope.spawn(|| {
            let stalls = kill_workers(&mut daemon, stage, kills());
            stage.over.store(true, Ordering::Relaxed);
            stalls
        });
        let stalls = killer.join();
        stage.over.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().unwrap();
        }
        stalls.unwrap()
    });
    let at = |percent: usize| stalls[(stalls.len() - 1) * percent / 100];
    println!(
        "{driver}: {} kills, {} steps of readers; longest step after a kill in ms: \
         median {}, 99th percentile {}",
        stalls.len(),
        stage.steps.load(Ordering::Relaxed),
        at(50),
        at(99)
    );
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn readers_through_the_kernel_survive_the_death_of_workers() {
    readers_survive("erofs");
}

#[test]
fn readers_through_fuse_survive_the_death_of_workers() {
    readers_survive("fuse");
}

/// The worker starts another keeper, and that one another worker.
#[test]
fn nobody_notices_the_death_of_a_keeper() {
    for driver in DRIVERS {
        let scene = Scene::new();
        let source = scene.small_tree();
        let daemon = scene.mount_with(driver, &scene.create("image", &[], &source));
        let log = || fs::read_to_string(daemon.point().with_extension("log")).unwrap();
        let mut keeper = daemon.process_id();
        for round in 1..=3 {
            signal(keeper, Signal::SIGKILL);
            wait_until(|| log().matches("keeper is process").count() == round);
            keeper = daemon.next_keeper().unwrap();
            assert!(fs::read(daemon.point().join("first")).is_ok(), "{driver}");
            // It has everything that it needs by the time that it says so.
            thread::sleep(Duration::from_millis(200));
            signal(daemon.worker().unwrap(), Signal::SIGKILL);
            wait_until(|| log().matches("is served again").count() == round);
            assert_same_tree(&source, daemon.point());
        }
        let worker = daemon.worker().unwrap();
        unmount(daemon.point()).unwrap();
        // Both end, although nobody is left to wait for them.
        wait_until(|| !Path::new(&format!("/proc/{worker}/stat")).exists());
        wait_until(|| !is_running(keeper));
    }
}

fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[track_caller]
fn wait_until(mut ready: impl FnMut() -> bool) {
    let began = Instant::now();
    while !ready() {
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "it does not happen"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// A program that dies with a file open, while nobody is there who answers. It is the
/// first to close one: the kernel must know already that nobody has to be asked.
#[test]
fn a_reader_dies_without_an_answer() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let point = scene.new_point();
    let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
    command.args(["--driver", "fuse", "--localfs-dir"]);
    let daemon = scene.start(command.arg(&build.blob_dir), &point);
    let open = point.join("first");
    // Holds the only descriptor that there ever was.
    let mut command = Command::new("tail");
    command.args(["-c", "1", "-f"]).arg(&open);
    let mut reader = Process::start(&mut command, &scene.path("reader.log")).unwrap();
    reader
        .wait_until(|reader| !reader.log().is_empty())
        .unwrap();
    // Nobody starts another worker now.
    signal(daemon.process_id(), Signal::SIGSTOP);
    let worker = daemon.worker().unwrap();
    signal(worker, Signal::SIGKILL);
    wait_until(|| !is_running(worker));
    signal(reader.id(), Signal::SIGKILL);
    let began = Instant::now();
    let mut ended = None;
    while ended.is_none() && began.elapsed() < Duration::from_secs(10) {
        ended = reader.ended().unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    signal(daemon.process_id(), Signal::SIGCONT);
    assert!(ended.is_some(), "it waits for an answer");
    wait_until(|| fs::read(&open).is_ok());
    assert_same_tree(&source, &point);
    daemon.stop().unwrap();
}

/// Without anybody to answer, FUSE fails closed: an error, never wrong bytes.
#[test]
fn fuse_fails_closed_when_everybody_dies() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let mut daemon = scene.mount_with("fuse", &scene.create("image", &[], &source));
    daemon.process().kill_group().unwrap();
    let error = fs::read(daemon.point().join("first")).unwrap_err();
    // The first one may have been under way when the connection broke.
    let closed = [Some(libc::ENOTCONN), Some(libc::ECONNABORTED)];
    assert!(closed.contains(&error.raw_os_error()), "{error}");
    assert!(is_mounted(daemon.point()));
}

/// Unmounts when the test is over, however it ends.
struct Detach(PathBuf);

impl Drop for Detach {
    fn drop(&mut self) {
        // Not there any more when all went well.
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// With the service manager as a third holder readers wait for the next start.
#[test]
fn a_third_holder_outlives_keeper_and_worker() {
    for driver in DRIVERS {
        let scene = Scene::new();
        let source = scene.small_tree();
        let build = scene.create("image", &["--chunk-size", "0x10000"], &source);
        let mut manager = ServiceManager::new(&scene.path("notify")).unwrap();
        let point = scene.new_point();
        let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
        command.args(["--driver", driver, "--localfs-dir"]);
        command.arg(&build.blob_dir);
        let _detach = Detach(point.clone());
        let log = point.with_extension("log");
        let mut first = Process::start(&mut manager.service(&command), &log).unwrap();
        wait_until(|| {
            manager.listen().unwrap();
            assert!(first.ended().unwrap().is_none(), "{}", first.log());
            manager.notices().iter().any(|notice| notice == "READY=1")
        });
        first.kill_group().unwrap();
        manager.listen().unwrap();
        assert!(manager.names().contains(&"mount-1.note"), "{driver}");
        let path = point.join("first");
        let reader = thread::spawn(move || fs::read(path));
        thread::sleep(Duration::from_millis(300));
        assert!(!reader.is_finished(), "{driver}: somebody answered");

        let log = point.with_extension("second.log");
        let mut second = Process::start(&mut manager.service(&command), &log).unwrap();
        wait_until(|| {
            manager.listen().unwrap();
            second.log().contains("is served again")
        });
        let bytes = reader.join().unwrap().unwrap();
        assert!(bytes == fs::read(source.join("first")).unwrap(), "{driver}");
        assert_same_tree(&source, &point);
        second.signal(Signal::SIGTERM).unwrap();
        wait_until(|| {
            manager.listen().unwrap();
            second.ended().unwrap().is_some()
        });
        assert!(second.wait().unwrap().success(), "{}", second.log());
        assert!(!is_mounted(&point), "{driver}");
        manager.listen().unwrap();
        assert!(manager.names().is_empty(), "{:?}", manager.names());
    }
}

/// A notify socket that was meant for the program that started us is left alone.
#[test]
fn the_service_manager_of_somebody_else_is_told_nothing() {
    let scene = Scene::new();
    let build = scene.create("image", &[], &scene.small_tree());
    let mut manager = ServiceManager::new(&scene.path("notify")).unwrap();
    let point = scene.new_point();
    let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
    command.env("NOTIFY_SOCKET", scene.path("notify"));
    command.env("SYSTEMD_EXEC_PID", "1");
    command.arg("--localfs-dir").arg(&build.blob_dir);
    let daemon = scene.start(&mut command, &point);
    signal(daemon.process_id(), Signal::SIGKILL);
    let log = || fs::read_to_string(point.with_extension("log")).unwrap();
    wait_until(|| log().contains("keeper is process"));
    let keeper = daemon.next_keeper().unwrap();
    unmount(&point).unwrap();
    wait_until(|| !is_running(keeper));
    manager.listen().unwrap();
    assert_eq!(manager.notices(), [] as [&str; 0]);
    assert!(manager.names().is_empty());
}

/// Killed while it mounts: the next worker mounts from scratch, or nothing is left.
#[test]
fn a_death_while_mounting_leaves_no_half_of_a_mount() {
    for driver in DRIVERS {
        let scene = Scene::new();
        let source = scene.small_tree();
        let build = scene.create("image", &[], &source);
        let expected = describe(&source, Detail::All).unwrap();
        for delay in 0..12 {
            let point = scene.new_point();
            let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
            command.args(["--driver", driver, "--localfs-dir"]);
            command.arg(&build.blob_dir);
            let log = point.with_extension("log");
            let mut process = Process::start(&mut command, &log).unwrap();
            wait_until(|| process.log().contains("worker is process "));
            thread::sleep(Duration::from_millis(delay * 5));
            let text = process.log();
            let pid = text.split("worker is process ").nth(1).unwrap();
            signal(
                pid.lines().next().unwrap().parse().unwrap(),
                Signal::SIGKILL,
            );
            // Either it had nothing yet and gives up, or it serves in the end.
            let began = Instant::now();
            let ended = loop {
                if let Some(status) = process.ended().unwrap() {
                    break Some(status);
                }
                let log = process.log();
                if is_mounted(&point) && (log.contains("served again") || again(&log)) {
                    break None;
                }
                assert!(began.elapsed() < Duration::from_secs(30), "{log}");
                thread::sleep(Duration::from_millis(2));
            };
            match ended {
                Some(status) => assert!(!status.success() && !is_mounted(&point)),
                None => {
                    let found = describe(&point, Detail::All).unwrap();
                    assert_eq!(difference(&expected, &found), None);
                    process.signal(Signal::SIGTERM).unwrap();
                    assert!(process.wait().unwrap().success(), "{}", process.log());
                    assert!(!is_mounted(&point));
                }
            }
        }
    }
}

/// Whether a worker has said that it serves, after another one died.
fn again(log: &str) -> bool {
    let last = log.rsplit("the worker has died").next().unwrap_or_default();
    log.contains("the worker has died") && last.contains("ready: ")
}
