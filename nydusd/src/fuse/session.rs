//! One FUSE mount: its entry in the mount table and its `/dev/fuse` descriptor.
//!
//! Mounting is `mount(2)` itself, without a helper program, so it needs
//! `CAP_SYS_ADMIN`. Requests are read with plain blocking reads: the kernel wakes
//! one waiting thread per request, and ends every read with `ENODEV` when the
//! file system is unmounted, which is how threads learn that it is over.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context as _, bail, ensure};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{major, minor};

use crate::erofs::sys::{Detached, FsContext};
use crate::mountinfo;

/// Largest data of one request or reply, in bytes: 256 pages, the kernel's limit.
pub(crate) const MAX_DATA: usize = 1 << 20;
/// Room for the headers in front of the data, in bytes.
const HEADERS: usize = 4096;
/// Size of a buffer that holds any request or any reply, in bytes.
pub(crate) const BUFFER_SIZE: usize = MAX_DATA + HEADERS;
/// Read-ahead window, in KiB: as much as one request carries.
const READ_AHEAD_KIB: u32 = 1024;

/// What the mount table shows as source.
const SOURCE: &str = "rafs";

/// A mounted FUSE file system.
#[derive(Debug)]
pub(crate) struct Session {
    mountpoint: PathBuf,
    device: File,
    begun: OnceLock<()>,
    /// Whether requests that are sent again are refused.
    refuses_resent: bool,
}

impl Session {
    /// Mounts on `mountpoint`; requests wait until somebody reads [`Session::device`].
    ///
    /// # Errors
    /// When the mount point is no directory, or the kernel refuses; the message says
    /// which, and what usually helps.
    pub(crate) fn mount(mountpoint: &Path, device: File) -> anyhow::Result<Self> {
        let mountpoint = check_mountpoint(mountpoint)?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={BUFFER_SIZE}",
            device.as_raw_fd()
        );
        let flags =
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        mount(
            Some(SOURCE),
            &mountpoint,
            Some("fuse"),
            flags,
            Some(options.as_str()),
        )
        .map_err(|errno| {
            let hint = if errno == Errno::EPERM {
                "; mounting needs CAP_SYS_ADMIN"
            } else {
                ""
            };
            anyhow::Error::new(errno)
                .context(format!("cannot mount on {}{hint}", mountpoint.display()))
        })?;
        Ok(Self {
            mountpoint,
            device,
            begun: OnceLock::new(),
            refuses_resent: false,
        })
    }

    /// Makes a mount that nobody sees yet, and that will be on `mountpoint`.
    ///
    /// # Errors
    /// When the kernel refuses, with its own words.
    pub(crate) fn prepare(mountpoint: &Path, device: File) -> anyhow::Result<(Self, Detached)> {
        let make = |files: &FsContext| {
            files.set(c"source", SOURCE)?;
            files.set(c"fd", &device.as_raw_fd().to_string())?;
            files.set(c"rootmode", "40000")?;
            files.set(c"user_id", "0")?;
            files.set(c"group_id", "0")?;
            files.set_flag(c"default_permissions")?;
            files.set_flag(c"allow_other")?;
            files.set(c"max_read", &BUFFER_SIZE.to_string())?;
            files.mount()
        };
        let files = FsContext::open(c"fuse").context("the kernel has no FUSE")?;
        let detached = make(&files)
            .with_context(|| format!("FUSE refused the mount ({})", files.explain()))?;
        let session = Self::adopt(mountpoint, device, false);
        Ok((session, detached))
    }

    /// Opens the way to the kernel, for a mount that is still to be made.
    ///
    /// # Errors
    /// When `/dev/fuse` cannot be opened.
    pub(crate) fn open_device() -> anyhow::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .context("cannot open /dev/fuse; load the kernel module with `modprobe fuse`")
    }

    /// The mount of a predecessor.
    ///
    /// * `refuses_resent`: what it had taken and not answered ([`Session::resend`]) is
    ///   to be refused.
    pub(crate) fn adopt(mountpoint: &Path, device: File, refuses_resent: bool) -> Self {
        Self {
            mountpoint: mountpoint.to_owned(),
            device,
            begun: OnceLock::new(),
            refuses_resent,
        }
    }

    /// Whether the request with this number has to be refused: a predecessor had it.
    pub(crate) fn refuses(&self, unique: u64) -> bool {
        /// `FUSE_UNIQUE_RESEND`: the kernel marks what it sends again.
        const RESENT: u64 = 1 << 63;
        self.refuses_resent && unique & RESENT != 0
    }

    /// Has the kernel send again what a predecessor had taken and not answered.
    ///
    /// # Errors
    /// When the kernel cannot (before Linux 6.9), which leaves these requests waiting.
    pub(crate) fn resend(&self) -> std::io::Result<()> {
        use std::io::Write as _;
        /// `FUSE_NOTIFY_RESEND`
        const RESEND: u32 = 7;
        let mut message = [0; 16];
        let fields = message.split_at_mut(4);
        fields.0.copy_from_slice(&native(16));
        if let Some(code) = fields.1.first_chunk_mut() {
            *code = native(RESEND);
        }
        (&self.device).write_all(&message)
    }

    /// Where it is mounted.
    pub(crate) fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The descriptor that requests are read from and replies written to.
    pub(crate) fn device(&self) -> &File {
        &self.device
    }

    /// Waits until the kernel and the threads behind [`Session::device`] agreed
    /// on how to talk, then tunes what can only be tuned after that. Returns the
    /// device number of the file system.
    ///
    /// # Errors
    /// When somebody has unmounted it already.
    pub(crate) fn wait_until_served(&self) -> anyhow::Result<u64> {
        self.wait_until_begun();
        let entry = mountinfo::at(&self.mountpoint)
            .with_context(|| format!("{} is not mounted any more", self.mountpoint.display()))?;
        let device = entry.device_number();
        set_read_ahead(device);
        Ok(device)
    }

    /// Waits until the kernel and the threads behind [`Session::device`] agreed on how
    /// to talk.
    pub(crate) fn wait_until_begun(&self) {
        // Not by a request of our own: killed while it waits for itself, this process
        // would never be seen to end.
        self.begun.wait();
    }

    /// The first request was answered, or never will be.
    pub(crate) fn begin(&self) {
        // Usually not for the first time.
        let _ = self.begun.set(());
    }
}

