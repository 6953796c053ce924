//! Which chunks of a blob are in its cache file: a persistent bitmap.
//!
//! The bits live in a mapped file that several processes share. A question is one
//! atomic load; an answer, once yes, stays yes for as long as the map is open.
//!
//! After the machine restarted, a set bit may have reached the disk without the
//! data it speaks of. The map therefore records the boot it was written in. Opened
//! in another boot, its bits are cleared and kept as *suspects* in a second map,
//! which [`fill`](crate::fill) believes again once the data in the cache file
//! matches the digest of the chunk. That gives safety across power loss without a
//! flush per chunk. The same happens if the data file is not the one that the map
//! was made for.
//!
//! There is one short cut: [`ReadyMap::synced`] records a hash of the bitmap at a
//! moment when everything it speaks of was on the disk. If the bitmap still has that
//! hash after a restart, its bits are believed. No flush is needed before the next
//! bit is set, because the bitmap then no longer has that hash.
//!
//! Promises: no lock and no system call to ask or to mark; a map whose length or
//! header is not what it must be counts as empty. A map is never emptied in place,
//! because others may use it, with another data file even: it is replaced.
//!
//! Layout: `docs/format-blob.md`, "Chunk map". Callers hold the lock of the data
//! file while they open a map, see [`cache`](crate::cache).

mod file;
mod shared_bytes;
mod suspects;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use shared_bytes::SharedBytes;

use crate::sync::{AtomicU8, AtomicUsize, Ordering};
use crate::units::ChunkIndex;

const HEADER_SIZE: usize = 4096;
const MAGIC: [u8; 4] = 0x424d_4150_u32.to_le_bytes();
const VERSION: [u8; 4] = 1_u32.to_le_bytes();
const MAGIC2: [u8; 4] = 0x434d_4150_u32.to_le_bytes();
const ALL_READY: [u8; 4] = 0x4d4d_4150_u32.to_le_bytes();
const MARKER_AT: usize = 12;
/// Our record, in the part of the header that others leave zero.
const TAG_AT: usize = 16;
const TAG: [u8; 8] = *b"bootid\x02\0";
const BOOT_ID_AT: usize = TAG_AT + TAG.len();
const DATA_ID_AT: usize = BOOT_ID_AT + 16;
/// Hash of the bitmap when it was last known to be on the disk with its data; or zero.
const SYNCED_AT: usize = DATA_ID_AT + 16;
const RECORD_LEN: usize = SYNCED_AT + 32 - TAG_AT;

/// One run of the machine: what `/proc/sys/kernel/random/boot_id` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId([u8; 16]);

impl BootId {
    /// The run we are in.
    ///
    /// # Errors
    /// If `/proc` is not mounted or holds no identifier. A caller that goes on with
    /// [`BootId::unknown`] has every chunk of earlier processes checked.
    pub fn current() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Self::parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    /// Differs from every run, itself included.
    #[must_use]
    pub const fn unknown() -> Self {
        Self([0; 16])
    }

    /// A run of the machine that never was: for tests.
    #[must_use]
    pub const fn invented(number: u8) -> Self {
        Self([number; 16])
    }

    fn parse(text: &str) -> Option<Self> {
        let hex = text.trim().replace('-', "");
        let number = u128::from_str_radix(&hex, 16)
            .ok()
            .filter(|_| hex.len() == 32)?;
        Some(Self(std::array::from_fn(|i| {
            // One byte of the number: the truncation is meant.
            u8::try_from((number >> (8 * i)) & 0xff).unwrap_or(0)
        })))
    }
}

/// Tells a data file from any other that had or will have its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DataFileId([u8; 16]);

impl DataFileId {
    /// Inode number, which is used again after a file is deleted, and time of birth.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        // A file system without times of birth: the inode number must do.
        let born = meta
            .created()
            .ok()
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
            .and_then(|time| u64::try_from(time.as_nanos()).ok());
        let mut id = [0; 16];
        id[..8].copy_from_slice(&meta.ino().to_le_bytes());
        id[8..].copy_from_slice(&born.unwrap_or(0).to_le_bytes());
        Ok(Self(id))
    }
}

/// What was found in the place of a map, see [`ReadyMap::find`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No map, or something else.
    Nothing,
    /// A map of this boot.
    Current,
    /// A map of another boot, which was on the disk together with its data.
    Synced,
    /// A map of another boot, of another data file or of another program.
    Doubtful,
}

