//! What the daemon tells about itself: JSON for clients, text for Prometheus.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use humantime::format_rfc3339_seconds;
use serde_json::{Map, Value, json};
use storage::metrics::Kind;

use super::error::ApiError;
use super::{Api, shown};
use crate::manager::saved::Origin;
use crate::upgrade::waiting::Waiting;
use crate::vfs::stats::OPS;
use crate::vfs::{Mounted, Table, Vfs, Wait};

/// `FUSE_READ`, the only request that waits for the network.
const OPCODE_READ: u32 = 15;

/// Version, state, and the mounted images if `mounts`.
pub(super) fn daemon(api: &Api, table: &Table, mounts: bool) -> Value {
    let mounted = |table: &Table| {
        let mut all = Map::new();
        for image in table.images() {
            let mounted = image.about.mounted.unwrap_or(UNIX_EPOCH);
            let about = json!({
                "backend_type": "Rafs",
                "mountpoint": image.path,
                "mounted_time": format_rfc3339_seconds(mounted).to_string(),
                "config": image.about.config,
            });
            all.insert(image.path.clone(), about);
        }
        Value::Object(all)
    };
    let collection = |table: &Table| match api.life.waits() {
        Some(waiting) => awaited(waiting),
        None => mounted(table),
    };
    json!({
        "version": {
            "package_ver": env!("CARGO_PKG_VERSION"),
            "git_commit": env!("NYDUS_BUILD_COMMIT"),
            "build_time": env!("NYDUS_BUILD_TIME"),
            "profile": env!("NYDUS_BUILD_PROFILE"),
            "rustc": env!("NYDUS_BUILD_RUSTC"),
        },
        "id": api.id,
        "supervisor": api.supervisor,
        "state": api.life.phase().name(),
        "backend_collection": mounts.then(|| collection(table)),
    })
}

/// The images of a daemon that serves nothing yet: taken over, or asked for.
fn awaited(waiting: &Waiting) -> Value {
    let images = waiting.images().unwrap_or_else(|error| {
        tracing::warn!("what was taken over cannot be listed: {error:#}");
        Default::default()
    });
    let each = images.into_iter().map(|(path, origin)| {
        let config = match &origin {
            Origin::Api(body) => shown(body),
            Origin::CommandLine => None,
        };
        let about = json!({ "backend_type": "Rafs", "mountpoint": path, "config": config });
        (path, about)
    });
    Value::Object(each.collect())
}

/// What an image says about itself; for people.
pub(super) fn superblock(image: &Arc<Mounted>) -> Value {
    let of = image.files.image();
    json!({
        "image": image.about.image,
        "inodes": of.inode_count(),
        "blobs": of.blobs().iter().map(|blob| blob.id.to_string()).collect::<Vec<_>>(),
    })
}

/// The image on path `id`, or the only one.
pub(super) fn by_path<'a>(
    table: &'a Table,
    id: &Option<String>,
    what: &str,
) -> Result<&'a Arc<Mounted>, ApiError> {
    pick(table, id, what, |image, id| image.path == id)
}

/// The image whose configuration has this id, or the only one.
pub(super) fn by_id<'a>(
    table: &'a Table,
    id: &Option<String>,
) -> Result<&'a Arc<Mounted>, ApiError> {
    pick(table, id, "Blobcache", |image, id| image.about.id == id)
}

fn pick<'a>(
    table: &'a Table,
    id: &Option<String>,
    what: &str,
    is_it: impl Fn(&Mounted, &str) -> bool,
) -> Result<&'a Arc<Mounted>, ApiError> {
    let mut all = table.images();
    let found = match id {
        Some(id) => all.find(|image| is_it(image, id)),
        None => all.next().filter(|_| all.next().is_none()),
    };
    found.ok_or_else(|| ApiError::no_counter(what))
}

/// Requests of the file system.
pub(super) fn files(image: &Arc<Mounted>) -> Value {
    let mut report = json!({
        "files_account_enabled": false,
        "access_pattern_enabled": false,
        "record_latest_read_files_enabled": false,
        "measure_latency": true,
        "id": image.path,
    });
    merge(&mut report, serde_json::to_value(image.stats.snapshot()));
    report
}

