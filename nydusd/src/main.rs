//! nydusd: mounts container images whose content is fetched when it is read.
//!
//! It is two processes: the one that was started becomes the [`keeper`] of another one,
//! the worker, which does what follows.
//!
//! [`cli`] says what to do, [`config`] and [`pull`] find the parts of an image,
//! [`mounts`] opens them and has them served by one of the drivers, [`daemon`] stays
//! until the end; the [`api`] changes what is mounted meanwhile ([`manager`]). The path
//! of a read starts in [`vfs`], or in [`erofs`] where the kernel serves the image
//! ([`driver`]). A daemon that takes over what another one has mounted waits first
//! ([`upgrade`]). Only this file ends the process: 0 done, 1 failed, 2 wrong usage.

mod api;
mod busy;
mod cli;
mod config;
mod ctl;
mod daemon;
mod driver;
mod elf;
mod erofs;
mod errno;
mod follow;
mod fuse;
mod keeper;
mod limits;
mod logging;
mod manager;
mod metered;
mod mountinfo;
mod mounts;
mod names;
mod pool;
mod prefetch;
mod pull;
mod record;
mod shared;
mod upgrade;
mod vfs;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Parser as _;

use api::{Api, Server};
use cli::{Cli, FuseOptions, Global, Task};
use config::Config;
use driver::{Choice, Driver};
use keeper::channel::Channel;
use keeper::{Deposit, Holder, Receiver, process};
use logging::Logs;
use manager::Manager;
use manager::saved::Origin;
use mounts::Source;
use mounts::table::{After, Inherited, Mount, Mounts, Wish};
use upgrade::Life;
use upgrade::waiting::{self, Waiting};

fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let role = process::role(&arguments).map(OsStr::to_owned);
    if role.is_some() {
        arguments.remove(1);
    }
    let done = match role.as_deref().and_then(OsStr::to_str) {
        Some(keeper::WORKER) => work(arguments).map(|()| 0),
        Some(_) => keep(arguments, true),
        None => keep(arguments, false),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(err) => report(&err),
    }
}

/// Life as a keeper: of the process that a user started, or, with `successor`, of one
/// that a worker has started. The first argument after the name is its id then.
fn keep(mut arguments: Vec<OsString>, successor: bool) -> anyhow::Result<u8> {
    // Before anything is opened.
    let stored = process::restore();
    let name = arguments.remove(0);
    let options = if successor { 1 } else { 0 };
    let line = arguments.iter().skip(options).cloned();
    let (global, task) = Cli::try_parse_from(std::iter::once(name).chain(line))?.task()?;
    if let Task::Control(control) = &task {
        return ctl::run(global.apisock.as_deref(), control).map(|()| 0);
    }
    // What can be known to be wrong now need not be found out by a worker.
    global.check()?;
    if let Task::Fuse(options) = &task {
        options.check()?;
    }
    logging::start(global.log_level, global.log_file.as_deref())?;
    // It holds the descriptors of all mounts.
    limits::raise_soft();
    if successor {
        process::take_over(arguments)
    } else {
        process::run(arguments, stored)
    }
}

/// Life as a worker.
fn work(mut arguments: Vec<OsString>) -> anyhow::Result<()> {
    // First of all, while hardly any descriptor is open: see `Inherited::take`.
    limits::raise_soft();
    limits::keep_little_memory();
    let channel = Channel::inherited(process::channel()?);
    let mut deposits = Receiver::everything(&channel)?;
    // What was only taken over is left alone: its old daemon may live.
    let ready = upgrade::is_ready(deposits.get(upgrade::mark()));
    let inherited = match ready {
        true => Inherited::default(),
        false => Inherited::take(&mut deposits)?,
    };
    let (global, task) = Cli::try_parse_from(&arguments)?.task()?;
    arguments.remove(0);
    let logs = logging::start(global.log_level, global.log_file.as_deref())?;
    let keeper = Holder::new(channel, deposits, arguments)?;
    if ready {
        return wait(global, task, logs, &keeper, upgrade::Phase::Ready);
    }
    if inherited.is_nothing() && has_to_wait(&global, &task)? {
        return wait(global, task, logs, &keeper, upgrade::Phase::Init);
    }
    run(&global, task, logs, &keeper, inherited)
}

/// Whether the mounts that this daemon is for exist: another one has or had them.
fn has_to_wait(global: &Global, task: &Task) -> anyhow::Result<bool> {
    let (Some(apisock), Some(_), Some(mountpoint)) =
        (&global.apisock, &global.supervisor, task.mountpoint())
    else {
        return Ok(false);
    };
    Ok(global.upgrade || waiting::has_crashed(&waiting::full(mountpoint)?, apisock))
}

