//! What the data path makes of a link and of a warm cache: one big file that does not
//! compress, read in order and at random, against `curl` of the same bytes over the
//! same link and against the memory copy that serving resident bytes is.
//!
//! Everything runs on this machine and is stopped at the end. Prints, judges nothing.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use support::binaries::{nydus_image, nydusd};
use support::command::{stop_on_signals, succeed_within};
use support::image::layer::write_tree;
use support::image::layout::{self, Image};
use support::mount::Nydusd;
use support::registry::{Auth, Registry};
use support::relay::{Link, Relay};
use support::tree::nasty::noise;

const DEADLINE: Duration = Duration::from_secs(600);

/// Measure reading one big file over a link.
#[derive(Debug, Parser)]
struct Cli {
    /// Size of the file, in MiB
    #[arg(long, default_value_t = 1024)]
    mib: usize,

    /// Rate of the link, in Mbit/s
    #[arg(long, default_value_t = 500)]
    mbit: u64,

    /// Round trip time of the link, in milliseconds
    #[arg(long, default_value_t = 20)]
    rtt_ms: u64,

    /// Random reads of 4 KiB
    #[arg(long, default_value_t = 50)]
    random: u64,

    /// Directory for everything; needs three times the size of the file
    #[arg(long, default_value = "out")]
    directory: PathBuf,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    stop_on_signals()?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run it as root: it mounts"
    );
    fs::create_dir_all(&cli.directory)?;
    let scratch = tempfile::tempdir_in(&cli.directory)?;
    let registry = Registry::start(Auth::Open)?;
    let layer = push(&cli, &registry, scratch.path())?;
    let link = Link {
        rate: cli.mbit.saturating_mul(1_000_000),
        round_trip: Duration::from_millis(cli.rtt_ms),
    };
    say(&format!(
        "{} MiB, {} Mbit/s, {} ms",
        cli.mib, cli.mbit, cli.rtt_ms
    ))?;

    let relay = relay(&registry, link)?;
    let url = format!("http://{}/v2/big/blobs/{layer}", relay.address());
    let curl = timed(|| {
        let mut curl = Command::new("curl");
        succeed_within(curl.args(["-sSf", "-o", "/dev/null", &url]), DEADLINE).map(drop)
    })?;
    rate("curl of the layer", cli.mib, curl, curl)?;

    let point = scratch.path().join("mount");
    fs::create_dir(&point)?;
    let daemon = mount(&relay, &point, &scratch.path().join("cache"))?;
    let sequential = timed(|| read_all(&point.join("big")))?;
    rate("in order, cold", cli.mib, sequential, curl)?;
    // The kernel's copies go; the chunk cache stays.
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let warm = timed(|| read_all(&point.join("big")))?;
    rate("in order, chunks cached", cli.mib, warm, curl)?;
    daemon.stop()?;

    let before = relay.received();
    let daemon = mount(&relay, &point, &scratch.path().join("second"))?;
    let mark = (relay.received(), registry.log().len());
    let random = timed(|| read_random(&point.join("big"), cli.random))?;
    let traffic = registry.traffic_since(mark.1);
    say(&format!(
        "at random, cold: {} reads of 4 KiB in {:.2} s, {} requests, {} bytes ({} to mount)",
        cli.random,
        random.as_secs_f64(),
        traffic.requests,
        relay.received() - mark.0,
        mark.0 - before,
    ))?;
    daemon.stop()
}

/// An image with the file `big`; returns the digest of its original layer.
fn push(cli: &Cli, registry: &Registry, scratch: &Path) -> Result<String> {
    let (root, tar, at) = (
        scratch.join("root"),
        scratch.join("tar"),
        scratch.join("oci"),
    );
    fs::create_dir(&root)?;
    let mut file = File::create(root.join("big"))?;
    for seed in 0..cli.mib {
        file.write_all(&noise(1 << 20, seed))?;
    }
    write_tree(&root, &tar)?;
    let mut image = Image::new(&[&tar]);
    image.gzip = false;
    layout::write(&at, "big", &[image])?;
    registry.push(&at, "big", "big:original")?;
    let mut convert = nydus_image()?;
    convert
        .arg("convert")
        .arg(registry.reference("big:original"));
    succeed_within(convert.arg(registry.reference("big:nydus")), DEADLINE)?;
    for path in [&root, &at] {
        fs::remove_dir_all(path)?;
    }
    fs::remove_file(tar)?;
    let manifest = registry.manifest_json("big:original")?;
    let digest = manifest["layers"][0]["digest"].as_str();
    Ok(digest.context("no layer")?.to_owned())
}

fn relay(registry: &Registry, link: Link) -> Result<Relay> {
    let upstream: SocketAddr = registry.host().parse()?;
    Relay::start("127.0.0.1:0".parse()?, upstream, link)
}

fn mount(relay: &Relay, point: &Path, cache: &Path) -> Result<Nydusd> {
    let mut command = nydusd()?;
    command.arg("mount").arg("--cache-dir").arg(cache);
    command
        .arg(format!("{}/big:nydus", relay.address()))
        .arg(point);
    Nydusd::start(&mut command, point, &point.with_extension("log"))
}

fn timed(run: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let began = Instant::now();
    run()?;
    Ok(began.elapsed())
}

fn read_all(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

fn read_random(path: &Path, reads: u64) -> Result<()> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut at = 1_u64;
    for _ in 0..reads {
        at = at
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695);
        let offset = ((at >> 20) % size) & !4095;
        file.read_exact_at(&mut [0; 4096], offset)?;
    }
    Ok(())
}

fn rate(name: &str, mib: usize, time: Duration, curl: Duration) -> Result<()> {
    let seconds = time.as_secs_f64();
    let mbit = f64::from(u32::try_from(mib)?) * 8.388_608 / seconds;
    let share = 100.0 * curl.as_secs_f64() / seconds;
    say(&format!(
        "{name:<26}{seconds:>8.2} s{mbit:>9.0} Mbit/s{share:>7.0} %"
    ))
}

fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
