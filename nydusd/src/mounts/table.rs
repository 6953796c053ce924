//! What is mounted where, and how each mount begins and ends.
//!
//! A [`Mount`] is an image on a mount point, served by one of two drivers. It ends
//! when its file system is gone, not when it is unmounted: an overlay or another
//! namespace can keep a file system after that, and must be served until it lets go.
//! So taking down is a request ([`Mount::take_down`]), and the end is an event that
//! comes from whoever serves ([`Ended`]).
//!
//! Before anything is mounted, what a successor would need is left with the keeper
//! ([`saved`]); [`Mounts::recover`] is that successor's side.

pub(crate) mod below;

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use storage::blob::Blob;

use super::saved::{self, EVENTS, MOUNT, Phase, Saved};
use super::{Opened, Source, open};
use crate::api;
use crate::busy::{self, Holder};
use crate::cli::FailoverPolicy;
use crate::driver::{Choice, Driver, choose};
use crate::erofs::ErofsMount;
use crate::erofs::events::{self, Inheritance, Watch};
use crate::erofs::journal::{FileId, Journal};
use crate::erofs::place::{self, Place};
use crate::erofs::sys::{self, EndWatch, Layer};
use crate::fuse::session::{Session, check_mountpoint};
use crate::fuse::workers::Workers;
use crate::keeper::{Deposit, Deposits, Holder as Keeper, process};
use crate::manager::Manager;
use crate::manager::saved::{self as images, Origin};
use crate::mountinfo;
use crate::upgrade::UPGRADE;
use crate::vfs::{Mounted, Vfs};
use below::Posted;

/// How long a mount that is busy is given: a process that just ended, or is about to
/// start a program, may hold its last descriptor for an instant.
const BUSY_WAIT: Duration = Duration::from_millis(50);
/// How often it is given that.
const BUSY_ATTEMPTS: u32 = 20;

/// Unmounts what others use.
const DETACH: MntFlags = MntFlags::MNT_DETACH.union(MntFlags::UMOUNT_NOFOLLOW);

/// Lowest number that no process of ours uses for something lasting.
const FIRST_FREE: i32 = process::CHANNEL;

/// How a mount is to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    /// Which driver.
    pub driver: Choice,
    /// Threads that answer FUSE requests.
    pub threads: u16,
}

/// The end of the mount with this number: nobody uses its file system any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended(pub u64);

/// One image on one mount point.
#[derive(Debug)]
pub(crate) struct Mount {
    /// Number of the mount in this daemon.
    pub id: u64,
    /// What serves it.
    pub driver: Driver,
    /// The image as the user named it, for messages.
    pub image: String,
    /// Where it is mounted, absolute.
    pub mountpoint: PathBuf,
    /// Device number of the file system, as `stat` shows it.
    device: u64,
    /// Whether it is of one image among several.
    own_image: bool,
    /// Of its image, if that is one of several.
    generation: Option<u64>,
    /// Whether another mount was put in its place: it is served for who still uses it.
    replaced: AtomicBool,
    serving: Serving,
}

/// What can be said of a mount before it is made.
struct Plan<'a> {
    id: u64,
    /// `None` for a mount that gets its images later.
    source: Option<&'a Source>,
    mountpoint: &'a Path,
    threads: u16,
}

#[derive(Debug)]
enum Serving {
    Fuse,
    Erofs(Arc<ErofsMount>),
    /// Images are mounted below it.
    Directory(Wish),
}

/// What came of a request to take a mount down.
#[derive(Debug)]
pub(crate) enum TakenDown {
    /// It is unmounted here. Its [`Ended`] follows when nobody else has it.
    Unmounted,
    /// It is as it was, because of these.
    InUse(Vec<Holder>),
}

/// All mounts of a daemon.
pub(crate) struct Mounts {
    mounts: Mutex<Vec<Arc<Mount>>>,
    /// Held while an image comes or goes below the daemon's directory.
    changing: Mutex<()>,
    /// Of all mounts that the kernel serves; made for the first.
    watch: Mutex<Option<Arc<Watch>>>,
    keeper: Arc<Keeper>,
    /// The images.
    manager: Arc<Manager>,
    ended: Arc<dyn Fn(Ended) + Send + Sync>,
    /// The highest number that a mount ever had.
    last: AtomicU64,
}

