//! The third holder: systemd's descriptor store.
//!
//! When nydusd runs as a unit with room in the store (`FileDescriptorStoreMax=`), the
//! keeper gives the service manager a copy of every deposit, by the protocol of
//! `sd_notify(3)` over `$NOTIFY_SOCKET`. If keeper and worker die at once, the
//! descriptors live on there, so the kernel goes on waiting for answers, and the next
//! start gets everything back (`$LISTEN_FDS`) and continues.
//!
//! `nydus-snapshotter` does the same for the daemons that it starts. It cannot name the
//! process that it is about to start, so it marks the environment ([`MANAGED`]) and makes
//! that process the leader of a group, which nobody is who inherits the environment. It
//! may die and come back with nothing, and then asks for everything again ([`AGAIN`]).
//!
//! The store knows descriptors by name and in no order. A deposit `d` of `n`
//! descriptors is stored as `d.0` to `d.<n-1>`, and its note, with `n`, as memory `d.note`,
//! last: a deposit without note or with a descriptor missing was not stored to its end.

use std::collections::BTreeMap;
use std::env;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use serde::{Deserialize, Serialize};

use super::{Deposit, Deposits, text};
use crate::api::SILENT;

/// First descriptor that a service manager passes on.
const FIRST: RawFd = 3;
/// How long the keeper waits for the service manager to take a message: its queue is
/// short.
const PATIENCE: Duration = Duration::from_millis(500);
/// Last part of the name of a note.
const NOTE: &str = "note";

/// The note of a deposit, and how many descriptors belong to it.
#[derive(Debug, Serialize, Deserialize)]
struct StoredNote {
    note: String,
    files: usize,
}

/// The way to the service manager.
#[derive(Debug)]
pub(super) struct Store {
    socket: UnixDatagram,
    address: UnixAddr,
    /// Descriptors of what is stored, by deposit.
    stored: BTreeMap<String, usize>,
}

/// What an earlier life of this service has stored.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// Deposits that are whole.
    pub deposits: Deposits,
    /// Names of descriptors that belong to none of them.
    rest: Vec<String>,
}

/// Says, to the leader of a process group, that whoever has started it is its service
/// manager.
const MANAGED: &str = "NYDUS_MANAGED";
/// The signal by which a service manager that has lost everything asks for it again. The
/// whole process group gets it; those that do not catch it do not notice.
pub(super) const AGAIN: i32 = signal_hook::consts::SIGURG;
/// Where the service manager listens.
pub(super) const SOCKET: &str = "NOTIFY_SOCKET";

impl Store {
    /// The store of the service manager that has started this very process, if one has:
    /// its environment may have been inherited through somebody else, whose affair it is.
    pub(super) fn of_this_service() -> Option<Self> {
        means_this_process("SYSTEMD_EXEC_PID").then(Self::inherited)?
    }

    /// The store of a predecessor of this process, if it had one.
    pub(super) fn inherited() -> Option<Self> {
        let path = env::var(SOCKET).ok()?;
        let address = match path.strip_prefix('@') {
            Some(name) => UnixAddr::new_abstract(name.as_bytes()),
            None => UnixAddr::new(path.as_str()),
        };
        let opened = address.map_err(anyhow::Error::from).and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            socket.set_write_timeout(Some(PATIENCE))?;
            Ok((socket, address))
        });
        match opened {
            Ok((socket, address)) => Some(Self {
                socket,
                address,
                stored: BTreeMap::new(),
            }),
            Err(error) => {
                tracing::warn!("no service manager at {path}: {error:#}");
                None
            }
        }
    }

    /// Goes on with what is stored, and removes what is of no use.
    pub(super) fn adopt(&mut self, stored: &Stored) {
        let deposits = stored.deposits.iter();
        self.stored = deposits
            .map(|(name, deposit)| (name.clone(), deposit.files.len()))
            .collect();
        for name in &stored.rest {
            self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
        }
    }

    /// Stores a copy of a deposit, in the place of an earlier one of that name.
    pub(super) fn put(&mut self, name: &str, deposit: &Deposit) {
        // The end of such a connection means the end of the daemon, and this is one.
        if name.starts_with(SILENT) {
            return;
        }
        // Also what a keeper before this one has stored.
        let known = self.stored.remove(name).unwrap_or(0);
        self.forget(name, known.max(deposit.files.len()));
        if let Err(error) = self.try_put(name, deposit) {
            tracing::warn!("{name}: not stored by the service manager: {error:#}");
        }
    }

    /// Stores copies of all deposits: the service manager has come back with nothing.
    pub(super) fn put_again(&mut self, deposits: &Deposits) {
        for (name, deposit) in deposits {
            // Nothing is removed first: what the manager has after all stays whole.
            if !name.starts_with(SILENT)
                && let Err(error) = self.try_put(name, deposit)
            {
                tracing::warn!("{name}: not stored by the service manager: {error:#}");
            }
        }
    }

    fn try_put(&mut self, name: &str, deposit: &Deposit) -> anyhow::Result<()> {
        let files = deposit.files.len();
        self.stored.insert(name.to_owned(), files);
        for (index, file) in deposit.files.iter().enumerate() {
            self.store(&format!("{name}.{index}"), file.as_fd())?;
        }
        let note = StoredNote {
            note: deposit.note.clone(),
            files,
        };
        let note = text::store(&serde_json::to_vec(&note)?)?;
        self.store(&format!("{name}.{NOTE}"), note.as_fd())
    }

    /// Ends the copy of a deposit.
    pub(super) fn remove(&mut self, name: &str) {
        if let Some(files) = self.stored.remove(name) {
            self.forget(name, files);
        }
    }

    fn forget(&self, name: &str, files: usize) {
        let parts = (0..files).map(|index| index.to_string());
        for part in std::iter::once(NOTE.to_owned()).chain(parts) {
            self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}.{part}"));
        }
    }

    /// Ends all copies.
    pub(super) fn clear(&mut self) {
        let names: Vec<String> = self.stored.keys().cloned().collect();
        names.iter().for_each(|name| self.remove(name));
    }

    /// Tells how the daemon is, in the words of `sd_notify(3)`.
    pub(super) fn tell(&self, words: &str) {
        if let Err(error) = self.send(words, &[]) {
            tracing::debug!("the service manager was not told: {error:#}");
        }
    }

    fn store(&self, name: &str, file: BorrowedFd<'_>) -> anyhow::Result<()> {
        // Without FDPOLL=0 it would be dropped when its file system has an error.
        let words = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        self.send(&words, &[file.as_raw_fd()])
    }

    fn send(&self, words: &str, files: &[RawFd]) -> anyhow::Result<()> {
        let rights = [ControlMessage::ScmRights(files)];
        let control = if files.is_empty() {
            &[][..]
        } else {
            &rights[..]
        };
        let parts = [std::io::IoSlice::new(words.as_bytes())];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let socket = self.socket.as_raw_fd();
        sendmsg(socket, &parts, control, flags, Some(&self.address))?;
        Ok(())
    }
}

