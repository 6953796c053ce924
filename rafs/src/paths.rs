//! Names of files: what an absolute path leads to, and paths that matter to almost
//! every program.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::image::Image;
use crate::units::{FileKind, Nid};

/// Symbolic links that are followed for one path.
const MAX_LINKS: u32 = 40;

/// What the C library reads for almost every program, one file after the other: where
/// libraries are, whom it runs as, its character set, and the time zone.
pub const USUAL: [&str; 8] = [
    "/etc/ld.so.cache",
    "/usr/lib/locale/C.utf8/LC_CTYPE",
    "/usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache",
    "/usr/lib/aarch64-linux-gnu/gconv/gconv-modules.cache",
    "/usr/lib64/gconv/gconv-modules.cache",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/localtime",
];

/// The inode that an absolute path of the image leads to, symbolic links followed.
#[must_use]
pub fn find(image: &Image, path: &Path) -> Option<Nid> {
    let mut links = 0;
    // Names still to be walked, next one last.
    let mut names: Vec<Vec<u8>> = split(path.as_os_str().as_bytes());
    let mut at = image.root();
    while let Some(name) = names.pop() {
        let parent = at;
        at = match name.as_slice() {
            b".." => image.parent(parent).ok()?,
            name => image.lookup(parent, name).ok()??,
        };
        if image.inode(at).ok()?.kind() == FileKind::Symlink {
            links += 1;
            if links > MAX_LINKS {
                return None;
            }
            let target = image.readlink(at).ok()?;
            at = if target.starts_with(b"/") {
                image.root()
            } else {
                parent
            };
            names.extend(split(&target));
        }
    }
    Some(at)
}

/// The names of a path, last first.
fn split(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.split(|byte| *byte == b'/');
    let mut names: Vec<_> = names
        .filter(|name| !name.is_empty() && *name != b".")
        .map(<[u8]>::to_vec)
        .collect();
    names.reverse();
    names
}
