//! What people and their tools can ask: Prometheus metrics over TCP, and which
//! daemons serve which images over a Unix socket.
//!
//! One short request per connection, of the kind that curl and Prometheus send;
//! everything else is refused. Nothing can be changed from here.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};

use crate::lifecycle::Snapshots;
use crate::store::Kind;

/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 8 << 10;
/// How long a client may take for all of it.
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

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    snapshots: Arc<Snapshots>,
    metrics: bool,
) {
    // Whoever hangs up or is too slow gets nothing; there is nobody to tell.
    let _ = tokio::time::timeout(DEADLINE, answer(stream, snapshots, metrics)).await;
}

async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    snapshots: Arc<Snapshots>,
    metrics: bool,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let mut piece = [0; 1024];
        let count = stream.read(&mut piece).await?;
        if count == 0 || head.len() > MAX_HEAD {
            return Ok(());
        }
        head.extend_from_slice(piece.get(..count).unwrap_or_default());
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let task = tokio::task::spawn_blocking(move || respond(&head, &snapshots, metrics));
    let (status, kind, body) = task.await.map_err(std::io::Error::other)?;
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

/// Status line, content type and body for the head of a request.
fn respond(
    head: &str,
    snapshots: &Snapshots,
    metrics: bool,
) -> (&'static str, &'static str, String) {
    const JSON: &str = "application/json";
    let mut words = head.split_whitespace();
    let request = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    match (request, metrics) {
        (("GET", "/v1/metrics" | "/metrics"), true) => (
            "200 OK",
            "text/plain; version=0.0.4",
            self::metrics(snapshots),
        ),
        (("GET", "/api/v1/daemons"), false) => ("200 OK", JSON, daemons(snapshots)),
        _ => (
            "404 Not Found",
            JSON,
            json!({"code": "Unknown", "message": "no such path"}).to_string(),
        ),
    }
}

fn daemons(snapshots: &Snapshots) -> String {
    let list = snapshots.daemons.list();
    let list: Vec<_> = list
        .into_iter()
        .map(|daemon| {
            let id = daemon.snapshot_id.to_string();
            let instance = json!({
                "snapshot_id": id,
                "snapshot_dir": snapshots.layout.snapshot(daemon.snapshot_id),
                "mountpoint": daemon.mountpoint,
                "image_id": daemon.image_id,
            });
            json!({
                "id": id,
                "pid": daemon.pid.unwrap_or_default(),
                "api_socket": "",
                "supervisor_path": daemon.supervisor_path,
                "reference": 1,
                "mountpoint": daemon.mountpoint,
                "instances": {id.clone(): instance},
            })
        })
        .collect();
    json!(list).to_string()
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
