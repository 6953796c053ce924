//! Images in a registry, and machines on which `nydusd` mounts them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::agent::{Agent, HEALTH_PORT, PROXY_PORT};
use crate::api::ask;
use crate::binaries::{nydus_image, nydusd};
use crate::command::succeed;
use crate::mount::Nydusd;
use crate::netns::Machine;
use crate::registry::Registry;

/// An image in the registry.
#[derive(Clone, Debug)]
pub struct Image {
    host: String,
    repository: String,
    bootstrap: PathBuf,
    /// Its only blob, as `sha256:…`.
    pub digest: String,
    /// What a mount of it shows.
    pub source: PathBuf,
    /// Bytes of the blob.
    pub size: u64,
}

impl Image {
    /// Builds the image of the tree `source` below the directory `scratch`, and pushes
    /// its blob.
    ///
    /// # Errors
    /// It does not build, or the registry refuses.
    pub fn publish(
        registry: &Registry,
        scratch: &Path,
        name: &str,
        source: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let repository = format!("p2p/{name}");
        let bootstrap = scratch.join(format!("{name}.boot"));
        let blobs = scratch.join(format!("{name}.blobs"));
        fs::create_dir_all(&blobs)?;
        let mut create = nydus_image()?;
        create
            .args(["--log-level", "warn", "create"])
            .args(arguments);
        create.arg("--bootstrap").arg(&bootstrap);
        succeed(create.arg("--blob-dir").arg(&blobs).arg(source))?;
        let entry = fs::read_dir(&blobs)?
            .next()
            .context("no blob was built")??;
        let size = entry.metadata()?.len();
        let digest = registry.push_blob(&repository, &entry.path())?;
        fs::remove_dir_all(blobs)?;
        Ok(Self {
            host: registry.host().to_owned(),
            repository,
            bootstrap,
            digest,
            source: source.to_owned(),
            size,
        })
    }

    /// Where the blob is at the registry and its mirrors.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/v2/{}/blobs/{}", self.repository, self.digest)
    }

    /// The registry's address, as `http://host:port`.
    #[must_use]
    pub fn origin(&self) -> String {
        format!("http://{}", self.host)
    }

    /// The configuration of a `nydusd` that reads it by `route`.
    fn configuration(&self, route: &Route, cache: &Path) -> Value {
        let ping = format!("http://127.0.0.1:{HEALTH_PORT}/healthy");
        let mut endpoints = Vec::new();
        let mut mirrors = Vec::new();
        match route {
            Route::Direct => {}
            Route::Dragonfly(url) => {
                endpoints.push(json!({"url": url, "ping_url": ping, "check_interval": 1}));
            }
            Route::DragonflyAndSeed(url, seed) => {
                endpoints.push(json!({"url": url, "ping_url": ping, "check_interval": 1}));
                endpoints.push(json!({"url": seed, "seed": true, "tasks": "window"}));
            }
            Route::Seed(url) => endpoints.push(json!({"url": url, "seed": true})),
            // A mirror with such headers would be taken for what it is.
            Route::DragonflyAsIs(url) => endpoints.push(json!({
                "url": url, "kind": "generic", "upstream": "header",
                "ping_url": ping, "check_interval": 1,
            })),
            Route::Mirror(url) => mirrors.push(json!({"host": url})),
        }
        json!({
            "version": 2,
            "id": self.repository,
            "backend": {"type": "registry", "registry": {
                "scheme": "http",
                "host": self.host,
                "repo": self.repository,
                "mirrors": mirrors,
            }},
            "p2p": {"fallback": "always", "endpoint": endpoints},
            "cache": {"type": "filecache", "filecache": {"work_dir": cache}},
            "rafs": {"mode": "direct"},
        })
    }
}

/// How a node gets at blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// From the registry.
    Direct,
    /// Through an agent at this URL, asked so that ranges travel from peer to peer.
    Dragonfly(String),
    /// The same, and where that fails, through a seed at the other URL.
    DragonflyAndSeed(String, String),
    /// Through a seed at this URL.
    Seed(String),
    /// Through an agent at this URL, asked as any client of a mirror would.
    DragonflyAsIs(String),
    /// Through a mirror that is no agent, at this URL.
    Mirror(String),
}