/// Life as a worker of a daemon that takes over what another one has mounted: until it
/// is told to start. Then a fresh worker [`run`]s.
fn wait(
    global: Global,
    task: Task,
    logs: Logs,
    keeper: &Arc<Holder>,
    phase: upgrade::Phase,
) -> anyhow::Result<()> {
    let stop = daemon::Stop::listen()?;
    keeper.ready();
    limits::raise_open_files(global.rlimit_nofile);
    let apisock = global.apisock.clone().context("--apisock is missing")?;
    let supervisor = global.supervisor.clone();
    let supervisor = supervisor.context("--supervisor is missing")?;
    let mountpoint = waiting::full(task.mountpoint().context("--mountpoint is missing")?)?;
    tracing::info!(
        "ready to take over {} from the supervisor on {}",
        mountpoint.display(),
        supervisor.display()
    );
    let (id, slow_read) = (global.id.clone(), global.slow_read());
    let find = move |origin: &Origin, bootstrap| find(&global, &task, origin, bootstrap);
    let waits = Waiting::new(Arc::clone(keeper), mountpoint, Box::new(find))?;
    let life = Life::waiting(
        Arc::clone(keeper),
        supervisor.clone(),
        stop.remote(),
        waits,
        phase,
    );
    let api = Api {
        manager: Arc::new(Manager::idle(shared::Shared::new(slow_read))),
        mounts: None,
        logs,
        id,
        supervisor: Some(supervisor),
        life,
    };
    let left = keeper.copies(api::is_control)?;
    let server = control(&apisock, left.into_iter().collect(), api, keeper)?;
    keeper.serving();
    match daemon::wait(&stop, || waiting::take_down(keeper))? {
        daemon::End::PassedOn => {
            server.pass_on();
            keeper.relieve();
        }
        daemon::End::Unmounted | daemon::End::Left => {
            drop(server);
            keeper.withdraw_all(|_| true);
        }
    }
    Ok(())
}

