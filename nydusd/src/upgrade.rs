//! Passing mounts from one daemon to another, while readers wait or do not even notice.
//!
//! A *supervisor* keeps the state of a daemon in its memory: a text and a descriptor that
//! mean nothing to it. `sendfd` gives it the state, `takeover` has another daemon fetch
//! it. The state is what the [`keeper`](crate::keeper) holds for the case that a worker
//! dies, so there is one way to go on with mounts, and not two.
//!
//! * A daemon that is to take over waits ([`Phase::Init`]), fetches the state, and tries
//!   out whether it could serve it ([`waiting`]): until then nothing has changed for
//!   anybody. Then the state is with its own keeper ([`Phase::Ready`]).
//! * When it is told to start, its worker ends, and a fresh one goes on, as after a
//!   death. It does not begin while a process of the old daemon lives: of two that read
//!   events of one mount, each would miss some.
//! * A daemon that is told to exit leaves its mounts where they are, if somebody else
//!   holds its state.
//!
//! Who lives and who holds a state is known by a pipe: every process of a daemon has the
//! writing end, every copy of its state the reading end.
//!
//! * [`state`]: the text; [`supervisor`]: the way there and back.

pub(crate) mod state;
mod supervisor;
pub(crate) mod waiting;

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};

use crate::daemon::Remote;
use crate::keeper::{Deposit, Holder as Keeper};
use crate::manager::saved as images;
use crate::mounts::saved::{EVENTS, MOUNT, Phase as MountPhase, Saved};
use waiting::Waiting;

/// What the names of this module's deposits begin with.
pub(crate) const UPGRADE: &str = "upgrade";
/// Name of the deposit that says how far a take-over has come.
const MARK: &str = "upgrade";
/// Its note while nothing is served yet, and from the start on.
const READY: &str = "ready";
const STARTED: &str = "started";
/// Name of the deposit with the ends of other daemons' pipes: a state is good as long as
/// it does not matter that they live.
const PREDECESSORS: &str = "upgrade-predecessors";
/// Name of the deposit with the writing end of our own pipe.
pub(crate) const OWNER: &str = "upgrade-owner";
/// Name of the deposit with the mounts that were asked for before the start.
const POSTED: &str = "upgrade-posted";

/// How long the old daemon may take to end after it was told to.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(10);

/// How far a daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waits to take over.
    Init,
    /// Has the state, and serves nothing yet.
    Ready,
    /// Serves.
    Running,
}

impl Phase {
    /// As clients know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Init => "INIT",
            Self::Ready => "READY",
            Self::Running => "RUNNING",
        }
    }
}

/// Why a step was refused.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// Not in this phase.
    Unexpected,
    /// Not yet.
    NotReady(String),
    /// It failed.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// How a daemon ends that was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Its mounts stay: they are somebody else's, or will be.
    Leave,
    /// Its mounts are taken down.
    Unmount,
}

/// The life of a daemon, as clients of the control API see and change it.
#[derive(Debug)]
pub(crate) struct Life {
    phase: Mutex<Phase>,
    /// Held while a step is under way. Whether the start has been called.
    changing: Mutex<bool>,
    keeper: Option<Arc<Keeper>>,
    supervisor: Option<PathBuf>,
    remote: Option<Remote>,
    waiting: Option<Waiting>,
}

impl Life {
    /// Of a daemon that serves.
    pub(crate) fn serving(
        keeper: Arc<Keeper>,
        supervisor: Option<PathBuf>,
        remote: Remote,
    ) -> Self {
        Self {
            phase: Mutex::new(Phase::Running),
            changing: Mutex::default(),
            keeper: Some(keeper),
            supervisor,
            remote: Some(remote),
            waiting: None,
        }
    }

    /// Of a daemon that waits to take over, or has done so.
    pub(crate) fn waiting(
        keeper: Arc<Keeper>,
        supervisor: PathBuf,
        remote: Remote,
        waiting: Waiting,
        phase: Phase,
    ) -> Self {
        Self {
            phase: Mutex::new(phase),
            waiting: Some(waiting),
            ..Self::serving(keeper, Some(supervisor), remote)
        }
    }

    /// Of a daemon that has nobody to pass its mounts to.
    #[cfg(test)]
    pub(crate) fn alone() -> Self {
        Self {
            phase: Mutex::new(Phase::Running),
            changing: Mutex::default(),
            keeper: None,
            supervisor: None,
            remote: None,
            waiting: None,
        }
    }

    /// How far it is.
    pub(crate) fn phase(&self) -> Phase {
        *lock(&self.phase)
    }

    /// Mounts that come later, if nothing is served yet.
    pub(crate) fn waits(&self) -> Option<&Waiting> {
        self.waiting.as_ref()
    }