impl Route {
    /// Through the node's own agent, asked so that ranges travel from peer to peer.
    #[must_use]
    pub fn dragonfly() -> Self {
        Self::Dragonfly(format!("http://127.0.0.1:{PROXY_PORT}"))
    }

    /// The same, and where that fails, through the seed on this machine.
    #[must_use]
    pub fn dragonfly_and_seed(seed: &Machine) -> Self {
        let seed = format!("http://{}:{PROXY_PORT}", seed.address());
        Self::DragonflyAndSeed(format!("http://127.0.0.1:{PROXY_PORT}"), seed)
    }

    /// Through the node's own agent, asked as any client of a mirror would.
    #[must_use]
    pub fn dragonfly_as_is() -> Self {
        Self::DragonflyAsIs(format!("http://127.0.0.1:{PROXY_PORT}"))
    }
}

/// A machine on which images are mounted.
#[derive(Debug)]
pub struct Client {
    machine: Arc<Machine>,
    directory: PathBuf,
    mounts: AtomicU32,
}

impl Client {
    /// With what it needs in the new directory `directory`.
    ///
    /// # Errors
    /// The disk is full.
    pub fn new(machine: Arc<Machine>, directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self {
            machine,
            directory,
            mounts: AtomicU32::new(0),
        })
    }

    /// Mounts `image` from an empty cache of its own.
    ///
    /// # Errors
    /// The daemon does not start.
    pub fn mount(&self, image: &Image, route: &Route) -> Result<Mounted> {
        let number = self.mounts.fetch_add(1, Ordering::Relaxed);
        let directory = self.directory.join(number.to_string());
        let (point, cache) = (directory.join("mount"), directory.join("cache"));
        fs::create_dir_all(&point)?;
        let config = image.configuration(route, &cache);
        let file = directory.join("config.json");
        fs::write(&file, config.to_string())?;
        let mut command = nydusd()?;
        self.machine.enter(&mut command);
        command.args(["--log-level", "debug", "--driver", "fuse"]);
        command.arg("--config").arg(file);
        command.arg("--bootstrap").arg(&image.bootstrap);
        command.arg("--apisock").arg(directory.join("api.sock"));
        command.arg("--mountpoint").arg(&point);
        let daemon = Nydusd::start(&mut command, &point, &directory.join("log"))?;
        Ok(Mounted { daemon, directory })
    }
}

/// A machine with an agent, on which images are mounted.
#[derive(Debug)]
pub struct Node {
    /// Its `dfdaemon`.
    pub agent: Agent,
    /// Its `nydusd`s.
    pub client: Client,
}

/// An image mounted on a node.
#[derive(Debug)]
pub struct Mounted {
    daemon: Nydusd,
    directory: PathBuf,
}

impl Mounted {
    /// The mount point.
    #[must_use]
    pub fn point(&self) -> &Path {
        self.daemon.point()
    }

    /// What the daemon has logged.
    pub fn log(&mut self) -> String {
        self.daemon.process().log()
    }

    /// One of the daemon's counters, by its name for Prometheus without what all have in
    /// common; 0 if it does not count that.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn count(&self, name: &str) -> Result<u64> {
        let answer = ask(&self.directory.join("api.sock"), "GET", "/metrics", "")?;
        let name = format!("nydusd_{name}{{");
        let line = answer.body.lines().find(|line| line.starts_with(&name));
        let value = line.and_then(|line| line.rsplit(' ').next());
        Ok(value.unwrap_or("0").parse()?)
    }

    /// Unmounts it, and deletes its cache.
    ///
    /// # Errors
    /// The daemon does not end well.
    pub fn stop(self) -> Result<()> {
        self.daemon.stop()?;
        fs::remove_dir_all(self.directory)?;
        Ok(())
    }
}
