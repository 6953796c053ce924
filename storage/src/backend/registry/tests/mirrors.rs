//! Mirrors: their order, their failures, and what they may see.

use super::server::{Reply, Server};
use super::*;
use crate::sync::AtomicBool;

fn good() -> Server {
    Server::new(|request, _| Reply::range(request, &data()))
}

fn mirror(server: &Server) -> Mirror {
    Mirror {
        health_check_interval: Duration::from_millis(300),
        failure_limit: 2,
        ..Mirror::new(&format!("http://{}", server.host()))
    }
}

fn with_mirrors(origin: &Server, mirrors: &[&Server]) -> RegistryConfig {
    let mut config = config(origin);
    config.mirrors = mirrors.iter().map(|server| mirror(server)).collect();
    config
}

#[test]
fn the_first_mirror_that_delivers_is_used() {
    let (origin, first, second) = (good(), good(), good());
    let mut settings = with_mirrors(&origin, &[&first, &second]);
    settings.mirrors[0].url = format!("http://{}/prefix/", first.host());
    settings.mirrors[0].headers = vec![("x-upstream".into(), "https://origin".into())];
    let backend = RegistryBackend::new(settings).unwrap();
    expect(&backend, 0..1000);
    assert_eq!(backend.size(&blob()).unwrap(), 300_000);
    let requests = first.requests();
    assert_eq!(requests.len(), 2);
    assert!(
        requests[0]
            .path
            .starts_with("/prefix/v2/library/demo/blobs/sha256:")
    );
    assert_eq!(requests[0].header("x-upstream"), Some("https://origin"));
    assert_eq!(second.requests().len() + origin.requests().len(), 0);
}

#[test]
fn what_a_mirror_cannot_deliver_comes_from_the_next_source_without_a_wait() {
    for number in 0..8 {
        let bad = Server::new(move |request, _| {
            let reply = Reply::range(request, &data());
            match number {
                0 => Reply::new(404, Vec::new()),
                1 => Reply::new(401, Vec::new()),
                2 => Reply::new(429, Vec::new()).with("retry-after", "60"),
                3 => Reply::new(503, Vec::new()),
                4 => reply.cut(50_000, false),
                5 => Reply::part(&data(), 5..50),
                6 => Reply::new(307, Vec::new()).with("location", "nonsense://x"),
                _ => Reply::new(416, Vec::new()),
            }
        });
        let origin = good();
        let backend = RegistryBackend::new(with_mirrors(&origin, &[&bad])).unwrap();
        let start = Instant::now();
        expect(&backend, 0..200_000);
        assert!(
            start.elapsed() < Duration::from_millis(900),
            "case {number}"
        );
        let asked = origin.requests()[0].range().start;
        assert_eq!(asked, if number == 4 { 50_000 } else { 0 }, "case {number}");
    }
}

#[test]
fn a_mirror_that_keeps_failing_is_left_alone_until_it_is_well() {
    let well = Arc::new(AtomicBool::new(false));
    for ping in [false, true] {
        well.store(false, Ordering::Relaxed);
        let state = Arc::clone(&well);
        let sick = Server::new(move |request, _| {
            match (state.load(Ordering::Relaxed), request.path.as_str()) {
                (false, _) => Reply::new(500, Vec::new()),
                (true, "/ping") => Reply::ok(Vec::new()),
                (true, _) => Reply::range(request, &data()),
            }
        });
        let origin = good();
        let mut settings = with_mirrors(&origin, &[&sick]);
        settings.mirrors[0].ping_url = ping.then(|| format!("http://{}/ping", sick.host()));
        let backend = RegistryBackend::new(settings).unwrap();
        for _ in 0..10 {
            expect(&backend, 0..1000);
        }
        assert_eq!(sick.requests().len(), 2, "two failures are the limit");
        assert_eq!(origin.requests().len(), 10);
        well.store(true, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(700));
        for _ in 0..10 {
            expect(&backend, 0..1000);
        }
        assert_eq!(origin.requests().len(), 10, "the mirror serves again");
    }
}