/// Whether the environment was made for this process: the variable `pid` names it, or it
/// leads the group of a managed service.
fn means_this_process(pid: &str) -> bool {
    let me = std::process::id().to_string();
    env::var(pid).is_ok_and(|pid| pid == me)
        || (env::var_os(MANAGED).is_some() && nix::unistd::getpgrp() == nix::unistd::getpid())
}

/// What an earlier life of this service has stored: deposits that are whole. Call once,
/// before any descriptor is opened.
pub(super) fn restore() -> Stored {
    if !means_this_process("LISTEN_PID") {
        return Stored::default();
    }
    let count = env::var("LISTEN_FDS").ok();
    let count = count.and_then(|count| count.parse::<u32>().ok());
    let count = count.unwrap_or(0);
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let files = (FIRST..).zip(names.split(':')).zip(0..count);
    let named = files.filter_map(|((file, name), _)| {
        let borrowed = {
            // SAFETY: only looked at; the call below fails if it is not open.
            unsafe { BorrowedFd::borrow_raw(file) }
        };
        let flag = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
        nix::fcntl::fcntl(borrowed, flag).ok()?;
        // SAFETY: it is open, and by the protocol it belongs to this process, in which
        // nothing else was opened yet.
        Some((name.to_owned(), unsafe { OwnedFd::from_raw_fd(file) }))
    });
    assemble(named.collect())
}

/// Puts deposits together; what is incomplete is dropped, which closes it.
fn assemble(mut files: BTreeMap<String, OwnedFd>) -> Stored {
    let mut rest: Vec<String> = files.keys().cloned().collect();
    let notes = files.keys().filter_map(|name| {
        let (deposit, part) = name.rsplit_once('.')?;
        (part == NOTE).then(|| deposit.to_owned())
    });
    let notes: Vec<String> = notes.collect();
    let mut deposits = Deposits::new();
    for name in notes {
        match take(&name, &mut files) {
            Ok(deposit) => {
                rest.retain(|part| part.rsplit_once('.').is_none_or(|(of, _)| of != name));
                deposits.insert(name, deposit);
            }
            Err(error) => tracing::error!("{name} was not stored to its end: {error:#}"),
        }
    }
    Stored { deposits, rest }
}

fn take(name: &str, files: &mut BTreeMap<String, OwnedFd>) -> anyhow::Result<Deposit> {
    let mut part = |part: &str| {
        let file = files.remove(&format!("{name}.{part}"));
        file.with_context(|| format!("descriptor {part} is missing"))
    };
    let note: StoredNote = serde_json::from_slice(&text::load(&part(NOTE)?)?)?;
    ensure!(note.files <= 1 << 16, "{} descriptors", note.files);
    let files = (0..note.files).map(|index| part(&index.to_string()));
    Ok(Deposit {
        files: files.collect::<anyhow::Result<_>>()?,
        note: note.note,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn note(files: usize) -> OwnedFd {
        let note = StoredNote {
            note: "n".to_owned(),
            files,
        };
        text::store(&serde_json::to_vec(&note).unwrap()).unwrap()
    }

    #[test]
    fn only_whole_deposits_come_back() {
        let file = || OwnedFd::from(File::open("/dev/null").unwrap());
        let named = [
            ("mount-1.note", note(2)),
            ("mount-1.0", text::store(b"first").unwrap()),
            ("mount-1.1", text::store(b"second").unwrap()),
            ("mount-2.note", note(2)),
            ("mount-2.1", file()),
            ("mount-3.0", file()),
            ("events.note", note(0)),
            ("stranger", file()),
        ];
        let named = named.map(|(name, file)| (name.to_owned(), file));
        let Stored { deposits, rest } = assemble(named.into_iter().collect());
        assert_eq!(rest, ["mount-2.1", "mount-2.note", "mount-3.0", "stranger"]);
        assert_eq!(deposits.keys().collect::<Vec<_>>(), ["events", "mount-1"]);
        let mount = &deposits["mount-1"];
        assert_eq!(mount.note, "n");
        let texts: Vec<_> = mount.files.iter().map(|f| text::load(f).unwrap()).collect();
        assert_eq!(texts, [b"first".to_vec(), b"second".to_vec()]);
    }
}