impl fmt::Debug for Mounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mounts")
            .field("mounts", &self.mounts)
            .finish_non_exhaustive()
    }
}

impl Mounts {
    /// None yet.
    ///
    /// * `ended`: is told of the end of every mount.
    pub(crate) fn new(
        keeper: Arc<Keeper>,
        manager: Arc<Manager>,
        ended: impl Fn(Ended) + Send + Sync + 'static,
    ) -> Self {
        Self {
            mounts: Mutex::default(),
            changing: Mutex::default(),
            watch: Mutex::default(),
            keeper,
            manager,
            ended: Arc::new(ended),
            last: AtomicU64::new(0),
        }
    }

    /// Mounts an image, and serves it from now on.
    ///
    /// # Errors
    /// When it cannot be opened or mounted; nothing stays mounted then.
    pub(crate) fn mount(
        &self,
        source: &Source,
        mountpoint: &Path,
        wish: Wish,
    ) -> anyhow::Result<Arc<Mount>> {
        let mountpoint = check_mountpoint(mountpoint)?;
        let opened = open(source, self.manager.shared())?;
        // Nothing must be built on a mount that reads zeros.
        place::sweep(opened.cache.path())?;
        let plan = Plan {
            id: self.next(),
            source: Some(source),
            mountpoint: &mountpoint,
            threads: wish.threads,
        };
        let recorded = source.record.is_some();
        ensure!(
            !(recorded && wish.driver == Choice::Erofs),
            "--record-files needs driver fuse: the kernel does not tell which files are read"
        );
        let choice = if recorded { Choice::Fuse } else { wish.driver };
        let mut driver = choose(choice, opened.cache.path());
        let mut served = None;
        if driver == Driver::Erofs {
            let parts = (opened.cache.path(), &*opened.blobs);
            match self.erofs(&plan, source, parts, None) {
                Err(error) if wish.driver == Choice::Auto => {
                    tracing::warn!("driver fuse after all: {error:#}");
                    driver = Driver::Fuse;
                }
                done => served = Some(done),
            }
        }
        let served = match served {
            None => self.fuse(&plan, Some(opened)),
            Some(served) => served.and_then(|served| {
                let image = self.manager.prepare("/", source, opened)?;
                self.manager.note(&image)?;
                Ok(served)
            }),
        };
        self.finish(&plan, driver, served)
    }

