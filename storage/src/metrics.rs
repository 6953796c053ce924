//! Names, units and meaning of every counter of the data path, and the counters.
//!
//! [`Metrics`] is a plain struct of atomics that is passed in where counting
//! happens; there are no globals. [`Metrics::snapshot`] pairs each value with its
//! description, so an exporter needs to know nothing else.
//!
//! Reads that find everything resident are not counted here: they cost one atomic
//! load per chunk, and a shared counter would cost more than that. Front ends
//! count them.
#![forbid(unsafe_code)]

use crate::backend::Priority;
use crate::sync::{AtomicU64, Ordering};

/// How a number behaves over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows while the process lives.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// Description of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// `subsystem.noun`.
    pub name: &'static str,
    /// `bytes`, `nanoseconds`, or what is being counted.
    pub unit: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// One line for whoever reads a dashboard.
    pub meaning: &'static str,
}

macro_rules! metrics {
    ($($field:ident: $kind:ident, $name:literal, $unit:literal, $meaning:literal;)*) => {
        /// The counters of one cache directory and its backends.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $(#[doc = $meaning] pub(crate) $field: AtomicU64,)*
        }

        /// Every number of [`Metrics`], in the order of [`Metrics::snapshot`].
        pub const ALL: &[Metric] = &[
            $(Metric { name: $name, unit: $unit, kind: Kind::$kind, meaning: $meaning },)*
        ];

        impl Metrics {
            /// Every number with its description. Values are read one by one.
            #[must_use]
            pub fn snapshot(&self) -> Vec<(Metric, u64)> {
                let values = [$(self.$field.load(Ordering::Relaxed),)*];
                ALL.iter().copied().zip(values).collect()
            }
        }
    };
}

metrics! {
    requests_on_demand: Counter, "backend.requests_on_demand", "requests", "Fetches made because a reader waited.";
    requests_prefetch: Counter, "backend.requests_prefetch", "requests", "Fetches made ahead of any reader.";
    bytes_on_demand: Counter, "backend.bytes_on_demand", "bytes", "Compressed bytes received because a reader waited.";
    bytes_prefetch: Counter, "backend.bytes_prefetch", "bytes", "Compressed bytes received ahead of any reader.";
    fetch_time: Counter, "backend.fetch_time", "nanoseconds", "Time spent in fetches, decoding included, all threads added up.";
    fetch_failures: Counter, "backend.fetch_failures", "requests", "Fetches that failed after all attempts.";
    retries: Counter, "backend.retries", "requests", "Attempts after the first of a fetch.";
    redirects_renewed: Counter, "backend.redirects_renewed", "requests", "Remembered redirects that had expired.";
    bytes_skipped: Counter, "backend.bytes_skipped", "bytes", "Bytes read and thrown away because a server ignores ranges.";
    mirror_failures: Counter, "backend.mirror_failures", "requests", "Requests to a mirror that another source had to serve.";
    chunks_filled: Counter, "cache.chunks_filled", "chunks", "Chunks fetched, verified and written to the cache.";
    bytes_filled: Counter, "cache.bytes_filled", "bytes", "Uncompressed bytes written to the cache.";
    chunks_in_memory: Counter, "cache.chunks_in_memory", "chunks", "Chunks served from memory because the cache could not be written.";
    chunks_rechecked: Counter, "cache.chunks_rechecked", "chunks", "Cached chunks found good after an unclean restart of the machine.";
    recheck_failures: Counter, "cache.recheck_failures", "chunks", "Cached chunks found bad after an unclean restart of the machine.";
    write_failures: Counter, "cache.write_failures", "chunks", "Chunks that could not be written to the cache.";
    unwritable: Gauge, "cache.unwritable", "blobs", "Open blobs whose cache files cannot be written at the moment.";
    blobs_evicted: Counter, "cache.blobs_evicted", "blobs", "Cached blobs deleted to keep the cache within its limits.";
    bytes_evicted: Counter, "cache.bytes_evicted", "bytes", "Disk space that they took.";
    bytes_cached: Gauge, "cache.bytes", "bytes", "Disk space of the cache directory when it was last looked at.";
    verify_failures: Counter, "fill.verify_failures", "chunks", "Chunks that did not decode or did not match their digest.";
    memory_wait_time: Counter, "fill.memory_wait_time", "nanoseconds", "Time that fetches waited for memory that others were using.";
    waits: Counter, "fill.waits", "waits", "Times a reader waited for a chunk that another one fetched.";
    waits_for_processes: Counter, "fill.waits_for_processes", "waits", "Times chunks were left to another process that was fetching them.";
    wait_time: Counter, "fill.wait_time", "nanoseconds", "Time that readers spent in these waits.";
}

impl Metrics {
    pub(crate) fn fetched(&self, priority: Priority, bytes: u64) {
        let (requests, counter) = match priority {
            Priority::OnDemand => (&self.requests_on_demand, &self.bytes_on_demand),
            Priority::Prefetch => (&self.requests_prefetch, &self.bytes_prefetch),
        };
        add(requests, 1);
        add(counter, bytes);
    }
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// Adds a duration to a counter of nanoseconds.
pub(crate) fn add_time(counter: &AtomicU64, since: std::time::Instant) {
    add(
        counter,
        u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX),
    );
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_number_has_its_own_name_and_is_reported() {
        let names: HashSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        let metrics = Metrics::default();
        metrics.fetched(Priority::Prefetch, 7);
        let found: Vec<_> = metrics
            .snapshot()
            .into_iter()
            .filter(|(_, value)| *value > 0)
            .collect();
        let names: Vec<_> = found
            .iter()
            .map(|(metric, value)| (metric.name, *value))
            .collect();
        assert_eq!(
            names,
            [
                ("backend.requests_prefetch", 1),
                ("backend.bytes_prefetch", 7)
            ]
        );
    }
}
