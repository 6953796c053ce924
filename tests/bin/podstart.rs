//! How long a pod takes from `crictl pull` to the first output of its program, over a link
//! of a given rate and length: with `nydus-snapshotter`, with containerd's overlayfs
//! snapshotter, and with stargz-snapshotter where it is there.
//!
//! Each start has a containerd of its own with nothing in it but the pod's pause image, and
//! everything else comes through the link. All is stopped at the end.

#[path = "demo/image.rs"]
mod image;

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use support::binaries::nydus_image;
use support::command::{interrupted, stop_on_signals, succeed};
use support::containerd::Containerd;
use support::image::programs::make_pause;
use support::plugin::Plugin;
use support::process::Process;
use support::registry::{Auth, Registry};
use support::relay::{Link, Relay};

/// What runs in the pod; prints when it is through.
const PROGRAM: &str =
    "import json,ssl,sqlite3,http.server,asyncio,xml.dom.minidom,decimal;print('started')";

/// How long a start may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measure how long pods take to start over a slow link.
#[derive(Debug, Parser)]
struct Cli {
    /// Rate of the link, in Mbit/s
    #[arg(long, default_value_t = 100)]
    mbit: u64,

    /// Round trip time of the link, in milliseconds
    #[arg(long, default_value_t = 20)]
    rtt_ms: u64,

    /// Times each snapshotter is measured
    #[arg(long, default_value_t = 3)]
    runs: usize,

    /// Pods that are started at once, each with its own container
    #[arg(long, default_value_t = 1)]
    pods: usize,

    /// Program that serves stargz-snapshotter; without it, that row is left out
    #[arg(long)]
    stargz: Option<PathBuf>,

    /// Directory that keeps the image made from Debian packages
    #[arg(long, default_value = "out/demo")]
    directory: PathBuf,
}

/// A snapshotter, and the tag of the image in its form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Snapshotter {
    Overlayfs,
    Stargz,
    Nydus,
}

impl Snapshotter {
    fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Stargz => "stargz",
            Self::Nydus => "nydus",
        }
    }
}

/// What one start cost.
#[derive(Clone, Copy, Debug)]
struct Cost {
    pull: Duration,
    whole: Duration,
    bytes: u64,
}

/// What runs beside containerd, until it is dropped.
#[derive(Default)]
struct Beside {
    _stargz: Option<Process>,
    _nydus: Option<Plugin>,
}

struct Bench<'a> {
    registry: &'a Registry,
    link: Link,
    scratch: &'a Path,
    stargz: Option<&'a Path>,
    pods: usize,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    stop_on_signals()?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run it as root: it mounts"
    );
    let layout = image::find_or_make(&cli.directory)?;
    let scratch = tempfile::tempdir_in(&cli.directory)?;
    // Sockets have short names only, and containerd wants absolute ones.
    let scratch_path = fs::canonicalize(scratch.path())?;
    let registry = Registry::start(Auth::Open)?;
    registry.push(&layout, image::TAG, "app:overlayfs")?;
    registry.push(&make_pause(&scratch_path)?, "pause", "pause:1")?;
    let bench = Bench {
        registry: &registry,
        link: Link {
            rate: cli.mbit.saturating_mul(1_000_000),
            round_trip: Duration::from_millis(cli.rtt_ms),
        },
        scratch: &scratch_path,
        stargz: cli.stargz.as_deref(),
        pods: cli.pods,
    };
    bench.convert()?;
    let mut rows = vec![Snapshotter::Overlayfs, Snapshotter::Nydus];
    if cli.stargz.is_some() {
        rows.insert(1, Snapshotter::Stargz);
        bench.convert_for_stargz()?;
    }
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{} Mbit/s, {} ms, {} pods, median of {}\n{:<14}{:>9}{:>18}{:>8}{:>10}",
        cli.mbit, cli.rtt_ms, cli.pods, cli.runs, "", "pull s", "to first output s", "ratio", "MB"
    )?;
    let mut first: Option<f64> = None;
    for row in rows {
        let mut costs = (0..cli.runs)
            .map(|_| bench.start(row))
            .collect::<Result<Vec<Cost>>>()?;
        costs.sort_by_key(|cost| cost.whole);
        let cost = costs.get(costs.len() / 2).context("--runs is 0")?;
        let whole = cost.whole.as_secs_f64();
        let ratio = whole / *first.get_or_insert(whole);
        #[allow(clippy::cast_precision_loss, reason = "a figure for people to read")]
        let megabytes = cost.bytes as f64 / 1e6;
        let pull = cost.pull.as_secs_f64();
        let name = row.name();
        writeln!(
            out,
            "{name:<14}{pull:>9.2}{whole:>18.2}{ratio:>8.2}{megabytes:>10.1}"
        )?;
    }
    Ok(())
}

