//! The socket: private from its first moment, and gone when the daemon ends well.

use std::fs::{self, File, Metadata, OpenOptions};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// A socket file that is removed with its owner.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// The file itself: what is at the path now may be somebody else's. While this is
    /// open, no other file gets the same inode number.
    file: File,
}

impl SocketFile {
    /// The file of a predecessor.
    pub(super) fn adopt(path: PathBuf, file: OwnedFd) -> Self {
        let file = file.into();
        Self { path, file }
    }

    /// The file, for a successor.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Leaves it to a successor.
    pub(super) fn leave(self) {
        // Without removing it.
        std::mem::forget(self);
    }

    /// Gives it the name that clients know.
    fn rename(&mut self, path: &Path) -> std::io::Result<()> {
        fs::rename(&self.path, path)?;
        path.clone_into(&mut self.path);
        Ok(())
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = self.file.metadata().ok();
        let there = fs::symlink_metadata(&self.path).ok();
        let identity = |meta: Metadata| (meta.dev(), meta.ino());
        if ours.is_some() && ours.map(identity) == there.map(identity) {
            // Nothing depends on it; the next daemon removes what it finds.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on `path`, for root only (mode 0600). A missing directory is made with mode
/// 0700; the leftover of a daemon that died is removed. The file appears when it can be
/// connected to.
///
/// # Errors
/// Another daemon answers there, something else is in the way, or the system refuses.
pub(super) fn open(path: &Path) -> anyhow::Result<(UnixListener, SocketFile)> {
    let context = || format!("--apisock {}", path.display());
    if let Some(parent) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .with_context(context)?;
    }
    clear(path).with_context(context)?;
    UnixAddr::new(path)
        .with_context(context)
        .context("a socket's path is at most 107 bytes long")?;
    // Shorter than any usual name, so that it fits, too.
    let hidden = path.with_file_name(format!(".{}", std::process::id()));
    let _ = fs::remove_file(&hidden);
    let address = UnixAddr::new(&hidden).with_context(context)?;
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .context("cannot make a socket")?;
    // Before `bind`, which makes the file with the mode that the socket has.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).with_context(context)?;
    bind(socket.as_raw_fd(), &address).with_context(context)?;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(&hidden);
    let mut file = SocketFile {
        path: hidden,
        file: opened.with_context(context)?,
    };
    listen(&socket, Backlog::new(128)?).with_context(context)?;
    file.rename(path).with_context(context)?;
    Ok((UnixListener::from(socket), file))
}

/// Removes what a daemon that died has left at `path`.
fn clear(path: &Path) -> anyhow::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    ensure!(
        found.file_type().is_socket(),
        "there is something else than a socket"
    );
    ensure!(
        UnixStream::connect(path).is_err(),
        "another daemon listens there"
    );
    fs::remove_file(path).context("cannot remove what is there")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn sockets_are_private_and_never_stolen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/api.sock");
        let (listener, file) = open(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        let err = open(&path).unwrap_err();
        assert!(format!("{err:#}").contains("another daemon"), "{err:#}");
        // Killed: the file stays, nobody answers.
        drop(listener);
        let (_second, _newer) = open(&path).unwrap();
        drop(file);
        assert!(path.exists(), "the file of another daemon was removed");
        let other = dir.path().join("file");
        fs::write(&other, "").unwrap();
        let err = open(&other).unwrap_err();
        assert!(format!("{err:#}").contains("something else"), "{err:#}");
    }
}
