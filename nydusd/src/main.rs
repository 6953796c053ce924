//! nydusd: mounts container images whose content is fetched when it is read.
//!
//! [`cli`] says what to do, [`config`] and [`pull`] find the parts of an image,
//! [`mounts`] opens them, [`daemon`] mounts and serves until the end. The path
//! of a read starts in [`fuse`]. Only this file ends the process: 0 done,
//! 1 failed, 2 wrong usage.

mod cli;
mod config;
mod daemon;
mod elf;
mod errno;
mod follow;
mod fuse;
mod limits;
mod logging;
mod mounts;
mod names;
mod prefetch;
mod pull;
mod record;
mod shared;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use clap::Parser as _;

use cli::{Cli, FuseOptions, Global, Task};
use mounts::Source;

fn main() -> ExitCode {
    let result = Cli::try_parse()
        .map_err(anyhow::Error::new)
        .and_then(Cli::task);
    let result = result.and_then(|(global, task)| run(&global, task));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => report(&err),
    }
}

/// Prints the whole chain of causes, and chooses the exit code.
#[allow(clippy::print_stderr, reason = "the one place that talks to the user")]
fn report(err: &anyhow::Error) -> ExitCode {
    if let Some(usage) = err.downcast_ref::<clap::Error>() {
        // Also the way of `--help` and `--version`, which are no failures.
        let _ = usage.print();
        return u8::try_from(usage.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
    }
    eprintln!("Error: {err}");
    for (index, cause) in err.chain().skip(1).enumerate() {
        if index == 0 {
            eprintln!("Caused by:");
        }
        eprintln!("    {cause}");
    }
    ExitCode::FAILURE
}

fn run(global: &Global, task: Task) -> anyhow::Result<()> {
    let started = Instant::now();
    logging::start(global.log_level, global.log_file.as_deref())?;
    global.check()?;
    for option in global.without_effect() {
        tracing::warn!("{option} has no effect yet");
    }
    // Before anything exists that would have to be taken down again.
    let stop = daemon::Stop::listen()?;
    limits::raise_open_files(global.rlimit_nofile);
    let (source, mountpoint, threads) = match task {
        Task::Fuse(options) => {
            let source = described(global, &options)?;
            let mountpoint = options.mountpoint.context("--mountpoint is missing")?;
            (source, mountpoint, options.fuse_threads.unwrap_or(4))
        }
        Task::Mount(options) => {
            let source = pull::source(&options, &stop)
                .with_context(|| format!("cannot mount {}", options.image))?;
            (source, options.mountpoint, options.fuse_threads)
        }
    };
    let what = source.name.clone();
    let files = mounts::open(source, &shared::Shared::new(global.slow_read()))?;
    daemon::serve(files, &what, &mountpoint, threads, stop, started)
}

/// The image that bootstrap and configuration describe.
fn described(global: &Global, options: &FuseOptions) -> anyhow::Result<Source> {
    options.check()?;
    let bootstrap = options.bootstrap.clone().context(
        "--bootstrap is missing; mounting later through the control API is not supported yet",
    )?;
    let files = options.prefetch_files.as_deref();
    let files = files.map(prefetch::read_list).transpose()?;
    if let Some(dir) = &options.localfs_dir {
        let mut source = Source::local(bootstrap, dir, dir)?;
        source.prefetch.files = files;
        return Ok(source);
    }
    let path = global
        .config
        .as_deref()
        .context("--config or --localfs-dir is missing")?;
    let config = mounts::load_config(path)?;
    let mut source = Source::configured(bootstrap, &config)?;
    // A list on the command line is a wish of its own, whatever the configuration says.
    source.prefetch.files = files.or(source.prefetch.files);
    Ok(source)
}
