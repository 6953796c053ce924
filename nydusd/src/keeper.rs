//! Keeper and worker: two processes, so that the death of either is nobody's business.
//!
//! The kernel ties the life of a mount to descriptors: `/dev/fuse` for FUSE, the
//! fanotify group for EROFS. The *worker* serves mounts, and leaves copies of these
//! descriptors, with a note each, as [`Deposit`]s with the *keeper*, which does nothing
//! but hold them. When the worker dies, the keeper starts another one and hands them
//! over; meanwhile readers wait. When the keeper dies, the worker, which has the same
//! descriptors, starts another one ([`Holder`]); nobody notices.
//!
//! * [`process`]: what the keeper does;
//! * [`channel`]: how the two talk, [`rights`]: how descriptors come, [`text`]: what is
//!   too long for that;
//! * [`store`]: a third holder, where there is one;
//! * [`group`]: what keeps a limit for the worker from the keeper;
//! * `docs/crash-safety.md`: what each death costs, with the test that proves it.
//!
//! The process that a user starts becomes the keeper; it lives as long as anything is
//! mounted, and ends with the exit code of its worker.

pub(crate) mod channel;
mod group;
pub(crate) mod process;
pub(crate) mod rights;
mod store;
pub(crate) mod text;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};

use channel::{Channel, Message};

/// First word of a worker's arguments.
pub(crate) const WORKER: &str = "worker";
/// First word of the arguments of a keeper that a worker has started.
pub(crate) const KEEPER: &str = "keeper";
/// Pause after a keeper could not be started.
const RETRY: Duration = Duration::from_secs(1);

/// What a successor needs to serve in the place of a process that died.
#[derive(Debug, Default)]
pub(crate) struct Deposit {
    /// A note to the successor, JSON.
    pub note: String,
    /// The descriptors, in an order that the note's author knows.
    pub files: Vec<OwnedFd>,
}

impl Deposit {
    /// The same note, and copies of the descriptors.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn try_clone(&self) -> anyhow::Result<Self> {
        let files = self.files.iter().map(OwnedFd::try_clone);
        Ok(Self {
            note: self.note.clone(),
            files: files
                .collect::<Result<_, _>>()
                .context("cannot copy a descriptor")?,
        })
    }
}

/// All deposits, by name.
pub(crate) type Deposits = BTreeMap<String, Deposit>;

/// The worker's side: its deposits, and the keeper that has copies of them.
pub(crate) struct Holder {
    state: Mutex<State>,
    /// Our own arguments, for a keeper that has to start our successor.
    arguments: Vec<OsString>,
}

#[derive(Default)]
struct State {
    deposits: Deposits,
    keeper: Option<Arc<Channel>>,
    ready: bool,
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder")
            .field("deposits", &self.lock().deposits)
            .finish_non_exhaustive()
    }
}

