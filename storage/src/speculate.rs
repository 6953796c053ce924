//! Speculation: what a reader will probably want soon, fetched while the link is idle.
//!
//! A miss costs a round trip during which the link carries nothing. A start of a
//! container is a row of some hundred misses, so that time is worth more than the
//! bytes it could carry: on a miss `Known::guess` names chunks near it, and a few
//! background threads fetch them, newest guesses first.
//!
//! Two kinds of guesses, both made from chunk numbers and sizes alone, so that every
//! front end has them:
//!
//! * *The rest of the file.* A file is cut into chunks of the full size and a shorter
//!   one, so a row of full chunks is a file. Programs read most of what they open. Files
//!   above `WHOLE_FILE` are left to `readahead`.
//! * *The neighbours.* The files of a directory lie next to each other in a blob, and a
//!   program that has read two of them will read more. [`Neighbourhoods`] tells where one
//!   directory ends and the next begins. Only small files count, and the more misses,
//!   the more is granted.
//!
//! Promises: nobody waits here; what is fetched is verified and cached like anything
//! else; a reader who wants a chunk that was guessed but not yet asked for fetches it
//! himself; a failure is left to the reader who needs the bytes.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use crate::backend::Priority;
use crate::blob::Blob;
use crate::sync::{Arc, Condvar, Mutex, OnceLock, Weak, lock, wait};
use crate::units::ChunkIndex;

/// Files up to this size are fetched whole, in bytes of their full chunks.
const WHOLE_FILE: u64 = 8 << 20;

/// Chunks on either side that are looked at.
const REACH: u32 = 1024;

/// Largest request for neighbours, in bytes of the uncompressed address space.
const REQUEST: u64 = 768 << 10;

/// Largest chunk that is fetched as a neighbour, in bytes: small files come in flocks,
/// big ones do not.
const SMALL: u64 = 128 << 10;

/// What the first miss in a neighbourhood is granted, if all of it is no larger than
/// that, and what the second one is granted; in bytes of the uncompressed address space.
const FIRST: u64 = 512 << 10;
const SECOND: u64 = 1 << 20;
/// The same for every further miss.
const FURTHER: u64 = 1 << 20;

/// Misses remembered for each blob.
const MISSES: usize = 64;

/// Guesses that may wait; the oldest are forgotten.
const QUEUE: usize = 256;

/// Background threads, each with one request at a time: enough for the small files of a
/// directory to fill the link. The [`gate`](crate::gate) sees to it that readers find room.
const THREADS: usize = 8;

/// Runs of chunks of a blob that belong together, like the files of a directory.
#[derive(Clone, Debug, Default)]
pub struct Neighbourhoods {
    /// One bit a chunk: set where a run begins.
    starts: Vec<u64>,
}

impl Neighbourhoods {
    /// * `owners`: for each chunk in order, a number that its run has in common.
    #[must_use]
    pub fn new(owners: &[u32]) -> Self {
        let mut starts = vec![0; owners.len().div_ceil(64)];
        let pairs = owners.iter().zip(owners.iter().skip(1));
        for (index, (before, after)) in (1_usize..).zip(pairs) {
            if before != after
                && let Some(word) = starts.get_mut(index / 64)
            {
                *word |= 1_u64 << (index % 64);
            }
        }
        Self { starts }
    }

    fn starts_at(&self, index: u32) -> bool {
        let index = ChunkIndex::new(index).as_usize();
        self.starts
            .get(index / 64)
            .is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    /// The run of chunk `index`, no longer than `reach` to either side.
    fn around(&self, index: u32, reach: u32, len: u32) -> Range<u32> {
        let (mut start, mut end) = (index, index.saturating_add(1).min(len));
        let (first, last) = (
            index.saturating_sub(reach),
            index.saturating_add(reach).min(len),
        );
        while start > first && !self.starts_at(start) {
            start -= 1;
        }
        while end < last && !self.starts_at(end) {
            end += 1;
        }
        start..end
    }
}

/// Hears of readers, to guess better than the numbers of chunks allow. Must not block.
pub trait Observer: Send + Sync + std::fmt::Debug {
    /// A reader is about to fetch `chunk`.
    fn missed(&self, chunk: ChunkIndex);

