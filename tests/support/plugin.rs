//! `nydus-snapshotter`, running, and a client that asks it as containerd does.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getpgid};
use snapshotter::api::snapshots::snapshots_client::SnapshotsClient;
use snapshotter::api::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
    PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
    UsageRequest, UsageResponse, ViewSnapshotRequest,
};
use snapshotter::api::types::Mount;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::api::{Answer, ask};
use crate::binaries::{nydus_snapshotter, nydusd_path};
use crate::command::succeed;
use crate::mount::detach;
use crate::notify::ServiceManager;
use crate::process::Process;

/// Its socket for people and their tools, below its directory.
const SYSTEM: &str = "run/system.sock";

/// Labels of a snapshot.
pub type Labels = HashMap<String, String>;

/// A running plugin with everything it keeps below one directory.
#[derive(Debug)]
pub struct Plugin {
    process: Option<Process>,
    directory: PathBuf,
    environment: Vec<(String, PathBuf)>,
    configuration: String,
    program: PathBuf,
    starts: u32,
}

impl Plugin {
    /// Starts one with its root and its socket below `directory`. `configuration` is
    /// added to its `config.toml`, `environment` to its environment.
    ///
    /// # Errors
    /// It does not start; with its log.
    pub fn start(
        directory: &Path,
        configuration: &str,
        environment: &[(&str, PathBuf)],
    ) -> Result<Self> {
        let mut plugin = Self {
            process: None,
            directory: directory.to_owned(),
            environment: environment
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.clone()))
                .collect(),
            configuration: configuration.to_owned(),
            program: nydusd_path()?,
            starts: 0,
        };
        plugin.start_again()?;
        Ok(plugin)
    }

    /// Has its next life configured otherwise.
    ///
    /// * `configuration`: as for [`Plugin::start`].
    pub fn configure(&mut self, configuration: &str) {
        configuration.clone_into(&mut self.configuration);
    }

    /// Has its next life told of another nydusd.
    pub fn configure_program(&mut self, program: &Path) {
        program.clone_into(&mut self.program);
    }

    /// Starts it after it has ended.
    ///
    /// # Errors
    /// As [`Plugin::start`].
    pub fn start_again(&mut self) -> Result<()> {
        let command = self.command()?;
        self.launch(command)
    }

    /// Starts it after it has ended, as a service of `manager`.
    ///
    /// # Errors
    /// As [`Plugin::start`].
    pub fn start_as_service(&mut self, manager: &Mutex<ServiceManager>) -> Result<()> {
        let command = self.command()?;
        let service = {
            let manager = manager.lock().unwrap_or_else(PoisonError::into_inner);
            manager.service(&command)
        };
        self.launch(service)
    }

    fn command(&self) -> Result<Command> {
        let config = self.directory.join("config.toml");
        let text = format!(
            "root = {:?}\naddress = {:?}\n{}\n[system]\nenable = true\naddress = {:?}\n",
            self.root(),
            self.address(),
            self.configuration,
            self.directory.join(SYSTEM),
        );
        std::fs::write(&config, text)?;
        let mut command = nydus_snapshotter()?;
        command
            .arg("--config")
            .arg(config)
            .arg("--nydusd")
            .arg(&self.program);
        command.arg("--log-level").arg("debug");
        command.env("DOCKER_CONFIG", self.directory.join("no-credentials"));
        command.envs(self.environment.iter().cloned());
        Ok(command)
    }

    fn launch(&mut self, mut command: Command) -> Result<()> {
        self.starts += 1;
        let log = self
            .directory
            .join(format!("snapshotter-{}.log", self.starts));
        let mut process = Process::start(&mut command, &log)?;
        let address = self.address();
        let system = self.directory.join(SYSTEM);
        let listens = |path: &Path| UnixStream::connect(path).is_ok();
        process.wait_until(|_| listens(&address) && listens(&system))?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends it at once, as if the machine had no memory left.
    ///
    /// # Errors
    /// It is gone already.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the plugin does not run")?;
        process.signal(Signal::SIGKILL)?;
        process.wait()?;
        Ok(())
    }

    /// Ends it as a service manager would.
    ///
    /// # Errors
    /// It does not end with exit code 0.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the plugin does not run")?;
        process.signal(Signal::SIGTERM)?;
        let status = process.wait()?;
        anyhow::ensure!(
            status.success(),
            "the plugin ended with {status}:\n{}",
            process.log()
        );
        Ok(())
    }

    /// Its directory.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Its socket.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        self.directory.join("run/grpc.sock")
    }

    /// What its system API answers.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn ask(&self, method: &str, target: &str, body: &str) -> Result<Answer> {
        ask(&self.directory.join(SYSTEM), method, target, body)
    }

    /// What it has logged since it was started last.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// A client of it.
    ///
    /// # Errors
    /// It does not listen.
    pub fn client(&self) -> Result<Client> {
        Client::connect(&self.address())
    }

    /// Process ids of the daemons that serve its images: one for each, although a
    /// daemon is several processes.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn daemons(&self) -> Result<Vec<i32>> {
        let processes = self.processes()?;
        let is_child = |pid: &i32| parent_of(*pid).is_some_and(|of| processes.contains(&of));
        Ok(processes
            .iter()
            .copied()
            .filter(|pid| !is_child(pid))
            .collect())
    }

    /// Kills all processes of these daemons at once.
    ///
    /// # Errors
    /// One of them is gone already.
    pub fn kill_daemons(&self, daemons: &[i32]) -> Result<()> {
        for daemon in daemons {
            // The group is that of the process that the plugin has started.
            let group = getpgid(Some(Pid::from_raw(*daemon)))?;
            killpg(group, Signal::SIGKILL)?;
        }
        Ok(())
    }

    /// Whether this process of a daemon is the one that only holds descriptors.
    #[must_use]
    pub fn is_keeper(&self, pid: i32) -> bool {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0).nth(1) != Some(b"worker")
    }

    /// Process ids of all processes of all daemons.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn processes(&self) -> Result<Vec<i32>> {
        // Not by `pgrep`: it looks at every process, and one of a container that waits for
        // its daemon lets nobody look.
        let here = std::fs::read_link("/proc/self/ns/mnt")?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(pid) = name.and_then(|name| name.parse().ok()) else {
                continue;
            };
            if std::fs::read_link(path.join("ns/mnt")).is_ok_and(|there| there == here) {
                let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
                let mut words = line.split(|&byte| byte == 0);
                let point = words.find(|word| *word == b"--mountpoint");
                let point = point.and_then(|_| words.next()).unwrap_or_default();
                if Path::new(OsStr::from_bytes(point)).starts_with(self.root()) {
                    found.push(pid);
                }
            }
        }
        Ok(found)
    }
}

