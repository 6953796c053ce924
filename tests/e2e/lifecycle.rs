//! A daemon says once that it is ready, and ends cleanly however it is told.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use nix::sys::signal::Signal;
use support::command::succeed;
use support::mount::{Nydusd, Overlay, unmount};

use crate::scene::{DRIVERS, Scene, assert_same_below};

fn daemon(scene: &Scene) -> Nydusd {
    let source = scene.small_tree();
    scene.mount(&scene.create("image", &[], &source))
}

#[test]
fn signals_unmount_and_end_it() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let scene = Scene::new();
        let mut daemon = daemon(&scene);
        daemon.process().signal(signal).unwrap();
        daemon.expect_clean_end().unwrap();
    }
}

#[test]
fn unmounting_from_outside_ends_it() {
    let scene = Scene::new();
    let daemon = daemon(&scene);
    unmount(daemon.point()).unwrap();
    daemon.expect_clean_end().unwrap();
}

/// With both drivers: a stop takes nothing away from anybody, and says who it is.
#[test]
fn a_mount_in_use_goes_on_being_served() {
    for driver in DRIVERS {
        let scene = Scene::new();
        let source = scene.small_tree();
        let build = scene.create("image", &[], &source);
        let mut daemon = scene.mount_with(driver, &build);
        let mut open = File::open(daemon.point().join("first")).unwrap();
        daemon.process().signal(Signal::SIGTERM).unwrap();
        let me = format!("process {} (", std::process::id());
        daemon
            .process()
            .wait_until(|process| process.log().contains("in use") && process.log().contains(&me))
            .unwrap();
        let mut bytes = Vec::new();
        open.read_to_end(&mut bytes).unwrap();
        assert!(bytes == fs::read(source.join("first")).unwrap(), "{driver}");
        assert!(fs::read(daemon.point().join("second")).is_ok(), "{driver}");
        drop(open);
        daemon.stop().unwrap();
    }
}

/// The kernel would unmount what lies below an overlay without a word.
#[test]
fn an_overlay_on_top_keeps_a_mount() {
    for driver in DRIVERS {
        let scene = Scene::new();
        let source = scene.small_tree();
        let build = scene.create("image", &[], &source);
        let mut daemon = scene.mount_with(driver, &build);
        let overlay = Overlay::mount(daemon.point(), &scene.dir("overlay")).unwrap();
        daemon.process().signal(Signal::SIGTERM).unwrap();
        let wanted = format!("overlay on {}", overlay.point().display());
        daemon
            .process()
            .wait_until(|process| process.log().contains(&wanted))
            .unwrap();
        assert_same_below(&source, overlay.point());
        drop(overlay);
        daemon.stop().unwrap();
    }
}

#[test]
fn it_says_once_that_it_is_ready() {
    let scene = Scene::new();
    let mut daemon = daemon(&scene);
    let log = daemon.process().log();
    let ready = log
        .lines()
        .filter(|line| line.to_lowercase().contains("ready"))
        .count();
    assert_eq!(ready, 1, "{log}");
    daemon.stop().unwrap();
}

#[test]
fn the_mount_looks_as_clients_expect() {
    let scene = Scene::new();
    let daemon = daemon(&scene);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let point = daemon.point().to_str().unwrap();
    let line = mounts.lines().find(|line| line.contains(point)).unwrap();
    let fields: Vec<&str> = line.split(' ').collect();
    assert_eq!((fields[0], fields[2]), ("rafs", "fuse"), "{line}");
    let options: Vec<&str> = fields[3].split(',').collect();
    for option in [
        "ro",
        "nosuid",
        "nodev",
        "noatime",
        "default_permissions",
        "allow_other",
    ] {
        assert!(options.contains(&option), "no {option} in {line}");
    }
    daemon.stop().unwrap();
}

#[test]
fn nothing_can_be_changed() {
    let scene = Scene::new();
    let daemon = daemon(&scene);
    let error = fs::write(daemon.point().join("new"), "x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EROFS));
    daemon.stop().unwrap();
}

#[test]
fn many_readers_at_once_agree() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let daemon = scene.mount(&scene.create("image", &[], &source));
    let expected = fs::read(source.join("first")).unwrap();
    let path = daemon.point().join("first");
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| assert!(fs::read(&path).unwrap() == expected, "bytes differ"));
        }
    });
    succeed(
        Command::new("cmp")
            .arg(source.join("second"))
            .arg(daemon.point().join("second")),
    )
    .unwrap();
    daemon.stop().unwrap();
}

#[test]
fn other_users_may_read() {
    let scene = Scene::new();
    let daemon = daemon(&scene);
    // The way there is private to root, as temporary directories are.
    fs::set_permissions(scene.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"]);
    let finished = succeed(command.arg(daemon.point().join("etc/name"))).unwrap();
    assert_eq!(finished.stdout, "small\n");
    daemon.stop().unwrap();
}
