//! The sockets, and the life of the program.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::api::snapshots::snapshots_server::SnapshotsServer;
use crate::config::Config;
use crate::daemons::Daemons;
use crate::daemons::settings::Settings;
use crate::keychain::{ImageService, Keychain};
use crate::lifecycle::{Snapshots, make_directory};
use crate::manager::{Inherited, Manager};
use crate::reconcile;
use crate::service::Service;
use crate::system;

/// How long requests get to finish at the end.
const WIND_DOWN: Duration = Duration::from_secs(2);

/// Serves until SIGTERM or SIGINT. Daemons go on running: containers use them.
///
/// * `inherited`: what the service manager held since an earlier life.
///
/// # Errors
/// The root or the socket cannot be used.
pub async fn run(config: Config, inherited: Inherited) -> anyhow::Result<()> {
    // Before anything exists, so that no signal is lost.
    let stopped = stop_signal()?;
    let keychain = Arc::new(Keychain::default());
    let runtime = tokio::runtime::Handle::current();
    let settings = Settings::new(&config, Arc::clone(&keychain), runtime)?;
    let manager = Manager::of_this_service().map(Arc::new);
    let daemons = Daemons::new(settings, manager.clone(), inherited);
    let opened = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            let snapshots = Snapshots::open(&config, daemons)?;
            snapshots.resume_upgrade()?;
            reconcile::daemons(&snapshots)?;
            reconcile::directories(&snapshots)?;
            Ok(Arc::new(snapshots))
        })
    };
    let snapshots = opened.await.context("the start crashed")??;
    let listener = bind(&config.address)?;
    let repaired = {
        let snapshots = Arc::clone(&snapshots);
        tokio::task::spawn_blocking(move || reconcile::mounts(&snapshots))
    };
    tokio::spawn(async move {
        match repaired.await {
            Ok(Ok(0)) => tracing::info!("all images that are in use are mounted"),
            Ok(Ok(failed)) => tracing::error!("{failed} images could not be mounted"),
            Ok(Err(error)) => tracing::error!("mounting images: {error}"),
            Err(crashed) => tracing::error!("mounting images: {crashed}"),
        }
    });
    if config.system.enable {
        let listener = bind(&config.system.address)?;
        tokio::spawn(system::serve_system(listener, Arc::clone(&snapshots)));
    }
    if !config.metrics.address.is_empty() {
        let listener = TcpListener::bind(&config.metrics.address)
            .await
            .with_context(|| format!("cannot serve metrics on {}", config.metrics.address))?;
        tokio::spawn(system::serve_metrics(listener, Arc::clone(&snapshots)));
    }
    tracing::info!("ready: serving {}", config.address.display());
    if let Some(manager) = &manager {
        manager.ready();
    }
    // Requests under way are finished, but a client that holds its connection open
    // is not waited for.
    let (stop, stopping) = tokio::sync::oneshot::channel();
    let ends = async move {
        stopped.await;
        let _ = stop.send(());
        tokio::time::sleep(WIND_DOWN).await;
    };
    let auth = &config.remote.auth;
    let images = auth
        .enable_cri_keychain
        .then(|| ImageService::new(&auth.image_service_address, keychain))
        .transpose()?;
    let serving = Server::builder()
        .add_service(SnapshotsServer::new(Service(snapshots)))
        .add_optional_service(images)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            let _ = stopping.await;
        });
    tokio::select! {
        served = serving => served.context("serving failed")?,
        () = ends => {}
    }
    let _ = fs::remove_file(&config.address);
    tracing::info!("stopped");
    Ok(())
}

/// Listens on a socket that only its owner can use.
pub(crate) fn bind(address: &Path) -> anyhow::Result<UnixListener> {
    let directory = address.parent().context("the address has no directory")?;
    if !directory.is_dir() {
        make_directory(directory, 0o700)?;
    }
    match UnixStream::connect(address) {
        Ok(_) => bail!("{} is in use by another process", address.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Nobody listens: left by an earlier run.
        Err(_) => fs::remove_file(address)
            .with_context(|| format!("cannot remove {}", address.display()))?,
    }
    // Made under a name that nobody looks for, until its mode is right.
    let partial = address.with_extension("new");
    let _ = fs::remove_file(&partial);
    let listener = UnixListener::bind(&partial)
        .with_context(|| format!("cannot listen on {}", address.display()))?;
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&partial, address))
        .with_context(|| format!("cannot make {}", address.display()))?;
    Ok(listener)
}

fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch signals")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
