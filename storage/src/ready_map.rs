//! Which chunks of a blob are in its cache file: a persistent bitmap.
//!
//! The bits live in a mapped file that several processes share. A question is one
//! atomic load; an answer, once yes, stays yes for as long as the map is open.
//!
//! After the machine restarted, a set bit may have reached the disk without the
//! data it speaks of. The map therefore records the boot it was written in. Opened
//! in another boot, its bits are cleared on disk and remembered as *suspects*,
//! which [`fill`](crate::fill) believes again once the data in the cache file
//! matches the digest of the chunk. That gives safety across power loss without a
//! flush per chunk.
//!
//! Promises: no lock and no system call to ask or to mark; a map whose length,
//! header or data file is not what it must be counts as empty. A map is never
//! emptied in place while others may use it: it is replaced by a new file.
//!
//! Layout: `docs/format-blob.md`, "Chunk map". Callers hold the lock of the data
//! file while they open a map, see [`cache`](crate::cache).

mod shared_bytes;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use shared_bytes::SharedBytes;

use crate::sync::{AtomicU8, AtomicUsize, Ordering};
use crate::units::ChunkIndex;

const HEADER_SIZE: usize = 4096;
const MAGIC: [u8; 4] = 0x424d_4150_u32.to_le_bytes();
const VERSION: [u8; 4] = 1_u32.to_le_bytes();
const MAGIC2: [u8; 4] = 0x434d_4150_u32.to_le_bytes();
const ALL_READY: [u8; 4] = 0x4d4d_4150_u32.to_le_bytes();
const MARKER_AT: usize = 12;
/// Start of the boot record, in the part of the header that others leave zero.
const BOOT_TAG_AT: usize = 16;
const BOOT_TAG: [u8; 8] = *b"bootid\x01\0";
const BOOT_ID_AT: usize = BOOT_TAG_AT + BOOT_TAG.len();

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

    /// An identifier for tests.
    #[cfg(test)]
    pub(crate) const fn test(run: u8) -> Self {
        Self([run; 16])
    }
}

/// What is known about the data file that a map speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFile {
    /// It was there, with its full length.
    Kept,
    /// It was created or extended, so it holds nothing; an existing map is void.
    Fresh,
}

/// The map of one blob.
#[derive(Debug)]
pub struct ReadyMap {
    bytes: SharedBytes,
    chunks: u32,
    /// Bits that were set in an earlier boot and have not been checked since.
    suspects: Box<[AtomicU8]>,
    /// Bytes of the bitmap that are known to be complete: everything before.
    complete: AtomicUsize,
}

impl ReadyMap {
    /// Opens the map at `path`, or makes an empty one.
    ///
    /// * `chunks`: number of chunks of the blob.
    /// * `data`: whether the data file can hold what an existing map says.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::StorageFull`] if there is no space for it.
    pub fn open(path: &Path, chunks: u32, data: DataFile, boot: &BootId) -> io::Result<Self> {
        if data == DataFile::Kept
            && let Some(bytes) = open_existing(path, chunks)?
        {
            let mut map = Self::new(bytes, chunks);
            map.doubt_earlier_boot(boot);
            return Ok(map);
        }
        create(path, chunks, boot).map(|bytes| Self::new(bytes, chunks))
    }

    fn new(bytes: SharedBytes, chunks: u32) -> Self {
        Self {
            bytes,
            chunks,
            suspects: Box::default(),
            complete: AtomicUsize::new(0),
        }
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
        self.suspects
            .get(byte)
            .is_some_and(|bits| bits.load(Ordering::Relaxed) & mask != 0)
    }

    /// Forgets a suspicion, because the chunk was checked.
    pub fn clear_suspect(&self, index: ChunkIndex) {
        let (byte, mask) = position(index);
        if let Some(bits) = self.suspects.get(byte) {
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
            self.bytes.store(MARKER_AT, &ALL_READY);
        }
        true
    }

    /// Turns the bits of another boot into suspects.
    ///
    /// The bits go first and the new boot is recorded last: a process that dies in
    /// between leaves fewer bits, never bits that are believed without a check.
    fn doubt_earlier_boot(&mut self, boot: &BootId) {
        let recorded =
            self.bytes.load(BOOT_TAG_AT) == BOOT_TAG && self.bytes.load(BOOT_ID_AT) == boot.0;
        if recorded && *boot != BootId::unknown() {
            return;
        }
        self.bytes.store(MARKER_AT, &[0; 4]);
        self.suspects = (0..bitmap_len(self.chunks))
            .map(|byte| {
                let bits = self
                    .bit_byte(byte)
                    .map_or(0, |bits| bits.swap(0, Ordering::AcqRel));
                AtomicU8::new(bits)
            })
            .collect();
        self.bytes.store(BOOT_ID_AT, &boot.0);
        self.bytes.store(BOOT_TAG_AT, &BOOT_TAG);
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

/// Maps the file if it is a map of that many chunks; `None` if it is not, or absent.
fn open_existing(path: &Path, chunks: u32) -> io::Result<Option<SharedBytes>> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let meta = file.metadata()?;
    if !meta.is_file() || meta.len() != crate::codec::as_u64(HEADER_SIZE + bitmap_len(chunks)) {
        tracing::warn!(path = %path.display(), "ready map has a wrong length; starting from empty");
        return Ok(None);
    }
    allocate(&file, meta.len())?;
    let bytes = SharedBytes::map(&file)?;
    let header = [bytes.load(0), bytes.load(4), bytes.load(8)];
    if header != [MAGIC, VERSION, MAGIC2] {
        tracing::warn!(path = %path.display(), "not a ready map; starting from empty");
        return Ok(None);
    }
    Ok(Some(bytes))
}

/// Makes an empty map and puts it in the place of whatever is at `path`.
fn create(path: &Path, chunks: u32, boot: &BootId) -> io::Result<SharedBytes> {
    let temporary = crate::cache::temporary_name(path);
    let made = (|| {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        let len = crate::codec::as_u64(HEADER_SIZE + bitmap_len(chunks));
        file.set_len(len)?;
        allocate(&file, len)?;
        let bytes = SharedBytes::map(&file)?;
        bytes.store(BOOT_ID_AT, &boot.0);
        bytes.store(BOOT_TAG_AT, &BOOT_TAG);
        bytes.store(0, &[MAGIC, VERSION, MAGIC2].concat());
        fs::rename(&temporary, path)?;
        Ok(bytes)
    })();
    if made.is_err() {
        // Best effort: the file is small and is ignored by everyone.
        let _ = fs::remove_file(&temporary);
    }
    made
}

/// Gives every page a block now: on a full disk this fails, a later store to the
/// map would end the process.
fn allocate(file: &File, len: u64) -> io::Result<()> {
    let len = i64::try_from(len).map_err(io::Error::other)?;
    nix::fcntl::posix_fallocate(file, 0, len).map_err(io::Error::from)
}

#[cfg(test)]
mod tests;
