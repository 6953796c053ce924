//! Control groups: what is done to the worker's is not done to the keeper.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::binaries::nydusd;
use support::mount::Nydusd;

use crate::scene::{Build, Scene, assert_same_tree};

const PATIENCE: Duration = Duration::from_secs(60);

/// A group of version 2 for one test, below the root of the hierarchy.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Self {
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut mounts = table.lines().map(|line| line.split(' '));
        let root = mounts.find_map(|mut fields| {
            let point = fields.nth(1)?;
            (fields.next()? == "cgroup2").then(|| PathBuf::from(point))
        });
        let root = root.expect("version 2 of control groups is mounted nowhere");
        let path = root.join(format!("nydus-test-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// As systemd marks a unit with `Delegate=yes`.
    fn hand_over(self) -> Self {
        xattr::set(&self.0, "trusted.delegate", b"1").unwrap();
        self
    }

    fn below(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A daemon that is started in the group.
    fn mount(&self, scene: &Scene, build: &Build) -> Nydusd {
        let program = nydusd().unwrap();
        let point = scene.new_point();
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]);
        command.arg(self.below("cgroup.procs"));
        command.arg(program.get_program()).args(program.get_args());
        command.arg("--bootstrap").arg(&build.bootstrap);
        command.arg("--localfs-dir").arg(&build.blob_dir);
        command.arg("--mountpoint").arg(&point);
        scene.start(&mut command, &point)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Nothing can be reported from a destructor.
        let _ = fs::write(self.below("cgroup.kill"), "1");
        let began = Instant::now();
        while fs::remove_dir(&self.0).is_err() && began.elapsed() < Duration::from_secs(10) {
            for name in ["keeper", "worker"] {
                let _ = fs::remove_dir(self.below(name));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn members(group: &Path) -> Vec<u32> {
    let list = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    list.lines().map(|line| line.parse().unwrap()).collect()
}

/// Waits until a group has exactly these members.
#[track_caller]
fn wait_for_members(group: &Path, expected: impl Fn() -> Option<u32>) {
    let began = Instant::now();
    loop {
        let (now, wanted) = (members(group), expected());
        if wanted.is_some_and(|process| now == [process]) {
            return;
        }
        assert!(
            began.elapsed() < PATIENCE,
            "{}: {now:?} instead of {wanted:?}",
            group.display()
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_keeper_survives_what_is_done_to_the_workers_group() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let group = Group::new("split").hand_over();
    let (keepers, workers) = (group.below("keeper"), group.below("worker"));
    // By somebody who sets limits, for instance.
    fs::create_dir(&workers).unwrap();
    let mut daemon = group.mount(&scene, &build);
    let keeper = daemon.process_id();
    wait_for_members(&keepers, || Some(keeper));
    wait_for_members(&workers, || daemon.worker().ok());

    for round in 1..=3 {
        let before = daemon.worker().unwrap();
        // Frozen first: nothing of it can do anything before it is killed.
        fs::write(workers.join("cgroup.freeze"), "1").unwrap();
        fs::write(workers.join("cgroup.kill"), "1").unwrap();
        daemon
            .process()
            .wait_until(|process| process.log().matches("worker is process").count() > round)
            .unwrap();
        assert_ne!(daemon.worker().unwrap(), before);
        fs::write(workers.join("cgroup.freeze"), "0").unwrap();
        wait_for_members(&workers, || daemon.worker().ok());
        assert_eq!(members(&keepers), [keeper]);
        assert_same_tree(&source, daemon.point());
    }

    // The next keeper is started by a worker, and goes where it belongs.
    kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGKILL).unwrap();
    wait_for_members(&keepers, || daemon.next_keeper().ok());
    assert_same_tree(&source, daemon.point());
    let next = daemon.next_keeper().unwrap();
    kill(Pid::from_raw(next.cast_signed()), Signal::SIGTERM).unwrap();
    let began = Instant::now();
    while keepers.exists() {
        assert!(began.elapsed() < PATIENCE, "a group is left behind");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(workers.exists(), "a group of somebody else was removed");
}

#[test]
fn a_group_of_somebody_else_is_left_alone() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let group = Group::new("foreign");
    let daemon = group.mount(&scene, &build);
    let mut both = [daemon.process_id(), daemon.worker().unwrap()];
    let mut now = members(&group.0);
    both.sort_unstable();
    now.sort_unstable();
    assert_eq!(now, both);
    assert!(!group.below("keeper").exists() && !group.below("worker").exists());
    daemon.stop().unwrap();
}
