//! One blob of an image: serve from the cache, fill on demand.
//!
//! A front end names what it needs, as chunks ([`ChunkSpan`], from the bootstrap)
//! or as a plain range of the uncompressed address space (the kernel reading a
//! cache file). If all of it is resident the answer is [`Served::File`], to be read
//! at the same offsets; if not, [`fill`](crate::fill) makes it so first.
//!
//! Promises: opening needs no network; the chunk table is fetched on the first
//! miss and kept in the cache; asking for resident data takes no lock, allocates
//! nothing and costs an atomic load per chunk and a counter; every wait has a deadline. Sequential
//! readers are kept ahead of by `readahead`.
//!
//! If the cache cannot be written, reads are answered from memory
//! ([`Served::Memory`]), and [`Blob::cache_state`] says why.

mod table;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::backend::{Backend, Priority};
use crate::blob_id::BlobId;
use crate::blob_info::BlobInfo;
use crate::cache::{BlobFiles, CacheDir, CacheError, CacheState};
use crate::codec::as_u64;
use crate::digest::ChunkDigests;
use crate::error::ReadError;
use crate::fill::{FillState, Filler, Flights, Outcome, Unvouched, Unwritten, WAIT_LIMIT};
use crate::format::FormatError;
use crate::format::chunk_table::ChunkTable;
use crate::gate::Gate;
use crate::metrics::{Metrics, add};
use crate::readahead::{self, Streams};
use crate::speculate::{self, Known, Misses, Neighbourhoods, Observer};
use crate::sync::{Arc, OnceLock, Ordering, Weak};
use crate::units::ChunkIndex;

/// Times a reader starts over for the chunk table.
const MAX_TURNS: u32 = 8;

/// Part of one chunk, as a bootstrap's extents name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkSpan {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Bytes of the uncompressed address space, inside the chunk.
    pub plain: Range<u64>,
}

/// Where the bytes of a read are.
#[derive(Clone, Debug)]
pub enum Served<'a> {
    /// In this file, at the offsets that were asked for.
    File(&'a File),
    /// Here: exactly the bytes that were asked for.
    Memory(Bytes),
}

/// One blob of one image.
pub struct Blob {
    info: BlobInfo,
    cache: CacheDir,
    files: BlobFiles,
    backend: Arc<dyn Backend>,
    digests: Arc<dyn ChunkDigests>,
    table: OnceLock<ChunkTable>,
    /// The fetch of the table, under the only key 0.
    table_flight: Flights,
    fill: FillState,
    streams: Streams,
    misses: Misses,
    neighbourhoods: OnceLock<Neighbourhoods>,
    observer: OnceLock<Arc<dyn Observer>>,
    gate: OnceLock<Gate>,
    /// For readahead, which outlives the call that asks for it.
    this: Weak<Self>,
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob")
            .field("id", &self.info.id)
            .field("backend", &self.backend)
            .field("state", &self.files.state())
            .finish_non_exhaustive()
    }
}

impl Blob {
    /// Opens the cache files of a blob, and its chunk table if it is cached.
    ///
    /// Makes no request. Cache files that cannot be opened are no error, see
    /// [`Blob::cache_state`]. Asks for the digest of every chunk once, to see whether
    /// this image may share the files with those that used them before.
    ///
    /// # Errors
    /// [`ReadError::Table`] for a blob of a kind that is not supported.
    pub fn open(
        cache: &CacheDir,
        info: BlobInfo,
        backend: Arc<dyn Backend>,
        digests: Arc<dyn ChunkDigests>,
    ) -> Result<Arc<Self>, ReadError> {
        let table = table::cached(cache, &info, &*digests)?;
        let blob = Arc::new_cyclic(|this| Self {
            files: BlobFiles::open(cache, &info, Arc::clone(&digests)),
            cache: cache.clone(),
            backend,
            digests,
            table: table.map_or_else(OnceLock::new, OnceLock::from),
            table_flight: Flights::default(),
            fill: FillState::default(),
            streams: Streams::default(),
            misses: Misses::default(),
            neighbourhoods: OnceLock::new(),
            observer: OnceLock::new(),
            gate: OnceLock::new(),
            this: Weak::clone(this),
            info,
        });
        add(&cache.metrics().dedup_hits, blob.resident_chunks().into());
        Ok(blob)
    }

