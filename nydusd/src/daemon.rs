//! The life of the daemon: serve what is mounted, and end.
//!
//! It ends when nothing is mounted any more: because a signal asked for that, because
//! somebody else unmounted, or because it could not start. Signals are caught before
//! anything is mounted, so that none is lost. A mount that somebody uses is not taken
//! away from them, and the daemon stays with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::busy;
use crate::mounts::table::{Ended, Mount, Mounts, TakenDown};

/// How long a file system may take to go away after it was unmounted.
const WIND_DOWN: Duration = Duration::from_secs(2);

/// How often the work before the mount looks for a signal.
const POLL: Duration = Duration::from_millis(50);

/// What can end the daemon.
#[derive(Debug)]
enum Event {
    /// A signal asks for the end.
    Signal(i32),
    /// A mount is gone.
    Ended(Ended),
    /// The mounts are left to somebody else.
    Leave,
    /// A fresh worker is to go on.
    PassOn,
}

/// How the daemon comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Nothing is mounted any more.
    Unmounted,
    /// What is mounted is somebody else's from now on.
    Left,
    /// A fresh worker goes on.
    PassedOn,
}

/// Tells the daemon what to do, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct Remote(Sender<Event>);

impl Remote {
    /// End, and leave the mounts.
    pub(crate) fn leave(&self) {
        self.tell(Event::Leave);
    }

    /// End, so that a fresh worker goes on.
    pub(crate) fn pass_on(&self) {
        self.tell(Event::PassOn);
    }

    fn tell(&self, event: Event) {
        // Nobody listens any more when the whole daemon ends.
        let _ = self.0.send(event);
    }
}

/// The wish that the daemon ends, by signal.
#[derive(Debug)]
pub(crate) struct Stop {
    sender: Sender<Event>,
    receiver: Receiver<Event>,
    /// The signal that came first; 0 for none.
    signal: Arc<AtomicI32>,
}

impl Stop {
    /// Catches `SIGTERM` and `SIGINT` from now on.
    ///
    /// # Errors
    /// When the system refuses signal handlers or a thread.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let (sender, receiver) = channel();
        let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot catch signals")?;
        let to_main = sender.clone();
        let signal = Arc::new(AtomicI32::new(0));
        let first = Arc::clone(&signal);
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    first.store(signal, Ordering::Release);
                    if to_main.send(Event::Signal(signal)).is_err() {
                        return;
                    }
                }
            })
            .context("cannot start a thread")?;
        Ok(Self {
            sender,
            receiver,
            signal,
        })
    }

    /// What tells the daemon that a mount has ended.
    pub(crate) fn on_end(&self) -> impl Fn(Ended) + Send + Sync + 'static {
        let to_main = self.remote();
        move |ended| to_main.tell(Event::Ended(ended))
    }

    /// What tells the daemon what to do.
    pub(crate) fn remote(&self) -> Remote {
        Remote(self.sender.clone())
    }

    /// Waits until a signal has come, and names it: for work before the mount
    /// that has to be given up then.
    pub(crate) async fn requested(&self) -> &'static str {
        loop {
            match self.signal.load(Ordering::Acquire) {
                0 => tokio::time::sleep(POLL).await,
                signal => return name(signal),
            }
        }
    }
}

fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

/// Serves `mounts` until all of them have ended; blocks.
///
/// A signal takes them down. One that is in use stays, with a word about who uses it,
/// and so does the daemon; the next signal tries again.
///
/// # Errors
/// When one cannot be unmounted. Ending by signal or unmount is no error.
pub(crate) fn serve(mounts: &Mounts, stop: &Stop) -> anyhow::Result<End> {
    let mut asked = false;
    while !mounts.list().is_empty() {
        match stop.receiver.recv() {
            Ok(Event::Signal(signal)) => {
                asked = true;
                take_down(mounts, stop, name(signal))?;
            }
            Ok(Event::Ended(ended)) => {
                if let Some(mount) = mounts.forget(ended) {
                    tracing::info!("{} was unmounted", mount.mountpoint.display());
                }
                if asked {
                    forget_directory(mounts);
                }
            }
            Ok(Event::Leave) => {
                tracing::info!("stopped; what is mounted is left to who takes over");
                return Ok(End::Left);
            }
            // Nothing waits to be started.
            Ok(Event::PassOn) => {}
            Err(_) => break,
        }
    }
    tracing::info!("stopped");
    Ok(End::Unmounted)
}

/// Waits for what becomes of a daemon that serves nothing yet; blocks.
///
/// * `take_down`: asked by a signal; says whether the daemon can end.
///
/// # Errors
/// Those of `take_down`.
pub(crate) fn wait(
    stop: &Stop,
    take_down: impl Fn() -> anyhow::Result<bool>,
) -> anyhow::Result<End> {
    loop {
        match stop.receiver.recv() {
            Ok(Event::Signal(signal)) => {
                tracing::info!("{}: stopping", name(signal));
                if take_down()? {
                    return Ok(End::Unmounted);
                }
            }
            Ok(Event::Leave) | Err(_) => return Ok(End::Left),
            Ok(Event::PassOn) => return Ok(End::PassedOn),
            Ok(Event::Ended(_)) => {}
        }
    }
}

fn take_down(mounts: &Mounts, stop: &Stop, cause: &str) -> anyhow::Result<()> {
    // The daemon's own directory is older than what is below it.
    for mount in mounts.list().into_iter().rev() {
        if mount.is_directory() {
            forget_directory(mounts);
            continue;
        }
        let place = mount.mountpoint.display();
        tracing::info!("{cause}: unmounting {place}");
        match mount.take_down()? {
            TakenDown::InUse(holders) => tracing::warn!(
                "{place} is in use and goes on being served; used by {}",
                busy::list(&holders)
            ),
            TakenDown::Unmounted => wait_for(mounts, stop, &mount),
        }
    }
    Ok(())
}

/// Ends the daemon's own directory, if nothing is mounted below it any more.
fn forget_directory(mounts: &Mounts) {
    if let [last] = mounts.list().as_slice()
        && last.is_directory()
    {
        mounts.forget(Ended(last.id));
    }
}

/// Waits for the end of a mount that was unmounted here.
fn wait_for(mounts: &Mounts, stop: &Stop, mount: &Mount) {
    let began = Instant::now();
    while mounts.list().iter().any(|other| other.id == mount.id) {
        let left = WIND_DOWN.saturating_sub(began.elapsed());
        match stop.receiver.recv_timeout(left) {
            Ok(Event::Ended(ended)) => {
                mounts.forget(ended);
            }
            // We are at it.
            Ok(Event::Signal(_) | Event::Leave | Event::PassOn) => {}
            Err(_) => {
                tracing::warn!(
                    "{} is unmounted here, but goes on being served for {}",
                    mount.mountpoint.display(),
                    busy::list(&mount.left_over())
                );
                return;
            }
        }
    }
}
