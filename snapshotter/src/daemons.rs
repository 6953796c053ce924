//! Lazily mounted images: one `nydusd` per image, shared by all its containers.
//!
//! A daemon outlives this process: it is in a process group of its own, and is
//! found again, by its command line in the process table, when the snapshotter
//! comes back. So there are no records of daemons, and none can be wrong. A thread
//! per daemon waits for its end; one that ends while its image is in use is
//! replaced, at growing intervals if that keeps happening.
//!
//! Promises: one image has at most one daemon, however many ask for it at once;
//! [`Daemons::attach`] returns when the image can be read; credentials reach a
//! daemon through its environment and are never in a file or a command line.
//!
//! Its module `process` starts, finds and ends processes; `settings` writes the
//! configuration of one daemon.

pub(crate) mod process;
pub(crate) mod settings;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::error::{Error, chain};
use crate::images::Image;
use process::Process;
use settings::Settings;

/// How long the first byte of an image may take: its metadata is on this disk.
const START: Duration = Duration::from_secs(60);
/// How long a daemon may take to end.
const STOP: Duration = Duration::from_secs(10);
/// A daemon that lived as long as this did not fail to start.
const HEALTHY: Duration = Duration::from_secs(60);
/// Longest pause between two attempts to replace a daemon.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// The images that are mounted now.
#[derive(Debug)]
pub struct Daemons {
    settings: Settings,
    images: Mutex<BTreeMap<u64, Arc<Mutex<Slot>>>>,
    restarts: AtomicU64,
}

/// One image; locked while its daemon is started or stopped.
#[derive(Debug, Default)]
struct Slot {
    wanted: Option<Image>,
    process: Option<Arc<Process>>,
}

/// What a daemon is doing, for people.
#[derive(Debug, serde::Serialize)]
pub struct Status {
    /// Id of the snapshot with the image's metadata.
    pub snapshot_id: u64,
    /// Process id; none while it is being replaced.
    pub pid: Option<i32>,
    /// The image.
    pub image_id: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
}

