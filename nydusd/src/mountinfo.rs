//! The mount table as the kernel shows it (`proc_pid_mountinfo(5)`).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use nix::sys::stat::makedev;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Number of the mount.
    id: u64,
    /// Number of the mount that it is on.
    parent: u64,
    /// `major:minor` of the file system, as `stat` shows it.
    pub device: (u32, u32),
    /// Where it is mounted, as seen from the process's root.
    pub mountpoint: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// What it was mounted from.
    pub source: PathBuf,
    /// Options of the file system, separated by commas.
    pub options: String,
}

/// The mounts that a process sees; `self` is this one.
///
/// # Errors
/// When the table cannot be read: the process may be gone.
pub(crate) fn of(process: &str) -> io::Result<Vec<Entry>> {
    let table = std::fs::read(format!("/proc/{process}/mountinfo"))?;
    Ok(parse(&table))
}

impl Entry {
    /// `device` as one number, as `stat` shows it.
    pub(crate) fn device_number(&self) -> u64 {
        makedev(self.device.0.into(), self.device.1.into())
    }
}

/// The mount that is visible at `mountpoint`: the one on top.
pub(crate) fn at(mountpoint: &Path) -> Option<Entry> {
    stack(mountpoint).pop()
}

/// The mounts at `mountpoint`, the one on top last. One that was made later may be
/// below: mounts can be slid beneath others.
pub(crate) fn stack(mountpoint: &Path) -> Vec<Entry> {
    let mut entries = of("self").unwrap_or_default();
    entries.retain(|entry| entry.mountpoint == mountpoint);
    in_order(entries)
}

/// From the lowest to the one on top.
fn in_order(mut entries: Vec<Entry>) -> Vec<Entry> {
    let mut ordered = Vec::new();
    while !entries.is_empty() {
        let above = |entry: &Entry| entries.iter().any(|other| other.id == entry.parent);
        // A table that goes round in circles is none of the kernel's.
        let lowest = entries.iter().position(|entry| !above(entry)).unwrap_or(0);
        ordered.push(entries.remove(lowest));
    }
    ordered
}

fn parse(table: &[u8]) -> Vec<Entry> {
    table
        .split(|&byte| byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

/// `id parent major:minor root mountpoint options [tags] - type source options`
fn parse_line(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let device = std::str::from_utf8(fields.next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let mountpoint = unescape(fields.nth(1)?);
    fields.find(|field| *field == b"-")?;
    let text = |field: Vec<u8>| String::from_utf8_lossy(&field).into_owned();
    Some(Entry {
        id,
        parent,
        device: (major.parse().ok()?, minor.parse().ok()?),
        mountpoint: OsString::from_vec(mountpoint).into(),
        kind: text(unescape(fields.next()?)),
        source: OsString::from_vec(unescape(fields.next()?)).into(),
        options: text(unescape(fields.next()?)),
    })
}

/// Undoes `\040` and the like: space, tab, line end and backslash in octal.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = (byte == b'\\').then(|| octal(after)).flatten();
        out.push(escaped.unwrap_or(byte));
        rest = match escaped {
            Some(_) => after.get(3..).unwrap_or_default(),
            None => after,
        };
    }
    out
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits = std::str::from_utf8(digits.get(..3)?).ok()?;
    u8::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_tags() {
        let table =
            b"44 27 0:40 / /tmp/a\\040b ro,nosuid shared:5 master:1 - erofs /x/boot ro,acl\n\
                      27 1 254:0 / / rw - ext4 /dev/vda rw\n\
                      broken line\n";
        let entries = parse(table);
        assert_eq!(entries.len(), 2);
        assert_eq!(
            entries[0],
            Entry {
                id: 44,
                parent: 27,
                device: (0, 40),
                mountpoint: "/tmp/a b".into(),
                kind: "erofs".into(),
                source: "/x/boot".into(),
                options: "ro,acl".into(),
            }
        );
        assert_eq!(entries[1].mountpoint, Path::new("/"));
    }

    #[test]
    fn a_mount_that_was_slid_beneath_is_not_on_top() {
        let table = b"50 49 0:50 / /m ro - erofs old ro\n\
                      49 27 0:49 / /m ro - erofs new ro\n";
        let order: Vec<_> = in_order(parse(table)).into_iter().map(|it| it.id).collect();
        assert_eq!(order, [49, 50]);
    }

    #[test]
    fn odd_escapes_stay() {
        assert_eq!(unescape(b"\\134040\\9\\"), b"\\040\\9\\");
    }

    #[test]
    fn this_process_has_a_root() {
        assert!(at(Path::new("/")).is_some());
    }
}