    /// Tells whoever delivers the blob that most of it will be asked for.
    pub(crate) fn will_be_read_whole(&self) {
        self.backend.want_whole(&self.info.id);
    }

    /// What the bootstrap says about this blob.
    #[must_use]
    pub fn info(&self) -> &BlobInfo {
        &self.info
    }

    /// Whether the cache takes new chunks, as far as known.
    #[must_use]
    pub fn cache_state(&self) -> CacheState {
        self.files.state()
    }

    /// The cache file, where it is or will be. It has its full length from the start.
    #[must_use]
    pub fn data_path(&self) -> PathBuf {
        self.files.data_path()
    }

    /// Number of resident chunks.
    #[must_use]
    pub fn resident_chunks(&self) -> u32 {
        self.files.get().map_or(0, |files| files.map.count())
    }

    /// Whether every chunk is resident; the cache file is complete then.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.files.get().is_some_and(|files| files.map.all_ready())
    }

    /// Ends fetches and waits of this blob with [`ReadError::Stopped`], for good.
    /// Resident data can still be read.
    pub fn close(&self) {
        self.fill.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether all data of a range is in the cache file. No lock, no I/O.
    ///
    /// * `plain`: any bytes of the uncompressed address space. What lies beyond its
    ///   end, or in the gap between a chunk and the next block, counts as resident.
    #[must_use]
    pub fn is_resident(&self, plain: Range<u64>) -> bool {
        let Some(table) = self.table.get() else {
            return plain.is_empty();
        };
        match table.covering(plain) {
            Ok(mut chunks) => chunks.all(|index| self.files.is_ready(ChunkIndex::new(index))),
            Err(_) => false,
        }
    }

    /// Whether the bytes of `span` are in the cache file. No lock, no I/O; one
    /// table entry and one atomic load. `false` for a span that is not inside its
    /// chunk, which [`Blob::ensure_spans`] then reports.
    #[must_use]
    pub fn is_span_resident(&self, span: &ChunkSpan) -> bool {
        self.files.is_ready(span.chunk)
            && self
                .table
                .get()
                .is_some_and(|table| self.check_span(table, span).is_ok())
    }

    /// Makes a range resident, and returns when it is. Blocks; hold no lock.
    ///
    /// * `plain`: as for [`Blob::is_resident`]. Chunks in it that no file of the image
    ///   refers to are left out: they have no digest, and nobody reads them. If there
    ///   are any, [`Blob::is_resident`] stays false, and this returns at once.
    ///
    /// # Errors
    /// [`ReadError`]; the range may be resident in part. [`ReadError::Cache`] means
    /// that the bytes could be had but not written: [`Blob::read`] serves them.
    pub fn ensure(&self, plain: Range<u64>, priority: Priority) -> Result<(), ReadError> {
        self.ensure_range(plain, priority, Unvouched::Skip)
    }

    fn ensure_range(
        &self,
        plain: Range<u64>,
        priority: Priority,
        unvouched: Unvouched,
    ) -> Result<(), ReadError> {
        self.read_ahead(&plain, priority);
        if self.is_resident(plain.clone()) {
            self.hit(priority);
            return Ok(());
        }
        let table = self.table(priority)?;
        let chunks = self.covering(table, plain)?;
        self.missed(table, chunks.clone(), priority);
        self.filler(table)
            .run(&[chunks], priority, Unwritten::Refuse, unvouched)
    }

    fn hit(&self, priority: Priority) {
        if priority == Priority::OnDemand {
            add(&self.cache.metrics().hits, 1);
        }
    }

    /// Tells the observer what a reader has found.
    fn tell(&self, spans: &[ChunkSpan], priority: Priority) {
        if priority == Priority::OnDemand
            && let Some(observer) = self.observer.get()
            && !self.is_complete()
        {
            spans.iter().for_each(|span| observer.read(span.chunk));
        }
    }

    /// Whether the cache has room for what nobody waits for.
    pub(crate) fn has_room(&self) -> bool {
        self.cache.has_room()
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        self.cache.metrics()
    }

    /// Makes chunks resident that nobody waits for.
    pub(crate) fn ensure_chunks(
        &self,
        chunks: Range<u32>,
        priority: Priority,
    ) -> Result<(), ReadError> {
        let table = self.table(priority)?;
        self.filler(table)
            .run(&[chunks], priority, Unwritten::Refuse, Unvouched::Skip)
    }

    /// Makes parts of chunks resident, as few requests as possible for all of them.
    ///
    /// * `spans`: in any order; neighbours next to each other are fetched together.
    ///
    /// # Errors
    /// As for [`Blob::ensure`], and [`ReadError::Mismatch`] for a span that is not
    /// inside its chunk.
    pub fn ensure_spans(&self, spans: &[ChunkSpan], priority: Priority) -> Result<(), ReadError> {
        if let (Some(first), Some(last)) = (spans.first(), spans.last()) {
            self.read_ahead(&(first.plain.start..last.plain.end), priority);
        }
        if spans.iter().all(|span| self.is_span_resident(span)) {
            self.hit(priority);
            self.tell(spans, priority);
            return Ok(());
        }
        let table = self.table(priority)?;
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for span in spans {
            self.check_span(table, span)?;
            let index = span.chunk.get();
            match ranges.last_mut() {
                Some(range) if range.end == index => range.end = index + 1,
                Some(range) if range.contains(&index) => {}
                _ => ranges.push(index..index + 1),
            }
        }
        for range in &ranges {
            self.missed(table, range.clone(), priority);
        }
        self.filler(table)
            .run(&ranges, priority, Unwritten::Refuse, Unvouched::Refuse)
    }

    /// Serves a range: from the cache file, or from memory if that cannot be written.
    ///
    /// * `plain`: inside the uncompressed address space. If it has to be served from
    ///   memory it is allocated as a whole, so bound it.
    ///
    /// # Errors
    /// [`ReadError::OutOfRange`], or as for [`Blob::ensure`].
    pub fn read(&self, plain: Range<u64>, priority: Priority) -> Result<Served<'_>, ReadError> {
        if plain.start > plain.end || plain.end > self.info.uncompressed_size {
            return Err(self.out_of_range(plain));
        }
        match self.ensure_range(plain.clone(), priority, Unvouched::Refuse) {
            Ok(()) => self.file().map(Served::File),
            Err(ReadError::Cache { .. }) => {
                self.read_to_memory(plain, priority).map(Served::Memory)
            }
            Err(error) => Err(error),
        }
    }

    /// Copies the bytes of a span into `dst`. Costs one system call if the span is
    /// resident.
    ///
    /// * `dst`: as long as the span.
    ///
    /// # Errors
    /// As for [`Blob::ensure_spans`]; [`ReadError::OutOfRange`] if the lengths differ.
    pub fn read_span(
        &self,
        span: &ChunkSpan,
        dst: &mut [u8],
        priority: Priority,
    ) -> Result<(), ReadError> {
        if span.plain.end.checked_sub(span.plain.start) != Some(as_u64(dst.len())) {
            return Err(self.out_of_range(span.plain.clone()));
        }
        let resident = self.ensure_spans(std::slice::from_ref(span), priority);
        match resident.and_then(|()| self.read_file(span.plain.start, dst)) {
            Ok(()) => Ok(()),
            // Not written, or somebody shortened the file under us.
            Err(ReadError::Cache { .. }) => {
                let bytes = self.read_to_memory(span.plain.clone(), priority)?;
                // Of that length, because the range was.
                dst.copy_from_slice(&bytes);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Tells which chunks belong together, for better guesses about what is wanted
    /// next. Only the first call has an effect.
    pub fn set_neighbourhoods(&self, neighbourhoods: Neighbourhoods) {
        let _ = self.neighbourhoods.set(neighbourhoods);
    }

    /// Has fetches of chunks wait for their turn at `gate`. Only the first call has an
    /// effect; without one there are no limits.
    pub fn set_gate(&self, gate: Gate) {
        let _ = self.gate.set(gate);
    }

    /// Has `observer` told of readers. Only the first call has an effect.
    pub fn set_observer(&self, observer: Arc<dyn Observer>) {
        let _ = self.observer.set(observer);
    }

    /// Fetches chunks in the background, soon; the next one asked for comes first.
    pub fn speculate(&self, chunks: Range<u32>) {
        speculate::submit(&self.this, vec![chunks]);
    }

    /// The cache file, for front ends that read resident spans by themselves
    /// (splice, scattered reads); `None` while it cannot be opened.
    #[must_use]
    pub fn cache_file(&self) -> Option<&File> {
        self.files.get().map(|files| &files.data)
    }

    /// Starts fetching what a sequential reader will want after `plain`.
    fn read_ahead(&self, plain: &Range<u64>, priority: Priority) {
        if priority != Priority::OnDemand || self.is_complete() {
            return;
        }
        if let Some(next) = self.streams.advise(plain, self.info.uncompressed_size)
            && !self.is_resident(next.clone())
            && let Some(blob) = self.this.upgrade()
        {
            readahead::submit(blob, next);
        }
    }

    /// Starts fetching what the reader who misses one of `chunks` may want next.
    fn missed(&self, table: &ChunkTable, mut chunks: Range<u32>, priority: Priority) {
        if priority != Priority::OnDemand {
            return;
        }
        let ready = |index| self.files.is_ready(index);
        let missing = chunks.find(|index| !ready(ChunkIndex::new(*index)));
        if let Some(index) = missing {
            if let Some(observer) = self.observer.get() {
                observer.missed(ChunkIndex::new(index));
            }
            let known = Known {
                misses: &self.misses,
                len: table.len(),
                size: &|index| {
                    let chunk = table.chunk(ChunkIndex::new(index));
                    chunk.map_or(0, |chunk| chunk.plain_size.into())
                },
                chunk_size: self.info.chunk_size,
                neighbourhoods: self.neighbourhoods.get(),
            };
            speculate::submit(&self.this, known.guess(ChunkIndex::new(index), ready));
        }
    }

    fn filler<'a>(&'a self, table: &'a ChunkTable) -> Filler<'a> {
        Filler {
            info: &self.info,
            table,
            files: &self.files,
            backend: &*self.backend,
            digests: &*self.digests,
            state: &self.fill,
            metrics: self.cache.metrics(),
            memory: self.cache.memory(),
            cores: self.cache.cores(),
            gate: self.gate.get(),
            slow_read: self.cache.slow_read(),
        }
    }

    fn covering(&self, table: &ChunkTable, plain: Range<u64>) -> Result<Range<u32>, ReadError> {
        table
            .covering(plain)
            .map_err(|error| self.table_error(error))
    }

    /// The bootstrap and the chunk table come from different places; what they say
    /// about a chunk must agree, or verified bytes would be read at a wrong offset.
    fn check_span(&self, table: &ChunkTable, span: &ChunkSpan) -> Result<(), ReadError> {
        let chunk = table
            .chunk(span.chunk)
            .map_err(|error| self.table_error(error))?;
        let place = chunk.plain_range();
        if span.plain.start >= place.start && span.plain.end <= place.end {
            return Ok(());
        }
        Err(ReadError::Mismatch {
            blob: self.info.id.clone(),
            index: span.chunk,
            image: span.plain.clone(),
            table: place,
        })
    }

    /// Puts a range together from chunks in the file and chunks in memory.
    fn read_to_memory(&self, plain: Range<u64>, priority: Priority) -> Result<Bytes, ReadError> {
        let table = self.table(priority)?;
        let chunks = self.covering(table, plain.clone())?;
        let len = usize::try_from(plain.end - plain.start).ok();
        let mut out = vec![0; len.ok_or_else(|| self.out_of_range(plain.clone()))?];
        for index in chunks {
            // One by one: memory then holds one chunk beside the result.
            let mut kept = HashMap::new();
            let wanted = index..index + 1;
            let unwritten = Unwritten::Keep(&mut kept);
            self.filler(table).run(
                std::slice::from_ref(&wanted),
                priority,
                unwritten,
                Unvouched::Refuse,
            )?;
            let index = ChunkIndex::new(index);
            let chunk = table
                .chunk(index)
                .map_err(|error| self.table_error(error))?;
            let place = chunk.plain_range();
            let part = plain.start.max(place.start)..plain.end.min(place.end);
            let Some(dst) = slice_mut(&mut out, plain.start, &part) else {
                continue;
            };
            match kept
                .get(&index)
                .and_then(|bytes| slice(bytes, place.start, &part))
            {
                Some(src) => dst.copy_from_slice(src),
                None => self.read_file(part.start, dst)?,
            }
        }
        Ok(out.into())
    }

    fn file(&self) -> Result<&File, ReadError> {
        self.cache_file()
            .ok_or_else(|| self.cache_error("opening", io::ErrorKind::NotFound.into()))
    }

    fn read_file(&self, at: u64, dst: &mut [u8]) -> Result<(), ReadError> {
        // Exact: a file that somebody shortened is an error, not zeros.
        self.file()?.read_exact_at(dst, at).map_err(|error| {
            self.check_length();
            self.cache_error("reading resident data", error)
        })
    }

    /// Has the length of the cache file checked, because a read of resident data came
    /// out short. If the file was shortened it is replaced; the next read fetches again.
    pub fn check_length(&self) {
        self.files.found_short();
    }

    fn cache_error(&self, action: &'static str, source: io::Error) -> ReadError {
        ReadError::Cache {
            blob: self.info.id.clone(),
            source: CacheError::new(&self.files.data_path(), action, source),
        }
    }

    fn out_of_range(&self, range: Range<u64>) -> ReadError {
        ReadError::OutOfRange {
            blob: self.info.id.clone(),
            range,
            size: self.info.uncompressed_size,
        }
    }

    fn table_error(&self, error: FormatError) -> ReadError {
        ReadError::Table {
            blob: self.info.id.clone(),
            source: Arc::new(error),
        }
    }

    /// The chunk table; fetched once, by one of its readers.
    fn table(&self, priority: Priority) -> Result<&ChunkTable, ReadError> {
        const TABLE: ChunkIndex = ChunkIndex::new(0);
        let start = Instant::now();
        for _ in 0..MAX_TURNS {
            if let Some(table) = self.table.get() {
                return Ok(table);
            }
            if let Some(flight) = self.table_flight.get(TABLE) {
                match flight.wait(start + WAIT_LIMIT, &self.fill.stopped) {
                    None => return Err(self.no_table(start.elapsed())),
                    Some(Outcome::Failed(_)) if flight.priority < priority => {}
                    Some(Outcome::Failed(error)) => return Err(error),
                    Some(_) => {}
                }
                continue;
            }
            // Before the claim: nobody waits for one who waits for his turn.
            let _pass = match self.gate.get() {
                None => None,
                Some(gate) => {
                    let (bytes, stop) = (self.info.meta.compressed_size, &self.fill.stopped);
                    let pass = gate.enter(bytes, priority, start + WAIT_LIMIT, stop);
                    Some(pass.ok_or_else(|| self.no_table(start.elapsed()))?)
                }
            };
            let done = |_| self.table.get().is_some();
            if let Some(claim) = self.table_flight.claim([TABLE], priority, done).pop() {
                let fetched = table::fetch(&self.cache, &self.info, &*self.backend, priority);
                let result = fetched.map(|table| {
                    let _ = self.table.set(table);
                });
                claim.land(
                    result
                        .clone()
                        .map_or_else(Outcome::Failed, |()| Outcome::Stored),
                );
                result?;
            }
        }
        Err(ReadError::Abandoned {
            blob: self.info.id.clone(),
        })
    }

    fn no_table(&self, waited: Duration) -> ReadError {
        let blob = self.info.id.clone();
        if self.fill.stopped.load(Ordering::Relaxed) {
            return ReadError::Stopped { blob };
        }
        ReadError::TimedOut {
            blob,
            index: ChunkIndex::new(0),
            waited,
        }
    }
}

/// The part of `bytes`, which start at `base`, that lies at `range`.
fn slice<'a>(bytes: &'a [u8], base: u64, range: &Range<u64>) -> Option<&'a [u8]> {
    bytes.get(relative(base, range)?)
}

fn slice_mut<'a>(bytes: &'a mut [u8], base: u64, range: &Range<u64>) -> Option<&'a mut [u8]> {
    bytes.get_mut(relative(base, range)?)
}

fn relative(base: u64, range: &Range<u64>) -> Option<Range<usize>> {
    let start = usize::try_from(range.start.checked_sub(base)?).ok()?;
    let end = usize::try_from(range.end.checked_sub(base)?).ok()?;
    Some(start..end)
}

/// The blob that holds the chunk table: the blob itself, or a second one.
fn table_blob(info: &BlobInfo) -> BlobId {
    use crate::blob_info::BlobFeatures;
    if info.features.contains(BlobFeatures::SEPARATE) {
        BlobId::from_digest(&info.meta_blob_digest)
    } else {
        info.id.clone()
    }
}

#[cfg(test)]
mod tests;
