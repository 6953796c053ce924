//! What was asked of a mounted image, in the classes that clients know.
//!
//! Numbers are counted one by one without order between them; who reads them while
//! requests are under way sees a moment of each. The classes: `docs/api.md`, "Metrics".

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

/// Kinds of requests, in the order in which they are reported.
pub(crate) const OPS: [&str; 15] = [
    "getattr",
    "readlink",
    "open",
    "release",
    "read",
    "statfs",
    "getxattr",
    "listxattr",
    "opendir",
    "lookup",
    "readdir",
    "readdirplus",
    "access",
    "forget",
    "batch_forget",
];

/// A kind of request, as position in [`OPS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Getattr = 0,
    Readlink = 1,
    Read = 4,
    Statfs = 5,
    Getxattr = 6,
    Listxattr = 7,
    Lookup = 9,
    Readdir = 10,
    Readdirplus = 11,
}

/// Upper ends of the classes of sizes, in bytes; the last class has none.
const SIZES: [u64; 7] = [
    1 << 10,
    4 << 10,
    16 << 10,
    64 << 10,
    128 << 10,
    512 << 10,
    1 << 20,
];
/// Upper ends of the classes of latency, in microseconds; the last class has none.
const LATENCIES: [u64; 7] = [200, 1_000, 20_000, 50_000, 500_000, 1_000_000, 2_000_000];

/// The class of a size in bytes.
pub(crate) fn size_class(size: u64) -> usize {
    SIZES.iter().filter(|end| size >= **end).count()
}

/// The counters of one image.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    hits: [AtomicU64; 15],
    errors: [AtomicU64; 15],
    micros: [AtomicU64; 15],
    data_read: AtomicU64,
    sizes: [AtomicU64; 8],
    latencies: [AtomicU64; 8],
    waits: AtomicU64,
}

/// [`Stats`] at a moment.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Snapshot {
    pub nr_opens: u64,
    pub data_read: u64,
    pub block_count_read: [u64; 8],
    pub fop_hits: [u64; 15],
    pub fop_errors: [u64; 15],
    pub fop_cumulative_latency_total: [u64; 15],
    pub read_latency_dist: [u64; 8],
    /// Reads that waited for data.
    #[serde(skip)]
    pub waits: u64,
}

fn add(counter: Option<&AtomicU64>, amount: u64) {
    if let Some(counter) = counter {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

/// A duration in whole microseconds.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Stats {
    /// Counts a request that took `time`.
    pub(crate) fn count(&self, op: Op, time: Duration, failed: bool) {
        let index = op as usize;
        add(self.hits.get(index), 1);
        add(self.micros.get(index), micros(time));
        if failed {
            add(self.errors.get(index), 1);
        }
    }

    /// Counts a read that returned `result` after `time`.
    pub(crate) fn read(&self, result: &io::Result<usize>, time: Duration) {
        self.count(Op::Read, time, result.is_err());
        if let Ok(size) = result {
            let size = u64::try_from(*size).unwrap_or(u64::MAX);
            add(Some(&self.data_read), size);
            add(self.sizes.get(size_class(size)), 1);
            let time = micros(time);
            let class = LATENCIES.iter().filter(|end| time > **end).count();
            add(self.latencies.get(class), 1);
        }
    }

    /// Counts a read that had to wait for data.
    pub(crate) fn waited(&self) {
        add(Some(&self.waits), 1);
    }

    /// The numbers now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            // The kernel is told not to ask, so nobody counts.
            nr_opens: 0,
            data_read: get(&self.data_read),
            block_count_read: self.sizes.each_ref().map(get),
            fop_hits: self.hits.each_ref().map(get),
            fop_errors: self.errors.each_ref().map(get),
            fop_cumulative_latency_total: self.micros.each_ref().map(get),
            read_latency_dist: self.latencies.each_ref().map(get),
            waits: get(&self.waits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_the_agreed_ends() {
        let sizes = [1023, 1024, 4096, 16_384, 65_536, 131_072, 524_288, 1 << 20];
        assert_eq!(sizes.map(size_class), [0, 1, 2, 3, 4, 5, 6, 7]);
        let stats = Stats::default();
        for micros in [
            200, 201, 1_001, 20_001, 50_001, 500_001, 1_000_001, 2_000_001,
        ] {
            stats.read(&Ok(100), Duration::from_micros(micros));
        }
        stats.read(&Err(io::ErrorKind::Other.into()), Duration::ZERO);
        let seen = stats.snapshot();
        assert_eq!(seen.read_latency_dist, [1; 8]);
        assert_eq!((seen.data_read, seen.block_count_read[0]), (800, 8));
        assert_eq!((seen.fop_hits[4], seen.fop_errors[4]), (9, 1));
        assert_eq!(OPS[Op::Readdirplus as usize], "readdirplus");
    }
}