impl Daemons {
    /// No daemons yet.
    #[must_use]
    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            settings,
            images: Mutex::default(),
            restarts: AtomicU64::new(0),
        })
    }

    /// Makes sure that `image` is mounted and can be read.
    ///
    /// # Errors
    /// [`Error::Mount`] with the end of the daemon's log.
    pub fn attach(self: &Arc<Self>, image: &Image) -> Result<(), Error> {
        let slot = self.slot(image.id);
        let mut slot = lock(&slot);
        if let Some(process) = &slot.process
            && process.is_alive()
            && process::is_mounted(&image.mountpoint)
        {
            return Ok(());
        }
        if slot.wanted.is_none() {
            slot.wanted = Some(image.clone());
        } else if let (Some(wanted), Some(account)) = (&mut slot.wanted, &image.account) {
            wanted.account = Some(account.clone());
        }
        let wanted = slot.wanted.clone().unwrap_or_else(|| image.clone());
        let outcome = self.run(&wanted);
        match outcome {
            Ok(process) => {
                slot.process = Some(Arc::clone(&process));
                self.watch(wanted.id, process);
                Ok(())
            }
            Err(error) => {
                *slot = Slot::default();
                Err(error)
            }
        }
    }

    /// Unmounts the image `id` and ends its daemon, unless `is_used`, which is asked
    /// when nobody can attach to it any more.
    pub fn release(&self, id: u64, is_used: impl FnOnce() -> bool) {
        let slot = self.slot(id);
        let mut locked = lock(&slot);
        if is_used() {
            return;
        }
        let mountpoint = self.settings.mountpoint(id);
        let process = locked
            .process
            .take()
            .or_else(|| process::find(&mountpoint).map(Arc::new));
        locked.wanted = None;
        if let Some(process) = process {
            tracing::info!(
                "image {id}: no user left, ending its daemon, process {}",
                process.pid()
            );
            process.end(STOP);
        }
        detach(&mountpoint);
        let _ = fs::remove_dir_all(self.settings.config_dir(id));
        drop(locked);
        let mut images = lock(&self.images);
        // Unless somebody has asked for it meanwhile.
        if images
            .get(&id)
            .is_some_and(|known| Arc::ptr_eq(known, &slot) && Arc::strong_count(known) == 2)
        {
            images.remove(&id);
        }
    }

    /// All images that are mounted, or should be.
    #[must_use]
    pub fn list(&self) -> Vec<Status> {
        let slots: Vec<_> = lock(&self.images)
            .iter()
            .map(|(id, slot)| (*id, Arc::clone(slot)))
            .collect();
        let mut list = Vec::new();
        for (snapshot_id, slot) in slots {
            // One that is being started or stopped is left out rather than waited for.
            if let Ok(slot) = slot.try_lock()
                && let Some(image) = &slot.wanted
            {
                list.push(Status {
                    snapshot_id,
                    pid: slot
                        .process
                        .as_ref()
                        .filter(|p| p.is_alive())
                        .map(|p| p.pid()),
                    image_id: image.reference.clone(),
                    mountpoint: image.mountpoint.clone(),
                });
            }
        }
        list
    }

    /// How often a daemon was replaced.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    fn slot(&self, id: u64) -> Arc<Mutex<Slot>> {
        Arc::clone(lock(&self.images).entry(id).or_default())
    }

    /// Finds the daemon of `image`, or starts one.
    fn run(&self, image: &Image) -> Result<Arc<Process>, Error> {
        let failed = |reason: String| Error::Mount {
            image: image.reference.clone(),
            reason,
        };
        if let Some(process) = process::find(&image.mountpoint) {
            if process::is_mounted(&image.mountpoint) {
                tracing::info!(
                    "image {}: its daemon, process {}, still runs",
                    image.reference,
                    process.pid()
                );
                return Ok(Arc::new(process));
            }
            process.end(STOP);
        }
        detach(&image.mountpoint);
        fs::create_dir_all(&image.mountpoint)
            .map_err(Error::io(&image.mountpoint, "cannot make the directory"))?;
        let began = Instant::now();
        let log = self.settings.log_file(image.id);
        let mut command = self.settings.command(image)?;
        let process = Process::start(&mut command, &log).map_err(|error| {
            failed(format!(
                "cannot start {}: {error}",
                self.settings.program().display()
            ))
        })?;
        while !process::is_mounted(&image.mountpoint) {
            if !process.is_alive() || began.elapsed() > START {
                process.end(STOP);
                return Err(failed(format!(
                    "nydusd did not mount it: {}",
                    last_words(&log)
                )));
            }
            thread::sleep(Duration::from_millis(2));
        }
        // Answered by the daemon: from here on it serves.
        if let Err(error) = fs::metadata(&image.mountpoint) {
            process.end(STOP);
            detach(&image.mountpoint);
            return Err(failed(format!(
                "nydusd does not serve it: {}",
                chain(&error)
            )));
        }
        tracing::info!(
            "image {}: mounted by process {} in {} ms",
            image.reference,
            process.pid(),
            began.elapsed().as_millis()
        );
        Ok(Arc::new(process))
    }

    /// Waits, in a thread, for the end of a daemon, and replaces it if its image is
    /// still wanted.
    fn watch(self: &Arc<Self>, id: u64, process: Arc<Process>) {
        let daemons = Arc::clone(self);
        let watch = move || {
            let mut process = process;
            let mut pause = Duration::from_millis(100);
            loop {
                let began = Instant::now();
                process.wait();
                if began.elapsed() > HEALTHY {
                    pause = Duration::from_millis(100);
                }
                match daemons.replace(id, &process, &mut pause) {
                    Some(next) => process = next,
                    None => return,
                }
            }
        };
        if let Err(error) = thread::Builder::new()
            .name(format!("watch-{id}"))
            .spawn(watch)
        {
            tracing::error!("image {id}: its daemon will not be replaced if it ends: {error}");
        }
    }

    /// Replaces `dead` until that works; `None` if it was ended on purpose.
    fn replace(&self, id: u64, dead: &Arc<Process>, pause: &mut Duration) -> Option<Arc<Process>> {
        loop {
            let slot = self.slot(id);
            let mut slot = lock(&slot);
            if !slot
                .process
                .as_ref()
                .is_some_and(|process| Arc::ptr_eq(process, dead))
            {
                return None;
            }
            let image = slot.wanted.clone()?;
            tracing::warn!(
                "image {}: its daemon, process {}, is gone; starting another",
                image.reference,
                dead.pid()
            );
            self.restarts.fetch_add(1, Ordering::Relaxed);
            match self.run(&image) {
                Ok(process) => {
                    slot.process = Some(Arc::clone(&process));
                    return Some(process);
                }
                Err(error) => tracing::error!("{}; trying again in {pause:?}", chain(&error)),
            }
            drop(slot);
            thread::sleep(*pause);
            *pause = (*pause * 2).min(MAX_PAUSE);
        }
    }
}

/// Unmounts whatever is mounted on `point`, in use or not.
pub(crate) fn detach(point: &Path) {
    while process::is_mounted(point) {
        if let Err(error) = umount2(point, MntFlags::MNT_DETACH) {
            tracing::warn!("cannot unmount {}: {error}", point.display());
            return;
        }
    }
}

/// The last lines of a log, on one line.
fn last_words(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.reverse();
    lines.join(" / ")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic leaves nothing half changed: slots are replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
