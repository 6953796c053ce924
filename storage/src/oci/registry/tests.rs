//! The client against a server that misbehaves on purpose.
//!
//! The server answers every request with what a closure says, one connection per
//! request, and records what it was asked.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Mutex, PoisonError};

use super::*;
use crate::oci::credentials::Credentials;
use crate::oci::manifest::{DOCKER_INDEX, OCI_LAYER_GZIP};
use crate::oci::reference::ImageRef;
use crate::oci::{BlobSource, Images};

/// What a client asked.
#[derive(Clone, Debug, Default)]
struct Request {
    method: String,
    path: String,
    range: Option<String>,
    authorization: Option<String>,
    body: Vec<u8>,
}

/// What it is told. `cut` closes the connection after that many bytes of the body.
#[derive(Clone, Debug, Default)]
struct Reply {
    status: u16,
    headers: Vec<String>,
    body: Vec<u8>,
    cut: Option<usize>,
}

impl Reply {
    fn ok(body: &[u8]) -> Self {
        Self {
            status: 200,
            body: body.to_vec(),
            ..Self::default()
        }
    }

    fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    fn header(mut self, header: &str) -> Self {
        self.headers.push(header.to_owned());
        self
    }
}

/// A server for one test; its thread ends with the process.
struct Server {
    host: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// `answer` gets the request and how many requests for the same path came before.
    /// `GET /v2/` is answered with 200 unless `answer` sees it as well.
    fn start(answer: impl Fn(&Request, usize, &str) -> Option<Reply> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::<Request>::new()));
        let (seen, own) = (Arc::clone(&requests), host.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let Some(request) = read_request(&stream) else {
                    continue;
                };
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                let same =
                    |other: &&Request| other.path == request.path && other.method == request.method;
                let before = seen.iter().filter(same).count();
                let default = if request.path == "/v2/" {
                    Reply::ok(b"")
                } else {
                    Reply::status(404)
                };
                let reply = answer(&request, before, &own).unwrap_or(default);
                seen.push(request.clone());
                drop(seen);
                write_reply(&stream, &request, &reply);
            }
        });
        Self { host, requests }
    }

    async fn open(&self, rest: &str, credentials: Credentials) -> Registry {
        let ImageRef::Registry(name) = format!("{}/{rest}", self.host).parse().unwrap() else {
            panic!("a registry reference")
        };
        let access = Access {
            plain_http: false,
            credentials: Some(credentials),
        };
        Registry::open(&name, &access).await.unwrap()
    }

    fn requests(&self, method: &str) -> Vec<Request> {
        let requests = self.requests.lock().unwrap();
        requests
            .iter()
            .filter(|request| request.method == method)
            .cloned()
            .collect()
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let mut request = Request {
        method: words.next()?.to_owned(),
        path: words.next()?.to_owned(),
        ..Request::default()
    };
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(": ") else {
            break;
        };
        match name.to_lowercase().as_str() {
            "range" => request.range = Some(value.to_owned()),
            "authorization" => request.authorization = Some(value.to_owned()),
            "content-length" => length = value.parse().ok()?,
            _ => {}
        }
    }
    request.body.resize(length, 0);
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
}

fn write_reply(mut stream: &TcpStream, request: &Request, reply: &Reply) {
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    head += &format!("Content-Length: {}\r\n", reply.body.len());
    for header in &reply.headers {
        head += &format!("{header}\r\n");
    }
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
    // The client may have gone already, which is its right.
    let _ = stream.write_all(format!("{head}\r\n").as_bytes());
    if request.method != "HEAD" {
        let _ = stream.write_all(body);
    }
}

/// Reads a blob to its end.
async fn download(registry: &Registry, descriptor: &Descriptor) -> Result<Vec<u8>, OciError> {
    let images = Images::Registry(registry.clone());
    Ok(images.small_blob(descriptor, 1 << 20).await?.to_vec())
}

fn content() -> Vec<u8> {
    (0..100_000_u32).flat_map(u32::to_le_bytes).collect()
}

