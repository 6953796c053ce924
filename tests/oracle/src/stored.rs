//! Images kept on disk, one folder each, with the tree they must read back as.
//!
//! A folder holds `boot` (or only a blob with an inlined bootstrap) and blobs
//! named by id; a layer kept for a reference image has `.layer.tar.gz` behind
//! its id. `tree.jsonl` in the folder, or beside it, is the expected tree.
//! [`stage`] gives readers a directory in which every file is named by its id.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde_json::Value;

use crate::build::Built;
use crate::describe::Entry;
use crate::fixtures;

/// The directory of stored images, which `NYDUS_FIXTURES` names; `None` if
/// `NYDUS_FIXTURES=none` says to go without.
pub fn root() -> Result<Option<PathBuf>> {
    fixtures::directory()
}

/// The folders of `root` that hold an image, in name order.
pub fn folders(root: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(root).with_context(|| format!("list {}", root.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Links the files of `folder` into `dir`, each named by its id.
pub fn stage(folder: &Path, dir: &Path) -> Result<Built> {
    let mut inlined = None;
    let mut boot = None;
    for entry in fs::read_dir(folder)? {
        let path = fs::canonicalize(entry?.path())?;
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default()
            .to_string();
        let id = name.strip_suffix(".layer.tar.gz").unwrap_or(&name);
        if name == "boot" {
            symlink(&path, dir.join("boot"))?;
            boot = Some(dir.join("boot"));
        } else if id.len() == 64 {
            symlink(&path, dir.join(id))?;
            inlined = Some(dir.join(id));
        }
    }
    let boot = boot
        .or(inlined)
        .ok_or_else(|| anyhow!("no image in {}", folder.display()))?;
    Ok(Built {
        boot,
        blob_dir: dir.to_path_buf(),
    })
}

/// The lines of the expected tree of `folder`.
pub fn expected(folder: &Path) -> Result<Vec<Value>> {
    let own = folder.join("tree.jsonl");
    let shared = folder.with_file_name("tree.jsonl");
    let path = if own.exists() { own } else { shared };
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    text.lines()
        .map(|l| serde_json::from_str(l).map_err(Into::into))
        .collect()
}

/// Compares a tree with `expected` line by line. `excuse` may change both sides.
pub fn equal(expected: &[Value], found: &[Entry], excuse: impl Fn(&mut Value)) -> Result<()> {
    let side = |lines: Vec<Value>| -> Vec<String> {
        lines
            .into_iter()
            .map(|mut line| {
                excuse(&mut line);
                line.to_string()
            })
            .collect()
    };
    let want = side(expected.to_vec());
    let have = side(found.iter().map(Entry::to_json).collect());
    let missing: Vec<_> = want
        .iter()
        .filter(|l| !have.contains(l))
        .take(10)
        .cloned()
        .collect();
    let extra: Vec<_> = have
        .iter()
        .filter(|l| !want.contains(l))
        .take(10)
        .cloned()
        .collect();
    if missing.is_empty() && extra.is_empty() {
        return Ok(());
    }
    Err(anyhow!(
        "expected\n  {}\nfound\n  {}",
        missing.join("\n  "),
        extra.join("\n  ")
    ))
}

/// What the image of `folder` may differ in from the expected tree: the root's
/// time, which builders that read a directory drop, and in the `merged` image the
/// times of directories, which its expected tree does not know.
pub fn excuse(folder: &Path) -> impl Fn(&mut Value) + use<> {
    let name = folder
        .file_name()
        .and_then(|n| n.to_str())
        .unwrap_or_default()
        .to_string();
    move |line| {
        let is_dir = line["mode"].as_str().is_some_and(|m| m.starts_with("0o4"));
        let is_root = line["path"] == "/";
        if is_root || is_dir && name == "merged" {
            line["mtime_ns"] = Value::Null;
        }
    }
}
