//! What a tree looks like: one [`Entry`] per name, whoever read it.
//!
//! The same description is made from a directory of the host ([`directory`]),
//! from an image as the published crates read it (`read`), and from an image as
//! our library reads it (`ours`); two trees are equal when their descriptions
//! are. [`Entry::to_json`] prints the form of one line per name in which the
//! expected trees of stored images are kept.
//!
//! Promises: names and targets are bytes, nothing is followed, the order is that
//! of the path bytes. Where to read next: `compare.rs`.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// File type bits of a mode.
pub const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFSOCK: u32 = 0o140_000;

/// One name of a tree with everything an image must preserve about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Absolute path inside the tree; `/` is the root.
    pub path: Vec<u8>,
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time in nanoseconds since 1970, negative before.
    pub mtime_ns: i128,
    /// Regular files: length, SHA-256 of the content, link count.
    pub file: Option<FileFacts>,
    /// Symbolic links: the target.
    pub target: Option<Vec<u8>>,
    /// Device nodes: major and minor.
    pub rdev: Option<(u64, u64)>,
    /// Extended attributes by full name, without `security.selinux`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What only regular files have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileFacts {
    /// Length in bytes.
    pub size: u64,
    /// SHA-256 of the content.
    pub sha256: [u8; 32],
    /// Number of names.
    pub nlink: u64,
    /// The first name (in path order) of the same inode, when there are several.
    pub same_as: Option<Vec<u8>>,
}

impl Entry {
    /// Is this a directory?
    pub fn is_dir(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }

    /// Is this a socket?
    pub fn is_socket(&self) -> bool {
        self.mode & S_IFMT == S_IFSOCK
    }

    /// Is this a regular file?
    pub fn is_file(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    /// Is this a symbolic link?
    pub fn is_symlink(&self) -> bool {
        self.mode & S_IFMT == S_IFLNK
    }

    /// Is this a character or block device?
    pub fn is_device(&self) -> bool {
        matches!(self.mode & S_IFMT, S_IFCHR | S_IFBLK)
    }

    /// One JSON object with sorted keys. Bytes that are not UTF-8 become `\xNN`.
    pub fn to_json(&self) -> Value {
        let mut out = Map::new();
        out.insert("path".into(), text(&self.path).into());
        out.insert("mode".into(), format!("0o{:o}", self.mode).into());
        out.insert("uid".into(), self.uid.into());
        out.insert("gid".into(), self.gid.into());
        // Fits: 64-bit seconds are only reached by corrupt images, which print as null.
        out.insert("mtime_ns".into(), i64::try_from(self.mtime_ns).ok().into());
        if let Some(file) = &self.file {
            out.insert("size".into(), file.size.into());
            out.insert("sha256".into(), hex(&file.sha256).into());
            out.insert("nlink".into(), file.nlink.into());
            if let Some(first) = &file.same_as {
                out.insert("same_as".into(), text(first).into());
            }
        }
        if let Some(target) = &self.target {
            out.insert("target".into(), text(target).into());
        }
        if let Some((major, minor)) = self.rdev {
            out.insert("rdev".into(), json!([major, minor]));
        }
        if !self.xattrs.is_empty() {
            let all = self.xattrs.iter();
            let map: Map<_, _> = all.map(|(k, v)| (text(k), hex(v).into())).collect();
            out.insert("xattrs".into(), map.into());
        }
        Value::Object(out)
    }
}

/// Fills in `same_as`: `inodes` names the inode of each entry of `tree`, which is
/// in path order.
pub fn name_hard_links(tree: &mut [Entry], inodes: &[u64]) {
    let mut first: HashMap<u64, Vec<u8>> = HashMap::new();
    for (entry, inode) in tree.iter_mut().zip(inodes) {
        let Some(file) = &mut entry.file else {
            continue;
        };
        if file.nlink > 1 {
            file.same_as = Some(first.entry(*inode).or_insert(entry.path.clone()).clone());
        }
    }
}

/// Describes the directory `root` of the host.
pub fn directory(root: &Path) -> Result<Vec<Entry>> {
    let mut found = Vec::new();
    walk(root, b"/", &mut found)?;
    found.sort_by(|a, b| a.0.path.cmp(&b.0.path));
    let (mut tree, inodes): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    name_hard_links(&mut tree, &inodes);
    Ok(tree)
}

fn walk(host: &Path, path: &[u8], found: &mut Vec<(Entry, u64)>) -> Result<()> {
    let entry = one(host, path).with_context(|| format!("describe {}", host.display()))?;
    let is_dir = entry.0.is_dir();
    found.push(entry);
    if is_dir {
        for child in fs::read_dir(host)? {
            let name = child?.file_name();
            walk(&host.join(&name), &join(path, name.as_bytes()), found)?;
        }
    }
    Ok(())
}

fn one(host: &Path, path: &[u8]) -> Result<(Entry, u64)> {
    let meta = fs::symlink_metadata(host)?;
    let mut entry = Entry {
        path: path.to_vec(),
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        mtime_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
        ..Entry::default()
    };
    if entry.is_file() {
        let (size, sha256) = hash(fs::File::open(host)?)?;
        entry.file = Some(FileFacts {
            size,
            sha256,
            nlink: meta.nlink(),
            same_as: None,
        });
    } else if entry.is_symlink() {
        entry.target = Some(fs::read_link(host)?.as_os_str().as_bytes().to_vec());
    } else if entry.is_device() {
        entry.rdev = Some((
            libc::major(meta.rdev()).into(),
            libc::minor(meta.rdev()).into(),
        ));
    }
    for key in xattr::list(host)? {
        if key != OsStr::new("security.selinux") {
            let value = xattr::get(host, &key)?.unwrap_or_default();
            entry.xattrs.insert(key.as_bytes().to_vec(), value);
        }
    }
    Ok((entry, meta.ino()))
}

/// Length and SHA-256 of everything `from` yields.
pub fn hash(mut from: impl Read) -> Result<(u64, [u8; 32])> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok((size, hasher.finalize().into())),
            n => {
                hasher.update(&buffer[..n]);
                size += u64::try_from(n)?;
            }
        }
    }
}

/// `dir` + `/` + `name`, with the root handled.
pub fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = dir.to_vec();
    if path.last() != Some(&b'/') {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes as text; what is not UTF-8 becomes `\xNN`.
pub fn text(bytes: &[u8]) -> String {
    let chunks = bytes.utf8_chunks();
    chunks
        .map(|c| {
            c.valid().to_string()
                + &c.invalid()
                    .iter()
                    .map(|b| format!("\\x{b:02x}"))
                    .collect::<String>()
        })
        .collect()
}