fn start_of(range: Option<&String>) -> usize {
    let range = range
        .and_then(|range| range.strip_prefix("bytes="))
        .unwrap_or("0-");
    range.split('-').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    for ranges in [true, false] {
        let server = Server::start(move |request, before, _| {
            let start = if ranges {
                start_of(request.range.as_ref())
            } else {
                0
            };
            let body = content()[start..].to_vec();
            let status = if start > 0 { 206 } else { 200 };
            // Two connections break, the third one holds.
            let cut = (before < 2)
                .then_some(150_000 * (before + 1))
                .map(|cut| cut.min(body.len() - 1));
            request.path.contains("/blobs/").then_some(Reply {
                status,
                body,
                cut,
                ..Reply::default()
            })
        });
        let registry = server.open("a", Credentials::Anonymous).await;
        let descriptor = Descriptor::of(OCI_LAYER_GZIP, &content());
        assert!(download(&registry, &descriptor).await.unwrap() == content());
        let starts: Vec<_> = server
            .requests("GET")
            .iter()
            .filter(|request| request.path != "/v2/")
            .map(|request| start_of(request.range.as_ref()))
            .collect();
        assert_eq!((starts.len(), starts[0]), (3, 0), "ranges {ranges}");
        assert!(starts[1] > 0 && starts[2] > starts[1], "{starts:?}");
    }
}

#[tokio::test]
async fn content_that_is_wrong_or_missing_is_refused() {
    let good = content();
    let descriptor = Descriptor::of(OCI_LAYER_GZIP, &good);
    let mut wrong = good.clone();
    wrong[1234] ^= 1;
    let longer = [good.as_slice(), b"x"].concat();
    let shorter = good[..good.len() - 5].to_vec();
    for (index, body) in [wrong, longer, shorter].into_iter().enumerate() {
        let server = Server::start(
            move |request, _, _| match start_of(request.range.as_ref()) {
                0 => Some(Reply::ok(&body)),
                _ => Some(Reply::status(416)),
            },
        );
        let registry = server.open("a", Credentials::Anonymous).await;
        let error = download(&registry, &descriptor).await.unwrap_err();
        match index {
            0 => assert!(matches!(error, OciError::Digest { .. }), "{error}"),
            _ => assert!(matches!(error, OciError::Size { .. }), "{error}"),
        }
        assert!(
            error.to_string().contains(descriptor.digest.as_str()),
            "{error}"
        );
    }
    let empty = Descriptor::of(OCI_LAYER_GZIP, b"");
    let server = Server::start(|_, _, _| None);
    let registry = server.open("a", Credentials::Anonymous).await;
    assert_eq!(download(&registry, &empty).await.unwrap(), b"");
    let lie = Descriptor {
        size: 0,
        ..descriptor
    };
    assert!(matches!(
        download(&registry, &lie).await,
        Err(OciError::Digest { .. })
    ));
}

#[tokio::test]
async fn a_connection_that_always_breaks_ends_with_an_error() {
    let server = Server::start(|request, _, _| {
        let reply = Reply {
            cut: Some(0),
            ..Reply::ok(&content())
        };
        (request.path != "/v2/").then_some(reply)
    });
    let registry = server.open("a", Credentials::Anonymous).await;
    let error = download(&registry, &Descriptor::of(OCI_LAYER_GZIP, &content()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, OciError::Request { offset: 0, .. }),
        "{error}"
    );
}

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"manifests":[]}"#;

#[tokio::test]
async fn overload_passes_and_refusals_do_not() {
    for (status, requests) in [(429, 2), (500, 2), (503, 2), (403, 1), (404, 1), (400, 1)] {
        let server = Server::start(move |request, before, _| {
            let fails = before == 0;
            let reply = if fails {
                Reply::status(status)
            } else {
                Reply::ok(MANIFEST)
            };
            request.path.contains("/manifests/").then_some(reply)
        });
        let registry = server.open("a/b:c", Credentials::Anonymous).await;
        let result = registry.resolve().await;
        let sent = server
            .requests("GET")
            .iter()
            .filter(|request| request.path != "/v2/")
            .count();
        assert_eq!(sent, requests, "{status}");
        match (status, result) {
            (429 | 500 | 503, Ok((descriptor, bytes))) => {
                assert_eq!(
                    (bytes.as_ref(), descriptor.media_type.as_str()),
                    (MANIFEST, OCI_INDEX)
                );
            }
            (403, Err(OciError::Unauthorized { .. })) | (404, Err(OciError::NotFound { .. })) => {}
            (400, Err(OciError::Status { at, .. })) => assert!(at.ends_with("/v2/a/b/manifests/c")),
            (_, result) => panic!("{status}: {result:?}"),
        }
    }
}