    /// Mounts no image yet: they come through the control API.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub(crate) fn mount_empty(
        &self,
        mountpoint: &Path,
        threads: u16,
    ) -> anyhow::Result<Arc<Mount>> {
        let plan = Plan {
            id: self.next(),
            source: None,
            mountpoint: &check_mountpoint(mountpoint)?,
            threads,
        };
        let served = self.fuse(&plan, None);
        self.finish(&plan, Driver::Fuse, served)
    }

    fn next(&self) -> u64 {
        // The end of a mount that did not come to be must not be taken for another's.
        let mounts = lock(&self.mounts);
        let known = mounts.iter().map(|mount| mount.id).max().unwrap_or(0);
        self.last.fetch_max(known, Ordering::Relaxed);
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn finish(
        &self,
        plan: &Plan<'_>,
        driver: Driver,
        served: anyhow::Result<(u64, Serving)>,
    ) -> anyhow::Result<Arc<Mount>> {
        let (device, serving) = served.inspect_err(|_| {
            self.manager.close();
            self.keeper.withdraw(&saved::name(plan.id));
        })?;
        Ok(self.enter(plan, driver, device, serving, None))
    }

    fn enter(
        &self,
        plan: &Plan<'_>,
        driver: Driver,
        device: u64,
        serving: Serving,
        generation: Option<u64>,
    ) -> Arc<Mount> {
        let mount = Arc::new(Mount {
            id: plan.id,
            driver,
            image: saved::image_name(plan.source),
            mountpoint: plan.mountpoint.to_owned(),
            device,
            own_image: generation.is_some(),
            generation,
            replaced: AtomicBool::new(false),
            serving,
        });
        lock(&self.mounts).push(Arc::clone(&mount));
        mount
    }

    /// All of them.
    pub(crate) fn list(&self) -> Vec<Arc<Mount>> {
        lock(&self.mounts).clone()
    }

    /// Forgets a mount that has ended, and releases what it needed.
    pub(crate) fn forget(&self, ended: Ended) -> Option<Arc<Mount>> {
        let mut mounts = lock(&self.mounts);
        let at = mounts.iter().position(|mount| mount.id == ended.0)?;
        let mount = mounts.remove(at);
        drop(mounts);
        match &mount.serving {
            Serving::Erofs(mount) => mount.release(),
            // One of several.
            Serving::Fuse if mount.own_image => {}
            Serving::Fuse | Serving::Directory(_) => self.manager.close(),
        }
        if let Some(generation) = mount.generation {
            self.manager.drop_note(generation);
        }
        self.keeper.withdraw(&saved::name(mount.id));
        Some(mount)
    }

    /// Takes everything down again: the daemon cannot begin its work.
    pub(crate) fn abandon(&self) {
        for mount in self.list() {
            if !mount.is_directory() {
                detach(&mount.mountpoint);
            }
            self.forget(Ended(mount.id));
        }
        self.close();
    }

    /// Ends the table: nothing is mounted any more, and nothing will be.
    pub(crate) fn close(&self) {
        self.manager.close();
        self.keeper.withdraw(EVENTS);
    }

    /// * `opened`: the image on `/`, if there is one already.
    fn fuse(&self, plan: &Plan<'_>, opened: Option<Opened>) -> anyhow::Result<(u64, Serving)> {
        let device = Session::open_device()?;
        let mut saved = Saved::new(plan.id, Driver::Fuse, plan.source, plan.mountpoint);
        saved.threads = plan.threads;
        let save = |saved: &Saved| {
            let name = saved::name(plan.id);
            self.keeper.deposit(&name, saved.note()?, &[device.as_fd()])
        };
        save(&saved)?;
        if let (Some(source), Some(opened)) = (plan.source, opened) {
            self.manager.begin(source, opened)?;
        }
        let session = Session::mount(plan.mountpoint, device.try_clone()?)?;
        let session = Arc::new(session);
        let served = self
            .serve_fuse(plan.id, &session, plan.threads, self.manager.vfs())
            .and_then(|()| session.wait_until_served())
            .and_then(|number| {
                saved.phase = Phase::Served;
                saved.device = number;
                save(&saved)?;
                if let Some(image) = self.manager.vfs().table().image_at("/") {
                    self.manager.teach(image);
                }
                Ok((number, Serving::Fuse))
            });
        served.inspect_err(|_| {
            // Half a mount helps nobody; the first error is the one to report.
            detach(plan.mountpoint);
        })
    }

    /// Starts the threads.
    fn serve_fuse(
        &self,
        id: u64,
        session: &Arc<Session>,
        threads: u16,
        files: &Arc<Vfs>,
    ) -> anyhow::Result<()> {
        let workers = Workers::start(session, files, threads)?;
        if Arc::ptr_eq(files, self.manager.vfs()) {
            self.manager.attach(session);
        }
        self.spawn(id, move || workers.join())
    }

    fn erofs(
        &self,
        plan: &Plan<'_>,
        source: &Source,
        (cache, blobs): (&Path, &[Arc<Blob>]),
        posted: Option<&Posted<'_>>,
    ) -> anyhow::Result<(u64, Serving)> {
        let watch = self.watch()?;
        let place = Place::new(cache, &source.bootstrap, plan.mountpoint)?;
        if let Err(error) = watch.add(blobs) {
            watch.remove(blobs);
            place.remove();
            return Err(error);
        }
        let (mount, detached) =
            ErofsMount::prepare(place, blobs.to_vec(), &watch, plan.mountpoint)?;
        let mut saved = Saved::new(plan.id, Driver::Erofs, plan.source, plan.mountpoint);
        saved.bootstrap = mount.place().bootstrap().to_owned();
        saved.place = Some(mount.place().dir().to_owned());
        saved.path = posted.map(|posted| posted.path.to_owned());
        let body = posted.map(Posted::body);
        let save = |saved: &Saved| self.save_erofs(saved, &mount, blobs, body);
        let old = posted.and_then(|posted| posted.old.as_ref());
        let attached = below::attach(&detached, &mut saved, old, &save);
        drop(detached);
        if let Err(error) = attached {
            mount.release();
            return Err(error);
        }
        self.serve_erofs(plan.id, mount)
    }

    /// Leaves everything that keeps the mount answered: the lock of its directory, and
    /// the cache files, which nobody may delete while they are open.
    fn save_erofs(
        &self,
        saved: &Saved,
        mount: &ErofsMount,
        blobs: &[Arc<Blob>],
        body: Option<BorrowedFd<'_>>,
    ) -> anyhow::Result<()> {
        let bootstrap = File::open(mount.place().bootstrap())?;
        let lock = mount.place().lock();
        let mut files = vec![bootstrap.as_fd(), lock.as_fd(), mount.end().as_fd()];
        for blob in blobs {
            files.push(
                blob.cache_file()
                    .context("a cache file is missing")?
                    .as_fd(),
            );
        }
        files.extend(body);
        self.keeper
            .deposit(&saved::name(saved.id), saved.note()?, &files)
    }

    fn serve_erofs(&self, id: u64, mount: ErofsMount) -> anyhow::Result<(u64, Serving)> {
        let mount = Arc::new(mount);
        let device = mount.device();
        let watched = Arc::clone(&mount);
        self.spawn(id, move || while !watched.wait_for_end(u16::MAX) {})?;
        Ok((device, Serving::Erofs(mount)))
    }

    fn watch(&self) -> anyhow::Result<Arc<Watch>> {
        let mut watch = lock(&self.watch);
        if let Some(watch) = &*watch {
            return Ok(Arc::clone(watch));
        }
        let new = Watch::new()?;
        self.keeper
            .deposit(EVENTS, String::new(), &new.descriptors())?;
        new.start(None)?;
        *watch = Some(Arc::clone(&new));
        Ok(new)
    }

    /// Tells of the end of a mount when `end` returns.
    fn spawn(&self, id: u64, end: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
        let ended = Arc::clone(&self.ended);
        std::thread::Builder::new()
            .name("watch".to_owned())
            .stack_size(128 << 10)
            .spawn(move || {
                end();
                ended(Ended(id));
            })
            .context("cannot start a thread")?;
        Ok(())
    }

    /// Goes on serving what a predecessor has mounted.
    ///
    /// * `inherited`: what it has left with the keeper;
    /// * `after`: how it came here;
    /// * `source`: finds the parts of an image again, given how it came into the mount
    ///   and where its bootstrap was.
    ///
    /// # Errors
    /// When a mount cannot be served. It stays with the keeper, for the next worker.
    pub(crate) fn recover(
        &self,
        inherited: Inherited,
        after: After,
        source: &dyn Fn(&Origin, PathBuf) -> anyhow::Result<Source>,
    ) -> anyhow::Result<()> {
        if let Some((watch, _)) = &inherited.events {
            *lock(&self.watch) = Some(Arc::clone(watch));
        }
        let mut served = Vec::new();
        for (name, deposit) in inherited.mounts {
            let saved = Saved::parse(&deposit.note)?;
            let in_place = match saved.phase {
                Phase::Served => true,
                Phase::Replacing => self.finish_replacing(&saved, &deposit)?,
                Phase::Mounting => false,
            };
            if in_place {
                served.push((saved, deposit));
                continue;
            }
            let point = saved.mountpoint.display();
            tracing::warn!("{point}: its worker died while it mounted; taking that down");
            detach_if(&saved);
            if saved.driver == Driver::Fuse && saved.path.is_none() {
                for (image, _) in &inherited.images {
                    self.keeper.withdraw(image);
                }
            }
            self.keeper.withdraw(&name);
        }
        served.sort_by_key(|(saved, _)| saved.id);
        let has_table = |saved: &Saved| saved.driver == Driver::Fuse || saved.directory;
        if served.iter().any(|(saved, _)| has_table(saved)) {
            let taken_over = after != After::Death;
            self.manager.recover(inherited.images, taken_over, source)?;
        }
        for (saved, deposit) in served {
            let point = saved.mountpoint.display();
            if saved.directory {
                self.recover_directory(&saved);
                continue;
            }
            match self.recover_one(&saved, deposit, after, source) {
                Err(error) if saved.path.is_some() => {
                    self.give_up(&saved, &error);
                    continue;
                }
                done => done.with_context(|| format!("cannot go on serving {point}"))?,
            }
            tracing::info!("{point} is served again");
        }
        if let Some((watch, events)) = inherited.events {
            watch.start(Some(events))?;
        }
        Ok(())
    }

    fn recover_one(
        &self,
        saved: &Saved,
        deposit: Deposit,
        after: After,
        source: &dyn Fn(&Origin, PathBuf) -> anyhow::Result<Source>,
    ) -> anyhow::Result<()> {
        let mut files = deposit.files;
        let origin = saved.origin(&mut files)?;
        let mut files = files.into_iter().map(File::from);
        let mut next = || files.next().context("a descriptor is missing");
        let (serving, image) = match saved.driver {
            Driver::Fuse => {
                let device = next()?;
                let image = match saved.path {
                    None => None,
                    Some(_) => Some(self.reopen(saved, &origin, &next()?, source)?.0),
                };
                self.recover_fuse(saved, device, after, image.as_ref())?;
                (Serving::Fuse, image)
            }
            Driver::Erofs => {
                let (serving, image) = self.recover_erofs(saved, &origin, &mut next, source)?;
                (serving, Some(image))
            }
        };
        // Another one may be in its place by now.
        let replaced = saved.path.is_some() && !saved.is_mounted();
        if let Some(image) = image.as_ref().filter(|_| !replaced) {
            self.manager.note(image)?;
        }
        let one_of_several = image.filter(|_| saved.path.is_some());
        let mount = Mount {
            id: saved.id,
            driver: saved.driver,
            image: saved.image.clone(),
            mountpoint: saved.mountpoint.clone(),
            device: saved.device,
            own_image: one_of_several.is_some(),
            generation: one_of_several
                .filter(|_| !replaced)
                .map(|image| image.generation),
            replaced: AtomicBool::new(replaced),
            serving,
        };
        lock(&self.mounts).push(Arc::new(mount));
        Ok(())
    }

    /// Goes on answering for a FUSE mount.
    ///
    /// * `image`: the one that has it to itself, if one has.
    fn recover_fuse(
        &self,
        saved: &Saved,
        device: File,
        after: After,
        image: Option<&Arc<Mounted>>,
    ) -> anyhow::Result<()> {
        let outstanding = match after {
            After::Death => FailoverPolicy::Resend,
            After::TakeOver(policy) => policy,
        };
        let refuse = outstanding == FailoverPolicy::Flush;
        let session = Arc::new(Session::adopt(&saved.mountpoint, device, refuse));
        let all = self.manager.vfs();
        let files = image.map_or_else(|| Arc::clone(all), |image| Arc::new(all.of_one(image)));
        self.serve_fuse(saved.id, &session, saved.threads, &files)?;
        if outstanding == FailoverPolicy::None {
            tracing::info!("requests in flight are left as they are");
        } else if let Err(error) = session.resend() {
            tracing::error!("requests in flight wait for ever: {error}");
        }
        if image.is_none() {
            self.manager.forget_all();
        }
        Ok(())
    }

    /// Opens an image again, from the very bootstrap that was left.
    fn reopen(
        &self,
        saved: &Saved,
        origin: &Origin,
        bootstrap: &File,
        source: &dyn Fn(&Origin, PathBuf) -> anyhow::Result<Source>,
    ) -> anyhow::Result<(Arc<Mounted>, Vec<Arc<Blob>>)> {
        let mut source = source(origin, saved.bootstrap.clone())?;
        // Whatever is in its place by now.
        source.bootstrap = format!("/proc/self/fd/{}", bootstrap.as_raw_fd()).into();
        source.name.clone_from(&saved.image);
        let opened = open(&source, self.manager.shared())?;
        let blobs = opened.blobs.clone();
        let path = saved.path.as_deref().unwrap_or("/");
        let image = self.manager.prepare(path, &source, opened)?;
        Ok((image, blobs))
    }

    fn recover_erofs(
        &self,
        saved: &Saved,
        origin: &Origin,
        next: &mut dyn FnMut() -> anyhow::Result<File>,
        source: &dyn Fn(&Origin, PathBuf) -> anyhow::Result<Source>,
    ) -> anyhow::Result<(Serving, Arc<Mounted>)> {
        let (image, blobs) = self.reopen(saved, origin, &next()?, source)?;
        let lock = next()?;
        let end = EndWatch::adopt(next()?.into());
        for blob in &blobs {
            let file = blob.cache_file().context("a cache file is missing")?;
            // Another file would be filled, and the mounted one read.
            ensure!(
                FileId::of(file)? == FileId::of(&next()?)?,
                "the cache file of blob {} was replaced",
                blob.info().id
            );
        }
        let watch = lock_watch(&self.watch)?;
        watch.add(&blobs)?;
        let dir = saved.place.clone().context("no directory was saved")?;
        let place = Place::adopt(dir, saved.bootstrap.clone(), lock);
        let mount = ErofsMount::adopt(place, blobs, &watch, &saved.mountpoint, saved.device, end);
        let (_, serving) = self.serve_erofs(saved.id, mount)?;
        Ok((serving, image))
    }
}

