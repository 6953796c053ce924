//! Names, units and meaning of every counter of the data path, and the counters.
//!
//! [`Metrics`] is a plain struct of atomics that is passed in where counting
//! happens; there are no globals. [`Metrics::snapshot`] pairs each value with its
//! description, so an exporter needs to know nothing else.
//!
//! One [`Metrics`] belongs to one mounted image, so its backend is told by whose it is.
//! Users find the same in `docs/metrics.md`.
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
    requests_speculation: Counter, "backend.requests_speculation", "requests", "Fetches made because a reader will probably want the bytes: readahead included.";
    requests_prefetch: Counter, "backend.requests_prefetch", "requests", "Fetches made because a list or a setting asked for it.";
    bytes_on_demand: Counter, "backend.bytes_on_demand", "bytes", "Compressed bytes received because a reader waited.";
    bytes_speculation: Counter, "backend.bytes_speculation", "bytes", "Compressed bytes received because a reader will probably want them.";
    bytes_prefetch: Counter, "backend.bytes_prefetch", "bytes", "Compressed bytes received because a list or a setting asked for it.";
    turn_wait_time: Counter, "backend.turn_wait_time", "nanoseconds", "Time that fetches waited for their turn at a busy server, or for bandwidth.";
    latency_1: Counter, "backend.on_demand_within_1_ms", "requests", "Fetches for readers that took at most 1 ms, and more than the class before.";
    latency_20: Counter, "backend.on_demand_within_20_ms", "requests", "Fetches for readers that took at most 20 ms, and more than the class before.";
    latency_50: Counter, "backend.on_demand_within_50_ms", "requests", "Fetches for readers that took at most 50 ms, and more than the class before.";
    latency_100: Counter, "backend.on_demand_within_100_ms", "requests", "Fetches for readers that took at most 100 ms, and more than the class before.";
    latency_500: Counter, "backend.on_demand_within_500_ms", "requests", "Fetches for readers that took at most 500 ms, and more than the class before.";
    latency_1000: Counter, "backend.on_demand_within_1000_ms", "requests", "Fetches for readers that took at most 1000 ms, and more than the class before.";
    latency_2000: Counter, "backend.on_demand_within_2000_ms", "requests", "Fetches for readers that took at most 2000 ms, and more than the class before.";
    latency_more: Counter, "backend.on_demand_slower", "requests", "Fetches for readers that took more than 2000 ms.";
    fetch_time: Counter, "backend.fetch_time", "nanoseconds", "Time spent in fetches, decoding included, all threads added up.";
    fetch_failures: Counter, "backend.fetch_failures", "requests", "Fetches that failed after all attempts.";
    retries: Counter, "backend.retries", "requests", "Attempts after the first of a fetch.";
    hedges: Counter, "backend.hedges", "requests", "Second requests for what a reader waits for and the first did not bring in time.";
    hedges_won: Counter, "backend.hedges_won", "requests", "Of these, those that were faster.";
    redirects_renewed: Counter, "backend.redirects_renewed", "requests", "Remembered redirects that had expired.";
    bytes_skipped: Counter, "backend.bytes_skipped", "bytes", "Bytes read and thrown away because a server ignores ranges.";
    mirror_failures: Counter, "backend.mirror_failures", "requests", "Requests to a mirror that another source had to serve.";
    mirror_requests: Counter, "backend.mirror_requests", "requests", "Requests to mirrors, agents of Dragonfly included.";
    mirror_bytes: Counter, "backend.mirror_bytes", "bytes", "Compressed bytes that mirrors delivered.";
    mirror_throttled: Counter, "backend.mirror_throttled", "requests", "Requests that an agent of Dragonfly refused because there were too many.";
    mirror_wrong_bytes: Counter, "backend.mirror_wrong_bytes", "requests", "Requests that a mirror answered with bytes that the image was not made of; the registry itself was asked instead.";
    fallbacks: Counter, "backend.fallbacks", "requests", "Requests to the registry itself because no mirror delivered.";
    hits: Counter, "cache.hits", "reads", "Looks of readers that found all they wanted; a FUSE read that waited looks once more when it is answered.";
    misses: Counter, "cache.misses", "reads", "Looks of readers that had to wait for something.";
    dedup_hits: Counter, "cache.dedup_hits", "chunks", "Chunks that need no fetch, because the cache has them from an earlier mount, another image or another process: found when a blob is opened, or when it is their turn to be fetched.";
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
    read_wait_time: Counter, "fill.read_wait_time", "nanoseconds", "Time that readers waited for bytes, whatever the cause, all added up.";
    slow_reads: Counter, "fill.slow_reads", "reads", "Reads that waited longer than --slow-read-ms; each is logged.";
    waits: Counter, "fill.waits", "waits", "Times a reader waited for a chunk that another one fetched.";
    waits_for_processes: Counter, "fill.waits_for_processes", "waits", "Times chunks were left to another process that was fetching them.";
    wait_time: Counter, "fill.wait_time", "nanoseconds", "Time that readers spent in these waits.";
    prefetch_total: Gauge, "prefetch.total", "bytes", "Uncompressed bytes that are to be prefetched.";
    prefetch_done: Gauge, "prefetch.done", "bytes", "Of these, bytes that are in the cache.";
    prefetch_failed: Gauge, "prefetch.failed", "bytes", "Of these, bytes that were given up.";
    prefetch_held: Gauge, "prefetch.held", "boolean", "1 while prefetch is paused or the cache has no room for it.";
}

