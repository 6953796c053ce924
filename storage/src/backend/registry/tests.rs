//! The backend against a small HTTP server that misbehaves as told.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_lossless,
    clippy::panic_in_result_fn,
    reason = "test data is small, and a test panics when it fails"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use super::*;
use crate::backend::{Priority, fetch_to_vec};

/// A request as the server saw it: target and headers in lower case.
#[derive(Clone, Debug)]
struct Seen {
    target: String,
    headers: HashMap<String, String>,
}

impl Seen {
    fn range(&self) -> Range<usize> {
        let (start, end) = self.headers["range"]
            .strip_prefix("bytes=")
            .unwrap()
            .split_once('-')
            .unwrap();
        start.parse().unwrap()..end.parse::<usize>().unwrap() + 1
    }
}

/// A server whose answers are a function of the request's number and content.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn start(answer: impl Fn(usize, &Seen) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (log, answer) = (seen.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let (log, answer) = (log.clone(), answer.clone());
                std::thread::spawn(move || serve(socket.unwrap(), &log, &*answer));
            }
        });
        Self { address, seen }
    }

    fn backend(&self) -> RegistryBackend {
        self.backend_as(Credentials::Anonymous)
    }

    fn backend_as(&self, credentials: Credentials) -> RegistryBackend {
        let config = RegistryConfig {
            read_timeout: Duration::from_millis(300),
            ..RegistryConfig::new("http", &self.address.to_string(), "some/repo", credentials)
        };
        RegistryBackend::new(&config).unwrap()
    }

    fn seen(&self) -> Vec<Seen> {
        lock(&self.seen).clone()
    }
}

fn serve(socket: TcpStream, log: &Mutex<Vec<Seen>>, answer: &dyn Fn(usize, &Seen) -> Vec<u8>) {
    let mut reader = BufReader::new(socket.try_clone().unwrap());
    let mut socket = socket;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let target = line.split(' ').nth(1).unwrap().to_owned();
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                break;
            };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        let seen = Seen { target, headers };
        let number = {
            let mut log = lock(log);
            log.push(seen.clone());
            log.len() - 1
        };
        let bytes = answer(number, &seen);
        // A client that has given up has closed the connection.
        if socket.write_all(&bytes).is_err() || bytes.ends_with(b"CLOSE") || bytes.is_empty() {
            return;
        }
        if bytes.starts_with(b"STALL") {
            std::thread::sleep(Duration::from_secs(2));
        }
        if !bytes
            .windows(16)
            .any(|w| w.eq_ignore_ascii_case(b"content-length: "))
        {
            return;
        }
        let body = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        let text = String::from_utf8_lossy(&bytes[..body]).to_lowercase();
        let length = text
            .split("content-length: ")
            .nth(1)
            .unwrap()
            .split('\r')
            .next()
            .unwrap();
        if bytes.len() - body < length.parse().unwrap() {
            return; // the body was cut short: close
        }
    }
}

