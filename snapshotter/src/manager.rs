//! The service manager of this very program: systemd, if it runs as a unit with room in
//! the descriptor store (`FileDescriptorStoreMax=`).
//!
//! What this program holds for daemons is lost with it, unless somebody else has copies:
//! each descriptor is passed on under the name `<image>.<name>`, and comes back with the
//! next start.

use std::collections::BTreeMap;
use std::env;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::process::Command;

use crate::notify::{READY, SOCKET, Sender, is_name};

/// First descriptor that a service manager passes on.
const FIRST: RawFd = 3;
/// Most descriptors that are taken back.
const MAX_FILES: u32 = 1 << 20;

/// Says, to the leader of a process group, that whoever has started it is its service
/// manager (`nydusd/src/keeper/store.rs`): the number of a process is not known before it
/// runs.
const MANAGED: &str = "NYDUS_MANAGED";
/// Variables by which service managers speak to their services.
const OURS: [&str; 8] = [
    SOCKET,
    MANAGED,
    "SYSTEMD_EXEC_PID",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// Descriptors by name.
pub type Files = BTreeMap<String, OwnedFd>;

/// Descriptors by image and name.
pub type Inherited = BTreeMap<u64, Files>;

/// The way to the service manager.
#[derive(Debug)]
pub struct Manager(Sender);

impl Manager {
    /// The service manager that has started this very process, if one has: the
    /// environment may have been inherited through somebody else, whose affair it is.
    #[must_use]
    pub fn of_this_service() -> Option<Self> {
        if !names_this_process("SYSTEMD_EXEC_PID") {
            return None;
        }
        Sender::new()
            .inspect_err(|error| tracing::warn!("no service manager: {error}"))
            .ok()
            .map(Self)
    }

    /// Requests are served from now on.
    pub(crate) fn ready(&self) {
        self.tell(READY, None);
    }

    /// Passes on what is held for an image, in the place of what had the name.
    pub(crate) fn store(&self, image: u64, name: &str, file: &OwnedFd) {
        self.remove(image, name);
        // Without FDPOLL=0 it would be dropped when its file system has an error.
        let words = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={image}.{name}");
        self.tell(&words, Some(file.as_fd()));
    }

    /// Ends that.
    pub(crate) fn remove(&self, image: u64, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={image}.{name}"), None);
    }

    fn tell(&self, words: &str, file: Option<BorrowedFd<'_>>) {
        if let Err(error) = self.0.tell(words, file) {
            let what = words.lines().last().unwrap_or_default();
            tracing::warn!("the service manager was not told {what}: {error}");
        }
    }
}

/// What an earlier life of this program has passed on. Call once, before any descriptor
/// is opened.
#[must_use]
pub fn restore() -> Inherited {
    if !names_this_process("LISTEN_PID") {
        return Inherited::new();
    }
    let count = env::var("LISTEN_FDS").ok();
    let count = count.and_then(|count| count.parse::<u32>().ok());
    let count = count.unwrap_or(0).min(MAX_FILES);
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let files = (FIRST..).zip(names.split(':')).zip(0..count);
    sort(files.filter_map(|((file, name), _)| {
        let borrowed = {
            // SAFETY: only looked at; the call below fails if it is not open.
            unsafe { BorrowedFd::borrow_raw(file) }
        };
        let flag = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
        nix::fcntl::fcntl(borrowed, flag).ok()?;
        // SAFETY: it is open, and by the protocol it belongs to this process, in which
        // nothing else was opened yet.
        Some((name, unsafe { OwnedFd::from_raw_fd(file) }))
    }))
}

/// By image; what has another kind of name is closed.
fn sort<'n>(files: impl Iterator<Item = (&'n str, OwnedFd)>) -> Inherited {
    let mut inherited = Inherited::new();
    for (name, file) in files {
        if let Some((image, name)) = name.split_once('.')
            && let Ok(image) = image.parse()
            && is_name(name)
        {
            let files: &mut Files = inherited.entry(image).or_default();
            files.insert(name.to_owned(), file);
        }
    }
    inherited
}

/// Prepares the environment of a service whose manager this program is.
///
/// * `socket`: where it is listened to, if anywhere;
/// * `names`: of the descriptors that the service gets.
pub(crate) fn introduce(service: &mut Command, socket: Option<&Path>, names: &[String]) {
    // What systemd said to this program is not for the service.
    for variable in OURS {
        service.env_remove(variable);
    }
    let Some(socket) = socket else {
        return;
    };
    service.env(SOCKET, socket).env(MANAGED, "1");
    if !names.is_empty() {
        service.env("LISTEN_FDS", names.len().to_string());
        service.env("LISTEN_FDNAMES", names.join(":"));
    }
}

fn names_this_process(variable: &str) -> bool {
    env::var(variable).is_ok_and(|pid| pid == std::process::id().to_string())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_comes_back_is_sorted_by_image() {
        let names = [
            "7.mount-1.0",
            "7.mount-1.note",
            "12.events.0",
            "x.y",
            "stored",
            "7.",
        ];
        let files = names.map(|name| (name, File::open("/dev/null").unwrap().into()));
        let inherited = sort(files.into_iter());
        let names: Vec<Vec<&String>> = inherited.values().map(|f| f.keys().collect()).collect();
        assert_eq!(inherited.keys().copied().collect::<Vec<_>>(), [7, 12]);
        assert_eq!(names, [vec!["mount-1.0", "mount-1.note"], vec!["events.0"]]);
    }
}
