//! Processes that outlive their parent: started, found again, waited for, ended.
//!
//! A process is held by a descriptor of it, so its number can be used by another
//! one meanwhile without harm. It leads a process group, in which its own children are.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawnp};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// Pause between two looks at what is changing.
const LOOK: Duration = Duration::from_millis(1);
/// First descriptor that is handed to a process.
const FIRST: RawFd = 3;

/// A running process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    descriptor: OwnedFd,
    /// Whether it ran before we knew of it.
    found: bool,
}

impl Process {
    /// Starts `command` in a process group of its own, with its output appended to
    /// the file `log`, and with `files` as its descriptors from 3 on.
    ///
    /// Not by the standard library: what it needs to tell of a failure is a descriptor,
    /// too, and could be one of those that `files` replace.
    pub(crate) fn start(command: &Command, log: &Path, files: &[OwnedFd]) -> io::Result<Self> {
        if let Some(directory) = log.parent() {
            fs::create_dir_all(directory)?;
        }
        let log: File = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)?;
        let mut actions = PosixSpawnFileActions::init()?;
        let null = File::open("/dev/null")?;
        actions.add_dup2(null.as_raw_fd(), 0)?;
        for output in [1, 2] {
            actions.add_dup2(log.as_raw_fd(), output)?;
        }
        // Out of the way first: a descriptor may have the number of another.
        let least = FIRST + RawFd::try_from(files.len()).map_err(io::Error::other)?;
        let mut lifted = Vec::with_capacity(files.len());
        for (file, number) in files.iter().zip(FIRST..) {
            let copy = fcntl(file, FcntlArg::F_DUPFD_CLOEXEC(least))?;
            actions.add_dup2(copy, number)?;
            // SAFETY: the kernel has just made it for us alone.
            lifted.push(unsafe { OwnedFd::from_raw_fd(copy) });
        }
        let mut attributes = PosixSpawnAttr::init()?;
        attributes.set_pgroup(Pid::from_raw(0))?;
        // As the standard library does it: programs expect both.
        attributes.set_sigmask(&SigSet::empty())?;
        attributes.set_sigdefault(&SigSet::from(Signal::SIGPIPE))?;
        attributes.set_flags(
            PosixSpawnFlags::POSIX_SPAWN_SETPGROUP
                | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
                | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF,
        )?;
        let program = text(command.get_program())?;
        let arguments = std::iter::once(command.get_program()).chain(command.get_args());
        let arguments = arguments.map(text).collect::<io::Result<Vec<_>>>()?;
        let environment = environment(command)?;
        let pid = posix_spawnp(&program, &actions, &attributes, &arguments, &environment)?;
        Ok(Self {
            pid: pid.as_raw(),
            descriptor: open(pid.as_raw())?,
            found: false,
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it was found rather than started.
    pub(crate) fn was_found(&self) -> bool {
        self.found
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

    /// Sends a signal to all processes of its group.
    pub(crate) fn signal_group(&self, signal: i32) {
        if let Some(group) = self.group() {
            // SAFETY: takes plain numbers.
            unsafe { libc::kill(-group, signal) };
        }
    }

    /// Its process group, if it lives.
    pub(crate) fn group(&self) -> Option<i32> {
        // SAFETY: takes and returns plain numbers.
        let group = unsafe { libc::getpgid(self.pid) };
        // Looked at after its number was used: it was nobody else's then.
        (group > 1 && self.is_alive()).then_some(group)
    }

    /// Kills all processes of its group.
    pub(crate) fn kill_group(&self, patience: Duration) {
        self.signal_group(libc::SIGKILL);
        self.ends_within(PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX));
        self.reap();
    }

    /// A variable of its environment, as it was when it began.
    pub(crate) fn variable(&self, name: &str) -> Option<String> {
        let environment = fs::read(format!("/proc/{}/environ", self.pid)).ok()?;
        // Looked at after its number was used: it was nobody else's then.
        if !self.is_alive() {
            return None;
        }
        let mut lines = environment.split(|&byte| byte == 0);
        let value = lines.find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b"="));
        String::from_utf8(value?.to_vec()).ok()
    }

