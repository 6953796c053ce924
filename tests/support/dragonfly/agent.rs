//! One `dfdaemon`: its configuration, its life, its piece store, and what it counts.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{listens, program};
use crate::command::succeed;
use crate::netns::Machine;
use crate::process::Process;

/// Where an agent serves the registry API, on the loopback of its machine.
pub const PROXY_PORT: u16 = 4001;
/// Where it serves its counters.
const METRICS_PORT: u16 = 4002;
/// Where it says that it runs.
pub const HEALTH_PORT: u16 = 4003;

/// How long ports may take to be free.
const PATIENCE: Duration = Duration::from_secs(90);

/// What an agent is started with.
pub(super) struct Setup<'s> {
    pub name: &'s str,
    pub is_seed: bool,
    /// Address of the scheduler.
    pub scheduler: String,
    /// Host of the registry that is asked when a request names none.
    pub registry: &'s str,
    /// Laid over the configuration.
    pub more: &'s Value,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    machine: Arc<Machine>,
    process: Option<Process>,
    directory: PathBuf,
    starts: u32,
}

/// Whole pieces that an agent got, in bytes, by where they came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From other agents.
    pub from_peers: u64,
    /// From the registry.
    pub from_origin: u64,
    /// From its own disk.
    pub from_disk: u64,
}

/// What an agent answered.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Length of the body.
    pub length: u64,
    /// Status line and headers.
    pub head: String,
    /// Until the last byte, in seconds.
    pub seconds: f64,
}

impl Agent {
    /// Starts one without waiting for it.
    pub(super) fn start(
        machine: Arc<Machine>,
        directory: &Path,
        setup: &Setup<'_>,
    ) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let mut config = configuration(&machine, directory, setup);
        merge(&mut config, setup.more);
        fs::write(directory.join("config.yaml"), config.to_string())?;
        let dynamic = json!({"scheduler": {"addrs": [setup.scheduler]}});
        fs::write(directory.join("dynconfig.yaml"), dynamic.to_string())?;
        let mut agent = Self {
            machine,
            process: None,
            directory: directory.to_owned(),
            starts: 0,
        };
        agent.launch()?;
        Ok(agent)
    }

    fn launch(&mut self) -> Result<()> {
        self.starts += 1;
        let mut command = program("dfdaemon")?;
        self.machine.enter(&mut command);
        for (option, file) in [
            ("--config", "config.yaml"),
            ("--dynconfig", "dynconfig.yaml"),
            ("--log-dir", "log"),
        ] {
            command.arg(option).arg(self.directory.join(file));
        }
        command.args(["--log-level", "info", "--console"]);
        let log = self.directory.join(format!("log-{}", self.starts));
        self.process = Some(Process::start(&mut command, &log)?);
        Ok(())
    }

    /// Waits until it serves the registry API, which is the last thing that it opens.
    ///
    /// # Errors
    /// It ends first: no scheduler answers, for example.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let process = self.process.as_mut().context("the agent does not run")?;
        process.wait_until(|process| listens(process, PROXY_PORT))
    }

    /// Ends it at once. Pieces stay on its disk, and are deleted by the next start.
    ///
    /// # Errors
    /// It is gone already.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the agent does not run")?;
        process.kill_group()
    }

    /// Lets it stand still, or go on.
    ///
    /// # Errors
    /// It is gone.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let process = self.process.as_ref().context("the agent does not run")?;
        process.signal(if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        })
    }

    /// Starts it after it was killed, and waits until it serves. As a supervisor would,
    /// again while its ports are not yet free.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_again(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            self.launch()?;
            let ready = self.wait_until_ready();
            let ports_in_use = self.log().contains("Address already in use");
            if ready.is_ok() || !ports_in_use || began.elapsed() > PATIENCE {
                return ready;
            }
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// Changes its configuration file: `more` is laid over it at the next start.
    ///
    /// # Errors
    /// The disk is full.
    pub fn configure(&self, more: &Value) -> Result<()> {
        let file = self.directory.join("config.yaml");
        let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
        merge(&mut config, more);
        fs::write(file, config.to_string())?;
        Ok(())
    }

    /// Where it runs.
    #[must_use]
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Everything that it logged since its last start.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Files with the bytes of pieces, one for each blob.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn pieces(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut pending = vec![self.directory.join("storage/content")];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(&directory)
                .with_context(|| format!("cannot list {}", directory.display()))?
            {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                } else {
                    found.push(entry.path());
                }
            }
        }
        Ok(found)
    }

    /// Asks it for `path` of the registry, as its own machine can.
    ///
    /// # Errors
    /// No answer came.
    pub fn get(&self, path: &str, headers: &[&str]) -> Result<Answer> {
        let mut curl = self.machine.command("curl");
        curl.args(["-sS", "-o", "/dev/null", "-D", "-"]);
        curl.args(["-w", "\n%{http_code} %{size_download} %{time_total}"]);
        curl.args(["-H", "Accept-Encoding: identity", "--max-time", "120"]);
        for header in headers {
            curl.args(["-H", header]);
        }
        let said = succeed(curl.arg(format!("http://127.0.0.1:{PROXY_PORT}{path}")))?.stdout;
        let (head, numbers) = said.rsplit_once('\n').context("curl said nothing")?;
        let mut numbers = numbers.split(' ');
        let mut next = || numbers.next().context("curl said too little");
        Ok(Answer {
            status: next()?.parse()?,
            length: next()?.parse()?,
            head: head.to_owned(),
            seconds: next()?.parse()?,
        })
    }

    /// What it has got so far, by its own count.
    ///
    /// # Errors
    /// It does not answer.
    pub fn traffic(&self) -> Result<Traffic> {
        let metrics = self.metrics()?;
        let of = |kind: &str| {
            let label = format!("type=\"{kind}\"");
            sum(&metrics, "dragonfly_client_download_traffic", &label)
        };
        Ok(Traffic {
            from_peers: of("REMOTE_PEER"),
            from_origin: of("BACK_TO_SOURCE"),
            from_disk: of("LOCAL_PEER"),
        })
    }

    /// Requests that its proxy was sent so far.
    ///
    /// # Errors
    /// It does not answer.
    pub fn requests(&self) -> Result<u64> {
        self.count("dragonfly_client_proxy_request_total")
    }

    /// One of its counters, added up over all labels.
    ///
    /// # Errors
    /// It does not answer.
    pub fn count(&self, name: &str) -> Result<u64> {
        Ok(sum(&self.metrics()?, name, ""))
    }

    /// All counters, in Prometheus' text format.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metrics(&self) -> Result<String> {
        let mut curl = self.machine.command("curl");
        curl.args(["-sSf", "--max-time", "30"]);
        let url = format!("http://127.0.0.1:{METRICS_PORT}/metrics");
        let text = succeed(curl.arg(url))?.stdout;
        ensure!(!text.is_empty(), "the agent counts nothing");
        Ok(text)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.process.is_some() {
            // It has nothing to save.
            let _ = self.kill();
        }
    }
}

