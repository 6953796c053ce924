//! The keeper: starts workers, holds what they deposit, passes signals on.
//!
//! It does nothing that can fail for long: one thread, no files of images, no network.
//! It asks the kernel to be the last process that is ended for want of memory.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::channel::{Channel, Message};
use super::group::Groups;
use super::store::{self, Store, Stored};
use super::{Receiver, WORKER, send_deposit};
use crate::fuse::teach::OPENER;
use crate::mounts::saved::MOUNT;
use crate::upgrade::OWNER;

/// The descriptor by which a child process finds its end of the channel.
pub(crate) const CHANNEL: RawFd = 3;
/// Pause before the next worker when the last one died at once; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A worker, alive as far as known.
#[derive(Debug)]
struct Worker {
    pid: Pid,
    /// `None` if it is not our child.
    child: Option<Child>,
    channel: Channel,
    ready: bool,
    /// Whether it has come to serve what it was handed.
    served: bool,
    /// Whether it has said that it ends for the sake of another one.
    relieved: bool,
}

/// The keeper's whole state.
#[derive(Debug)]
struct Keeper {
    arguments: Vec<OsString>,
    held: Receiver,
    /// Who holds it, too, if somebody does.
    store: Option<Store>,
    signals: UnixStream,
    /// Whether the store asks for everything again.
    again: UnixStream,
    /// Whether a signal came that no worker has been told of. One kind of end is
    /// enough, so it is not remembered which it was.
    pending: bool,
    /// What the score for want of memory was before we lowered it.
    score: Option<String>,
    /// The control groups, if keeper and worker have one each.
    groups: Option<Groups>,
    pause: Duration,
}

/// Starts a worker with `arguments`, and keeps for it until nothing is mounted any
/// more. Returns the exit code.
///
/// * `stored`: what an earlier life has left with the service manager ([`restore`]).
///
/// # Errors
/// When the system refuses what a keeper needs, or the first worker cannot be started.
pub(crate) fn run(arguments: Vec<OsString>, stored: Stored) -> anyhow::Result<u8> {
    let mut keeper = Keeper::new(arguments)?;
    keeper.store = Store::of_this_service();
    if let Some(store) = &mut keeper.store {
        store.adopt(&stored);
    }
    if !stored.deposits.is_empty() {
        tracing::warn!(
            "keeper and worker have died at once; going on with what the service manager kept"
        );
        keeper.held.deposits = stored.deposits;
    }
    let worker = keeper.start()?;
    keeper.score = lower_score();
    keeper.keep(worker)
}

/// What an earlier life of this service has left with the service manager. Call once,
/// before any descriptor is opened.
pub(crate) fn restore() -> Stored {
    store::restore()
}

/// Keeps for a worker that has lost its keeper, and started this process.
///
/// * `arguments`: its process id, and its own arguments.
///
/// # Errors
/// When the system refuses what a keeper needs.
pub(crate) fn take_over(mut arguments: Vec<OsString>) -> anyhow::Result<u8> {
    let pid = arguments.first().and_then(|pid| pid.to_str()?.parse().ok());
    let pid = Pid::from_raw(pid.context("no process id")?);
    arguments.remove(0);
    let worker = Worker {
        pid,
        child: None,
        channel: Channel::inherited(channel()?),
        ready: false,
        served: true,
        relieved: false,
    };
    let mut keeper = Keeper::new(arguments)?;
    // All of what follows is stored again by the worker's deposits.
    keeper.store = Store::inherited();
    if let Some(store) = &keeper.store {
        // Otherwise the service would end with its first keeper.
        store.tell(&format!("MAINPID={}", std::process::id()));
    }
    keeper.score = lower_score();
    keeper.keep(worker)
}

