//! How long a program of an image takes from nothing, over a link of a given rate and
//! length: mounted lazily, against pulling and unpacking all of it.
//!
//! Each row is a way to build and mount the image; `misc/bench/coldstart.sh` has the
//! ones worth comparing. Everything runs on this machine and is stopped at the end.

#[path = "demo/image.rs"]
mod image;

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use support::binaries::{nydus_image, nydusd};
use support::command::{interrupted, stop_on_signals, succeed};
use support::image::layer::write_tree;
use support::image::layout::{self, Image};
use support::mount::Nydusd;
use support::registry::{Auth, Registry};
use support::relay::{Link, Relay};

/// What is run in the image.
const PROGRAM: &str = "import json,ssl,sqlite3,http.server,asyncio,xml.dom.minidom,decimal";

/// Measure cold starts over a slow link.
#[derive(Debug, Parser)]
struct Cli {
    /// A way to build and mount: `NAME|arguments for convert|arguments for mount`
    #[arg(required = true)]
    rows: Vec<String>,

    /// Rate of the link, in Mbit/s
    #[arg(long, default_value_t = 100)]
    mbit: u64,

    /// Round trip time of the link, in milliseconds
    #[arg(long, default_value_t = 20)]
    rtt_ms: u64,

    /// Times each row is measured
    #[arg(long, default_value_t = 3)]
    runs: usize,

    /// Directory that keeps the image made from Debian packages
    #[arg(long, default_value = "out/demo")]
    directory: PathBuf,

    /// Keep the daemon's log of the last run of each row there
    #[arg(long)]
    logs: Option<PathBuf>,
}

/// What one start cost.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Until the mount was there.
    mount: Duration,
    /// From the first command to the end of the program.
    whole: Duration,
    /// Bytes that came over the link until then.
    bytes: u64,
    /// Requests that the registry answered.
    requests: u64,
}

struct Bench<'a> {
    registry: &'a Registry,
    link: Link,
    scratch: &'a Path,
    logs: Option<&'a Path>,
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
    let registry = Registry::start(Auth::Open)?;
    registry.push(&layout, image::TAG, "cold:original")?;
    let bench = Bench {
        registry: &registry,
        link: Link {
            rate: cli.mbit.saturating_mul(1_000_000),
            round_trip: Duration::from_millis(cli.rtt_ms),
        },
        scratch: scratch.path(),
        logs: cli.logs.as_deref(),
    };
    let mut table = format!(
        "{} Mbit/s, {} ms, median of {}\n{:<26}{:>9}{:>9}{:>8}{:>10}{:>10}\n",
        cli.mbit, cli.rtt_ms, cli.runs, "", "mount s", "all s", "ratio", "MB", "requests"
    );
    let url = bench.push_whole(&cli.directory.join("root"))?;
    let whole = median(cli.runs, || bench.pull_and_unpack(&url))?;
    row(&mut table, "pull and unpack", &whole, &whole)?;
    for text in &cli.rows {
        let mut parts = text.splitn(3, '|');
        let name = parts.next().unwrap_or_default();
        let convert = words(parts.next());
        let mount = words(parts.next());
        let image = bench.convert(name, &convert)?;
        let cost = median(cli.runs, || bench.start(name, &image, &mount))?;
        row(&mut table, name, &cost, &whole)?;
    }
    std::io::stdout().write_all(table.as_bytes())?;
    Ok(())
}

fn words(text: Option<&str>) -> Vec<&str> {
    text.unwrap_or_default().split_whitespace().collect()
}

fn row(table: &mut String, name: &str, cost: &Cost, whole: &Cost) -> Result<()> {
    let ratio = cost.whole.as_secs_f64() / whole.whole.as_secs_f64();
    #[allow(clippy::cast_precision_loss, reason = "a figure for people to read")]
    let megabytes = cost.bytes as f64 / 1e6;
    writeln!(
        table,
        "{name:<26}{:>9.2}{:>9.2}{ratio:>8.2}{megabytes:>10.1}{:>10}",
        cost.mount.as_secs_f64(),
        cost.whole.as_secs_f64(),
        cost.requests
    )?;
    Ok(())
}

