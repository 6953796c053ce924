//! One layer: what a tree adds to the tree below it, as a tar with OCI whiteouts.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::sys::stat::SFlag;

use crate::command::succeed;

/// What makes an entry the same in two trees; content is judged by time and size.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    mode: u32,
    owner: (u32, u32),
    size: u64,
    mtime: (i64, i64),
    device: u64,
    links: u64,
    target: Option<PathBuf>,
}

impl Look {
    fn is_directory(&self) -> bool {
        self.mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits()
    }
}

/// The entries of one layer, by path relative to the root, sorted.
#[derive(Debug, Default)]
pub struct Changes {
    /// New or different.
    pub present: Vec<OsString>,
    /// Gone; entries below a directory that is gone, or is none now, are not listed.
    pub removed: Vec<OsString>,
}

/// Compares `upper` with the tree it grew from; everything is new without one.
///
/// # Errors
/// A tree cannot be read.
pub fn changes(lower: Option<&Path>, upper: &Path) -> Result<Changes> {
    let below = lower.map(looks).transpose()?.unwrap_or_default();
    let above = looks(upper)?;
    let mut changes = Changes::default();
    for (path, look) in &above {
        if below.get(path) != Some(look) {
            changes.present.push(path.clone());
        }
    }
    for path in below.keys().filter(|path| !above.contains_key(*path)) {
        let parent = Path::new(path)
            .parent()
            .map(Path::as_os_str)
            .unwrap_or_default();
        let parent = above.get(if parent.is_empty() {
            OsStr::new(".")
        } else {
            parent
        });
        if parent.is_some_and(Look::is_directory) {
            changes.removed.push(path.clone());
        }
    }
    Ok(changes)
}

/// Writes `changes` of the tree `root` to the new file `tar`.
///
/// # Errors
/// GNU tar fails, or the disk is full.
pub fn write_tar(root: &Path, changes: &Changes, tar: &Path) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let whiteouts = scratch.path().join("whiteouts");
    fs::create_dir(&whiteouts)?;
    let mut markers = Vec::new();
    for path in &changes.removed {
        let marker = whiteout_of(Path::new(path));
        fs::create_dir_all(
            whiteouts
                .join(&marker)
                .parent()
                .context("a marker has a parent")?,
        )?;
        File::create(whiteouts.join(&marker))?;
        markers.push(marker.into_os_string());
    }
    let mut command = gnu_tar(tar);
    command.arg("--no-recursion").arg("--null");
    for (directory, names) in [(root, &changes.present), (whiteouts.as_path(), &markers)] {
        let list = scratch.path().join(format!("list-{}", directory == root));
        write_list(&list, names)?;
        command
            .arg("-C")
            .arg(directory)
            .arg("--verbatim-files-from")
            .arg("-T")
            .arg(list);
    }
    succeed(&mut command)?;
    Ok(())
}

/// Writes the whole tree `root` to the new file `tar`, entries as `./path`.
///
/// # Errors
/// GNU tar fails, or the disk is full.
pub fn write_tree(root: &Path, tar: &Path) -> Result<()> {
    succeed(gnu_tar(tar).arg("--sort=name").arg("-C").arg(root).arg("."))?;
    Ok(())
}

/// GNU tar, told to keep everything that the PAX format can carry.
fn gnu_tar(tar: &Path) -> Command {
    let mut command = Command::new("tar");
    command.args(["--create", "--format=pax", "--numeric-owner", "--xattrs"]);
    // Neither access times nor the writer's process id: the same tree, the same bytes.
    command.arg("--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime");
    command
        .args(["--xattrs-include=*", "--sparse", "--file"])
        .arg(tar);
    command
}

/// The path that says "what is here below is gone": `a/b` becomes `a/.wh.b`.
fn whiteout_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(".wh.");
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

fn write_list(list: &Path, names: &[OsString]) -> Result<()> {
    let mut file = File::create(list)?;
    for name in names {
        file.write_all(name.as_bytes())?;
        file.write_all(&[0])?;
    }
    Ok(())
}

/// `root` itself as `.`, and every entry below it, by path.
fn looks(root: &Path) -> Result<BTreeMap<OsString, Look>> {
    let top = fs::symlink_metadata(root).with_context(|| cannot_list(root))?;
    let mut found = BTreeMap::from([(OsString::from("."), look(root, &top)?)]);
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let directory = root.join(&relative);
        for entry in fs::read_dir(&directory).with_context(|| cannot_list(&directory))? {
            let entry = entry?;
            let path = join(&relative, &entry.file_name());
            let meta = entry.metadata()?;
            if meta.is_dir() {
                pending.push(path.clone());
            }
            found.insert(path.into_os_string(), look(&entry.path(), &meta)?);
        }
    }
    Ok(found)
}

fn cannot_list(directory: &Path) -> String {
    format!("cannot list {}", directory.display())
}

/// `Path::join` without surprises: names are never absolute here.
fn join(directory: &Path, name: &OsStr) -> PathBuf {
    let mut bytes = directory.as_os_str().as_bytes().to_vec();
    if !bytes.is_empty() {
        bytes.push(b'/');
    }
    bytes.extend(name.as_bytes());
    OsString::from_vec(bytes).into()
}

fn look(path: &Path, meta: &Metadata) -> Result<Look> {
    let directory = meta.is_dir();
    Ok(Look {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        // Those of directories belong to the file system.
        size: if directory { 0 } else { meta.size() },
        links: if directory { 0 } else { meta.nlink() },
        mtime: (meta.mtime(), meta.mtime_nsec()),
        device: meta.rdev(),
        target: if meta.is_symlink() {
            Some(fs::read_link(path)?)
        } else {
            None
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_what_changed_and_whiteouts_for_what_vanished() {
        let scratch = tempfile::tempdir().unwrap();
        let (lower, upper) = (scratch.path().join("lower"), scratch.path().join("upper"));
        fs::create_dir_all(lower.join("gone/deep")).unwrap();
        fs::write(lower.join("gone/deep/file"), "").unwrap();
        fs::create_dir(lower.join("turned")).unwrap();
        fs::write(lower.join("turned/file"), "").unwrap();
        fs::write(lower.join("kept"), "same").unwrap();
        fs::write(lower.join("grown"), "a").unwrap();
        succeed(Command::new("cp").arg("-a").arg(&lower).arg(&upper)).unwrap();
        fs::remove_dir_all(upper.join("gone")).unwrap();
        fs::write(upper.join("grown"), "ab").unwrap();
        fs::write(upper.join("new"), "").unwrap();
        fs::remove_dir_all(upper.join("turned")).unwrap();
        fs::write(upper.join("turned"), "a file now").unwrap();

        let changes = changes(Some(&lower), &upper).unwrap();
        assert_eq!(changes.present, [".", "grown", "new", "turned"]);
        assert_eq!(changes.removed, ["gone"]);

        let tar = scratch.path().join("layer.tar");
        write_tar(&upper, &changes, &tar).unwrap();
        let listed = succeed(Command::new("tar").arg("-tf").arg(&tar))
            .unwrap()
            .stdout;
        assert_eq!(listed, "./\ngrown\nnew\nturned\n.wh.gone\n");
    }
}
