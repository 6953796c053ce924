//! Gets the chunk table of a blob: from the cache directory, or else from the blob.
//!
//! A cached table is used if its length and header fit the blob and its chunks are
//! where the bootstrap says. A fetched one is
//! also compared with the table of contents of the blob, if the bootstrap says what
//! that must be; then it is put into the cache for the next start.
//!
//! Promise: a table file in the cache directory is complete, or not there.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;

use super::table_blob;
use crate::backend::{Backend, BackendError, Fetch, Priority, ServedBy, fetch_to_vec};
use crate::blob_id::BlobId;
use crate::blob_info::{BlobFeatures, BlobInfo};
use crate::cache::{CacheDir, CacheError, temporary_name};
use crate::digest::{ChunkDigests, Digest};
use crate::error::ReadError;
use crate::format::chunk_table::ChunkTable;
use crate::format::tar_header::names;
use crate::format::toc::Toc;
use crate::format::{FormatError, stored_table};
use crate::mapped::Mapped;
use crate::sync::Arc;
use crate::units::ChunkIndex;

/// Largest stored table that is fetched, in bytes. 16 million chunks, the most that
/// a blob can have, compress to less.
const MAX_STORED: u64 = 256 << 20;

/// Most bytes between table and table of contents that are fetched along to save a
/// request: the digests of some thousand chunks.
const MAX_DETOUR: u64 = 128 << 10;

/// Attempts to get a table that verifies.
const ATTEMPTS: u32 = 2;

/// The table of the cache directory, if it has a valid one for this blob.
///
/// # Errors
/// Only for blobs that are not supported, whatever their table.
pub(super) fn cached(
    cache: &CacheDir,
    info: &BlobInfo,
    digests: &dyn ChunkDigests,
) -> Result<Option<ChunkTable>, ReadError> {
    let path = cache.table_path(&info.id);
    let Ok(data) = Mapped::open(&path) else {
        // Absent, usually. Anything else shows when it is written.
        return Ok(None);
    };
    match ChunkTable::open(data, info) {
        // Perhaps of another image that names the same blob.
        Ok(table) if !agrees(&table, digests) => {
            tracing::warn!(
                path = %path.display(),
                "cached chunk table does not fit the image; fetching it again"
            );
            Ok(None)
        }
        Ok(table) => Ok(Some(table)),
        Err(error @ FormatError::Unsupported { .. }) => Err(table_error(info, error)),
        Err(error) => {
            tracing::warn!(
                path = %path.display(),
                cause = %error,
                "cached chunk table is not usable; fetching it again"
            );
            Ok(None)
        }
    }
}

/// Whether chunks are where the image says.
fn agrees(table: &ChunkTable, digests: &dyn ChunkDigests) -> bool {
    (0..table.len()).map(ChunkIndex::new).all(|index| {
        let place = |chunk: crate::chunk::Chunk| chunk.plain_range().start;
        digests
            .chunk_plain_offset(index)
            .is_none_or(|offset| table.chunk(index).is_ok_and(|chunk| place(chunk) == offset))
    })
}

/// Fetches, verifies, caches and opens the table.
pub(super) fn fetch(
    cache: &CacheDir,
    info: &BlobInfo,
    backend: &dyn Backend,
    priority: Priority,
) -> Result<ChunkTable, ReadError> {
    let source = Source {
        info,
        blob: table_blob(info),
        backend,
        cache,
        priority,
        served_by: ServedBy::default(),
        fetched: Cell::default(),
        direct: Cell::default(),
    };
    let mut attempt = 1;
    loop {
        match source.load() {
            // Bytes damaged on the way are worth another try, at once.
            Err(error @ ReadError::Table { .. }) if attempt < ATTEMPTS => {
                tracing::warn!(blob = %source.blob, %error, "chunk table is damaged; fetching it again");
                source.distrust();
                attempt += 1;
            }
            result => return result,
        }
    }
}

struct Source<'a> {
    info: &'a BlobInfo,
    blob: BlobId,
    backend: &'a dyn Backend,
    cache: &'a CacheDir,
    priority: Priority,
    served_by: ServedBy,
    /// Everything that was fetched.
    fetched: Cell<(u64, u64)>,
    direct: Cell<bool>,
}

