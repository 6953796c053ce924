//! Images that Nydus v2.4 wrote read back as what they were made from: through a mount
//! of the daemon and through the kernel's EROFS. (`tests/oracle` reads the same images
//! with the library and with the published reader.)

use std::fs;
use std::path::Path;

use storage::BlobIndex;
use support::binaries::nydus_image;
use support::command::succeed;
use support::expand::{self, Blob};
use support::fixtures::directory;
use support::mount::KernelMount;
use support::tree::{Detail, describe, difference};

use crate::scene::{Build, Scene};

/// One test per folder, and the list of them.
macro_rules! folders {
    ($($test:ident = $name:literal),* $(,)?) => {
        const FOLDERS: &[&str] = &[$($name),*];
        $(#[test]
        fn $test() {
            reads_back($name);
        })*
    };
}

folders! {
    batch = "batch",
    batch_lz4 = "batch-lz4",
    chunk_4k = "chunk-4k",
    chunk_64k = "chunk-64k",
    inline = "inline",
    inline_toc = "inline-toc",
    inline_toc_batch = "inline-toc-batch",
    lz4 = "lz4",
    merged = "merged",
    none = "none",
    prefetch_blob = "prefetch-blob",
    prefetch_fs = "prefetch-fs",
    sha256 = "sha256",
    tar = "tar",
    targz_ref = "targz-ref",
    toc = "toc",
    zstd = "zstd",
}

#[test]
fn no_folder_is_forgotten() {
    let Some(directory) = directory().unwrap() else {
        return;
    };
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    let mut names: Vec<_> = folders
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, FOLDERS);
}

/// Checks an image, mounts it with the daemon and with the kernel, and compares both
/// with the tree that it was made from.
fn reads_back(name: &str) {
    let Some(directory) = directory().unwrap() else {
        return;
    };
    let scene = Scene::new();
    let build = stage(&scene, &directory, name);
    let mut check = nydus_image().unwrap();
    check.arg("check").arg(&build.bootstrap);
    succeed(check.arg("--blob-dir").arg(&build.blob_dir)).unwrap();

    let own = directory.join(name).join("tree.jsonl");
    let shared = directory.join("tree.jsonl");
    let text = fs::read_to_string(if own.exists() { own } else { shared }).unwrap();
    let expected: Vec<String> = text.lines().map(|line| comparable(name, line)).collect();
    let compare = |reader: &str, point: &Path| {
        let found = describe(point, Detail::All).unwrap();
        let found: Vec<String> = found.iter().map(|line| comparable(name, line)).collect();
        if let Some(difference) = difference(&expected, &found) {
            panic!("{name}: {reader} reads another tree:\n{difference}");
        }
    };
    let daemon = scene.mount(&build);
    compare("nydusd", daemon.point());
    daemon.stop().unwrap();

    let image = expand::open(&build.bootstrap).unwrap();
    let devices = (0..image.blobs().len()).map(|number| {
        let index = BlobIndex::new(number.try_into().unwrap());
        let device = scene.path(&format!("device-{number}"));
        let blob = Blob::open(&image, index, &build.blob_dir).unwrap();
        blob.expand(&device).unwrap();
        device
    });
    let devices: Vec<_> = devices.collect();
    let point = scene.new_point();
    let mount = KernelMount::erofs(&build.bootstrap, &devices, &point).unwrap();
    compare("the kernel", &point);
    drop(mount);
}

/// A line of a description without the times that the image does not have. From a
/// directory, Nydus v2.4 does not keep the time of the root, and the description of the
/// merged image was made with another idea of the times of directories.
fn comparable(name: &str, line: &str) -> String {
    let timeless = match name {
        "tar" => false,
        "merged" => line.contains("\"mode\": \"0o4"),
        _ => line.contains("\"path\": \"/\","),
    };
    if timeless {
        without_time(line)
    } else {
        line.to_owned()
    }
}

/// A copy, because the daemon keeps its cache beside the blobs, in which every blob
/// has its id for a name and the bootstrap is a file of its own.
fn stage(scene: &Scene, directory: &Path, name: &str) -> Build {
    let blob_dir = scene.dir(name);
    let mut blobs = Vec::new();
    for entry in fs::read_dir(directory.join(name)).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        let id = file.strip_suffix(".layer.tar.gz").unwrap_or(file);
        fs::write(blob_dir.join(id), fs::read(&path).unwrap()).unwrap();
        if id.len() == 64 {
            blobs.push(id.to_owned());
        }
    }
    let bootstrap = blob_dir.join("boot");
    if let ([id], false) = (&blobs[..], bootstrap.exists()) {
        // Embedded in the blob, it does not know the blob's id: a merge tells it.
        let layer = scene.dir("layer").join(id);
        let image = expand::open(&blob_dir.join(id)).unwrap();
        fs::write(&layer, image.bytes()).unwrap();
        let mut merge = nydus_image().unwrap();
        merge.arg("merge").arg("--bootstrap").arg(&bootstrap);
        succeed(merge.arg(layer)).unwrap();
    }
    Build {
        bootstrap,
        blob_dir,
        blobs,
    }
}

fn without_time(line: &str) -> String {
    let (before, rest) = line.split_once("\"mtime_ns\": ").unwrap();
    let (_, after) = rest.split_once(", ").unwrap();
    format!("{before}{after}")
}