impl Metrics {
    pub(crate) fn fetched(&self, priority: Priority, bytes: u64) {
        let (requests, counter) = match priority {
            Priority::OnDemand => (&self.requests_on_demand, &self.bytes_on_demand),
            Priority::Speculation => (&self.requests_speculation, &self.bytes_speculation),
            Priority::Prefetch => (&self.requests_prefetch, &self.bytes_prefetch),
        };
        add(requests, 1);
        add(counter, bytes);
    }
}

/// Counts a fetch for a reader by how long it took.
pub(crate) fn add_latency(metrics: &Metrics, time: std::time::Duration) {
    let counter = match time.as_micros().div_ceil(1000) {
        0..=1 => &metrics.latency_1,
        2..=20 => &metrics.latency_20,
        21..=50 => &metrics.latency_50,
        51..=100 => &metrics.latency_100,
        101..=500 => &metrics.latency_500,
        501..=1000 => &metrics.latency_1000,
        1001..=2000 => &metrics.latency_2000,
        _ => &metrics.latency_more,
    };
    add(counter, 1);
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

    /// `docs/metrics.md` lists them all, as they are.
    #[test]
    fn every_number_is_documented() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        let text = std::fs::read_to_string(path).unwrap();
        let listed: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("| `"))
            .collect();
        let expected: Vec<_> = ALL
            .iter()
            .map(|metric| {
                let Metric {
                    name,
                    unit,
                    kind,
                    meaning,
                } = metric;
                format!(
                    "| `{name}` | {unit} | {} | {meaning} |",
                    match kind {
                        Kind::Counter => "counter",
                        Kind::Gauge => "gauge",
                    }
                )
            })
            .collect();
        assert_eq!(listed, expected, "put the lines on the right into {path}");
    }

    #[test]
    fn latencies_are_put_into_their_classes() {
        let metrics = Metrics::default();
        for micros in [0, 1000, 1001, 20_000, 2_000_000, 2_000_001, 99_000_000] {
            add_latency(&metrics, std::time::Duration::from_micros(micros));
        }
        let all = metrics.snapshot();
        let seen: Vec<_> = all.iter().filter(|(_, value)| *value > 0).collect();
        let seen: Vec<_> = seen
            .iter()
            .map(|(metric, value)| (metric.name, *value))
            .collect();
        assert_eq!(
            seen,
            [
                ("backend.on_demand_within_1_ms", 2),
                ("backend.on_demand_within_20_ms", 2),
                ("backend.on_demand_within_2000_ms", 1),
                ("backend.on_demand_slower", 2),
            ]
        );
    }

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
