//! Agents of a Dragonfly network: what they are told, and what their errors mean.
//! The answers are those that the real agent was seen to give.

use super::server::{Reply, Server};
use super::*;
use crate::sync::{AtomicBool, AtomicUsize};

fn good() -> Server {
    Server::new(|request, _| Reply::range(request, &data()))
}

fn agent(server: &Server) -> Mirror {
    Mirror {
        health_check_interval: Duration::from_millis(200),
        failure_limit: 2,
        dragonfly: Some(Dragonfly::default()),
        ..Mirror::new(&format!("http://{}", server.host()))
    }
}

fn through(origin: &Server, server: &Server) -> RegistryConfig {
    let mut config = config(origin);
    config.mirrors = vec![agent(server)];
    config
}

fn counted(settings: RegistryConfig) -> (RegistryBackend, Arc<Metrics>) {
    let metrics = Arc::<Metrics>::default();
    let backend = RegistryBackend::with_metrics(settings, Arc::clone(&metrics)).unwrap();
    (backend, metrics)
}

fn prefetch(backend: &RegistryBackend, range: std::ops::Range<u64>) -> Result<(), BackendError> {
    let request = Fetch {
        blob: &blob(),
        range,
        priority: Priority::Prefetch,
        served_by: None,
        direct: false,
        blob_len: None,
    };
    fetch_to_vec(backend, &request, 1 << 30).map(drop)
}

fn error_of(kind: &'static str, status: u16) -> Reply {
    Reply::new(status, Vec::new()).with("X-Dragonfly-Error-Type", kind)
}

/// Waits until a request for a byte goes through the mirror again.
fn until_back(backend: &RegistryBackend, origin: &Server) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let before = origin.requests().len();
        expect(backend, 0..10);
        if origin.requests().len() == before {
            return;
        }
        assert!(Instant::now() < deadline, "the mirror is not used again");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn requests_say_how_they_want_to_travel() {
    let (origin, server) = (good(), good());
    let mut settings = through(&origin, &server);
    settings.mirrors[0].headers = vec![("X-Dragonfly-Registry".into(), "https://r".into())];
    settings.mirrors[0].dragonfly = Some(Dragonfly {
        priority_prefetch: 5,
        tag: "nodes".into(),
        application: "nydus".into(),
        ..Dragonfly::default()
    });
    let backend = RegistryBackend::new(settings).unwrap();
    expect(&backend, 0..1000);
    prefetch(&backend, 0..1000).unwrap();
    backend.want_whole(&blob());
    prefetch(&backend, 0..1000).unwrap();
    prefetch(&backend, 0..1000).unwrap();
    let requests = server.requests();
    let said = |name: &str| -> Vec<_> {
        let values = requests.iter().map(|request| request.header(name));
        values.map(Option::unwrap).map(str::to_owned).collect()
    };
    assert_eq!(said("x-dragonfly-priority"), ["6", "5", "5", "5"]);
    // The rest of a blob is asked for once.
    assert_eq!(
        said("x-dragonfly-prefetch"),
        ["false", "false", "true", "false"]
    );
    assert_eq!(said("x-dragonfly-scheduling-policy"), ["always"; 4]);
    assert_eq!(said("x-dragonfly-use-p2p"), ["true"; 4]);
    assert_eq!(said("x-dragonfly-registry"), ["https://r"; 4]);
    assert_eq!(said("x-dragonfly-tag"), ["nodes"; 4]);
    assert_eq!(said("x-dragonfly-application"), ["nydus"; 4]);
    assert_eq!(said("accept-encoding"), ["identity"; 4]);
    assert_eq!(backend.grain(), Some(PIECE));
    assert!(origin.requests().is_empty());
}

