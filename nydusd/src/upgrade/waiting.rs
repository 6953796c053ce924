//! A daemon that waits to take over: what it is asked before it serves.
//!
//! A state is tried out before it is taken: everything in it is read, and every image
//! opened. Images that are asked for meanwhile are opened, too, and mounted at the start.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::{LOOK, POSTED};
use crate::busy;
use crate::driver::Driver;
use crate::keeper::{Deposits, Holder as Keeper, text};
use crate::manager::saved::{self as images, Origin};
use crate::manager::{ManageError, normal};
use crate::mountinfo;
use crate::mounts::saved::{MOUNT, Saved};
use crate::mounts::table::{TakenDown, take_down as take_down_at};
use crate::mounts::{self, Source, rehearsal};
use crate::shared::Shared;

/// How long the processes of a daemon that was killed may take to disappear.
const LAST_BREATH: Duration = Duration::from_secs(2);

/// Finds the parts of an image, given how it came into the mount, and its bootstrap.
pub(crate) type FindSource = dyn Fn(&Origin, PathBuf) -> anyhow::Result<Source> + Send + Sync;

/// Mounts that are asked for before the start: bodies of requests, by path.
pub(crate) type Posted = BTreeMap<String, String>;

/// What a waiting daemon knows.
pub(crate) struct Waiting {
    keeper: Arc<Keeper>,
    mountpoint: PathBuf,
    shared: Shared,
    source: Box<FindSource>,
    posted: Mutex<Posted>,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting")
            .field("mountpoint", &self.mountpoint)
            .finish_non_exhaustive()
    }
}

impl Waiting {
    /// * `mountpoint`: where the mounts that will be taken over are.
    ///
    /// # Errors
    /// What an earlier worker has left cannot be read.
    pub(crate) fn new(
        keeper: Arc<Keeper>,
        mountpoint: PathBuf,
        source: Box<FindSource>,
    ) -> anyhow::Result<Self> {
        let posted = Mutex::new(posted(&keeper)?);
        Ok(Self {
            keeper,
            mountpoint,
            shared: Shared::default(),
            source,
            posted,
        })
    }

    /// Whether a state can be served here.
    ///
    /// * `replaceable`: nobody else serves it.
    ///
    /// # Errors
    /// When it cannot.
    pub(super) fn try_out(&self, deposits: &Deposits, replaceable: bool) -> anyhow::Result<()> {
        let stage = rehearsal::Stage {
            mountpoint: &self.mountpoint,
            shared: &self.shared,
            source: &*self.source,
            replaceable,
        };
        rehearsal::rehearse(deposits, &stage)
    }

    /// Notes an image that is to be mounted at the start.
    ///
    /// * `replace`: instead of the one that was asked for before.
    ///
    /// # Errors
    /// The path is taken or no path, or the image cannot be opened.
    pub(crate) fn post(
        &self,
        path: &str,
        source: &Source,
        body: &[u8],
        replace: bool,
    ) -> Result<(), ManageError> {
        let path = normal(path)?;
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        match (posted.contains_key(&path), replace) {
            (true, false) => return Err(ManageError::Exists),
            (false, true) => return Err(ManageError::Absent),
            _ => {}
        }
        mounts::open(source, &self.shared).map_err(ManageError::Other)?;
        let mut new = posted.clone();
        new.insert(path, String::from_utf8_lossy(body).into_owned());
        self.save(&new).map_err(ManageError::Other)?;
        *posted = new;
        Ok(())
    }

    /// Takes back what was asked for before.
    ///
    /// # Errors
    /// Nothing was.
    pub(crate) fn unpost(&self, path: &str) -> Result<(), ManageError> {
        let path = normal(path)?;
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = posted.clone();
        new.remove(&path).ok_or(ManageError::Absent)?;
        self.save(&new).map_err(ManageError::Other)?;
        *posted = new;
        Ok(())
    }

    /// The images that were taken over or asked for: by path, how they came into the mount.
    ///
    /// # Errors
    /// What was taken over cannot be read.
    pub(crate) fn images(&self) -> anyhow::Result<BTreeMap<String, Origin>> {
        let is_image = |name: &str| name == images::TABLE || name.starts_with(images::IMAGE);
        let taken = |name: &str| name.starts_with(MOUNT) || is_image(name);
        let deposits = self.keeper.copies(taken)?;
        let (in_mount, mounts): (Vec<_>, Vec<_>) =
            deposits.into_iter().partition(|(name, _)| is_image(name));
        let in_mount = in_mount.iter().map(|(name, left)| (name.as_str(), left));
        let mut all: BTreeMap<_, _> = images::mounted(in_mount)?
            .into_iter()
            .map(|image| (image.path, image.origin))
            .collect();
        let mut own = Vec::new();
        for (_, mut deposit) in mounts {
            let saved = Saved::parse(&deposit.note)?;
            // What was replaced is served to its end, and is no image of a path.
            let is_image = saved.path.is_some() || saved.driver == Driver::Erofs;
            if is_image && !saved.directory && saved.is_mounted() {
                let origin = saved.origin(&mut deposit.files)?;
                own.push((saved.path.unwrap_or_else(|| "/".to_owned()), origin));
            }
        }
        all.extend(own);
        let posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        for (path, body) in posted.iter() {
            let asked = || Origin::Api(body.clone().into_bytes());
            all.entry(path.clone()).or_insert_with(asked);
        }
        Ok(all)
    }

