//! Answers the kernel's questions about blobs' cache files.
//!
//! A file system mounted by the kernel reads its data from the cache files. Before it
//! reads a range, an event asks whether it may: yes, as soon as the range is resident.
//! Two kinds of threads, so that nobody waits for somebody else's fetch:
//!
//! * **front** threads read events and answer what is resident at once;
//! * the [`Pool`] waits for the rest. Overlapping waits share a fetch (`storage`).
//!
//! Promises: every event is answered once, whatever happens ([`Pending`]); the answer
//! is yes only when verified bytes are in the very file that the kernel reads; what
//! cannot be had is refused, never zeros. Once a blob is complete nobody asks again.
//!
//! An event outlives the process that read it: it is in the [`Journal`], and the
//! descriptor's *number* is its name. A successor that answers it must own that number
//! until then; a new event of the same number would be answered in its place.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use storage::backend::Priority;
use storage::blob::Blob;

use super::event::Event;
use super::journal::{EVENT_ROOM, FileId, Journal, Slot};
use super::sys::{self, Mark};
use crate::errno::{Failures, FsError};
use crate::keeper::process;
use crate::pool::Pool;

/// Threads that read events. More than one: answering takes a few system calls.
const FRONT_THREADS: usize = 2;
/// Most threads that wait for the network at once.
const MAX_FETCHERS: usize = 512;
/// Processes that may die of an event before it is refused.
const MAX_ATTEMPTS: u32 = 100;
/// Pause after an event could not be read, for want of descriptors for instance.
const RECOVERY: Duration = Duration::from_millis(10);

/// The kernel's "yes" and "no"; the number of an error goes above the "no".
const ALLOW: u32 = libc::FAN_ALLOW;
const DENY_EIO: u32 = libc::FAN_DENY | (libc::EIO.cast_unsigned() << 24);

/// All cache files that this daemon is asked about.
#[derive(Debug)]
pub(crate) struct Watch {
    group: OwnedFd,
    journal: Journal,
    files: RwLock<HashMap<FileId, Arc<Watched>>>,
    pool: OnceLock<Pool<Pending>>,
    failures: Failures,
}

/// One cache file, and the blobs of mounted images that live in it.
#[derive(Debug)]
struct Watched {
    blobs: Vec<Arc<Blob>>,
    marked: AtomicBool,
}

/// An event that has to be answered. Refused when dropped without an answer.
#[derive(Debug)]
struct Pending {
    watch: Arc<Watch>,
    slot: Option<Slot>,
    /// Keeps the event's number from being used again before it is answered.
    name: OwnedFd,
    range: Range<u64>,
}

/// Events that a dead process left behind, with the numbers they are known by.
#[derive(Debug)]
pub(crate) struct Inheritance {
    /// Slots of the journal that hold them.
    pub slots: Vec<Slot>,
    /// Their numbers, which nothing else may have.
    pub names: HashMap<i32, OwnedFd>,
}

impl Inheritance {
    /// The numbers of events in `slots`, occupied before the kernel can give them out
    /// again. Call while none of them is open in this process.
    ///
    /// * `least`: above all of these numbers.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn occupy(journal: &Journal, slots: Vec<Slot>, least: i32) -> anyhow::Result<Self> {
        let nothing = File::open("/dev/null").context("cannot open /dev/null")?;
        let nothing = sys::lift(nothing.into(), least)?;
        let names = numbers(journal, &slots)
            .map(|number| Ok((number, sys::duplicate_to(&nothing, number)?)))
            .collect::<io::Result<_>>()
            .context("cannot occupy the number of an event")?;
        Ok(Self { slots, names })
    }
}

/// The highest number of an event in `slots`; 0 if there is none.
pub(crate) fn highest_number(journal: &Journal, slots: &[Slot]) -> i32 {
    numbers(journal, slots).max().unwrap_or(0)
}

/// Numbers of events. Lower ones are in use for something else in every process of
/// ours, so no event ever had them.
fn numbers<'a>(journal: &'a Journal, slots: &'a [Slot]) -> impl Iterator<Item = i32> + 'a {
    slots
        .iter()
        .filter_map(|slot| Event::parse(&journal.event(slot)).ok())
        .map(|event| event.fd)
        .filter(|number| *number > process::CHANNEL)
}

impl Watch {
    /// A group that watches nothing yet.
    ///
    /// # Errors
    /// When the kernel has no pre-access events, or we not the privilege.
    pub(crate) fn new() -> anyhow::Result<Arc<Self>> {
        let group = sys::event_group().context("cannot ask for fanotify pre-access events")?;
        Ok(Self::with(group, Journal::new()?))
    }

    /// The group of a process that is gone.
    pub(crate) fn with(group: OwnedFd, journal: Journal) -> Arc<Self> {
        Arc::new(Self {
            group,
            journal,
            files: RwLock::default(),
            pool: OnceLock::new(),
            failures: Failures::default(),
        })
    }

