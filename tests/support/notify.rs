//! A stand-in for the service manager: its socket for notices, and its store of
//! descriptors.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// First descriptor that a service gets.
const FIRST: RawFd = 3;
/// Most descriptors in one notice.
const MOST: usize = 64;

/// The stand-in.
#[derive(Debug)]
pub struct ServiceManager {
    socket: UnixDatagram,
    path: PathBuf,
    store: BTreeMap<String, OwnedFd>,
    notices: Vec<String>,
}

impl ServiceManager {
    /// Listens on a socket at `path`.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(path: &Path) -> Result<Self> {
        let socket = UnixDatagram::bind(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            store: BTreeMap::new(),
            notices: Vec::new(),
        })
    }

    /// Takes in what was sent so far.
    ///
    /// # Errors
    /// A notice cannot be read.
    pub fn listen(&mut self) -> Result<()> {
        loop {
            let mut text = vec![0; 4096];
            let mut space = nix::cmsg_space!([RawFd; MOST]);
            let mut parts = [IoSliceMut::new(&mut text)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let socket = self.socket.as_raw_fd();
            let received = match recvmsg::<()>(socket, &mut parts, Some(&mut space), flags) {
                Ok(received) => received,
                Err(nix::errno::Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            };
            let mut files = Vec::new();
            for control in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(numbers) = control {
                    for number in numbers {
                        // SAFETY: the kernel has just opened it for us.
                        files.push(unsafe { OwnedFd::from_raw_fd(number) });
                    }
                }
            }
            let len = received.bytes;
            text.truncate(len);
            self.take_in(&String::from_utf8(text)?, files)?;
        }
    }

    fn take_in(&mut self, notice: &str, files: Vec<OwnedFd>) -> Result<()> {
        let field = |name: &str| {
            let found = notice.lines().find_map(|line| line.strip_prefix(name));
            found.map(str::to_owned)
        };
        let name = field("FDNAME=");
        if field("FDSTOREREMOVE=").is_some() {
            self.store.remove(&name.context("no name")?);
        } else if field("FDSTORE=").is_some() {
            let file = files.into_iter().next().context("no descriptor")?;
            self.store.insert(name.context("no name")?, file);
        } else {
            self.notices.push(notice.to_owned());
        }
        Ok(())
    }

    /// Names in the store.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.store.keys().map(String::as_str).collect()
    }

    /// What was told beside descriptors.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// A command that runs `command` as a service of this manager, with all that is in
    /// the store.
    #[must_use]
    pub fn service(&self, command: &Command) -> Command {
        let mut service = Command::new("sh");
        // The process that becomes the service names itself.
        service.args([
            "-c",
            "export LISTEN_PID=$$ SYSTEMD_EXEC_PID=$$; exec \"$@\"",
            "sh",
        ]);
        service.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                service.env(name, value);
            }
        }
        service.env("NOTIFY_SOCKET", &self.path);
        service.env("LISTEN_FDS", self.store.len().to_string());
        service.env("LISTEN_FDNAMES", self.names().join(":"));
        let files: Vec<RawFd> = self.store.values().map(|file| file.as_raw_fd()).collect();
        let pass = move || {
            // Out of the way first: a descriptor may have the number of another.
            let mut lifted = [0; MOST];
            let least = FIRST + RawFd::try_from(MOST).unwrap_or(RawFd::MAX);
            for (file, place) in files.iter().zip(&mut lifted) {
                // SAFETY: takes plain numbers; async-signal-safe.
                *place = unsafe { libc::fcntl(*file, libc::F_DUPFD_CLOEXEC, least) };
            }
            for ((_, place), number) in files.iter().zip(lifted).zip(FIRST..) {
                // SAFETY: as above.
                if unsafe { libc::dup2(place, number) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes async-signal-safe calls only.
        unsafe { service.pre_exec(pass) };
        service
    }
}
