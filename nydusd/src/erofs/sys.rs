//! The system calls that no library of ours wraps: mounting by `fsopen(2)` and its
//! kin, pre-access events of `fanotify(7)`, and word of a file system's end.
//!
//! Every function is a safe wrapper that owns what it returns. Constants carry the
//! kernel's names (`linux/mount.h`, `linux/fanotify.h`).

use std::ffi::{CStr, CString, c_int, c_long, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::ptr;

const FSOPEN_CLOEXEC: c_int = 1;
const FSCONFIG_SET_FLAG: c_int = 0;
const FSCONFIG_SET_STRING: c_int = 1;
const FSCONFIG_CMD_CREATE: c_int = 6;
const FSMOUNT_CLOEXEC: c_int = 1;
const MOUNT_ATTR_RDONLY: c_int = 0x1;
const MOUNT_ATTR_NOSUID: c_int = 0x2;
const MOUNT_ATTR_NODEV: c_int = 0x4;
const MOUNT_ATTR_NOATIME: c_int = 0x10;
const MOVE_MOUNT_F_EMPTY_PATH: c_int = 0x4;
const MOVE_MOUNT_BENEATH: c_int = 0x200;

/// An access that has not happened yet; the reader waits for our answer.
const FAN_PRE_ACCESS: u64 = 0x0010_0000;

/// A file system that is being put together.
#[derive(Debug)]
pub(crate) struct FsContext(OwnedFd);

impl FsContext {
    /// Begins with a file system of type `kind`.
    ///
    /// # Errors
    /// `ENODEV` if the kernel has no such type, `EPERM` without `CAP_SYS_ADMIN`.
    pub(crate) fn open(kind: &CStr) -> io::Result<Self> {
        // SAFETY: the name is a valid C string for the time of the call.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) };
        owned(fd).map(Self)
    }

    /// Sets an option with a value of at most 255 bytes.
    ///
    /// # Errors
    /// As the kernel says; [`FsContext::explain`] may know more.
    pub(crate) fn set(&self, key: &CStr, value: &str) -> io::Result<()> {
        let value = CString::new(value)?;
        self.config(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr().cast())
    }

    /// Sets an option without a value.
    ///
    /// # Errors
    /// As for [`FsContext::set`].
    pub(crate) fn set_flag(&self, key: &CStr) -> io::Result<()> {
        self.config(FSCONFIG_SET_FLAG, key.as_ptr(), ptr::null())
    }

    /// Opens the file system and returns it as a mount that nobody sees yet:
    /// read-only, without devices and set-id programs, and without access times.
    ///
    /// # Errors
    /// As for [`FsContext::set`].
    pub(crate) fn mount(&self) -> io::Result<Detached> {
        self.config(FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
        let attributes =
            MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOATIME;
        // SAFETY: takes a descriptor that is open and plain numbers.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                FSMOUNT_CLOEXEC,
                attributes,
            )
        };
        let mount = owned(fd)?;
        let device = device_of(&mount)?;
        Ok(Detached { mount, device })
    }

    /// What the kernel has noted about failed steps, in its own words.
    pub(crate) fn explain(&self) -> String {
        let mut words = Vec::new();
        let mut buffer = [0; 1024];
        while let Ok(len) = nix::unistd::read(&self.0, &mut buffer) {
            let line = String::from_utf8_lossy(buffer.get(..len).unwrap_or_default());
            // One letter for the severity, a space, and the message.
            words.push(line.trim().get(2..).unwrap_or_default().to_owned());
            if len == 0 || words.len() > 8 {
                break;
            }
        }
        words.join("; ")
    }

    fn config(&self, command: c_int, key: *const i8, value: *const c_void) -> io::Result<()> {
        // SAFETY: `key` and `value` are null or valid for the time of the call, in
        // the form that `command` wants: the callers above see to both.
        let done = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                key,
                value,
                0,
            )
        };
        check(done)
    }
}

/// Where a mount becomes visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// Above whatever is there.
    Top,
    /// Below the mount that is there, so that it is seen when that one goes.
    Beneath,
}

/// A mount that nobody sees yet. It goes away with this, unless it was attached.
#[derive(Debug)]
pub(crate) struct Detached {
    mount: OwnedFd,
    device: u64,
}

impl Detached {
    /// Device number of its file system, as `stat` shows it.
    pub(crate) fn device(&self) -> u64 {
        self.device
    }

    /// A path to its root, for this process.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.mount.as_raw_fd()).into()
    }

    /// Makes it visible at `target`.
    ///
    /// # Errors
    /// As the kernel says.
    pub(crate) fn attach(&self, target: &Path, layer: Layer) -> io::Result<()> {
        let target = CString::new(target.as_os_str().as_bytes())?;
        let flags = match layer {
            Layer::Top => MOVE_MOUNT_F_EMPTY_PATH,
            Layer::Beneath => MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_BENEATH,
        };
        // SAFETY: both strings are valid C strings for the time of the call.
        let done = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                flags,
            )
        };
        check(done)
    }
}

/// Device number of the file system of a mount, without asking whoever serves it.
///
/// # Errors
/// As `statx(2)`.
pub(crate) fn device_of(mount: &OwnedFd) -> io::Result<u64> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: plain integers, for which zero is a value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a valid C string and the structure large enough, for the time
    // of the call.
    let done = unsafe { libc::statx(mount.as_raw_fd(), c"".as_ptr(), flags, 0, &mut found) };
    check(done.into())?;
    Ok(libc::makedev(found.stx_dev_major, found.stx_dev_minor))
}