impl Bench<'_> {
    fn convert(&self) -> Result<()> {
        let mut command = nydus_image()?;
        command
            .arg("convert")
            .arg(self.registry.reference("app:overlayfs"))
            .arg(self.registry.reference("app:nydus"));
        succeed(&mut command).map(drop)
    }

    /// Through a containerd, because its converter is a client of one.
    fn convert_for_stargz(&self) -> Result<()> {
        let (directory, _beside, containerd) = self.node(Snapshotter::Overlayfs)?;
        let (from, to) = (
            self.registry.reference("app:overlayfs"),
            self.registry.reference("app:stargz"),
        );
        let images = |arguments: &[&str]| {
            let mut command = containerd.ctr("convert");
            succeed(command.arg("images").args(arguments))
        };
        images(&["pull", "--plain-http", &from])?;
        let mut remote = Command::new("ctr-remote");
        remote
            .arg("--address")
            .arg(directory.path().join("containerd.sock"))
            .args(["--namespace", "convert", "images", "convert"])
            .args(["--estargz", "--oci", &from, &to]);
        succeed(&mut remote)?;
        images(&["push", "--plain-http", &to])?;
        Ok(())
    }

    /// A containerd with nothing in it, and what it needs beside it.
    fn node(&self, snapshotter: Snapshotter) -> Result<(tempfile::TempDir, Beside, Containerd)> {
        let directory = tempfile::tempdir_in(self.scratch)?;
        let at = directory.path();
        let (socket, beside) = match snapshotter {
            Snapshotter::Overlayfs => (at.join("none.sock"), Beside::default()),
            Snapshotter::Nydus => {
                let plugin = Plugin::start(at, "", &[])?;
                let address = plugin.address();
                let _nydus = Some(plugin);
                (
                    address,
                    Beside {
                        _nydus,
                        ..Beside::default()
                    },
                )
            }
            Snapshotter::Stargz => {
                let socket = at.join("stargz.sock");
                let program = self.stargz.context("no --stargz")?;
                let mut command = Command::new(program);
                command.arg("-root").arg(at.join("stargz"));
                command.arg("-address").arg(&socket);
                let mut process = Process::start(&mut command, &at.join("stargz.log"))?;
                process.wait_until(|_| socket.exists())?;
                let _stargz = Some(process);
                (
                    socket,
                    Beside {
                        _stargz,
                        ..Beside::default()
                    },
                )
            }
        };
        let pause = self.registry.reference("pause:1");
        let containerd = Containerd::start(at, &socket, snapshotter.name(), &pause)?;
        containerd.cri()?.pull(&pause, None)?;
        Ok((directory, beside, containerd))
    }

    fn start(&self, snapshotter: Snapshotter) -> Result<Cost> {
        ensure!(!interrupted(), "interrupted");
        let (directory, beside, containerd) = self.node(snapshotter)?;
        let upstream: SocketAddr = self.registry.host().parse()?;
        let relay = Relay::start("127.0.0.1:0".parse()?, upstream, self.link)?;
        let image = format!("{}/app:{}", relay.address(), snapshotter.name());
        let logs = directory.path().join("logs");
        fs::create_dir(&logs)?;
        let mut cri = containerd.cri()?;
        let began = Instant::now();
        cri.pull(&image, None)?;
        let pull = began.elapsed();
        thread::scope(|scope| {
            let pods = (0..self.pods).map(|number| {
                let (containerd, image, logs) = (&containerd, &image, &logs);
                scope.spawn(move || run_pod(containerd, number, image, logs))
            });
            let pods: Vec<_> = pods.collect();
            pods.into_iter().try_for_each(|pod| match pod.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
        .with_context(|| snapshotter.name())?;
        let cost = Cost {
            pull,
            whole: began.elapsed(),
            bytes: relay.received(),
        };
        cri.remove_all_pods()?;
        // containerd first: it unmounts what lies in its directory.
        drop((cri, containerd));
        drop(beside);
        Ok(cost)
    }
}

/// Starts a pod, and returns when its program has printed something.
fn run_pod(containerd: &Containerd, number: usize, image: &str, logs: &Path) -> Result<()> {
    let began = Instant::now();
    let name = format!("cold-{number}");
    let mut cri = containerd.cri()?;
    let pod = cri.run_pod(&name, logs)?;
    let container = cri.run(&pod, &name, image, &["/usr/bin/python3", "-c", PROGRAM])?;
    let output = logs.join(format!("{name}.log"));
    while !fs::read_to_string(&output).is_ok_and(|text| text.contains("started")) {
        let ended = cri.exit_code(&container)?;
        if began.elapsed() > PATIENCE || ended.is_some_and(|code| code != 0) {
            let text = fs::read_to_string(&output).unwrap_or_default();
            bail!("{name} has not started: {text}");
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
