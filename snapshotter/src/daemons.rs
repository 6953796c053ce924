//! Lazily mounted images: one `nydusd` for all of them, or one per image.
//!
//! A daemon outlives this process: it is in a process group of its own, and is
//! found again, by its command line in the process table, when the snapshotter
//! comes back. So there are no records of daemons, and none can be wrong. A thread
//! per daemon waits for its end; one that ends while it is needed is replaced, at
//! growing intervals if that keeps happening. Its mounts do not end with it: what the
//! kernel ties those to is held here, too, and handed to the next daemon.
//!
//! Which of both an image gets is said by the configuration when it is mounted, and stays
//! so until nobody uses it (`Place`): containers keep their root when the configuration
//! changes.
//!
//! Promises: one image is served by at most one daemon, however many ask for it at once;
//! [`Daemons::attach`] returns when the image can be read; what is held is let go only
//! when nobody uses the image or the mount is gone; credentials reach a daemon through
//! its environment or its control socket and are never in a file or a command line.
//!
//! The modules: `process` starts, finds and ends processes; `holder` is what keeps mounts
//! alive; `service` is the task of a daemon, and `settings` with `template` what it is
//! told; `run` begins a daemon and `watch` replaces it; `shared` knows the images of the
//! one that serves all, by way of `client`; `upgrade` replaces the program of all.

mod client;
pub(crate) mod holder;
pub(crate) mod process;
mod run;
mod service;
pub(crate) mod settings;
mod shared;
mod template;
mod upgrade;
mod watch;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::Error;
use crate::images::Image;
use crate::manager::{Inherited, Manager};
use holder::Holder;
use process::Process;
use service::{SHARED, Service, label};
use settings::Settings;
use shared::Member;

/// How long a daemon may take to end.
const STOP: Duration = Duration::from_secs(10);
/// Most images of one daemon (`docs/api.md`); further ones get their own.
const MAX_IMAGES: usize = 255;

/// The images that are mounted now.
#[derive(Debug)]
pub struct Daemons {
    settings: Settings,
    /// The images, by the ids of their snapshots.
    places: Mutex<BTreeMap<u64, Place>>,
    /// The daemon of all images.
    shared: Arc<Mutex<Slot>>,
    manager: Option<Arc<Manager>>,
    /// What the service manager held for daemons that nobody has asked for yet.
    inherited: Mutex<Inherited>,
    restarts: AtomicU64,
    /// Whether the daemons of an earlier life are known.
    complete: AtomicBool,
    /// Held while all daemons are replaced.
    upgrading: Mutex<()>,
}

/// What serves an image.
#[derive(Clone, Debug)]
enum Place {
    /// A daemon of its own.
    Own(Arc<Mutex<Slot>>),
    /// The daemon of all images.
    Shared(Arc<Member>),
}

/// One daemon; locked while it is started or stopped.
#[derive(Debug, Default)]
struct Slot {
    wanted: Option<Service>,
    process: Option<Arc<Process>>,
    /// There if the daemon was ever asked for, and the system has let us.
    holder: Option<Arc<Holder>>,
    /// Whether a thread tries to start a daemon for what is held.
    retrying: bool,
    /// Whether its image was released: another slot may have its place.
    gone: bool,
}

/// What a daemon is doing, for people.
#[derive(Debug)]
pub struct Status {
    /// What it is called.
    pub id: String,
    /// Process id; none while it is being replaced.
    pub pid: Option<i32>,
    /// Process group of its processes.
    pub group: Option<i32>,
    /// Where it mounts its image, or below which.
    pub mountpoint: PathBuf,
    /// Its control socket; empty if it has none.
    pub api_socket: PathBuf,
    /// Where it leaves descriptors; empty if nothing is held.
    pub supervisor_path: PathBuf,
    /// How many descriptors are held.
    pub held: usize,
    /// Its images.
    pub images: Vec<Instance>,
}