    /// Gives the state to the supervisor.
    ///
    /// # Errors
    /// There is none, it does not listen, or there is no state yet.
    pub(crate) fn send(&self) -> Result<(), Refusal> {
        let _one = lock(&self.changing);
        let (Some(keeper), Some(path)) = (&self.keeper, &self.supervisor) else {
            return Err(anyhow!("no supervisor: start with --supervisor").into());
        };
        if self.phase() == Phase::Init {
            return Err(Refusal::NotReady("nothing was taken over yet".to_owned()));
        }
        let mut deposits = keeper.copies(is_state)?;
        let mut mounts = deposits.iter().filter(|(name, _)| name.starts_with(MOUNT));
        let served = |deposit: &Deposit| {
            Saved::parse(&deposit.note).is_ok_and(|saved| match saved.phase {
                MountPhase::Served => true,
                MountPhase::Replacing => saved.is_mounted(),
                MountPhase::Mounting => false,
            })
        };
        if deposits.is_empty() || !mounts.all(|(_, deposit)| served(deposit)) {
            return Err(Refusal::NotReady("nothing is mounted yet".to_owned()));
        }
        let mut pipes = Deposit::default();
        pipes.files.push(reading_end(&own_pipe(keeper)?)?);
        if let Some(others) = keeper.copy(PREDECESSORS)? {
            pipes.files.extend(others.files);
        }
        deposits.insert(PREDECESSORS.to_owned(), pipes);
        let text = state::encode(&deposits)?;
        let files = deposits.values().flat_map(|deposit| &deposit.files);
        let files: Vec<_> = files.map(AsFd::as_fd).collect();
        supervisor::send(path, &text, &files)?;
        tracing::info!(
            "the state is with the supervisor: {} bytes, {} descriptors",
            text.len(),
            files.len()
        );
        Ok(())
    }

    /// Takes the state that the supervisor offers.
    ///
    /// # Errors
    /// It has none, or one that cannot be served here; nothing has changed then.
    pub(crate) fn take_over(&self) -> Result<(), Refusal> {
        let _one = lock(&self.changing);
        let (Phase::Init, Some(waiting), Some(keeper), Some(path)) =
            (self.phase(), &self.waiting, &self.keeper, &self.supervisor)
        else {
            return Err(Refusal::Unexpected);
        };
        let (text, bundle) = supervisor::receive(path)?;
        let state = state::decode(&text)?;
        let bundle = bundle.context("no descriptor came with the state")?;
        let files = supervisor::unpack(&bundle, state.files)?;
        let program = state.program.clone();
        let mut deposits = state.assemble(files)?;
        let pipes = deposits.remove(PREDECESSORS).unwrap_or_default();
        ensure_known(!pipes.files.is_empty(), "it does not say whose it is")?;
        let replaceable = !lives(&pipes)?;
        waiting.try_out(&deposits, replaceable)?;
        deposits.insert(PREDECESSORS.to_owned(), pipes);
        adopt(keeper, &deposits).inspect_err(|_| keeper.withdraw_all(is_adopted))?;
        *lock(&self.phase) = Phase::Ready;
        tracing::info!("took over the state of {program}; ready to start");
        Ok(())
    }

    /// Has the mounts that were taken over be served: call [`Life::pass_on`] next.
    ///
    /// # Errors
    /// Nothing was taken over, or the old daemon does not end.
    pub(crate) fn start(&self) -> Result<(), Refusal> {
        let mut started = lock(&self.changing);
        let (Phase::Ready, Some(keeper), false) = (self.phase(), &self.keeper, *started) else {
            return Err(Refusal::Unexpected);
        };
        let pipes = keeper.copy(PREDECESSORS)?.unwrap_or_default();
        let began = Instant::now();
        while lives(&pipes)? {
            if began.elapsed() > PATIENCE {
                return Err(anyhow!(
                    "the old daemon still serves these mounts: it has to exit first"
                )
                .into());
            }
            std::thread::sleep(LOOK);
        }
        keeper.deposit(MARK, STARTED.to_owned(), &[])?;
        keeper.withdraw(PREDECESSORS);
        *started = true;
        Ok(())
    }

    /// Lets a fresh worker go on.
    pub(crate) fn pass_on(&self) {
        if let Some(remote) = &self.remote {
            remote.pass_on();
        }
    }

    /// How the daemon has to end, if it is asked to exit.
    pub(crate) fn exit(&self) -> Exit {
        if self.waiting.is_some() {
            return Exit::Leave;
        }
        let pipe = self.keeper.as_ref().map(|keeper| keeper.copy(OWNER));
        match pipe {
            Some(Ok(Some(pipe))) if pipe.files.iter().all(is_held) => Exit::Leave,
            Some(Ok(Some(_))) => {
                tracing::warn!("nobody holds the state any more; exit unmounts");
                Exit::Unmount
            }
            _ => Exit::Unmount,
        }
    }

    /// Ends the daemon, and leaves its mounts.
    pub(crate) fn leave(&self) {
        if let Some(remote) = &self.remote {
            remote.leave();
        }
    }
}

/// The phase of a worker whose keeper holds `keeper`'s deposits, if it has to wait
/// because of them.
pub(crate) fn is_ready(mark: Option<&Deposit>) -> bool {
    mark.is_some_and(|mark| mark.note == READY)
}