impl Holder {
    /// Talks to the keeper that has started this process, which holds `deposits`.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(crate) fn new(
        keeper: Channel,
        deposits: Deposits,
        arguments: Vec<OsString>,
    ) -> anyhow::Result<Arc<Self>> {
        let holder = Arc::new(Self {
            state: Mutex::new(State {
                deposits,
                keeper: Some(Arc::new(keeper)),
                ready: false,
            }),
            arguments,
        });
        let watched = Arc::clone(&holder);
        std::thread::Builder::new()
            .name("keeper".to_owned())
            .stack_size(256 << 10)
            .spawn(move || watched.watch())
            .context("cannot start a thread")?;
        Ok(holder)
    }

    /// Tells the keeper that signals are caught here from now on.
    pub(crate) fn ready(&self) {
        let mut state = self.lock();
        state.ready = true;
        state.tell(&Message::Ready, &[]);
    }

    /// Tells the keeper that everything it handed over is served again.
    pub(crate) fn serving(&self) {
        self.lock().tell(&Message::Serving, &[]);
    }

    /// Leaves copies of `files` with the keeper, in the place of an earlier deposit of
    /// that name. When this returns they outlive this process.
    ///
    /// # Errors
    /// When descriptors cannot be copied.
    pub(crate) fn deposit(
        &self,
        name: &str,
        note: String,
        files: &[BorrowedFd<'_>],
    ) -> anyhow::Result<()> {
        let files = files
            .iter()
            .map(|file| file.try_clone_to_owned())
            .collect::<Result<_, _>>()
            .context("cannot copy a descriptor")?;
        let deposit = Deposit { note, files };
        let mut state = self.lock();
        state.tell_deposit(name, &deposit);
        state.deposits.insert(name.to_owned(), deposit);
        Ok(())
    }

    /// Ends a deposit: what it was for is gone.
    pub(crate) fn withdraw(&self, name: &str) {
        let mut state = self.lock();
        let message = Message::Withdraw {
            name: name.to_owned(),
        };
        state.tell(&message, &[]);
        state.deposits.remove(name);
    }

    /// Ends all deposits whose names `which` picks.
    pub(crate) fn withdraw_all(&self, which: impl Fn(&str) -> bool) {
        let names: Vec<String> = self.lock().deposits.keys().cloned().collect();
        // What keeps the keeper comes first: it must not go on with a part.
        let (mounts, others): (Vec<_>, Vec<_>) = names
            .into_iter()
            .filter(|name| which(name))
            .partition(|name| name.starts_with(crate::mounts::saved::MOUNT));
        for name in mounts.iter().chain(&others) {
            self.withdraw(name);
        }
    }

    /// A copy of a deposit, if there is one of that name.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn copy(&self, name: &str) -> anyhow::Result<Option<Deposit>> {
        let state = self.lock();
        state.deposits.get(name).map(Deposit::try_clone).transpose()
    }

    /// Copies of the deposits whose names `which` picks, all of one moment.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn copies(&self, which: impl Fn(&str) -> bool) -> anyhow::Result<Deposits> {
        let state = self.lock();
        let picked = state.deposits.iter().filter(|(name, _)| which(name));
        picked
            .map(|(name, deposit)| Ok((name.clone(), deposit.try_clone()?)))
            .collect()
    }

    /// Tells the keeper that this process ends so that another one goes on.
    pub(crate) fn relieve(&self) {
        self.lock().tell(&Message::Relieve, &[]);
    }

    /// Waits for the end of the keeper, and starts another one; for ever.
    fn watch(&self) {
        let mut child: Option<Child> = None;
        loop {
            let keeper = self.lock().keeper.clone();
            if let Some(keeper) = keeper {
                // A keeper that lives says nothing.
                while keeper.receive().is_ok_and(|message| message.is_some()) {}
                tracing::warn!("the keeper has died; starting another one");
            }
            if let Some(mut child) = child.take() {
                let _ = child.wait();
            }
            match self.start_keeper() {
                Ok(started) => {
                    tracing::info!("keeper is process {}", started.id());
                    child = Some(started);
                }
                Err(error) => {
                    tracing::error!("no keeper: {error:#}; trying again");
                    std::thread::sleep(RETRY);
                }
            }
        }
    }

    fn start_keeper(&self) -> anyhow::Result<Child> {
        let mut state = self.lock();
        state.keeper = None;
        let (ours, theirs) = Channel::pair()?;
        let me = std::process::id().to_string();
        let mut command = process::program(&theirs, KEEPER)?;
        command.arg(me).args(&self.arguments);
        let child = command.spawn().context("cannot start a process")?;
        state.keeper = Some(Arc::new(ours));
        let State { deposits, .. } = &*state;
        for (name, deposit) in deposits {
            state.tell_deposit(name, deposit);
        }
        if state.ready {
            state.tell(&Message::Ready, &[]);
        }
        state.tell(&Message::Complete, &[]);
        Ok(child)
    }

    /// The state is valid whatever a panicking thread did.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tell(&self, message: &Message, files: &[BorrowedFd<'_>]) {
        // A keeper that is gone is replaced by one that is told everything.
        if let Some(keeper) = &self.keeper
            && let Err(error) = keeper.send(message, files)
        {
            tracing::debug!("the keeper was not told: {error}");
        }
    }

    fn tell_deposit(&self, name: &str, deposit: &Deposit) {
        if let Some(keeper) = &self.keeper
            && let Err(error) = send_deposit(keeper, name, deposit)
        {
            tracing::debug!("the keeper was not told: {error}");
        }
    }
}

/// Sends a deposit, in as many messages as its descriptors need.
fn send_deposit(to: &Channel, name: &str, deposit: &Deposit) -> std::io::Result<()> {
    let files: Vec<BorrowedFd<'_>> = deposit.files.iter().map(|file| file.as_fd()).collect();
    let mut parts = files.chunks(channel::MAX_FILES);
    let mut part = parts.next().unwrap_or_default();
    let mut note = Some(deposit.note.clone());
    loop {
        let next = parts.next();
        let message = Message::Deposit {
            name: name.to_owned(),
            note: note.take(),
            more: next.is_some(),
        };
        to.send(&message, part)?;
        match next {
            Some(next) => part = next,
            None => return Ok(()),
        }
    }
}

/// Puts deposits together from messages.
#[derive(Debug, Default)]
pub(crate) struct Receiver {
    /// Those that are complete.
    pub deposits: Deposits,
    /// The one whose last part is still to come.
    partial: Deposit,
}

impl Receiver {
    /// Everything that a keeper hands over to a new worker.
    ///
    /// # Errors
    /// When the keeper dies meanwhile, or a message cannot be understood.
    pub(crate) fn everything(keeper: &Channel) -> anyhow::Result<Deposits> {
        let mut received = Self::default();
        loop {
            match keeper.receive().context("cannot listen to the keeper")? {
                Some((Message::Deposit { name, note, more }, files)) => {
                    received.part(name, note, more, files);
                }
                Some((Message::Complete, _)) => return Ok(received.deposits),
                Some(_) => {}
                None => bail!("the keeper has died before it handed over"),
            }
        }
    }

    /// Takes in what a [`Message::Deposit`] brought.
    fn part(&mut self, name: String, note: Option<String>, more: bool, files: Vec<OwnedFd>) {
        if let Some(note) = note {
            self.partial = Deposit {
                note,
                files: Vec::new(),
            };
        }
        self.partial.files.extend(files);
        if !more {
            self.deposits
                .insert(name, std::mem::take(&mut self.partial));
        }
    }
}
