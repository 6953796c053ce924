//! The whole way of an image, once: registry, conversion, lazy mount, a program
//! from it, comparison with the original, and what it cost.
//!
//! Everything runs on this machine in a temporary directory and is stopped at the
//! end, also after an error or an interrupt. What is measured is measured in this
//! run: bytes are what the registry's access log says it sent.

mod image;
mod report;
mod unpack;

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use storage::oci::ImageRef;
use support::binaries::{nydus_image, nydusd};
use support::command::{interrupted, stop_on_signals, succeed, succeed_within};
use support::mount::Nydusd;
use support::registry::{Auth, Registry};
use support::tree::{Detail, describe, difference};

use report::{Cost, Report, say};

/// Images of any size: as long as it makes progress, wait.
const DEADLINE: Duration = Duration::from_secs(3600);

/// Convert an image, mount it lazily, run a program from it, compare, and report.
#[derive(Debug, Parser)]
struct Cli {
    /// Image to use, like `registry.example/app:1.0` [default: one made from Debian packages]
    image: Option<String>,

    /// Directory that keeps the image made from Debian packages
    #[arg(long, default_value = "out/demo")]
    directory: PathBuf,

    /// Make that image and stop
    #[arg(long)]
    only_image: bool,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    stop_on_signals()?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the demo mounts file systems: run it as root"
    );
    if cli.only_image {
        image::find_or_make(&cli.directory)?;
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let registry = Registry::start(Auth::Open)?;
    say(&format!(
        "registry    docker-registry on {}",
        registry.host()
    ))?;
    push(&cli, &registry)?;
    let report = run(&registry, scratch.path(), cli.image.is_none())?;
    say(&report.to_string())
}

/// Puts the original image into the registry as `demo:original`.
fn push(cli: &Cli, registry: &Registry) -> Result<()> {
    if let Some(source) = &cli.image {
        say(&format!("image       {source}"))?;
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--dest-tls-verify=false"]);
        if matches!(source.parse(), Ok(ImageRef::Registry(name)) if name.is_loopback()) {
            // Registries on this machine speak plain HTTP, as for `nydus-image`.
            skopeo.arg("--src-tls-verify=false");
        }
        skopeo.arg(format!("docker://{source}"));
        skopeo.arg(format!("docker://{}", registry.reference("demo:original")));
        succeed_within(&mut skopeo, DEADLINE)?;
        return Ok(());
    }
    let found = cli.directory.is_dir();
    let began = Instant::now();
    let layout = image::find_or_make(&cli.directory)?;
    let how = if found {
        format!("from {}", cli.directory.display())
    } else {
        format!("made in {:.0} s", began.elapsed().as_secs_f64())
    };
    say(&format!("image       Debian + python3 + nginx, {how}"))?;
    registry.push(&layout, image::TAG, "demo:original")
}

/// Converts, mounts, runs, pulls, compares; with everything measured.
fn run(registry: &Registry, scratch: &Path, own_image: bool) -> Result<Report> {
    let (original, converted) = (
        registry.reference("demo:original"),
        registry.reference("demo:nydus"),
    );
    let began = Instant::now();
    succeed_within(
        nydus_image()?.args(["convert", &original, &converted]),
        DEADLINE,
    )?;
    let convert = began.elapsed();
    say(&format!(
        "converted   {original} to {converted} in {:.1} s",
        convert.as_secs_f64()
    ))?;

    let (daemon, lazy, program) = lazily(registry, &converted, scratch)?;
    let (root, whole) = pull_and_unpack(registry, scratch, &program)?;

    say("comparing   every entry of the mount with the unpacked original")?;
    // An image may leave the times of directories to whoever unpacks it; ours does not.
    let detail = if own_image {
        Detail::All
    } else {
        Detail::WithoutDirectoryTimes
    };
    let expected = describe(&root, detail)?;
    let actual = describe(daemon.point(), detail)?;
    if let Some(difference) = difference(&expected, &actual) {
        bail!("the mounted image is not the original:\n{difference}");
    }
    say(&format!(
        "equal       {} entries, byte for byte",
        expected.len()
    ))?;
    daemon.stop()?;

    Ok(Report {
        original_size: layer_bytes(registry, "demo:original")?,
        converted_size: layer_bytes(registry, "demo:nydus")?,
        lazy,
        whole,
    })
}