/// The parent of a process, if that still runs.
fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may contain anything: state, parent.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

impl Drop for Plugin {
    fn drop(&mut self) {
        drop(self.process.take());
        // Its daemons outlive it on purpose.
        for daemon in self.daemons().unwrap_or_default() {
            // Gone by itself meanwhile, perhaps.
            let _ = self.kill_daemons(&[daemon]);
        }
        for entry in std::fs::read_dir(self.root().join("snapshots"))
            .into_iter()
            .flatten()
            .flatten()
        {
            detach(&entry.path().join("mnt"));
        }
        let shared = self.root().join("mnt");
        // Directories that a mount shows, and its daemon is gone, cannot be listed.
        for entry in std::fs::read_dir(&shared).into_iter().flatten().flatten() {
            detach(&entry.path());
        }
        detach(&shared);
    }
}

/// Calls the plugin, one request at a time. Errors are gRPC codes.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
}

/// A connection to a Unix socket.
pub(crate) fn connect(runtime: &Runtime, path: &Path) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", path.display()))?;
    runtime
        .block_on(endpoint.connect())
        .with_context(|| format!("cannot connect to {}", path.display()))
}

impl Client {
    /// Connects to the plugin at `address`.
    ///
    /// # Errors
    /// It does not listen.
    pub fn connect(address: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let channel = connect(&runtime, address)?;
        Ok(Self {
            client: SnapshotsClient::new(channel),
            runtime,
        })
    }

