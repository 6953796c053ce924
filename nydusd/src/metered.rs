//! A back end that is measured: how often it is asked, how long it takes, and what it
//! is being asked now.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use storage::backend::{Backend, BackendError, Fetch, Priority, ServedBy, Sink};
use storage::blob_id::BlobId;

use crate::vfs::stats::size_class;

/// Upper ends of the classes of latency, in milliseconds; the last class has none.
const LATENCIES: [u64; 7] = [1, 20, 50, 100, 500, 1_000, 2_000];

/// A request under way.
#[derive(Clone, Debug)]
pub(crate) struct UnderWay {
    /// The blob.
    pub blob: BlobId,
    /// Stored bytes of it.
    pub range: Range<u64>,
    /// Whether a reader waits for it.
    pub on_demand: bool,
    /// When it began.
    pub since: Instant,
}

/// A measured back end.
#[derive(Debug)]
pub(crate) struct Metered {
    inner: Arc<dyn Backend>,
    under_way: Mutex<BTreeMap<u64, UnderWay>>,
    next: AtomicU64,
    reads: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    millis: AtomicU64,
    /// By class of size, then of latency.
    classes: [[AtomicU64; 8]; 8],
}

/// What [`Metered`] has counted.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Snapshot {
    pub read_count: u64,
    pub read_errors: u64,
    pub read_amount_total: u64,
    pub read_cumulative_latency_millis_total: u64,
    pub read_cumulative_latency_millis_dist: [u64; 8],
    pub read_count_block_size_dist: [u64; 8],
    pub read_latency_sizes_dist: [[u64; 8]; 8],
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Metered {
    pub(crate) fn new(inner: Arc<dyn Backend>) -> Self {
        Self {
            inner,
            under_way: Mutex::default(),
            next: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            millis: AtomicU64::new(0),
            classes: Default::default(),
        }
    }

    /// The requests under way, oldest first.
    pub(crate) fn under_way(&self) -> Vec<UnderWay> {
        let requests = self.under_way.lock();
        let requests = requests.unwrap_or_else(PoisonError::into_inner);
        requests.values().cloned().collect()
    }

    /// The numbers now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let classes = self.classes.each_ref().map(|row| row.each_ref().map(get));
        let mut by_latency = [0; 8];
        for row in &classes {
            for (sum, count) in by_latency.iter_mut().zip(row) {
                *sum += count;
            }
        }
        Snapshot {
            read_count: get(&self.reads),
            read_errors: get(&self.errors),
            read_amount_total: get(&self.bytes),
            read_cumulative_latency_millis_total: get(&self.millis),
            read_cumulative_latency_millis_dist: by_latency,
            read_count_block_size_dist: classes.map(|row| row.iter().sum()),
            read_latency_sizes_dist: classes,
        }
    }

    fn count(&self, size: u64, time: Duration, failed: bool) {
        let add = |counter: &AtomicU64, amount| counter.fetch_add(amount, Ordering::Relaxed);
        add(&self.reads, 1);
        let time = millis(time);
        add(&self.millis, time);
        if failed {
            add(&self.errors, 1);
            return;
        }
        add(&self.bytes, size);
        let class = LATENCIES.iter().filter(|end| time > **end).count();
        let row = self.classes.get(size_class(size));
        if let Some(counter) = row.and_then(|row| row.get(class)) {
            add(counter, 1);
        }
    }
}

impl Backend for Metered {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        let began = Instant::now();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let under_way = || {
            let requests = self.under_way.lock();
            requests.unwrap_or_else(PoisonError::into_inner)
        };
        let entry = UnderWay {
            blob: request.blob.clone(),
            range: request.range.clone(),
            on_demand: request.priority == Priority::OnDemand,
            since: began,
        };
        under_way().insert(number, entry);
        let result = self.inner.fetch(request, sink);
        under_way().remove(&number);
        let size = request.range.end.saturating_sub(request.range.start);
        self.count(size, began.elapsed(), result.is_err());
        result
    }

    fn place(&self) -> Option<String> {
        self.inner.place()
    }

    fn warm(&self) {
        self.inner.warm();
    }

    fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        self.inner.size(blob)
    }

    fn distrust(&self, blob: &BlobId, range: &Range<u64>, served_by: &ServedBy) {
        self.inner.distrust(blob, range, served_by);
    }

    fn want_whole(&self, blob: &BlobId) {
        self.inner.want_whole(blob);
    }

    fn grain(&self) -> Option<u64> {
        self.inner.grain()
    }

    fn renew_login(&self, user: &str, password: &str) -> Result<(), BackendError> {
        self.inner.renew_login(user, password)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_size_and_latency() {
        let dir = tempfile::tempdir().unwrap();
        let id = BlobId::new(&"a".repeat(64)).unwrap();
        std::fs::write(dir.path().join(id.to_string()), vec![7; 5000]).unwrap();
        let local = storage::backend::local::LocalBackend::new(vec![dir.path().to_owned()]);
        let metered = Metered::new(Arc::new(local));
        let fetch = |range| Fetch {
            blob: &id,
            range,
            priority: Priority::OnDemand,
            served_by: None,
            direct: false,
            blob_len: None,
        };
        let mut seen = 0;
        metered
            .fetch(&fetch(0..5000), &mut |_| {
                seen = metered.under_way().len();
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, 1, "a request is listed while it is under way");
        assert!(metered.under_way().is_empty());
        metered
            .fetch(&fetch(4000..6000), &mut |_| Ok(()))
            .unwrap_err();
        let seen = metered.snapshot();
        assert_eq!((seen.read_count, seen.read_errors), (2, 1));
        assert_eq!(seen.read_amount_total, 5000);
        assert_eq!(seen.read_count_block_size_dist, [0, 0, 1, 0, 0, 0, 0, 0]);
    }
}
