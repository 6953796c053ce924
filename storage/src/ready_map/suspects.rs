//! Bits that are not believed: a second map file beside the ready map.
//!
//! It lives until every suspect was checked by some process, through restarts of
//! processes and machine. What it says is a hint where checking may save a fetch.

use std::io;
use std::path::Path;

use super::shared_bytes::SharedBytes;
use super::{BootId, DataFileId, HEADER_SIZE, bitmap_len, file};
use crate::sync::Ordering;

/// Adds the bits of `map` to the suspects at `path`.
pub(super) fn add(path: &Path, map: &SharedBytes, chunks: u32) -> io::Result<()> {
    let suspects = match open(path, chunks)? {
        Some(suspects) => suspects,
        None => file::create(path, chunks, &BootId::unknown(), DataFileId::default())?.1,
    };
    for byte in HEADER_SIZE..HEADER_SIZE + bitmap_len(chunks) {
        if let (Some(from), Some(to)) = (map.get(byte), suspects.get(byte)) {
            to.fetch_or(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
    Ok(())
}

/// The suspects that are left, if there are any; the file of none is removed.
pub(super) fn open(path: &Path, chunks: u32) -> io::Result<Option<SharedBytes>> {
    let set = |bytes: &SharedBytes, byte| {
        let bits = bytes.get(byte);
        bits.is_some_and(|bits| bits.load(Ordering::Relaxed) != 0)
    };
    let mut bytes = HEADER_SIZE..HEADER_SIZE + bitmap_len(chunks);
    match file::open(path, chunks)? {
        Some((_, found)) if bytes.any(|byte| set(&found, byte)) => Ok(Some(found)),
        _ => file::remove(path).map(|()| None),
    }
}
