//! The third holder of one daemon: what keeps its mount alive when keeper and worker die
//! at once.
//!
//! The kernel ties the life of a mount to descriptors. Both processes of a daemon have
//! them, and the keeper leaves copies here, by the protocol of systemd's descriptor store
//! ([`notify`]). So when nobody of a daemon is left, the kernel goes on waiting for
//! answers, and the next daemon is handed everything ([`Holder::files`]).
//!
//! This program may die, too. Its successor listens on the same path and asks the keeper
//! for everything again, by a signal to the process group ([`AGAIN`]): the keeper cannot
//! notice by itself, because it says nothing for hours, and a datagram socket does not
//! tell of the end of its peer. What systemd holds ([`Manager`]) bridges the time between.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::process::Process;
use super::service::{SHARED, label};
use crate::manager::{Files, Manager};
use crate::notify::{Notice, receive};

/// Most descriptors of the daemon of one image, which has at most 255 blobs.
const MAX_FILES: usize = 1024;
/// Most descriptors of the daemon of all images: their names are passed on in one variable,
/// which the kernel limits to 128 KiB.
const MAX_FILES_OF_ALL: usize = 4096;
/// What the names of descriptors that belong to a mount begin with.
const MOUNT: &str = "mount-";
/// How often it is looked whether a daemon that gets ready still lives.
const LOOK: Duration = Duration::from_millis(10);

/// The signal that asks a keeper to leave everything again (`nydusd/src/keeper/store.rs`).
pub(crate) const AGAIN: i32 = libc::SIGURG;

/// The socket of one daemon, and what it has left.
#[derive(Debug)]
pub(crate) struct Holder {
    daemon: u64,
    path: PathBuf,
    socket: UnixDatagram,
    state: Mutex<State>,
    ready: Condvar,
    /// Who holds it, too, if somebody does.
    manager: Option<Arc<Manager>>,
}

#[derive(Debug, Default)]
struct State {
    files: Files,
    ready: bool,
    closed: bool,
    /// Whether it was said that there is no room left.
    full: bool,
}

impl Holder {
    /// Listens on `path`, and holds `files` already.
    ///
    /// # Errors
    /// The socket or a thread cannot be made.
    pub(crate) fn new(
        daemon: u64,
        path: &Path,
        files: Files,
        manager: Option<Arc<Manager>>,
    ) -> io::Result<Arc<Self>> {
        // It gets its name when it can be sent to.
        let partial = path.with_extension("new");
        let _ = fs::remove_file(&partial);
        let socket = UnixDatagram::bind(&partial)?;
        fs::rename(&partial, path)?;
        let holder = Arc::new(Self {
            daemon,
            path: path.to_owned(),
            socket,
            state: Mutex::new(State {
                files,
                ..State::default()
            }),
            ready: Condvar::new(),
            manager,
        });
        let listening = Arc::clone(&holder);
        thread::Builder::new()
            .name(format!("hold-{daemon}"))
            .stack_size(256 << 10)
            .spawn(move || listening.listen())?;
        Ok(holder)
    }

    /// Where the daemon leaves its descriptors.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// How many descriptors are held.
    pub(crate) fn count(&self) -> usize {
        self.lock().files.len()
    }

    /// Whether a mount lives on without its daemon.
    pub(crate) fn has_mount(&self) -> bool {
        let mut state = self.lock();
        self.take_in(&mut state);
        state.files.keys().any(|name| name.starts_with(MOUNT))
    }

