//! All names of an image in the order in which files are stored: the entries of a
//! directory in name order, then its subdirectories one after the other.

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
    each(Name {
        path: b"/".to_vec(),
        inode: image.inode(image.root())?,
    })?;
    let mut pending = vec![(Vec::new(), image.root())];
    while let Some((path, dir)) = pending.pop() {
        let mut subdirectories = Vec::new();
        for (name, nid) in entries(image, dir)? {
            let path = [&path[..], b"/", name].concat();
            let inode = image.inode(nid)?;
            if inode.kind() == FileKind::Directory {
                subdirectories.push((path.clone(), nid));
            }
            each(Name { path, inode })?;
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