    /// A reader found `chunk`, perhaps after he had to fetch it. Not told of blobs that
    /// are complete.
    fn read(&self, _chunk: ChunkIndex) {}
}

/// The latest misses of one blob.
#[derive(Debug, Default)]
pub(crate) struct Misses(Mutex<VecDeque<ChunkIndex>>);

impl Misses {
    /// Takes note of a miss; `None` if it is known, or somebody else is here just now.
    /// Otherwise how many earlier ones lie in `near`.
    fn note(&self, index: ChunkIndex, near: &Range<u32>) -> Option<u64> {
        let mut misses = self.0.try_lock().ok()?;
        if misses.contains(&index) {
            return None;
        }
        let near = misses.iter().filter(|miss| near.contains(&miss.get()));
        let near = u64::try_from(near.count()).unwrap_or(0);
        if misses.len() == MISSES {
            misses.pop_front();
        }
        misses.push_back(index);
        Some(near)
    }
}

/// What a blob knows when it guesses.
pub(crate) struct Known<'a> {
    pub(crate) misses: &'a Misses,
    /// Number of chunks.
    pub(crate) len: u32,
    /// Uncompressed length of a chunk in bytes; 0 if its entry is damaged.
    pub(crate) size: &'a dyn Fn(u32) -> u64,
    /// Length of every chunk of a file but the last, in bytes.
    pub(crate) chunk_size: u32,
    /// `None` as long as nobody has told: then there are no neighbours.
    pub(crate) neighbourhoods: Option<&'a Neighbourhoods>,
}

impl Known<'_> {
    /// The chunks to fetch after a miss on chunk `index`, most promising last.
    ///
    /// * `ready`: whether a chunk needs no fetch.
    pub(crate) fn guess(
        &self,
        index: ChunkIndex,
        ready: impl Fn(ChunkIndex) -> bool,
    ) -> Vec<Range<u32>> {
        let at = index.get();
        let run = match self.neighbourhoods {
            Some(known) => known.around(at, REACH, self.len),
            None => at..at + 1,
        };
        let Some(near) = self.misses.note(index, &run) else {
            return Vec::new();
        };
        let missing = |index: &u32| !ready(ChunkIndex::new(*index));
        let is_small = (self.size)(at) <= SMALL;
        let grant = match near {
            _ if !is_small => 0,
            0 if self.small_bytes(&run) > FIRST => 0,
            0 => FIRST,
            1 => SECOND,
            _ => FURTHER,
        };
        let mut chunks = self.neighbours(at, run, grant, missing);
        let mut guesses = self.in_requests(&mut chunks);
        guesses.reverse();
        if let Some(file) = self.file_around(at) {
            // Forward first.
            guesses.extend(
                (file.start..at)
                    .filter(missing)
                    .map(|index| index..index + 1),
            );
            let rest = (at + 1..file.end).rev().filter(missing);
            guesses.extend(rest.map(|index| index..index + 1));
        }
        guesses
    }

    /// Bytes of small chunks in a run.
    fn small_bytes(&self, run: &Range<u32>) -> u64 {
        let sizes = run.clone().map(|index| (self.size)(index));
        sizes.filter(|size| *size <= SMALL).sum()
    }

    /// Joins chunks next to each other, up to the size of a request.
    fn in_requests(&self, chunks: &mut [u32]) -> Vec<Range<u32>> {
        chunks.sort_unstable();
        let mut requests: Vec<(Range<u32>, u64)> = Vec::new();
        for index in chunks.iter().copied() {
            let size = (self.size)(index);
            match requests.last_mut() {
                Some((range, sum)) if range.end == index && *sum + size <= REQUEST => {
                    range.end = index + 1;
                    *sum += size;
                }
                _ => requests.push((index..index + 1, size)),
            }
        }
        requests.into_iter().map(|(range, _)| range).collect()
    }

    /// The chunks of the file that chunk `at` belongs to, if it has several and is
    /// small enough.
    fn file_around(&self, at: u32) -> Option<Range<u32>> {
        let is_full = |index: u32| (self.size)(index) == u64::from(self.chunk_size);
        let most = u32::try_from(WHOLE_FILE / u64::from(self.chunk_size.max(1))).unwrap_or(0);
        let mut start = at;
        while start > 0 && is_full(start - 1) {
            start -= 1;
            if at - start > most {
                return None;
            }
        }
        let mut end = at;
        while end < self.len && is_full(end) {
            end += 1;
            if end - start > most {
                return None;
            }
        }
        // The short one behind the full ones.
        let end = (end + 1).min(self.len);
        (end - start > 1).then_some(start..end)
    }

    /// Chunks of `run` around `at` that are not parts of big files, nearest first, until
    /// `grant` bytes are used up.
    fn neighbours(
        &self,
        at: u32,
        run: Range<u32>,
        mut grant: u64,
        missing: impl Fn(&u32) -> bool,
    ) -> Vec<u32> {
        let mut found = Vec::new();
        let (mut after, mut before) = (at + 1..run.end, (run.start..at).rev());
        while grant > 0 {
            let nearest = [after.next(), before.next()];
            if nearest == [None, None] {
                break;
            }
            for index in nearest.into_iter().flatten() {
                let size = (self.size)(index);
                if size <= SMALL && missing(&index) {
                    // An empty page of the cache file is paid for, too.
                    grant = grant.saturating_sub(size.max(4096));
                    found.push(index);
                }
            }
        }
        found
    }
}