#[test]
fn whose_error_it_is_counts_and_not_its_status() {
    // Error, and whether the agent is left alone after two of them.
    for (kind, status, ill) in [
        ("proxy", 429, false),
        ("proxy", 403, false),
        ("proxy", 401, true),
        ("proxy", 400, true),
        ("dfdaemon", 500, true),
        ("dfdaemon", 400, true),
        ("dfdaemon", 507, true),
        ("backend", 200, false),
        ("backend", 500, false),
        ("backend", 401, false),
        ("backend", 403, false),
        ("backend", 404, false),
        ("backend", 429, false),
        ("backend", 503, false),
    ] {
        let origin = good();
        let server = Server::new(move |_, _| error_of(kind, status));
        let (backend, metrics) = counted(through(&origin, &server));
        let start = Instant::now();
        (0..5).for_each(|_| expect(&backend, 0..1000));
        let elapsed = start.elapsed();
        let case = format!("{status} {kind}");
        assert!(elapsed < Duration::from_millis(900), "{case}: {elapsed:?}");
        let asked = server.requests().len();
        match (ill, status) {
            (false, _) => assert_eq!(asked, 5, "{case}"),
            // At once, and for long.
            (true, 507) => assert_eq!(asked, 1, "{case}"),
            (true, _) => assert!((2..5).contains(&asked), "{case}: {asked}"),
        }
        assert_eq!(origin.requests().len(), 5, "{case}");
        let throttled = metrics.mirror_throttled.load(Ordering::Relaxed);
        assert_eq!(
            throttled,
            if status == 429 && kind == "proxy" {
                5
            } else {
                0
            }
        );
        assert_eq!(metrics.fallbacks.load(Ordering::Relaxed), 5);
    }
}

#[test]
fn windows_of_a_blob_are_tasks_of_their_own() {
    let piece = usize::try_from(PIECE).unwrap();
    let long: Vec<u8> = (0..3 * PIECE).map(|i| i.to_le_bytes()[1]).collect();
    let (sent, expected) = (long.clone(), long);
    let server = Server::new(move |request, _| Reply::range(request, &sent));
    let origin = good();
    let backend = RegistryBackend::new(through(&origin, &server)).unwrap();
    let request = Fetch {
        blob: &blob(),
        range: PIECE - 100..PIECE + 100,
        priority: Priority::OnDemand,
        served_by: None,
        direct: false,
        blob_len: Some(3 * PIECE),
    };
    let got = fetch_to_vec(&backend, &request, 1000).unwrap();
    assert!(got == expected[piece - 100..piece + 100]);
    let requests = server.requests();
    let tasks = requests.iter().map(|request| {
        let task = request.header("x-dragonfly-content-for-calculating-task-id");
        (task.unwrap().to_owned(), request.range().len())
    });
    let task = |from: u64| format!("nydus {} {from}-{}", blob(), from + PIECE);
    assert_eq!(
        tasks.collect::<Vec<_>>(),
        [(task(0), 100), (task(PIECE), 100)]
    );
    assert!(origin.requests().is_empty());
}

#[test]
fn a_blob_that_is_fetched_whole_is_one_task() {
    for (when, asked_for) in [(WholeBlob::Profile, true), (WholeBlob::FirstRead, false)] {
        let (origin, server) = (good(), good());
        let mut settings = through(&origin, &server);
        settings.mirrors[0].dragonfly.as_mut().unwrap().whole_blob = when;
        let backend = RegistryBackend::new(settings).unwrap();
        if asked_for {
            backend.want_whole(&blob());
        }
        let request = Fetch {
            blob: &blob(),
            range: 0..10,
            priority: Priority::Prefetch,
            served_by: None,
            direct: false,
            blob_len: Some(3 * PIECE),
        };
        (0..3).for_each(|_| drop(fetch_to_vec(&backend, &request, 10).unwrap()));
        let requests = server.requests();
        let whole = requests.iter().map(|it| it.header("x-dragonfly-prefetch"));
        let whole: Vec<_> = whole.map(Option::unwrap).collect();
        assert_eq!(whole, ["true", "false", "false"], "{when:?}");
        let task = "x-dragonfly-content-for-calculating-task-id";
        assert!(
            requests.iter().all(|it| it.header(task).is_none()),
            "{when:?}"
        );
    }
}

#[test]
fn the_password_of_a_proxy_is_not_shown() {
    let mirror = Mirror::new("http://user:hunter2@proxy:3128");
    let shown = format!("{mirror:?} {}", mirror.shown_url());
    assert!(
        shown.contains("proxy:3128") && !shown.contains(PASSWORD),
        "{shown}"
    );
}

