//! Images that the kernel's own EROFS serves, from cache files that are filled as it
//! reads them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use support::command::run;
use support::expand::{self, Blob};
use support::mount::{KernelMount, Nydusd, Overlay, Tmpfs, is_mounted};
use support::process::Process;
use support::proxy::Fault;
use support::tree::nasty::Options;
use support::tree::{Detail, describe, difference};

use crate::bad_mount::Stage;
use crate::scene::{Build, Scene, assert_same_below, assert_same_tree};

/// Type of the file system at `point`, as the mount table has it.
fn kind(point: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let point = point.to_str().unwrap();
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(1) == Some(point));
    line.unwrap().split(' ').nth(2).unwrap().to_owned()
}

/// The kernel's own mount of the whole data, without us.
fn plain_mount(scene: &Scene, build: &Build) -> (PathBuf, KernelMount) {
    let image = expand::open(&build.bootstrap).unwrap();
    let number = |index: usize| u32::try_from(index).unwrap();
    let devices: Vec<PathBuf> = (0..build.blobs.len())
        .map(|index| {
            let index = storage::BlobIndex::new(number(index));
            let blob = Blob::open(&image, index, &build.blob_dir).unwrap();
            let device = scene.path(&format!("device-{index}"));
            blob.expand(&device).unwrap();
            device
        })
        .collect();
    let point = scene.new_point();
    let mount = KernelMount::erofs(&build.bootstrap, &devices, &point).unwrap();
    (point, mount)
}

/// Three ways to the same tree: FUSE, the kernel on demand, the kernel alone.
#[test]
fn three_mounts_describe_one_tree() {
    let scene = Scene::new();
    let source = scene.nasty_tree(Options {
        without_sockets: false,
        without_huge: true,
    });
    for (name, options) in [
        ("plain", ["--compressor", "none"].as_slice()),
        (
            "batch",
            &[
                "--compressor",
                "zstd",
                "--chunk-size",
                "0x10000",
                "--batch-size",
                "0x8000",
            ],
        ),
    ] {
        let build = scene.create(name, options, &source);
        // Each starts with an empty cache.
        let _ = fs::remove_dir_all(scene.path("cache"));
        let erofs = scene.mount_with("erofs", &build);
        assert_eq!(kind(erofs.point()), "erofs");
        let by_kernel = describe(erofs.point(), Detail::All).unwrap();
        // Both serve the same cache at the same time.
        let fuse = scene.mount_with("fuse", &build);
        assert_eq!(kind(fuse.point()), "fuse");
        let by_fuse = describe(fuse.point(), Detail::All).unwrap();
        let (point, plain) = plain_mount(&scene, &build);
        let alone = describe(&point, Detail::All).unwrap();
        for (other, name) in [(&by_fuse, "FUSE"), (&alone, "the kernel alone")] {
            if let Some(difference) = difference(other, &by_kernel) {
                panic!("{name} shows another tree:\n{difference}");
            }
        }
        drop(plain);
        assert_same_tree(&source, erofs.point());
        fuse.stop().unwrap();
        erofs.stop().unwrap();
    }
}

#[test]
fn auto_takes_the_kernel_where_it_can_and_says_why_not() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let mut daemon = scene.mount_with("auto", &build);
    assert_eq!(kind(daemon.point()), "erofs");
    assert!(daemon.process().log().contains("driver erofs: "));
    daemon.stop().unwrap();

    fs::remove_dir_all(scene.path("cache")).unwrap();
    let memory = Tmpfs::mount(&scene.dir("cache"), 64 << 20).unwrap();
    let mut daemon = scene.mount_with("auto", &build);
    assert_eq!(kind(daemon.point()), "fuse");
    let log = daemon.process().log();
    assert!(
        log.contains("driver fuse: erofs does not work here"),
        "{log}"
    );
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
    let point = scene.new_point();
    let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
    command.args(["--driver", "erofs", "--localfs-dir"]);
    let refused = run(command.arg(&build.blob_dir)).unwrap();
    assert_eq!(refused.code(), 1);
    assert!(
        refused.stderr.contains("EROFS refused"),
        "{}",
        refused.stderr
    );
    assert!(!is_mounted(&point));
    drop(memory);
}

/// A configuration file can choose, and the command line has the last word.
#[test]
fn a_configuration_can_choose_the_driver() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let config = scene.path("config.toml");
    fs::write(
        &config,
        format!(
            "version = 2\n[backend]\ntype = 'localfs'\nlocalfs.dir = '{}'\n\
             [cache]\ntype = 'filecache'\nfilecache.work_dir = '{}'\n[rafs]\ndriver = 'erofs'\n",
            build.blob_dir.display(),
            scene.path("cache").display()
        ),
    )
    .unwrap();
    for (arguments, wanted) in [([].as_slice(), "erofs"), (&["--driver", "fuse"], "fuse")] {
        let point = scene.new_point();
        let mut command = support::binaries::nydusd().unwrap();
        command.arg("--config").arg(&config).arg("--bootstrap");
        command
            .arg(&build.bootstrap)
            .arg("--mountpoint")
            .arg(&point);
        let daemon = scene.start(command.args(arguments), &point);
        assert_eq!(kind(&point), wanted);
        assert_same_tree(&source, &point);
        daemon.stop().unwrap();
    }
}