/// Mounts `image` and runs a program from it; the daemon stays for more.
fn lazily(
    registry: &Registry,
    image: &str,
    scratch: &Path,
) -> Result<(Nydusd, Cost, Vec<&'static str>)> {
    let point = scratch.join("mount");
    fs::create_dir(&point)?;
    let mut command = nydusd()?;
    command.arg("mount").arg(image).arg(&point);
    command.arg("--cache-dir").arg(scratch.join("cache"));

    let mark = registry.log().len();
    let began = Instant::now();
    let daemon = Nydusd::start(&mut command, &point, &scratch.join("nydusd.log"))?;
    let file = first_file(&point)?;
    let first_byte = began.elapsed();
    say(&format!(
        "mounted     {image}; first byte, of /{}, after {:.2} s",
        file.display(),
        first_byte.as_secs_f64()
    ))?;

    let program = program_of(&point)?;
    let began = Instant::now();
    let output = run_in(&point, &program)?;
    let run = began.elapsed();
    say(&format!("program     {output}"))?;
    let bytes = registry.traffic_since(mark).bytes;
    Ok((
        daemon,
        Cost {
            bytes,
            first_byte,
            run,
        },
        program,
    ))
}

/// The same without lazy loading; returns the unpacked tree as well.
fn pull_and_unpack(
    registry: &Registry,
    scratch: &Path,
    program: &[&'static str],
) -> Result<(PathBuf, Cost)> {
    let (layout, root) = (scratch.join("pulled"), scratch.join("root"));
    let mark = registry.log().len();
    let began = Instant::now();
    registry.pull("demo:original", &layout)?;
    unpack::unpack(&layout, &root)?;
    first_file(&root)?;
    let first_byte = began.elapsed();
    let bytes = registry.traffic_since(mark).bytes;

    let began = Instant::now();
    run_in(&root, program)?;
    Ok((
        root,
        Cost {
            bytes,
            first_byte,
            run: began.elapsed(),
        },
    ))
}

/// Reads a byte of the first small file that any image has; which one.
fn first_file(root: &Path) -> Result<PathBuf> {
    let mut pending = vec![root.join("etc"), root.to_owned()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file() && entry.metadata()?.len() > 0 {
                File::open(entry.path())?.read_exact(&mut [0])?;
                return Ok(entry.path().strip_prefix(root)?.to_owned());
            }
        }
    }
    bail!("the image has no file with content")
}

/// A program that the image has, with arguments.
fn program_of(root: &Path) -> Result<Vec<&'static str>> {
    const PYTHON: &str = "import decimal, email, http.client, json, sqlite3, ssl, sys; \
         print('python', sys.version.split()[0], 'with', len(sys.modules), 'modules')";
    let is_there = |path: &str| fs::symlink_metadata(root.join(path)).is_ok();
    if is_there("usr/bin/python3") {
        Ok(vec!["/usr/bin/python3", "-c", PYTHON])
    } else if is_there("bin/sh") {
        Ok(vec!["/bin/sh", "-c", "echo a shell of the image runs"])
    } else {
        bail!("the image has neither /usr/bin/python3 nor /bin/sh to run")
    }
}

fn run_in(root: &Path, program: &[&str]) -> Result<String> {
    ensure!(!interrupted(), "interrupted");
    let mut command = Command::new("chroot");
    command
        .arg(root)
        .args(program)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(succeed(&mut command)?.stdout.trim().to_owned())
}

/// The size of all layers of an image, as its manifest states it.
fn layer_bytes(registry: &Registry, name: &str) -> Result<u64> {
    let manifest = registry.manifest_json(name)?;
    let layers = manifest["layers"]
        .as_array()
        .context("not the manifest of one image")?;
    Ok(layers
        .iter()
        .filter_map(|layer| layer["size"].as_u64())
        .sum())
}
