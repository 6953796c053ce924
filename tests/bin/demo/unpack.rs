//! What happens without lazy loading: pull an image whole and unpack its layers,
//! with tools that know nothing of this project.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use support::command::{run, succeed};

/// Unpacks the layers of the one image in the OCI layout `layout` into the new
/// directory `root`, lowest first. The layers are removed on the way.
///
/// # Errors
/// The layout holds an index, a layer is damaged, or the disk is full.
pub(crate) fn unpack(layout: &Path, root: &Path) -> Result<()> {
    let index = read_json(&layout.join("index.json"))?;
    let manifest = read_json(&blob(layout, &index["manifests"][0])?)?;
    fs::create_dir(root)?;
    for layer in manifest["layers"]
        .as_array()
        .context("not the manifest of an image")?
    {
        let blob = blob(layout, layer)?;
        let media_type = layer["mediaType"].as_str().unwrap_or_default();
        apply(&plain(&blob, media_type)?, root)?;
    }
    Ok(())
}

/// The layer as a plain tar, in place of the compressed one.
fn plain(blob: &Path, media_type: &str) -> Result<PathBuf> {
    let (tool, suffix) = match media_type {
        gzip if gzip.ends_with("gzip") => ("gzip", "gz"),
        zstd if zstd.ends_with("zstd") => ("zstd", "zst"),
        _ => return Ok(blob.to_owned()),
    };
    let named = blob.with_extension(suffix);
    fs::rename(blob, &named)?;
    succeed(Command::new(tool).arg("-dq").arg(&named))?;
    Ok(blob.to_owned())
}

/// Applies one layer: first what it removes, then what it brings.
fn apply(tar: &Path, root: &Path) -> Result<()> {
    let listed = succeed(Command::new("tar").arg("-tf").arg(tar))?.stdout;
    for name in listed.lines() {
        let path = Path::new(name);
        let Some(file) = path.file_name().and_then(|file| file.to_str()) else {
            continue;
        };
        if !file.starts_with(".wh.") {
            continue;
        }
        let Some(directory) = inside(root, path.parent().unwrap_or(Path::new("")))? else {
            continue;
        };
        if file == ".wh..wh..opq" {
            succeed(
                Command::new("find")
                    .arg(&directory)
                    .args(["-mindepth", "1", "-delete"]),
            )?;
        } else if let Some(gone) = file.strip_prefix(".wh.") {
            // Whatever it is; that nothing is there is no error either.
            run(Command::new("rm").arg("-rf").arg(directory.join(gone)))?;
        }
    }
    let mut command = Command::new("tar");
    command.args([
        "-x",
        "--numeric-owner",
        "-p",
        "--xattrs",
        "--xattrs-include=*",
    ]);
    succeed(
        command
            .args(["--exclude=.wh.*", "-C"])
            .arg(root)
            .arg("-f")
            .arg(tar),
    )?;
    Ok(())
}

/// `directory` of the tree `root`; `None` if it is not there.
///
/// Links of one layer must not make the whiteouts of the next remove files of the host.
fn inside(root: &Path, directory: &Path) -> Result<Option<PathBuf>> {
    let Ok(found) = root.join(directory).canonicalize() else {
        return Ok(None);
    };
    ensure!(
        found.starts_with(root.canonicalize()?),
        "a whiteout in {} leads out of the image",
        directory.display()
    );
    Ok(Some(found))
}

fn blob(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"]
        .as_str()
        .context("descriptor without a digest")?;
    let hex = digest
        .strip_prefix("sha256:")
        .context("not a SHA-256 digest")?;
    Ok(layout.join("blobs/sha256").join(hex))
}

fn read_json(file: &Path) -> Result<Value> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", file.display()))
}
