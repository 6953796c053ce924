//! The file of a ready map: made complete or not at all, checked before it is mapped.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::shared_bytes::SharedBytes;
use super::{BOOT_ID_AT, BootId, DATA_ID_AT, DataFileId, HEADER_SIZE, MAGIC, MAGIC2, RECORD_LEN};
use super::{TAG, TAG_AT, VERSION, at, bitmap_len};

fn map_len(chunks: u32) -> u64 {
    crate::codec::as_u64(HEADER_SIZE + bitmap_len(chunks))
}

/// Maps the file if it is a map of that many chunks; `None` if it is not, or absent.
pub(super) fn open(path: &Path, chunks: u32) -> io::Result<Option<(File, SharedBytes)>> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let meta = file.metadata()?;
    if !meta.is_file() || meta.len() != map_len(chunks) {
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
    Ok(Some((file, bytes)))
}

/// Makes an empty map and puts it in the place of whatever is at `path`.
pub(super) fn create(
    path: &Path,
    chunks: u32,
    boot: &BootId,
    data: DataFileId,
) -> io::Result<(File, SharedBytes)> {
    let temporary = crate::cache::temporary_name(path);
    let made = (|| {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        let len = map_len(chunks);
        file.set_len(len)?;
        allocate(&file, len)?;
        file.write_all_at(&[MAGIC, VERSION, MAGIC2].concat(), 0)?;
        file.write_all_at(&record(boot, data), at(TAG_AT))?;
        let bytes = SharedBytes::map(&file)?;
        fs::rename(&temporary, path)?;
        Ok((file, bytes))
    })();
    if made.is_err() {
        // Best effort: the file is small and is ignored by everyone.
        let _ = fs::remove_file(&temporary);
    }
    made
}

fn record(boot: &BootId, data: DataFileId) -> [u8; RECORD_LEN] {
    let mut record = [0; RECORD_LEN];
    let mut put = |start: usize, bytes: &[u8]| {
        if let Some(place) = record.get_mut(start - TAG_AT..start - TAG_AT + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(TAG_AT, &TAG);
    put(BOOT_ID_AT, &boot.0);
    put(DATA_ID_AT, &data.0);
    record
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Gives every page a block now: on a full disk this fails, a later store to the
/// map would end the process.
fn allocate(file: &File, len: u64) -> io::Result<()> {
    let len = i64::try_from(len).map_err(io::Error::other)?;
    nix::fcntl::posix_fallocate(file, 0, len).map_err(io::Error::from)
}
