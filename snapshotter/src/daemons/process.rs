//! Processes that outlive their parent: started, found again, waited for, ended.
//!
//! A process is held by a descriptor of it, so its number can be used by another
//! one meanwhile without harm.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A running process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    descriptor: OwnedFd,
    /// There if we are its parent: somebody has to take note of its end.
    child: Mutex<Option<Child>>,
}

impl Process {
    /// Starts `command` in a process group of its own, with its output appended to
    /// the file `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> io::Result<Self> {
        if let Some(directory) = log.parent() {
            fs::create_dir_all(directory)?;
        }
        let log: File = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.process_group(0).spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok(Self {
            pid,
            descriptor: open(pid)?,
            child: Mutex::new(Some(child)),
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn is_alive(&self) -> bool {
        !self.ends_within(PollTimeout::ZERO)
    }

    /// Waits for its end, however long that takes.
    pub(crate) fn wait(&self) {
        while !self.ends_within(PollTimeout::NONE) {}
        self.reap();
    }

    /// Asks it to end, and insists after `patience`.
    pub(crate) fn end(&self, patience: Duration) {
        self.signal(libc::SIGTERM);
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        if !self.ends_within(patience) {
            tracing::warn!("process {} does not end, killing it", self.pid);
            self.signal(libc::SIGKILL);
            self.ends_within(patience);
        }
        self.reap();
    }

    fn ends_within(&self, timeout: PollTimeout) -> bool {
        let mut descriptors = [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut descriptors, timeout), Ok(1..))
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the descriptor is open as long as `self` exists; no pointer is passed
        // but the null that asks for ordinary signal information.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.descriptor.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }

    fn reap(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(child) = child.as_mut() {
            // It has ended: this does not wait.
            let _ = child.try_wait();
        }
    }
}

/// The process whose command line says that it serves `mountpoint`. Of a daemon of
/// several processes, the one that the others descend from.
pub(crate) fn find(mountpoint: &Path) -> Option<Process> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if pid.unsigned_abs() != std::process::id() && serves(&entry.path(), mountpoint) {
            found.push((pid, parent_of(&entry.path())));
        }
    }
    let (pid, _) = found
        .iter()
        .find(|(_, parent)| !found.iter().any(|(pid, _)| Some(*pid) == *parent))?;
    let process = Process {
        pid: *pid,
        descriptor: open(*pid).ok()?,
        child: Mutex::new(None),
    };
    // Looked at again now that its number cannot be given to another one unnoticed.
    serves(&Path::new("/proc").join(pid.to_string()), mountpoint).then_some(process)
}

/// Whether something is mounted exactly at `point`.
pub(crate) fn is_mounted(point: &Path) -> bool {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|&byte| byte == b'\n').any(|line| {
        let field = line.split(|&byte| byte == b' ').nth(4).unwrap_or_default();
        Path::new(OsStr::from_bytes(field)) == point
    })
}

fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and returns a new descriptor or an error.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn serves(process: &Path, mountpoint: &Path) -> bool {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let mut arguments = line.split(|&byte| byte == 0);
    arguments.any(|argument| argument == b"--mountpoint")
        && arguments.next() == Some(mountpoint.as_os_str().as_bytes())
}

fn parent_of(process: &Path) -> Option<i32> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // After the name, which is in parentheses and may contain anything: state, parent.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_found_by_its_mount_point_and_ends() {
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("mnt");
        let mut command = Command::new("sh");
        command
            .args(["-c", "sleep 600; :", "sh", "--mountpoint"])
            .arg(&point);
        let process = Process::start(&mut command, &directory.path().join("log")).unwrap();
        // The kernel lets a program start a moment before it shows its arguments.
        let began = std::time::Instant::now();
        let again = loop {
            match find(&point) {
                Some(again) => break again,
                None => assert!(began.elapsed() < Duration::from_secs(10), "not found"),
            }
        };
        assert_eq!(again.pid(), process.pid());
        assert!(find(directory.path()).is_none());
        assert!(again.is_alive());
        // The shell ends by the signal; its `sleep` is in the same group.
        // SAFETY: a plain system call on a process group made above.
        unsafe { libc::kill(-process.pid(), libc::SIGKILL) };
        process.end(Duration::from_secs(5));
        assert!(!again.is_alive());
        assert!(find(&point).is_none());
    }

    #[test]
    fn mounts_are_seen() {
        assert!(is_mounted(Path::new("/")));
        assert!(!is_mounted(Path::new("/nonexistent")));
    }
}