#[test]
fn a_container_root_over_it_reads_and_writes() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let daemon = scene.mount_with("erofs", &scene.create("image", &[], &source));
    let overlay = Overlay::mount(daemon.point(), &scene.dir("overlay")).unwrap();
    assert_same_below(&source, overlay.point());
    // Copied up from what is fetched just then.
    let second = overlay.point().join("second");
    let file = File::options().write(true).open(&second).unwrap();
    file.write_all_at(b"changed", 0).unwrap();
    drop(file);
    let mut expected = fs::read(source.join("second")).unwrap();
    expected[..7].copy_from_slice(b"changed");
    assert!(fs::read(second).unwrap() == expected, "wrong bytes");
    drop(overlay);
    daemon.stop().unwrap();
}

fn read_error(path: &Path) -> Option<i32> {
    let error = fs::read(path).err();
    error.map(|error: io::Error| error.raw_os_error().unwrap_or_default())
}

/// What cannot be had is an error, never zeros, and is had when it can be.
#[test]
fn a_failing_registry_is_an_error_and_then_it_is_not() {
    let stage = Stage::new();
    for fault in [
        Fault::Status(404, Vec::new()),
        Fault::Status(500, Vec::new()),
        Fault::Shorten(1000),
        Fault::Garble,
    ] {
        let _ = fs::remove_dir_all(stage.scene.path("cache"));
        let point = stage.scene.new_point();
        let mut command = stage.scene.mount_command(&stage.image(), &point);
        let daemon = stage
            .scene
            .start(command.args(["--driver", "erofs"]), &point);
        stage.assert_reads(&daemon, "etc/name");
        stage.proxy.fail("/blobs/", fault.clone());
        let error = read_error(&daemon.point().join("second"));
        assert_eq!(error, Some(libc::EIO), "{fault:?}");
        stage.assert_reads(&daemon, "etc/name");
        stage.proxy.heal();
        stage.assert_reads(&daemon, "second");
        stage.assert_reads(&daemon, "third");
        daemon.stop().unwrap();
    }
}

/// While one read waits for a slow registry, others that need nothing go on.
#[test]
fn nobody_waits_for_the_fetch_of_another() {
    let stage = Stage::new();
    let point = stage.scene.new_point();
    let mut command = stage.scene.mount_command(&stage.image(), &point);
    let daemon = stage
        .scene
        .start(command.args(["--driver", "erofs"]), &point);
    stage.assert_reads(&daemon, "etc/name");
    stage
        .proxy
        .fail("/blobs/", Fault::Stall(Duration::from_secs(4)));
    let waiting = point.join("second");
    let log = stage.scene.path("reader.log");
    let mut reader = Process::start(Command::new("cat").arg(&waiting), &log).unwrap();
    thread::sleep(Duration::from_millis(300));
    // Asked for again, although it is there.
    let name = File::open(point.join("etc/name")).unwrap();
    posix_fadvise(&name, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    stage.assert_reads(&daemon, "etc/name");
    drop(name);
    assert!(
        reader.ended().unwrap().is_none(),
        "it read what nobody sent"
    );
    // A reader that is killed while it waits dies, and leaves nothing behind.
    reader.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
    reader.wait().unwrap();
    stage.proxy.heal();
    stage.assert_reads(&daemon, "second");
    let pid = daemon.worker().unwrap();
    wait_until(|| events_open(pid) == 0);
    daemon.stop().unwrap();
}

/// Descriptors of cache files that came with events and are still open.
fn events_open(pid: u32) -> usize {
    let files = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let read_only = |text: &str| text.lines().any(|line| line == "flags:\t02100000");
    files
        .flatten()
        .filter(|file| fs::read_to_string(file.path()).is_ok_and(|text| read_only(&text)))
        .filter(|file| {
            let link = Path::new("/proc").join(pid.to_string()).join("fd");
            fs::read_link(link.join(file.file_name()))
                .is_ok_and(|path| path.to_string_lossy().ends_with(".blob.data"))
        })
        .count()
}

#[track_caller]
fn wait_until(mut ready: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if ready() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("it does not happen");
}

/// Once everything is there, nobody is asked any more.
#[test]
fn a_complete_blob_loses_its_mark() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let daemon = scene.mount_with("erofs", &build);
    let pid = daemon.worker().unwrap();
    assert_eq!(marks(pid), 1);
    assert_same_tree(&source, daemon.point());
    wait_until(|| marks(pid) == 0);
    daemon.stop().unwrap();
    // The next mount finds it complete, and asks for no word at all.
    let daemon = scene.mount_with("erofs", &build);
    assert_eq!(marks(daemon.worker().unwrap()), 0);
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
}

/// Files that a process has marked with fanotify; copies of a group count once.
fn marks(pid: u32) -> usize {
    let files = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let texts = files
        .flatten()
        .filter_map(|file| fs::read_to_string(file.path()).ok());
    let marks: BTreeSet<String> = texts
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .filter(|line| line.starts_with("fanotify ino:"))
        .collect();
    marks.len()
}

/// A mount whose server died with everything that kept it reads zeros: the next start
/// takes it down before anything else, and says so.
#[test]
fn a_poisoned_mount_is_taken_down_loudly() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let build = scene.create("image", &[], &source);
    let mut daemon = scene.mount_with("erofs", &build);
    let point = daemon.point().to_owned();
    kill_all(&mut daemon);
    assert!(is_mounted(&point), "the kernel keeps it");
    let mut next = scene.mount_with("erofs", &build);
    assert!(!is_mounted(&point), "it is still there");
    let log = next.process().log();
    assert!(
        log.contains("ZEROS") && log.contains(point.to_str().unwrap()),
        "{log}"
    );
    assert_same_tree(&source, next.point());
    next.stop().unwrap();
}

fn kill_all(daemon: &mut Nydusd) {
    daemon.process().kill_group().unwrap();
}