    /// Prepare.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn prepare(
        &mut self,
        key: &str,
        parent: &str,
        labels: &[(&str, &str)],
    ) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest {
            snapshotter: "nydus".to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: owned(labels),
        };
        Ok(self
            .runtime
            .block_on(self.client.prepare(request))?
            .into_inner()
            .mounts)
    }

    /// View.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn view(&mut self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        let request = ViewSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            ..ViewSnapshotRequest::default()
        };
        Ok(self
            .runtime
            .block_on(self.client.view(request))?
            .into_inner()
            .mounts)
    }

    /// Mounts.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn mounts(&mut self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = MountsRequest {
            key: key.to_owned(),
            ..MountsRequest::default()
        };
        Ok(self
            .runtime
            .block_on(self.client.mounts(request))?
            .into_inner()
            .mounts)
    }

    /// Commit.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn commit(&mut self, name: &str, key: &str, labels: &[(&str, &str)]) -> Result<(), Status> {
        let request = CommitSnapshotRequest {
            name: name.to_owned(),
            key: key.to_owned(),
            labels: owned(labels),
            ..CommitSnapshotRequest::default()
        };
        self.runtime.block_on(self.client.commit(request)).map(drop)
    }

    /// Remove.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn remove(&mut self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest {
            key: key.to_owned(),
            ..RemoveSnapshotRequest::default()
        };
        self.runtime.block_on(self.client.remove(request)).map(drop)
    }

    /// Stat.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn stat(&mut self, key: &str) -> Result<Info, Status> {
        let request = StatSnapshotRequest {
            key: key.to_owned(),
            ..StatSnapshotRequest::default()
        };
        let answer = self
            .runtime
            .block_on(self.client.stat(request))?
            .into_inner();
        answer
            .info
            .ok_or_else(|| Status::unknown("an answer without snapshot"))
    }

    /// Update of labels; `paths` as in a field mask, none for all.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn update(
        &mut self,
        key: &str,
        labels: &[(&str, &str)],
        paths: &[&str],
    ) -> Result<Info, Status> {
        let mut request = UpdateSnapshotRequest {
            info: Some(Info {
                name: key.to_owned(),
                labels: owned(labels),
                ..Info::default()
            }),
            ..UpdateSnapshotRequest::default()
        };
        if !paths.is_empty() {
            request.update_mask.get_or_insert_default().paths =
                paths.iter().map(|path| (*path).to_owned()).collect();
        }
        let answer = self
            .runtime
            .block_on(self.client.update(request))?
            .into_inner();
        answer
            .info
            .ok_or_else(|| Status::unknown("an answer without snapshot"))
    }

    /// List, all messages of the stream together.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn list(&mut self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let request = ListSnapshotsRequest {
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
            ..ListSnapshotsRequest::default()
        };
        self.runtime.block_on(async {
            let mut stream = self.client.list(request).await?.into_inner();
            let mut all = Vec::new();
            while let Some(message) = stream.message().await? {
                all.extend(message.info);
            }
            Ok(all)
        })
    }

    /// Usage.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn usage(&mut self, key: &str) -> Result<UsageResponse, Status> {
        let request = UsageRequest {
            key: key.to_owned(),
            ..UsageRequest::default()
        };
        Ok(self
            .runtime
            .block_on(self.client.usage(request))?
            .into_inner())
    }

    /// Cleanup.
    ///
    /// # Errors
    /// What the plugin says.
    pub fn cleanup(&mut self) -> Result<(), Status> {
        self.runtime
            .block_on(self.client.cleanup(CleanupRequest::default()))
            .map(drop)
    }
}

/// The code of an answer; `Ok` for success.
pub fn code<T>(answer: Result<T, Status>) -> Code {
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

fn owned(labels: &[(&str, &str)]) -> Labels {
    labels
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// Mounts that a snapshot consists of, performed on a directory.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Performs `mounts` on `point`, which is made if necessary. Directories below
    /// `root/snapshots` are given relative to it, as containerd does it: many of them
    /// would not fit into the options otherwise.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(mounts: &[Mount], root: &Path, point: &Path) -> Result<Self> {
        std::fs::create_dir_all(point)?;
        let snapshots = root.join("snapshots");
        for mount in mounts {
            let options = mount
                .options
                .join(",")
                .replace(&format!("{}/", snapshots.display()), "");
            let mut command = Command::new("mount");
            command
                .current_dir(&snapshots)
                .args(["-t", &mount.r#type, "-o", &options, &mount.source])
                .arg(point);
            if mount.r#type == "bind" {
                command = Command::new("mount");
                command
                    .args(["--bind", "-o", &options, &mount.source])
                    .arg(point);
            }
            succeed(&mut command)?;
        }
        Ok(Self(point.to_owned()))
    }

    /// Where.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        detach(&self.0);
    }
}