    fn save(&self, posted: &Posted) -> anyhow::Result<()> {
        let memory = text::store(&serde_json::to_vec(posted)?)?;
        self.keeper
            .deposit(POSTED, String::new(), &[memory.as_fd()])
    }
}

/// The mounts that were asked for before the start.
///
/// # Errors
/// When they cannot be read.
pub(crate) fn posted(keeper: &Keeper) -> anyhow::Result<Posted> {
    let Some(deposit) = keeper.copy(POSTED)? else {
        return Ok(Posted::new());
    };
    let memory = deposit.files.first().context("a descriptor is missing")?;
    serde_json::from_slice(&text::load(memory)?).context("mounts for the start cannot be read")
}

/// A mount point as the mount table names it. Does not look at the directory itself: it
/// may belong to a daemon that died, and a question to that waits.
///
/// # Errors
/// When it is not below a directory that exists.
pub(crate) fn full(mountpoint: &Path) -> anyhow::Result<PathBuf> {
    let context = || format!("mount point {}", mountpoint.display());
    let Some(name) = mountpoint.file_name() else {
        return mountpoint.canonicalize().with_context(context);
    };
    let parent = mountpoint
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new(".")).canonicalize();
    Ok(parent.with_context(context)?.join(name))
}

/// Whether a daemon with this control socket has died and left its mount: then a
/// supervisor has its state. One that is just dying is waited for.
pub(crate) fn has_crashed(mountpoint: &Path, apisock: &Path) -> bool {
    let is_socket = |meta: fs::Metadata| meta.file_type().is_socket();
    let residual = || fs::symlink_metadata(apisock).is_ok_and(is_socket);
    let is_ours = |entry: &mountinfo::Entry| {
        matches!(&*entry.kind, "fuse" | "erofs") && entry.mountpoint.starts_with(mountpoint)
    };
    let mounted = || mountinfo::of("self").is_ok_and(|table| table.iter().any(is_ours));
    let refused = || {
        let refusal = UnixStream::connect(apisock).err();
        refusal.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    };
    let began = Instant::now();
    while residual() && mounted() {
        if refused() {
            return true;
        }
        if began.elapsed() > LAST_BREATH {
            break;
        }
        std::thread::sleep(LOOK);
    }
    false
}

/// Takes down what was taken over and is served by nobody; whether the daemon can end.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn take_down(keeper: &Keeper) -> anyhow::Result<bool> {
    if super::has_predecessor(keeper)? {
        tracing::info!("what is mounted is left to the old daemon");
        return Ok(true);
    }
    for deposit in keeper.copies(|name| name.starts_with(MOUNT))?.values() {
        let saved = Saved::parse(&deposit.note)?;
        // One that was replaced is not there any more.
        if saved.directory || !saved.is_mounted() {
            continue;
        }
        let place = saved.mountpoint.display();
        if let TakenDown::InUse(holders) = take_down_at(&saved.mountpoint, saved.device)? {
            tracing::warn!(
                "{place} is in use and waits to be served; used by {}",
                busy::list(&holders)
            );
            return Ok(false);
        }
        tracing::info!("{place} was unmounted");
    }
    Ok(true)
}

/// What has to be there to wait at all.
///
/// # Errors
/// Something is missing.
pub(crate) fn check(apisock: Option<&Path>, supervisor: Option<&Path>) -> anyhow::Result<()> {
    ensure!(
        supervisor.is_some(),
        "--upgrade takes over from a supervisor: name it with --supervisor and --id"
    );
    ensure!(
        apisock.is_some(),
        "--upgrade waits for a call to take over: give a control socket with --apisock"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_named_without_being_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        assert_eq!(
            full(&dir.path().join("absent")).unwrap(),
            real.join("absent")
        );
        assert!(full(&dir.path().join("a/..")).is_err());
        assert!(full(Path::new("/absent-directory/x")).is_err());
        assert!(full(Path::new("x")).unwrap().is_absolute());
    }
}
