//! Many images in one FUSE mount: which image a request is for.
//!
//! An image is mounted on `/`, or images are mounted on paths below directories of
//! the daemon's own ([`pseudo`]), which exist for that purpose only. The top byte of
//! a node number says which: 0 for own directories, otherwise the slot of an image.
//! Requests are passed to the image's [`RafsFs`], counted and timed on the way
//! ([`stats`]); reads that have to wait are kept in a list for whoever asks why
//! ([`Vfs::waits`]).
//!
//! The kernel may keep for ever what images say, and nothing of what own directories
//! say: so an image that comes or goes is seen at once. A slot that is used again gets
//! another generation, so the kernel never takes a new image's files for an old one's.
//!
//! The table of images is replaced as a whole when it changes; a request holds the one
//! it started with.

pub(crate) mod pseudo;
pub(crate) mod stats;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use fuse_backend_rs::abi::fuse_abi::{ROOT_ID, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    ZeroCopyWriter,
};

use crate::errno::{Failures, FsError};
use crate::fuse::node::Slot;
use crate::fuse::workers::{Residency, Wanted};
use crate::fuse::{self, RafsFs, read_only};
use pseudo::{Found, Pseudo};
use stats::{Op, Stats};

thread_local! {
    /// How long the read that this thread answers next has waited for its data.
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// A mounted image.
#[derive(Debug)]
pub(crate) struct Mounted {
    /// Absolute path inside the mount.
    pub path: String,
    /// Its files.
    pub files: RafsFs,
    /// Different for every image that ever was in this daemon.
    pub generation: u64,
    /// What tells its inodes from those of an image that used the same slot before.
    pub stamp: u64,
    /// What was asked of it.
    pub stats: Stats,
    /// What else is known about it, for the control API.
    pub about: crate::manager::About,
}

/// All images and the directories that lead to them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    images: BTreeMap<u8, Arc<Mounted>>,
    /// Slot of the image on `/`.
    on_root: Option<u8>,
    pub(crate) pseudo: Pseudo,
    last_slot: u8,
    last_generation: u64,
}

/// A read that waits for data.
#[derive(Clone, Debug)]
pub(crate) struct Wait {
    /// The read.
    pub read: Wanted,
    /// The image that it is of.
    pub image: Arc<Mounted>,
    /// Since when.
    pub since: Instant,
    /// The same by the clock on the wall.
    pub started: SystemTime,
}

/// The file system of the daemon.
#[derive(Debug, Default)]
pub(crate) struct Vfs {
    table: RwLock<Arc<Table>>,
    waits: Arc<Waits>,
    failures: Failures,
}

/// The reads that wait, in all FUSE mounts of the daemon.
#[derive(Debug, Default)]
struct Waits {
    /// In the order in which they began to wait.
    list: Mutex<BTreeMap<u64, Wait>>,
    next: AtomicU64,
}

impl Waits {
    /// Notes a read that waits; returns what [`Waits::end`] wants to know.
    fn begin(&self, wait: Wait) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number, wait);
        number
    }

    fn end(&self, number: u64) {
        self.lock().remove(&number);
    }

    /// The list is valid whatever a panicking thread did.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Wait>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The image that a node belongs to.
    pub(crate) fn image_of(&self, node: u64) -> Option<&Arc<Mounted>> {
        let slot = if node == ROOT_ID {
            self.on_root?
        } else {
            Slot::of(node)
        };
        self.images.get(&slot)
    }

    /// The image on a path.
    pub(crate) fn image_at(&self, path: &str) -> Option<&Arc<Mounted>> {
        self.images().find(|image| image.path == path)
    }

    /// All images, by slot.
    pub(crate) fn images(&self) -> impl Iterator<Item = &Arc<Mounted>> {
        self.images.values()
    }

    /// A free slot, the one that was free for longest, and a generation for it.
    pub(crate) fn free_slot(&self) -> Option<(Slot, u64)> {
        let generation = self.last_generation.checked_add(1)?;
        let slots = (1..=u8::MAX).map(|step| self.last_slot.wrapping_add(step));
        let free = slots
            .filter_map(Slot::new)
            .find(|slot| !self.images.contains_key(&slot.get()));
        Some((free?, generation))
    }

    /// Adds an image in a slot that [`Table::free_slot`] gave, instead of the one that
    /// is on its path now.
    pub(crate) fn put(
        &mut self,
        slot: Slot,
        image: impl Into<Arc<Mounted>>,
    ) -> Result<(), pseudo::Full> {
        let image = image.into();
        let path = image.path.clone();
        if path != "/" {
            self.pseudo.mount(&path, slot.get())?;
        }
        self.images.retain(|_, other| other.path != path);
        if path == "/" {
            self.on_root = Some(slot.get());
        }
        self.last_slot = slot.get();
        self.last_generation = image.generation;
        self.images.insert(slot.get(), image);
        Ok(())
    }

    /// The slot and the generation that were given out last.
    pub(crate) fn counters(&self) -> (u8, u64) {
        (self.last_slot, self.last_generation)
    }

    /// Goes on counting where a predecessor has stopped.
    pub(crate) fn set_counters(&mut self, (slot, generation): (u8, u64)) {
        self.last_slot = slot;
        self.last_generation = generation;
    }

    /// Leaves room for images that somebody has mounted since the counters were noted:
    /// the kernel knows their slots and generations, and they must not mean another image.
    pub(crate) fn skip(&mut self) {
        /// More than any client mounts without telling its supervisor.
        const SLOTS: u8 = 64;
        const GENERATIONS: u64 = 1 << 16;
        self.last_slot = self.last_slot.wrapping_add(SLOTS);
        self.last_generation = self.last_generation.saturating_add(GENERATIONS);
    }

    /// Removes the image on a path.
    pub(crate) fn remove(&mut self, path: &str) -> Option<Arc<Mounted>> {
        let slot = *self.images.iter().find(|(_, image)| image.path == path)?.0;
        if path == "/" {
            self.on_root = None;
        } else {
            self.pseudo.unmount(path);
        }
        self.images.remove(&slot)
    }
}