/// Adds up a counter over all label sets that contain `label`.
fn sum(metrics: &str, name: &str, label: &str) -> u64 {
    let lines = metrics.lines().filter(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(label))
    });
    lines
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

/// The agent's own file. JSON is YAML.
fn configuration(machine: &Machine, directory: &Path, setup: &Setup<'_>) -> Value {
    let address = machine.address();
    let here = "127.0.0.1";
    json!({
        "host": {"hostname": setup.name, "ip": address},
        "server": {
            "pluginDir": directory.join("plugins"),
            "cacheDir": directory.join("cache"),
        },
        "download": {
            "server": {"socketPath": directory.join("dfdaemon.sock")},
            "pieceTimeout": "30s",
            "collectedPieceTimeout": "5s",
        },
        "upload": {"server": {"ip": address, "port": 4000}},
        "scheduler": {
            "announceInterval": "10s", "scheduleTimeout": "30s", "maxScheduleCount": 5,
        },
        "seedPeer": {"enable": setup.is_seed, "type": "super"},
        "dynconfig": {"refreshInterval": "10s"},
        "storage": {
            "dir": directory.join("storage"), "keep": false,
            "server": {"ip": address, "tcpPort": 4005, "quicPort": 4006},
        },
        "gc": {
            "interval": "900s",
            "policy": {"diskHighThresholdPercent": 99, "diskLowThresholdPercent": 98},
        },
        "proxy": {
            "server": {"ip": if setup.is_seed { "0.0.0.0" } else { here }, "port": PROXY_PORT},
            "registryMirror": {"addr": format!("http://{}", setup.registry)},
            "rules": [{"regex": "blobs/sha256.*"}],
            "prefetch": false,
        },
        "health": {"server": {"ip": here, "port": HEALTH_PORT}},
        "metrics": {"server": {"ip": here, "port": METRICS_PORT}},
        "stats": {"server": {"ip": here, "port": 4004}},
    })
}

/// Lays `more` over `config`, object by object.
fn merge(config: &mut Value, more: &Value) {
    match (config, more) {
        (Value::Object(config), Value::Object(more)) => {
            for (key, value) in more {
                merge(config.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (config, more) => *config = more.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_added_up() {
        let metrics = "# TYPE a counter\na{type=\"X\",b=\"1\"} 5\na{type=\"X\",b=\"2\"} 6\n\
                       a{type=\"Y\"} 7\na_more 8\n";
        assert_eq!(sum(metrics, "a", "type=\"X\""), 11);
        assert_eq!(sum(metrics, "a", ""), 18);
    }

    #[test]
    fn settings_are_laid_over_each_other() {
        let mut config = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge(&mut config, &json!({"a": {"c": 3}, "d": [2]}));
        assert_eq!(config, json!({"a": {"b": 1, "c": 3}, "d": [2]}));
    }
}