fn lock_watch(watch: &Mutex<Option<Arc<Watch>>>) -> anyhow::Result<Arc<Watch>> {
    lock(watch).clone().context("the event group was not saved")
}

/// How mounts came to be somebody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// A worker has died.
    Death,
    /// From another daemon, with this wish for its FUSE requests in flight.
    TakeOver(FailoverPolicy),
}

/// What a predecessor has left.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    /// Its event group, and the events that it had not answered.
    events: Option<(Arc<Watch>, Inheritance)>,
    mounts: Vec<(String, Deposit)>,
    /// Of the [`manager`](crate::manager).
    images: Vec<(String, Deposit)>,
    /// Of the [`api`].
    control: Vec<(String, Deposit)>,
}

impl Inherited {
    /// Takes stock. Call before the process has opened anything else: the numbers of the
    /// descriptors that came with unanswered events must not be in use.
    ///
    /// # Errors
    /// Something in it cannot be understood.
    pub(crate) fn take(deposits: &mut Deposits) -> anyhow::Result<Self> {
        let events = deposits.get(EVENTS).map(|deposit| deposit.files.as_slice());
        let journal = match events {
            None => None,
            Some([_, journal]) => Some(journal),
            Some(files) => bail!("{} descriptors for events", files.len()),
        };
        let least = match journal {
            None => FIRST_FREE,
            Some(journal) => {
                let (journal, slots) = Journal::adopt(journal.try_clone()?)?;
                events::highest_number(&journal, &slots).max(FIRST_FREE) + 1
            }
        };
        // What was handed over got the lowest numbers, whoever had them before.
        for deposit in deposits.values_mut() {
            let files = std::mem::take(&mut deposit.files).into_iter();
            let lifted = files.map(|file| sys::lift(file, least));
            deposit.files = lifted
                .collect::<Result<_, _>>()
                .context("cannot move a descriptor")?;
        }
        let mut inherited = Self::default();
        for (name, deposit) in &*deposits {
            let copies = deposit.files.iter().map(|file| {
                let copy = file.try_clone()?;
                // It may have got one of the numbers, too.
                sys::lift(copy, least)
            });
            let copy = Deposit {
                note: deposit.note.clone(),
                files: copies.collect::<Result<_, _>>()?,
            };
            if name == EVENTS {
                let [group, journal] = <[OwnedFd; 2]>::try_from(copy.files)
                    .map_err(|files| anyhow!("{} descriptors for events", files.len()))?;
                let (journal, slots) = Journal::adopt(journal)?;
                let events = Inheritance::occupy(&journal, slots, least)?;
                inherited.events = Some((Watch::with(group, journal), events));
            } else {
                inherited.sort_in(name, copy)?;
            }
        }
        Ok(inherited)
    }