#[tokio::test]
async fn overload_that_stays_is_reported() {
    let server = Server::start(|request, _, _| {
        (request.path != "/v2/").then_some(Reply {
            body: b"busy".to_vec(),
            ..Reply::status(500)
        })
    });
    let registry = server.open("a", Credentials::Anonymous).await;
    let error = registry.resolve().await.unwrap_err().to_string();
    assert!(
        error.contains("500: busy") && error.contains(&server.host),
        "{error}"
    );
}

#[tokio::test]
async fn manifests_are_bounded_and_checked() {
    let server = Server::start(|request, _, _| {
        let large = request.path.ends_with("large");
        let body = if large {
            vec![b' '; 5 << 20]
        } else {
            MANIFEST.to_vec()
        };
        request
            .path
            .contains("/manifests/")
            .then_some(Reply::ok(&body))
    });
    let registry = server.open("a:large", Credentials::Anonymous).await;
    assert!(matches!(
        registry.resolve().await,
        Err(OciError::TooLarge { .. })
    ));
    let pinned = format!("a@sha256:{}", "0".repeat(64));
    let registry = server.open(&pinned, Credentials::Anonymous).await;
    assert!(matches!(
        registry.resolve().await,
        Err(OciError::Digest { .. })
    ));
}

#[tokio::test]
async fn an_open_registry_gets_no_credentials() {
    let server = Server::start(|request, _, _| {
        request
            .path
            .contains("/manifests/")
            .then(|| Reply::ok(MANIFEST))
    });
    let credentials = Credentials::Basic {
        username: "u".into(),
        password: "p".into(),
    };
    server.open("a", credentials).await.resolve().await.unwrap();
    assert!(
        server
            .requests("GET")
            .iter()
            .all(|request| request.authorization.is_none())
    );
}

#[tokio::test]
async fn a_name_and_password_go_to_registries_that_want_them() {
    let server = Server::start(|request, _, _| match &request.authorization {
        Some(value) if value == "Basic dTpw" && request.method == "HEAD" => Some(Reply::ok(b"")),
        Some(value) if value == "Basic dTpw" => Some(Reply::ok(MANIFEST)),
        _ => Some(Reply::status(401).header("WWW-Authenticate: Basic realm=\"r\"")),
    });
    let credentials = Credentials::Basic {
        username: "u".into(),
        password: "p".into(),
    };
    let registry = server.open("a", credentials).await;
    registry.resolve().await.unwrap();
    assert!(registry.has_blob(&ContentDigest::of(b"")).await.unwrap());

    let anonymous = server.open("a", Credentials::Anonymous).await;
    let error = anonymous.resolve().await.unwrap_err();
    assert!(
        matches!(error, OciError::Unauthorized { status: 401, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("docker login"), "{error}");
}

#[tokio::test]
async fn tokens_are_obtained_and_renewed() {
    // Every token is good for two manifests; the next one is another.
    let uses = Mutex::new(0);
    let server = Server::start(move |request, before, host| {
        if request.path.starts_with("/token") {
            let form = String::from_utf8(request.body.clone()).unwrap();
            let basic = request.authorization.as_deref() == Some("Basic dTpw");
            if !(basic || form.contains("refresh_token=identity")) {
                return Some(Reply::status(401));
            }
            let scope = format!("{}{form}", request.path);
            assert!(scope.contains("repository%3Aa%3Apull"), "{scope}");
            *uses.lock().unwrap() = 0;
            let token = format!("{{\"token\":\"t{before}\",\"access_token\":\"t{before}\"}}");
            return Some(Reply::ok(token.as_bytes()));
        }
        let mut uses = uses.lock().unwrap();
        let known = request
            .authorization
            .as_deref()
            .is_some_and(|value| value.starts_with("Bearer t"));
        if known && *uses < 2 {
            *uses += 1;
            return Some(Reply::ok(MANIFEST));
        }
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"s\"");
        Some(Reply::status(401).header(&challenge))
    });
    for credentials in [
        Credentials::Basic {
            username: "u".into(),
            password: "p".into(),
        },
        Credentials::Identity("identity".into()),
    ] {
        let registry = server.open("a", credentials).await;
        for _ in 0..5 {
            registry.resolve().await.unwrap();
        }
    }
    let wrong = server
        .open("a", Credentials::Identity("wrong".into()))
        .await;
    assert!(matches!(
        wrong.resolve().await,
        Err(OciError::Unauthorized { .. })
    ));
}

#[tokio::test]
async fn a_redirect_to_a_store_takes_no_credentials_along() {
    let store = Server::start(|request, before, _| {
        let mut reply = Reply::ok(&content()[start_of(request.range.as_ref())..]);
        if before == 0 {
            reply.cut = Some(1000);
        } else {
            reply.status = 206;
        }
        Some(reply)
    });
    let host = store.host.clone();
    let server = Server::start(move |request, _, _| match &request.authorization {
        None => Some(Reply::status(401).header("WWW-Authenticate: Basic realm=\"r\"")),
        Some(_) => Some(Reply::status(307).header(&format!("Location: http://{host}/signed?x=1"))),
    });
    let credentials = Credentials::Basic {
        username: "u".into(),
        password: "p".into(),
    };
    let registry = server.open("a", credentials).await;
    let descriptor = Descriptor::of(OCI_LAYER_GZIP, &content());
    assert!(download(&registry, &descriptor).await.unwrap() == content());
    let asked = store.requests("GET");
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[1].range.as_deref(), Some("bytes=1000-"));
    assert!(asked.iter().all(|request| request.authorization.is_none()));
}