/// Name of the deposit for [`is_ready`] and [`is_started`].
pub(crate) const fn mark() -> &'static str {
    MARK
}

/// Whether the mounts in `keeper` were taken over, and not served since.
///
/// # Errors
/// Out of descriptors.
pub(crate) fn is_started(keeper: &Keeper) -> anyhow::Result<bool> {
    let mark = keeper.copy(MARK)?;
    Ok(mark.is_some_and(|mark| mark.note == STARTED))
}

/// What was taken over is served.
pub(crate) fn finish(keeper: &Keeper) {
    keeper.withdraw(POSTED);
    keeper.withdraw(MARK);
}

/// Whether this daemon has a mount whose old daemon still lives.
pub(crate) fn has_predecessor(keeper: &Keeper) -> anyhow::Result<bool> {
    lives(&keeper.copy(PREDECESSORS)?.unwrap_or_default())
}

/// Leaves everything with our keeper, the mark first: a worker that finds it does not
/// begin to serve.
fn adopt(keeper: &Keeper, deposits: &crate::keeper::Deposits) -> anyhow::Result<()> {
    keeper.deposit(MARK, READY.to_owned(), &[])?;
    for (name, deposit) in deposits {
        let files: Vec<_> = deposit.files.iter().map(AsFd::as_fd).collect();
        keeper.deposit(name, deposit.note.clone(), &files)?;
    }
    Ok(())
}

/// What belongs to the state of a daemon. Its control socket does not: clients take
/// the end of that as the end of the daemon.
fn is_state(name: &str) -> bool {
    name.starts_with(MOUNT)
        || name == EVENTS
        || name == images::TABLE
        || name.starts_with(images::IMAGE)
}

fn is_adopted(name: &str) -> bool {
    is_state(name) || name == MARK || name == PREDECESSORS
}

fn ensure_known(good: bool, words: &str) -> anyhow::Result<()> {
    ensure!(good, "the state is incomplete: {words}");
    Ok(())
}

/// The writing end of this daemon's pipe.
fn own_pipe(keeper: &Keeper) -> anyhow::Result<OwnedFd> {
    if let Some(own) = keeper.copy(OWNER)?.and_then(|mut own| own.files.pop()) {
        return Ok(own);
    }
    let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let (_, own) = nix::unistd::pipe2(flags).context("cannot make a pipe")?;
    keeper.deposit(OWNER, String::new(), &[own.as_fd()])?;
    Ok(own)
}

fn reading_end(own: &OwnedFd) -> anyhow::Result<OwnedFd> {
    let end = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", own.as_raw_fd()))
        .context("cannot open a pipe")?;
    Ok(end.into())
}

/// Whether anybody has a reading end of the pipe that this is the writing end of.
fn is_held(own: &OwnedFd) -> bool {
    !happened(own, PollFlags::POLLERR)
}

/// Whether anybody has a writing end of one of these pipes.
fn lives(pipes: &Deposit) -> anyhow::Result<bool> {
    for end in &pipes.files {
        // Anything else says nothing about a life.
        let meta = nix::sys::stat::fstat(end).context("cannot inspect a descriptor")?;
        let kind =
            nix::sys::stat::SFlag::from_bits_truncate(meta.st_mode) & nix::sys::stat::SFlag::S_IFMT;
        ensure_known(
            kind == nix::sys::stat::SFlag::S_IFIFO,
            "it does not say whose it is",
        )?;
    }
    let ended = |end: &OwnedFd| happened(end, PollFlags::POLLHUP);
    Ok(!pipes.files.iter().all(ended))
}

fn happened(end: &OwnedFd, what: PollFlags) -> bool {
    let mut fds = [PollFd::new(end.as_fd(), PollFlags::empty())];
    let polled = poll(&mut fds, 0_u16);
    let found = fds[0].revents().unwrap_or(PollFlags::empty());
    polled.is_ok() && found.contains(what)
}

/// The state is valid whatever a panicking thread did.
fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_tells_both_sides_of_each_other() {
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let (first, own) = nix::unistd::pipe2(flags).unwrap();
        drop(first);
        assert!(!is_held(&own));
        let end = reading_end(&own).unwrap();
        let copy = Deposit {
            note: String::new(),
            files: vec![end, reading_end(&own).unwrap()],
        };
        assert!(is_held(&own));
        assert!(lives(&copy).unwrap());
        drop(copy);
        assert!(!is_held(&own));
        let copy = Deposit {
            note: String::new(),
            files: vec![reading_end(&own).unwrap()],
        };
        let second = own.try_clone().unwrap();
        drop(own);
        assert!(lives(&copy).unwrap());
        drop(second);
        assert!(!lives(&copy).unwrap());
        let other = Deposit {
            note: String::new(),
            files: vec![std::fs::File::open("/dev/null").unwrap().into()],
        };
        assert!(lives(&other).is_err());
    }
}
