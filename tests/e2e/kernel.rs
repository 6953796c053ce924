//! The kernel's own EROFS is the second opinion on every bootstrap we write.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;

use support::command::succeed;
use support::mount::KernelMount;
use support::tree::nasty::Options;

use crate::scene::{Build, Scene, assert_same_tree};

#[test]
fn the_kernel_reads_what_we_write() {
    let scene = Scene::new();
    let source = scene.nasty_tree(Options::default());
    let build = scene.create("image", &["--compressor", "none"], &source);

    let devices = resident_blobs(&scene, &build);
    for (program, option) in [("dump.erofs", "-s"), ("fsck.erofs", "-d1")] {
        let mut command = Command::new(program);
        command.arg(option);
        command.args(
            devices
                .iter()
                .map(|device| format!("--device={}", device.display())),
        );
        succeed(command.arg(&build.bootstrap)).unwrap();
    }

    let point = scene.new_point();
    let mount = KernelMount::erofs(&build.bootstrap, &devices, &point).unwrap();
    assert_same_tree(&source, &point);
    drop(mount);
}

/// The blobs as the kernel wants them: every chunk at its uncompressed offset.
/// That is what a cache directory holds once everything has been read.
fn resident_blobs(scene: &Scene, build: &Build) -> Vec<PathBuf> {
    let point = scene.new_point();
    let mut command = scene.mount_command(build.bootstrap.to_str().unwrap(), &point);
    let daemon = scene.start(command.arg("--localfs-dir").arg(&build.blob_dir), &point);
    read_everything(daemon.point());
    daemon.stop().unwrap();
    let file = |id: &String| scene.path("cache").join(format!("{id}.blob.data"));
    let files: Vec<PathBuf> = build.blobs.iter().map(file).collect();
    for file in &files {
        // The last block of a device is a whole one.
        let open = OpenOptions::new().write(true).open(file).unwrap();
        open.set_len(open.metadata().unwrap().len().next_multiple_of(4096))
            .unwrap();
    }
    files
}

/// Reads every regular file below `directory`.
fn read_everything(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            read_everything(&entry.path());
        } else if kind.is_file() {
            let mut file = fs::File::open(entry.path()).unwrap();
            std::io::copy(&mut file, &mut std::io::sink()).unwrap();
        }
    }
}
