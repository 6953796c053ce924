//! Has the kernel learn that nobody need be asked when a file is closed.
//!
//! It asks (`FLUSH`) until it was told once that this is not needed. A program that dies
//! with a file open closes it, and would wait for the answer, past any signal, for as long
//! as no worker is there. So one file of a new mount is opened and closed right away.
//!
//! By a process of its own, which has nothing of ours open: should this one be killed
//! meanwhile, it must not be found waiting for its own answer.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rafs::image::Image;
use rafs::units::FileKind;

/// First word of the arguments of the process that opens the file, which is the second.
pub(crate) const OPENER: &str = "opener";
/// Most directories that are searched for a file.
const MAX_DIRECTORIES: usize = 1000;
/// How long that process may take. It is not waited for in vain: without it, everything
/// works but for what is said above.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(1);

/// Opens and closes a file of a mount, and waits until that is done.
///
/// * `root`: where the image is.
///
/// Returns whether the kernel knows. An image without files has none to be closed.
pub(crate) fn teach(root: &Path, image: &Image) -> bool {
    let Some(file) = a_file(image) else {
        return false;
    };
    match open_and_close(&root.join(file)) {
        Ok(()) => {
            tracing::debug!("{}: nobody is asked when a file is closed", root.display());
            true
        }
        Err(error) => {
            tracing::warn!(
                "{}: who dies with a file open while no worker lives may wait for the next \
                 one: {error:#}",
                root.display()
            );
            false
        }
    }
}

/// Body of the process that does it.
///
/// # Errors
/// The file cannot be opened.
pub(crate) fn open(path: &OsStr) -> io::Result<()> {
    File::open(path).map(drop)
}

fn open_and_close(path: &Path) -> anyhow::Result<()> {
    let name = std::env::args_os().next();
    let mut child = Command::new("/proc/self/exe")
        .arg0(name.unwrap_or_else(|| OsString::from("nydusd")))
        .arg(OPENER)
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start a process")?;
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "{} cannot be opened", path.display());
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            let _ = child.kill();
            bail!("opening {} takes longer than {PATIENCE:?}", path.display());
        }
        std::thread::sleep(LOOK);
    }
}

/// A regular file, as path below the root; one that is near.
fn a_file(image: &Image) -> Option<PathBuf> {
    let mut next = VecDeque::from([(image.root(), PathBuf::new())]);
    for _ in 0..MAX_DIRECTORIES {
        let (dir, path) = next.pop_front()?;
        let mut found = None;
        // A damaged directory may have good neighbours.
        let _ = image.readdir(dir, 0, |entry| {
            let at = || path.join(OsStr::from_bytes(entry.name));
            let is_dot = entry.name == b"." || entry.name == b"..";
            if entry.kind == FileKind::File {
                found = Some(at());
                return ControlFlow::Break(());
            }
            if entry.kind == FileKind::Directory && !is_dot && next.len() < MAX_DIRECTORIES {
                next.push_back((entry.nid, at()));
            }
            ControlFlow::Continue(())
        });
        if found.is_some() {
            return found;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use rafs::tree::{Attr, Content, Inode, Tree};
    use rafs::writer::{WriteOptions, write};

    use super::*;

    fn image(files: &[&str]) -> Image {
        let attr = Attr {
            permissions: 0o755,
            ..Attr::default()
        };
        let mut tree = Tree::new(attr);
        for path in files {
            let content = Content::File {
                size: 0,
                chunks: Vec::new(),
            };
            let mut dir = tree.root();
            let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
            for parent in parents.split('/').filter(|name| !name.is_empty()) {
                let inode = Inode::new(attr, Content::directory());
                dir = tree.insert(dir, parent.as_bytes(), inode).unwrap();
            }
            tree.insert(dir, name.as_bytes(), Inode::new(attr, content))
                .unwrap();
        }
        Image::from_bytes(write(&tree, &WriteOptions::default()).unwrap()).unwrap()
    }

    #[test]
    fn a_file_is_found_wherever_it_is() {
        assert_eq!(a_file(&image(&[])), None);
        assert_eq!(a_file(&image(&["a"])), Some("a".into()));
        assert_eq!(a_file(&image(&["d/e/f"])), Some("d/e/f".into()));
    }
}
