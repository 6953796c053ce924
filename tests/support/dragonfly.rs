//! A real Dragonfly cluster: a registry behind a slow link, a scheduler, a seed and some
//! nodes, each on a machine of its own ([`crate::netns`]) with its own `dfdaemon`.
//!
//! No manager and no database: scheduler and agents read their dynamic configuration from
//! files. `misc/dragonfly/install.sh` builds the programs; where they are missing,
//! everything here fails and says so.
//!
//! - [`agent`]: one `dfdaemon`, on a node or as the seed
//! - [`node`]: images in the registry, and `nydusd` on a node that reads them
//!
//! What left the origin is counted on its link, so nobody's own figures need be believed.

pub mod agent;
pub mod node;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::netns::{Machine, Network};
use crate::process::Process;
use crate::registry::Registry;
use agent::Agent;
use node::{Client, Image, Node};

/// Where the scheduler listens.
const SCHEDULER_PORT: u16 = 8002;

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Machines that mount images.
    pub nodes: usize,
    /// Whether there is a machine that is the first to ask the origin.
    pub seed: bool,
    /// What the origin can send, in Mbit/s.
    pub origin_mbit: u32,
    /// Laid over the configuration of every node's agent.
    pub agent: Value,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 2,
            seed: false,
            origin_mbit: 100,
            agent: json!({}),
        }
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Machines that mount images.
    pub nodes: Vec<Node>,
    /// The machine that is the first to ask the origin, if there is one.
    pub seed: Option<Agent>,
    /// Who knows which agent has what.
    pub scheduler: Scheduler,
    /// The origin of all images.
    pub registry: Registry,
    /// Where the registry runs.
    pub origin: Arc<Machine>,
    network: Network,
    scratch: TempDir,
}

impl Cluster {
    /// Starts all of it; agents are ready, and the seed is used by the scheduler.
    ///
    /// # Errors
    /// Not root, a program is missing, or one of them does not start.
    pub fn start(options: &Options) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let mut network = Network::new()?;
        let origin = Arc::new(network.machine()?);
        origin.limit(options.origin_mbit)?;
        let registry = Registry::start_on(&origin, None)?;
        let scheduler = Scheduler::start(Arc::new(network.machine()?), scratch.path())?;
        let start = |name: String, machine: Arc<Machine>, is_seed: bool, more: &Value| {
            let setup = agent::Setup {
                name: &name,
                is_seed,
                scheduler: scheduler.address(),
                registry: registry.host(),
                more,
            };
            Agent::start(machine, &scratch.path().join(&name), &setup)
        };
        let mut seed = None;
        if options.seed {
            let machine = Arc::new(network.machine()?);
            seed = Some(start("seed".to_owned(), machine, true, &json!({}))?);
        }
        let mut nodes = Vec::new();
        for number in 1..=options.nodes {
            let name = format!("node-{number}");
            let machine = Arc::new(network.machine()?);
            let directory = scratch.path().join(format!("{name}-images"));
            let client = Client::new(Arc::clone(&machine), directory)?;
            let agent = start(name, machine, false, &options.agent)?;
            nodes.push(Node { agent, client });
        }
        let mut cluster = Self {
            nodes,
            seed,
            scheduler,
            registry,
            origin,
            network,
            scratch,
        };
        for node in &mut cluster.nodes {
            node.agent.wait_until_ready()?;
        }
        cluster.wait_for_seed()?;
        Ok(cluster)
    }

    /// A new machine beside the others.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn machine(&mut self) -> Result<Arc<Machine>> {
        Ok(Arc::new(self.network.machine()?))
    }

    /// Builds the image of the tree `source` and pushes its blob.
    ///
    /// # Errors
    /// It does not build, or the registry refuses.
    pub fn publish(&self, name: &str, source: &Path, arguments: &[&str]) -> Result<Image> {
        Image::publish(&self.registry, self.scratch.path(), name, source, arguments)
    }

    /// A path that need not exist, and goes away with the cluster.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Waits until the scheduler sends who wants something new to the seed: it looks for
    /// seeds every 30 seconds only.
    fn wait_for_seed(&mut self) -> Result<()> {
        let Some(seed) = &mut self.seed else {
            return Ok(());
        };
        seed.wait_until_ready()?;
        let node = self.nodes.first().context("a seed without nodes")?;
        let file = self.scratch.path().join("probe");
        fs::write(&file, b"who is asked first?")?;
        let digest = self.registry.push_blob("probe", &file)?;
        let began = Instant::now();
        for number in 0_u32.. {
            let task = format!("X-Dragonfly-Content-For-Calculating-Task-ID: probe {number}");
            let path = format!("/v2/probe/blobs/{digest}");
            let headers = [task.as_str(), "X-Dragonfly-Scheduling-Policy: always"];
            let answer = node.agent.get(&path, &headers)?;
            ensure!(answer.status == 200, "the probe was answered {answer:?}");
            if seed.traffic()?.from_origin > 0 {
                return Ok(());
            }
            if began.elapsed() > Duration::from_secs(90) {
                bail!("the scheduler has found no seed:\n{}", self.scheduler.log());
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    }
}

/// Dragonfly's scheduler.
#[derive(Debug)]
pub struct Scheduler {
    machine: Arc<Machine>,
    process: Option<Process>,
    directory: PathBuf,
    starts: u32,
}

impl Scheduler {
    fn start(machine: Arc<Machine>, scratch: &Path) -> Result<Self> {
        let directory = scratch.join("scheduler");
        fs::create_dir_all(&directory)?;
        let config = configuration(machine.address(), &directory);
        fs::write(directory.join("config.yaml"), config.to_string())?;
        let dynamic = json!({
            "applications": [],
            "seedPeerClusterConfig": {"loadLimit": 2000},
            "schedulerClusterConfig": {"candidateParentLimit": 3, "filterParentLimit": 15},
            "schedulerClusterClientConfig": {"loadLimit": 200},
        });
        fs::write(directory.join("dynconfig.yaml"), dynamic.to_string())?;
        let mut scheduler = Self {
            machine,
            process: None,
            directory,
            starts: 0,
        };
        scheduler.start_again()?;
        Ok(scheduler)
    }

    /// Where agents find it.
    #[must_use]
    pub fn address(&self) -> String {
        format!("{}:{SCHEDULER_PORT}", self.machine.address())
    }

    /// Everything that it logged since its last start.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Ends it at once.
    ///
    /// # Errors
    /// It is gone already.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("no scheduler runs")?;
        process.kill_group()
    }

    /// Lets it stand still, or go on.
    ///
    /// # Errors
    /// It is gone.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let process = self.process.as_ref().context("no scheduler runs")?;
        process.signal(if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        })
    }

    /// Starts it after it was killed; it knows nobody then.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_again(&mut self) -> Result<()> {
        self.starts += 1;
        let mut command = program("scheduler")?;
        self.machine.enter(&mut command);
        command
            .arg("--config")
            .arg(self.directory.join("config.yaml"));
        command
            .arg("--dynconfig")
            .arg(self.directory.join("dynconfig.yaml"));
        let log = self.directory.join(format!("log-{}", self.starts));
        let mut process = Process::start(command.arg("--console"), &log)?;
        process.wait_until(|process| listens(process, SCHEDULER_PORT))?;
        self.process = Some(process);
        Ok(())
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        if self.process.is_some() {
            // It has nothing to save.
            let _ = self.kill();
        }
    }
}

