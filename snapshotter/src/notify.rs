//! What a service says to its manager, in the words of `sd_notify(3)`: datagrams of
//! lines, some with a descriptor to hold.
//!
//! Both sides are here: `nydusd` says it to this program ([`receive`]), and this program
//! to systemd ([`Sender`]).

use std::env;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// Longest notice, in bytes.
const MAX_LEN: usize = 4096;
/// Most descriptors that are taken from one notice; the kernel closes the others.
const MAX_FILES: usize = 4;
/// Longest name of a descriptor: all of them must fit into one environment variable.
const MAX_NAME: usize = 60;
/// How long a manager may take to take a notice: its queue is short.
const PATIENCE: Duration = Duration::from_millis(500);

/// Where a service manager listens.
pub(crate) const SOCKET: &str = "NOTIFY_SOCKET";
/// The service can do its work.
pub(crate) const READY: &str = "READY=1";

/// One thing that a service said.
#[derive(Debug)]
pub(crate) enum Notice {
    /// Hold this, in the place of what had the name.
    Store { name: String, file: OwnedFd },
    /// Let go of it.
    Remove { name: String },
    /// It can do its work.
    Ready,
    /// What is of no use here.
    Other,
}

/// The next notice; `None` if there is none now.
///
/// # Errors
/// One that is lost.
pub(crate) fn receive(socket: &UnixDatagram) -> io::Result<Option<Notice>> {
    let mut text = vec![0; MAX_LEN];
    let mut space = nix::cmsg_space!([RawFd; MAX_FILES]);
    let (len, files) = loop {
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(received) => {
                let mut files = Vec::new();
                for control in received.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(numbers) = control {
                        for number in numbers {
                            // SAFETY: the kernel has just opened it for us.
                            files.push(unsafe { OwnedFd::from_raw_fd(number) });
                        }
                    }
                }
                break (received.bytes, files);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    };
    let text = std::str::from_utf8(text.get(..len).unwrap_or_default());
    let text = text.map_err(io::Error::other)?;
    Ok(Some(parse(text, files)))
}

fn parse(text: &str, files: Vec<OwnedFd>) -> Notice {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let name = field("FDNAME=").filter(|name| is_name(name));
    let file = files.into_iter().next();
    match (field("FDSTORE="), field("FDSTOREREMOVE="), name, file) {
        (Some("1"), None, Some(name), Some(file)) => Notice::Store {
            name: name.to_owned(),
            file,
        },
        (None, Some("1"), Some(name), _) => Notice::Remove {
            name: name.to_owned(),
        },
        _ if text.lines().any(|line| line == READY) => Notice::Ready,
        _ => Notice::Other,
    }
}

/// Whether a descriptor may have this name.
pub(crate) fn is_name(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(good)
}

/// The way to a service manager.
#[derive(Debug)]
pub(crate) struct Sender {
    socket: UnixDatagram,
    address: UnixAddr,
}

impl Sender {
    /// To the manager that `$NOTIFY_SOCKET` names.
    ///
    /// # Errors
    /// There is none, or no way to it.
    pub(crate) fn new() -> io::Result<Self> {
        let path = env::var_os(SOCKET).ok_or(io::ErrorKind::NotFound)?;
        let address = match path.to_str().and_then(|path| path.strip_prefix('@')) {
            Some(name) => UnixAddr::new_abstract(name.as_bytes())?,
            None => UnixAddr::new(Path::new(&path))?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, address })
    }

    /// Says `words`, with a descriptor that goes with them.
    ///
    /// # Errors
    /// Nobody has taken it.
    pub(crate) fn tell(&self, words: &str, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let numbers: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() {
            &[][..]
        } else {
            &rights[..]
        };
        let parts = [IoSlice::new(words.as_bytes())];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let socket = self.socket.as_raw_fd();
        sendmsg(socket, &parts, control, flags, Some(&self.address))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn only_what_makes_sense_is_held() {
        let file = || vec![OwnedFd::from(File::open("/dev/null").unwrap())];
        let store = parse("FDSTORE=1\nFDPOLL=0\nFDNAME=mount-1.0", file());
        assert!(matches!(store, Notice::Store { name, .. } if name == "mount-1.0"));
        let remove = parse("FDSTOREREMOVE=1\nFDNAME=mount-1.0", Vec::new());
        assert!(matches!(remove, Notice::Remove { name } if name == "mount-1.0"));
        assert!(matches!(
            parse("STATUS=x\nREADY=1", Vec::new()),
            Notice::Ready
        ));
        for text in [
            "FDSTORE=1",
            "FDSTORE=1\nFDNAME=",
            "FDSTORE=1\nFDNAME=a:b",
            "FDSTORE=1\nFDNAME=../a",
            "MAINPID=7",
            "",
        ] {
            assert!(matches!(parse(text, file()), Notice::Other), "{text}");
        }
        let long = format!("FDSTORE=1\nFDNAME={}", "a".repeat(MAX_NAME + 1));
        assert!(matches!(parse(&long, file()), Notice::Other));
        assert!(matches!(
            parse("FDSTORE=1\nFDNAME=a", Vec::new()),
            Notice::Other
        ));
    }
}