fn merge(report: &mut Value, more: serde_json::Result<Value>) {
    if let (Some(report), Ok(Value::Object(more))) = (report.as_object_mut(), more) {
        report.extend(more);
    }
}

/// Requests to the back end.
pub(super) fn backend(image: &Arc<Mounted>) -> Result<Value, ApiError> {
    let backend = image.about.backend.as_ref();
    let backend = backend.ok_or_else(|| ApiError::no_counter("Backend"))?;
    let mut report = json!({ "backend_type": image.about.backend_kind });
    merge(&mut report, serde_json::to_value(backend.snapshot()));
    Ok(report)
}

/// State and use of the cache.
pub(super) fn cache(image: &Arc<Mounted>) -> Value {
    let counter = |name: &str| {
        let all = image.about.cache.snapshot();
        let found = all.iter().find(|(metric, _)| metric.name == name);
        found.map_or(0, |(_, value)| *value)
    };
    let stats = image.stats.snapshot();
    let reads = stats.fop_hits.get(4).copied().unwrap_or(0);
    let blobs = image.files.blobs();
    let files: Vec<String> = blobs
        .iter()
        .map(|blob| format!("{}.blob.data", blob.info().id))
        .collect();
    let entries: u64 = blobs
        .iter()
        .map(|blob| u64::from(blob.resident_chunks()))
        .sum();
    json!({
        "underlying_files": files,
        "store_path": image.about.cache_dir.display().to_string(),
        "partial_hits": 0,
        "whole_hits": reads.saturating_sub(stats.waits),
        "total": reads,
        "entries_count": entries,
        "prefetch_data_amount": counter("backend.bytes_prefetch"),
        "prefetch_requests_count": counter("backend.requests_prefetch"),
        "prefetch_workers": 0,
        "prefetch_unmerged_chunks": 0,
        "prefetch_cumulative_time_millis": 0,
        "prefetch_begin_time_secs": 0,
        "prefetch_begin_time_millis": 0,
        "prefetch_end_time_secs": 0,
        "prefetch_end_time_millis": 0,
        "buffered_backend_size": 0,
        "data_all_ready": blobs.iter().all(|blob| blob.is_complete()),
    })
}

/// The reads that wait; `None` if there are none.
pub(super) fn inflight(waits: &[Wait]) -> Option<Value> {
    let list: Vec<Value> = waits
        .iter()
        .map(|wait| {
            let since = wait.started.duration_since(UNIX_EPOCH);
            json!({
                "inode": wait.read.node,
                "opcode": OPCODE_READ,
                "unique": wait.read.unique,
                "timestamp_secs": since.unwrap_or_default().as_secs(),
            })
        })
        .collect();
    (!list.is_empty()).then_some(Value::Array(list))
}

/// The blobs of all images, and how much of them is here.
pub(super) fn blobs(table: &Table) -> Value {
    let each = |image: &Arc<Mounted>| {
        let path = image.path.clone();
        let dir = image.about.cache_dir.display().to_string();
        let blobs = image.files.blobs().iter();
        blobs
            .map(|blob| {
                let info = blob.info();
                json!({
                    "type": "datablob",
                    "id": info.id.to_string(),
                    "domain_id": "",
                    "mountpoint": path,
                    "cache_dir": dir,
                    "size": info.uncompressed_size,
                    "chunks": info.chunk_count,
                    "resident_chunks": blob.resident_chunks(),
                    "complete": blob.is_complete(),
                })
            })
            .collect::<Vec<_>>()
    };
    table.images().flat_map(each).collect()
}

