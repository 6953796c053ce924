//! Lazily mounted images: one `nydusd` per image, shared by all its containers.
//!
//! A daemon outlives this process: it is in a process group of its own, and is
//! found again, by its command line in the process table, when the snapshotter
//! comes back. So there are no records of daemons, and none can be wrong. A thread
//! per daemon waits for its end; one that ends while its image is in use is
//! replaced, at growing intervals if that keeps happening. Its mount does not end with
//! it: what the kernel ties that to is held here, too, and handed to the next daemon.
//!
//! Promises: one image has at most one daemon, however many ask for it at once;
//! [`Daemons::attach`] returns when the image can be read; what is held is let go only
//! when nobody uses the image or the mount is gone; credentials reach a daemon through
//! its environment and are never in a file or a command line.
//!
//! Its module `process` starts, finds and ends processes; `holder` is what keeps a mount
//! alive; `settings` writes the configuration of one daemon; `upgrade` replaces the program
//! that all of them run.

pub(crate) mod holder;
pub(crate) mod process;
pub(crate) mod settings;
mod upgrade;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::error::{Error, chain};
use crate::images::Image;
use crate::lifecycle::make_directory;
use crate::manager::{self, Inherited, Manager};
use holder::Holder;
use process::Process;
use settings::Settings;

/// How long the first byte of an image may take: its metadata is on this disk.
const START: Duration = Duration::from_secs(60);
/// How long a daemon may take to end.
const STOP: Duration = Duration::from_secs(10);
/// A daemon that lived as long as this did not fail to start.
const HEALTHY: Duration = Duration::from_secs(60);
/// First pause between two attempts to replace a daemon.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// The images that are mounted now.
#[derive(Debug)]
pub struct Daemons {
    settings: Settings,
    images: Mutex<BTreeMap<u64, Arc<Mutex<Slot>>>>,
    manager: Option<Arc<Manager>>,
    /// What the service manager held for images that nobody has asked for yet.
    inherited: Mutex<Inherited>,
    restarts: AtomicU64,
    /// Whether the daemons of an earlier life are known.
    complete: AtomicBool,
    /// Held while all daemons are replaced.
    upgrading: Mutex<()>,
}

/// One image; locked while its daemon is started or stopped.
#[derive(Debug, Default)]
struct Slot {
    wanted: Option<Image>,
    process: Option<Arc<Process>>,
    /// There if the image was ever asked for, and the system has let us.
    holder: Option<Arc<Holder>>,
    /// Whether a thread tries to start a daemon for what is held.
    retrying: bool,
}

/// What a daemon is doing, for people.
#[derive(Debug, serde::Serialize)]
pub struct Status {
    /// Id of the snapshot with the image's metadata.
    pub snapshot_id: u64,
    /// Process id; none while it is being replaced.
    pub pid: Option<i32>,
    /// Process group of its processes.
    pub group: Option<i32>,
    /// The image.
    pub image_id: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Where its daemon leaves descriptors; empty if nothing is held.
    pub supervisor_path: PathBuf,
    /// How many descriptors are held.
    pub held: usize,
}

