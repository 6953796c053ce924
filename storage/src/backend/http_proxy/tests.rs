//! Against small servers that answer in the ways that real ones do.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use super::*;
use crate::backend::{Priority, fetch_to_vec};

/// How a server answers a ranged GET.
#[derive(Clone, Copy)]
enum Style {
    /// 206 and the range.
    Partial,
    /// 200 and only the range.
    RangeAs200,
    /// 200 and the whole blob.
    Whole,
    /// 200, the range, and no length.
    Unmeasured,
    /// The range is cut after some bytes, every time.
    Broken,
}

fn data() -> Vec<u8> {
    (0..100_000_u32).map(|i| i.to_le_bytes()[1]).collect()
}

/// Answers one request; the connection is closed afterwards.
fn serve(stream: &mut (impl Read + Write), style: Style) {
    let mut lines = BufReader::new(&mut *stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let headers: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
    let data = data();
    assert!(request.contains("/some-blob "), "{request}");
    if request.starts_with("HEAD") {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            data.len()
        );
        let _ = stream.write_all(head.as_bytes());
        return;
    }
    let range = headers.iter().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("range").then(|| value.to_owned())
    });
    let range = range.unwrap();
    let (first, last) = range
        .strip_prefix("bytes=")
        .unwrap()
        .split_once('-')
        .unwrap();
    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
    let bytes = &data[first..=last];
    let (status, more, body) = match style {
        Style::Partial => (
            "206 Partial Content",
            format!(
                "Content-Length: {}\r\nContent-Range: bytes {first}-{last}/{}\r\n",
                bytes.len(),
                data.len()
            ),
            bytes,
        ),
        Style::RangeAs200 => (
            "200 OK",
            format!("Content-Length: {}\r\n", bytes.len()),
            bytes,
        ),
        Style::Whole => (
            "200 OK",
            format!("Content-Length: {}\r\n", data.len()),
            &data[..],
        ),
        Style::Unmeasured => ("200 OK", String::new(), bytes),
        Style::Broken => (
            "200 OK",
            format!("Content-Length: {}\r\n", bytes.len()),
            &bytes[..bytes.len().min(30_000)],
        ),
    };
    let head = format!("HTTP/1.1 {status}\r\n{more}Connection: close\r\n\r\n");
    let _ = stream.write_all(&[head.as_bytes(), body].concat());
}

fn fetch(backend: &HttpProxyBackend, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
    let blob = BlobId::new("some-blob").unwrap();
    let request = Fetch {
        blob: &blob,
        range,
        priority: Priority::OnDemand,
        served_by: None,
        direct: false,
        blob_len: None,
    };
    fetch_to_vec(backend, &request, 1 << 20)
}

fn check(address: Address) {
    let backend = HttpProxyBackend::new(HttpProxyConfig::new(address)).unwrap();
    let data = data();
    assert_eq!(
        backend.size(&BlobId::new("some-blob").unwrap()).unwrap(),
        100_000
    );
    for range in [0..1, 5..70_000, 99_000..100_000, 0..100_000] {
        let expected =
            &data[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        assert!(
            fetch(&backend, range.clone()).unwrap() == expected,
            "{range:?}"
        );
    }
}

#[test]
fn all_kinds_of_servers_are_understood_on_a_socket() {
    for style in [
        Style::Partial,
        Style::RangeAs200,
        Style::Whole,
        Style::Unmeasured,
        Style::Broken,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&mut stream.unwrap(), style);
            }
        });
        check(Address::Socket(path));
    }
}

#[test]
fn an_address_works_too() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/blobs", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            serve(&mut stream.unwrap(), Style::RangeAs200);
        }
    });
    check(Address::Url(url));
}

#[test]
fn bad_addresses_and_dead_servers_are_errors() {
    for bad in ["", "ftp://x", "localhost:80", "http://"] {
        let config = HttpProxyConfig::new(Address::Url(bad.to_owned()));
        let error = HttpProxyBackend::new(config).unwrap_err();
        assert!(matches!(error, BackendError::Config(_)), "{bad}: {error}");
    }
    let mut config = HttpProxyConfig::new(Address::Socket("/nonexistent/socket".into()));
    config.retry.retries = 1;
    let backend = HttpProxyBackend::new(config).unwrap();
    assert!(matches!(
        fetch(&backend, 0..1),
        Err(BackendError::GaveUp { .. })
    ));
}