/// The run in the middle, by time.
fn median(runs: usize, mut run: impl FnMut() -> Result<Cost>) -> Result<Cost> {
    let mut costs = Vec::new();
    for _ in 0..runs {
        ensure!(!interrupted(), "interrupted");
        costs.push(run()?);
    }
    costs.sort_by_key(|cost| cost.whole);
    costs.get(costs.len() / 2).copied().context("--runs is 0")
}

impl Bench<'_> {
    /// The whole tree as one tar.gz in the registry; its path there.
    fn push_whole(&self, root: &Path) -> Result<String> {
        let (tar, at) = (self.scratch.join("root.tar"), self.scratch.join("whole"));
        write_tree(root, &tar)?;
        layout::write(&at, "whole", &[Image::new(&[&tar])])?;
        fs::remove_file(tar)?;
        self.registry.push(&at, "whole", "cold:whole")?;
        let manifest = self.registry.manifest_json("cold:whole")?;
        let digest = manifest["layers"][0]["digest"].as_str();
        Ok(format!("v2/cold/blobs/{}", digest.context("no layer")?))
    }

    fn convert(&self, name: &str, arguments: &[&str]) -> Result<String> {
        let tag = format!("cold:{}", name.replace(|c: char| !c.is_alphanumeric(), "-"));
        let mut command = nydus_image()?;
        command.arg("convert").args(arguments);
        command.arg(self.registry.reference("cold:original"));
        succeed(command.arg(self.registry.reference(&tag)))?;
        Ok(tag)
    }

    fn relay(&self) -> Result<Relay> {
        let upstream: SocketAddr = self.registry.host().parse()?;
        Relay::start("127.0.0.1:0".parse()?, upstream, self.link)
    }

    fn pull_and_unpack(&self, path: &str) -> Result<Cost> {
        let relay = self.relay()?;
        let root = self.scratch.join("root");
        fs::create_dir(&root)?;
        let began = Instant::now();
        let mut curl = Command::new("curl")
            .args(["-sSf", &format!("http://{}/{path}", relay.address())])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run curl: install the package curl")?;
        let tar = Command::new("tar")
            .args(["-xz", "--numeric-owner", "-C"])
            .arg(&root)
            .stdin(curl.stdout.take().context("no pipe")?)
            .status();
        let downloaded = curl.wait()?;
        ensure!(downloaded.success() && tar?.success(), "download failed");
        let whole = began.elapsed();
        fs::remove_dir_all(root)?;
        Ok(Cost {
            mount: whole,
            whole,
            bytes: relay.received(),
            requests: 1,
        })
    }

    /// Mounts from an empty cache and runs the program.
    fn start(&self, name: &str, image: &str, arguments: &[&str]) -> Result<Cost> {
        let relay = self.relay()?;
        let (point, cache) = (self.scratch.join("mount"), self.scratch.join("cache"));
        let log = self.scratch.join("nydusd.log");
        fs::create_dir(&point)?;
        let mut command = nydusd()?;
        command.arg("mount").args(arguments);
        command
            .arg(format!("{}/{image}", relay.address()))
            .arg(&point);
        command.arg("--cache-dir").arg(&cache);
        let mark = self.registry.log().len();
        let began = Instant::now();
        let daemon = Nydusd::start(&mut command, &point, &log)?;
        let mount = began.elapsed();
        let mut program = Command::new("chroot");
        program
            .arg(&point)
            .args(["/usr/bin/python3", "-c", PROGRAM]);
        succeed(program.env("PYTHONDONTWRITEBYTECODE", "1"))?;
        let whole = began.elapsed();
        let (bytes, requests) = (relay.received(), self.registry.traffic_since(mark).requests);
        daemon.stop()?;
        if let Some(logs) = self.logs {
            fs::create_dir_all(logs)?;
            fs::copy(&log, logs.join(name))?;
        }
        fs::remove_dir(point)?;
        fs::remove_dir_all(cache)?;
        Ok(Cost {
            mount,
            whole,
            bytes,
            requests,
        })
    }
}