/// The map of one blob.
#[derive(Debug)]
pub struct ReadyMap {
    bytes: SharedBytes,
    file: File,
    chunks: u32,
    /// Bits of an earlier boot that have not been checked since. Hints only: what
    /// they say is checked before it is believed.
    suspects: Option<SharedBytes>,
    /// Bytes of the bitmap that are known to be complete: everything before.
    complete: AtomicUsize,
}

/// A map that was looked at and not changed yet.
#[derive(Debug)]
pub struct Candidate {
    existing: Option<(File, SharedBytes)>,
    found: Found,
    path: PathBuf,
    chunks: u32,
    boot: BootId,
    data: DataFileId,
}

impl Candidate {
    /// What was found.
    #[must_use]
    pub fn found(&self) -> Found {
        self.found
    }

    /// Makes the map usable in this boot; an empty one if nothing was found.
    ///
    /// * `suspects`: the file for bits that are not believed.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::StorageFull`] if there is no space.
    pub fn open(self, suspects: &Path) -> io::Result<ReadyMap> {
        let create = || file::create(&self.path, self.chunks, &self.boot, self.data);
        let (file, bytes) = match (self.existing, self.found) {
            (Some(map), Found::Current) => map,
            (Some((file, bytes)), Found::Synced) => {
                file.write_all_at(&self.boot.0, at(BOOT_ID_AT))?;
                (file, bytes)
            }
            (Some((_, bytes)), _) => {
                // First the suspects, then the empty map in the place of the full
                // one: after a crash in between the bits are doubted once more.
                suspects::add(suspects, &bytes, self.chunks)?;
                create()?
            }
            (None, _) => {
                file::remove(suspects)?;
                create()?
            }
        };
        Ok(ReadyMap {
            bytes,
            file,
            chunks: self.chunks,
            suspects: suspects::open(suspects, self.chunks)?,
            complete: AtomicUsize::new(0),
        })
    }
}

impl ReadyMap {
    /// Looks at the map at `path` and changes nothing.
    ///
    /// * `chunks`: number of chunks of the blob.
    /// * `data`: the data file that the map should speak of.
    ///
    /// # Errors
    /// What the system says.
    pub fn find(
        path: &Path,
        chunks: u32,
        data: DataFileId,
        boot: &BootId,
    ) -> io::Result<Candidate> {
        let existing = file::open(path, chunks)?;
        let found = existing.as_ref().map_or(Found::Nothing, |(_, bytes)| {
            judge(bytes, chunks, data, boot)
        });
        Ok(Candidate {
            existing,
            found,
            path: path.to_owned(),
            chunks,
            boot: *boot,
            data,
        })
    }

    /// Number of chunks of the blob.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Whether the chunk is in the data file. `false` for an index beyond the last.
    #[must_use]
    pub fn is_ready(&self, index: ChunkIndex) -> bool {
        let (byte, mask) = position(index);
        // Acquire pairs with the release in `mark`: whoever sees the bit sees what
        // was done before it was set.
        index.get() < self.chunks
            && self
                .bit_byte(byte)
                .is_some_and(|bits| bits.load(Ordering::Acquire) & mask != 0)
    }

    /// Records that the verified bytes of the chunk are in the data file.
    ///
    /// Returns whether the chunk was not ready before.
    pub fn mark(&self, index: ChunkIndex) -> bool {
        let (byte, mask) = position(index);
        if index.get() >= self.chunks {
            return false;
        }
        self.bit_byte(byte)
            .is_some_and(|bits| bits.fetch_or(mask, Ordering::AcqRel) & mask == 0)
    }

    /// Whether the chunk was ready in an earlier boot and has not been checked since.
    #[must_use]
    pub fn is_suspect(&self, index: ChunkIndex) -> bool {
        let (byte, mask) = position(index);
        self.suspect_byte(byte)
            .is_some_and(|bits| bits.load(Ordering::Relaxed) & mask != 0)
    }

    /// Forgets a suspicion, because the chunk was checked.
    pub fn clear_suspect(&self, index: ChunkIndex) {
        let (byte, mask) = position(index);
        if let Some(bits) = self.suspect_byte(byte) {
            bits.fetch_and(!mask, Ordering::Relaxed);
        }
    }

