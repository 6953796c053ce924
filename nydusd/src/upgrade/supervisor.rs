//! The way to the supervisor: a socket on which it waits while it expects a state, or
//! offers one.
//!
//! Either way it is one connection: the state's text, with exactly one descriptor
//! beside its first bytes, until the end of the stream. A state has any number of
//! descriptors, so that one is a *bundle*: a socket in whose queue all of them wait.
//! They are looked at and stay in the queue, so a supervisor may offer the same bundle
//! as often as it wants.

use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt,
    sendmsg, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::time::TimeVal;

use super::state::{MAX_FILES, MAX_LEN};
use crate::keeper::rights::{self, MAX_FILES as MAX_PER_MESSAGE};

/// How long the other side may take for a step.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much is read and sent at a time.
const PART: usize = 256 << 10;
/// What a message in a bundle says: the number of its first descriptor, and how many.
const LABEL: usize = 8;

/// Sends a state to the supervisor that listens on `path`.
///
/// # Errors
/// Nobody listens there, or the other side does not take it.
pub(super) fn send(path: &Path, text: &[u8], files: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    let bundle = pack(files).context("cannot put descriptors together")?;
    let mut stream = open(path)?;
    let numbers = [bundle.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&numbers)];
    let parts = [IoSlice::new(text)];
    let sent = loop {
        let flags = MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, flags, None) {
            Err(Errno::EINTR) => {}
            sent => break sent.context("the supervisor does not take the state")?,
        }
    };
    stream
        .write_all(text.get(sent..).unwrap_or_default())
        .context("the supervisor does not take the whole state")
}

/// Asks the supervisor that listens on `path` for a state: its text, and the descriptor
/// that came with it, if one did.
///
/// # Errors
/// Nobody listens there, or what comes never ends.
pub(super) fn receive(path: &Path) -> anyhow::Result<(Vec<u8>, Option<OwnedFd>)> {
    let stream = open(path)?;
    let mut text = vec![0; PART];
    let (len, mut files) =
        rights::receive(stream.as_fd(), &mut text, 0).context("the supervisor sends no state")?;
    text.truncate(len);
    let limit = u64::try_from(MAX_LEN + 1 - len)?;
    if len > 0 {
        let rest = stream.take(limit).read_to_end(&mut text);
        rest.context("the supervisor does not come to the end of the state")?;
    }
    ensure!(
        text.len() <= MAX_LEN,
        "the supervisor sends more than {MAX_LEN} bytes"
    );
    files.truncate(1);
    Ok((text, files.pop()))
}

fn open(path: &Path) -> anyhow::Result<UnixStream> {
    let context = || format!("no supervisor listens on {}", path.display());
    let address = UnixAddr::new(path).with_context(context)?;
    let (family, kind) = (AddressFamily::Unix, SockType::Stream);
    let socket =
        socket(family, kind, SockFlag::SOCK_CLOEXEC, None).context("cannot make a socket")?;
    // It counts for `connect`, too.
    let patience = TimeVal::new(i64::try_from(PATIENCE.as_secs())?, 0);
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    connect(socket.as_raw_fd(), &address).with_context(context)?;
    Ok(socket.into())
}

