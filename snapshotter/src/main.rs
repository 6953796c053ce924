//! nydus-snapshotter: a containerd snapshotter for lazily loaded images.
//!
//! The command line changes what `config.toml` says; everything else is in the
//! library. Only this file ends the process: 0 done, 1 failed, 2 wrong usage.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use snapshotter::config::{Config, DEFAULT_PATH};
use snapshotter::containerd_config::{Generation, section};
use snapshotter::{manager, server};
use tracing_subscriber::EnvFilter;

/// Give containerd images that start before they are downloaded.
#[derive(Debug, Parser)]
#[command(name = "nydus-snapshotter", version)]
struct Cli {
    /// Configuration file [default: /etc/nydus/config.toml, if it is there]
    #[arg(short = 'c', long, value_name = "file")]
    config: Option<PathBuf>,

    /// Directory for everything that is kept
    #[arg(long, value_name = "dir")]
    root: Option<PathBuf>,

    /// Socket for containerd
    #[arg(short = 'a', long, value_name = "path")]
    address: Option<PathBuf>,

    /// The nydusd program
    #[arg(long, value_name = "file")]
    nydusd: Option<PathBuf>,

    /// Template of nydusd's configuration
    #[arg(long, visible_alias = "config-path", value_name = "file")]
    nydusd_config: Option<PathBuf>,

    /// One nydusd for all images or one for each: shared, multiple or dedicated
    #[arg(long, value_name = "mode")]
    daemon_mode: Option<String>,

    /// Least severe messages to log: trace, debug, info, warn or error
    #[arg(short = 'l', long, value_name = "level")]
    log_level: Option<String>,

    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
enum Command {
    /// Print what to add to containerd's configuration, or add it
    ContainerdConfig(ContainerdConfig),
}

/// How containerd is set up.
#[derive(Debug, Args)]
struct ContainerdConfig {
    /// Which containerd: 1 for 1.6 and 1.7, 2 for 2.0 and later [default: by the file's version, else 1]
    #[arg(long, value_name = "1|2", value_parser = clap::value_parser!(u8).range(1..=2))]
    generation: Option<u8>,

    /// containerd's configuration file
    #[arg(
        long,
        value_name = "file",
        default_value = "/etc/containerd/config.toml"
    )]
    file: PathBuf,

    /// Append it to the file, after a backup beside it (FILE.before-nydus)
    #[arg(long)]
    write: bool,
}

impl Cli {
    fn configuration(&self) -> anyhow::Result<(Config, Vec<String>)> {
        let (mut config, warnings) = match &self.config {
            Some(path) => Config::load(path)?,
            None if Path::new(DEFAULT_PATH).exists() => Config::load(Path::new(DEFAULT_PATH))?,
            None => Config::parse("")?,
        };
        let paths = [
            (&self.root, &mut config.root),
            (&self.address, &mut config.address),
            (&self.nydusd, &mut config.daemon.nydusd_path),
            (&self.nydusd_config, &mut config.daemon.nydusd_config),
        ];
        for (given, place) in paths {
            if let Some(path) = given {
                place.clone_from(path);
            }
        }
        if let Some(level) = &self.log_level {
            config.log.level.clone_from(level);
        }
        if let Some(mode) = &self.daemon_mode {
            config.daemon_mode.clone_from(mode);
        }
        config.check()?;
        Ok((config, warnings))
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::print_stderr, reason = "the one place that talks to the user")]
fn report(error: &anyhow::Error) {
    eprintln!("Error: {error:#}");
}

/// Shows what containerd needs, and adds it if asked to.
#[allow(clippy::print_stdout, reason = "the output that was asked for")]
fn containerd_config(options: &ContainerdConfig, address: &Path) -> anyhow::Result<()> {
    let file = &options.file;
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    let generation = match options.generation {
        Some(1) => Generation::One,
        Some(_) => Generation::Two,
        None => Generation::of(&text).unwrap_or(Generation::One),
    };
    let section = section(generation, address);
    print!("{section}");
    if !options.write {
        return Ok(());
    }
    let version = if generation == Generation::One { 2 } else { 3 };
    let whole = if text.is_empty() {
        format!("version = {version}\n\n{section}")
    } else {
        format!("{}\n\n{section}", text.trim_end())
    };
    // A table that is there already must be changed by whoever wrote it.
    toml::from_str::<toml::Table>(&whole).with_context(|| {
        format!(
            "{} has some of these tables; add the keys there by hand",
            file.display()
        )
    })?;
    if !text.is_empty() {
        let mut backup = file.clone().into_os_string();
        backup.push(".before-nydus");
        fs::copy(file, &backup)
            .with_context(|| format!("cannot make {}", Path::new(&backup).display()))?;
    }
    fs::write(file, whole).with_context(|| format!("cannot write {}", file.display()))?;
    println!("# added to {}; restart containerd", file.display());
    Ok(())
}

/// Descriptors of all daemons are held here: as many as the system allows.
fn raise_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!("cannot raise the limit of open files: {error}");
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // Before anything is opened.
    let inherited = manager::restore();
    let (config, warnings) = cli.configuration()?;
    if let Some(Command::ContainerdConfig(options)) = &cli.command {
        return containerd_config(options, &config.address);
    }
    let level = &config.log.level;
    let filter = format!("{level},h2=warn,hyper=warn,tower=warn,tonic=warn,reqwest=warn");
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    for warning in warnings {
        tracing::warn!("configuration: {warning}");
    }
    raise_limit();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start a runtime")?
        .block_on(server::run(config, inherited))
}
