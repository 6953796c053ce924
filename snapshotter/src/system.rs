//! What people and their tools can ask: Prometheus metrics over TCP; over a Unix socket,
//! which daemons serve which images and from where, to replace the program of all daemons,
//! and what to fetch first of an image.
//!
//! One short request per connection, of the kind that curl and Prometheus send;
//! everything else is refused. Nothing can be changed over TCP.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};

use crate::daemons::{Instance, process};
use crate::error::{Error, chain};
use crate::lifecycle::Snapshots;
use crate::prefetch::Wish;
use crate::store::Kind;
use crate::{images, labels, usage};

/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 8 << 10;
/// Longest body.
const MAX_BODY: usize = 64 << 10;
/// How long a client may take to send a request, and to take the answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Answers on the TCP socket of metrics, for ever.
pub async fn serve_metrics(listener: TcpListener, snapshots: Arc<Snapshots>) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(converse(stream, Arc::clone(&snapshots), true));
        }
    }
}

/// Answers on the socket of the system API, for ever.
pub async fn serve_system(listener: UnixListener, snapshots: Arc<Snapshots>) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(converse(stream, Arc::clone(&snapshots), false));
        }
    }
}

/// A request, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
}

/// Status line, content type and body.
type Answer = (&'static str, &'static str, String);

const JSON: &str = "application/json";

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    snapshots: Arc<Snapshots>,
    metrics: bool,
) {
    // Whoever hangs up or is too slow gets nothing; there is nobody to tell.
    let _ = answer(stream, snapshots, metrics).await;
}

async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    snapshots: Arc<Snapshots>,
    metrics: bool,
) -> std::io::Result<()> {
    let Some(request) = tokio::time::timeout(DEADLINE, read(&mut stream)).await?? else {
        return Ok(());
    };
    // However long this takes: all daemons may have to be replaced.
    let task = tokio::task::spawn_blocking(move || respond(&request, &snapshots, metrics));
    let (status, kind, body) = task.await.map_err(std::io::Error::other)?;
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let write = async {
        stream.write_all(text.as_bytes()).await?;
        stream.shutdown().await
    };
    tokio::time::timeout(DEADLINE, write).await?
}

/// One request; none if it is too long, or not whole.
async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> std::io::Result<Option<Request>> {
    let mut text = Vec::new();
    loop {
        let end = text.windows(4).position(|window| window == b"\r\n\r\n");
        let (head, body) = text.split_at(end.map_or(text.len(), |end| end + 4));
        if head.len() > MAX_HEAD {
            return Ok(None);
        }
        if end.is_some() {
            let head = String::from_utf8_lossy(head);
            match length(&head) {
                Some(length) if length <= MAX_BODY => {
                    if let Some(body) = body.get(..length) {
                        return Ok(Some(request(&head, body)));
                    }
                }
                _ => return Ok(None),
            }
        }
        let mut piece = [0; 1024];
        let count = stream.read(&mut piece).await?;
        if count == 0 {
            return Ok(None);
        }
        text.extend_from_slice(piece.get(..count).unwrap_or_default());
    }
}

/// The length of the body; none if the head makes no sense of it.
fn length(head: &str) -> Option<usize> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    let field = fields.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    field.map_or(Some(0), |(_, value)| value.trim().parse().ok())
}

fn request(head: &str, body: &[u8]) -> Request {
    let mut words = head.split_whitespace().map(str::to_owned);
    Request {
        method: words.next().unwrap_or_default(),
        path: words.next().unwrap_or_default(),
        body: body.to_owned(),
    }
}

fn respond(request: &Request, snapshots: &Snapshots, metrics: bool) -> Answer {
    let what = (request.method.as_str(), request.path.as_str());
    let answer = match (what, metrics) {
        (("GET", "/v1/metrics" | "/metrics"), true) => {
            let text = self::metrics(snapshots);
            return ("200 OK", "text/plain; version=0.0.4", text);
        }
        (("GET", "/api/v1/daemons"), false) => Ok(daemons(snapshots)),
        (("PUT", "/api/v1/daemons/upgrade"), false) => upgrade(snapshots, &request.body),
        (("GET", "/api/v1/daemons/records"), false) => {
            let reason = "daemons are found again without records";
            return ("501 Not Implemented", JSON, failure(reason));
        }
        (("GET", path), false) if backend_of(path).is_some() => {
            match snapshots
                .daemons
                .backend(backend_of(path).unwrap_or_default())
            {
                Ok(None) => return ("404 Not Found", JSON, failure("no such daemon or image")),
                Ok(Some(backend)) => Ok(backend.to_string()),
                Err(error) => Err(error),
            }
        }
        (("PUT", "/api/v1/prefetch"), false) => prefetch(snapshots, &request.body),
        (("GET", "/api/v1/images"), false) => images(snapshots),
        (("GET", "/api/v1/cache"), false) => cache(snapshots),
        _ => return ("404 Not Found", JSON, failure("no such path")),
    };
    match answer {
        Ok(body) => ("200 OK", JSON, body),
        Err(error) => {
            let status = match error {
                Error::Invalid(_) => "400 Bad Request",
                _ => "500 Internal Server Error",
            };
            (status, JSON, failure(&chain(&error)))
        }
    }
}

fn failure(message: &str) -> String {
    json!({"code": "Unknown", "message": message}).to_string()
}

/// What is asked of an upgrade. A policy is not looked at: there is only one.
#[derive(Debug, Deserialize)]
struct Upgrade {
    nydusd_path: PathBuf,
    #[serde(default)]
    version: String,
}

