//! Trees with programs of this machine, for images that run.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::layer::{changes, write_tar};
use super::layout::{self, Image};
use crate::command::succeed;

/// Directories that a container expects.
const DIRECTORIES: [&str; 8] = [
    "usr/bin",
    "usr/lib",
    "usr/lib64",
    "proc",
    "sys",
    "dev",
    "etc",
    "tmp",
];

/// Copies programs of `/usr/bin`, and the libraries that they need, into the new tree
/// `root`.
///
/// # Errors
/// One of them does not exist, or the disk is full.
pub fn copy_programs(programs: &[&str], root: &Path) -> Result<()> {
    for directory in DIRECTORIES {
        fs::create_dir_all(root.join(directory))?;
    }
    for name in ["bin", "lib", "lib64"] {
        symlink(format!("usr/{name}"), root.join(name))?;
    }
    for name in programs {
        let program = PathBuf::from("/usr/bin").join(name);
        fs::copy(&program, root.join("usr/bin").join(name))
            .with_context(|| format!("cannot copy {}", program.display()))?;
        let needed = succeed(Command::new("ldd").arg(&program))?.stdout;
        for library in needed
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            let place = root.join(library.trim_start_matches('/'));
            fs::create_dir_all(place.parent().context("no directory")?)?;
            fs::copy(library, place)?;
        }
    }
    Ok(())
}

/// Makes the image of a pod's first container, which does nothing for ever, as the OCI
/// layout `scratch/pause` with the tag `pause`.
///
/// # Errors
/// The disk is full.
pub fn make_pause(scratch: &Path) -> Result<PathBuf> {
    let root = scratch.join("pause-root");
    copy_programs(&["sleep"], &root)?;
    let tar = scratch.join("pause.tar");
    write_tar(&root, &changes(None, &root)?, &tar)?;
    let mut pause = Image::new(&[&tar]);
    pause.config = serde_json::json!({"Entrypoint": ["/usr/bin/sleep", "1000000"]});
    let at = scratch.join("pause");
    layout::write(&at, "pause", &[pause])?;
    Ok(at)
}