/// A bundle of copies of `files`.
///
/// # Errors
/// When the system refuses: the queue of a socket has room for tens of thousands.
fn pack(files: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let (bundle, sender) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let mut first = 0;
    for part in files.chunks(MAX_PER_MESSAGE) {
        let numbers: Vec<RawFd> = part.iter().map(|file| file.as_raw_fd()).collect();
        let label = label(first, part.len());
        let rights = [ControlMessage::ScmRights(&numbers)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        sendmsg::<()>(
            sender.as_raw_fd(),
            &[IoSlice::new(&label)],
            &rights,
            flags,
            None,
        )?;
        first += part.len();
    }
    Ok(bundle)
}

/// Copies of the `count` descriptors in a bundle, which keeps them.
///
/// # Errors
/// When it is none, or has another number of them.
pub(super) fn unpack(bundle: &OwnedFd, count: usize) -> anyhow::Result<Vec<OwnedFd>> {
    let kind = getsockopt(bundle, sockopt::SockType);
    ensure!(
        kind == Ok(SockType::SeqPacket),
        "the descriptor that came with the state is no bundle of descriptors"
    );
    ensure!(count <= MAX_FILES, "a state with {count} descriptors");
    look_from_the_start(bundle).context("cannot look into the bundle of descriptors")?;
    let mut files = Vec::new();
    while files.len() < count {
        let mut found = [0; LABEL];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        let (len, part) = rights::receive(bundle.as_fd(), &mut found, flags)
            .map_err(|error| anyhow!("{} of {count} descriptors came: {error}", files.len()))?;
        ensure!(len > 0, "{} of {count} descriptors came", files.len());
        // Somebody else who looks at the same time would get every other message.
        ensure!(
            len == LABEL && !part.is_empty() && found == label(files.len(), part.len()),
            "descriptor {} of the state is not where it should be",
            files.len()
        );
        files.extend(part);
    }
    Ok(files)
}

/// Has the next look at the queue of a socket see its first message.
fn look_from_the_start(socket: &OwnedFd) -> io::Result<()> {
    let offset: libc::c_int = 0;
    let size = libc::socklen_t::try_from(size_of_val(&offset)).unwrap_or_default();
    let at = std::ptr::from_ref(&offset).cast();
    // SAFETY: reads that many bytes of an integer that lives until the call returns.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            at,
            size,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Numbers are small (`MAX_FILES`); larger ones would match nothing.
fn label(first: usize, count: usize) -> [u8; LABEL] {
    let number = |number| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
    let mut label = [0; LABEL];
    let (left, right) = label.split_at_mut(LABEL / 2);
    left.copy_from_slice(&number(first));
    right.copy_from_slice(&number(count));
    label
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::keeper::text;

    #[test]
    fn a_bundle_can_be_looked_into_again_and_again() {
        let files: Vec<OwnedFd> = (0..600)
            .map(|number| text::store(format!("{number}").as_bytes()).unwrap())
            .collect();
        let borrowed: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        let bundle = pack(&borrowed).unwrap();
        drop(files);
        for _ in 0..3 {
            let files = unpack(&bundle, 600).unwrap();
            for (number, file) in files.iter().enumerate() {
                assert_eq!(text::load(file).unwrap(), format!("{number}").as_bytes());
            }
        }
        let error = unpack(&bundle, 601).unwrap_err().to_string();
        assert!(error.contains("600 of 601"), "{error}");
    }

    #[test]
    fn something_else_is_no_bundle() {
        let file = OwnedFd::from(File::open("/dev/null").unwrap());
        let (stream, _other) = UnixStream::pair().unwrap();
        for other in [file, stream.into()] {
            let error = unpack(&other, 1).unwrap_err().to_string();
            assert!(error.contains("no bundle"), "{error}");
        }
        // Closed, open and silent, and with other words than ours.
        let pair = || {
            let (family, flags) = (AddressFamily::Unix, SockFlag::SOCK_CLOEXEC);
            socketpair(family, SockType::SeqPacket, None, flags).unwrap()
        };
        let (closed, other) = pair();
        drop(other);
        unpack(&closed, 1).unwrap_err();
        let (silent, _other) = pair();
        unpack(&silent, 1).unwrap_err();
        let (talking, other) = pair();
        nix::unistd::write(&other, b"12345678").unwrap();
        unpack(&talking, 1).unwrap_err();
    }

    #[test]
    fn a_long_text_and_one_descriptor_come_through() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("supervisor.sock");
        let error = format!("{:#}", receive(&path).unwrap_err());
        assert!(error.contains("no supervisor listens on"), "{error}");
        let listener = UnixListener::bind(&path).unwrap();
        let long: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let file = text::store(b"inside").unwrap();
        let (text, bundle) = std::thread::scope(|scope| {
            let sent = scope.spawn(|| send(&path, &long, &[file.as_fd()]));
            let (mut stream, _) = listener.accept().unwrap();
            let mut text = vec![0; PART];
            let (len, files) = rights::receive(stream.as_fd(), &mut text, 0).unwrap();
            text.truncate(len);
            stream.read_to_end(&mut text).unwrap();
            sent.join().unwrap().unwrap();
            (text, files)
        });
        assert!(text == long, "{} bytes", text.len());
        assert_eq!(bundle.len(), 1, "exactly one descriptor");

        // And back, twice.
        for _ in 0..2 {
            let (back, file) = std::thread::scope(|scope| {
                let got = scope.spawn(|| receive(&path));
                let (mut stream, _) = listener.accept().unwrap();
                let numbers = [bundle[0].as_raw_fd()];
                let rights = [ControlMessage::ScmRights(&numbers)];
                let parts = [IoSlice::new(&text)];
                let flags = MsgFlags::empty();
                let sent = sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, flags, None).unwrap();
                stream.write_all(&text[sent..]).unwrap();
                drop(stream);
                got.join().unwrap().unwrap()
            });
            assert!(back == long);
            let files = unpack(&file.unwrap(), 1).unwrap();
            let mut content = [0; 6];
            let file = File::from(files[0].try_clone().unwrap());
            file.read_exact_at(&mut content, 0).unwrap();
            assert_eq!(&content, b"inside");
        }
    }

    #[test]
    fn a_supervisor_that_hangs_up_has_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("supervisor.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (text, file) = std::thread::scope(|scope| {
            let got = scope.spawn(|| receive(&path));
            drop(listener.accept().unwrap());
            got.join().unwrap().unwrap()
        });
        assert!(text.is_empty() && file.is_none());
    }
}
