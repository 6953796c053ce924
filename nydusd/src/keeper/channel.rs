//! How keeper and worker talk: messages with descriptors over a socket pair.
//!
//! A message is one packet: JSON, and up to [`MAX_FILES`] descriptors. What was sent
//! arrives even if the sender dies right after. The end of the other side is the end
//! of the stream.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use super::rights;
pub(crate) use super::rights::MAX_FILES;

/// Longest message, in bytes.
const MAX_LEN: usize = 64 << 10;

/// What one says to the other. New kinds may be added; the two are of one version,
/// but for a program file that was replaced in between.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Message {
    /// Descriptors to hold, or that were held.
    Deposit {
        /// Name of the deposit.
        name: String,
        /// Its note, in its first message.
        note: Option<String>,
        /// Whether descriptors follow in another message.
        more: bool,
    },
    /// A deposit has ended.
    Withdraw {
        /// Its name.
        name: String,
    },
    /// All deposits have been sent.
    Complete,
    /// The worker catches signals.
    Ready,
    /// The worker serves everything that it was handed.
    Serving,
    /// The worker ends, so that a fresh one goes on.
    Relieve,
}

/// One end of the line.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// Both ends; neither is inherited by programs.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn pair() -> anyhow::Result<(Self, Self)> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .context("cannot make a socket pair")?;
        Ok((Self(a), Self(b)))
    }

    /// The end that was inherited as this descriptor.
    pub(crate) fn inherited(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends a message. Waits when the other side is far behind.
    ///
    /// # Errors
    /// `EPIPE` when there is no other side any more.
    pub(crate) fn send(&self, message: &Message, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let numbers: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() {
            &[][..]
        } else {
            &rights[..]
        };
        let parts = [IoSlice::new(&text)];
        loop {
            match sendmsg::<()>(
                self.0.as_raw_fd(),
                &parts,
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for a message; `None` at the end.
    ///
    /// # Errors
    /// A message that is none, or out of descriptors.
    pub(crate) fn receive(&self) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        let mut text = vec![0; MAX_LEN];
        let (len, files) = match rights::receive(self.0.as_fd(), &mut text, 0) {
            // Its last words were not for us.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            received => received?,
        };
        if len == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(text.get(..len).unwrap_or_default())?;
        Ok(Some((message, files)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Seek as _, Write as _};

    use super::*;
    use crate::keeper::{Deposit, Receiver, send_deposit};

    #[test]
    fn deposits_of_any_size_arrive_after_their_owner_died() {
        let (worker, keeper) = Channel::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"kept").unwrap();
        for (name, count) in [("none", 0), ("one", 1), ("many", 600)] {
            let deposit = Deposit {
                note: format!("note of {name}"),
                files: (0..count)
                    .map(|_| file.try_clone().unwrap().into())
                    .collect(),
            };
            send_deposit(&worker, name, &deposit).unwrap();
        }
        drop(worker);
        let mut received = Receiver::default();
        while let Some((message, files)) = keeper.receive().unwrap() {
            let Message::Deposit { name, note, more } = message else {
                panic!("{message:?}")
            };
            received.part(name, note, more, files);
        }
        let counts = received
            .deposits
            .iter()
            .map(|(n, d)| (n.as_str(), d.files.len()));
        assert_eq!(
            counts.collect::<Vec<_>>(),
            [("many", 600), ("none", 0), ("one", 1)]
        );
        let one = received.deposits.remove("one").unwrap();
        assert_eq!(one.note, "note of one");
        let mut copy = File::from(one.files.into_iter().next().unwrap());
        let mut text = String::new();
        copy.rewind().unwrap();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
    }

    #[test]
    fn the_end_of_the_other_side_is_seen() {
        let (worker, keeper) = Channel::pair().unwrap();
        drop(keeper);
        assert!(worker.send(&Message::Ready, &[]).is_err());
        assert!(worker.receive().unwrap().is_none());
    }
}