#[test]
fn seeds_take_turns_and_stand_in_for_each_other() {
    let part = |request: &super::server::Request, _| {
        let range = request.range();
        let text = format!("bytes {}-{}/1000000000", range.start, range.end - 1);
        Reply::new(206, vec![7; range.len()]).with("content-range", &text)
    };
    let (origin, one, two) = (good(), Server::new(part), Server::new(part));
    let mut settings = through(&origin, &one);
    settings.mirrors.push(agent(&two));
    for mirror in &mut settings.mirrors {
        mirror.dragonfly.as_mut().unwrap().seed = true;
    }
    let backend = RegistryBackend::new(settings.clone()).unwrap();
    let read = |backend: &RegistryBackend| {
        for number in 0..20 {
            let start = number * PIECE;
            assert_eq!(fetch(backend, start..start + 5).unwrap(), [7; 5]);
        }
    };
    read(&backend);
    let counts = || [one.requests().len(), two.requests().len()];
    let first = counts();
    assert!(first.iter().all(|count| *count > 2), "{first:?}");
    // The same pieces go to the same seeds, for every node.
    read(&RegistryBackend::new(settings).unwrap());
    assert_eq!(counts(), first.map(|count| 2 * count));
    drop(two);
    read(&backend);
    assert!(origin.requests().is_empty());
}

#[test]
fn a_registrys_demand_for_a_login_comes_through() {
    let server = Server::new(|request, _| match request.header("authorization") {
        Some("Basic dTpodW50ZXIy") => Reply::range(request, &data()),
        _ => error_of("backend", 401).with("www-authenticate", "Basic realm=\"x\""),
    });
    let origin = good();
    let mut settings = through(&origin, &server);
    settings.auth = basic(PASSWORD);
    expect(&RegistryBackend::new(settings).unwrap(), 0..10);
    assert!(origin.requests().is_empty());
}

#[test]
fn older_agents_send_parts_with_status_200() {
    let server = Server::new(|request, _| {
        let range = request.range();
        let text = format!("bytes {}-{}/300000", range.start, range.end - 1);
        Reply::ok(data()[range].to_vec()).with("content-range", &text)
    });
    let origin = good();
    expect(
        &RegistryBackend::new(through(&origin, &server)).unwrap(),
        100..2000,
    );
    assert!(origin.requests().is_empty());
}

#[test]
fn prefetch_does_not_fall_back_where_only_readers_may() {
    let failing = Arc::new(AtomicBool::new(true));
    let state = Arc::clone(&failing);
    let server = Server::new(move |request, _| match state.load(Ordering::Relaxed) {
        true => error_of("backend", 500),
        false => Reply::range(request, &data()),
    });
    let origin = good();
    let mut settings = through(&origin, &server);
    settings.retry.retries = 2;
    settings.fallback.who = WhoFallsBack::OnDemand;
    let backend = RegistryBackend::new(settings.clone()).unwrap();
    let error = prefetch(&backend, 0..10).unwrap_err();
    let text = answer::chain(&error);
    assert!(
        text.contains("no mirror delivers") && text.contains("registry, seen"),
        "{text}"
    );
    assert!(origin.requests().is_empty());
    expect(&backend, 0..10);
    assert_eq!(origin.requests().len(), 1);

    settings.fallback.who = WhoFallsBack::Never;
    settings.retry.retries = 20;
    let backend = RegistryBackend::new(settings).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            failing.store(false, Ordering::Relaxed);
        });
        expect(&backend, 0..10);
    });
    assert_eq!(origin.requests().len(), 1);
}

#[test]
fn the_way_around_has_a_limit() {
    let origin = good();
    let server = Server::new(|_, _| error_of("backend", 503));
    let mut settings = through(&origin, &server);
    settings.fallback = Fallback {
        who: WhoFallsBack::Always,
        rate: 10,
        burst: 2,
    };
    let backend = RegistryBackend::new(settings).unwrap();
    let start = Instant::now();
    (0..6).for_each(|_| expect(&backend, 0..10));
    assert!(start.elapsed() >= Duration::from_millis(390));
}

#[test]
fn a_silent_agent_holds_up_nobody_for_long() {
    let silent = Arc::new(AtomicBool::new(true));
    let state = Arc::clone(&silent);
    let server = Server::new(move |request, _| {
        while state.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
        Reply::range(request, &data())
    });
    let origin = good();
    let mut settings = through(&origin, &server);
    settings.timeouts.read = Duration::from_secs(60);
    let (backend, metrics) = counted(settings);
    let start = Instant::now();
    // More than may be asked for twice: some wait until the agent is found to be dead.
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| expect(&backend, 0..300_000));
        }
    });
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    let start = Instant::now();
    (0..10).for_each(|_| expect(&backend, 0..1000));
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(metrics.hedges.load(Ordering::Relaxed) > 3);
    silent.store(false, Ordering::Relaxed);
    until_back(&backend, &origin);
}

