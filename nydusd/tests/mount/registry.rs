//! A registry in a few lines: enough to pull manifests and ranges of blobs from,
//! and to misbehave on request.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use storage::oci::{ContentDigest, Descriptor};

/// What all connections share.
#[derive(Default)]
pub(crate) struct State {
    /// Manifests by tag and digest, blobs by digest: media type and bytes.
    objects: Mutex<BTreeMap<String, (String, Vec<u8>)>>,
    /// While set, requests for blobs get no answer.
    stalled: Mutex<bool>,
    moved: Condvar,
    /// While set, requests for blobs are answered 500.
    pub(crate) broken: AtomicBool,
    /// Requests for manifests, and for blobs.
    pub(crate) manifest_requests: AtomicUsize,
    pub(crate) blob_requests: AtomicUsize,
    /// Requests for blobs that wait for the stall to end.
    pub(crate) waiting: AtomicUsize,
}

/// A registry on a loopback port; it ends with the test process.
pub(crate) struct Registry {
    /// `127.0.0.1:port`.
    pub(crate) host: String,
    pub(crate) state: Arc<State>,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || state.serve(&stream));
            }
        });
        Self { host, state }
    }

    /// Stores a blob, or a manifest under its digest.
    pub(crate) fn put(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
        let digest = ContentDigest::of(bytes);
        self.name(digest.as_str(), media_type, bytes);
        Descriptor::of(media_type, bytes)
    }

    /// Stores a manifest under a tag.
    pub(crate) fn name(&self, name: &str, media_type: &str, bytes: &[u8]) {
        let object = (media_type.to_owned(), bytes.to_vec());
        self.state
            .objects
            .lock()
            .unwrap()
            .insert(name.to_owned(), object);
    }

    /// Leaves requests for blobs without an answer, or answers them again.
    pub(crate) fn stall(&self, stalled: bool) {
        *self.state.stalled.lock().unwrap() = stalled;
        self.state.moved.notify_all();
    }
}

impl State {
    /// One connection, request after request.
    fn serve(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            let mut range = None;
            if !matches!(reader.read_line(&mut line), Ok(1..)) {
                return;
            }
            loop {
                let mut header = String::new();
                if reader.read_line(&mut header).is_err() || header == "\r\n" {
                    break;
                }
                let header = header.to_ascii_lowercase();
                if let Some(value) = header.strip_prefix("range: bytes=") {
                    range = parse_range(value.trim());
                }
            }
            let mut words = line.split(' ');
            let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
            if self.answer(stream, method, path, range).is_err() {
                return;
            }
        }
    }

    fn answer(
        &self,
        mut stream: &TcpStream,
        method: &str,
        path: &str,
        range: Option<(usize, Option<usize>)>,
    ) -> std::io::Result<()> {
        let name = path.rsplit('/').next().unwrap_or("");
        if path.contains("/manifests/") {
            self.manifest_requests.fetch_add(1, Ordering::SeqCst);
        }
        if path.contains("/blobs/") {
            self.blob_requests.fetch_add(1, Ordering::SeqCst);
            self.wait_while_stalled();
            if self.broken.load(Ordering::SeqCst) {
                return stream.write_all(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n");
            }
        }
        let found = self.objects.lock().unwrap().get(name).cloned();
        let Some((media_type, bytes)) = found else {
            let status = if path == "/v2/" {
                "200 OK"
            } else {
                "404 Not Found"
            };
            return write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
        };
        let total = bytes.len();
        let (status, body, extra) = match range {
            Some((start, end)) if start < total => {
                let end = end.map_or(total, |end| total.min(end + 1));
                let extra = format!("Content-Range: bytes {start}-{}/{total}\r\n", end - 1);
                ("206 Partial Content", &bytes[start..end], extra)
            }
            _ => ("200 OK", &bytes[..], String::new()),
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n{extra}\r\n",
            body.len()
        )?;
        if method != "HEAD" {
            stream.write_all(body)?;
        }
        Ok(())
    }

    fn wait_while_stalled(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut stalled = self.stalled.lock().unwrap();
        while *stalled {
            stalled = self.moved.wait(stalled).unwrap();
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// `a-b` or `a-`.
fn parse_range(text: &str) -> Option<(usize, Option<usize>)> {
    let (start, end) = text.split_once('-')?;
    Some((start.parse().ok()?, end.parse().ok()))
}