impl Source<'_> {
    /// What was fetched is wrong. If it came from a mirror, the source itself is asked next.
    fn distrust(&self) {
        let (start, end) = self.fetched.take();
        if self.served_by.is_second_hand() && !self.direct.replace(true) {
            self.backend
                .distrust(&self.blob, &(start..end), &self.served_by);
        }
    }

    fn load(&self) -> Result<ChunkTable, ReadError> {
        let range = stored_table::stored_range(self.info).map_err(|e| table_error(self.info, e))?;
        let (stored, toc) = self.get_with_toc(range)?;
        let expected = self.expected_digest(toc)?;
        let data = self
            .keep(&stored)
            .map_err(|error| table_error(self.info, error))?;
        self.check(&data, expected.as_ref())
            .and_then(|()| ChunkTable::open(data, self.info))
            .map_err(|error| {
                // Not for the next start, either.
                let _ = fs::remove_file(self.cache.table_path(&self.info.id));
                table_error(self.info, error)
            })
    }

    /// The stored table, and the table of contents if one request can fetch both.
    fn get_with_toc(&self, table: Range<u64>) -> Result<(Vec<u8>, Option<Vec<u8>>), ReadError> {
        let near = |toc: &Range<u64>| toc.start >= table.end && toc.start - table.end <= MAX_DETOUR;
        if let Some(toc) = self.assumed_toc().filter(near)
            && let Ok(mut all) = self.get(table.start..toc.end)
        {
            let len = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(0);
            let toc = all.split_off(all.len().saturating_sub(len(&toc)));
            all.truncate(len(&table));
            return Ok((all, Some(toc)));
        }
        Ok((self.get(table)?, None))
    }

    /// Where the table of contents should be, if the bootstrap vouches for one. The
    /// recorded length of a blob with an embedded bootstrap may be too small.
    fn assumed_toc(&self) -> Option<Range<u64>> {
        let info = self.info;
        let end = if info.features.contains(BlobFeatures::SEPARATE) {
            info.meta_blob_size
        } else {
            info.compressed_size
        };
        let start = end.checked_sub(info.toc_size.into())?;
        self.has_toc().then_some(start..end)
    }

    fn has_toc(&self) -> bool {
        self.info.toc_size != 0 && self.info.toc_digest != Digest::default()
    }

    /// What the table of contents says the uncompressed table hashes to.
    ///
    /// * `toc`: bytes that may be the table of contents.
    fn expected_digest(&self, toc: Option<Vec<u8>>) -> Result<Option<Digest>, ReadError> {
        if !self.has_toc() {
            return Ok(None);
        }
        let digest = &self.info.toc_digest;
        let toc = match toc.map(|bytes| Toc::verified(&bytes, digest)) {
            Some(Ok(toc)) => toc,
            _ => Toc::verified(&self.get_last(self.info.toc_size.into())?, digest)
                .map_err(|error| table_error(self.info, error))?,
        };
        let entry = toc.entry(names::TABLE).map(|entry| entry.digest);
        Ok(entry.filter(|digest| *digest != Digest::default()))
    }

    /// The last bytes of the file that holds the table.
    fn get_last(&self, len: u64) -> Result<Vec<u8>, ReadError> {
        let size = self.backend.size(&self.blob);
        let size = size.map_err(|error| self.fetch_error(0..len, error))?;
        self.get(size.saturating_sub(len)..size)
    }

    fn check(&self, data: &[u8], expected: Option<&Digest>) -> Result<(), FormatError> {
        let Some(expected) = expected else {
            return Ok(());
        };
        let len = usize::try_from(self.info.meta.uncompressed_size).unwrap_or(usize::MAX);
        let table = data.get(..len).unwrap_or_default();
        if Digest::of(crate::Digester::Sha256, table) == *expected {
            Ok(())
        } else {
            Err(FormatError::Digest {
                object: "chunk table",
            })
        }
    }

    fn get(&self, range: Range<u64>) -> Result<Vec<u8>, ReadError> {
        let request = Fetch {
            blob: &self.blob,
            range: range.clone(),
            priority: self.priority,
            served_by: Some(&self.served_by),
            direct: self.direct.get(),
            // Not of the blob of data if the table has one of its own.
            blob_len: (self.blob == self.info.id).then_some(self.info.compressed_size),
        };
        let (first, last) = self.fetched.get();
        let first = if last == 0 {
            range.start
        } else {
            first.min(range.start)
        };
        self.fetched.set((first, last.max(range.end)));
        let start = std::time::Instant::now();
        let result = fetch_to_vec(self.backend, &request, MAX_STORED);
        let metrics = self.cache.metrics();
        crate::metrics::add_time(&metrics.fetch_time, start);
        metrics.fetched(
            self.priority,
            result
                .as_ref()
                .map_or(0, |bytes| crate::codec::as_u64(bytes.len())),
        );
        result.map_err(|error| {
            crate::metrics::add(&metrics.fetch_failures, 1);
            self.fetch_error(range, error)
        })
    }

    fn fetch_error(&self, stored: Range<u64>, error: BackendError) -> ReadError {
        ReadError::Fetch {
            blob: self.blob.clone(),
            stored,
            source: Arc::new(error),
        }
    }

    /// Decodes the table into the cache directory, or into memory if that fails.
    fn keep(&self, stored: &[u8]) -> Result<Mapped, FormatError> {
        match self.keep_in_file(stored) {
            Ok(data) => return Ok(data),
            Err(FormatError::Write { source, .. }) => {
                let path = self.cache.table_path(&self.info.id);
                let error = CacheError::new(&path, "writing", source);
                tracing::warn!(%error, cause = %error.source, "chunk table is kept in memory only");
            }
            Err(error) => return Err(error),
        }
        let mut bytes = Vec::new();
        stored_table::write_cache_form(self.info, stored, &mut bytes)?;
        Ok(Mapped::from_vec(bytes))
    }

    fn keep_in_file(&self, stored: &[u8]) -> Result<Mapped, FormatError> {
        let path = self.cache.table_path(&self.info.id);
        let temporary = temporary_name(&path);
        let written = self.write_file(stored, &temporary).and_then(|file| {
            let place = || {
                fs::rename(&temporary, &path)?;
                Mapped::from_file(&file)
            };
            place().map_err(write_error)
        });
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    fn write_file(&self, stored: &[u8], path: &std::path::Path) -> Result<File, FormatError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(write_error)?;
        let mut out = BufWriter::with_capacity(256 << 10, file);
        stored_table::write_cache_form(self.info, stored, &mut out)?;
        out.flush().map_err(write_error)?;
        let file = out
            .into_inner()
            .map_err(|error| write_error(error.into_error()))?;
        // Nothing else vouches for the content after a power cut: once per blob, a
        // flush is cheaper than a checksum.
        file.sync_data().map_err(write_error)?;
        Ok(file)
    }
}

fn write_error(source: io::Error) -> FormatError {
    FormatError::Write {
        object: "chunk table",
        source,
    }
}

fn table_error(info: &BlobInfo, error: FormatError) -> ReadError {
    ReadError::Table {
        blob: info.id.clone(),
        source: Arc::new(error),
    }
}
