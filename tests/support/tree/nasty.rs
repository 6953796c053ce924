//! A directory tree that has one of everything a file system image must keep.
//!
//! Made the same way every time, so that two builds of it can be compared.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::mkfifo;

use crate::command::succeed;

/// Size of the file that needs more than 32 bits.
pub const HUGE: u64 = (4 << 30) + (5 << 20) + 123;

/// Which entries to leave out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Sockets: a tar cannot carry them.
    pub without_sockets: bool,
    /// The file above 4 GiB: minutes of work for tools that do not know holes.
    pub without_huge: bool,
}

/// Fills the existing empty directory `root`.
///
/// # Errors
/// Not running as root, or the file system of `root` lacks a feature.
pub fn make(root: &Path, options: Options) -> Result<()> {
    files(&root.join("files"))?;
    if !options.without_huge {
        huge(&root.join("files/huge"))?;
    }
    names(&root.join("names"))?;
    directories(&root.join("directories"))?;
    links(&root.join("links"))?;
    special(&root.join("special"), options)?;
    attributes(&root.join("attributes"))?;
    owners(&root.join("owners"))?;
    settle_times(root)?;
    times(&root.join("times"))?;
    settle(root)
}

/// Sizes around every boundary that chunks and blocks have.
fn files(at: &Path) -> Result<()> {
    fs::create_dir(at)?;
    const MIB: usize = 1 << 20;
    for size in [
        0,
        1,
        4095,
        4096,
        4097,
        65_536,
        MIB - 1,
        MIB,
        MIB + 1,
        3 * MIB + 4097,
    ] {
        fs::write(at.join(format!("text-{size}")), text(size))?;
        fs::write(at.join(format!("noise-{size}")), noise(size, size))?;
    }
    fs::write(at.join("zeros"), vec![0; 2 * MIB + 77])?;
    fs::write(at.join("twin-1"), noise(150_000, 1))?;
    fs::write(at.join("twin-2"), noise(150_000, 1))?;
    let sparse = File::create(at.join("sparse"))?;
    sparse.write_all_at(b"head", 0)?;
    sparse.write_all_at(&noise(5000, 2), 9_000_001)?;
    sparse.set_len(20_000_000)?;
    File::create(at.join("hole"))?.set_len(3_000_001)?;
    Ok(())
}

/// Data before, across and after the 4 GiB mark, and nothing between.
fn huge(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(HUGE)?;
    file.write_all_at(b"at the start", 0)?;
    file.write_all_at(&noise(20_000, 3), (4 << 30) - 10_000)?;
    file.write_all_at(b"at the end", HUGE - 10)?;
    Ok(())
}

fn names(at: &Path) -> Result<()> {
    fs::create_dir(at)?;
    let long = "n".repeat(255);
    let names: [&[u8]; 14] = [
        long.as_bytes(),
        b"\xff\xfe not UTF-8 \x80",
        b"new\nline",
        b" space ",
        b"-dash",
        b"...",
        b"..two",
        b".hidden",
        b"back\\slash",
        b"quote'\"",
        b"Upper",
        b"upper",
        "\u{e9}\u{4e2d}\u{6587}".as_bytes(),
        b"\x01control",
    ];
    for name in names {
        fs::write(at.join(OsStr::from_bytes(name)), name)?;
    }
    // Deep enough for a path well above 255 bytes.
    let deep = at.join(["a-fairly-long-directory-name"; 20].join("/"));
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("bottom"), "deep")?;
    Ok(())
}

fn directories(at: &Path) -> Result<()> {
    for count in [0, 1, 1000] {
        let directory = at.join(format!("of-{count}"));
        fs::create_dir_all(&directory)?;
        for index in 0..count {
            fs::write(
                directory.join(format!("an-entry-of-some-length-{index:04}")),
                text(index),
            )?;
        }
    }
    Ok(())
}

fn links(at: &Path) -> Result<()> {
    fs::create_dir_all(at.join("elsewhere"))?;
    fs::write(at.join("hard-1"), text(6000))?;
    fs::hard_link(at.join("hard-1"), at.join("hard-2"))?;
    fs::hard_link(at.join("hard-1"), at.join("elsewhere/hard-3"))?;
    symlink("hard-1", at.join("relative"))?;
    symlink("/absolute/../path", at.join("absolute"))?;
    symlink("nowhere", at.join("dangling"))?;
    symlink("t".repeat(4000), at.join("long"))?;
    symlink(OsStr::from_bytes(b"\xff"), at.join("not-utf-8"))?;
    symlink("self", at.join("self"))?;
    Ok(())
}

