//! Who keeps a mount busy.
//!
//! A mount cannot be taken down while somebody uses it. Who that is can be read in
//! `/proc`: working directories, open files and mapped files of processes, and other
//! file systems that are stacked on it. The latter matter twice: an overlay does not
//! keep the kernel from unmounting what lies below it, so it has to be found *before*.
//!
//! What `/proc` shows is a moment; the result is for people, and for the decision to
//! wait. Promises nothing about processes that it may not look into.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use crate::mountinfo;

/// Most holders that are named.
const MAX_NAMED: usize = 8;

/// Somebody who uses a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// A process, and how it uses the mount.
    Process {
        /// Its id.
        pid: u32,
        /// Its name.
        name: String,
        /// Working directory, open file, …
        how: &'static str,
    },
    /// Another mount, of the same file system or stacked on it.
    Mount {
        /// A process that sees it.
        pid: u32,
        /// Type of the file system.
        kind: String,
        /// Where it is mounted, as that process sees it.
        point: PathBuf,
    },
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, name, how } => write!(f, "process {pid} ({name}): {how}"),
            Self::Mount { pid, kind, point } => {
                write!(f, "{kind} on {} (seen by process {pid})", point.display())
            }
        }
    }
}

/// The holders as one line of text.
pub(crate) fn list(holders: &[Holder]) -> String {
    let mut named: Vec<String> = holders.iter().map(Holder::to_string).collect();
    if named.is_empty() {
        return "somebody who cannot be seen from here".to_owned();
    }
    if named.len() > MAX_NAMED {
        let more = named.len() - MAX_NAMED;
        named.truncate(MAX_NAMED);
        named.push(format!("{more} more"));
    }
    named.join("; ")
}

/// Processes that use the file system with this device number, as `st_dev` has it.
pub(crate) fn processes(device: u64) -> Vec<Holder> {
    let mut holders = Vec::new();
    for pid in pids() {
        if let Some(how) = use_of(pid, device) {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            holders.push(Holder::Process {
                pid,
                name: name.trim().to_owned(),
                how,
            });
        }
    }
    holders
}

/// Overlays that have a directory below `point` as a layer, in any namespace where
/// a process lives.
pub(crate) fn overlays(point: &Path) -> Vec<Holder> {
    mounts(|entry| entry.kind == "overlay" && has_layer(&entry.options, point))
}

/// Mounts of the file system with this device number, in any namespace.
pub(crate) fn copies(device: u64) -> Vec<Holder> {
    let wanted = (major(device), minor(device));
    mounts(|entry| (u64::from(entry.device.0), u64::from(entry.device.1)) == wanted)
}

fn mounts(wanted: impl Fn(&mountinfo::Entry) -> bool) -> Vec<Holder> {
    let mut holders = Vec::new();
    let mut seen = HashSet::new();
    for pid in pids() {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        if namespace.is_none_or(|namespace| !seen.insert(namespace)) {
            continue;
        }
        let entries = mountinfo::of(&pid.to_string()).unwrap_or_default();
        for entry in entries.into_iter().filter(&wanted) {
            holders.push(Holder::Mount {
                pid,
                kind: entry.kind,
                point: entry.mountpoint,
            });
        }
    }
    holders
}

fn pids() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

fn use_of(pid: u32, device: u64) -> Option<&'static str> {
    let on_device = |path: PathBuf| fs::metadata(path).is_ok_and(|found| found.dev() == device);
    let base = PathBuf::from(format!("/proc/{pid}"));
    for (entry, how) in [
        ("cwd", "working directory"),
        ("root", "root directory"),
        ("exe", "running program"),
    ] {
        if on_device(base.join(entry)) {
            return Some(how);
        }
    }
    let files = fs::read_dir(base.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    if files.map(|file| file.path()).any(on_device) {
        return Some("open file");
    }
    let maps = fs::read_to_string(base.join("maps")).unwrap_or_default();
    maps.lines()
        .any(|line| mapped_device(line) == Some((major(device), minor(device))))
        .then_some("mapped file")
}

/// The device of a line of `maps`: `range flags offset major:minor inode path`.
fn mapped_device(line: &str) -> Option<(u64, u64)> {
    let (major, minor) = line.split_ascii_whitespace().nth(3)?.split_once(':')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(major)?, number(minor)?))
}

/// Whether a layer of an overlay lies in `point`. Options look like
/// `ro,lowerdir=/a:/b,upperdir=/u` or `lowerdir+=/a,lowerdir+=/b`.
fn has_layer(options: &str, point: &Path) -> bool {
    options
        .split(',')
        .filter_map(|option| option.split_once('='))
        .filter(|(key, _)| matches!(*key, "lowerdir" | "lowerdir+" | "datadir+"))
        .flat_map(|(_, layers)| layers.split(':'))
        .any(|layer| Path::new(layer).starts_with(point))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_below_the_point_count() {
        let point = Path::new("/mnt/image");
        for (options, wanted) in [
            ("ro,lowerdir=/mnt/image", true),
            ("rw,lowerdir=/a:/mnt/image/sub,upperdir=/u", true),
            ("rw,lowerdir+=/a,lowerdir+=/mnt/image", true),
            ("rw,lowerdir=/mnt/image2:/a", false),
            ("rw,lowerdir=/a,upperdir=/mnt/image", false),
        ] {
            assert_eq!(has_layer(options, point), wanted, "{options}");
        }
    }

    #[test]
    fn a_line_of_maps_names_its_device() {
        let line = "7f00-7f10 r--p 00000000 fe:01 1234    /usr/lib/libc.so.6";
        assert_eq!(mapped_device(line), Some((0xfe, 1)));
        assert_eq!(mapped_device("7f00-7f10"), None);
    }

    #[test]
    fn an_open_file_is_found() {
        let file = tempfile::tempfile().unwrap();
        let found = use_of(std::process::id(), file.metadata().unwrap().dev());
        assert!(found.is_some());
        assert_eq!(use_of(std::process::id(), u64::MAX), None);
    }

    #[test]
    fn a_long_list_is_cut() {
        let holder = |pid| Holder::Process {
            pid,
            name: "cat".into(),
            how: "open file",
        };
        let text = list(&(1..=10).map(holder).collect::<Vec<_>>());
        assert!(text.starts_with("process 1 (cat): open file; process 2"));
        assert!(text.ends_with("; 2 more"), "{text}");
    }
}
