//! The kernel's EROFS reads every kind of image that our builder writes.
//!
//! For each option set of `support::matrix`: build, lay the blobs out in their
//! uncompressed address space with our library, mount, and compare the mount with
//! the source entry by entry. `fsck.erofs` then checks the same image and unpacks
//! it, as a third reader; what that version cannot unpack is left out of its
//! comparison ([`unpacked`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use storage::BlobIndex;
use support::command::{run, succeed};
use support::expand::{self, Blob};
use support::image::layer::write_tree;
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
        let expected = describe(&tree, Detail::All)?;
        Ok(Self {
            tree,
            tar,
            targz,
            expected,
        })
    }

    fn path(&self, source: Source) -> &Path {
        match source {
            Source::Dir => &self.tree,
            Source::Tar => &self.tar,
            Source::Targz | Source::TargzRef => &self.targz,
        }
    }
}

fn check(scene: &Scene, sources: &Sources, options: &Options, name: &str) -> Result<()> {
    let Some(image) = create(scene, sources, options, name)? else {
        return Ok(());
    };
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

/// Builds; `None` if the builder refused in the way that is expected of it.
fn create(
    scene: &Scene,
    sources: &Sources,
    options: &Options,
    name: &str,
) -> Result<Option<Image>> {
    let blob_dir = scene.dir(&format!("{name}.blobs"));
    let bootstrap = scene.path(&format!("{name}.boot"));
    let mut command = support::binaries::nydus_image()?;
    command.arg("create").args(options.arguments());
    command.arg("--blob-dir").arg(&blob_dir);
    if !options.inline_meta {
        command.arg("--bootstrap").arg(&bootstrap);
    }
    let finished = run(command.arg(sources.path(options.source)))?;
    if let Some(text) = options.refused_by_create() {
        let refused = finished.code() == 1 && finished.stderr.contains(text);
        ensure!(
            refused,
            "no longer refused with {text:?}: {}",
            finished.stderr
        );
        return Ok(None);
    }
    ensure!(
        finished.status.success(),
        "create failed: {}",
        finished.stderr
    );
    let image = if options.inline_meta {
        let image = expand::open(&only_file(&blob_dir)?)?;
        fs::write(&bootstrap, image.bytes())?;
        image
    } else {
        expand::open(&bootstrap)?
    };
    let blobs = image.blobs().len();
    Ok(Some(Image {
        image,
        bootstrap,
        blob_dir,
        blobs,
    }))
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