    /// What a successor needs: the group, and the journal.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        use std::os::fd::AsFd as _;
        [self.group.as_fd(), self.journal.as_fd()]
    }

    /// Watches the cache files of `blobs` from now on, those that are not complete.
    /// Before they are mounted: later marks have no effect on a mount.
    ///
    /// # Errors
    /// A cache file that cannot be opened or marked.
    pub(crate) fn add(&self, blobs: &[Arc<Blob>]) -> anyhow::Result<()> {
        for blob in blobs {
            self.add_blob(blob)
                .with_context(|| format!("cache file of blob {}", blob.info().id))?;
        }
        Ok(())
    }

    fn add_blob(&self, blob: &Arc<Blob>) -> anyhow::Result<()> {
        let file = blob.cache_file().context("cannot be opened")?;
        let id = FileId::of(file)?;
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        let mut blobs = files
            .get(&id)
            .map_or_else(Vec::new, |known| known.blobs.clone());
        blobs.push(Arc::clone(blob));
        let marked = !blobs.iter().all(|blob| blob.is_complete());
        if marked {
            sys::mark(&self.group, Mark::Add, file).context("cannot watch it")?;
        } else {
            // A predecessor may have died just before it came to that.
            let _ = sys::mark(&self.group, Mark::Remove, file);
        }
        let marked = AtomicBool::new(marked);
        files.insert(id, Arc::new(Watched { blobs, marked }));
        Ok(())
    }

    /// Watches for `blobs` no more. After they were unmounted.
    pub(crate) fn remove(&self, blobs: &[Arc<Blob>]) {
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        for blob in blobs {
            let Some(file) = blob.cache_file() else {
                continue;
            };
            let Ok(id) = FileId::of(file) else { continue };
            let Some(known) = files.remove(&id) else {
                continue;
            };
            let mut rest = known.blobs.clone();
            if let Some(at) = rest.iter().position(|other| Arc::ptr_eq(other, blob)) {
                rest.swap_remove(at);
            }
            if rest.is_empty() {
                known.unmark(&self.group, file);
            } else {
                let marked = AtomicBool::new(known.marked.load(Ordering::Acquire));
                files.insert(
                    id,
                    Arc::new(Watched {
                        blobs: rest,
                        marked,
                    }),
                );
            }
        }
    }

    /// Starts answering: first what a predecessor left, if there was one. The blobs
    /// of that must have been added.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub(crate) fn start(self: &Arc<Self>, inherited: Option<Inheritance>) -> anyhow::Result<()> {
        self.pool.get_or_init(|| {
            Pool::new("erofs-fetch", MAX_FETCHERS, |pending: Pending| {
                pending.settle();
            })
        });
        if let Some(inherited) = inherited {
            self.take_over(inherited);
        }
        for index in 0..FRONT_THREADS {
            let watch = Arc::clone(self);
            std::thread::Builder::new()
                .name(format!("erofs-{index}"))
                .stack_size(512 << 10)
                .spawn(move || watch.serve())
                .context("cannot start a thread")?;
        }
        Ok(())
    }

    fn take_over(self: &Arc<Self>, mut inherited: Inheritance) {
        if !inherited.slots.is_empty() {
            tracing::info!(
                "{} requests of the kernel were left unanswered; answering them",
                inherited.slots.len()
            );
        }
        for slot in inherited.slots {
            let attempt = self.journal.count_attempt(&slot);
            let event = Event::parse(&self.journal.event(&slot)).ok();
            let named = event.and_then(|event| {
                let name = inherited.names.remove(&event.fd)?;
                Some((name, event.range))
            });
            let Some((name, range)) = named else {
                // No descriptor came with it: the kernel has refused it by itself.
                self.journal.give_back(slot);
                continue;
            };
            let pending = Pending {
                watch: Arc::clone(self),
                slot: Some(slot),
                name,
                range,
            };
            if attempt > MAX_ATTEMPTS {
                tracing::error!("a read that {MAX_ATTEMPTS} processes died of is refused");
                drop(pending);
            } else {
                self.wait_for(pending);
            }
        }
    }

    /// Body of a front thread. Ends with the process.
    fn serve(self: Arc<Self>) {
        loop {
            let slot = self.journal.take();
            match self.journal.read_event(&self.group, &slot) {
                Ok(len) if len > 0 => self.handle(slot, len),
                Ok(_) => {
                    self.journal.give_back(slot);
                    std::thread::sleep(RECOVERY);
                }
                Err(error) => {
                    self.journal.give_back(slot);
                    if error.kind() != io::ErrorKind::Interrupted {
                        // Out of descriptors, for instance: the kernel has refused the
                        // event by itself, and there will be others.
                        tracing::error!("reading fanotify events: {error}");
                        std::thread::sleep(RECOVERY);
                    }
                }
            }
        }
    }

    fn handle(self: &Arc<Self>, slot: Slot, len: usize) {
        let bytes = self.journal.event(&slot);
        let event = bytes.get(..len.min(EVENT_ROOM)).unwrap_or_default();
        let event = match Event::parse(event) {
            Ok(event) if event.fd >= 0 => event,
            Ok(_) => return self.journal.give_back(slot),
            Err(error) => {
                tracing::error!("{error}");
                return self.journal.give_back(slot);
            }
        };
        // SAFETY: the kernel has just opened this descriptor for us, with the event.
        let name = unsafe { OwnedFd::from_raw_fd(event.fd) };
        let file = File::from(name);
        let id = FileId::of(&file);
        let pending = Pending {
            watch: Arc::clone(self),
            slot: Some(slot),
            name: file.into(),
            range: event.range,
        };
        // Our own use of cache files is exempt from questions. Should there be one all
        // the same, it is about bytes that we are just writing.
        if event.pid.cast_unsigned() == std::process::id() {
            return pending.allow();
        }
        match id {
            Ok(id) => self.decide(id, pending),
            Err(error) => tracing::error!("a file in use cannot be inspected: {error}"),
        }
    }

    fn decide(&self, id: FileId, pending: Pending) {
        if let Some(slot) = &pending.slot {
            self.journal.set_file(slot, id);
        }
        let Some(watched) = self.watched(id) else {
            tracing::error!("inode {} belongs to no mount; access refused", id.inode);
            return;
        };
        let resident = |blob: &Arc<Blob>| blob.is_resident(pending.range.clone());
        if watched.blobs.iter().all(resident) {
            // Does not wait; lets sequential readers be kept ahead of.
            pending.settle();
        } else {
            self.wait_for(pending);
        }
    }

    /// Hands an event to a thread that may wait. Dropped, and refused, without one.
    fn wait_for(&self, pending: Pending) {
        if let Some(pool) = self.pool.get() {
            pool.submit(pending);
        }
    }

    fn watched(&self, id: FileId) -> Option<Arc<Watched>> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        files.get(&id).cloned()
    }

    /// Makes a range of a cache file resident. Blocks.
    fn fill(&self, id: FileId, watched: &Watched, range: &Range<u64>) -> Result<(), FsError> {
        for blob in &watched.blobs {
            blob.ensure(range.clone(), Priority::OnDemand)?;
            let file = blob.cache_file().ok_or(FsError::CacheFileLost)?;
            let meta = file.metadata().map_err(FsError::Inspect)?;
            // Somebody deleted or shortened what is mounted; what we filled is not
            // what the kernel would read.
            let same = meta.dev() == id.device && meta.ino() == id.inode;
            if !same || meta.len() != blob.info().uncompressed_size {
                return Err(FsError::CacheFileLost);
            }
        }
        if watched.blobs.iter().all(|blob| blob.is_complete())
            && let Some(file) = watched.blobs.first().and_then(|blob| blob.cache_file())
            && watched.unmark(&self.group, file)
        {
            tracing::info!("inode {} is complete: no more questions", id.inode);
        }
        Ok(())
    }

    /// For an event whose file nobody came to note: it can be any.
    fn fill_all(&self, range: &Range<u64>) -> Result<(), FsError> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        let files: Vec<_> = files.iter().map(|(id, w)| (*id, Arc::clone(w))).collect();
        files
            .iter()
            .try_for_each(|(id, watched)| self.fill(*id, watched, range))
    }

    fn answer(&self, name: &OwnedFd, response: u32) {
        match sys::respond(&self.group, name, response) {
            // Not there: answered by a predecessor just before it died.
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                tracing::error!("an access could not be answered: {error}");
            }
            _ => {}
        }
    }
}