    /// Number of ready chunks. Reads the whole map.
    #[must_use]
    pub fn count(&self) -> u32 {
        (0..bitmap_len(self.chunks))
            .map(|byte| (self.load(byte) & self.full(byte)).count_ones())
            .sum()
    }

    /// Whether every chunk is ready; if so, the file says so too from now on.
    ///
    /// Bits never go back, so a part once found complete is not looked at again:
    /// asking often costs one byte each time.
    #[must_use]
    pub fn all_ready(&self) -> bool {
        let len = bitmap_len(self.chunks);
        let mut byte = self.complete.load(Ordering::Relaxed);
        while byte < len {
            let full = self.full(byte);
            if self.load(byte) & full != full {
                break;
            }
            byte += 1;
        }
        self.complete.fetch_max(byte, Ordering::Relaxed);
        if byte < len {
            return false;
        }
        if self.bytes.load(MARKER_AT) != ALL_READY {
            // By a system call, which can fail: a store into the map of a disk that
            // went bad would end the process. The bits alone say the same.
            let _ = self.file.write_all_at(&ALL_READY, at(MARKER_AT));
        }
        true
    }

    /// Puts map and data on the disk and records that they are: after a restart of
    /// the machine the bits that are set now are believed. Blocks for as long as
    /// the disk takes.
    ///
    /// * `sync_data`: puts everything on the disk that the map speaks of.
    ///
    /// # Errors
    /// What the system says; nothing is recorded then.
    pub fn synced(&self, sync_data: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // Before the flush: bits that others set meanwhile are not covered by it. If
        // there are any, the bitmap has another hash.
        let hash = hash(&self.bytes, self.chunks, &self.bytes.load(DATA_ID_AT));
        if self.bytes.load(SYNCED_AT) == hash {
            return Ok(());
        }
        sync_data()?;
        self.file.write_all_at(&hash, at(SYNCED_AT))?;
        self.file.sync_data()
    }

    fn suspect_byte(&self, byte: usize) -> Option<&AtomicU8> {
        self.suspects.as_ref()?.get(HEADER_SIZE.checked_add(byte)?)
    }

    fn bit_byte(&self, byte: usize) -> Option<&AtomicU8> {
        self.bytes.get(HEADER_SIZE.checked_add(byte)?)
    }

    fn load(&self, byte: usize) -> u8 {
        self.bit_byte(byte)
            .map_or(0, |bits| bits.load(Ordering::Acquire))
    }

    /// The bits of a byte that stand for chunks; the last byte may have fewer than 8.
    fn full(&self, byte: usize) -> u8 {
        let rest = self.chunks % 8;
        if rest != 0 && byte + 1 == bitmap_len(self.chunks) {
            !(0xff_u8 >> rest)
        } else {
            0xff
        }
    }
}

/// Byte of the bitmap and mask in it; the first chunk is the highest bit.
fn position(index: ChunkIndex) -> (usize, u8) {
    (index.as_usize() / 8, 0x80 >> (index.get() % 8))
}

fn bitmap_len(chunks: u32) -> usize {
    ChunkIndex::new(chunks).as_usize().div_ceil(8)
}

/// What a map that was found is good for.
fn judge(bytes: &SharedBytes, chunks: u32, data: DataFileId, boot: &BootId) -> Found {
    let ours = bytes.load(TAG_AT) == TAG && bytes.load(DATA_ID_AT) == data.0;
    if !ours {
        Found::Doubtful
    } else if bytes.load(BOOT_ID_AT) == boot.0 && *boot != BootId::unknown() {
        Found::Current
    } else if bytes.load(SYNCED_AT) == hash(bytes, chunks, &data.0) {
        Found::Synced
    } else {
        Found::Doubtful
    }
}

/// Hash of a bitmap and of what it speaks of; never zero in practice.
fn hash(bytes: &SharedBytes, chunks: u32, data: &[u8; 16]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(data).update(&chunks.to_le_bytes());
    let mut at = HEADER_SIZE;
    let end = HEADER_SIZE + bitmap_len(chunks);
    while at < end {
        let block: [u8; 1024] = bytes.load(at);
        hasher.update(block.get(..end - at).unwrap_or(&block));
        at += block.len();
    }
    hasher.finalize().into()
}

/// A position in the header as an offset in the file.
fn at(position: usize) -> u64 {
    crate::codec::as_u64(position)
}

#[cfg(test)]
mod tests;