fn special(at: &Path, options: Options) -> Result<()> {
    fs::create_dir(at)?;
    let mode = Mode::from_bits_truncate(0o640);
    mknod(&at.join("null"), SFlag::S_IFCHR, mode, makedev(1, 3)).context("mknod needs root")?;
    mknod(&at.join("disk"), SFlag::S_IFBLK, mode, makedev(259, 70_000))?;
    mkfifo(&at.join("fifo"), mode)?;
    if !options.without_sockets {
        drop(UnixListener::bind(at.join("socket"))?);
    }
    Ok(())
}

fn attributes(at: &Path) -> Result<()> {
    fs::create_dir(at)?;
    let file = at.join("file");
    fs::write(&file, "has attributes")?;
    xattr::set(&file, "user.small", b"1")?;
    xattr::set(&file, "user.empty", b"")?;
    xattr::set(&file, "user.binary", &noise(300, 4))?;
    xattr::set(&file, "trusted.overlay.not", b"trusted")?;
    // cap_net_raw+ep
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    xattr::set(&file, "security.capability", &capability)?;
    for index in 0..3 {
        // The same attribute on several files is worth storing once.
        let shared = at.join(format!("shared-{index}"));
        fs::write(&shared, "")?;
        xattr::set(&shared, "user.shared", &[b's'; 200])?;
    }
    let directory = at.join("directory");
    fs::create_dir(&directory)?;
    xattr::set(&directory, "user.of-a-directory", b"v")?;
    let listed = at.join("acl");
    fs::write(&listed, "")?;
    succeed(
        Command::new("setfacl")
            .args(["-m", "u:1000:rw,g:70000:r"])
            .arg(&listed),
    )?;
    succeed(
        Command::new("setfacl")
            .args(["-d", "-m", "u:1001:rwx"])
            .arg(&directory),
    )?;
    Ok(())
}

fn owners(at: &Path) -> Result<()> {
    fs::create_dir(at)?;
    for (name, uid, gid, mode) in [
        ("big-ids", 70_000, 4_000_000_000, 0o644),
        ("setuid", 0, 0, 0o4755),
        ("setgid", 1000, 1000, 0o2755),
        ("unreadable", 1000, 0, 0o000),
    ] {
        let path = at.join(name);
        fs::write(&path, name)?;
        // Changing the owner clears these bits, so the mode comes last.
        lchown(&path, Some(uid), Some(gid))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    let sticky = at.join("sticky");
    fs::create_dir(&sticky)?;
    fs::set_permissions(&sticky, fs::Permissions::from_mode(0o1777))?;
    symlink("owned", at.join("link"))?;
    lchown(at.join("link"), Some(99_999), Some(88_888))?;
    Ok(())
}

/// Times before 1970, beyond 2038, and with every digit.
fn times(at: &Path) -> Result<()> {
    fs::create_dir(at)?;
    for (name, seconds, nanoseconds) in [
        ("epoch", 0, 0),
        ("before-1970", -86_400 * 365, 250_000_000),
        ("just-before", -1, 999_999_999),
        ("precise", 1_234_567_890, 123_456_789),
        ("after-2038", 4_000_000_000, 1),
    ] {
        let path = at.join(name);
        fs::write(&path, name)?;
        set_mtime(&path, TimeSpec::new(seconds, nanoseconds))?;
    }
    Ok(())
}

/// Gives every entry a time that depends on its name only.
fn settle_times(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            settle_times(&entry.path())?;
        }
        let length = i64::try_from(entry.file_name().len())?;
        set_mtime(
            &entry.path(),
            TimeSpec::new(1_700_000_000 + length, 1_000_001 * length),
        )?;
    }
    Ok(())
}

/// The directories that were touched after [`settle_times`].
fn settle(root: &Path) -> Result<()> {
    set_mtime(&root.join("times"), TimeSpec::new(1_700_000_000, 5))?;
    set_mtime(root, TimeSpec::new(1_700_000_000, 987_654_321))
}

/// Sets the modification time of `path` itself, symbolic links included.
fn set_mtime(path: &Path, time: TimeSpec) -> Result<()> {
    utimensat(
        AT_FDCWD,
        path,
        &time,
        &time,
        UtimensatFlags::NoFollowSymlink,
    )
    .with_context(|| format!("cannot set the time of {}", path.display()))
}

/// Compressible bytes.
fn text(size: usize) -> Vec<u8> {
    b"lazy chunk blob layer digest "
        .iter()
        .copied()
        .cycle()
        .take(size)
        .collect()
}

/// Bytes that do not compress, from a fixed seed: xorshift, truncated to its low byte.
#[must_use]
pub fn noise(size: usize, seed: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::try_from(seed).unwrap_or_default();
    (0..size)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}
