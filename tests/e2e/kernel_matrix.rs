//! The kernel's EROFS reads every kind of image that our builder writes.
//!
//! For each option set of `support::matrix`: build, lay the blobs out in their
//! uncompressed address space with our library, mount, and compare the mount with
//! the source entry by entry. `dump.erofs` counts the same names, and `fsck.erofs`
//! checks the image and unpacks it, as a third reader; what that version cannot
//! unpack is left out of its comparison ([`unpacked`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use storage::BlobIndex;
use support::command::succeed;
use support::expand::{self, Blob};
use support::image::layer::{write_tree, write_tree_without_holes};
use support::matrix::{Options, Source, pairwise};
use support::mount::KernelMount;
use support::tree::nasty;
use support::tree::{Detail, describe, difference};

use crate::scene::Scene;

/// All failures are collected: one fault often shows in several option sets.
#[test]
fn the_kernel_reads_every_kind_of_image() {
    let scene = Scene::new();
    let sources = Sources::new(&scene).unwrap();
    let mut failures = Vec::new();
    for (number, options) in pairwise().iter().enumerate() {
        if let Err(error) = check(&scene, &sources, options, &number.to_string()) {
            failures.push(format!("{options}: {error:#}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The tree in every form that a builder takes.
struct Sources {
    tree: PathBuf,
    tar: PathBuf,
    targz: PathBuf,
    /// A layer that stays the blob. Nothing in it is left out, so holes are zeros.
    layer: PathBuf,
    /// Description of the tree.
    expected: Vec<String>,
}

impl Sources {
    fn new(scene: &Scene) -> Result<Self> {
        // One tree serves all sources, so it has nothing that a tar cannot carry.
        let tree = scene.nasty_tree(nasty::Options {
            without_sockets: true,
            without_huge: true,
        });
        let (tar, targz) = (scene.path("source.tar"), scene.path("source.tar.gz"));
        write_tree(&tree, &tar)?;
        succeed(Command::new("gzip").arg("--keep").arg(&tar))?;
        let unpacked = scene.path("layer.tar");
        write_tree_without_holes(&tree, &unpacked)?;
        succeed(Command::new("gzip").arg(&unpacked))?;
        let expected = describe(&tree, Detail::All)?;
        Ok(Self {
            tree,
            tar,
            targz,
            layer: scene.path("layer.tar.gz"),
            expected,
        })
    }

    fn path(&self, source: Source) -> &Path {
        match source {
            Source::Dir => &self.tree,
            Source::Tar => &self.tar,
            Source::Targz => &self.targz,
            Source::TargzRef => &self.layer,
        }
    }
}

fn check(scene: &Scene, sources: &Sources, options: &Options, name: &str) -> Result<()> {
    let image = create(scene, sources, options, name)?;
    let mut devices = Vec::new();
    for number in 0..u32::try_from(image.blobs)? {
        let blob = Blob::open(&image.image, BlobIndex::new(number), &image.blob_dir)?;
        let device = scene.path(&format!("{name}.device-{number}"));
        blob.expand(&device).context("lay out a blob")?;
        devices.push(device);
    }
    let point = scene.new_point();
    let mount = KernelMount::erofs(&image.bootstrap, &devices, &point)?;
    let found = describe(&point, Detail::All)?;
    let dir = options.source == Source::Dir;
    let difference = difference(&mounted(&sources.expected, dir), &mounted(&found, dir));
    if let Some(difference) = difference {
        bail!("the kernel reads another tree:\n{difference}");
    }
    drop(mount);
    count(&image.bootstrap, &devices, &sources.expected).context("dump.erofs")?;
    unpack(scene, &image.bootstrap, &devices, &sources.expected, name).context("fsck.erofs")
}

/// A description without the time of the root if the image is made from a
/// directory: builds of equal directories made at different times are equal.
fn mounted(lines: &[String], from_directory: bool) -> Vec<String> {
    let is_root = |line: &String| from_directory && line.contains("\"path\": \"/\"");
    let kept = |line: &String| match is_root(line) {
        true => without(line, &["\"mtime_ns\": "]),
        false => line.clone(),
    };
    lines.iter().map(kept).collect()
}

/// A build, opened.
struct Image {
    image: std::sync::Arc<rafs::Image>,
    /// The bootstrap as a file of its own, however it was stored.
    bootstrap: PathBuf,
    blob_dir: PathBuf,
    blobs: usize,
}

/// Builds, with the layer beside the blob that refers to it.
fn create(scene: &Scene, sources: &Sources, options: &Options, name: &str) -> Result<Image> {
    let blob_dir = scene.dir(&format!("{name}.blobs"));
    let bootstrap = scene.path(&format!("{name}.boot"));
    let mut command = support::binaries::nydus_image()?;
    command.arg("create").args(options.arguments());
    command.arg("--blob-dir").arg(&blob_dir);
    if !options.inline_meta {
        command.arg("--bootstrap").arg(&bootstrap);
    }
    let source = sources.path(options.source);
    succeed(command.arg(source))?;
    let image = if options.inline_meta {
        let image = expand::open(&only_file(&blob_dir)?)?;
        fs::write(&bootstrap, image.bytes())?;
        image
    } else {
        expand::open(&bootstrap)?
    };
    if options.source == Source::TargzRef {
        let [layer] = image.blobs() else {
            bail!("{} blobs, expected the layer", image.blobs().len());
        };
        fs::copy(source, blob_dir.join(layer.id.as_str()))?;
    }
    let blobs = image.blobs().len();
    Ok(Image {
        image,
        bootstrap,
        blob_dir,
        blobs,
    })
}

fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(dir)?;
    let first = entries.next().context("the build left no blob")??;
    ensure!(
        entries.next().is_none(),
        "more than one blob in {}",
        dir.display()
    );
    Ok(first.path())
}

/// Has `dump.erofs` count the names of each type, and compares the counts.
fn count(bootstrap: &Path, devices: &[PathBuf], expected: &[String]) -> Result<()> {
    let mut dump = Command::new("dump.erofs");
    let device = |d: &PathBuf| format!("--device={}", d.display());
    dump.arg("-S").args(devices.iter().map(device));
    let text = succeed(dump.arg(bootstrap))?.stdout;
    let of_type = |wanted: u32| {
        expected
            .iter()
            .filter(|l| file_type(l) == Some(wanted))
            .count()
    };
    for (title, wanted) in [
        ("total file", expected.len()),
        ("regular file", of_type(0o100_000)),
        ("directory", of_type(0o040_000)),
        ("char dev", of_type(0o020_000)),
        ("block dev", of_type(0o060_000)),
        ("FIFO file", of_type(0o010_000)),
        ("symlink file", of_type(0o120_000)),
    ] {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("Filesystem {title} count:")));
        let found: usize = line.context(title)?.trim().parse()?;
        ensure!(found == wanted, "{title}: {found}, expected {wanted}");
    }
    Ok(())
}

/// The type in the mode of an entry's description.
fn file_type(line: &str) -> Option<u32> {
    let (_, mode) = line.split_once("\"mode\": \"0o")?;
    let (mode, _) = mode.split_once('"')?;
    Some(u32::from_str_radix(mode, 8).ok()? & 0o170_000)
}

/// Has `fsck.erofs` check the image and unpack it, and compares the result.
fn unpack(
    scene: &Scene,
    bootstrap: &Path,
    devices: &[PathBuf],
    expected: &[String],
    name: &str,
) -> Result<()> {
    let out = scene.path(&format!("{name}.unpacked"));
    let mut fsck = Command::new("fsck.erofs");
    fsck.arg("-d1").arg(format!("--extract={}", out.display()));
    let device = |d: &PathBuf| format!("--device={}", d.display());
    fsck.args(devices.iter().map(device)).arg(bootstrap);
    succeed(&mut fsck)?;
    let found = describe(&out, Detail::WithoutTimes)?;
    let difference = difference(&unpacked(expected), &unpacked(&found));
    fs::remove_dir_all(&out)?;
    match difference {
        Some(difference) => bail!("unpacks another tree:\n{difference}"),
        None => Ok(()),
    }
}

/// The part of a description that survives unpacking by the `fsck.erofs` of Debian
/// 12: it restores neither extended attributes nor hard links, changes the owner
/// after the mode, which clears the set-id bits of files, and has its own idea of
/// times.
fn unpacked(lines: &[String]) -> Vec<String> {
    let lost = [
        "\"xattrs\": ",
        "\"same_as\": ",
        "\"nlink\": ",
        "\"mtime_ns\": ",
    ];
    let kept = lines.iter().map(|line| without(line, &lost));
    kept.map(|line| {
        ["\"0o102", "\"0o104", "\"0o106"]
            .iter()
            .fold(line, |line, mode| line.replace(mode, "\"0o100"))
    })
    .collect()
}

/// A line without the fields that begin with one of `names`.
fn without(line: &str, names: &[&str]) -> String {
    let mut kept = line.to_owned();
    for name in names {
        let Some(start) = kept.find(name) else {
            continue;
        };
        let rest = &kept[start + name.len()..];
        // Strings hold no bare quote, and the attributes' object no brace.
        let end = match rest.as_bytes().first() {
            Some(b'{') => rest.find('}').map(|at| at + 1),
            Some(b'"') => rest[1..].find('"').map(|at| at + 2),
            _ => rest.find([',', '}']),
        };
        let end = start + name.len() + end.unwrap_or(rest.len());
        kept.replace_range(start..end, "");
    }
    // Each field that went left its comma, and there is a first and a last field.
    while kept.contains(", , ") {
        kept = kept.replace(", , ", ", ");
    }
    kept.replace(", }", "}").replace("{, ", "{")
}
