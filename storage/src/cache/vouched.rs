//! What the images that share the files of a blob say its chunks are.
//!
//! A ready bit means that a chunk was verified, but not for whom: two images may name
//! the same blob and give different digests. So every image writes down, when it opens
//! the files, the digest and place of each chunk it knows. An image that contradicts an
//! earlier one is not admitted and gets files of its own. Images that left out different
//! chunks, because upper layers removed the files, do agree.
//!
//! Promise: once admitted, a chunk that is ready was verified against the digest that
//! this image gives for it, whoever fetched it. So one bit per chunk is enough, and to
//! ask costs nothing more than before.
//!
//! Layout: `docs/format-blob.md`, "Vouched chunks". The lock of the data file is held.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::codec::as_u64;
use crate::digest::ChunkDigests;
use crate::units::ChunkIndex;

const MAGIC: [u8; 16] = *b"nydus vouched\0\0\x01";

/// Magic, number of chunks, uncompressed size, zeros.
const HEADER: usize = 64;

/// Digest and 1 + offset in the uncompressed address space; all zero if unknown.
const SLOT: usize = 40;

/// Slots that are read and written at a time.
const BLOCK: usize = 1024;

/// What is vouched for: the blob as one image knows it.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) size: u64,
    pub(super) chunks: u32,
    pub(super) digests: &'a dyn ChunkDigests,
}

/// What came of [`admit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// The image may believe the ready map.
    Admitted,
    /// Another image says something else about this blob.
    Contradiction,
    /// There is no record, or a broken one: nothing is known about what is ready.
    NoRecord,
}

/// Starts a record for files that hold nothing that is believed.
pub(super) fn start(path: &Path, view: &View<'_>) -> io::Result<Admission> {
    let temporary = super::temporary_name(path);
    let made = (|| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&temporary)?;
        file.set_len(record_len(view.chunks))?;
        file.write_all_at(&header(view), 0)?;
        add(&file, view)?;
        std::fs::rename(&temporary, path)?;
        Ok(Admission::Admitted)
    })();
    if made.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    made
}

/// Adds what this image says, unless it contradicts what is there.
pub(super) fn admit(path: &Path, view: &View<'_>) -> io::Result<Admission> {
    let Some(file) = open(path)? else {
        return Ok(Admission::NoRecord);
    };
    match read_header(&file)? {
        Some(found) if found != (view.chunks, view.size) => Ok(Admission::Contradiction),
        Some(_) => add(&file, view),
        None => Ok(Admission::NoRecord),
    }
}

/// Whether there is a record of a blob of this size.
pub(super) fn is_of_size(path: &Path, size: u64) -> io::Result<bool> {
    let Some(file) = open(path)? else {
        return Ok(false);
    };
    Ok(read_header(&file)?.is_some_and(|(_, found)| found == size))
}

/// Puts the record on the disk.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    open(path)?.map_or_else(
        || Err(io::ErrorKind::NotFound.into()),
        |file| file.sync_data(),
    )
}

/// A name for what an image says about a blob: equal only for images that agree.
pub(super) fn fingerprint(view: &View<'_>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header(view));
    for index in 0..view.chunks {
        hasher.update(&slot(view, index));
    }
    let hex = hasher.finalize().to_hex();
    hex.get(..32).unwrap_or_default().to_owned()
}

fn open(path: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
    match options.open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn record_len(chunks: u32) -> u64 {
    as_u64(HEADER) + u64::from(chunks) * as_u64(SLOT)
}

fn header(view: &View<'_>) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..16].copy_from_slice(&MAGIC);
    header[16..20].copy_from_slice(&view.chunks.to_le_bytes());
    header[24..32].copy_from_slice(&view.size.to_le_bytes());
    header
}

/// Number of chunks and size, if the file is a whole record.
fn read_header(file: &File) -> io::Result<Option<(u32, u64)>> {
    let meta = file.metadata()?;
    let mut header = [0; HEADER];
    if !meta.is_file() || meta.len() < as_u64(HEADER) {
        return Ok(None);
    }
    file.read_exact_at(&mut header, 0)?;
    let [a, b, c, d] = [header[16], header[17], header[18], header[19]];
    let chunks = u32::from_le_bytes([a, b, c, d]);
    let mut size = [0; 8];
    size.copy_from_slice(&header[24..32]);
    let whole = header[..16] == MAGIC && meta.len() == record_len(chunks);
    Ok(whole.then_some((chunks, u64::from_le_bytes(size))))
}

/// Fills empty slots. What was written before a contradiction showed stays: it is
/// true of an image, if not of one that uses these files.
fn add(file: &File, view: &View<'_>) -> io::Result<Admission> {
    let mut slots = vec![0; BLOCK * SLOT];
    let mut first = 0;
    while first < view.chunks {
        let count = ChunkIndex::new(view.chunks - first).as_usize().min(BLOCK);
        let block = slots.get_mut(..count * SLOT).unwrap_or_default();
        let at = as_u64(HEADER) + u64::from(first) * as_u64(SLOT);
        file.read_exact_at(block, at)?;
        let mut changed = false;
        for (place, index) in block.chunks_exact_mut(SLOT).zip(first..) {
            let said = slot(view, index);
            if said == [0; SLOT] || said == *place {
                continue;
            }
            if place.iter().any(|byte| *byte != 0) {
                return Ok(Admission::Contradiction);
            }
            place.copy_from_slice(&said);
            changed = true;
        }
        if changed {
            file.write_all_at(block, at)?;
        }
        first = first.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }
    Ok(Admission::Admitted)
}

fn slot(view: &View<'_>, index: u32) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    let index = ChunkIndex::new(index);
    if let Some(digest) = view.digests.chunk_digest(index) {
        let place = view
            .digests
            .chunk_plain_offset(index)
            .unwrap_or(u64::MAX - 1);
        slot[..32].copy_from_slice(digest.as_bytes());
        slot[32..].copy_from_slice(&place.saturating_add(1).to_le_bytes());
    }
    slot
}
