//! What a test stands on: a directory of its own, and the steps that most tests
//! begin with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::binaries::{nydus_image, nydusd};
use support::command::{Finished, run, succeed};
use support::mount::Nydusd;
use support::tree::nasty::{self, Options};
use support::tree::{Detail, describe, difference};
use tempfile::TempDir;

/// What can serve a mount.
pub(crate) const DRIVERS: [&str; 2] = ["erofs", "fuse"];

/// A directory that goes away with the test.
pub(crate) struct Scene {
    directory: TempDir,
}

/// Bootstrap and blobs of one image.
pub(crate) struct Build {
    pub bootstrap: PathBuf,
    pub blob_dir: PathBuf,
    /// Blob ids in the order of the blob table.
    pub blobs: Vec<String>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    /// A path that need not exist.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A directory, made on first use.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A tree with one of everything.
    pub(crate) fn nasty_tree(&self, options: Options) -> PathBuf {
        let root = self.dir("source");
        nasty::make(&root, options).unwrap();
        root
    }

    /// A small tree with a few files whose bytes do not compress.
    pub(crate) fn small_tree(&self) -> PathBuf {
        let root = self.dir("source");
        for (index, name) in ["first", "second", "third"].into_iter().enumerate() {
            fs::write(root.join(name), nasty::noise(300_000, index + 10)).unwrap();
        }
        fs::create_dir(root.join("etc")).unwrap();
        fs::write(root.join("etc/name"), "small\n").unwrap();
        root
    }

    /// Runs `nydus-image create` with `arguments`, `name` being where output goes.
    pub(crate) fn create(&self, name: &str, arguments: &[&str], source: &Path) -> Build {
        let mut command = self.create_command(name);
        succeed(command.args(arguments).arg(source)).unwrap();
        self.build(name)
    }

    /// The command of [`Scene::create`] without arguments and source.
    pub(crate) fn create_command(&self, name: &str) -> Command {
        let mut command = nydus_image().unwrap();
        command
            .arg("create")
            .arg("--blob-dir")
            .arg(self.dir(&format!("{name}.blobs")));
        command
            .arg("--bootstrap")
            .arg(self.path(&format!("{name}.boot")));
        command
            .arg("--output-json")
            .arg(self.path(&format!("{name}.json")));
        command
    }

    /// What [`Scene::create_command`] has made.
    pub(crate) fn build(&self, name: &str) -> Build {
        let report = fs::read(self.path(&format!("{name}.json"))).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        let blobs = report["blobs"].as_array().unwrap().iter();
        Build {
            bootstrap: self.path(&format!("{name}.boot")),
            blob_dir: self.path(&format!("{name}.blobs")),
            blobs: blobs.map(|id| id.as_str().unwrap().to_owned()).collect(),
        }
    }

    /// Mounts a build the way older clients do, blobs and cache in one directory.
    pub(crate) fn mount(&self, build: &Build) -> Nydusd {
        let mut command = nydusd().unwrap();
        command.arg("--bootstrap").arg(&build.bootstrap);
        command.arg("--localfs-dir").arg(&build.blob_dir);
        let point = self.new_point();
        self.start(command.arg("--mountpoint").arg(&point), &point)
    }

    /// Mounts a build by the driver with this name, with this scene's cache.
    pub(crate) fn mount_with(&self, driver: &str, build: &Build) -> Nydusd {
        let point = self.new_point();
        let mut command = self.mount_command(build.bootstrap.to_str().unwrap(), &point);
        command.args(["--driver", driver, "--localfs-dir"]);
        self.start(command.arg(&build.blob_dir), &point)
    }

    /// The command that mounts `image` with this scene's cache on `point`.
    pub(crate) fn mount_command(&self, image: &str, point: &Path) -> Command {
        let mut command = nydusd().unwrap();
        command
            .args(["mount", image])
            .arg(point)
            .arg("--cache-dir")
            .arg(self.path("cache"));
        command
    }

    /// Mounts an image by reference.
    pub(crate) fn mount_image(&self, image: &str) -> Nydusd {
        let point = self.new_point();
        self.start(&mut self.mount_command(image, &point), &point)
    }

    /// Starts a daemon whose command names `point`.
    pub(crate) fn start(&self, command: &mut Command, point: &Path) -> Nydusd {
        Nydusd::start(command, point, &point.with_extension("log")).unwrap()
    }

    /// An empty directory to mount on.
    pub(crate) fn new_point(&self) -> PathBuf {
        tempfile::Builder::new()
            .prefix("mount-")
            .rand_bytes(6)
            .tempdir_in(self.directory.path())
            .unwrap()
            .keep()
    }
}

/// Fails with what differs between two trees.
#[track_caller]
pub(crate) fn assert_same_tree(source: &Path, mount: &Path) {
    let expected = describe(source, Detail::All).unwrap();
    let actual = describe(mount, Detail::All).unwrap();
    if let Some(difference) = difference(&expected, &actual) {
        panic!("trees differ:\n{difference}");
    }
}

/// The same for everything below the roots: an overlay has a root of its own.
#[track_caller]
pub(crate) fn assert_same_below(source: &Path, mount: &Path) {
    let below = |dir| {
        let mut lines = describe(dir, Detail::All).unwrap();
        lines.retain(|line| !line.contains("\"path\": \"/\""));
        lines
    };
    if let Some(difference) = difference(&below(source), &below(mount)) {
        panic!("trees differ:\n{difference}");
    }
}

/// Runs a command that must fail with exit code 1 and one clear message that has
/// all `words` in it.
#[track_caller]
pub(crate) fn assert_fails(case: &str, command: &mut Command, words: &[&str]) -> Finished {
    let finished = run(command).unwrap();
    let stderr = &finished.stderr;
    assert_eq!(
        finished.code(),
        1,
        "{case}: exit code; standard error:\n{stderr}"
    );
    for word in words {
        let found = stderr.to_lowercase().contains(&word.to_lowercase());
        assert!(found, "{case}: no `{word}` in standard error:\n{stderr}");
    }
    for sign in [
        "panicked",
        "backtrace",
        "RUST_BACKTRACE",
        "Os {",
        "Custom {",
    ] {
        assert!(
            !stderr.contains(sign),
            "{case}: `{sign}` in standard error:\n{stderr}"
        );
    }
    let messages = stderr
        .lines()
        .filter(|line| line.starts_with("Error: "))
        .count();
    assert_eq!(
        messages, 1,
        "{case}: want one line `Error: …` in standard error:\n{stderr}"
    );
    assert!(
        finished.stdout.is_empty(),
        "{case}: standard output:\n{}",
        finished.stdout
    );
    finished
}

/// Fails if anything is in `directory`.
#[track_caller]
pub(crate) fn assert_empty(case: &str, directory: &Path) {
    let left: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "{case}: left behind: {left:?}");
}