/// Who waits for what, and what is being fetched: why something is slow.
pub(super) fn debug(vfs: &Vfs, table: &Table) -> Value {
    let reads: Vec<Value> = vfs
        .waits()
        .iter()
        .map(|wait| {
            let read = &wait.read;
            let image = &wait.image;
            let missing = image.files.missing(read.node, read.offset, read.size);
            let missing: Vec<Value> = missing
                .into_iter()
                .map(|(blob, chunks)| json!({ "blob": blob, "chunks": chunks }))
                .collect();
            json!({
                "mountpoint": image.path,
                "image": image.about.image,
                "inode": read.node,
                "offset": read.offset,
                "size": read.size,
                "pid": read.pid,
                "program": program(read.pid),
                "waits_ms": millis(wait.since),
                "missing": missing,
            })
        })
        .collect();
    let fetches = table.images().flat_map(|image| {
        let requests = image.about.backend.as_ref().map(|it| it.under_way());
        requests
            .unwrap_or_default()
            .into_iter()
            .map(|request| {
                json!({
                    "mountpoint": image.path,
                    "backend": image.about.backend_kind,
                    "blob": request.blob.to_string(),
                    "offset": request.range.start,
                    "size": request.range.end.saturating_sub(request.range.start),
                    "on_demand": request.on_demand,
                    "since_ms": millis(request.since),
                })
            })
            .collect::<Vec<_>>()
    });
    let fetches: Vec<Value> = fetches.collect();
    json!({ "time": format_rfc3339_seconds(SystemTime::now()).to_string(), "reads": reads, "fetches": fetches })
}

fn millis(since: std::time::Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// The name of a process, if it can be told.
fn program(pid: u32) -> Option<String> {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

/// All numbers in Prometheus' text format.
pub(super) fn prometheus(table: &Table) -> String {
    let mut page = Page::default();
    page.family("nydusd_mounts", "gauge", "Mounted images.");
    page.sample("nydusd_mounts", &[], table.images().count());
    page.family(
        "nydusd_fuse_requests_total",
        "counter",
        "Requests of the kernel.",
    );
    for (image, op, stats) in by_op(table) {
        let labels = [("mountpoint", image.path.as_str()), ("op", op)];
        page.sample("nydusd_fuse_requests_total", &labels, stats.0);
    }
    page.family(
        "nydusd_fuse_request_errors_total",
        "counter",
        "Requests of the kernel that failed.",
    );
    for (image, op, stats) in by_op(table) {
        let labels = [("mountpoint", image.path.as_str()), ("op", op)];
        page.sample("nydusd_fuse_request_errors_total", &labels, stats.1);
    }
    page.family(
        "nydusd_fuse_read_bytes_total",
        "counter",
        "Bytes read by the kernel.",
    );
    for image in table.images() {
        let labels = [("mountpoint", image.path.as_str())];
        let read = image.stats.snapshot().data_read;
        page.sample("nydusd_fuse_read_bytes_total", &labels, read);
    }
    page.family(
        "nydusd_fuse_read_waits_total",
        "counter",
        "Reads that waited for data.",
    );
    for image in table.images() {
        let labels = [("mountpoint", image.path.as_str())];
        let waits = image.stats.snapshot().waits;
        page.sample("nydusd_fuse_read_waits_total", &labels, waits);
    }
    for (index, metric) in storage::metrics::ALL.iter().enumerate() {
        let (kind, end) = match metric.kind {
            Kind::Counter => ("counter", "_total"),
            Kind::Gauge => ("gauge", ""),
        };
        let name = format!("nydusd_{}{end}", metric.name.replace('.', "_"));
        page.family(
            &name,
            kind,
            &format!("{} In {}.", metric.meaning, metric.unit),
        );
        for image in table.images() {
            if let Some((_, value)) = image.about.cache.snapshot().get(index) {
                page.sample(&name, &[("mountpoint", &image.path)], value);
            }
        }
    }
    page.0
}

/// Requests and failures by image and kind, for kinds that happen.
fn by_op(table: &Table) -> impl Iterator<Item = (&Arc<Mounted>, &'static str, (u64, u64))> {
    table.images().flat_map(|image| {
        let stats = image.stats.snapshot();
        let counts = stats.fop_hits.into_iter().zip(stats.fop_errors);
        OPS.iter()
            .zip(counts)
            .filter(|(_, counts)| counts.0 > 0)
            .map(move |(op, counts)| (image, *op, counts))
    })
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        if !labels.is_empty() {
            let labels: Vec<String> = labels
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
                .collect();
            let _ = write!(self.0, "{{{}}}", labels.join(","));
        }
        let _ = writeln!(self.0, " {value}");
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