    fn reap(&self) {
        // If it is our child, it has ended: this does not wait.
        let _ = waitid(
            Id::PIDFd(self.descriptor.as_fd()),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
        );
    }
}

/// The environment that `command` is to have.
fn environment(command: &Command) -> io::Result<Vec<CString>> {
    let mut variables: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => variables.insert(name.to_owned(), value.to_owned()),
            None => variables.remove(name),
        };
    }
    let lines = variables.into_iter().map(|(mut line, value)| {
        line.push("=");
        line.push(value);
        Ok(CString::new(line.into_vec())?)
    });
    lines.collect()
}

fn text(word: &OsStr) -> io::Result<CString> {
    Ok(CString::new(word.as_bytes())?)
}

/// The process whose command line says that it serves `mountpoint`. Of a daemon of
/// several processes, the one that the others descend from.
pub(crate) fn find(mountpoint: &Path) -> Option<Process> {
    loop {
        let family = family(mountpoint).unwrap_or_default();
        if family.is_empty() {
            return None;
        }
        if let Some(process) = eldest(&family, mountpoint) {
            return Some(process);
        }
        // It has just died, and those that it has started may live. A dead one shows no
        // command line, so this ends.
        thread::sleep(LOOK);
    }
}

/// The processes that say so, each with its parent.
fn family(mountpoint: &Path) -> Option<Vec<(i32, Option<i32>)>> {
    let neighbours = neighbours()?.into_iter();
    let found = neighbours.filter(|(_, path)| place_of(path).as_deref() == Some(mountpoint));
    Some(found.map(|(pid, path)| (pid, parent_of(&path))).collect())
}

/// Every mount point that a process says it serves.
pub(crate) fn served() -> BTreeSet<PathBuf> {
    let neighbours = neighbours().unwrap_or_default().into_iter();
    neighbours.filter_map(|(_, path)| place_of(&path)).collect()
}

/// All other processes that see the same mounts, with their directories.
fn neighbours() -> Option<Vec<(i32, PathBuf)>> {
    let mut found = Vec::new();
    let here = fs::read_link("/proc/self/ns/mnt").ok()?;
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // The command line of a process is in its memory, and one of a container that waits
        // for the very daemon we look for may let nobody look into that.
        let same = fs::read_link(entry.path().join("ns/mnt")).is_ok_and(|there| there == here);
        if same && pid.unsigned_abs() != std::process::id() {
            found.push((pid, entry.path()));
        }
    }
    Some(found)
}

/// The one whose parent is not among them, if it still lives.
fn eldest(family: &[(i32, Option<i32>)], mountpoint: &Path) -> Option<Process> {
    let (pid, _) = family
        .iter()
        .find(|(_, parent)| !family.iter().any(|(pid, _)| Some(*pid) == *parent))?;
    let process = Process {
        pid: *pid,
        descriptor: open(*pid).ok()?,
        found: true,
    };
    // Looked at again now that its number cannot be given to another one unnoticed.
    let place = place_of(&Path::new("/proc").join(pid.to_string()));
    (place.as_deref() == Some(mountpoint)).then_some(process)
}

/// Whether something is mounted exactly at `point`.
pub(crate) fn is_mounted(point: &Path) -> bool {
    kind_of_mount(point).is_some()
}

/// The type of the file system that is mounted exactly at `point`.
pub(crate) fn kind_of_mount(point: &Path) -> Option<String> {
    let mut mounts = mounts_in(point).into_iter();
    mounts.find_map(|(place, kind)| (place == point).then_some(kind))
}