fn upgrade(snapshots: &Snapshots, body: &[u8]) -> Result<String, Error> {
    let wanted: Upgrade = understood(body)?;
    snapshots.upgrade(&wanted.nydusd_path, &wanted.version)?;
    Ok(String::new())
}

fn prefetch(snapshots: &Snapshots, body: &[u8]) -> Result<String, Error> {
    let wishes: Vec<Wish> = understood(body)?;
    snapshots.daemons.prefetch().add(&wishes)?;
    Ok(String::new())
}

/// The daemon or image whose back end a path means.
fn backend_of(path: &str) -> Option<&str> {
    let name = path.strip_prefix("/api/v1/daemons/")?;
    let name = name.strip_suffix("/backend")?;
    (!name.contains('/')).then_some(name)
}

fn understood<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body)
        .map_err(|error| Error::Invalid(format!("the body of the request: {error}")))
}

/// All images of this node, in use or not.
fn images(snapshots: &Snapshots) -> Result<String, Error> {
    let records = snapshots.store.all()?;
    let users = images::in_use(&records);
    let images = records.iter().filter(|record| images::is_image(record));
    let list: Vec<_> = images
        .map(|record| {
            let driver = snapshots.daemons.driver_of(record.id);
            json!({
                "reference": labels::image_ref(&record.labels),
                "snapshot_id": record.id.to_string(),
                "mounted": driver.is_some(),
                "driver": driver,
                "users": users.get(&record.id).unwrap_or(&0),
            })
        })
        .collect();
    Ok(json!(list).to_string())
}

/// The cache of fetched data: all of it, and blob by blob.
fn cache(snapshots: &Snapshots) -> Result<String, Error> {
    let blobs = usage::cached_blobs(&snapshots.cache)?;
    let list: Vec<_> = blobs
        .iter()
        .map(|(id, usage)| json!({"id": id, "bytes": usage.bytes}))
        .collect();
    let cache = json!({"bytes": snapshots.cache_usage().bytes, "blobs": list});
    Ok(cache.to_string())
}

fn daemons(snapshots: &Snapshots) -> String {
    let list = snapshots.daemons.list();
    let memory = process::memory_by_group();
    let list: Vec<_> = list
        .into_iter()
        .map(|daemon| {
            let instances: serde_json::Map<_, _> = daemon
                .images
                .iter()
                .map(|image| instance(snapshots, image))
                .collect();
            json!({
                "id": daemon.id,
                "pid": daemon.pid.unwrap_or_default(),
                "api_socket": daemon.api_socket,
                "supervisor_path": daemon.supervisor_path,
                "reference": instances.len(),
                "mountpoint": daemon.mountpoint,
                "memory_rss_kb": memory.get(&daemon.group.unwrap_or_default()).unwrap_or(&0),
                "instances": instances,
            })
        })
        .collect();
    json!(list).to_string()
}

fn instance(snapshots: &Snapshots, image: &Instance) -> (String, Value) {
    let id = image.snapshot_id.to_string();
    let described = json!({
        "snapshot_id": id,
        "snapshot_dir": snapshots.layout.snapshot(image.snapshot_id),
        "mountpoint": image.mountpoint,
        "image_id": image.image_id,
    });
    (id, described)
}

/// Numbers in Prometheus' text format.
fn metrics(snapshots: &Snapshots) -> String {
    let records = snapshots.store.all().unwrap_or_default();
    let count = |kind| records.iter().filter(|record| record.kind == kind).count();
    let running = snapshots
        .daemons
        .list()
        .iter()
        .filter(|daemon| daemon.pid.is_some())
        .count();
    let mut text = String::new();
    let mut gauge = |name: &str, kind: &str, help: &str, values: &[(&str, u64)]| {
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in values {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    gauge(
        "nydus_snapshotter_snapshots",
        "gauge",
        "Snapshots by kind.",
        &[
            ("{kind=\"active\"}", number(count(Kind::Active))),
            ("{kind=\"view\"}", number(count(Kind::View))),
            ("{kind=\"committed\"}", number(count(Kind::Committed))),
        ],
    );
    gauge(
        "nydusd_counts",
        "gauge",
        "Daemons that run.",
        &[("", number(running))],
    );
    gauge(
        "nydus_snapshotter_daemon_restarts_total",
        "counter",
        "Daemons that ended while their image was in use and were replaced.",
        &[("", snapshots.daemons.restarts())],
    );
    let held = snapshots
        .daemons
        .list()
        .iter()
        .map(|daemon| daemon.held)
        .sum();
    gauge(
        "nydus_snapshotter_held_descriptors",
        "gauge",
        "Descriptors that are held in case a whole daemon dies.",
        &[("", number(held))],
    );
    let cache = snapshots.cache_usage();
    gauge(
        "nydus_snapshotter_cache_usage_kilobytes",
        "gauge",
        "Disk space of the cache.",
        &[("", cache.bytes >> 10)],
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn parse(text: &str) -> Option<Request> {
        read(&mut text.as_bytes()).await.unwrap()
    }

    #[tokio::test]
    async fn requests_are_whole_and_short() {
        let text = "PUT /x HTTP/1.1\r\ncontent-Length: 3\r\n\r\nabcd";
        let request = Request {
            method: "PUT".to_owned(),
            path: "/x".to_owned(),
            body: b"abc".to_vec(),
        };
        assert_eq!(parse(text).await, Some(request));
        let empty = parse("GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(empty.body.is_empty());
        for wrong in [
            "GET / HTTP/1.1\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabcd",
            "PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
        ] {
            assert_eq!(parse(wrong).await, None, "{wrong}");
        }
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_HEAD));
        assert_eq!(parse(&long).await, None);
    }
}
