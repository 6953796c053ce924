//! Describes a directory tree as text, one JSON object per line, sorted by path.
//!
//! Two trees are equal exactly when their descriptions are, and `diff` shows what
//! is not. A line has, in this order: `gid`, `mode` (octal, type included),
//! `mtime_ns`, `nlink` (regular files), `path`, `rdev` (devices), `same_as` (hard
//! links: the first path of the same inode), `sha256`, `size`, `target` (symbolic
//! links), `uid` and `xattrs` (hexadecimal values). Bytes of a path that are not
//! UTF-8 are written as the escapes `\udc80` to `\udcff`, as Python does.
//!
//! Left out: sizes and link counts of directories, which belong to the file
//! system rather than the tree, and SELinux labels, which belong to the host.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, Metadata};
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use nix::sys::stat::{major, minor};
use sha2::{Digest as _, Sha256};

/// How much of a tree is described.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// Everything.
    #[default]
    All,
    /// All but the modification times of directories, which unpacking changes.
    WithoutDirectoryTimes,
    /// All but modification times.
    WithoutTimes,
}

/// Describes the tree below `root`, `root` itself included; one line per entry.
///
/// # Errors
/// The first entry that cannot be read, by path.
pub fn describe(root: &Path, detail: Detail) -> Result<Vec<String>> {
    let mut names = vec![Vec::new()];
    list(root, &mut names)?;
    names.sort();
    let digests = digests(root, &names);
    let mut first_path = HashMap::new();
    let lines = names.iter().zip(digests);
    lines
        .map(|(name, digest)| line(root, name, digest, &mut first_path, detail))
        .collect()
}

/// The digest of every regular file, by several readers at once: where each read
/// waits for a registry, one reader would spend its time waiting.
fn digests(root: &Path, names: &[Vec<u8>]) -> Vec<Option<Result<String>>> {
    const READERS: usize = 8;
    let next = AtomicUsize::new(0);
    let digests: Vec<_> = names.iter().map(|_| OnceLock::new()).collect();
    let read = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let (Some(name), Some(digest)) = (names.get(index), digests.get(index)) else {
                return;
            };
            let path = path_of(root, name);
            if path.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
                digest.get_or_init(|| sha256(&path));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(read);
        }
    });
    digests.into_iter().map(OnceLock::into_inner).collect()
}

/// The path of an entry; of `root` itself for the empty name.
fn path_of(root: &Path, name: &[u8]) -> PathBuf {
    if name.is_empty() {
        root.to_owned()
    } else {
        root.join(OsStr::from_bytes(name))
    }
}

/// What differs between two descriptions, as `-` and `+` lines; `None` if nothing.
#[must_use]
pub fn difference(expected: &[String], actual: &[String]) -> Option<String> {
    /// More would bury the reason.
    const SHOWN: usize = 20;
    let mut lines = Vec::new();
    let missing = |side: &[String], other: &[String], sign: char, lines: &mut Vec<String>| {
        let other: std::collections::HashSet<&String> = other.iter().collect();
        lines.extend(
            side.iter()
                .filter(|l| !other.contains(l))
                .map(|l| format!("{sign} {l}")),
        );
    };
    missing(expected, actual, '-', &mut lines);
    missing(actual, expected, '+', &mut lines);
    if lines.is_empty() && expected.len() == actual.len() {
        return None;
    }
    let path = |line: &String| line.split("\"path\": ").nth(1).map(str::to_owned);
    lines.sort_by_key(path);
    let count = lines.len();
    lines.truncate(SHOWN);
    lines.push(format!(
        "{count} lines differ; {} and {} entries",
        expected.len(),
        actual.len()
    ));
    Some(lines.join("\n"))
}

/// Adds the path of every entry below `directory`, relative to the first `root`.
fn list(root: &Path, names: &mut Vec<Vec<u8>>) -> Result<()> {
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let directory = root.join(&relative);
        for entry in fs::read_dir(&directory).with_context(|| cannot("list", &directory))? {
            let entry = entry.with_context(|| cannot("list", &directory))?;
            let path = relative.join(entry.file_name());
            if entry
                .file_type()
                .with_context(|| cannot("examine", &path))?
                .is_dir()
            {
                pending.push(path.clone());
            }
            names.push(path.into_os_string().into_vec());
        }
    }
    Ok(())
}

