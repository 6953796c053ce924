//! Single-flight filling of missing chunks: fetch, decode, verify, write, publish.
//!
//! `Filler::run` makes a set of chunks available. It claims those that nobody
//! fetches yet, joins neighbours into requests (`plan`), and turns the bytes into
//! chunks while they stream in (`unpack`). Then it waits for the chunks that
//! other readers were fetching already (`flight`).
//!
//! Between processes that share the cache directory, a lock per chunk does the same
//! (`machine`).
//!
//! Promises: a chunk is fetched once, however many readers wait; its waiters go on
//! as soon as it is done, not when the request is; nothing is served or marked
//! ready unverified; no lock is held during network or disk I/O; a failure leaves
//! no trace, and stays with the chunks it concerns.
//!
//! The work runs on the caller's thread; [`Cores`] bounds how many decode and verify at
//! a time. Memory per caller: one request of at most
//! 4 MiB (or one piece, at most 32 MiB) and its largest decoded piece; of all callers
//! together: what the [`Budget`] allows.

mod flight;
#[cfg(test)]
mod flight_tests;
mod machine;
#[cfg(test)]
mod model;
mod plan;
mod recent;
mod unpack;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;

pub(crate) use flight::{Claim, Flights, Outcome};
use machine::Locked;
use plan::{Joining, Member, Piece};
use recent::Recent;
use unpack::{Job, Unpacker};

use crate::backend::{Backend, BackendError, Fetch, Priority, ServedBy};
use crate::blob_id::BlobId;
use crate::blob_info::BlobInfo;
use crate::budget::{Budget, Grant};
use crate::cache::BlobFiles;
use crate::cores::Cores;
use crate::digest::{ChunkDigests, Digest};
use crate::error::ReadError;
use crate::format::FormatError;
use crate::format::chunk_table::ChunkTable;
use crate::gate::{Gate, Pass};
use crate::metrics::{Metrics, add, add_latency, add_time};
use crate::sync::{self, Arc, AtomicBool, Ordering};
use crate::units::ChunkIndex;

/// Longest wait for another reader's fetch. Above the deadline of any backend, so
/// that normally the reader that fetches reports what is wrong.
pub(crate) const WAIT_LIMIT: Duration = Duration::from_secs(300);

/// Waits that are not worth a note.
const NOTHING: Duration = Duration::from_millis(1);

/// Times a reader starts over for a chunk, because whoever fetched it gave up.
const MAX_TURNS: u32 = 8;

/// What the readers of a blob share.
#[derive(Debug, Default)]
pub(crate) struct FillState {
    flights: Flights,
    recent: Recent,
    /// Set once, when the blob is closed: fetches and waits end.
    pub(crate) stopped: AtomicBool,
}

/// Everything needed to fill chunks of one blob.
#[derive(Clone, Copy)]
pub(crate) struct Filler<'a> {
    pub(crate) info: &'a BlobInfo,
    pub(crate) table: &'a ChunkTable,
    pub(crate) files: &'a BlobFiles,
    pub(crate) backend: &'a dyn Backend,
    pub(crate) digests: &'a dyn ChunkDigests,
    pub(crate) state: &'a FillState,
    pub(crate) metrics: &'a Metrics,
    pub(crate) memory: &'a Budget,
    pub(crate) cores: &'a Cores,
    /// `None` for a source that has no limits.
    pub(crate) gate: Option<&'a Gate>,
    pub(crate) slow_read: Duration,
}

/// What to do with chunks that cannot be written to the cache file.
pub(crate) enum Unwritten<'m> {
    /// Fail: the caller needs them in the file.
    Refuse,
    /// Hand them over.
    Keep(&'m mut HashMap<ChunkIndex, Bytes>),
}

/// What to do with chunks that the image has no digest for. They belong to files
/// that upper layers removed, so nothing of the image refers to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unvouched {
    /// Fail: the caller would serve them.
    Refuse,
    /// Leave them out: the caller happened to touch them.
    Skip,
}

