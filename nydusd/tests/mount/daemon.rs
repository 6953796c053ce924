//! A running `nydusd` and its mount point.

use std::fs;
use std::io::{Read as _, Seek as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Long enough for a loaded machine, short enough to notice a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The program with these arguments.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydusd"));
    command
        .args(args)
        .env_remove("RUST_BACKTRACE")
        .env_remove("IMAGE_PULL_AUTH");
    // Nobody's real credentials.
    command.env("DOCKER_CONFIG", "/nonexistent");
    command
}

/// Runs the program until it ends by itself; exit code and standard error. One
/// that mounts, against expectation, is killed.
pub(crate) fn run(args: &[&str]) -> (Option<i32>, String) {
    let mut stderr = tempfile::tempfile().unwrap();
    let mut child = command(args)
        .stdin(Stdio::null())
        .stderr(stderr.try_clone().unwrap())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            let mounted = args.iter().map(Path::new).find(|path| is_mounted(path));
            mounted.map(|path| umount2(path, MntFlags::MNT_DETACH));
            panic!("{args:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut text = String::new();
    stderr.rewind().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    (status.code(), text)
}

/// A daemon that serves a mount. Dropping it kills it and detaches the mount.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) mountpoint: PathBuf,
    log: PathBuf,
    dir: tempfile::TempDir,
}

impl Daemon {
    /// Starts the program and waits until it says that it is ready. `MNT` among
    /// the arguments stands for a fresh mount point.
    pub(crate) fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mountpoint = dir.path().join("mnt");
        fs::create_dir(&mountpoint).unwrap();
        let log = dir.path().join("log");
        let place = mountpoint.to_str().unwrap().to_owned();
        let args: Vec<&str> = args
            .iter()
            .map(|arg| if *arg == "MNT" { place.as_str() } else { arg })
            .collect();
        let child = command(&args)
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut daemon = Self {
            child,
            mountpoint,
            log,
            dir,
        };
        let start = Instant::now();
        while !daemon.log().contains("ready: ") {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("nydusd ended with {status}:\n{}", daemon.log());
            }
            assert!(
                start.elapsed() < PATIENCE,
                "nydusd is not ready:\n{}",
                daemon.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }

    /// A scratch directory that lives as long as the daemon.
    pub(crate) fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// Everything logged so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, signal).unwrap();
    }

    /// Waits for the end of the program.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "nydusd does not end:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to end, and checks that it did so cleanly.
    pub(crate) fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert_eq!(
            (status.code(), status.signal()),
            (Some(0), None),
            "{}",
            self.log()
        );
        assert!(
            !is_mounted(&self.mountpoint),
            "still mounted:\n{}",
            self.log()
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        while is_mounted(&self.mountpoint)
            && umount2(&self.mountpoint, MntFlags::MNT_DETACH).is_ok()
        {}
    }
}

/// Whether a FUSE file system is mounted exactly there.
pub(crate) fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut lines = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    lines.any(|fields| Some(fields[1]) == path.to_str() && fields[2] == "fuse")
}
