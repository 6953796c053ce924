//! Whether what another daemon has mounted could be served by this one: everything is
//! read and opened as at the take-over itself, and nothing is changed.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};

use super::saved::{EVENTS, MOUNT, Phase, Saved};
use super::table::below::place_of;
use super::{Source, open};
use crate::driver::Driver;
use crate::erofs::journal::{FileId, Journal};
use crate::keeper::{Deposit, Deposits};
use crate::manager::saved::{self as images, Origin};
use crate::shared::Shared;
use crate::upgrade::waiting::FindSource;

/// What is at hand.
pub(crate) struct Stage<'a> {
    /// Where the mounts are.
    pub mountpoint: &'a Path,
    /// What images share.
    pub shared: &'a Shared,
    /// Finds the parts of an image.
    pub source: &'a FindSource,
    /// Nobody else serves the mounts: better without one of the images than not at all.
    pub replaceable: bool,
}

/// Tries everything out.
///
/// # Errors
/// What cannot be served, and why.
pub(crate) fn rehearse(deposits: &Deposits, stage: &Stage<'_>) -> anyhow::Result<()> {
    let mut mounts = 0;
    let mut in_mount = Vec::new();
    for (name, deposit) in deposits {
        if name.starts_with(MOUNT) {
            mount(deposit, deposits, stage).with_context(|| format!("`{name}`"))?;
            mounts += 1;
        } else if name == EVENTS {
            let [_, journal] = deposit.files.as_slice() else {
                bail!("{} descriptors for events", deposit.files.len());
            };
            Journal::check(journal)?;
        } else if name == images::TABLE || name.starts_with(images::IMAGE) {
            in_mount.push((name.as_str(), deposit));
        } else {
            bail!("the state has `{name}`, which this program does not know");
        }
    }
    ensure!(mounts > 0, "the state is of no mount");
    for image in images::mounted(in_mount)? {
        let opened = reopen(&image.origin, image.bootstrap, &image.file, stage);
        match opened {
            Ok(_) => {}
            Err(error) if stage.replaceable && image.path != "/" => {
                tracing::error!("{} cannot be served any more: {error:#}", image.path);
            }
            Err(error) => return Err(error.context(format!("image on {}", image.path))),
        }
    }
    Ok(())
}

fn mount(deposit: &Deposit, all: &Deposits, stage: &Stage<'_>) -> anyhow::Result<()> {
    let saved = Saved::parse(&deposit.note)?;
    let point = saved.mountpoint.display();
    ensure!(
        saved.phase != Phase::Mounting,
        "{point} is only half mounted"
    );
    let path = saved.path.as_deref().unwrap_or("/");
    ensure!(
        saved.mountpoint == place_of(stage.mountpoint, path),
        "the state is of a mount on {point}, and --mountpoint is {}",
        stage.mountpoint.display()
    );
    if saved.directory {
        return Ok(());
    }
    ensure!(
        saved.is_mounted() || is_replaced(&saved, all)?,
        "the mount on {point} that the state is of is not there any more"
    );
    match saved.driver {
        Driver::Fuse => fuse(&saved, deposit, stage),
        Driver::Erofs => {
            ensure!(all.contains_key(EVENTS), "the event group is missing");
            erofs(&saved, deposit, stage)
        }
    }
}

/// Whether a later mount is in the place of this one, which is served for those who have
/// it open.
fn is_replaced(saved: &Saved, all: &Deposits) -> anyhow::Result<bool> {
    for (_, deposit) in all.iter().filter(|(name, _)| name.starts_with(MOUNT)) {
        let other = Saved::parse(&deposit.note)?;
        if other.id > saved.id && other.mountpoint == saved.mountpoint {
            return Ok(saved.path.is_some());
        }
    }
    Ok(false)
}

fn fuse(saved: &Saved, deposit: &Deposit, stage: &Stage<'_>) -> anyhow::Result<()> {
    let mut files = deposit.try_clone()?.files;
    let origin = saved.origin(&mut files)?;
    match (&saved.path, files.as_slice()) {
        (None, [_]) => Ok(()),
        (Some(_), [_, bootstrap]) => {
            let bootstrap = File::from(bootstrap.try_clone()?);
            reopen(&origin, saved.bootstrap.clone(), &bootstrap, stage).map(drop)
        }
        (_, files) => bail!("{} descriptors for a FUSE mount", files.len()),
    }
}

fn erofs(saved: &Saved, deposit: &Deposit, stage: &Stage<'_>) -> anyhow::Result<()> {
    let mut files = deposit.try_clone()?.files;
    let origin = saved.origin(&mut files)?;
    let [bootstrap, _lock, _end, files @ ..] = files.as_slice() else {
        bail!("{} descriptors for an EROFS mount", deposit.files.len());
    };
    let bootstrap = File::from(bootstrap.try_clone()?);
    let opened = reopen(&origin, saved.bootstrap.clone(), &bootstrap, stage)?;
    ensure!(
        opened.blobs.len() == files.len(),
        "{} cache files for {} blobs",
        files.len(),
        opened.blobs.len()
    );
    for (blob, file) in opened.blobs.iter().zip(files) {
        let own = blob.cache_file().context("a cache file is missing")?;
        ensure!(
            FileId::of(own)? == FileId::of(&File::from(file.try_clone()?))?,
            "the cache file of blob {} was replaced",
            blob.info().id
        );
    }
    Ok(())
}

fn reopen(
    origin: &Origin,
    bootstrap: PathBuf,
    file: &File,
    stage: &Stage<'_>,
) -> anyhow::Result<super::Opened> {
    let mut source: Source = (stage.source)(origin, bootstrap)?;
    // The very file, whatever is in its place by now.
    source.bootstrap = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    open(&source, stage.shared)
}