/// One caller's wish, and what has come of it.
struct Request<'m> {
    blob: &'m BlobId,
    wanted: &'m [Range<u32>],
    priority: Priority,
    unwritten: Unwritten<'m>,
    unvouched: Unvouched,
    failed: Option<ReadError>,
    longest: Option<Wait>,
}

/// What took a reader's time.
struct Wait {
    chunk: ChunkIndex,
    time: Duration,
    on: String,
}

impl Request<'_> {
    fn holds(&self, index: ChunkIndex) -> bool {
        matches!(&self.unwritten, Unwritten::Keep(chunks) if chunks.contains_key(&index))
    }

    /// Ends a flight of ours and notes what it means for the caller. Failures of
    /// chunks that only came along are no concern of this caller.
    fn land(&mut self, claim: Claim<'_>, outcome: Outcome) {
        if self
            .wanted
            .iter()
            .any(|range| range.contains(&claim.index().get()))
        {
            self.note(claim.index(), &outcome);
        }
        claim.land(outcome);
    }

    fn note(&mut self, index: ChunkIndex, outcome: &Outcome) {
        match outcome {
            Outcome::Stored | Outcome::Abandoned => {}
            Outcome::Failed(error) => {
                self.failed.get_or_insert_with(|| error.clone());
            }
            Outcome::Memory { bytes, cause } => match &mut self.unwritten {
                Unwritten::Keep(chunks) => {
                    chunks.insert(index, bytes.clone());
                }
                Unwritten::Refuse => {
                    self.failed.get_or_insert_with(|| ReadError::Cache {
                        blob: self.blob.clone(),
                        source: cause.clone(),
                    });
                }
            },
        }
    }

    /// Notes what the time since `start` was spent on.
    fn waited(&mut self, chunk: ChunkIndex, start: Instant, on: impl FnOnce() -> String) {
        let time = start.elapsed();
        let longest = self.longest.as_ref().map_or(NOTHING, |wait| wait.time);
        if time > longest {
            let on = on();
            self.longest = Some(Wait { chunk, time, on });
        }
    }

    fn check(&self) -> Result<(), ReadError> {
        self.failed.clone().map_or(Ok(()), Err)
    }
}

impl<'a> Filler<'a> {
    /// Makes every chunk of `wanted` ready, or hands over its bytes.
    ///
    /// * `wanted`: ranges of chunk indexes inside the table.
    ///
    /// # Errors
    /// The first failure of a wanted chunk; others may be ready nevertheless.
    pub(crate) fn run(
        &self,
        wanted: &[Range<u32>],
        priority: Priority,
        unwritten: Unwritten<'_>,
        unvouched: Unvouched,
    ) -> Result<(), ReadError> {
        let mut request = Request {
            blob: &self.info.id,
            wanted,
            priority,
            unwritten,
            unvouched,
            failed: None,
            longest: None,
        };
        let start = Instant::now();
        let result = self.settle_all(wanted, &mut request);
        if priority == Priority::OnDemand {
            add(&self.metrics.misses, 1);
            add_time(&self.metrics.read_wait_time, start);
            if start.elapsed() >= self.slow_read {
                self.report_slow(start.elapsed(), &request);
            }
        }
        result
    }

    fn settle_all(
        &self,
        wanted: &[Range<u32>],
        request: &mut Request<'_>,
    ) -> Result<(), ReadError> {
        for range in wanted {
            self.lead_missing(range.clone(), request)?;
        }
        for index in wanted.iter().cloned().flatten() {
            self.settle(ChunkIndex::new(index), request)?;
        }
        Ok(())
    }

    /// One line that says which chunk a reader waited for, on what, and how long.
    fn report_slow(&self, time: Duration, request: &Request<'_>) {
        add(&self.metrics.slow_reads, 1);
        let blob = &self.info.id;
        match &request.longest {
            Some(Wait {
                chunk,
                time: part,
                on,
            }) => tracing::warn!(
                "slow read: {time:.1?}, of that {part:.1?} for chunk {chunk} of blob {blob} from {on}"
            ),
            None => tracing::warn!("slow read: {time:.1?} for chunks of blob {blob}"),
        }
    }

