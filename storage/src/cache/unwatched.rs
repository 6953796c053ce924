//! Descriptors of cache files whose use nobody is asked about.
//!
//! When the kernel's EROFS serves an image from its cache files, a process holds
//! `FAN_PRE_ACCESS` marks on them: every access through a descriptor that was opened
//! after the mark waits for that process. The cache's own reads and writes must not:
//! what is written is what somebody waits for. A descriptor that comes with a fanotify
//! event is exempt for good, so [`reopen`] has itself given one.

use std::fs::File;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use nix::sys::stat::Mode;

/// Another descriptor of the same file, open for reading and writing, that raises no
/// events. Without the privilege for that (`CAP_SYS_ADMIN`), `file` itself: then
/// nobody of this user could have set such marks either.
pub(super) fn reopen(file: File) -> File {
    match exempt(&file) {
        Ok(Some(exempt)) => exempt,
        Ok(None) => file,
        Err(error) => {
            if error != Errno::EPERM {
                tracing::debug!(%error, "no descriptor without events; using a plain one");
            }
            file
        }
    }
}

fn exempt(file: &File) -> nix::Result<Option<File>> {
    let group = Fanotify::init(
        InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK,
        EventFFlags::O_RDWR | EventFFlags::O_CLOEXEC | EventFFlags::O_LARGEFILE,
    )?;
    // The very file, whatever is at its path by now.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mark = MarkFlags::FAN_MARK_ADD;
    group.mark(mark, MaskFlags::FAN_OPEN, AT_FDCWD, Some(path.as_str()))?;
    drop(open(
        path.as_str(),
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?);
    for event in group.read_events()? {
        if let Some(fd) = event.fd()
            && let Ok(fd) = fd.try_clone_to_owned()
        {
            return Ok(Some(File::from(fd)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::*;

    #[test]
    fn it_is_the_same_file_and_can_be_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let inode = file.metadata().unwrap().ino();
        let (plain, number) = (file.try_clone().unwrap(), file.as_raw_fd());
        let exempt = reopen(file);
        assert_eq!(exempt.metadata().unwrap().ino(), inode);
        if nix::unistd::geteuid().is_root() {
            assert_ne!(exempt.as_raw_fd(), number);
        }
        exempt.write_all_at(b"abc", 4096).unwrap();
        let mut bytes = [0; 3];
        plain.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!(&bytes, b"abc");
    }
}