/// An image of a daemon.
#[derive(Debug)]
pub struct Instance {
    /// Id of the snapshot with the image's metadata.
    pub snapshot_id: u64,
    /// The image.
    pub image_id: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
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
            places: Mutex::default(),
            shared: Arc::default(),
            manager,
            inherited: Mutex::new(inherited),
            restarts: AtomicU64::new(0),
            complete: AtomicBool::new(false),
            upgrading: Mutex::default(),
        })
    }

    /// Finds out what serves the images that an earlier life has mounted. Call before
    /// anything is asked for.
    ///
    /// * `images`: id and reference of each, and whether it has users.
    pub fn adopt(&self, images: &[(u64, &str, bool)]) {
        let layout = self.settings.layout();
        let served = process::served();
        let shared = layout.shared();
        let has_shared = served.contains(&shared) || !process::mounts_in(&shared).is_empty();
        let mut places = lock(&self.places);
        for &(id, reference, is_used) in images {
            let own = layout.mountpoint(id);
            if served.contains(&own) || process::is_mounted(&own) {
                places.insert(id, Place::Own(Arc::default()));
            } else if has_shared && is_used {
                places.insert(id, Place::Shared(Member::new(id, reference)));
            }
        }
    }

    /// Makes sure that `image` is mounted and can be read; returns where.
    ///
    /// # Errors
    /// [`Error::Mount`] with the end of the daemon's log.
    pub fn attach(self: &Arc<Self>, image: &Image) -> Result<PathBuf, Error> {
        loop {
            let attached = match self.place(image) {
                Place::Own(slot) => self.attach_own(&slot, image),
                Place::Shared(member) => self.attach_member(&member, image),
            };
            if let Some(done) = attached {
                return done;
            }
        }
    }

    /// What serves an image from now on.
    fn place(&self, image: &Image) -> Place {
        let mut places = lock(&self.places);
        if let Some(place) = places.get(&image.id) {
            return place.clone();
        }
        let is_shared = |place: &&Place| matches!(place, Place::Shared(_));
        let full = places.values().filter(is_shared).count() >= MAX_IMAGES;
        let place = match self.settings.is_shared() && !full {
            true => Place::Shared(Member::new(image.id, &image.reference)),
            false => Place::Own(Arc::default()),
        };
        places.insert(image.id, place.clone());
        place
    }

    /// The same for an image with a daemon of its own; `None` if it was released meanwhile.
    fn attach_own(
        self: &Arc<Self>,
        slot: &Arc<Mutex<Slot>>,
        image: &Image,
    ) -> Option<Result<PathBuf, Error>> {
        let mut slot = lock(slot);
        if slot.gone {
            return None;
        }
        let point = self.settings.layout().mountpoint(image.id);
        if let Some(process) = &slot.process
            && process.is_alive()
            && process::is_mounted(&point)
        {
            return Some(Ok(point));
        }
        let new = || Service::one(image, self.settings.layout());
        let mut service = slot.wanted.clone().unwrap_or_else(new);
        if let (Some(wanted), Some(account)) = (&mut service.image, &image.account) {
            wanted.account = Some(account.clone());
        }
        slot.wanted = Some(service.clone());
        Some(self.bring_up(&mut slot, &service).map(|()| point))
    }

    /// Lets go of what was held for images that nobody uses. Call when all others have
    /// been attached: all daemons are known from here on.
    pub fn forget_strangers(self: &Arc<Self>) {
        if self.members().is_empty() {
            if process::find(&self.settings.layout().shared()).is_some() {
                self.retire();
            }
        } else {
            self.restore_later();
        }
        self.complete.store(true, Ordering::Release);
        for (daemon, files) in std::mem::take(&mut *lock(&self.inherited)) {
            let name = label(daemon);
            tracing::warn!("daemon {name}: nobody uses it; what was held for it is let go");
            for name in files.keys() {
                if let Some(manager) = &self.manager {
                    manager.remove(daemon, name);
                }
            }
        }
    }

    /// Whether anything serves the image `id`, or something of it is mounted.
    #[must_use]
    pub fn knows(&self, id: u64) -> bool {
        lock(&self.places).contains_key(&id)
    }

    /// Unmounts the image `id`, and ends its daemon if that has no other, unless
    /// `is_used`, which is asked when nobody can attach to it any more.
    pub fn release(&self, id: u64, is_used: impl FnOnce() -> bool) {
        let place = lock(&self.places).get(&id).cloned();
        let slot = match place {
            Some(Place::Shared(member)) => return self.release_member(&member, is_used),
            Some(Place::Own(slot)) => slot,
            None => Arc::default(),
        };
        let mut locked = lock(&slot);
        if locked.gone || is_used() {
            return;
        }
        self.end(&mut locked, id);
        locked.gone = true;
        let mut places = lock(&self.places);
        if let Some(Place::Own(known)) = places.get(&id)
            && Arc::ptr_eq(known, &slot)
        {
            places.remove(&id);
        }
    }

    /// Ends a daemon and everything that is there for it.
    fn end(&self, slot: &mut Slot, id: u64) {
        let mountpoint = match id {
            SHARED => self.settings.layout().shared(),
            id => self.settings.layout().mountpoint(id),
        };
        slot.wanted = None;
        let process = slot.process.take();
        let process = process.or_else(|| process::find(&mountpoint).map(Arc::new));
        if let Some(process) = process {
            let name = label(id);
            tracing::info!(
                "daemon {name}: no user left, ending process {}",
                process.pid()
            );
            process.end(STOP);
        }
        run::detach(&mountpoint);
        match slot.holder.take() {
            Some(holder) => holder.close(),
            // Of an earlier life.
            None => drop(fs::remove_file(self.settings.holder_socket(id))),
        }
        let _ = fs::remove_dir_all(self.settings.config_dir(id));
        self.settings.forget(id);
    }

    /// All daemons that run, or should.
    #[must_use]
    pub fn list(&self) -> Vec<Status> {
        let mut slots: Vec<_> = lock(&self.places)
            .values()
            .filter_map(|place| match place {
                Place::Own(slot) => Some(Arc::clone(slot)),
                Place::Shared(_) => None,
            })
            .collect();
        slots.push(Arc::clone(&self.shared));
        // One that is being started or stopped is left out rather than waited for.
        let free = slots.iter().filter_map(|slot| slot.try_lock().ok());
        free.filter_map(|slot| self.status(&slot)).collect()
    }

    fn status(&self, slot: &Slot) -> Option<Status> {
        let service = slot.wanted.as_ref()?;
        let process = slot.process.as_ref().filter(|process| process.is_alive());
        let holder = slot.holder.as_ref();
        let instance = |snapshot_id, image_id: &str, mountpoint| Instance {
            snapshot_id,
            image_id: image_id.to_owned(),
            mountpoint,
        };
        let layout = self.settings.layout();
        let (api_socket, images) = match &service.image {
            Some(image) => {
                let point = service.mountpoint.clone();
                let own = instance(image.id, &image.reference, point);
                (PathBuf::new(), vec![own])
            }
            None => {
                let members = self.members().into_iter();
                let images = members.map(|member| {
                    let point = layout.shared_mountpoint(member.id);
                    instance(member.id, &member.reference, point)
                });
                (self.settings.control_socket(), images.collect())
            }
        };
        Some(Status {
            id: label(service.id),
            pid: process.map(|process| process.pid()),
            group: process.and_then(|process| process.group()),
            mountpoint: service.mountpoint.clone(),
            api_socket,
            supervisor_path: holder.map_or_else(PathBuf::new, |holder| holder.path().to_owned()),
            held: holder.map_or(0, |holder| holder.count()),
            images,
        })
    }

    /// The type of the file system that an image is mounted as, if it is.
    #[must_use]
    pub fn driver_of(&self, id: u64) -> Option<String> {
        let layout = self.settings.layout();
        match lock(&self.places).get(&id)? {
            Place::Own(_) => process::kind_of_mount(&layout.mountpoint(id)),
            Place::Shared(_) => process::kind_of_mount(&layout.shared_mountpoint(id))
                .or_else(|| process::kind_of_mount(&layout.shared())),
        }
    }

    /// The images that the daemon called `name` serves, or the one with this id.
    fn images_of(&self, name: &str) -> Vec<Image> {
        let places: Vec<(u64, Place)> = {
            let places = lock(&self.places);
            let all = places.iter().map(|(id, place)| (*id, place.clone()));
            all.collect()
        };
        let asked = places.into_iter().filter(|(id, place)| {
            let of_all = name == label(SHARED) && matches!(place, Place::Shared(_));
            of_all || name == id.to_string()
        });
        let images = asked.filter_map(|(_, place)| match place {
            Place::Own(slot) => lock(&slot).wanted.as_ref()?.image.clone(),
            Place::Shared(member) => member.image(),
        });
        images.collect()
    }

    /// Where the data of an image come from, with credentials; `None` if no daemon and no
    /// image has this name.
    ///
    /// # Errors
    /// The daemon has several images.
    pub fn backend(&self, name: &str) -> Result<Option<serde_json::Value>, Error> {
        match self.images_of(name).as_slice() {
            [] => Ok(None),
            [image] => self.settings.backend(image).map(Some),
            several => {
                let ids: Vec<String> = several.iter().map(|image| image.id.to_string()).collect();
                let ids = ids.join(", ");
                let reason = format!("it serves several images: ask for one of {ids}");
                Err(Error::Invalid(reason))
            }
        }
    }

    /// What is to be fetched first of images that are mounted next.
    #[must_use]
    pub fn prefetch(&self) -> &crate::prefetch::Lists {
        self.settings.prefetch()
    }

    /// How often a daemon was replaced.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// The slot of a daemon; an empty one if there is none.
    fn slot(&self, id: u64) -> Arc<Mutex<Slot>> {
        match lock(&self.places).get(&id) {
            _ if id == SHARED => Arc::clone(&self.shared),
            Some(Place::Own(slot)) => Arc::clone(slot),
            _ => Arc::default(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic leaves nothing half changed: slots are replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