    fn sort_in(&mut self, name: &str, deposit: Deposit) -> anyhow::Result<()> {
        let list = if name.starts_with(MOUNT) {
            &mut self.mounts
        } else if name == images::TABLE || name.starts_with(images::IMAGE) {
            &mut self.images
        } else if api::is_control(name) {
            &mut self.control
        } else if name.starts_with(UPGRADE) {
            // Asked for where it is needed.
            return Ok(());
        } else {
            bail!("a predecessor has left `{name}`, which this program does not know");
        };
        list.push((name.to_owned(), deposit));
        Ok(())
    }

    /// Whether nothing is mounted.
    pub(crate) fn is_nothing(&self) -> bool {
        self.mounts.is_empty()
    }

    /// What the control API of a predecessor has left.
    pub(crate) fn take_control(&mut self) -> Vec<(String, Deposit)> {
        std::mem::take(&mut self.control)
    }
}

impl Mount {
    /// Whether it is a place for images, and nothing is mounted on it.
    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.serving, Serving::Directory(_))
    }

    /// Unmounts, unless somebody uses the mount: then it stays, and goes on being served.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub(crate) fn take_down(&self) -> anyhow::Result<TakenDown> {
        if self.replaced.load(Ordering::Relaxed) {
            return Ok(TakenDown::Unmounted);
        }
        take_down(&self.mountpoint, self.device)
    }

    /// Who still uses the file system after it was unmounted here.
    pub(crate) fn left_over(&self) -> Vec<Holder> {
        let mut holders = busy::overlays(&self.mountpoint);
        holders.extend(busy::copies(self.device));
        holders.extend(busy::processes(self.device));
        holders
    }
}