/// A group that is asked before the content of marked files is used. Its events come
/// with read-only descriptors, and no event is ever dropped for want of room.
///
/// # Errors
/// `EINVAL` if the kernel has no pre-content events, `EPERM` without `CAP_SYS_ADMIN`.
pub(crate) fn event_group() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_PRE_CONTENT
        | libc::FAN_CLOEXEC
        | libc::FAN_UNLIMITED_QUEUE
        | libc::FAN_UNLIMITED_MARKS;
    let events = libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC;
    // SAFETY: takes plain numbers.
    let fd = unsafe { libc::fanotify_init(flags, events.cast_unsigned()) };
    owned(fd.into()).map_err(|error| exhausted(error, "fs.fanotify.max_user_groups"))
}

/// `EMFILE` of a system call that has a limit of its own, beside that of descriptors.
///
/// * `sysctl`: which.
fn exhausted(error: io::Error, sysctl: &str) -> io::Error {
    if error.raw_os_error() != Some(libc::EMFILE) {
        return error;
    }
    let words = format!("{error}: the limit is sysctl {sysctl}, or that of open files");
    io::Error::new(error.kind(), words)
}

/// Whether accesses to a file are asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// From now on.
    Add,
    /// No more.
    Remove,
}

/// Changes the mark of `file` in `group`.
///
/// # Errors
/// `EOPNOTSUPP` if the file system of `file` has no such events.
pub(crate) fn mark(group: &OwnedFd, mark: Mark, file: &File) -> io::Result<()> {
    let flags = match mark {
        Mark::Add => libc::FAN_MARK_ADD,
        Mark::Remove => libc::FAN_MARK_REMOVE,
    };
    // SAFETY: a null path means the file behind the descriptor, which is open.
    let done = unsafe {
        libc::fanotify_mark(
            group.as_raw_fd(),
            flags,
            FAN_PRE_ACCESS,
            file.as_raw_fd(),
            ptr::null(),
        )
    };
    check(done.into())
}

/// Answers an event of `group`.
///
/// * `name`: the descriptor that came with it, or one with its number.
///
/// # Errors
/// `ENOENT` if no event of that number waits for an answer.
pub(crate) fn respond(group: &OwnedFd, name: &OwnedFd, response: u32) -> io::Result<()> {
    let response = libc::fanotify_response {
        fd: name.as_raw_fd(),
        response,
    };
    let size = size_of::<libc::fanotify_response>();
    let from = ptr::from_ref(&response).cast();
    // SAFETY: writes that many bytes from a structure of that size.
    let written = unsafe { libc::write(group.as_raw_fd(), from, size) };
    if written < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Word of the end of a file system: of the file system itself, not of one mount.
/// It lives on while any mount of it does, in other namespaces or below an overlay.
#[derive(Debug)]
pub(crate) struct EndWatch(OwnedFd);

impl EndWatch {
    /// Watches the file system whose root is at `root`.
    ///
    /// # Errors
    /// When `root` cannot be watched.
    pub(crate) fn new(root: &Path) -> io::Result<Self> {
        // SAFETY: takes plain numbers.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        let fd =
            owned(fd.into()).map_err(|error| exhausted(error, "fs.inotify.max_user_instances"))?;
        let root = CString::new(root.as_os_str().as_bytes())?;
        // Nothing else ever happens to an inode of a read-only file system.
        let mask = libc::IN_DELETE_SELF | libc::IN_ONLYDIR;
        // SAFETY: the path is a valid C string for the time of the call.
        let done = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), root.as_ptr(), mask) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(fd))
    }

    /// Takes over a watch that another process has set.
    pub(crate) fn adopt(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Waits at most `timeout` milliseconds, and says whether the end has come.
    pub(crate) fn wait(&self, timeout: u16) -> bool {
        use nix::poll::{PollFd, PollFlags, poll};
        // The word stays in the queue, so that every process that asks hears it.
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).is_ok_and(|count| count > 0)
    }
}

impl AsFd for EndWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A copy of `file` with this very number; whatever had it is closed.
///
/// # Errors
/// As `dup3(2)`.
pub(crate) fn duplicate_to(file: &OwnedFd, number: c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes plain numbers. The caller says that nobody owns the number.
    let fd = unsafe { libc::dup3(file.as_raw_fd(), number, libc::O_CLOEXEC) };
    owned(fd.into())
}

/// Moves a descriptor to a number that is not below `least`.
///
/// # Errors
/// As `fcntl(2)`.
pub(crate) fn lift(fd: OwnedFd, least: c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes plain numbers, and makes a new descriptor.
    let lifted = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
    owned(lifted.into())
}

fn owned(fd: c_long) -> io::Result<OwnedFd> {
    match c_int::try_from(fd) {
        // SAFETY: a system call has just returned this descriptor to nobody but us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn check(done: c_long) -> io::Result<()> {
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_reached_is_named() {
        let full = io::Error::from_raw_os_error(libc::EMFILE);
        let words = exhausted(full, "fs.some.limit").to_string();
        assert!(words.contains("sysctl fs.some.limit"), "{words}");
        let other = exhausted(io::Error::from_raw_os_error(libc::EPERM), "fs.some.limit");
        assert_eq!(other.raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn the_device_of_a_file_system_is_what_stat_shows() {
        use std::os::unix::fs::MetadataExt as _;
        let file = File::open("/").unwrap();
        let device = file.metadata().unwrap().dev();
        assert_eq!(device_of(&file.into()).unwrap(), device);
    }
}
