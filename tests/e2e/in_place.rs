//! `create --type targz-ref`: a layer stays what it is, and mounts.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use support::binaries::nydus_image;
use support::command::succeed;
use support::image::layer::{write_tree, write_tree_without_holes};
use support::tree::nasty::{self, Options};

use crate::scene::{Build, Scene, assert_empty, assert_fails, assert_same_tree};

/// What a tar can carry, without the file that takes long to compress.
const TREE: Options = Options {
    without_sockets: true,
    without_huge: true,
};

/// The SHA-256 of a file, by another program.
fn sha256(file: &Path) -> String {
    let sum = succeed(Command::new("sha256sum").arg(file)).unwrap().stdout;
    sum.split_whitespace().next().unwrap().to_owned()
}

/// Compresses `tar` with gzip, in `members` pieces.
fn gzip(tar: &Path, level: &str, members: usize) -> PathBuf {
    let bytes = fs::read(tar).unwrap();
    let target = tar.with_extension("tar.gz");
    let mut out = File::create(&target).unwrap();
    // Not on block boundaries of the tar.
    for (index, piece) in bytes.chunks(bytes.len() / members + 1).enumerate() {
        let part = tar.with_extension(format!("part{index}"));
        fs::write(&part, piece).unwrap();
        succeed(Command::new("gzip").arg(level).arg("-f").arg(&part)).unwrap();
        let packed = tar.with_extension(format!("part{index}.gz"));
        out.write_all(&fs::read(packed).unwrap()).unwrap();
    }
    target
}

/// Builds an index of `layer` and puts the layer beside it.
fn index(scene: &Scene, name: &str, arguments: &[&str], layer: &Path) -> Build {
    let arguments = [&["--type", "targz-ref"], arguments].concat();
    let build = scene.create(name, &arguments, layer);
    assert_eq!(build.blobs, [sha256(layer)]);
    fs::copy(layer, build.blob_dir.join(&build.blobs[0])).unwrap();
    build
}

fn check(build: &Build) {
    let mut check = nydus_image().unwrap();
    check.arg("check").arg(&build.bootstrap);
    succeed(check.arg("--blob-dir").arg(&build.blob_dir)).unwrap();
}

#[test]
fn every_kind_of_layer_mounts() {
    let scene = Scene::new();
    let source = scene.nasty_tree(TREE);
    let tar = scene.path("layer.tar");
    write_tree_without_holes(&source, &tar).unwrap();
    for (name, level, members, arguments) in [
        ("best", "-9", 1, &["--features", "blob-toc"][..]),
        ("fast", "-1", 1, &[]),
        ("members", "-6", 40, &["--chunk-size", "0x1000"]),
        ("tar", "", 0, &["--features", "blob-toc"]),
    ] {
        let layer = match members {
            0 => tar.clone(),
            _ => gzip(&tar, level, members),
        };
        let build = index(&scene, name, arguments, &layer);
        check(&build);
        let daemon = scene.mount(&build);
        assert_same_tree(&source, daemon.point());
        daemon.stop().unwrap();
    }
}

#[test]
fn a_pipe_gives_the_same_bytes() {
    let scene = Scene::new();
    let tar = scene.path("layer.tar");
    write_tree(&scene.small_tree(), &tar).unwrap();
    let layer = gzip(&tar, "-6", 2);
    let file = index(&scene, "file", &[], &layer);
    let fifo = scene.path("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let writer = {
        let (layer, fifo) = (layer.clone(), fifo.clone());
        thread::spawn(move || fs::copy(layer, fifo).unwrap())
    };
    let pipe = scene.create("pipe", &["--type", "targz-ref"], &fifo);
    writer.join().unwrap();
    let equal = fs::read(&file.bootstrap).unwrap() == fs::read(&pipe.bootstrap).unwrap();
    assert!(equal, "bootstraps differ");
}

/// The command line that containerd's converter uses, then its merge.
#[test]
fn an_inlined_index_is_merged() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let tar = scene.path("layer.tar");
    write_tree(&source, &tar).unwrap();
    let layer = gzip(&tar, "-6", 1);
    let blobs = scene.dir("blobs");
    let packed = scene.path("packed");
    let mut create = nydus_image().unwrap();
    create.args(["create", "--log-level", "warn", "--type", "targz-ref"]);
    create.args(["--blob-inline-meta", "--features", "blob-toc", "--blob"]);
    succeed(create.arg(&packed).arg(&layer)).unwrap();
    let digest = sha256(&packed);
    fs::rename(&packed, blobs.join(&digest)).unwrap();
    let original = sha256(&layer);
    fs::copy(&layer, blobs.join(&original)).unwrap();

    // The embedded bootstrap is what a build with its own file gives.
    let boot = scene.path(&original);
    let bare = scene.create(
        "bare",
        &["--type", "targz-ref", "--features", "blob-toc"],
        &layer,
    );
    fs::copy(bare.bootstrap, &boot).unwrap();
    let merged = scene.path("merged");
    let size = fs::metadata(blobs.join(&digest)).unwrap().len().to_string();
    let mut merge = nydus_image().unwrap();
    merge
        .arg("merge")
        .arg("--bootstrap")
        .arg(&merged)
        .arg(&boot);
    merge.args(["--blob-digests", &digest, "--blob-sizes", &size]);
    // Those of the separate build hold for another table of contents.
    merge.args([
        "--blob-toc-digests",
        &"0".repeat(64),
        "--blob-toc-sizes",
        "0",
    ]);
    succeed(&mut merge).unwrap();
    let build = Build {
        bootstrap: merged,
        blob_dir: blobs,
        blobs: vec![original],
    };
    check(&build);
    let daemon = scene.mount(&build);
    assert_same_tree(&source, daemon.point());
    daemon.stop().unwrap();
}

