//! Events in flight, where the death of a process cannot lose them.
//!
//! The journal is memory that several processes share: a table of slots, one event
//! each. An event is read *into* its slot by the kernel, so at no moment is it only
//! in the head of a process that may die. The slot is cleared after the event was
//! answered. Whoever takes over finds in the table what the dead process had read and
//! not answered; see [`events`](super::events) for how that is answered then.
//!
//! A slot that is taken and holds no event means that its owner died while it waited
//! for one: nothing was lost.
//!
//! The number of slots bounds the events in flight, and with them the descriptors
//! they carry.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, ensure};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Most events in flight.
pub(crate) const SLOTS: u32 = 1024;
/// Bytes of one slot; the header takes the place of one.
const SLOT_SIZE: usize = 128;
/// What a journal of this layout begins with.
const MAGIC: u64 = u64::from_le_bytes(*b"nydusjr1");

/// Fields of a slot, by offset in bytes.
const TAKEN: usize = 0;
const ATTEMPTS: usize = 4;
const DEVICE: usize = 8;
const INODE: usize = 16;
const EVENT: usize = 24;
/// Room for one event and not for two: an event is 48 bytes.
pub(crate) const EVENT_ROOM: usize = 72;

/// A file by device and inode number; `(0, 0)` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct FileId {
    pub device: u64,
    pub inode: u64,
}

/// A slot that the bearer may use, until it is given back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Slot(u32);

/// The table.
#[derive(Debug)]
pub(crate) struct Journal {
    memory: OwnedFd,
    map: MmapRaw,
    free: Mutex<Vec<Slot>>,
    freed: Condvar,
}