#[tokio::test]
async fn an_upload_is_repeated_from_the_start() {
    let server = Server::start(|request, before, _| match request.method.as_str() {
        "POST" => Some(Reply::status(202).header("Location: /upload?state=1")),
        "PUT" if before == 0 => Some(Reply::status(503)),
        "PUT" => Some(Reply::status(201).header("Location: /done")),
        _ => None,
    });
    let registry = server.open("a", Credentials::Anonymous).await;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content()).unwrap();
    let source = BlobSource::File(Arc::new(file));
    let digest = ContentDigest::of(&content());
    let sent = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&sent);
    let progress: upload::Progress = Arc::new(move |position| *seen.lock().unwrap() = position);
    registry
        .push_blob(&source, &digest, 400_000, progress)
        .await
        .unwrap();
    assert_eq!(*sent.lock().unwrap(), 400_000);
    let uploads = server.requests("PUT");
    assert_eq!(uploads.len(), 2);
    assert!(uploads.iter().all(|upload| upload.body == content()));
    let path = format!(
        "/upload?state=1&digest={}",
        digest.as_str().replace(':', "%3A")
    );
    assert_eq!(uploads[0].path, path);
}

#[tokio::test]
async fn an_upload_that_is_refused_is_reported() {
    let server = Server::start(|request, _, _| match request.method.as_str() {
        "POST" => Some(Reply::status(202).header("Location: /upload")),
        "PUT" => Some(Reply {
            body: b"digest invalid".to_vec(),
            ..Reply::status(400)
        }),
        _ => None,
    });
    let registry = server.open("a", Credentials::Anonymous).await;
    let source = BlobSource::Bytes(Bytes::from_static(b"x"));
    let digest = ContentDigest::of(b"x");
    let error = registry
        .push_blob(&source, &digest, 1, Arc::new(|_| ()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("400: digest invalid"), "{error}");
}

#[test]
fn error_pages_become_one_short_line() {
    assert_eq!(quote(b" \n"), "");
    assert_eq!(quote(b"<p>\n  no\x07 way\n</p>"), ": <p> no way </p>");
    assert_eq!(quote(&[b'x'; 5000]).len(), MAX_ERROR_TEXT + 2);
}

#[test]
fn the_document_knows_its_media_type_best() {
    let own = format!("{{\"schemaVersion\":2,\"mediaType\":\"{OCI_INDEX}\",\"manifests\":[]}}");
    assert_eq!(
        media_type_of("x", own.as_bytes(), "text/plain").unwrap(),
        OCI_INDEX
    );
    assert_eq!(
        media_type_of("x", MANIFEST, DOCKER_INDEX).unwrap(),
        DOCKER_INDEX
    );
    assert_eq!(
        media_type_of("x", MANIFEST, "text/plain").unwrap(),
        OCI_INDEX
    );
}