#[test]
fn what_a_slow_agent_fetches_is_not_given_up() {
    let delivered = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&delivered);
    let server = Server::new(move |request, _| {
        if request.path == "/v2/" {
            return Reply::ok(Vec::new());
        }
        std::thread::sleep(Duration::from_millis(2500));
        count.fetch_add(1, Ordering::Relaxed);
        Reply::range(request, &data())
    });
    let origin = good();
    let mut settings = through(&origin, &server);
    settings.timeouts.read = Duration::from_secs(20);
    let (backend, metrics) = counted(settings);
    let start = Instant::now();
    expect(&backend, 0..1000);
    assert!(start.elapsed() < Duration::from_millis(2400));
    assert_eq!(metrics.hedges_won.load(Ordering::Relaxed), 1);
    // It goes on, and counts as a success.
    let deadline = Instant::now() + Duration::from_secs(20);
    while metrics.mirror_bytes.load(Ordering::Relaxed) < 1000 {
        assert!(Instant::now() < deadline, "the agent's answer was not read");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(delivered.load(Ordering::Relaxed), 1);
    assert_eq!(metrics.mirror_failures.load(Ordering::Relaxed), 0);
}

#[test]
fn an_agent_that_was_left_alone_is_asked_when_the_registry_is_gone() {
    let failing = Arc::new(AtomicBool::new(true));
    let state = Arc::clone(&failing);
    let server = Server::new(move |request, _| match state.load(Ordering::Relaxed) {
        true => error_of("dfdaemon", 500),
        false => Reply::range(request, &data()),
    });
    let origin = good();
    let mut settings = through(&origin, &server);
    settings.mirrors[0].health_check_interval = Duration::from_secs(3600);
    let backend = RegistryBackend::new(settings).unwrap();
    (0..3).for_each(|_| expect(&backend, 0..10));
    failing.store(false, Ordering::Relaxed);
    let asked = server.requests().len();
    expect(&backend, 0..10);
    assert_eq!(server.requests().len(), asked, "it is left alone");
    drop(origin);
    expect(&backend, 0..10);
    assert!(server.requests().len() > asked);
}

#[test]
fn parts_that_were_wrong_are_not_asked_for_again() {
    let (origin, server) = (good(), good());
    let (backend, metrics) = counted(through(&origin, &server));
    let served_by = ServedBy::default();
    let request = Fetch {
        blob: &blob(),
        range: 0..1000,
        priority: Priority::OnDemand,
        served_by: Some(&served_by),
        direct: false,
        blob_len: None,
    };
    fetch_to_vec(&backend, &request, 1000).unwrap();
    assert!(served_by.is_second_hand());
    let direct = Fetch {
        direct: true,
        ..request
    };
    let served_directly = ServedBy::default();
    let direct = Fetch {
        served_by: Some(&served_directly),
        ..direct
    };
    fetch_to_vec(&backend, &direct, 1000).unwrap();
    assert!(!served_directly.is_second_hand());
    assert_eq!((server.requests().len(), origin.requests().len()), (1, 1));

    backend.distrust(&blob(), &(0..1000), &served_by);
    let deadline = Instant::now() + Duration::from_secs(10);
    while metrics.mirror_wrong_bytes.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    expect(&backend, 5..10);
    assert_eq!((server.requests().len(), origin.requests().len()), (1, 2));
}

#[test]
fn a_forward_proxy_is_told_whom_to_ask() {
    let origin = good();
    let proxy = good();
    let mut settings = through(&origin, &proxy);
    settings.host = "registry.example".to_owned();
    settings.mirrors[0].upstream = Upstream::Proxy { plain: true };
    settings.scheme = Scheme::Https;
    settings.fallback.who = WhoFallsBack::Never;
    expect(&RegistryBackend::new(settings).unwrap(), 0..10);
    let requests = proxy.requests();
    let path = format!(
        "http://registry.example/v2/library/demo/blobs/sha256:{}",
        blob()
    );
    assert_eq!(requests[0].path, path);
    assert_eq!(requests[0].header("x-dragonfly-use-p2p"), Some("true"));
}

#[test]
fn a_mirror_may_be_told_the_registry_by_a_query() {
    let (origin, server) = (good(), good());
    let mut settings = through(&origin, &server);
    settings.mirrors[0].upstream = Upstream::Query;
    expect(&RegistryBackend::new(settings).unwrap(), 0..10);
    let path = &server.requests()[0].path;
    let host = origin.host().replace(':', "%3A");
    assert!(path.ends_with(&format!("?ns={host}")), "{path}");
}
