mod credentials;
mod dragonfly;
mod mirrors;
mod server;

use std::time::{Duration, Instant};

use server::{Reply, Server};

use super::*;
use crate::backend::Stop;
use crate::backend::{Priority, fetch_to_vec};
use crate::codec::as_u64;
use crate::sync::{AtomicU64, Ordering, lock};

const PASSWORD: &str = "hunter2";

fn blob() -> BlobId {
    BlobId::new(&"ab".repeat(32)).unwrap()
}

fn data() -> Vec<u8> {
    (0..300_000_u32)
        .map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

fn config(server: &Server) -> RegistryConfig {
    let mut config = RegistryConfig::new(&server.host(), "library/demo");
    config.scheme = Scheme::Http;
    config.timeouts = Timeouts {
        connect: Duration::from_secs(2),
        read: Duration::from_millis(1000),
        total: Duration::from_secs(20),
    };
    config.retry.first_delay = Duration::from_millis(5);
    config
}

fn backend(server: &Server) -> RegistryBackend {
    RegistryBackend::new(config(server)).unwrap()
}

fn fetch(backend: &RegistryBackend, range: std::ops::Range<u64>) -> Result<Vec<u8>, BackendError> {
    let request = Fetch {
        blob: &blob(),
        range,
        priority: Priority::OnDemand,
        served_by: None,
        direct: false,
        blob_len: None,
    };
    fetch_to_vec(backend, &request, 1 << 30)
}

fn expect(backend: &RegistryBackend, range: std::ops::Range<usize>) {
    let asked = as_u64(range.start)..as_u64(range.end);
    let got = fetch(backend, asked).unwrap_or_else(|error| panic!("{}", answer::chain(&error)));
    assert!(got == data()[range]);
}

/// The innermost error behind "gave up".
fn cause(error: &BackendError) -> &BackendError {
    match error {
        BackendError::GaveUp { source, .. } => source,
        error => error,
    }
}

#[test]
fn a_range_is_asked_for_and_delivered() {
    let server = Server::new(|request, _| Reply::range(request, &data()));
    let backend = backend(&server);
    expect(&backend, 1000..200_000);
    expect(&backend, 0..1);
    expect(&backend, 299_999..300_000);
    let requests = server.requests();
    let path = format!("/v2/library/demo/blobs/sha256:{}", blob());
    assert!(requests.iter().all(|r| r.method == "GET" && r.path == path));
    assert_eq!(requests[0].header("range"), Some("bytes=1000-199999"));
    assert_eq!(backend.size(&blob()).unwrap(), 300_000);
}

#[test]
fn a_server_may_ignore_ranges() {
    let server = Server::new(|_, _| Reply::ok(data()));
    expect(&backend(&server), 100_000..100_010);
    let chunked = Server::new(|_, _| Reply::ok(data()).without("content-length"));
    expect(&backend(&chunked), 100_000..300_000);
    // But not be too short.
    let short = Server::new(|_, _| Reply::ok(data()[..1000].to_vec()));
    let error = fetch(&backend(&short), 500..2000).unwrap_err();
    assert!(matches!(error, BackendError::Short { .. }), "{error}");
    assert_eq!(short.requests().len(), 1);
}

#[test]
fn another_range_is_an_error_and_more_bytes_are_cut() {
    for wrong in ["bytes 5-14/300000", "bytes 10-29/300000", "nonsense"] {
        let server = Server::new(move |_, _| {
            Reply::new(206, data()[10..20].to_vec()).with("content-range", wrong)
        });
        let mut config = config(&server);
        config.retry.retries = 1;
        let error = fetch(&RegistryBackend::new(config).unwrap(), 10..20).unwrap_err();
        assert!(
            matches!(cause(&error), BackendError::WrongRange { .. }),
            "{error}"
        );
        assert_eq!(server.requests().len(), 2);
    }
    let server = Server::new(|_, _| {
        Reply::new(206, data()[10..900].to_vec()).with("content-range", "bytes 10-19/300000")
    });
    expect(&backend(&server), 10..20);
    // Less than asked is fine: the rest is asked for.
    let server = Server::new(|request, _| {
        let range = request.range();
        Reply::part(&data(), range.start..range.end.min(range.start + 50_000))
    });
    expect(&backend(&server), 0..300_000);
    assert_eq!(server.requests().len(), 6);
}

#[test]
fn a_broken_transfer_is_resumed_where_it_broke() {
    for stall in [false, true] {
        let server = Server::new(move |request, number| {
            let reply = Reply::range(request, &data());
            match number {
                0 | 1 => reply.cut(90_000, stall),
                _ => reply,
            }
        });
        let metrics = Arc::new(Metrics::default());
        let backend = RegistryBackend::with_metrics(config(&server), Arc::clone(&metrics)).unwrap();
        expect(&backend, 0..300_000);
        let starts: Vec<_> = server.requests().iter().map(|r| r.range().start).collect();
        assert_eq!(starts, [0, 90_000, 180_000]);
        assert_eq!(metrics.retries.load(Ordering::Relaxed), 2);
    }
}

#[test]
fn a_server_in_trouble_is_asked_again_later() {
    for status in [429, 500, 502, 503, 504] {
        let server = Server::new(move |request, number| match number {
            0 | 1 => Reply::new(status, b"wait".to_vec()),
            _ => Reply::range(request, &data()),
        });
        expect(&backend(&server), 5..5000);
        assert_eq!(server.requests().len(), 3);
    }
    // For as long as it wishes, within limits.
    let server = Server::new(|request, number| match number {
        0 => Reply::new(429, Vec::new()).with("retry-after", "1"),
        1 => Reply::new(503, Vec::new()).with("retry-after", "86400"),
        _ => Reply::range(request, &data()),
    });
    let mut config = config(&server);
    config.retry.max_retry_after = Duration::from_millis(1200);
    let start = Instant::now();
    expect(&RegistryBackend::new(config).unwrap(), 5..5000);
    let elapsed = start.elapsed();
    assert!((2.2..15.0).contains(&elapsed.as_secs_f64()), "{elapsed:?}");
}

#[test]
fn a_server_that_asks_for_a_pause_is_asked_by_nobody() {
    let first = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&first);
    let began = Instant::now();
    let server = Server::new(move |request, number| match number {
        0 => Reply::new(429, Vec::new()).with("retry-after", "1"),
        _ => {
            let now = u64::try_from(began.elapsed().as_millis()).unwrap();
            let _ = seen.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
            Reply::range(request, &data())
        }
    });
    let backend = backend(&server);
    std::thread::scope(|scope| {
        scope.spawn(|| expect(&backend, 0..5000));
        while server.requests().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        // The answer is on its way.
        std::thread::sleep(Duration::from_millis(300));
        expect(&backend, 5000..6000);
    });
    assert_eq!(server.requests().len(), 3);
    let first = first.load(Ordering::SeqCst);
    assert!(first >= 990, "asked again after {first} ms");
}

