//! One fetch per chunk for all processes of the machine that share a cache directory.
//!
//! Whoever fetches a chunk holds a lock on it that ends with the process. The others
//! look at the ready map until the bit is set or the lock is free. The wait is bounded:
//! a process that is stopped or slow costs a second fetch, with the same result.

use std::thread;
use std::time::{Duration, Instant};

use super::unpack::Job;
use super::{Filler, Outcome, Request};
use crate::backend::Priority;
use crate::metrics::{add, add_time};
use crate::sync::Ordering;

/// How long a reader leaves the fetch to another process.
const PATIENCE: Duration = Duration::from_secs(2);

/// The same when nobody waits for the bytes.
const PATIENCE_OF_PREFETCH: Duration = Duration::from_secs(10);

/// How often to look. There is no way to be told: the lock has no deadline.
const POLL: Duration = Duration::from_millis(2);

/// Who fetches.
pub(super) enum Locked<'a> {
    /// This process.
    Ours(Job<'a>),
    /// Another one has begun.
    Elsewhere(Job<'a>),
    /// Nobody: another one has just finished.
    Done,
}

impl<'a> Filler<'a> {
    /// Takes the locks of all chunks of a job, or of none.
    pub(super) fn lock(&self, job: Job<'a>, request: &mut Request<'_>) -> Locked<'a> {
        let mut locks = Vec::new();
        for (member, _) in &job.chunks {
            match self.files.lock_chunk(member.index) {
                Some(Some(lock)) => locks.push(Some(lock)),
                Some(None) => return Locked::Elsewhere(job),
                None => locks.push(None),
            }
        }
        let mut job = job;
        for ((_, claim), lock) in job.chunks.iter_mut().zip(locks) {
            if let Some(lock) = lock {
                claim.hold(lock);
            }
        }
        // Only what is not ready under the lock is really missing.
        match self.without_ready(job, request) {
            Some(job) => Locked::Ours(job),
            None => Locked::Done,
        }
    }

    /// Waits until other processes have fetched these jobs; what they do not get done
    /// is fetched here.
    pub(super) fn await_other_processes(&self, jobs: Vec<Job<'a>>, request: &mut Request<'_>) {
        if jobs.is_empty() {
            return;
        }
        let (start, chunk) = (Instant::now(), jobs.first().map(Job::first_chunk));
        let patience = match request.priority {
            Priority::OnDemand => PATIENCE,
            Priority::Speculation | Priority::Prefetch => PATIENCE_OF_PREFETCH,
        };
        add(&self.metrics.waits_for_processes, 1);
        let mut waiting = jobs;
        while !waiting.is_empty() && start.elapsed() < patience {
            if self.state.stopped.load(Ordering::Relaxed) {
                // Dropping a job ends its flights.
                return;
            }
            let mut ours = Vec::new();
            for job in std::mem::take(&mut waiting) {
                let Some(job) = self.without_ready(job, request) else {
                    continue;
                };
                match self.lock(job, request) {
                    Locked::Ours(job) => ours.push(job),
                    Locked::Elsewhere(job) => waiting.push(job),
                    Locked::Done => {}
                }
            }
            if ours.is_empty() {
                thread::sleep(POLL);
            }
            // Whoever began it died, or failed.
            self.fetch_late(ours, request);
        }
        add_time(&self.metrics.wait_time, start);
        if let Some(chunk) = chunk {
            request.waited(chunk, start, || "another process".to_owned());
        }
        self.fetch_late(waiting, request);
    }

    /// Fetches what should have come from another process.
    fn fetch_late(&self, jobs: Vec<Job<'a>>, request: &mut Request<'_>) {
        for job in jobs {
            let bytes = job.stored.end.saturating_sub(job.stored.start);
            match self.memory(bytes, request.priority) {
                Ok(_memory) => self.fetch(vec![job], request),
                Err(error) => job.fail(&error, request),
            }
        }
    }

    /// Ends the flights of chunks that another process has published.
    fn without_ready(&self, mut job: Job<'a>, request: &mut Request<'_>) -> Option<Job<'a>> {
        let chunks = std::mem::take(&mut job.chunks);
        for (member, claim) in chunks {
            if self.files.is_ready(member.index) {
                add(&self.metrics.dedup_hits, 1);
                request.land(claim, Outcome::Stored);
            } else {
                job.chunks.push((member, claim));
            }
        }
        (!job.chunks.is_empty()).then_some(job)
    }
}
