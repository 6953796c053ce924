use std::thread;

use proptest::prelude::*;

use super::*;
use crate::sync::AtomicUsize;

static GO: AtomicBool = AtomicBool::new(false);

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(10)
}

fn late() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn gate(requests: usize, ahead: usize, bandwidth: u64) -> Gate {
    Gate::new(Limits {
        requests,
        ahead,
        bandwidth,
    })
}

#[test]
fn background_work_leaves_room_for_readers() {
    let gate = gate(4, 100, 0);
    assert_eq!(gate.limits().ahead, 2);
    let enter = |priority| gate.enter(1, priority, soon(), &GO);
    let first = enter(Priority::Prefetch).unwrap();
    let _second = enter(Priority::Speculation).unwrap();
    assert!(enter(Priority::Prefetch).is_none());
    let _readers = [
        enter(Priority::OnDemand).unwrap(),
        enter(Priority::OnDemand).unwrap(),
    ];
    assert!(enter(Priority::OnDemand).is_none());
    drop(first);
    assert!(enter(Priority::OnDemand).is_some());
    assert!(enter(Priority::Prefetch).is_some());
}

#[test]
fn the_background_has_only_so_many_bytes_on_their_way() {
    let gate = gate(64, 32, 0);
    let enter = |bytes| gate.enter(bytes, Priority::Prefetch, soon(), &GO);
    // One may be as large as it is.
    let huge = enter(MOST_WINDOW * 2).unwrap();
    assert!(enter(1).is_none());
    // No reader is kept waiting for it.
    assert!(
        gate.enter(MOST_WINDOW, Priority::OnDemand, soon(), &GO)
            .is_some()
    );
    drop(huge);
    let half = [
        enter(LEAST_WINDOW / 2).unwrap(),
        enter(LEAST_WINDOW / 2).unwrap(),
    ];
    assert!(enter(MOST_WINDOW).is_none());
    drop(half);
    assert_eq!(lock(&gate.0.state).window.used, 0);
}

/// Requests of `bytes` over a link of `rate` bytes per second and `delay`, as many at a
/// time as the window allows: the window that comes of it.
fn settled(bytes: u64, rate: u64, delay: Duration) -> u64 {
    let mut window = Window::new();
    let (mut sent, mut free_at) = (VecDeque::new(), Duration::ZERO);
    let mut now = Duration::ZERO;
    for _ in 0..5000 {
        while window.has_room(bytes, false) {
            window.used += bytes;
            free_at = free_at.max(now) + Duration::from_nanos(bytes * 1_000_000_000 / rate);
            sent.push_back((now, free_at + delay));
        }
        let (began, ended) = sent.pop_front().unwrap();
        now = now.max(ended);
        window.ended(bytes, ended - began);
    }
    window.size
}

#[test]
fn the_window_follows_the_link() {
    const MEGABIT: u64 = 125_000;
    let ms = Duration::from_millis;
    for (rate, delay) in [
        (20, 5),
        (100, 20),
        (100, 100),
        (1000, 20),
        (1000, 40),
        (200, 150),
    ] {
        for bytes in [20 << 10, 128 << 10, 512 << 10] {
            let window = settled(bytes, rate * MEGABIT, ms(delay));
            let name = format!("{rate} Mbit/s, {delay} ms, {bytes} bytes: {window}");
            // Enough for the link to be busy.
            let needed = rate * MEGABIT * delay / 1000 + bytes;
            assert!(window >= needed.min(MOST_WINDOW), "{name}");
            // And not so much that a reader waits for long.
            let queue = window.saturating_sub(needed).max(1) * 1000 / (rate * MEGABIT);
            // Of which what is always on its way takes a part.
            let least = (LEAST_WINDOW + bytes) * 1000 / (rate * MEGABIT);
            let tolerated = 2 * (delay + 60 + least);
            assert!(queue <= tolerated, "{name}: {queue} ms");
        }
    }
}

#[test]
fn with_one_request_a_reader_is_next() {
    let gate = gate(1, 1, 0);
    let running = gate.enter(1, Priority::Prefetch, soon(), &GO).unwrap();
    let order = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let all = [
            Priority::Prefetch,
            Priority::Speculation,
            Priority::OnDemand,
        ];
        for (count, priority) in (1..).zip(all) {
            let (gate, order) = (&gate, &order);
            scope.spawn(move || {
                let _pass = gate.enter(1, priority, late(), &GO).unwrap();
                lock(order).push(priority);
            });
            let waiting = || {
                lock(&gate.0.state)
                    .waiting
                    .iter()
                    .map(VecDeque::len)
                    .sum::<usize>()
            };
            while waiting() < count {
                thread::yield_now();
            }
        }
        drop(running);
    });
    let all = [
        Priority::OnDemand,
        Priority::Speculation,
        Priority::Prefetch,
    ];
    assert_eq!(*lock(&order), all);
}

#[test]
fn readers_go_first_with_bandwidth_too() {
    // 1 MB/s: a request of 200 kB takes 200 ms.
    let gate = gate(64, 8, 1_000_000);
    let start = Instant::now();
    let enter = |priority| drop(gate.enter(200_000, priority, late(), &GO).unwrap());
    enter(Priority::Prefetch);
    // Not behind the request of the prefetch.
    enter(Priority::OnDemand);
    assert!(start.elapsed() < Duration::from_millis(100));
    enter(Priority::OnDemand);
    assert!(start.elapsed() >= Duration::from_millis(150));
    enter(Priority::Prefetch);
    assert!(
        start.elapsed() >= Duration::from_millis(500),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_stopped_blob_waits_no_longer() {
    let gate = gate(1, 1, 0);
    let _running = gate.enter(1, Priority::OnDemand, soon(), &GO).unwrap();
    let stop = AtomicBool::new(true);
    assert!(gate.enter(1, Priority::OnDemand, late(), &stop).is_none());
    assert_eq!(gate.running(), 1);
}

#[test]
fn mounts_share_the_gate_of_a_server() {
    let gates = Gates::default();
    let limits = Limits {
        requests: 3,
        ..Limits::default()
    };
    let (first, other) = (gates.of("a", Some(limits)), gates.of("b", None));
    let again = gates.clone().of("a", None);
    assert_eq!((again.limits().requests, other.limits().requests), (3, 64));
    let _pass = first.enter(1, Priority::OnDemand, soon(), &GO).unwrap();
    assert_eq!((again.running(), other.running()), (1, 0));
    drop((first, _pass, again));
    assert_eq!(gates.of("a", None).limits(), Limits::default());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn limits_hold_and_everybody_gets_through(
        wishes in prop::collection::vec(0..3_usize, 1..60),
        requests in 1..6_usize,
        ahead in 1..6_usize,
    ) {
        let gate = gate(requests, ahead, 0);
        let limits = gate.limits();
        let (running, background) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for part in wishes.chunks(wishes.len().div_ceil(8)) {
                let (gate, running, background) = (&gate, &running, &background);
                scope.spawn(move || for wish in part {
                    let all = [Priority::Prefetch, Priority::Speculation, Priority::OnDemand];
                    let is_ahead = usize::from(*wish < 2);
                    let _pass = gate.enter(1, all[*wish], late(), &GO).unwrap();
                    assert!(running.fetch_add(1, Ordering::SeqCst) < limits.requests);
                    assert!(background.fetch_add(is_ahead, Ordering::SeqCst) < limits.ahead + 1 - is_ahead);
                    thread::yield_now();
                    background.fetch_sub(is_ahead, Ordering::SeqCst);
                    running.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        prop_assert_eq!(gate.running(), 0);
    }
}