/// The mount point as an absolute path without symbolic links.
pub(crate) fn check_mountpoint(path: &Path) -> anyhow::Result<PathBuf> {
    let full = path
        .canonicalize()
        .map_err(|err| match err.raw_os_error() {
            Some(libc::ENOTCONN) => anyhow::anyhow!(
                "mount point {0} is left over from a daemon that died; run `umount {0}` first",
                path.display()
            ),
            _ => anyhow::Error::new(err).context(format!("mount point {}", path.display())),
        })?;
    ensure!(
        full.is_dir(),
        "mount point {} is not a directory",
        full.display()
    );
    if full == Path::new("/") {
        bail!("mount point is the root of the system; choose a directory");
    }
    Ok(full)
}

#[allow(
    clippy::host_endian_bytes,
    reason = "the kernel's structures are native"
)]
fn native(number: u32) -> [u8; 4] {
    number.to_ne_bytes()
}

/// Lets the kernel read as far ahead as one request can carry.
pub(crate) fn set_read_ahead(device: u64) {
    let path = format!(
        "/sys/class/bdi/{}:{}/read_ahead_kb",
        major(device),
        minor(device)
    );
    if let Err(err) = std::fs::write(&path, READ_AHEAD_KIB.to_string()) {
        tracing::warn!("{path}: {err}; sequential reads stay at the kernel's read-ahead");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_must_be_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            check_mountpoint(dir.path()).unwrap(),
            dir.path().canonicalize().unwrap()
        );
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let err = check_mountpoint(&file).unwrap_err().to_string();
        assert!(err.contains("file is not a directory"), "{err}");
        let err = format!(
            "{:#}",
            check_mountpoint(&dir.path().join("absent")).unwrap_err()
        );
        assert!(err.contains("absent: No such file"), "{err}");
        assert!(check_mountpoint(Path::new("/")).is_err());
    }
}