impl Vfs {
    /// A file system that is this one image, wherever that is in the daemon's own.
    pub(crate) fn of_one(&self, image: &Arc<Mounted>) -> Self {
        let slot = Slot::FIRST.get();
        let table = Table {
            images: BTreeMap::from([(slot, Arc::clone(image))]),
            on_root: Some(slot),
            ..Table::default()
        };
        Self {
            table: RwLock::new(Arc::new(table)),
            waits: Arc::clone(&self.waits),
            failures: Failures::default(),
        }
    }

    /// The table as it is now.
    pub(crate) fn table(&self) -> Arc<Table> {
        let table = self.table.read();
        Arc::clone(&table.unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the table. Requests under way finish with the old one.
    pub(crate) fn set_table(&self, table: Table) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }

    /// The reads that wait for data now, oldest first.
    pub(crate) fn waits(&self) -> Vec<Wait> {
        self.waits.lock().values().cloned().collect()
    }

    /// Has a request answered by the image it is for, or by `own` if it is for one of
    /// the daemon's own directories.
    fn route<T>(
        &self,
        (op, name): (Op, &'static str),
        node: u64,
        image: impl FnOnce(&Mounted) -> io::Result<T>,
        own: impl FnOnce(&Table) -> Result<T, FsError>,
    ) -> io::Result<T> {
        let table = self.table();
        match table.image_of(node) {
            Some(mounted) => {
                let began = Instant::now();
                let result = image(mounted);
                mounted.stats.count(op, began.elapsed(), result.is_err());
                result
            }
            None => own(&table).map_err(|err| self.failures.answer(name, node, err)),
        }
    }

    fn entry(&self, table: &Table, found: Found) -> Result<Entry, FsError> {
        let image = match found {
            Found::Directory(node) => {
                return Ok(Entry {
                    inode: node,
                    attr: table.pseudo.attributes(node)?,
                    ..Entry::default()
                });
            }
            Found::Image(slot) => table.images.get(&slot),
        };
        let image = image.ok_or(FsError::UnknownNode(0))?;
        let node = image.files.root_node();
        let (attr, attr_timeout) = image
            .files
            .getattr(&Context::default(), node, None)
            .map_err(FsError::Reply)?;
        // No time-out for the entry: another image may be there next time.
        Ok(Entry {
            inode: node,
            generation: image.stamp,
            attr,
            attr_timeout,
            ..Entry::default()
        })
    }

    fn list_own(
        &self,
        table: &Table,
        node: u64,
        cookie: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Found) -> io::Result<usize>,
    ) -> Result<(), FsError> {
        let mut result = Ok(());
        table
            .pseudo
            .list(node, cookie, |entry, found| match add(entry, found) {
                Ok(0) => ControlFlow::Break(()),
                Ok(_) => ControlFlow::Continue(()),
                Err(err) => {
                    result = Err(FsError::Reply(err));
                    ControlFlow::Break(())
                }
            })?;
        result
    }
}

impl Residency for Vfs {
    fn is_resident(&self, node: u64, offset: u64, size: u32) -> bool {
        let table = self.table();
        // What belongs to no image fails at once.
        table
            .image_of(node)
            .is_none_or(|image| image.files.is_resident(node, offset, size))
    }