    /// Copies of everything, for a daemon that is about to be started.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn files(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let mut state = self.lock();
        self.take_in(&mut state);
        state.ready = false;
        let files = state.files.iter();
        files
            .map(|(name, file)| Ok((name.clone(), file.try_clone()?)))
            .collect()
    }

    /// Lets go of everything: the mount is gone, or must go.
    pub(crate) fn clear(&self) {
        let mut state = self.lock();
        self.take_in(&mut state);
        state.ready = false;
        self.let_go(&mut state);
    }

    /// Waits until the daemon that was started last serves, as long as `goes_on`.
    pub(crate) fn wait_until_ready(&self, goes_on: impl Fn() -> bool) -> bool {
        let mut state = self.lock();
        while !state.ready {
            if !goes_on() {
                return false;
            }
            let waited = self.ready.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Has a living daemon leave everything once more, and waits for that as long as
    /// `patience`. Whether its mount would outlive it now.
    pub(crate) fn renew(&self, daemon: &Process, patience: Duration) -> bool {
        {
            let mut state = self.lock();
            self.take_in(&mut state);
            state.ready = false;
        }
        let began = Instant::now();
        daemon.signal_group(AGAIN);
        let goes_on = || daemon.is_alive() && began.elapsed() < patience;
        self.wait_until_ready(goes_on) && self.has_mount()
    }

    /// The end: nobody is listened to any more, and nothing is held.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        self.take_in(&mut state);
        self.let_go(&mut state);
        state.closed = true;
        let _ = fs::remove_file(&self.path);
        // Wakes the thread.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    fn let_go(&self, state: &mut State) {
        for name in state.files.keys() {
            self.pass_on(|manager| manager.remove(self.daemon, name));
        }
        state.files.clear();
    }

    fn listen(&self) {
        loop {
            let mut descriptors = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut descriptors, PollTimeout::NONE).is_err() {
                continue; // A signal came.
            }
            let mut state = self.lock();
            if state.closed {
                return;
            }
            self.take_in(&mut state);
        }
    }

    /// Takes in what was said so far.
    fn take_in(&self, state: &mut State) {
        while !state.closed {
            match receive(&self.socket) {
                Ok(None) => return,
                Ok(Some(notice)) => self.apply(state, notice),
                Err(error) => {
                    tracing::error!("daemon {}: a notice is lost: {error}", label(self.daemon))
                }
            }
        }
    }

    fn apply(&self, state: &mut State, notice: Notice) {
        match notice {
            Notice::Store { name, file } => {
                let most = match self.daemon {
                    SHARED => MAX_FILES_OF_ALL,
                    _ => MAX_FILES,
                };
                if state.files.len() >= most && !state.files.contains_key(&name) {
                    if !std::mem::replace(&mut state.full, true) {
                        tracing::error!(
                            "daemon {}: more than {most} descriptors; the others are not held",
                            label(self.daemon)
                        );
                    }
                    return;
                }
                self.pass_on(|manager| manager.store(self.daemon, &name, &file));
                state.files.insert(name, file);
            }
            Notice::Remove { name } => {
                if state.files.remove(&name).is_some() {
                    self.pass_on(|manager| manager.remove(self.daemon, &name));
                }
            }
            Notice::Ready => {
                state.ready = true;
                self.ready.notify_all();
                tracing::info!(
                    "daemon {}: holding {} descriptors for it",
                    label(self.daemon),
                    state.files.len()
                );
            }
            Notice::Other => {}
        }
    }

    fn pass_on(&self, what: impl FnOnce(&Manager)) {
        if let Some(manager) = &self.manager {
            what(manager);
        }
    }

    /// The state is valid whatever a panicking thread did.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;
    use std::time::Instant;

    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

    use super::*;

    fn say(socket: &UnixDatagram, to: &Path, words: &str, file: Option<&File>) {
        let numbers: Vec<i32> = file.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if file.is_some() { &rights[..] } else { &[] };
        let parts = [io::IoSlice::new(words.as_bytes())];
        let to = UnixAddr::new(to).unwrap();
        let flags = MsgFlags::empty();
        sendmsg(socket.as_raw_fd(), &parts, control, flags, Some(&to)).unwrap();
    }

    #[test]
    fn what_a_daemon_left_is_handed_over_until_it_is_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("7.sock");
        let inherited =
            Files::from([("events.0".to_owned(), tempfile::tempfile().unwrap().into())]);
        let holder = Holder::new(7, &path, inherited, None).unwrap();
        assert!(!holder.has_mount());
        let daemon = UnixDatagram::unbound().unwrap();
        let file = tempfile::tempfile().unwrap();
        for name in ["mount-1.0", "mount-1.note", "image-1.note", "mount-1.0"] {
            let words = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
            say(&daemon, &path, &words, Some(&file));
        }
        say(&daemon, &path, "FDSTOREREMOVE=1\nFDNAME=image-1.note", None);
        say(&daemon, &path, "READY=1", None);
        let deadline = Instant::now() + Duration::from_secs(30);
        assert!(holder.wait_until_ready(|| Instant::now() < deadline));
        assert!(holder.has_mount());
        let files = holder.files().unwrap();
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["events.0", "mount-1.0", "mount-1.note"]);
        // The next daemon has to say that it is ready, too.
        assert!(!holder.wait_until_ready(|| false));
        for index in 0..MAX_FILES {
            let words = format!("FDSTORE=1\nFDNAME=x.{index}");
            say(&daemon, &path, &words, Some(&file));
        }
        assert!(holder.has_mount());
        assert_eq!(holder.count(), MAX_FILES);
        holder.close();
        assert_eq!(holder.count(), 0);
        assert!(!path.exists());
    }
}