/// Unmounts the file system `device` at `mountpoint`, unless somebody uses it.
///
/// # Errors
/// When the kernel refuses for another reason.
pub(crate) fn take_down(mountpoint: &Path, device: u64) -> anyhow::Result<TakenDown> {
    // The kernel would not object, and leave the overlay without a server.
    let overlays = busy::overlays(mountpoint);
    if !overlays.is_empty() {
        return Ok(TakenDown::InUse(overlays));
    }
    let flags = MntFlags::UMOUNT_NOFOLLOW;
    let mut result = umount2(mountpoint, flags);
    for _ in 0..BUSY_ATTEMPTS {
        if result != Err(Errno::EBUSY) {
            break;
        }
        std::thread::sleep(BUSY_WAIT);
        result = umount2(mountpoint, flags);
    }
    match result {
        // Or somebody was faster.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(TakenDown::Unmounted),
        Err(Errno::EBUSY) => Ok(TakenDown::InUse(busy::processes(device))),
        Err(errno) => {
            Err(errno).with_context(|| format!("cannot unmount {}", mountpoint.display()))
        }
    }
}

/// Takes down what is mounted at `mountpoint`, whoever uses it.
fn detach(mountpoint: &Path) {
    let _ = umount2(mountpoint, DETACH);
}

/// Takes down a half-made mount, if it got that far.
fn detach_if(saved: &Saved) {
    let kind = match saved.driver {
        Driver::Fuse => "fuse",
        Driver::Erofs => "erofs",
    };
    let is_it = |entry: &mountinfo::Entry| match saved.device {
        0 => entry.kind == kind,
        device => entry.device_number() == device,
    };
    if mountinfo::at(&saved.mountpoint).is_some_and(|entry| is_it(&entry)) {
        detach(&saved.mountpoint);
    }
}

/// The state is valid whatever a panicking thread did.
fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
