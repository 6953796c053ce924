//! Receives messages that come with descriptors.
//!
//! By the system call itself: what wraps it elsewhere says that a message was cut off, but
//! not which descriptors came nevertheless, and they would stay open for ever.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::ptr;

/// Most descriptors of one message: the kernel's limit.
pub(crate) const MAX_FILES: usize = 253;
/// Words of memory for these, and for the head in front of them.
const ROOM: usize = (MAX_FILES * size_of::<RawFd>() + 64).div_ceil(size_of::<u64>());

/// Receives one message: how many bytes of `text` it has filled, and its descriptors,
/// which programs do not inherit.
///
/// * `flags`: of `recvmsg(2)`.
///
/// # Errors
/// Those of `recvmsg(2)`; and out of descriptors, after which none of the message's is
/// open.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    text: &mut [u8],
    flags: libc::c_int,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    receive_with(socket, text, flags, &mut [0; ROOM])
}

/// * `room`: for descriptors.
fn receive_with(
    socket: BorrowedFd<'_>,
    text: &mut [u8],
    flags: libc::c_int,
    room: &mut [u64],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut part = libc::iovec {
        iov_base: text.as_mut_ptr().cast(),
        iov_len: text.len(),
    };
    loop {
        // SAFETY: plain integers and pointers, for which zero is a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = ptr::from_mut(&mut part);
        message.msg_iovlen = 1;
        message.msg_control = room.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(room);
        let flags = flags | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: everything that the message points to lives until the call returns, and
        // is as long as it says.
        let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
        let Ok(len) = usize::try_from(len) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        // SAFETY: the kernel has just filled it in.
        let files = unsafe { descriptors(&message) };
        if message.msg_flags & libc::MSG_CTRUNC != 0 {
            return Err(io::Error::other("out of descriptors"));
        }
        return Ok((len, files));
    }
}

/// The descriptors of a message.
///
/// # Safety
/// `message` is as `recvmsg(2)` has left it, its memory is still there, and nobody else
/// takes its descriptors.
unsafe fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut files = Vec::new();
    // SAFETY: the caller says that the message is the kernel's; these walk its heads.
    let mut head = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !head.is_null() {
        // SAFETY: it points to a whole head, in memory that is aligned for one.
        let about = unsafe { &*head };
        if (about.cmsg_level, about.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: takes a number.
            let before = unsafe { libc::CMSG_LEN(0) };
            let before = usize::try_from(before).unwrap_or(usize::MAX);
            let count = about.cmsg_len.saturating_sub(before) / size_of::<RawFd>();
            // SAFETY: the numbers follow the head.
            let first: *const RawFd = unsafe { libc::CMSG_DATA(head) }.cast();
            for index in 0..count {
                // SAFETY: `count` of them lie there.
                let number = unsafe { first.add(index) };
                // SAFETY: as above; they need not be aligned.
                let number = unsafe { number.read_unaligned() };
                // SAFETY: the kernel has just opened it for us.
                files.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: as above.
        head = unsafe { libc::CMSG_NXTHDR(message, head) };
    }
    files
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read as _, pipe};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::*;

    #[test]
    fn nothing_stays_open_of_a_message_that_was_cut_off() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = pipe().unwrap();
        let numbers = [writer.as_raw_fd(); 9];
        let rights = [ControlMessage::ScmRights(&numbers)];
        let parts = [IoSlice::new(b"text")];
        let send = || {
            let flags = MsgFlags::empty();
            sendmsg::<()>(theirs.as_raw_fd(), &parts, &rights, flags, None).unwrap();
        };
        let mut text = [0; 16];
        send();
        let (len, files) = receive(ours.as_fd(), &mut text, 0).unwrap();
        assert_eq!((len, files.len()), (4, 9));
        assert_eq!(text.get(..4), Some(b"text".as_slice()));
        drop(files);
        send();
        let mut little = [0; 4];
        let error = receive_with(ours.as_fd(), &mut text, 0, &mut little).unwrap_err();
        assert!(error.to_string().contains("out of descriptors"), "{error}");
        drop(writer);
        // The end comes when nobody has the other side any more.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}
