//! A small HTTP/1.1 server whose answers a test decides; one connection per request.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::thread;
use std::time::Duration;

use crate::sync::{Arc, AtomicBool, Mutex, Ordering, lock};

#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// What the `Range` header asks for.
    pub(super) fn range(&self) -> Range<usize> {
        let text = self
            .header("range")
            .unwrap()
            .strip_prefix("bytes=")
            .unwrap();
        let (first, last) = text.split_once('-').unwrap();
        first.parse().unwrap()..last.parse::<usize>().unwrap() + 1
    }
}

pub(super) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Send only that much of the body, then end the connection or say nothing.
    cut: Option<(usize, bool)>,
    silence: bool,
}

impl Reply {
    pub(super) fn new(status: u16, body: Vec<u8>) -> Self {
        let length = body.len().to_string();
        Self {
            status,
            headers: vec![("content-length".to_owned(), length)],
            body,
            cut: None,
            silence: false,
        }
    }

    pub(super) fn ok(body: Vec<u8>) -> Self {
        Self::new(200, body)
    }

    pub(super) fn silence() -> Self {
        Self {
            silence: true,
            ..Self::ok(Vec::new())
        }
    }

    /// What a good server says to a request for a range, or to HEAD.
    pub(super) fn range(request: &Request, data: &[u8]) -> Self {
        if request.method == "HEAD" {
            let length = data.len().to_string();
            return Self::ok(Vec::new())
                .without("content-length")
                .with("content-length", &length);
        }
        Self::part(data, request.range())
    }

    pub(super) fn part(data: &[u8], range: Range<usize>) -> Self {
        let content_range = format!("bytes {}-{}/{}", range.start, range.end - 1, data.len());
        Self::new(206, data[range].to_vec()).with("content-range", &content_range)
    }

    pub(super) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(super) fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(key, _)| key != name);
        self
    }

    pub(super) fn cut(mut self, at: usize, stall: bool) -> Self {
        self.cut = Some((at, stall));
        self
    }

    fn send(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        if self.silence {
            thread::sleep(Duration::from_secs(3));
            return Ok(());
        }
        let mut head = format!("HTTP/1.1 {} Whatever\r\nconnection: close\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes())?;
        let len = self
            .cut
            .map_or(self.body.len(), |(at, _)| at.min(self.body.len()));
        stream.write_all(&self.body[..len])?;
        stream.flush()?;
        if let Some((_, true)) = self.cut {
            thread::sleep(Duration::from_secs(3));
        }
        Ok(())
    }
}

type Handler = dyn Fn(&Request, usize) -> Reply + Send + Sync;

pub(super) struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    /// * `handler`: gets each request and its number, from 0.
    pub(super) fn new(handler: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::at("127.0.0.1:0", handler)
    }

    /// * `address`: to listen at.
    pub(super) fn at(
        address: &str,
        handler: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let (log, stop) = (
            Arc::<Mutex<Vec<Request>>>::default(),
            Arc::<AtomicBool>::default(),
        );
        let handler: Arc<Handler> = Arc::new(handler);
        let (seen, stopped) = (Arc::clone(&log), Arc::clone(&stop));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let (stream, handler, log) =
                    (stream.unwrap(), Arc::clone(&handler), Arc::clone(&seen));
                thread::spawn(move || serve(stream, &*handler, &log));
            }
        });
        Self { address, log, stop }
    }

    pub(super) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        lock(&self.log).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener, which closes its socket.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(mut stream: TcpStream, handler: &Handler, log: &Mutex<Vec<Request>>) {
    let Some(request) = read_request(&stream) else {
        return;
    };
    let number = {
        let mut log = lock(log);
        log.push(request.clone());
        log.len() - 1
    };
    // The client may have gone away.
    let _ = handler(&request, number).send(&mut stream);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
    let _ = stream.read(&mut [0; 64]);
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        headers.push((name.to_ascii_lowercase(), value.to_owned()));
    }
    Some(Request {
        method,
        path,
        headers,
    })
}