/// A guess to be fetched.
struct Guess {
    blob: Weak<Blob>,
    chunks: Range<u32>,
}

#[derive(Default)]
struct Queue {
    guesses: Mutex<VecDeque<Guess>>,
    more: Condvar,
}

/// Hands guesses to the background, most promising last.
pub(crate) fn submit(blob: &Weak<Blob>, chunks: Vec<Range<u32>>) {
    if chunks.is_empty() {
        return;
    }
    static GUESSES: OnceLock<Arc<Queue>> = OnceLock::new();
    let queue = GUESSES.get_or_init(start);
    let mut guesses = lock(&queue.guesses);
    for chunks in chunks {
        if guesses.len() == QUEUE {
            guesses.pop_front();
        }
        guesses.push_back(Guess {
            blob: Weak::clone(blob),
            chunks,
        });
    }
    drop(guesses);
    queue.more.notify_all();
}

fn start() -> Arc<Queue> {
    let queue = Arc::new(Queue::default());
    for _ in 0..THREADS {
        let queue = Arc::clone(&queue);
        let thread = std::thread::Builder::new().name("speculation".to_owned());
        if let Err(error) = thread.spawn(move || work(&queue)) {
            tracing::warn!("cannot start a thread for speculation: {error}");
        }
    }
    queue
}

fn work(queue: &Queue) {
    loop {
        let Guess { blob, chunks } = next(queue);
        let Some(blob) = blob.upgrade().filter(|blob| blob.has_room()) else {
            continue;
        };
        if let Err(error) = blob.ensure_chunks(chunks.clone(), Priority::Speculation) {
            tracing::debug!(
                "speculation on chunks {chunks:?} of {}: {error}",
                blob.info().id
            );
        }
    }
}