    fn make_resident(&self, read: &Wanted) -> io::Result<()> {
        let table = self.table();
        let Some(image) = table.image_of(read.node) else {
            return Ok(());
        };
        let since = Instant::now();
        let number = self.waits.begin(Wait {
            read: *read,
            image: Arc::clone(image),
            since,
            started: SystemTime::now(),
        });
        let made = image.files.make_resident(read);
        self.waits.end(number);
        let waited = since.elapsed();
        match &made {
            Ok(()) => {
                image.stats.waited();
                WAITED.set(waited);
            }
            Err(_) => image.stats.count(Op::Read, waited, true),
        }
        made
    }
}

impl FileSystem for Vfs {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(fuse::options())
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.route(
            (Op::Lookup, "lookup"),
            parent,
            |image| {
                let mut entry = image.files.lookup(ctx, parent, name)?;
                entry.generation = image.stamp;
                Ok(entry)
            },
            |table| match table.pseudo.find(parent, name.to_bytes())? {
                Some(found) => self.entry(table, found),
                // No time-out: it may be there next time.
                None => Ok(Entry::default()),
            },
        )
    }

    fn getattr(
        &self,
        ctx: &Context,
        node: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        self.route(
            (Op::Getattr, "getattr"),
            node,
            |image| image.files.getattr(ctx, node, handle),
            |table| Ok((table.pseudo.attributes(node)?, Duration::ZERO)),
        )
    }

    fn readlink(&self, ctx: &Context, node: u64) -> io::Result<Vec<u8>> {
        self.route(
            (Op::Readlink, "readlink"),
            node,
            |image| image.files.readlink(ctx, node),
            |_| Err(FsError::UnknownNode(node)),
        )
    }

    fn open(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        Err(self.failures.answer("open", node, FsError::NotNeeded))
    }

    fn opendir(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        Err(self.failures.answer("opendir", node, FsError::NotNeeded))
    }

    fn flush(&self, _ctx: &Context, node: u64, _handle: u64, _owner: u64) -> io::Result<()> {
        Err(self.failures.answer("flush", node, FsError::NotNeeded))
    }

    fn read(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        out: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let table = self.table();
        let Some(image) = table.image_of(node) else {
            return Err(self
                .failures
                .answer("read", node, FsError::UnknownNode(node)));
        };
        let waited = WAITED.take();
        let began = Instant::now();
        let result = image
            .files
            .read(ctx, node, handle, out, size, offset, owner, flags);
        image.stats.read(&result, waited + began.elapsed());
        result
    }

    fn readdir(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let table = self.table();
        if table.image_of(node).is_some() {
            let image = |image: &Mounted| image.files.readdir(ctx, node, handle, size, offset, add);
            return self.route((Op::Readdir, "readdir"), node, image, |_| Ok(()));
        }
        self.list_own(&table, node, offset, &mut |entry, _| add(entry))
            .map_err(|err| self.failures.answer("readdir", node, err))
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let table = self.table();
        if table.image_of(node).is_some() {
            let image = |image: &Mounted| {
                let mut stamped = |listed: DirEntry<'_>, mut entry: Entry| {
                    entry.generation = image.stamp;
                    add(listed, entry)
                };
                image
                    .files
                    .readdirplus(ctx, node, handle, size, offset, &mut stamped)
            };
            return self.route((Op::Readdirplus, "readdirplus"), node, image, |_| Ok(()));
        }
        self.list_own(&table, node, offset, &mut |listed, found| {
            let is_dot = listed.name == b"." || listed.name == b"..";
            let entry = if is_dot {
                Entry::default()
            } else {
                self.entry(&table, found).unwrap_or_default()
            };
            add(listed, entry)
        })
        .map_err(|err| self.failures.answer("readdirplus", node, err))
    }

    fn getxattr(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.route(
            (Op::Getxattr, "getxattr"),
            node,
            |image| image.files.getxattr(ctx, node, name, size),
            |_| Err(FsError::NoSuchAttribute),
        )
    }

    fn listxattr(&self, ctx: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        self.route(
            (Op::Listxattr, "listxattr"),
            node,
            |image| image.files.listxattr(ctx, node, size),
            |_| {
                Ok(match size {
                    0 => ListxattrReply::Count(0),
                    _ => ListxattrReply::Names(Vec::new()),
                })
            },
        )
    }

    fn statfs(&self, ctx: &Context, node: u64) -> io::Result<statvfs64> {
        self.route(
            (Op::Statfs, "statfs"),
            node,
            |image| image.files.statfs(ctx, node),
            |_| Ok(fuse::node::empty()),
        )
    }

    read_only::changes_are_refused!();
}

#[cfg(test)]
mod tests;