/// What is mounted at `point` and below it, with its type, in the order in which it was.
pub(crate) fn mounts_in(point: &Path) -> Vec<(PathBuf, String)> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let lines = table.split(|&byte| byte == b'\n');
    let mounts = lines.filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let place = Path::new(OsStr::from_bytes(fields.nth(4)?));
        if !place.starts_with(point) {
            return None;
        }
        // The number of fields in between varies, and a dash ends them.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some((place.to_owned(), String::from_utf8_lossy(kind).into_owned()))
    });
    mounts.collect()
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

/// The mount point that a process says it serves.
fn place_of(process: &Path) -> Option<PathBuf> {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let mut arguments = line.split(|&byte| byte == 0);
    arguments.find(|argument| *argument == b"--mountpoint")?;
    Some(PathBuf::from(OsStr::from_bytes(arguments.next()?)))
}

fn parent_of(process: &Path) -> Option<i32> {
    status(process)?.get(1)?.parse().ok()
}

/// The memory of all processes, by process group, in KiB.
pub(crate) fn memory_by_group() -> BTreeMap<i32, u64> {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    let page = page
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok());
    let mut groups = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        // Others in there are names for one of them.
        let name = entry.file_name();
        if name
            .to_str()
            .is_some_and(|name| name.parse::<i32>().is_ok())
            && let Some(fields) = status(&entry.path())
            && let Some(group) = fields.get(2).and_then(|group| group.parse().ok())
            && let Some(pages) = fields.get(21).and_then(|pages| pages.parse::<u64>().ok())
        {
            let bytes = pages.saturating_mul(page.unwrap_or_default());
            *groups.entry(group).or_default() += bytes >> 10;
        }
    }
    groups
}

/// The fields of its line in the process table, after its name (proc_pid_stat(5)): state,
/// parent, group and so on.
fn status(process: &Path) -> Option<Vec<String>> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // The name is in parentheses and may contain anything.
    let fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some(fields.map(str::to_owned).collect())
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
        let process = Process::start(&command, &directory.path().join("log"), &[]).unwrap();
        // The kernel lets a program start a moment before it shows its arguments.
        let began = std::time::Instant::now();
        let again = loop {
            match find(&point) {
                Some(again) => break again,
                None => assert!(began.elapsed() < Duration::from_secs(10), "not found"),
            }
        };
        assert_eq!(again.pid(), process.pid());
        assert_eq!(again.variable("PATH"), std::env::var("PATH").ok());
        assert_eq!(again.variable("PAT"), None);
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
    fn descriptors_and_environment_are_handed_over() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let files: Vec<OwnedFd> = ["one", "two", "three"]
            .map(|name| {
                let path = directory.path().join(name);
                fs::write(&path, name).unwrap();
                File::open(path).unwrap().into()
            })
            .into();
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "cat <&3; cat <&4; cat <&5; echo $WORD $HOME; exec cat <&6",
        ]);
        command.env("WORD", "word").env_remove("HOME");
        let process = Process::start(&command, &log, &files).unwrap();
        process.wait();
        let output = fs::read_to_string(log).unwrap();
        assert!(output.starts_with("onetwothreeword\n"), "{output}");
        // Nothing else is open.
        assert!(output.contains('6'), "{output}");
        let missing = Process::start(
            &Command::new("no-such-program"),
            &directory.path().join("log"),
            &files,
        );
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn memory_is_counted_by_group() {
        let group = nix::unistd::getpgrp().as_raw();
        let memory = memory_by_group();
        // Ours is one of the group; a program of ours is never as small, or as large.
        assert!((1 << 10..1 << 25).contains(&memory[&group]), "{memory:?}");
    }

    #[test]
    fn mounts_are_seen() {
        assert!(is_mounted(Path::new("/")));
        assert_eq!(kind_of_mount(Path::new("/proc")).unwrap(), "proc");
        assert!(!is_mounted(Path::new("/nonexistent")));
        let all = mounts_in(Path::new("/"));
        assert!(all.len() > mounts_in(Path::new("/proc")).len(), "{all:?}");
    }
}