/// `--blob-cache-dir` writes what a daemon has in its cache once everything was read.
#[test]
fn cache_files_are_those_of_a_daemon() {
    let scene = Scene::new();
    let source = scene.nasty_tree(TREE);
    let tar = scene.path("layer.tar");
    write_tree_without_holes(&source, &tar).unwrap();
    let layer = gzip(&tar, "-6", 1);
    for (name, kind, input, more) in [
        ("zran", "targz-ref", &layer, &[][..]),
        ("tar", "targz-ref", &tar, &["--features", "blob-toc"]),
        ("native", "tar-rafs", &tar, &["--chunk-size", "0x10000"]),
    ] {
        let build = match kind {
            "targz-ref" => index(&scene, name, more, input),
            _ => {
                let plain = ["--type", kind, "--compressor", "none"];
                scene.create(name, &[&plain, more].concat(), input)
            }
        };
        let daemon = scene.mount(&build);
        assert_same_tree(&source, daemon.point());
        daemon.stop().unwrap();

        let cache = scene.dir(&format!("{name}.cache"));
        let mut create = nydus_image().unwrap();
        create.args(["create", "--type", kind, "--bootstrap"]);
        create.arg(scene.path(&format!("{name}.again"))).args(more);
        create.arg("--blob-cache-dir").arg(&cache);
        succeed(create.arg(input)).unwrap();
        let read = |path: PathBuf| fs::read(path).unwrap();
        assert!(read(build.bootstrap) == read(scene.path(&format!("{name}.again"))));
        for suffix in ["blob.data", "blob.meta"] {
            let file = format!("{}.{suffix}", build.blobs[0]);
            let equal = read(cache.join(&file)) == read(build.blob_dir.join(&file));
            assert!(equal, "{name}: {suffix}");
        }
    }
}

#[test]
fn a_small_read_decodes_a_small_part() {
    let scene = Scene::new();
    let root = scene.dir("source");
    for index in 0..40 {
        fs::write(
            root.join(format!("{index:02}")),
            nasty::noise(1_000_000, index),
        )
        .unwrap();
    }
    let tar = scene.path("layer.tar");
    write_tree(&root, &tar).unwrap();
    let layer = gzip(&tar, "-6", 1);
    let build = index(&scene, "image", &[], &layer);
    // Destroyed but for the part around one file: whatever else is read does not decode.
    let stored = build.blob_dir.join(&build.blobs[0]);
    let mut bytes = fs::read(&stored).unwrap();
    let middle = bytes.len() / 2;
    let keep = middle - (4 << 20)..middle + (4 << 20);
    for (at, byte) in bytes.iter_mut().enumerate() {
        if !keep.contains(&at) {
            *byte ^= 0x55;
        }
    }
    fs::write(&stored, bytes).unwrap();
    let daemon = scene.mount(&build);
    let file = daemon.point().join("20");
    assert!(fs::read(file).unwrap() == nasty::noise(1_000_000, 20));
    assert!(fs::read(daemon.point().join("02")).is_err());
    daemon.stop().unwrap();
}

#[test]
fn bad_layers_and_options_are_refused() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let tar = scene.path("layer.tar");
    write_tree(&source, &tar).unwrap();
    let good = gzip(&tar, "-6", 1);
    let bytes = fs::read(&good).unwrap();
    let cut = scene.path("cut.tar.gz");
    fs::write(&cut, &bytes[..100_000]).unwrap();
    let changed = scene.path("changed.tar.gz");
    let mut wrong = bytes.clone();
    let checksum = wrong.len() - 8;
    wrong[checksum] ^= 1;
    fs::write(&changed, wrong).unwrap();
    let trailing = scene.path("trailing.tar.gz");
    fs::write(&trailing, [&bytes[..], b"not a gzip member"].concat()).unwrap();
    let zstd = scene.path("layer.tar.zst");
    fs::write(&zstd, [0x28, 0xb5, 0x2f, 0xfd, 0, 0]).unwrap();
    for (case, layer, words) in [
        (
            "cut",
            &cut,
            &["cut.tar.gz", "compressed byte 100000", "ends inside"][..],
        ),
        (
            "changed",
            &changed,
            &["changed.tar.gz", "incorrect data check"],
        ),
        (
            "trailing",
            &trailing,
            &["trailing.tar.gz", "other data follows the last gzip member"],
        ),
        ("zstd", &zstd, &["layer.tar.zst", "zstd"]),
    ] {
        let mut command = scene.create_command(case);
        command.args(["--type", "targz-ref"]).arg(layer);
        assert_fails(case, &mut command, words);
        assert_empty(case, &scene.path(&format!("{case}.blobs")));
    }
    for option in [
        &["--blob-id", "x"][..],
        &["--batch-size", "0x1000"],
        &["--prefetch-policy", "blob"],
    ] {
        let mut command = scene.create_command("options");
        command
            .args(["--type", "targz-ref"])
            .args(option)
            .arg(&good);
        let finished = support::command::run(&mut command).unwrap();
        assert_eq!(finished.code(), 2, "{option:?}");
    }
}