    /// Fetches what nobody else is fetching, one request at a time.
    fn lead_missing(&self, range: Range<u32>, request: &mut Request<'_>) -> Result<(), ReadError> {
        let mut at = range.start;
        while at < range.end {
            if self.state.stopped.load(Ordering::Relaxed) {
                return Err(self.stopped());
            }
            let pieces = self.next_pieces(&mut at, range.end, request)?;
            if pieces.is_empty() {
                continue;
            }
            // Before the claim: nobody waits for chunks of a reader without permission
            // or memory.
            let index = first_chunk(&pieces);
            let start = Instant::now();
            let pass = self.pass(&pieces, request.priority)?;
            request.waited(index, start, || {
                "a busy server: waiting for a turn".to_owned()
            });
            let start = Instant::now();
            let memory = self.memory(plan::memory(&pieces), request.priority)?;
            request.waited(index, start, || "memory that other fetches use".to_owned());
            let jobs = self.claim(pieces, request.priority);
            self.lead(jobs, (pass, memory), request);
            request.check()?;
        }
        Ok(())
    }

    /// The next missing pieces that one request could fetch; `at` moves past them.
    fn next_pieces(
        &self,
        at: &mut u32,
        end: u32,
        request: &Request<'_>,
    ) -> Result<Vec<Piece>, ReadError> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut unit: Option<Range<u64>> = None;
        let joining = Joining::of(request.priority, self.backend);
        while *at < end {
            let index = ChunkIndex::new(*at);
            if self.is_settled(index, request) {
                *at += 1;
                continue;
            }
            let piece = match self.piece_of(index) {
                Ok(piece) => piece,
                // First what can be had; this entry is met again.
                Err(_) if !pieces.is_empty() => break,
                Err(error) => return Err(error),
            };
            let joined = match &unit {
                Some(unit) if !joining.joins(unit, &piece.stored) => break,
                Some(unit) => unit.start..unit.end.max(piece.stored.end),
                None => piece.stored.clone(),
            };
            unit = Some(joined);
            let last = piece
                .members
                .last()
                .map_or(*at, |member| member.index.get());
            *at = last.max(*at).saturating_add(1);
            pieces.push(piece);
        }
        Ok(pieces)
    }

    /// Whether nothing is to be done for a chunk any more.
    fn is_settled(&self, index: ChunkIndex, request: &Request<'_>) -> bool {
        self.files.is_ready(index)
            || request.holds(index)
            || request.unvouched == Unvouched::Skip && self.digests.chunk_digest(index).is_none()
    }

    /// The piece with a chunk that must be had. What cannot be verified is not fetched.
    fn piece_of(&self, index: ChunkIndex) -> Result<Piece, ReadError> {
        if self.digests.chunk_digest(index).is_none() {
            let blob = self.info.id.clone();
            return Err(ReadError::NoDigest { blob, index });
        }
        plan::piece_of(self.table, index).map_err(|error| self.table_error(error))
    }

    fn claim(&self, pieces: Vec<Piece>, priority: Priority) -> Vec<Job<'a>> {
        pieces
            .into_iter()
            .filter_map(|piece| {
                let chunks = piece.members.iter().map(|member| member.index);
                let chunks = chunks.filter(|index| self.digests.chunk_digest(*index).is_some());
                let done = |index| self.files.is_ready(index);
                let claims = self.state.flights.claim(chunks, priority, done);
                Job::new(piece, claims)
            })
            .collect()
    }

    /// Permission to ask the backend for these pieces.
    fn pass(&self, pieces: &[Piece], priority: Priority) -> Result<Option<Pass>, ReadError> {
        let Some(gate) = self.gate else {
            return Ok(None);
        };
        let len = |piece: &Piece| piece.stored.end.saturating_sub(piece.stored.start);
        let (start, stop) = (Instant::now(), &self.state.stopped);
        let pass = gate
            .enter(
                pieces.iter().map(len).sum(),
                priority,
                start + WAIT_LIMIT,
                stop,
            )
            .ok_or_else(|| self.no_result(ChunkIndex::new(0), start.elapsed()))?;
        add_time(&self.metrics.turn_wait_time, start);
        Ok(Some(pass))
    }

    fn memory(&self, bytes: u64, priority: Priority) -> Result<Grant, ReadError> {
        let start = Instant::now();
        let stop = &self.state.stopped;
        let grant = self
            .memory
            .take(bytes, priority, start + WAIT_LIMIT, stop)
            .ok_or_else(|| self.no_result(ChunkIndex::new(0), start.elapsed()))?;
        add_time(&self.metrics.memory_wait_time, start);
        Ok(grant)
    }

    /// Delivers claimed chunks from wherever they are cheapest.
    ///
    /// * `granted`: given back when nothing is fetched any more.
    fn lead(&self, jobs: Vec<Job<'a>>, granted: (Option<Pass>, Grant), request: &mut Request<'_>) {
        let mut ours = Vec::new();
        let mut elsewhere = Vec::new();
        for job in jobs {
            let Some(job) = self.without_local(job, request) else {
                continue;
            };
            match self.lock(job, request) {
                Locked::Ours(job) => ours.push(job),
                Locked::Elsewhere(job) => elsewhere.push(job),
                Locked::Done => {}
            }
        }
        self.fetch(ours, request);
        drop(granted);
        // Only now: whoever waits for another process holds nothing that one may want.
        self.await_other_processes(elsewhere, request);
    }

    fn fetch(&self, jobs: Vec<Job<'a>>, request: &mut Request<'_>) {
        let joining = Joining::of(request.priority, self.backend);
        for (range, jobs) in plan::units(jobs, joining, |job: &Job<'_>| &job.stored) {
            self.fetch_unit(range, jobs.into(), request);
        }
    }

    /// Ends the flights of chunks that need no fetch. The place where a chunk that
    /// another cached blob already holds would be copied.
    fn without_local(&self, mut job: Job<'a>, request: &mut Request<'_>) -> Option<Job<'a>> {
        let chunks = std::mem::take(&mut job.chunks);
        for (member, claim) in chunks {
            match self.local(&member) {
                Some(outcome) => request.land(claim, outcome),
                None => job.chunks.push((member, claim)),
            }
        }
        (!job.chunks.is_empty()).then_some(job)
    }

    fn local(&self, member: &Member) -> Option<Outcome> {
        if let Some(bytes) = self.state.recent.get(member.index) {
            // Verified when it was put there; the cache may be writable again.
            return Some(self.publish(member, &bytes));
        }
        let files = self.files.get()?;
        if !files.map.is_suspect(member.index) {
            return None;
        }
        let good = self.recheck(&files.data, member);
        files.map.clear_suspect(member.index);
        if !good {
            add(&self.metrics.recheck_failures, 1);
            return None;
        }
        files.believe(member.index, member.size);
        add(&self.metrics.chunks_rechecked, 1);
        Some(Outcome::Stored)
    }

    /// Whether the data file holds the chunk, which an earlier boot says it does.
    fn recheck(&self, data: &std::fs::File, member: &Member) -> bool {
        use std::os::unix::fs::FileExt as _;
        let mut bytes = vec![0; usize_of(member.size)];
        data.read_exact_at(&mut bytes, member.plain.start).is_ok()
            && self.cores.run(|| self.verify(member, &bytes).is_ok())
    }

    /// Fetches one unit. If it fails because part of its range does not exist, the
    /// other parts are fetched alone, so that the failure stays where it belongs.
    fn fetch_unit(&self, range: Range<u64>, jobs: VecDeque<Job<'a>>, request: &mut Request<'_>) {
        let Err((rest, error)) = self.transfer(range, jobs, false, request) else {
            return;
        };
        let alone = rest.len() > 1 && concerns_the_range(&error);
        for job in rest {
            if !alone {
                job.fail(&error, request);
                continue;
            }
            self.transfer_alone(job, false, request);
        }
    }

    fn transfer_alone(&self, job: Job<'a>, direct: bool, request: &mut Request<'_>) {
        let range = job.stored.clone();
        if let Err((rest, error)) = self.transfer(range, [job].into(), direct, request) {
            rest.into_iter().for_each(|job| job.fail(&error, request));
        }
    }

    /// Asks the source itself for what somebody else delivered wrongly.
    fn ask_directly(
        &self,
        job: Job<'a>,
        error: &ReadError,
        served_by: &ServedBy,
        request: &mut Request<'_>,
    ) {
        tracing::warn!(%error, host = %served_by.host(), "asking the source itself");
        self.backend.distrust(&self.info.id, &job.stored, served_by);
        self.transfer_alone(job, true, request);
    }

    /// One request. On error returns the jobs that are not done.
    ///
    /// * `direct`: of the source itself, by way of nobody else.
    fn transfer(
        &self,
        range: Range<u64>,
        jobs: VecDeque<Job<'a>>,
        direct: bool,
        request: &mut Request<'_>,
    ) -> Result<(), (VecDeque<Job<'a>>, ReadError)> {
        let start = Instant::now();
        let served_by = ServedBy::default();
        let fetch = Fetch {
            blob: &self.info.id,
            range: range.clone(),
            priority: request.priority,
            served_by: Some(&served_by),
            direct,
            blob_len: Some(self.info.compressed_size),
        };
        let chunk = jobs
            .front()
            .map_or_else(ChunkIndex::default, Job::first_chunk);
        let span = tracing::info_span!(
            "fetch",
            blob = %self.info.id,
            at = range.start,
            len = range.end - range.start,
            reason = ?fetch.priority,
        );
        let entered = span.enter();
        let mut unpacker = Unpacker::new(self, jobs, range.start, direct);
        let result = self.backend.fetch(&fetch, &mut |bytes| {
            unpacker.feed(bytes, &served_by, request)
        });
        self.metrics.fetched(fetch.priority, unpacker.received);
        add_time(&self.metrics.fetch_time, start);
        if fetch.priority == Priority::OnDemand {
            add_latency(self.metrics, start.elapsed());
        }
        let host = served_by.host();
        tracing::debug!(
            blob = %self.info.id,
            at = range.start,
            len = range.end - range.start,
            priority = ?fetch.priority,
            %host,
            elapsed = ?start.elapsed(),
            "fetched"
        );
        drop(entered);
        request.waited(chunk, start, || match host.as_str() {
            "" => "its source".to_owned(),
            host => host.to_owned(),
        });
        let Unpacker {
            jobs,
            received,
            doubtful,
            ..
        } = unpacker;
        for (job, error) in doubtful {
            self.ask_directly(job, &error, &served_by, request);
        }
        if jobs.is_empty() {
            return Ok(());
        }
        let error = match result {
            Err(BackendError::Stopped) => self.stopped(),
            Err(error) => self.fetch_error(range, error),
            // A backend that breaks its promise.
            Ok(()) => {
                let error = BackendError::Short {
                    name: self.info.id.to_string(),
                    offset: range.start,
                    len: range.end - range.start,
                    got: received,
                };
                self.fetch_error(range, error)
            }
        };
        add(&self.metrics.fetch_failures, 1);
        Err((jobs, error))
    }

    /// Checks that `bytes` are the ones the image was built from, and belong there.
    fn verify<'b>(&self, member: &Member, bytes: &'b [u8]) -> Result<&'b [u8], ReadError> {
        let (blob, index) = (self.info.id.clone(), member.index);
        if let Some(start) = self.digests.chunk_plain_offset(index)
            && start != member.plain.start
        {
            return Err(ReadError::Mismatch {
                blob,
                index,
                image: start..start.saturating_add(member.size.into()),
                table: member.plain.clone(),
            });
        }
        match self.digests.chunk_digest(index) {
            None => Err(ReadError::NoDigest { blob, index }),
            Some(digest) if digest == Digest::of(self.info.digester, bytes) => Ok(bytes),
            Some(_) => Err(ReadError::Digest { blob, index }),
        }
    }

    /// Puts a verified chunk where readers find it.
    fn publish(&self, member: &Member, bytes: &[u8]) -> Outcome {
        match self.files.store(member.index, member.plain.start, bytes) {
            Ok(()) => {
                self.state.recent.forget(member.index);
                add(&self.metrics.chunks_filled, 1);
                add(&self.metrics.bytes_filled, member.size.into());
                Outcome::Stored
            }
            Err(cause) => {
                add(&self.metrics.write_failures, 1);
                let bytes = Bytes::copy_from_slice(bytes);
                self.state.recent.put(member.index, bytes.clone());
                Outcome::Memory { bytes, cause }
            }
        }
    }

    /// Waits until a chunk that another reader was fetching is done. If that reader
    /// gave up, or was not in a hurry and failed, fetches it after all.
    fn settle(&self, index: ChunkIndex, request: &mut Request<'_>) -> Result<(), ReadError> {
        for _ in 0..MAX_TURNS {
            if self.is_settled(index, request) {
                return Ok(());
            }
            let Some(flight) = self.state.flights.get(index) else {
                self.lead_missing(index.get()..index.get() + 1, request)?;
                continue;
            };
            let start = Instant::now();
            let outcome = flight.wait(start + WAIT_LIMIT, &self.state.stopped);
            add(&self.metrics.waits, 1);
            add_time(&self.metrics.wait_time, start);
            request.waited(index, start, || "the fetch of another reader".to_owned());
            match outcome {
                None => return Err(self.no_result(index, start.elapsed())),
                Some(Outcome::Failed(_)) if flight.priority < request.priority => {}
                Some(outcome) => request.note(index, &outcome),
            }
            request.check()?;
        }
        Err(ReadError::Abandoned {
            blob: self.info.id.clone(),
        })
    }

    fn no_result(&self, index: ChunkIndex, waited: Duration) -> ReadError {
        if self.state.stopped.load(Ordering::Relaxed) {
            return self.stopped();
        }
        ReadError::TimedOut {
            blob: self.info.id.clone(),
            index,
            waited,
        }
    }

    fn stopped(&self) -> ReadError {
        ReadError::Stopped {
            blob: self.info.id.clone(),
        }
    }

    fn fetch_error(&self, stored: Range<u64>, error: BackendError) -> ReadError {
        ReadError::Fetch {
            blob: self.info.id.clone(),
            stored,
            source: Arc::new(error),
        }
    }

    fn table_error(&self, error: FormatError) -> ReadError {
        ReadError::Table {
            blob: self.info.id.clone(),
            source: Arc::new(error),
        }
    }
}

fn first_chunk(pieces: &[Piece]) -> ChunkIndex {
    let first = pieces.iter().flat_map(|piece| &piece.members).next();
    first.map_or_else(ChunkIndex::default, |member| member.index)
}

/// Whether a shorter request may succeed where this one failed.
fn concerns_the_range(error: &ReadError) -> bool {
    let ReadError::Fetch { source, .. } = error else {
        return false;
    };
    match &**source {
        BackendError::Short { .. } | BackendError::Status { status: 416, .. } => true,
        BackendError::File { source, .. } => source.raw_os_error() == Some(libc::EIO),
        _ => false,
    }
}

/// A length of the format as a length in memory.
fn usize_of(len: u32) -> usize {
    ChunkIndex::new(len).as_usize()
}
