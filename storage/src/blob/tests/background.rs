//! Work that nobody waits for: it is held back when there is no room, and readers pass it.

use super::*;
use crate::cache::Limits;
use crate::gate::{Gate, Limits as Requests};
use crate::prefetch::{Prefetch, Settings as How};
use crate::sync::AtomicBool;

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "not seen: {what}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_prefetch_waits_for_room_and_can_be_paused() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = Arc::new(Metrics::default());
    let settings = Settings {
        metrics: Arc::clone(&metrics),
        limits: Limits {
            max_bytes: Some(500_000),
            min_free_percent: 0,
        },
        ..Settings::default()
    };
    let cache = CacheDir::open_as(dir.path(), settings).unwrap();
    let large = Bench::with(seeded(zstd(), &[60_000; 20], 77), cache.clone(), None);
    large.check(0..large.size()).unwrap();
    until("a cache that is full", || {
        cache.gc().unwrap();
        !cache.has_room()
    });
    let small = Bench::with(sample(zstd(), &[60_000; 5]), cache, None);
    let ranges = [(Arc::clone(&small.blob), 0..small.size())];
    let prefetch = Prefetch::start(ranges, How::default());
    until("a prefetch that waits", || prefetch.is_held());
    assert_eq!(prefetch.progress().done, 0);
    let held = || metrics.prefetch_held.load(Ordering::Relaxed);
    assert_eq!(held(), 1);
    prefetch.pause();
    drop(large);
    until("room", || small.cache.has_room());
    thread::sleep(Duration::from_millis(700));
    assert_eq!((prefetch.progress().done, held()), (0, 1), "it is paused");
    prefetch.resume();
    until("the end of the prefetch", || prefetch.progress().is_over());
    assert!(small.blob.is_complete() && !prefetch.is_held());
    let bytes = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(bytes(&metrics.prefetch_total), small.size());
    assert_eq!(bytes(&metrics.prefetch_done), small.size());
    assert_eq!(held(), 0);
}

#[test]
fn a_reader_does_not_wait_for_background_work_that_waits_for_its_turn() {
    let bench = Bench::new(sample(zstd(), &[60_000; 3]));
    let gate = Gate::new(Requests {
        requests: 2,
        ahead: 1,
        bandwidth: 0,
    });
    bench.blob.set_gate(gate.clone());
    let late = Instant::now() + Duration::from_secs(60);
    let pass = gate
        .enter(1, Priority::Prefetch, late, &AtomicBool::new(false))
        .unwrap();
    let wanted = bench.sample.spans[1].plain.clone();
    thread::scope(|scope| {
        let ahead = scope.spawn(|| bench.blob.ensure(wanted.clone(), Priority::Prefetch));
        thread::sleep(Duration::from_millis(50));
        // Not even the table of chunks: that costs a request, too.
        assert!(!ahead.is_finished() && bench.requests() == 0);
        let start = Instant::now();
        bench.check(wanted.clone()).unwrap();
        assert!(start.elapsed() < Duration::from_secs(5));
        drop(pass);
        ahead.join().unwrap().unwrap();
    });
    assert_eq!(gate.running(), 0);
}

#[test]
fn reads_are_counted_by_what_they_found_and_slow_ones_apart() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        slow_read: Duration::ZERO,
        ..Settings::default()
    };
    let cache = CacheDir::open_as(dir.path(), settings).unwrap();
    let bench = Bench::with(sample(zstd(), &[60_000; 3]), cache, Some(dir));
    let metrics = Arc::clone(bench.cache.metrics());
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    bench.check(0..bench.size()).unwrap();
    assert_eq!((count(&metrics.hits), count(&metrics.misses)), (0, 1));
    assert_eq!(count(&metrics.slow_reads), 1);
    assert!(count(&metrics.read_wait_time) > 0);
    let (requests, latency) = (
        count(&metrics.requests_on_demand),
        count(&metrics.latency_1),
    );
    assert!(requests >= 1 && latency <= requests);
    bench.check(0..bench.size()).unwrap();
    assert_eq!((count(&metrics.hits), count(&metrics.misses)), (1, 1));
}