/// The scheduler's own file. JSON is YAML.
fn configuration(address: Ipv4Addr, directory: &Path) -> Value {
    json!({
        "server": {
            "advertiseIP": address, "listenIP": address,
            "port": SCHEDULER_PORT, "advertisePort": SCHEDULER_PORT,
            "logDir": directory.join("log"), "pluginDir": directory.join("plugins"),
            "logLevel": "info",
        },
        "scheduler": {
            "algorithm": "default",
            "backToSourceCount": 200,
            // Two seconds: a busy seed needs a moment until it is known to have begun.
            "retryBackToSourceLimit": 10, "retryLimit": 15, "retryInterval": "200ms",
        },
        "dynConfig": {"refreshInterval": "10s"},
        "seedPeer": {"taskDownloadTimeout": "10h"},
        "job": {"enable": false},
        "metrics": {"enable": true, "addr": format!("{address}:8000")},
        "network": {"enableIPv6": false},
        "console": true,
    })
}

/// A command that runs one of Dragonfly's programs.
///
/// # Errors
/// It has not been built.
pub fn program(name: &str) -> Result<Command> {
    let directory = std::env::var_os("NYDUS_DRAGONFLY").map_or_else(
        || PathBuf::from("/var/cache/nydus-dragonfly"),
        PathBuf::from,
    );
    let path = directory.join("bin").join(name);
    ensure!(
        path.is_file(),
        "{} is missing: run `make dragonfly`, which builds Dragonfly",
        path.display()
    );
    Ok(Command::new(path))
}

/// Whether the network of a process has a listener on this TCP port.
fn listens(process: &Process, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let port = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|table| {
        let path = format!("/proc/{}/net/{table}", process.id());
        fs::read_to_string(path)
            .unwrap_or_default()
            .lines()
            .any(|line| {
                let mut words = line.split_whitespace().skip(1);
                words.next().is_some_and(|local| local.ends_with(&port))
                    && words.nth(1) == Some(LISTEN)
            })
    })
}
