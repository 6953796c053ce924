//! All names of an image: a directory, everything in it but directories in name
//! order, then its subdirectories one after the other, each with all it contains.
//!
//! That is the order in which the data of files is stored. And nothing else comes
//! between a directory and what is in it, which tools that unpack archives rely on:
//! when they leave a directory they set its time.

use std::ops::ControlFlow;

use rafs::fs::Inode;
use rafs::{FileKind, Image, Nid};

/// One name of an image.
#[derive(Clone, Debug)]
pub struct Name {
    /// From the root, starting with `/`; the root itself is `/`.
    pub path: Vec<u8>,
    /// What it leads to.
    pub inode: Inode,
}

impl Name {
    /// The last component; empty for the root.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        self.path.rsplit(|byte| *byte == b'/').next().unwrap_or(&[])
    }
}

/// Calls `each` for every name, the root first, until it fails.
///
/// * `image`: has passed [`Image::verify_tree`], which bounds depth and size.
///
/// # Errors
/// Those of `each`, and those of reading a damaged image.
pub fn walk<E: From<rafs::Error>>(
    image: &Image,
    mut each: impl FnMut(Name) -> Result<(), E>,
) -> Result<(), E> {
    let mut pending = vec![Name {
        path: b"/".to_vec(),
        inode: image.inode(image.root())?,
    }];
    while let Some(dir) = pending.pop() {
        let nid = dir.inode.nid();
        let above = dir.path.strip_suffix(b"/").unwrap_or(&dir.path).to_vec();
        each(dir)?;
        let mut subdirectories = Vec::new();
        for (name, nid) in entries(image, nid)? {
            let name = Name {
                path: [&above[..], b"/", name].concat(),
                inode: image.inode(nid)?,
            };
            match name.inode.kind() {
                FileKind::Directory => subdirectories.push(name),
                _ => each(name)?,
            }
        }
        pending.extend(subdirectories.into_iter().rev());
    }
    Ok(())
}

/// The entries of a directory, without `.` and `..`.
///
/// # Errors
/// `dir` is no directory, or a damaged one.
pub fn entries(image: &Image, dir: Nid) -> Result<Vec<(&[u8], Nid)>, rafs::Error> {
    let mut entries = Vec::new();
    image.readdir(dir, 0, |entry| {
        if entry.name != b"." && entry.name != b".." {
            entries.push((entry.name, entry.nid));
        }
        ControlFlow::Continue(())
    })?;
    Ok(entries)
}
