//! An image as text: one line per name, for tests and debugging.
//!
//! The order is that of the directories: all entries of one, then its
//! subdirectories. A line has the path, type and permissions, link count,
//! owner, time, and what depends on the type; attributes and chunks follow:
//!
//! ```text
//! /f -0644 links=2 owner=1000:100 time=1700000000.000000123 nid=136 size=5000 chunks=0:0+4096,0:1+904
//! ```
//!
//! The chunks of a hard link are shown with its first name only. The text is
//! not a stable format.

use std::fmt::Write as _;
use std::ops::ControlFlow;

use crate::error::{Error, corrupt};
use crate::fs::Inode;
use crate::image::Image;
use crate::units::{FileKind, MAX_DEPTH, Nid};
use crate::visited::Visited;

/// All names of `image`, one per line, the root first.
///
/// # Errors
/// The first [`Error`] met.
pub fn dump(image: &Image) -> Result<String, Error> {
    let mut out = String::new();
    let mut visited = Visited::new(image);
    line(image, b"/", image.root(), &mut visited, &mut out)?;
    let mut pending = vec![(Vec::new(), image.root(), 0_u32)];
    while let Some((path, dir, depth)) = pending.pop() {
        if depth > MAX_DEPTH {
            return Err(corrupt("directory depth", 0, depth, "at most 4096"));
        }
        let mut entries = Vec::new();
        image.readdir(dir, 0, |entry| {
            if entry.name != b"." && entry.name != b".." {
                entries.push(entry);
            }
            ControlFlow::Continue(())
        })?;
        let mut subdirectories = Vec::new();
        for entry in entries {
            let path = [&path[..], b"/", entry.name].concat();
            line(image, &path, entry.nid, &mut visited, &mut out)?;
            if entry.kind == FileKind::Directory {
                subdirectories.push((path, entry.nid, depth + 1));
            }
        }
        pending.extend(subdirectories.into_iter().rev());
    }
    Ok(out)
}

fn line(
    image: &Image,
    path: &[u8],
    nid: Nid,
    visited: &mut Visited,
    out: &mut String,
) -> Result<(), Error> {
    let inode = image.inode(nid)?;
    let details = if visited.first(&inode)? {
        content(image, &inode)? + &xattrs(image, nid)?
    } else {
        String::new()
    };
    let attr = inode.attr();
    let text = format!(
        "{} {}{:04o} links={} owner={}:{} time={}.{:09} nid={}{}\n",
        path.escape_ascii(),
        letter(inode.kind()),
        attr.permissions,
        inode.nlink(),
        attr.uid,
        attr.gid,
        attr.mtime,
        attr.mtime_nsec,
        nid,
        details,
    );
    out.push_str(&text);
    Ok(())
}

/// The letter that `ls -l` shows.
fn letter(kind: FileKind) -> char {
    match kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
        FileKind::Symlink => 'l',
    }
}

fn content(image: &Image, inode: &Inode) -> Result<String, Error> {
    Ok(match inode.kind() {
        FileKind::File => {
            let mut text = format!(" size={}", inode.size());
            for (number, extent) in image.extents(inode.nid(), 0..inode.size()).enumerate() {
                let extent = extent?;
                let separator = if number == 0 { " chunks=" } else { "," };
                let len = extent.plain.end - extent.plain.start;
                // Writing to a string does not fail.
                let _ = write!(text, "{separator}{}:{}+{len}", extent.blob, extent.chunk);
            }
            text
        }
        FileKind::Directory => format!(" size={}", inode.size()),
        FileKind::Symlink => format!(" target={}", image.readlink(inode.nid())?.escape_ascii()),
        FileKind::CharDevice | FileKind::BlockDevice => format!(" device={:#x}", inode.rdev()),
        FileKind::Fifo | FileKind::Socket => String::new(),
    })
}

fn xattrs(image: &Image, nid: Nid) -> Result<String, Error> {
    let mut text = String::new();
    for xattr in image.xattrs(nid)? {
        let (key, value) = (xattr.key(), xattr.value);
        // Writing to a string does not fail.
        let _ = write!(text, " {}={}", key.escape_ascii(), value.escape_ascii());
    }
    Ok(text)
}