fn data() -> Vec<u8> {
    (0..100_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn status(line: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 {line}\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// The right answer.
fn partial(seen: &Seen) -> Vec<u8> {
    let (data, range) = (data(), seen.range());
    let header = format!(
        "Content-Range: bytes {}-{}/{}\r\n",
        range.start,
        range.end - 1,
        data.len()
    );
    status("206 Partial Content", &header, &data[range])
}

fn blob() -> BlobId {
    BlobId::new(&"ab".repeat(32)).unwrap()
}

fn fetch(backend: &RegistryBackend, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
    let blob = blob();
    fetch_to_vec(
        backend,
        &Fetch {
            blob: &blob,
            range,
            priority: Priority::OnDemand,
        },
        1 << 20,
    )
}

#[track_caller]
fn assert_fetches(server: &Server) {
    assert!(fetch(&server.backend(), 1000..90_000).unwrap() == data()[1000..90_000]);
}

#[test]
fn asks_for_the_range_of_the_blob() {
    let server = Server::start(|_, seen| partial(seen));
    assert_fetches(&server);
    let seen = server.seen();
    assert_eq!(
        seen[0].target,
        format!("/v2/some/repo/blobs/sha256:{}", blob())
    );
    assert_eq!(seen[0].range(), 1000..90_000);
    assert_eq!(server.backend().size(&blob()).unwrap(), 100_000);
}

#[test]
fn a_server_that_ignores_ranges_is_cut_to_size() {
    let server = Server::start(|_, _| status("200 OK", "", &data()));
    assert_fetches(&server);
    assert_eq!(server.backend().size(&blob()).unwrap(), 100_000);
}

#[test]
fn a_wrong_content_range_is_not_believed() {
    let server = Server::start(|number, seen| match number {
        0 => status(
            "206 Partial Content",
            "Content-Range: bytes 0-88999/100000\r\n",
            &data()[..89_000],
        ),
        1 => status("206 Partial Content", "", &data()[..89_000]),
        _ => partial(seen),
    });
    assert_fetches(&server);
}

#[test]
fn a_broken_transfer_is_resumed_where_it_broke() {
    let server = Server::start(|number, seen| {
        let whole = partial(seen);
        match number {
            0..3 => whole[..whole.len() / 2].to_vec(),
            _ => whole,
        }
    });
    assert_fetches(&server);
    let starts: Vec<usize> = server
        .seen()
        .iter()
        .map(|seen| seen.range().start)
        .collect();
    assert!(
        starts.is_sorted() && starts[0] < starts[1] && starts[1] < starts[2],
        "{starts:?}"
    );
}

#[test]
fn a_stalled_answer_and_a_closed_connection_are_tried_again() {
    let server = Server::start(|number, seen| match number {
        0 => b"STALL".to_vec(),
        1 => Vec::new(),
        _ => partial(seen),
    });
    assert_fetches(&server);
}

#[test]
fn patience_is_as_long_as_the_server_asks() {
    let server = Server::start(|number, seen| match number {
        0 => status("429 Too Many Requests", "Retry-After: 1\r\n", b""),
        1 => status("503 Service Unavailable", "", b"busy"),
        _ => partial(seen),
    });
    let start = Instant::now();
    assert_fetches(&server);
    assert!(
        start.elapsed() >= Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn what_will_not_pass_is_an_error_at_once() {
    for (line, code) in [
        ("404 Not Found", 404),
        ("416 Range Not Satisfiable", 416),
        ("403 Forbidden", 403),
    ] {
        let server = Server::start(move |_, _| status(line, "", b"BLOB_UNKNOWN\n\x1b[31m"));
        let error = fetch(&server.backend(), 0..10).unwrap_err();
        let BackendError::Status { status, url, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(*status, code);
        assert!(url.ends_with(&format!("/v2/some/repo/blobs/sha256:{}", blob())));
        assert!(error.to_string().ends_with("BLOB_UNKNOWN[31m"), "{error}");
        assert_eq!(server.seen().len(), 1);
    }
}

#[test]
fn gives_up_after_the_allowed_number_of_attempts() {
    let server = Server::start(|_, _| status("500 Internal Server Error", "", b""));
    let error = fetch(&server.backend(), 0..10).unwrap_err();
    assert!(
        matches!(error, BackendError::GaveUp { attempts: 5, .. }),
        "{error}"
    );
}

#[test]
fn a_bearer_token_is_obtained_once_and_sent_to_the_registry_only() {
    let elsewhere = Server::start(|_, seen| partial(seen));
    let target = format!(
        "Location: http://localhost:{}/signed?sig=s\r\n",
        elsewhere.address.port()
    );
    let registry = Server::start(move |_, seen| {
        if seen.target.starts_with("/token") {
            return status("200 OK", "", b"{\"token\":\"T\",\"expires_in\":300}");
        }
        if seen.headers.get("authorization").map(String::as_str) == Some("Bearer T") {
            return status("307 Temporary Redirect", &target, b"");
        }
        let realm = format!("http://{}/token", seen.headers["host"]);
        let challenge = format!(
            "WWW-Authenticate: Bearer realm=\"{realm}\",service=\"s\",scope=\"repository:some/repo:pull\"\r\n"
        );
        status("401 Unauthorized", &challenge, b"")
    });
    let basic = Credentials::Basic {
        username: "u".into(),
        password: "p".into(),
    };
    let backend = registry.backend_as(basic);
    for _ in 0..3 {
        assert!(fetch(&backend, 5..500).unwrap() == data()[5..500]);
    }
    let targets: Vec<String> = registry
        .seen()
        .iter()
        .map(|seen| seen.target.clone())
        .collect();
    assert_eq!(
        targets.len(),
        3,
        "blob, token, blob; then the redirect is known: {targets:?}"
    );
    assert!(
        targets[1].contains("service=s")
            && targets[1].contains("scope=repository%3Asome%2Frepo%3Apull")
    );
    assert_eq!(registry.seen()[1].headers["authorization"], "Basic dTpw");
    assert!(
        elsewhere
            .seen()
            .iter()
            .all(|seen| !seen.headers.contains_key("authorization"))
    );
}

#[test]
fn an_expired_redirect_is_renewed() {
    let elsewhere = Server::start(|number, seen| match number {
        1 => status("403 Forbidden", "", b"expired"),
        _ => partial(seen),
    });
    let target = format!(
        "Location: http://localhost:{}/signed\r\n",
        elsewhere.address.port()
    );
    let registry = Server::start(move |_, _| status("307 Temporary Redirect", &target, b""));
    let backend = registry.backend();
    fetch(&backend, 0..10).unwrap();
    assert!(fetch(&backend, 5..500).unwrap() == data()[5..500]);
    assert_eq!(registry.seen().len(), 2);
}

#[test]
fn basic_credentials_are_sent_when_asked_for_and_refusals_say_so() {
    let server =
        Server::start(
            |_, seen| match seen.headers.get("authorization").map(String::as_str) {
                Some("Basic dTpw") => partial(seen),
                _ => status(
                    "401 Unauthorized",
                    "WWW-Authenticate: Basic realm=\"r\"\r\n",
                    b"",
                ),
            },
        );
    let user = |password: &str| Credentials::Basic {
        username: "u".into(),
        password: password.into(),
    };
    fetch(&server.backend_as(user("p")), 0..10).unwrap();
    for wrong in [user("secret"), Credentials::Anonymous] {
        let error = fetch(&server.backend_as(wrong), 0..10).unwrap_err();
        assert!(matches!(error, BackendError::Auth { .. }), "{error}");
        assert!(!format!("{error} {error:?}").contains("secret"));
    }
    let backend = server.backend_as(user("wrong"));
    fetch(&backend, 0..10).unwrap_err();
    backend.set_credentials(user("p"));
    fetch(&backend, 0..10).unwrap();
}

#[test]
fn redirects_do_not_go_round_for_ever() {
    let server = Server::start(|_, _| status("302 Found", "Location: /again\r\n", b""));
    let error = fetch(&server.backend(), 0..10).unwrap_err();
    assert!(
        matches!(error, BackendError::Status { status: 302, .. }),
        "{error}"
    );
}