/// This program, to be started with one end of a channel and `role` as first argument.
///
/// # Errors
/// Out of descriptors.
pub(crate) fn program(channel: &Channel, role: &str) -> anyhow::Result<Command> {
    // Not by name: the file may have been replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    let name = std::env::args_os().next();
    command.arg0(name.unwrap_or_else(|| OsString::from("nydusd")));
    command.arg(role);
    let channel = channel.as_fd().try_clone_to_owned()?;
    let inherit = move || {
        // The copy at the agreed number is inherited, others are not. `dup2` onto
        // itself would change nothing, and leave it closed at the start.
        let fd = channel.as_raw_fd();
        let done = if fd == CHANNEL {
            // SAFETY: takes plain numbers; async-signal-safe.
            unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }
        } else {
            // SAFETY: as above; whatever had the number belongs to the program that
            // is about to be replaced.
            unsafe { libc::dup2(fd, CHANNEL) }
        };
        if done < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes async-signal-safe calls only.
    unsafe { command.pre_exec(inherit) };
    Ok(command)
}

/// The end of the channel that this process was started with. Call once.
///
/// # Errors
/// When there is none: somebody started a role by hand.
pub(crate) fn channel() -> anyhow::Result<OwnedFd> {
    nix::fcntl::fcntl(
        // SAFETY: only looked at; the call below fails if it is not open.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(CHANNEL) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .context("this is started by nydusd itself only")?;
    // SAFETY: it is open, by agreement with `program`, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(CHANNEL) })
}

impl Keeper {
    fn new(arguments: Vec<OsString>) -> anyhow::Result<Self> {
        let signals = catch(&[SIGTERM, SIGINT])?;
        let again = catch(&[store::AGAIN])?;
        Ok(Self {
            arguments,
            held: Receiver::default(),
            store: None,
            signals,
            again,
            pending: false,
            score: None,
            groups: Groups::enter(),
            pause: FIRST_PAUSE,
        })
    }

    /// Starts a worker and hands everything over to it.
    fn start(&self) -> anyhow::Result<Worker> {
        let (ours, theirs) = Channel::pair()?;
        let mut command = program(&theirs, WORKER)?;
        if self.store.is_none() {
            // It is meant for somebody else; see `Store::of_this_service`.
            command.env_remove(store::SOCKET);
        }
        let child = command
            .args(&self.arguments)
            .spawn()
            .context("cannot start a process")?;
        drop((theirs, command));
        if let Some(score) = &self.score {
            // It is not meant to survive everybody else.
            let _ = fs::write(format!("/proc/{}/oom_score_adj", child.id()), score);
        }
        if let Some(groups) = &self.groups {
            groups.take_in(child.id());
        }
        for (name, deposit) in &self.held.deposits {
            send_deposit(&ours, name, deposit).context("cannot hand over")?;
        }
        ours.send(&Message::Complete, &[])
            .context("cannot hand over")?;
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        tracing::info!("worker is process {pid}");
        Ok(Worker {
            pid,
            child: Some(child),
            channel: ours,
            ready: false,
            served: false,
            relieved: false,
        })
    }

    /// Keeps until nothing is left to keep; returns the exit code.
    fn keep(mut self, mut worker: Worker) -> anyhow::Result<u8> {
        loop {
            self.listen(&mut worker);
            let code = worker.wait();
            // Whatever else there is was for the mounts.
            if !self
                .held
                .deposits
                .keys()
                .any(|name| name.starts_with(MOUNT))
            {
                if let Some(store) = &mut self.store {
                    store.clear();
                }
                if let Some(groups) = self.groups.take() {
                    groups.leave();
                }
                return Ok(code.unwrap_or(0));
            }
            if worker.relieved {
                tracing::info!("the worker makes room for another one");
            } else {
                tracing::error!("the worker has died{}; starting another one", worker.how());
            }
            worker = self.start_again(worker.served);
        }
    }

    /// * `served`: whether the last worker had come to serve; if not, the next one
    ///   may fare no better, so there is a pause.
    fn start_again(&mut self, mut served: bool) -> Worker {
        loop {
            if served {
                self.pause = FIRST_PAUSE;
            } else {
                std::thread::sleep(self.pause);
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
            match self.start() {
                Ok(worker) => return worker,
                Err(error) => tracing::error!("no worker: {error:#}; trying again"),
            }
            served = false;
        }
    }

    /// Takes in what the worker says and passes signals on, until the worker is gone.
    fn listen(&mut self, worker: &mut Worker) {
        loop {
            let [said, signalled, again] = {
                let mut fds = [
                    PollFd::new(worker.channel.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.again.as_fd(), PollFlags::POLLIN),
                ];
                if poll(&mut fds, PollTimeout::NONE).is_err() {
                    continue; // A signal came; it is in the pipe.
                }
                fds.map(|fd| fd.any().unwrap_or(true))
            };
            if signalled {
                drain(&mut self.signals);
                self.pending = true;
            }
            if again {
                drain(&mut self.again);
                self.store_again(worker.served);
            }
            if said && !self.hear(worker) {
                return;
            }
            if worker.ready && std::mem::take(&mut self.pending) {
                let _ = kill(worker.pid, Signal::SIGTERM);
            }
        }
    }

    /// * `served`: whether the worker serves what there is.
    fn store_again(&mut self, served: bool) {
        if let Some(store) = &mut self.store {
            store.put_again(&self.held.deposits);
            if served {
                store.tell("READY=1");
            }
        }
    }

    /// One message; `false` at the end of the worker.
    fn hear(&mut self, worker: &mut Worker) -> bool {
        match worker.channel.receive() {
            Ok(None) => return false,
            Ok(Some((message, files))) => match message {
                Message::Deposit { name, note, more } => {
                    self.held.part(name.clone(), note, more, files);
                    if let (Some(store), Some(deposit)) =
                        (&mut self.store, self.held.deposits.get(&name))
                        && !more
                        // Whoever has this is taken for the daemon itself.
                        && name != OWNER
                    {
                        store.put(&name, deposit);
                    }
                }
                Message::Withdraw { name } => {
                    self.held.deposits.remove(&name);
                    if let Some(store) = &mut self.store {
                        store.remove(&name);
                    }
                }
                Message::Ready => worker.ready = true,
                Message::Serving => {
                    worker.served = true;
                    if let Some(store) = &self.store {
                        store.tell("READY=1");
                    }
                }
                Message::Relieve => worker.relieved = true,
                Message::Complete => {}
            },
            Err(error) => tracing::error!("a message of the worker is lost: {error}"),
        }
        true
    }
}

impl Worker {
    /// Waits for its end; its exit code, if it is our child and had one.
    fn wait(&mut self) -> Option<u8> {
        let status = self.child.as_mut()?.wait().ok()?;
        let failed = status.signal().map(|_| 1);
        failed.or_else(|| u8::try_from(status.code()?).ok())
    }

    fn how(&mut self) -> String {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        status.map_or_else(String::new, |status| format!(" ({status})"))
    }
}

/// A stream that can be read after one of `signals` came.
fn catch(signals: &[i32]) -> anyhow::Result<UnixStream> {
    let (stream, sender) = UnixStream::pair().context("cannot make a socket pair")?;
    stream.set_nonblocking(true)?;
    for signal in signals {
        signal_hook::low_level::pipe::register(*signal, sender.try_clone()?)
            .context("cannot catch signals")?;
    }
    Ok(stream)
}

fn drain(stream: &mut UnixStream) {
    let mut bytes = [0; 64];
    while stream.read(&mut bytes).is_ok_and(|len| len > 0) {}
}

/// Asks the kernel to end this process last; returns what the score was.
fn lower_score() -> Option<String> {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let before = fs::read_to_string(SCORE).ok();
    if let Err(error) = fs::write(SCORE, "-1000") {
        tracing::warn!(
            "the keeper can be ended for want of memory like any process: {error} \
             (needs CAP_SYS_RESOURCE)"
        );
    }
    before
}

/// The role that the first argument names, if any, and the other arguments.
pub(crate) fn role(arguments: &[OsString]) -> Option<&OsStr> {
    let word = arguments.get(1)?;
    let roles = [super::WORKER, super::KEEPER, OPENER];
    roles
        .iter()
        .any(|role| word == role)
        .then_some(word.as_os_str())
}