fn next(queue: &Queue) -> Guess {
    let mut guesses = lock(&queue.guesses);
    loop {
        if let Some(guess) = guesses.pop_back() {
            return guess;
        }
        guesses = wait(&queue.more, guesses, Duration::from_secs(3600));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: u32 = 1 << 20;

    /// Two directories of a hundred files of 8 KiB, with a big file between.
    fn size(index: u32) -> u64 {
        match index {
            100..105 => FULL.into(),
            105 => 5000,
            _ => 8192,
        }
    }

    fn directories() -> Neighbourhoods {
        let owner = |index| match index {
            0..100 => 1,
            100..106 => 2,
            _ => 3,
        };
        Neighbourhoods::new(&(0..300).map(owner).collect::<Vec<u32>>())
    }

    fn known<'a>(misses: &'a Misses, directories: &'a Neighbourhoods) -> Known<'a> {
        Known {
            misses,
            len: 300,
            size: &size,
            chunk_size: FULL,
            neighbourhoods: Some(directories),
        }
    }

    fn nothing_is_ready(_: ChunkIndex) -> bool {
        false
    }

    fn chunks(guesses: &[Range<u32>]) -> Vec<u32> {
        let mut chunks: Vec<u32> = guesses.iter().cloned().flatten().collect();
        chunks.sort_unstable();
        chunks
    }

    #[test]
    fn a_file_is_wanted_whole_what_follows_first() {
        let (misses, directories) = (Misses::default(), directories());
        let known = known(&misses, &directories);
        let guesses = known.guess(ChunkIndex::new(102), nothing_is_ready);
        assert_eq!(chunks(&guesses), [100, 101, 103, 104, 105]);
        assert_eq!(guesses.last().map(|range| range.start), Some(103));
        // The same miss again is nothing new.
        assert!(
            known
                .guess(ChunkIndex::new(102), nothing_is_ready)
                .is_empty()
        );
    }

    #[test]
    fn a_huge_file_is_left_alone() {
        let misses = Misses::default();
        let known = Known {
            misses: &misses,
            len: 1000,
            size: &|_| FULL.into(),
            chunk_size: FULL,
            neighbourhoods: None,
        };
        assert!(
            known
                .guess(ChunkIndex::new(500), nothing_is_ready)
                .is_empty()
        );
    }

    #[test]
    fn the_second_miss_in_a_big_directory_brings_its_neighbours() {
        let (misses, directories) = (Misses::default(), directories());
        let known = known(&misses, &directories);
        // 100 files of 8 KiB are more than a first miss may bring.
        assert!(
            known
                .guess(ChunkIndex::new(10), nothing_is_ready)
                .is_empty()
        );
        let ready = |index: ChunkIndex| index.get() == 40;
        let guesses = known.guess(ChunkIndex::new(30), ready);
        let guessed = chunks(&guesses);
        assert!(guessed.iter().all(|index| *index < 100), "{guessed:?}");
        assert!(guessed.contains(&31) && guessed.contains(&29));
        assert!(!guessed.contains(&40) && !guessed.contains(&30));
        let bytes = |range: &Range<u32>| range.clone().map(size).sum::<u64>();
        assert!(guesses.iter().all(|range| bytes(range) <= REQUEST));
        assert!(guesses.iter().map(bytes).sum::<u64>() <= SECOND + 2 * 8192);
    }

    #[test]
    fn a_miss_elsewhere_counts_for_nothing() {
        let (misses, directories) = (Misses::default(), directories());
        let known = known(&misses, &directories);
        assert!(
            known
                .guess(ChunkIndex::new(10), nothing_is_ready)
                .is_empty()
        );
        assert!(
            known
                .guess(ChunkIndex::new(200), nothing_is_ready)
                .is_empty()
        );
    }

    #[test]
    fn a_small_directory_comes_at_once() {
        let misses = Misses::default();
        let owners: Vec<u32> = (0..300).map(|index| index / 20).collect();
        let directories = Neighbourhoods::new(&owners);
        let known = known(&misses, &directories);
        let guesses = known.guess(ChunkIndex::new(25), nothing_is_ready);
        let expected: Vec<u32> = (20..40).filter(|index| *index != 25).collect();
        assert_eq!(chunks(&guesses), expected);
    }
}