impl Daemons {
    /// No daemons yet.
    ///
    /// * `manager`: who holds, too, what is held here;
    /// * `inherited`: what it has given back.
    #[must_use]
    pub fn new(
        settings: Settings,
        manager: Option<Arc<Manager>>,
        inherited: Inherited,
    ) -> Arc<Self> {
        Arc::new(Self {
            settings,
            images: Mutex::default(),
            manager,
            inherited: Mutex::new(inherited),
            restarts: AtomicU64::new(0),
            complete: AtomicBool::new(false),
            upgrading: Mutex::default(),
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
        let holder = self.hold(&mut slot, wanted.id);
        match self.run(&wanted, holder.as_deref()) {
            Ok(process) => {
                slot.process = Some(Arc::clone(&process));
                self.watch(wanted.id, Some(process));
                Ok(())
            }
            Err(error) => {
                slot.process = None;
                if holder.is_some_and(|holder| holder.has_mount()) {
                    // Its readers wait, whether or not somebody asks again.
                    if !std::mem::replace(&mut slot.retrying, true) {
                        self.watch(wanted.id, None);
                    }
                } else {
                    slot.wanted = None;
                }
                Err(error)
            }
        }
    }

    /// Lets go of what was held for images that nobody uses. Call when all others have
    /// been attached: all daemons are known from here on.
    pub fn forget_strangers(&self) {
        self.complete.store(true, Ordering::Release);
        for (image, files) in std::mem::take(&mut *lock(&self.inherited)) {
            tracing::warn!("image {image}: nobody uses it; what was held for it is let go");
            for name in files.keys() {
                if let Some(manager) = &self.manager {
                    manager.remove(image, name);
                }
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
        match locked.holder.take() {
            Some(holder) => holder.close(),
            // Of an earlier life.
            None => drop(fs::remove_file(self.settings.holder_socket(id))),
        }
        let _ = fs::remove_dir_all(self.settings.config_dir(id));
        self.settings.forget(id);
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
                let process = slot.process.as_ref().filter(|process| process.is_alive());
                list.push(Status {
                    snapshot_id,
                    pid: process.map(|process| process.pid()),
                    group: process.and_then(|process| process.group()),
                    image_id: image.reference.clone(),
                    mountpoint: image.mountpoint.clone(),
                    supervisor_path: slot
                        .holder
                        .as_ref()
                        .map(|holder| holder.path().to_owned())
                        .unwrap_or_default(),
                    held: slot.holder.as_ref().map_or(0, |holder| holder.count()),
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

    /// The third holder of the daemon of `id`, if the system lets us be one.
    fn hold(&self, slot: &mut Slot, id: u64) -> Option<Arc<Holder>> {
        if let Some(holder) = &slot.holder {
            return Some(Arc::clone(holder));
        }
        let path = self.settings.holder_socket(id);
        let made = path
            .parent()
            .map_or(Ok(()), |directory| make_directory(directory, 0o700))
            .and_then(|()| {
                let files = lock(&self.inherited).remove(&id).unwrap_or_default();
                Holder::new(id, &path, files, self.manager.clone())
                    .map_err(Error::io(&path, "cannot listen"))
            });
        slot.holder = made
            .inspect_err(|error| {
                tracing::error!(
                    "image {id}: {}; its mount will not survive the death of its whole daemon",
                    chain(error)
                );
            })
            .ok();
        slot.holder.clone()
    }

    /// Finds the daemon of `image`, or starts one.
    fn run(&self, image: &Image, holder: Option<&Holder>) -> Result<Arc<Process>, Error> {
        if let Some(process) = process::find(&image.mountpoint) {
            if process::is_mounted(&image.mountpoint) {
                tracing::info!(
                    "image {}: its daemon, process {}, still runs",
                    image.reference,
                    process.pid()
                );
                // We may have been away, and have nothing, or not the latest.
                process.signal_group(holder::AGAIN);
                self.settings.learn(image.id, &process);
                return Ok(Arc::new(process));
            }
            process.end(STOP);
        }
        if let Some(holder) = holder {
            let held = holder.has_mount();
            if held && process::is_mounted(&image.mountpoint) {
                tracing::warn!(
                    "image {}: its whole daemon has died; the next one gets {} descriptors",
                    image.reference,
                    holder.count()
                );
                let command = self.command(image, true)?;
                return self.resume(image, holder, command, START);
            }
            holder.clear();
        }
        self.mount(image, holder)
    }

    /// The command that serves `image` with the program that is used now.
    fn command(&self, image: &Image, held: bool) -> Result<Command, Error> {
        let program = self.settings.program();
        self.settings.command(image, held, &program)
    }

    /// Starts a daemon that goes on with the mount of one that is gone, and has this long
    /// to do so.
    fn resume(
        &self,
        image: &Image,
        holder: &Holder,
        command: Command,
        patience: Duration,
    ) -> Result<Arc<Process>, Error> {
        let began = Instant::now();
        let files = holder.files().map_err(|error| Error::Mount {
            image: image.reference.clone(),
            reason: format!("cannot copy what is held: {error}"),
        })?;
        let process = self.start(image, Some(holder), files, command)?;
        let goes_on = || process.is_alive() && began.elapsed() < patience;
        if !holder.wait_until_ready(goes_on) {
            // All of it, at once: it may have begun to answer, and the next one must not
            // be a second one. Nothing is lost, because everything is held.
            process.kill_group(STOP);
            return Err(self.useless(image, &process, "does not go on with it"));
        }
        tracing::info!(
            "image {}: served again by process {} after {} ms",
            image.reference,
            process.pid(),
            began.elapsed().as_millis()
        );
        Ok(Arc::new(process))
    }

    /// Starts a daemon that mounts `image`.
    fn mount(&self, image: &Image, holder: Option<&Holder>) -> Result<Arc<Process>, Error> {
        lament(image);
        detach(&image.mountpoint);
        fs::create_dir_all(&image.mountpoint)
            .map_err(Error::io(&image.mountpoint, "cannot make the directory"))?;
        let began = Instant::now();
        let command = self.command(image, holder.is_some())?;
        let process = self.start(image, holder, Vec::new(), command)?;
        while !process::is_mounted(&image.mountpoint) {
            if !process.is_alive() || began.elapsed() > START {
                return Err(self.useless(image, &process, "did not mount it"));
            }
            thread::sleep(Duration::from_millis(2));
        }
        // Answered by the daemon: from here on it serves.
        if let Err(error) = fs::metadata(&image.mountpoint) {
            let error = format!("does not serve it: {}", chain(&error));
            let error = self.useless(image, &process, &error);
            detach(&image.mountpoint);
            return Err(error);
        }
        tracing::info!(
            "image {}: mounted by process {} in {} ms",
            image.reference,
            process.pid(),
            began.elapsed().as_millis()
        );
        Ok(Arc::new(process))
    }

    /// Starts a daemon with `files`, by name, as its own.
    fn start(
        &self,
        image: &Image,
        holder: Option<&Holder>,
        files: Vec<(String, OwnedFd)>,
        mut command: Command,
    ) -> Result<Process, Error> {
        let (names, files): (Vec<String>, Vec<OwnedFd>) = files.into_iter().unzip();
        manager::introduce(&mut command, holder.map(Holder::path), &names);
        let log = self.settings.log_file(image.id);
        Process::start(&command, &log, &files).map_err(|error| Error::Mount {
            image: image.reference.clone(),
            reason: format!(
                "cannot start {}: {error}",
                Path::new(command.get_program()).display()
            ),
        })
    }

    /// Ends a daemon that does not do what it should.
    fn useless(&self, image: &Image, process: &Process, what: &str) -> Error {
        process.end(STOP);
        Error::Mount {
            image: image.reference.clone(),
            reason: format!(
                "nydusd {what}: {}",
                last_words(&self.settings.log_file(image.id))
            ),
        }
    }

    /// Waits, in a thread, for the end of a daemon, and replaces it if its image is
    /// still wanted. Without a daemon, only the latter.
    fn watch(self: &Arc<Self>, id: u64, process: Option<Arc<Process>>) {
        let daemons = Arc::clone(self);
        let watch = move || {
            let mut process = process;
            let mut pause = FIRST_PAUSE;
            if process.is_none() {
                thread::sleep(pause);
            }
            loop {
                let began = Instant::now();
                if let Some(process) = &process {
                    process.wait();
                }
                if began.elapsed() > HEALTHY {
                    pause = FIRST_PAUSE;
                }
                process = daemons.replace(id, process.as_ref(), &mut pause);
                if process.is_none() {
                    return;
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

    /// Replaces `dead` until that works; `None` if it was ended on purpose, or replaced
    /// by somebody else.
    fn replace(
        &self,
        id: u64,
        dead: Option<&Arc<Process>>,
        pause: &mut Duration,
    ) -> Option<Arc<Process>> {
        loop {
            let slot = self.slot(id);
            let mut slot = lock(&slot);
            slot.retrying &= dead.is_some();
            let same = match (&slot.process, dead) {
                (Some(process), Some(dead)) => Arc::ptr_eq(process, dead),
                (None, None) => true,
                _ => false,
            };
            if !same {
                return None;
            }
            let image = slot.wanted.clone()?;
            if let Some(dead) = dead {
                tracing::warn!(
                    "image {}: process {} of its daemon has ended",
                    image.reference,
                    dead.pid()
                );
            }
            let holder = self.hold(&mut slot, id);
            match self.run(&image, holder.as_deref()) {
                Ok(process) => {
                    if !process.was_found() {
                        self.restarts.fetch_add(1, Ordering::Relaxed);
                    }
                    slot.process = Some(Arc::clone(&process));
                    return Some(process);
                }
                Err(error) => tracing::error!("{}; trying again in {pause:?}", chain(&error)),
            }
            slot.retrying = dead.is_none();
            drop(slot);
            thread::sleep(*pause);
            *pause = (*pause * 2).min(MAX_PAUSE);
        }
    }
}

/// Says so if containers have lost their root: it is mounted, and nobody answers for it.
fn lament(image: &Image) {
    let Some(kind) = process::kind_of_mount(&image.mountpoint) else {
        return;
    };
    let cost = match kind.as_str() {
        "erofs" => "what they had not fetched reads as ZEROS",
        _ => "they cannot read any more",
    };
    tracing::error!(
        "image {}: its whole daemon has died, and nobody held its mount. Restart the \
         containers that run on it: {cost}",
        image.reference
    );
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