impl Journal {
    /// An empty one.
    ///
    /// # Errors
    /// When the system has no memory for it.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let memory = memfd_create("nydus-journal", MFdFlags::MFD_CLOEXEC)
            .context("cannot make shared memory")?;
        let file = File::from(memory);
        file.set_len(u64::from(SLOTS + 1) * 128)
            .context("cannot size shared memory")?;
        let journal = Self::map(file.into())?;
        journal.long(0).store(MAGIC, Ordering::Release);
        // Every page exists from now on: the kernel copies events without a fault.
        for slot in 0..SLOTS {
            journal.clear(&Slot(slot));
        }
        journal.lock().extend((0..SLOTS).rev().map(Slot));
        Ok(journal)
    }

    /// The journal of a process that is gone, and the slots that it had in use.
    /// Call while no other process uses it.
    ///
    /// # Errors
    /// When it is none, or has another layout.
    pub(crate) fn adopt(memory: OwnedFd) -> anyhow::Result<(Self, Vec<Slot>)> {
        let journal = Self::map(memory)?;
        journal.check_magic()?;
        let mut used = Vec::new();
        for slot in (0..SLOTS).rev().map(Slot) {
            let taken = journal.word(&slot, TAKEN).load(Ordering::Acquire) != 0;
            if taken && journal.holds_event(&slot) {
                used.push(slot);
            } else {
                journal.clear(&slot);
                journal.lock().push(slot);
            }
        }
        Ok((journal, used))
    }

    /// Whether `memory` is a journal of this layout. Changes nothing in it.
    ///
    /// # Errors
    /// When it is not.
    pub(crate) fn check(memory: &OwnedFd) -> anyhow::Result<()> {
        let journal = Self::map(memory.try_clone().context("cannot copy a descriptor")?)?;
        journal.check_magic()
    }

    fn check_magic(&self) -> anyhow::Result<()> {
        ensure!(
            self.long(0).load(Ordering::Acquire) == MAGIC,
            "the journal has an unknown layout"
        );
        Ok(())
    }

    fn map(memory: OwnedFd) -> anyhow::Result<Self> {
        let size = SLOT_SIZE * (usize::try_from(SLOTS)? + 1);
        let file = File::from(memory);
        let len = file.metadata().context("cannot inspect shared memory")?;
        ensure!(
            len.len() == u64::try_from(size)?,
            "the journal has a wrong size"
        );
        let map = MmapOptions::new()
            .len(size)
            .map_raw(&file)
            .context("cannot map shared memory")?;
        Ok(Self {
            memory: file.into(),
            map,
            free: Mutex::default(),
            freed: Condvar::new(),
        })
    }

    /// A free slot; waits while all are in use.
    pub(crate) fn take(&self) -> Slot {
        let mut free = self.lock();
        loop {
            if let Some(slot) = free.pop() {
                self.clear(&slot);
                self.word(&slot, TAKEN).store(1, Ordering::Release);
                return slot;
            }
            free = self
                .freed
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the use of a slot. Its event must have been answered.
    pub(crate) fn give_back(&self, slot: Slot) {
        self.clear(&slot);
        self.lock().push(slot);
        self.freed.notify_one();
    }

    /// Reads the next event of `group` into a slot; blocks. Returns its length.
    ///
    /// # Errors
    /// As `read(2)`.
    pub(crate) fn read_event(&self, group: &OwnedFd, slot: &Slot) -> io::Result<usize> {
        let room = self.at(slot, EVENT);
        // SAFETY: the room lies in the map (`at`), which outlives the call, and
        // belongs to the bearer of the slot alone.
        let len = unsafe { libc::read(group.as_raw_fd(), room.cast(), EVENT_ROOM) };
        usize::try_from(len).map_err(|_negative| io::Error::last_os_error())
    }

    /// The event in a slot, as the kernel wrote it.
    pub(crate) fn event(&self, slot: &Slot) -> [u8; EVENT_ROOM] {
        let room = self.at(slot, EVENT).cast::<[u8; EVENT_ROOM]>();
        // SAFETY: inside the map and of that size; only the bearer of the slot changes it.
        unsafe { room.read_unaligned() }
    }

    /// Notes which file the event of a slot is about.
    pub(crate) fn set_file(&self, slot: &Slot, file: FileId) {
        self.long(offset(slot, DEVICE))
            .store(file.device, Ordering::Relaxed);
        // Last, so that a half-written note counts as none.
        self.long(offset(slot, INODE))
            .store(file.inode, Ordering::Release);
    }

    /// The file of an event; `None` if nobody came to note it.
    pub(crate) fn file(&self, slot: &Slot) -> Option<FileId> {
        let inode = self.long(offset(slot, INODE)).load(Ordering::Acquire);
        let device = self.long(offset(slot, DEVICE)).load(Ordering::Relaxed);
        (inode != 0).then_some(FileId { device, inode })
    }

    /// Counts one more process that takes over this event; returns how many did.
    pub(crate) fn count_attempt(&self, slot: &Slot) -> u32 {
        let before = self.word(slot, ATTEMPTS).fetch_add(1, Ordering::AcqRel);
        before.saturating_add(1)
    }

    fn holds_event(&self, slot: &Slot) -> bool {
        self.word(slot, EVENT).load(Ordering::Acquire) != 0
    }

    fn clear(&self, slot: &Slot) {
        // The event's length first: from here on the slot holds nothing.
        self.word(slot, EVENT).store(0, Ordering::Release);
        self.word(slot, TAKEN).store(0, Ordering::Release);
        self.word(slot, ATTEMPTS).store(0, Ordering::Relaxed);
        self.set_file(slot, FileId::default());
    }

    /// Address of a field of a slot.
    fn at(&self, slot: &Slot, field: usize) -> *mut u8 {
        let at = offset(slot, field);
        debug_assert!(at + 8 <= self.map.len(), "slots are below SLOTS");
        // SAFETY: a slot's number is below SLOTS, and the map holds that many of them
        // behind the header (`map`).
        unsafe { self.map.as_mut_ptr().add(at) }
    }

    fn word(&self, slot: &Slot, field: usize) -> &AtomicU32 {
        // SAFETY: inside the map, aligned because slots and fields are, and words of
        // it are used as atomics only, but for the event while its bearer reads it.
        unsafe { AtomicU32::from_ptr(self.at(slot, field).cast()) }
    }

    fn long(&self, at: usize) -> &AtomicU64 {
        let at = at.min(self.map.len() - 8) & !7;
        // SAFETY: inside the map by the line above.
        let place = unsafe { self.map.as_mut_ptr().add(at) };
        // SAFETY: aligned by the line above; used as an atomic only.
        unsafe { AtomicU64::from_ptr(place.cast()) }
    }

    /// The list of free slots is valid whatever a panicking thread did.
    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

/// Offset of a field of a slot in the map; the header comes first.
fn offset(slot: &Slot, field: usize) -> usize {
    // 32 bits fit a usize on every platform that we support.
    let number = usize::try_from(slot.0).unwrap_or(usize::MAX >> 8);
    (number + 1) * SLOT_SIZE + field
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn pipe() -> (OwnedFd, File) {
        let (read, write) = nix::unistd::pipe().unwrap();
        (read, write.into())
    }

    #[test]
    fn a_successor_finds_what_was_not_answered() {
        let journal = Journal::new().unwrap();
        let (events, mut kernel) = pipe();
        let file = FileId {
            device: 7,
            inode: 9,
        };
        let (answered, open, unknown, empty) = (
            journal.take(),
            journal.take(),
            journal.take(),
            journal.take(),
        );
        for (slot, byte) in [(&answered, 1), (&open, 2), (&unknown, 3)] {
            kernel.write_all(&[byte; 48]).unwrap();
            assert_eq!(journal.read_event(&events, slot).unwrap(), 48);
        }
        journal.set_file(&open, file);
        journal.give_back(answered);
        let memory = journal.as_fd().try_clone_to_owned().unwrap();
        drop((journal, empty));

        let (journal, used) = Journal::adopt(memory).unwrap();
        assert_eq!(used, [unknown, open]);
        assert_eq!(journal.event(&used[0])[..48], [3; 48]);
        assert_eq!(journal.file(&used[0]), None);
        assert_eq!(journal.file(&used[1]), Some(file));
        assert_eq!(journal.count_attempt(&used[1]), 1);
        assert_eq!(journal.count_attempt(&used[1]), 2);
        let free = journal.lock().len();
        assert_eq!(free, usize::try_from(SLOTS).unwrap() - 2);
    }

    #[test]
    fn slots_are_given_out_once_and_waited_for() {
        let journal = Journal::new().unwrap();
        let mut taken: Vec<Slot> = (0..SLOTS).map(|_| journal.take()).collect();
        taken.sort_by_key(|slot| slot.0);
        taken.dedup();
        assert_eq!(taken.len(), usize::try_from(SLOTS).unwrap());
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| journal.take());
            let last = taken.pop().unwrap();
            journal.give_back(last);
            assert_eq!(waiter.join().unwrap(), Slot(SLOTS - 1));
        });
    }

    #[test]
    fn memory_of_something_else_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(Journal::adopt(file.try_clone().unwrap().into()).is_err());
        assert!(Journal::check(&file.try_clone().unwrap().into()).is_err());
        let journal = Journal::new().unwrap();
        Journal::check(&journal.as_fd().try_clone_to_owned().unwrap()).unwrap();
        file.set_len(u64::from(SLOTS + 1) * 128).unwrap();
        let error = Journal::adopt(file.into()).unwrap_err().to_string();
        assert!(error.contains("unknown layout"), "{error}");
    }
}
