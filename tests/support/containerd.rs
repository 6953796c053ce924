//! The machine's containerd (Debian's, or a later one), with its root, its state and its socket in a directory of
//! its own and `nydus-snapshotter` as one of its snapshotters. The containerd of the
//! machine, if there is one, is left alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use crate::command::succeed;
use crate::cri::Cri;
use crate::mount::detach;
use crate::process::Process;

/// What CRI needs of the configuration of containerd 1.6 and 1.7.
const CRI_OF_VERSION_1: &str = r#"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "PAUSE"
  disable_tcp_service = true
  stream_server_port = "0"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "DIRECTORY/cni/bin"
    conf_dir = "DIRECTORY/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "SNAPSHOTTER"
    disable_snapshot_annotations = false
    discard_unpacked_layers = false
"#;

/// The same for 2.0 and later.
const CRI_OF_VERSION_2: &str = r#"
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
  stream_server_port = "0"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dir = "DIRECTORY/cni/bin"
    conf_dir = "DIRECTORY/cni/net.d"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "SNAPSHOTTER"
  disable_snapshot_annotations = false
  discard_unpacked_layers = false
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "PAUSE"
"#;

/// Whether the `containerd` of the search path is of version 2 or later.
fn is_version_2() -> Result<bool> {
    let said = succeed(Command::new("containerd").arg("--version"))?.stdout;
    let mut words = said.split_whitespace();
    let version = words.find_map(|word| {
        let word = word.trim_start_matches('v');
        word.split_once('.')?.0.parse::<u32>().ok()
    });
    Ok(version.with_context(|| format!("not a version: {said}"))? >= 2)
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    process: Option<Process>,
    directory: PathBuf,
    starts: u32,
}

impl Containerd {
    /// Starts one below `directory`, with the plugin at `plugin` and `snapshotter`
    /// (`nydus` or `stargz` for the plugin, or `overlayfs`) for pods, which use the image `pause`.
    ///
    /// # Errors
    /// It does not start; with its log.
    pub fn start(directory: &Path, plugin: &Path, snapshotter: &str, pause: &str) -> Result<Self> {
        let mut containerd = Self {
            process: None,
            directory: directory.to_owned(),
            starts: 0,
        };
        containerd.configure(plugin, snapshotter, pause)?;
        containerd.start_again()?;
        Ok(containerd)
    }

    /// Writes another configuration, for the next start.
    ///
    /// # Errors
    /// The disk is full.
    pub fn configure(&self, plugin: &Path, snapshotter: &str, pause: &str) -> Result<()> {
        let directory = self.directory.display();
        let (version, cri) = if is_version_2()? {
            (3, CRI_OF_VERSION_2)
        } else {
            (2, CRI_OF_VERSION_1)
        };
        let cri = cri
            .replace("DIRECTORY", &directory.to_string())
            .replace("SNAPSHOTTER", snapshotter)
            .replace("PAUSE", pause);
        let text = format!(
            r#"
version = {version}
root = "{directory}/containerd"
state = "{directory}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.ttrpc"
[debug]
  address = "{directory}/debug.sock"
[proxy_plugins.nydus]
  type = "snapshot"
  address = "{plugin}"
[proxy_plugins.stargz]
  type = "snapshot"
  address = "{plugin}"
# Usually a collection is followed by a pause 49 times as long, which on a busy machine
# is longer than tests wait.
[plugins."io.containerd.gc.v1.scheduler"]
  pause_threshold = 0.5
  deletion_threshold = 1
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
{cri}"#,
            plugin = plugin.display(),
        );
        fs::write(self.directory.join("containerd.toml"), text)?;
        Ok(())
    }

    /// Starts it after it has ended.
    ///
    /// # Errors
    /// As [`Containerd::start`].
    pub fn start_again(&mut self) -> Result<()> {
        self.starts += 1;
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(self.directory.join("containerd.toml"));
        let log = self
            .directory
            .join(format!("containerd-{}.log", self.starts));
        let mut process = Process::start(&mut command, &log)?;
        let socket = self.socket();
        process.wait_until(|_| {
            Cri::connect(&socket)
                .and_then(|mut cri| cri.version())
                .is_ok()
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends it at once. Containers go on running.
    ///
    /// # Errors
    /// It is gone already.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::SIGKILL)?;
            process.wait()?;
        }
        Ok(())
    }

    /// A client of it.
    ///
    /// # Errors
    /// It does not listen.
    pub fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket())
    }

    /// A command that runs `ctr` in the namespace `namespace`.
    #[must_use]
    pub fn ctr(&self, namespace: &str) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", namespace]);
        command
    }

    /// Collects garbage, now and to the end. By itself containerd overlooks what is
    /// removed while it collects, or while the plugin cannot be reached, until something
    /// else is removed: so something is.
    ///
    /// # Errors
    /// It does not answer, or does not reach the plugin.
    pub fn collect_garbage(&self) -> Result<()> {
        let snapshot = |word: &str| {
            let mut command = self.ctr("k8s.io");
            command.args(["snapshots", "--snapshotter", "nydus", word, "garbage"]);
            succeed(&mut command).map(drop)
        };
        // It may be there already, from a call that failed half-way.
        let _ = snapshot("prepare");
        snapshot("rm")?;
        let lease = |words: &[&str]| {
            let mut command = self.ctr("k8s.io");
            succeed(command.arg("leases").args(words)).map(drop)
        };
        lease(&["create", "--id", "garbage"])?;
        lease(&["delete", "--sync", "garbage"])
    }

    /// What it has logged since it was started last.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// Ends every shim of this containerd, and with them all containers.
    fn end_shims(&self) {
        let mut pgrep = Command::new("pgrep");
        pgrep
            .arg("-f")
            .arg(format!("containerd-shim.*{}/", self.directory.display()));
        let Ok(found) = crate::command::run(&mut pgrep) else {
            return;
        };
        for pid in found.stdout.lines().filter_map(|line| line.parse().ok()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
    }

    /// Processes whose root is a container of this containerd.
    fn end_containers(&self) {
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let cgroup = fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
            let ours = cgroup.contains(&format!("upperdir={}/", self.directory.display()))
                && fs::read_link(entry.path().join("ns/mnt")).ok()
                    != fs::read_link("/proc/self/ns/mnt").ok();
            let name = entry.file_name();
            if let Some(pid) = name
                .to_str()
                .and_then(|name| name.parse().ok())
                .filter(|_| ours)
            {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if self.process.is_none() {
            let _ = self.start_again();
        }
        let removed = self.cri().and_then(|mut cri| cri.remove_all_pods());
        drop(self.process.take());
        if removed.is_err() {
            self.end_shims();
            self.end_containers();
        }
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut points: Vec<&str> = table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .collect();
        points.retain(|point| Path::new(point).starts_with(&self.directory));
        for point in points.into_iter().rev() {
            detach(Path::new(point));
        }
    }
}
