//! The life of the daemon: mount, serve, and end.
//!
//! It ends in one of three ways, and cleanly in all of them: a signal asks it
//! to (the mount is taken down first), somebody else unmounts (the threads that
//! serve it find out), or it cannot start (nothing stays mounted). Signals are
//! caught before anything is mounted, so that none is lost.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::api::Server;
use crate::fuse::session::Session;
use crate::fuse::workers::Workers;
use crate::manager::Manager;
use crate::vfs::Vfs;

/// How long the threads get to notice that the mount is gone.
const WIND_DOWN: Duration = Duration::from_secs(2);

/// How often the work before the mount looks for a signal.
const POLL: Duration = Duration::from_millis(50);

/// What can end the daemon.
#[derive(Debug)]
enum Event {
    /// A signal asks for the end.
    Signal(i32),
    /// All threads that serve the mount have ended.
    Ended,
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

/// Mounts the images of `manager` on `mountpoint` and serves until the end; blocks.
///
/// * `what`: the image, for the log.
/// * `control`: starts the control API; called when the mount is served.
/// * `started`: when the work for this mount began, for the log.
///
/// # Errors
/// When it cannot be mounted or unmounted. Ending by signal or unmount is no error.
pub(crate) fn serve(
    manager: &Manager,
    what: &str,
    mountpoint: &Path,
    threads: u16,
    control: impl FnOnce() -> anyhow::Result<Option<Server>>,
    stop: Stop,
    started: Instant,
) -> anyhow::Result<()> {
    let session = Arc::new(Session::mount(mountpoint)?);
    manager.attach(&session);
    let begun = start(&session, Arc::clone(manager.vfs()), threads, stop.sender);
    // Clients take the socket as the sign that all is ready.
    let server = match begun.and_then(|()| control()) {
        Ok(server) => server,
        Err(err) => {
            // Half a mount helps nobody; the first error is the one to report.
            let _ = session.unmount();
            return Err(err);
        }
    };
    let place = session.mountpoint().display();
    tracing::info!(
        "ready: {what} mounted on {place} in {} ms",
        started.elapsed().as_millis()
    );
    match stop.receiver.recv() {
        Ok(Event::Signal(signal)) => {
            tracing::info!("{}: unmounting {place}", name(signal));
            session.unmount()?;
            // Replies under way are finished; what hangs in the network is not waited for.
            let _ = stop.receiver.recv_timeout(WIND_DOWN);
        }
        Ok(Event::Ended) | Err(_) => tracing::info!("{place} was unmounted"),
    }
    drop(server);
    tracing::info!("stopped");
    Ok(())
}

/// Starts the threads and waits until they have answered the first request.
fn start(
    session: &Arc<Session>,
    files: Arc<Vfs>,
    threads: u16,
    ended: Sender<Event>,
) -> anyhow::Result<()> {
    let workers = Workers::start(session, &files, threads)?;
    std::thread::Builder::new()
        .name("watch".to_owned())
        .spawn(move || {
            workers.join();
            // Nobody listens any more when a signal was faster.
            let _ = ended.send(Event::Ended);
        })
        .context("cannot start a thread")?;
    session.wait_until_served()
}