#[test]
fn it_gives_up_after_the_limit_and_says_why() {
    let server = Server::new(|_, _| Reply::new(500, b"out of\x1b[2J luck".to_vec()));
    let mut limited = config(&server);
    limited.retry.retries = 2;
    let error = fetch(&RegistryBackend::new(limited).unwrap(), 0..10).unwrap_err();
    assert!(
        matches!(error, BackendError::GaveUp { attempts: 3, .. }),
        "{error}"
    );
    let text = cause(&error).to_string();
    assert!(
        text.contains("500") && text.contains("out of [2J luck"),
        "{text}"
    );
    assert!(
        text.contains(&format!("http://{}/v2/library/demo", server.host())),
        "{text}"
    );
    // A server that accepts and then says nothing, and one that is not there.
    let silent = Server::new(|_, _| Reply::silence());
    let mut limited = config(&silent);
    limited.timeouts.connect = Duration::from_millis(50);
    limited.timeouts.read = Duration::from_millis(50);
    limited.timeouts.total = Duration::from_millis(300);
    let start = Instant::now();
    let error = fetch(&RegistryBackend::new(limited.clone()).unwrap(), 0..10).unwrap_err();
    assert!(matches!(error, BackendError::GaveUp { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
    limited.host = "127.0.0.1:1".to_owned();
    let error = fetch(&RegistryBackend::new(limited).unwrap(), 0..10).unwrap_err();
    assert!(
        matches!(cause(&error), BackendError::Transport { .. }),
        "{error}"
    );
}

#[test]
fn some_answers_are_final() {
    for status in [400, 403, 404, 410, 416] {
        let server = Server::new(move |_, _| {
            let body = br#"{"errors":[{"code":"BLOB_UNKNOWN","message":"never heard of it"}]}"#;
            Reply::new(status, body.to_vec())
        });
        let error = fetch(&backend(&server), 0..10).unwrap_err();
        let BackendError::Status {
            status: got,
            detail,
            ..
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!(
            (*got, detail.as_str()),
            (status, ": BLOB_UNKNOWN never heard of it")
        );
        assert_eq!(server.requests().len(), 1);
    }
}

/// A registry that wants the token which its own token service hands out.
fn token_server(expires_in: u64) -> Server {
    Server::new(move |request, number| {
        if request.path.starts_with("/token") {
            let ok = request.header("authorization") == Some("Basic dTpodW50ZXIy")
                && request
                    .path
                    .contains("scope=repository%3Alibrary%2Fdemo%3Apull")
                && request.path.contains("service=here");
            if !ok {
                return Reply::new(401, Vec::new());
            }
            let body = format!(r#"{{"token":"t{number}","expires_in":{expires_in}}}"#);
            return Reply::ok(body.into_bytes());
        }
        match request.header("authorization") {
            Some(header) if header.starts_with("Bearer t") => Reply::range(request, &data()),
            _ => {
                let challenge = format!(
                    r#"Bearer realm="http://{}/token",service="here",scope="repository:library/demo:pull""#,
                    request.header("host").unwrap_or_default()
                );
                Reply::new(401, Vec::new()).with("www-authenticate", &challenge)
            }
        }
    })
}

fn basic(password: &str) -> Credentials {
    Credentials::Basic {
        username: "u".to_owned(),
        password: password.to_owned(),
    }
}

#[test]
fn tokens_are_fetched_once_and_renewed_before_they_expire() {
    let server = token_server(300);
    let mut with_password = config(&server);
    with_password.auth = basic(PASSWORD);
    let backend = RegistryBackend::new(with_password.clone()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| expect(&backend, 0..1000));
        }
    });
    expect(&backend, 1000..2000);
    let tokens = server
        .requests()
        .iter()
        .filter(|r| r.path.starts_with("/token"))
        .count();
    assert_eq!(tokens, 1);

    let server = token_server(1);
    with_password.host = server.host();
    let backend = RegistryBackend::new(with_password.clone()).unwrap();
    expect(&backend, 0..1000);
    std::thread::sleep(Duration::from_millis(700));
    expect(&backend, 0..1000);
    let paths: Vec<_> = server
        .requests()
        .iter()
        .map(|r| r.path.starts_with("/token"))
        .collect();
    assert_eq!(
        paths,
        [false, true, false, true, false],
        "no request is wasted on an old token"
    );

    with_password.auth = basic("sesame");
    let error = fetch(&RegistryBackend::new(with_password).unwrap(), 0..10).unwrap_err();
    assert!(matches!(error, BackendError::Auth { .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("sesame"));
}

#[test]
fn a_revoked_token_is_replaced() {
    let server =
        Server::new(
            |request, number| match (request.path.starts_with("/token"), number) {
                (true, _) => Reply::ok(format!(r#"{{"token":"t{number}"}}"#).into_bytes()),
                // The token of the beginning is refused from here on.
                (false, number)
                    if number < 3 || request.header("authorization") != Some("Bearer t1") =>
                {
                    match request.header("authorization") {
                        Some(_) => Reply::range(request, &data()),
                        None => challenge(request),
                    }
                }
                _ => challenge(request),
            },
        );
    fn challenge(request: &server::Request) -> Reply {
        let realm = format!(
            r#"Bearer realm="http://{}/token""#,
            request.header("host").unwrap()
        );
        Reply::new(401, Vec::new()).with("www-authenticate", &realm)
    }
    let backend = backend(&server);
    expect(&backend, 0..10);
    expect(&backend, 0..10);
    assert_eq!(
        server
            .requests()
            .iter()
            .filter(|r| r.path.starts_with("/token"))
            .count(),
        2
    );
}

#[test]
fn passwords_go_only_where_they_are_asked_for() {
    let server = Server::new(|request, _| match request.header("authorization") {
        Some("Basic dTpodW50ZXIy") => Reply::range(request, &data()),
        _ => Reply::new(401, Vec::new()).with("www-authenticate", "Basic realm=\"x\""),
    });
    let mut config = config(&server);
    config.auth = basic(PASSWORD);
    let good = RegistryBackend::new(config.clone()).unwrap();
    expect(&good, 0..10);
    expect(&good, 0..10);
    assert_eq!(server.requests().len(), 3, "asked once");
    assert!(server.requests()[0].header("authorization").is_none());
    for auth in [
        Credentials::Anonymous,
        basic("sesame"),
        Credentials::Bearer("sesame".into()),
    ] {
        config.auth = auth;
        assert!(!format!("{config:?}").contains("sesame"));
        let before = server.requests().len();
        let error = fetch(&RegistryBackend::new(config.clone()).unwrap(), 0..10).unwrap_err();
        assert!(matches!(error, BackendError::Auth { .. }), "{error}");
        assert!(!format!("{error} {error:?}").contains("sesame"));
        assert!(server.requests().len() - before <= 2);
    }
}

#[test]
fn redirects_get_no_credentials_are_remembered_and_renewed() {
    let store = Server::new(|request, number| match number {
        // The signature expires twice: with 403, and with an odd one.
        2 => Reply::new(403, b"<Error><Code>AccessDenied</Code></Error>".to_vec()),
        4 => Reply::new(400, b"<Error><Code>ExpiredToken</Code></Error>".to_vec()),
        _ => Reply::range(request, &data()),
    });
    let host = store.host();
    let registry = Server::new(
        move |request, number| match request.header("authorization") {
            None => Reply::new(401, Vec::new()).with("www-authenticate", "Basic realm=\"x\""),
            Some(_) => {
                let status = [301, 302, 303, 307, 308][number % 5];
                let target = format!("http://{host}/object?X-Signature=secret{number}");
                Reply::new(status, Vec::new()).with("location", &target)
            }
        },
    );
    let mut config = config(&registry);
    config.auth = basic(PASSWORD);
    config.headers = vec![("x-team".to_owned(), "blue".to_owned())];
    let backend = RegistryBackend::new(config).unwrap();
    for at in 0..5 {
        expect(&backend, at * 1000..at * 1000 + 999);
    }
    assert_eq!(registry.requests().len(), 2 + 2, "the target is remembered");
    assert!(
        registry
            .requests()
            .iter()
            .all(|r| r.header("x-team") == Some("blue"))
    );
    assert_eq!(store.requests().len(), 7);
    for request in store.requests() {
        assert!(request.path.starts_with("/object?X-Signature=secret"));
        assert!(request.header("authorization").is_none() && request.header("x-team").is_none());
    }
}

#[test]
fn errors_behind_a_redirect_hide_the_signature() {
    let store = Server::new(|_, _| {
        let body = b"<Error><Code>NoSuchKey</Code><Key>secret</Key></Error>".to_vec();
        Reply::new(404, body)
    });
    let host = store.host();
    let registry = Server::new(move |_, _| {
        let target = format!("http://user:secret@{host}/object?sig=secret");
        Reply::new(307, Vec::new()).with("location", &target)
    });
    let error = fetch(&backend(&registry), 0..10).unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(
        text.contains("NoSuchKey") && !text.contains("secret"),
        "{text}"
    );
    drop(store);
    let mut config = config(&registry);
    config.retry.retries = 1;
    let error = fetch(&RegistryBackend::new(config).unwrap(), 0..10).unwrap_err();
    let text = format!("{} {error:?}", answer::chain(&error));
    assert!(!text.contains("secret"), "{text}");
    let looping =
        Server::new(|request, _| Reply::new(307, Vec::new()).with("location", &request.path));
    let error = fetch(&backend(&looping), 0..10).unwrap_err();
    assert!(
        matches!(error, BackendError::Status { status: 307, .. }),
        "{error}"
    );
}

#[test]
fn the_size_is_known_even_if_head_is_refused() {
    let server = Server::new(|request, _| match request.method.as_str() {
        "HEAD" => Reply::ok(Vec::new())
            .with("content-length", "300000")
            .without("content-length"),
        _ => Reply::range(request, &data()),
    });
    assert_eq!(backend(&server).size(&blob()).unwrap(), 300_000);
    let server = Server::new(|request, _| match request.method.as_str() {
        "HEAD" => Reply::new(405, Vec::new()),
        _ => Reply::range(request, &data()),
    });
    assert_eq!(backend(&server).size(&blob()).unwrap(), 300_000);
    let server = Server::new(|_, _| Reply::new(404, Vec::new()));
    let error = backend(&server).size(&blob()).unwrap_err();
    assert!(
        matches!(error, BackendError::Status { status: 404, .. }),
        "{error}"
    );
}

#[test]
fn the_receiver_may_stop() {
    let server = Server::new(|request, _| Reply::range(request, &data()));
    let backend = backend(&server);
    let request = Fetch {
        blob: &blob(),
        range: 0..300_000,
        priority: Priority::Prefetch,
        served_by: None,
        direct: false,
        blob_len: None,
    };
    let mut pieces = 0;
    let result = backend.fetch(&request, &mut |_| {
        pieces += 1;
        Err(Stop)
    });
    assert!(matches!(result, Err(BackendError::Stopped)));
    assert_eq!(pieces, 1);
}

#[test]
fn settings_that_cannot_work_are_refused() {
    for (host, repo) in [
        ("", "a"),
        ("host/path", "a"),
        ("user@host", "a"),
        ("host", ""),
        ("host", "a/../b"),
        ("host", "a//b"),
        ("host", "a?b"),
        ("host:99999", "a"),
    ] {
        let error = RegistryBackend::new(RegistryConfig::new(host, repo)).unwrap_err();
        assert!(
            matches!(error, BackendError::Config(_)),
            "{host} {repo}: {error}"
        );
    }
    for host in ["[::1]:5000", "registry.example.com", "10.0.0.1:443"] {
        RegistryBackend::new(RegistryConfig::new(host, "a/b-c_d.e")).unwrap();
    }
    let mut config = RegistryConfig::new("host", "repo");
    config.headers = vec![("x".to_owned(), "secret\n".to_owned())];
    let error = RegistryBackend::new(config.clone()).unwrap_err();
    assert!(!error.to_string().contains("secret"), "{error}");
    config.headers.clear();
    config.client_certificate = Some(ClientCertificate {
        certificate: "/no/such/cert.pem".into(),
        key: "/no/such/key.pem".into(),
    });
    let error = RegistryBackend::new(config.clone()).unwrap_err();
    assert!(error.to_string().contains("/no/such/cert.pem"), "{error}");
    config.ca_files = vec!["/does/not/exist.pem".into()];
    let error = RegistryBackend::new(config).unwrap_err();
    assert!(error.to_string().contains("/does/not/exist.pem"), "{error}");
}

#[test]
fn a_server_that_brings_a_little_each_time_ends_at_the_deadline() {
    let server = Server::new(|request, _| Reply::range(request, &data()).cut(4096, false));
    let mut config = config(&server);
    config.timeouts.total = Duration::from_millis(500);
    config.retry.first_delay = Duration::from_millis(50);
    let start = Instant::now();
    let error = fetch(&RegistryBackend::new(config).unwrap(), 0..300_000).unwrap_err();
    let elapsed = start.elapsed();
    assert!(matches!(error, BackendError::GaveUp { .. }), "{error}");
    // One second more for the length of the range.
    assert!((0.4..3.0).contains(&elapsed.as_secs_f64()), "{elapsed:?}");
    assert!(server.requests().len() > 3);
}

#[test]
fn the_receiver_may_stop_while_nothing_comes() {
    let server = Server::new(|_, _| Reply::silence());
    let mut config = config(&server);
    config.timeouts.read = Duration::from_secs(10);
    let backend = RegistryBackend::new(config).unwrap();
    let request = Fetch {
        blob: &blob(),
        range: 0..300_000,
        priority: Priority::Prefetch,
        served_by: None,
        direct: false,
        blob_len: None,
    };
    let start = Instant::now();
    let result = backend.fetch(&request, &mut |piece| {
        assert!(piece.is_empty());
        if start.elapsed() > Duration::from_millis(300) {
            return Err(Stop);
        }
        Ok(())
    });
    assert!(matches!(result, Err(BackendError::Stopped)));
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_date_to_come_back_at_counts_from_the_date_of_the_server() {
    let server = Server::new(|request, number| match number {
        // Both long ago: only the difference matters.
        0 => Reply::new(503, Vec::new())
            .with("date", "Sun, 06 Nov 1994 08:49:37 GMT")
            .with("retry-after", "Sun, 06 Nov 1994 08:49:38 GMT"),
        _ => Reply::range(request, &data()),
    });
    let start = Instant::now();
    expect(&backend(&server), 0..10);
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_redirect_that_has_ended_is_not_tried() {
    let store = Server::new(|request, _| Reply::range(request, &data()));
    let host = store.host();
    let registry = Server::new(move |_, number| {
        // The first one ends in 2 s, and so is renewed after one.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let end = now.unwrap().as_secs() + if number == 0 { 2 } else { 600 };
        let target = format!("http://{host}/object?md5=a&expires={end}&number={number}");
        Reply::new(307, Vec::new()).with("location", &target)
    });
    let backend = backend(&registry);
    expect(&backend, 0..10);
    std::thread::sleep(Duration::from_millis(1100));
    expect(&backend, 0..10);
    expect(&backend, 0..10);
    assert_eq!(registry.requests().len(), 2);
    assert_eq!(store.requests().len(), 3, "none was refused");
}

#[test]
fn the_host_of_redirects_can_be_set() {
    let store = Server::new(|request, _| Reply::range(request, &data()));
    let registry = Server::new(move |_, _| {
        Reply::new(307, Vec::new()).with("location", "https://unreachable.invalid:1/object?a=b")
    });
    let mut config = config(&registry);
    config.redirect_host = Some(store.host());
    config.redirect_scheme = Some(Scheme::Http);
    expect(&RegistryBackend::new(config).unwrap(), 0..10);
    assert_eq!(store.requests()[0].path, "/object?a=b");
}

#[test]
fn head_that_was_refused_is_not_tried_again() {
    let server = Server::new(|request, _| match request.method.as_str() {
        "HEAD" => Reply::new(405, Vec::new()),
        _ => Reply::range(request, &data()),
    });
    let backend = backend(&server);
    for _ in 0..3 {
        assert_eq!(backend.size(&blob()).unwrap(), 300_000);
    }
    let methods: Vec<_> = server.requests().iter().map(|r| r.method.clone()).collect();
    assert_eq!(methods, ["HEAD", "GET", "GET", "GET"]);
    assert_eq!(server.requests()[1].header("range"), Some("bytes=0-0"));
}

#[test]
fn addresses_of_version_6_work() {
    let store = Server::at("[::1]:0", |request, _| Reply::range(request, &data()));
    let host = store.host();
    let registry = Server::at("[::1]:0", move |_, _| {
        Reply::new(307, Vec::new()).with("location", &format!("http://{host}/object"))
    });
    assert!(registry.host().starts_with("[::1]:"));
    expect(&backend(&registry), 7..70_000);
    assert_eq!(store.requests().len(), 1);
}