#[test]
fn a_dead_mirror_costs_one_attempt() {
    let origin = good();
    let mut settings = config(&origin);
    settings.mirrors = vec![
        Mirror::new("http://127.0.0.1:1"),
        Mirror::new("http://[::1]:1"),
    ];
    let metrics = Arc::new(Metrics::default());
    let backend = RegistryBackend::with_metrics(settings, Arc::clone(&metrics)).unwrap();
    for _ in 0..5 {
        expect(&backend, 0..1000);
    }
    assert_eq!(metrics.mirror_failures.load(Ordering::Relaxed), 2);
}

#[test]
fn a_mirror_that_ignores_ranges_is_used_for_the_beginning_only() {
    let whole = Server::new(|_, _| Reply::ok(vec![0; 3 << 20]));
    let origin = Server::new(|_, _| Reply::part(&vec![1; 3 << 20], 2 << 20..(2 << 20) + 10));
    let backend = RegistryBackend::new(with_mirrors(&origin, &[&whole])).unwrap();
    assert_eq!(fetch(&backend, 0..10).unwrap(), [0; 10]);
    assert_eq!(fetch(&backend, 2 << 20..(2 << 20) + 10).unwrap(), [1; 10]);
}

#[test]
fn a_mirror_sees_credentials_only_if_it_may() {
    let wants = || {
        Server::new(|request, _| match request.header("authorization") {
            Some("Basic dTpodW50ZXIy") => Reply::range(request, &data()),
            _ => Reply::new(401, Vec::new()).with("www-authenticate", "Basic realm=\"x\""),
        })
    };
    for share in [true, false] {
        let (origin, asking) = (wants(), wants());
        let mut settings = with_mirrors(&origin, &[&asking]);
        settings.auth = basic(PASSWORD);
        settings.mirrors[0].share_credentials = share;
        expect(&RegistryBackend::new(settings).unwrap(), 0..10);
        let shared = asking.requests();
        let shared = shared.iter().any(|r| r.header("authorization").is_some());
        assert_eq!(shared, share);
        assert_eq!(origin.requests().is_empty(), share);
    }
}

#[test]
fn mirrors_that_are_none_are_refused() {
    for url in [
        "",
        "host",
        "ftp://host",
        "http://",
        "http://user@host",
        "http://host?a=b",
    ] {
        let mut settings = RegistryConfig::new("host", "repo");
        settings.mirrors = vec![Mirror::new(url)];
        let error = RegistryBackend::new(settings).unwrap_err();
        assert!(matches!(error, BackendError::Config(_)), "{url}: {error}");
    }
}

#[test]
fn a_slow_mirror_is_hedged_by_the_next_source() {
    let slow = Server::new(|request, _| match request.range().start {
        // Not a byte, and half of the body.
        0 => Reply::silence(),
        _ => Reply::range(request, &data()).cut(50_000, true),
    });
    let next = good();
    let origin = good();
    let mut settings = with_mirrors(&origin, &[&slow, &next]);
    settings.timeouts.read = Duration::from_secs(3);
    let metrics = Arc::<Metrics>::default();
    let backend = RegistryBackend::with_metrics(settings, Arc::clone(&metrics)).unwrap();
    let start = Instant::now();
    expect(&backend, 0..200_000);
    expect(&backend, 100..200_100);
    assert!(start.elapsed() < Duration::from_millis(2900));
    let asked: Vec<_> = next.requests().iter().map(|r| r.range().start).collect();
    assert_eq!(asked, [0, 50_100]);
    assert_eq!(origin.requests().len(), 0);
    assert_eq!(metrics.hedges.load(Ordering::Relaxed), 2);
    assert_eq!(metrics.hedges_won.load(Ordering::Relaxed), 2);
    // It lost twice, which is as good as failing.
    expect(&backend, 0..200_000);
    assert_eq!(slow.requests().len(), 2);
}

#[test]
fn what_nobody_waits_for_is_not_hedged() {
    let slow = Server::new(|request, number| match number {
        0 => Reply::silence(),
        _ => Reply::range(request, &data()),
    });
    let mut settings = config(&slow);
    settings.timeouts.read = Duration::from_millis(1500);
    let backend = RegistryBackend::new(settings).unwrap();
    let request = Fetch {
        blob: &blob(),
        range: 0..10,
        priority: Priority::Prefetch,
        served_by: None,
        direct: false,
        blob_len: None,
    };
    let start = Instant::now();
    fetch_to_vec(&backend, &request, 10).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(1400));
    assert_eq!(slow.requests().len(), 2);
}