/// One entry as text.
fn line(
    root: &Path,
    name: &[u8],
    digest: Option<Result<String>>,
    first_path: &mut HashMap<(u64, u64), Vec<u8>>,
    detail: Detail,
) -> Result<String> {
    let path = path_of(root, name);
    let meta = fs::symlink_metadata(&path).with_context(|| cannot("examine", &path))?;
    let kind = meta.file_type();
    let mut fields = vec![
        format!("\"gid\": {}", meta.gid()),
        format!("\"mode\": \"0o{:o}\"", meta.mode()),
    ];
    if detail == Detail::All || (detail == Detail::WithoutDirectoryTimes && !kind.is_dir()) {
        fields.push(format!("\"mtime_ns\": {}", mtime_ns(&meta)));
    }
    if kind.is_file() {
        fields.push(format!("\"nlink\": {}", meta.nlink()));
    }
    fields.push(format!("\"path\": {}", quote(&absolute(name))));
    if kind.is_char_device() || kind.is_block_device() {
        fields.push(format!(
            "\"rdev\": [{}, {}]",
            major(meta.rdev()),
            minor(meta.rdev())
        ));
    }
    if kind.is_file() {
        if meta.nlink() > 1 {
            let first = first_path
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| name.to_vec());
            fields.push(format!("\"same_as\": {}", quote(&absolute(first))));
        }
        // A file that was none a moment ago is read now.
        let digest = digest.unwrap_or_else(|| sha256(&path))?;
        fields.push(format!("\"sha256\": \"{digest}\""));
        fields.push(format!("\"size\": {}", meta.size()));
    }
    if kind.is_symlink() {
        let target = fs::read_link(&path).with_context(|| cannot("read the link", &path))?;
        fields.push(format!(
            "\"target\": {}",
            quote(target.as_os_str().as_bytes())
        ));
    }
    fields.push(format!("\"uid\": {}", meta.uid()));
    if let Some(xattrs) = xattrs(&path)? {
        fields.push(format!("\"xattrs\": {xattrs}"));
    }
    Ok(format!("{{{}}}", fields.join(", ")))
}

/// `name` seen from the root of the tree.
fn absolute(name: &[u8]) -> Vec<u8> {
    [b"/", name].concat()
}

fn cannot(action: &str, path: &Path) -> String {
    format!("cannot {action} {}", path.display())
}

/// Nanoseconds since 1970; negative before.
fn mtime_ns(meta: &Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| cannot("open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file
            .read(&mut buffer)
            .with_context(|| cannot("read", path))?
        {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// The extended attributes as a JSON object; `None` if there are none.
fn xattrs(path: &Path) -> Result<Option<String>> {
    let mut names: Vec<_> = xattr::list(path)
        .with_context(|| cannot("list attributes of", path))?
        .filter(|name| name != "security.selinux")
        .collect();
    names.sort();
    let mut fields = Vec::new();
    for name in names {
        // An attribute that vanished between list and get is not there.
        if let Some(value) = xattr::get(path, &name).with_context(|| cannot("read", path))? {
            fields.push(format!("{}: \"{}\"", quote(name.as_bytes()), hex(&value)));
        }
    }
    Ok((!fields.is_empty()).then(|| format!("{{{}}}", fields.join(", "))))
}

/// Lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A JSON string of printable ASCII; bytes that are not UTF-8 become lone surrogates.
fn quote(bytes: &[u8]) -> String {
    let mut text = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        for unit in chunk.valid().encode_utf16() {
            push_unit(&mut text, unit);
        }
        for &byte in chunk.invalid() {
            push_unit(&mut text, 0xdc00 + u16::from(byte));
        }
    }
    text.push('"');
    text
}

fn push_unit(text: &mut String, unit: u16) {
    match u8::try_from(unit).map(char::from) {
        Ok('"') => text.push_str("\\\""),
        Ok('\\') => text.push_str("\\\\"),
        Ok('\n') => text.push_str("\\n"),
        Ok('\r') => text.push_str("\\r"),
        Ok('\t') => text.push_str("\\t"),
        Ok('\u{8}') => text.push_str("\\b"),
        Ok('\u{c}') => text.push_str("\\f"),
        Ok(plain @ ' '..='~') => text.push(plain),
        _ => {
            // Writing into a string cannot fail.
            let _ = write!(text, "\\u{unit:04x}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn names_of_any_bytes() {
        assert_eq!(quote(b"a\"\\\n\x7f"), r#""a\"\\\n\u007f""#);
        assert_eq!(quote("é𝄞".as_bytes()), r#""\u00e9\ud834\udd1e""#);
        assert_eq!(quote(b"\xff\xe2\x82"), r#""\udcff\udce2\udc82""#);
    }

    #[test]
    fn a_changed_byte_shows() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f");
        fs::write(&file, "one").unwrap();
        let before = describe(directory.path(), Detail::WithoutTimes).unwrap();
        fs::write(&file, "two").unwrap();
        let after = describe(directory.path(), Detail::WithoutTimes).unwrap();
        let difference = difference(&before, &after).unwrap();
        assert!(
            difference.contains("- {") && difference.contains("+ {"),
            "{difference}"
        );
        assert!(super::difference(&before, &before).is_none());
    }

    #[test]
    fn hard_links_name_their_first_path() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::write(root.join("b"), "").unwrap();
        fs::hard_link(root.join("b"), root.join("a")).unwrap();
        symlink("b", root.join("c")).unwrap();
        let lines = describe(root, Detail::WithoutTimes).unwrap();
        assert!(
            lines[2].contains(r#""nlink": 2, "path": "/b", "same_as": "/a""#),
            "{}",
            lines[2]
        );
        assert!(lines[3].contains(r#""target": "b""#), "{}", lines[3]);
    }
}