/// Finds the parts of an image of a predecessor, given how it came into the mount.
fn find(
    global: &Global,
    task: &Task,
    origin: &Origin,
    bootstrap: PathBuf,
) -> anyhow::Result<Source> {
    match (origin, task) {
        (Origin::Api(body), _) => api::source(body),
        (Origin::CommandLine, Task::Fuse(options)) => described(global, options)?
            .map(|(source, _)| source)
            .context("the command line names no image"),
        (Origin::CommandLine, Task::Mount(options)) => pull::again(options, bootstrap),
        (Origin::CommandLine, Task::Control(_)) => bail!("nothing is mounted by this command"),
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

fn run(
    global: &Global,
    task: Task,
    logs: Logs,
    keeper: &Arc<Holder>,
    mut inherited: Inherited,
) -> anyhow::Result<()> {
    let started = Instant::now();
    for option in global.without_effect() {
        tracing::warn!("{option} has no effect yet");
    }
    // Before anything exists that would have to be taken down again.
    let stop = daemon::Stop::listen()?;
    keeper.ready();
    limits::raise_open_files(global.rlimit_nofile);
    let shared = shared::Shared::new(global.slow_read());
    let manager = Arc::new(Manager::new(Arc::clone(keeper), shared));
    let mounts = Mounts::new(Arc::clone(keeper), Arc::clone(&manager), stop.on_end());
    let mounts = Arc::new(mounts);
    let control_left = inherited.take_control();
    let after = match upgrade::is_started(keeper)? {
        true => After::TakeOver(task.failover_policy()),
        false => After::Death,
    };
    mounts.recover(inherited, after, &|origin, bootstrap| {
        find(global, &task, origin, bootstrap)
    })?;
    if after != After::Death {
        mount_posted(&manager, &mounts, keeper)?;
        upgrade::finish(keeper);
    }
    let fresh = mounts.list().is_empty();
    if fresh {
        let mount = first_mount(global, task, &mounts, &stop).inspect_err(|_| mounts.close())?;
        tracing::info!(
            "ready: {} mounted on {} by {} in {} ms",
            mount.image,
            mount.mountpoint.display(),
            mount.driver,
            started.elapsed().as_millis()
        );
    }
    let api = Api {
        manager,
        mounts: Some(Arc::clone(&mounts)),
        logs,
        id: global.id.clone(),
        supervisor: global.supervisor.clone(),
        life: Life::serving(Arc::clone(keeper), global.supervisor.clone(), stop.remote()),
    };
    // Clients take the socket as the sign that all is ready.
    let server = match &global.apisock {
        None => None,
        Some(path) => match control(path, control_left, api, keeper) {
            Ok(server) => Some(server),
            Err(error) if fresh => {
                mounts.abandon();
                return Err(error);
            }
            // Somebody uses the mounts; they come first.
            Err(error) => {
                tracing::error!("no control API from now on: {error:#}");
                None
            }
        },
    };
    keeper.serving();
    let served = daemon::serve(&mounts, &stop);
    drop(server);
    if mounts.list().is_empty() {
        mounts.close();
    }
    if served? == daemon::End::Left {
        keeper.withdraw_all(|_| true);
    }
    Ok(())
}

/// Mounts what clients asked for while this daemon waited to take over.
fn mount_posted(manager: &Manager, mounts: &Mounts, keeper: &Holder) -> anyhow::Result<()> {
    for (path, body) in waiting::posted(keeper)? {
        if manager.vfs().table().image_at(&path).is_some() {
            tracing::info!("{path} was taken over, and need not be mounted");
            continue;
        }
        let mounted = api::source(body.as_bytes()).and_then(|source| {
            let body = body.into_bytes();
            if mounts.directory().is_some() {
                return Ok(mounts.mount_below(&path, &source, &body)?);
            }
            Ok(manager.mount(&path, &source, &Origin::Api(body))?)
        });
        if let Err(error) = mounted {
            tracing::error!("{path} was asked for and cannot be mounted: {error:#}");
        }
    }
    Ok(())
}

/// Starts the control API, or goes on with a predecessor's.
fn control(
    path: &Path,
    left: Vec<(String, Deposit)>,
    api: Api,
    keeper: &Arc<Holder>,
) -> anyhow::Result<Server> {
    let control = match api::Control::recover(path, left)? {
        Some(control) => control,
        None => api::Control::new(path, keeper)?,
    };
    Server::start(control, api, Arc::clone(keeper))
}

/// Mounts what the command line asks for.
fn first_mount(
    global: &Global,
    task: Task,
    mounts: &Mounts,
    stop: &daemon::Stop,
) -> anyhow::Result<Arc<Mount>> {
    let (source, mountpoint, wish) = match task {
        Task::Fuse(options) => {
            let threads = options.fuse_threads.unwrap_or(4);
            let described = described(global, &options)?;
            let mountpoint = options.mountpoint.context("--mountpoint is missing")?;
            let Some((source, configured)) = described else {
                let config = global.config.as_deref().map(mounts::load_config);
                if is_for_the_kernel(options.driver, config.transpose()?)? {
                    return mounts.open_directory(&mountpoint);
                }
                return mounts.mount_empty(&mountpoint, threads);
            };
            let wish = Wish {
                // Older clients know nothing of drivers, and expect this one.
                driver: options.driver.or(configured).unwrap_or(Choice::Fuse),
                threads,
            };
            (source, mountpoint, wish)
        }
        Task::Mount(options) => {
            let source = pull::source(&options, stop)
                .with_context(|| format!("cannot mount {}", options.image))?;
            let wish = Wish {
                driver: options.driver,
                threads: options.fuse_threads,
            };
            (source, options.mountpoint, wish)
        }
        Task::Control(_) => bail!("nothing is mounted by this command"),
    };
    mounts.mount(&source, &mountpoint, wish)
}

/// Whether the kernel is to serve images that come later. `auto` is decided by the cache
/// directory of the configuration file; without one nothing can be tried.
fn is_for_the_kernel(asked: Option<Choice>, config: Option<Config>) -> anyhow::Result<bool> {
    let configured = config.as_ref().and_then(|config| config.driver);
    match (asked.or(configured), config) {
        (Some(Choice::Auto), Some(config)) => {
            let cache = &config.cache.dir;
            std::fs::create_dir_all(cache).with_context(|| cache.display().to_string())?;
            Ok(driver::choose(Choice::Auto, cache) == Driver::Erofs)
        }
        (choice, _) => Ok(choice == Some(Choice::Erofs)),
    }
}

/// The image that bootstrap and configuration describe, and the driver if it is
/// configured; `None` if images are to be mounted through the control API.
fn described(
    global: &Global,
    options: &FuseOptions,
) -> anyhow::Result<Option<(Source, Option<Choice>)>> {
    let bootstrap = match (&options.bootstrap, &global.apisock) {
        (Some(bootstrap), _) => bootstrap.clone(),
        (None, Some(_)) => return Ok(None),
        (None, None) => bail!(
            "--bootstrap is missing; to mount images later, give a control socket with --apisock"
        ),
    };
    let files = options.prefetch_files.as_deref();
    let files = files.map(prefetch::read_list).transpose()?;
    if let Some(dir) = &options.localfs_dir {
        let mut source = Source::local(bootstrap, dir, dir)?;
        source.prefetch.files = files;
        return Ok(Some((source, None)));
    }
    let path = global
        .config
        .as_deref()
        .context("--config or --localfs-dir is missing")?;
    let config = mounts::load_config(path)?;
    let mut source = Source::configured(bootstrap, &config)?;
    // A list on the command line is a wish of its own, whatever the configuration says.
    source.prefetch.files = files.or(source.prefetch.files);
    Ok(Some((source, config.driver)))
}
