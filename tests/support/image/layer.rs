//! One layer: what a tree adds to the tree below it, as a tar with OCI whiteouts.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
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

/// The entries of one layer, by path relative to the root, directory by directory:
/// `tar -x` sets the time of a directory when it leaves it, and in the order of bytes
/// `a.b` would come between `a` and `a/c`.
#[derive(Debug, Default)]
pub struct Changes {
    /// New or different; and, as containerd does, every directory on the way to an
    /// entry of the layer.
    pub present: BTreeSet<PathBuf>,
    /// Gone; entries below a directory that is gone, or is none now, are not listed.
    pub removed: BTreeSet<PathBuf>,
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
            changes.present.insert(path.clone());
        }
    }
    for path in below.keys().filter(|path| !above.contains_key(*path)) {
        if path
            .parent()
            .and_then(|parent| above.get(parent))
            .is_some_and(Look::is_directory)
        {
            changes.removed.insert(path.clone());
        }
    }
    let listed = changes.present.iter().chain(&changes.removed);
    let parents = listed.flat_map(|path| path.ancestors().skip(1));
    let parents: Vec<PathBuf> = parents.map(Path::to_owned).collect();
    changes.present.extend(parents);
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
    let mut markers = BTreeSet::new();
    for path in &changes.removed {
        let marker = whiteout_of(path);
        fs::create_dir_all(
            whiteouts
                .join(&marker)
                .parent()
                .context("a marker has a parent")?,
        )?;
        File::create(whiteouts.join(&marker))?;
        markers.insert(marker);
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

/// As [`write_tree`], with holes written as zeros.
///
/// # Errors
/// GNU tar fails, or the disk is full.
pub fn write_tree_without_holes(root: &Path, tar: &Path) -> Result<()> {
    let command = gnu_tar(tar);
    let mut plain = Command::new(command.get_program());
    plain.args(command.get_args().filter(|option| *option != "--sparse"));
    succeed(plain.arg("--sort=name").arg("-C").arg(root).arg("."))?;
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

fn write_list(list: &Path, names: &BTreeSet<PathBuf>) -> Result<()> {
    let mut file = File::create(list)?;
    for name in names {
        let name = if name.as_os_str().is_empty() {
            Path::new(".")
        } else {
            name
        };
        file.write_all(name.as_os_str().as_bytes())?;
        file.write_all(&[0])?;
    }
    Ok(())
}

/// `root` itself, as the empty path, and every entry below it.
fn looks(root: &Path) -> Result<BTreeMap<PathBuf, Look>> {
    let cannot_list = |directory: &Path| format!("cannot list {}", directory.display());
    let top = fs::symlink_metadata(root).with_context(|| cannot_list(root))?;
    let mut found = BTreeMap::from([(PathBuf::new(), look(root, &top)?)]);
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let directory = root.join(&relative);
        for entry in fs::read_dir(&directory).with_context(|| cannot_list(&directory))? {
            let entry = entry?;
            let path = relative.join(entry.file_name());
            let meta = entry.metadata()?;
            if meta.is_dir() {
                pending.push(path.clone());
            }
            found.insert(path, look(&entry.path(), &meta)?);
        }
    }
    Ok(found)
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
        fs::write(lower.join("same"), "same").unwrap();
        // Its parents are not changed, and listed all the same.
        fs::create_dir_all(lower.join("kept/inner")).unwrap();
        fs::write(lower.join("kept/inner/grown"), "a").unwrap();
        succeed(Command::new("cp").arg("-a").arg(&lower).arg(&upper)).unwrap();
        fs::remove_dir_all(upper.join("gone")).unwrap();
        fs::write(upper.join("kept/inner/grown"), "ab").unwrap();
        fs::remove_dir_all(upper.join("turned")).unwrap();
        fs::write(upper.join("turned"), "a file now").unwrap();

        let changes = changes(Some(&lower), &upper).unwrap();
        let tar = scratch.path().join("layer.tar");
        write_tar(&upper, &changes, &tar).unwrap();
        let listed = succeed(Command::new("tar").arg("-tf").arg(&tar))
            .unwrap()
            .stdout;
        assert_eq!(
            listed,
            "./\nkept/\nkept/inner/\nkept/inner/grown\nturned\n.wh.gone\n"
        );
    }
}