impl Watched {
    /// Takes the mark away; whether there was one.
    fn unmark(&self, group: &OwnedFd, file: &File) -> bool {
        if !self.marked.swap(false, Ordering::AcqRel) {
            return false;
        }
        if let Err(error) = sys::mark(group, Mark::Remove, file) {
            tracing::warn!("a mark cannot be removed: {error}");
        }
        true
    }
}

impl Pending {
    /// Waits until the range is resident, and answers.
    fn settle(self) {
        let Some(slot) = &self.slot else { return };
        let id = self.watch.journal.file(slot);
        let filled = match id {
            None => self.watch.fill_all(&self.range),
            Some(id) => match self.watch.watched(id) {
                Some(watched) => self.watch.fill(id, &watched, &self.range),
                None => Err(FsError::CacheFileLost),
            },
        };
        match filled {
            Ok(()) => self.allow(),
            Err(error) => {
                let inode = id.unwrap_or_default().inode;
                // The answer is always EIO: through EROFS nothing else arrives.
                let _ = self.watch.failures.answer("read of cache", inode, error);
            }
        }
    }

    fn allow(mut self) {
        self.finish(ALLOW);
    }

    fn finish(&mut self, response: u32) {
        if let Some(slot) = self.slot.take() {
            self.watch.answer(&self.name, response);
            // Only now: until the answer the event must be found by a successor.
            self.watch.journal.give_back(slot);
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.finish(DENY_EIO);
    }
}

impl FileId {
    /// The identity of an open file.
    ///
    /// # Errors
    /// As `fstat(2)`.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
        })
    }
}
