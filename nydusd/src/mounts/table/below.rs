//! Images of the control API that the kernel serves: each on a directory below the
//! daemon's own.
//!
//! The daemon's directory is in the list of mounts, too, although nothing is mounted on
//! it: the daemon lives as long as that entry does, with and without images. An image is
//! a mount of its own, which is left with the keeper and ends like any other.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::ensure;

use super::*;
use crate::keeper::text;
use crate::manager::{ManageError, normal};

/// How an image came to be below the daemon's directory.
pub(super) struct Posted<'a> {
    /// Its path, as clients name it.
    pub path: &'a str,
    /// The body of the request.
    pub body: OwnedFd,
}

impl Mounts {
    /// Makes a directory the place for images that come later.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn open_directory(&self, directory: &Path) -> anyhow::Result<Arc<Mount>> {
        let plan = Plan {
            id: self.next(),
            source: None,
            mountpoint: &check_mountpoint(directory)?,
            threads: 0,
        };
        let mut saved = Saved::new(plan.id, Driver::Erofs, None, plan.mountpoint);
        saved.phase = Phase::Served;
        saved.directory = true;
        self.keeper
            .deposit(&saved::name(plan.id), saved.note()?, &[])?;
        Ok(self.enter(&plan, Driver::Erofs, 0, Serving::Directory, None))
    }

    /// The directory below which images are mounted, if there is one.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        let mounts = lock(&self.mounts);
        let found = mounts.iter().find(|mount| mount.is_directory());
        found.map(|mount| mount.mountpoint.clone())
    }

    /// Mounts an image on a path below the daemon's directory.
    ///
    /// * `body`: of the request.
    ///
    /// # Errors
    /// The path is taken or hidden, or the image cannot be opened or mounted.
    pub(crate) fn mount_below(
        &self,
        path: &str,
        source: &Source,
        body: &[u8],
    ) -> Result<(), ManageError> {
        let _one = lock(&self.changing);
        let path = self.manager.free_path(path)?;
        self.try_mount_below(&path, source, body)
            .map_err(ManageError::Other)?;
        tracing::info!("{path}: mounted {}", source.name);
        Ok(())
    }

    fn try_mount_below(&self, path: &str, source: &Source, body: &[u8]) -> anyhow::Result<()> {
        let directory = self.directory().context("there is no directory")?;
        let wanted = place_of(&directory, path);
        fs::create_dir_all(&wanted).with_context(|| wanted.display().to_string())?;
        let mountpoint = check_mountpoint(&wanted)?;
        ensure!(
            mountpoint == wanted,
            "{} is a way out of the daemon's directory",
            wanted.display()
        );
        let opened = open(source, self.manager.shared())?;
        // Nothing must be built on a mount that reads zeros.
        place::sweep(opened.cache.path())?;
        let plan = Plan {
            id: self.next(),
            source: Some(source),
            mountpoint: &mountpoint,
            threads: 0,
        };
        let posted = Posted {
            path,
            body: text::store(body)?,
        };
        let served = self.erofs(&plan, source, &opened, Some(&posted));
        let (device, serving) =
            served.inspect_err(|_| self.keeper.withdraw(&saved::name(plan.id)))?;
        let noted = self.manager.note(path, source, opened);
        let generation = noted.as_ref().ok().copied();
        self.enter(&plan, Driver::Erofs, device, serving, generation);
        // Its end releases what it needed.
        noted.inspect_err(|_| detach(&mountpoint))?;
        Ok(())
    }

    /// Takes an image away that was mounted below the daemon's directory.
    ///
    /// # Errors
    /// Nothing is mounted there, or somebody uses it.
    pub(crate) fn unmount_below(&self, path: &str) -> Result<(), ManageError> {
        let _one = lock(&self.changing);
        let path = normal(path)?;
        let generation = self.manager.generation_at(&path);
        let generation = generation.ok_or(ManageError::Absent)?;
        let mut mounts = self.list().into_iter();
        let mount = mounts.find(|mount| mount.generation == Some(generation));
        let mount = mount.ok_or(ManageError::Absent)?;
        match mount.take_down().map_err(ManageError::Other)? {
            TakenDown::InUse(holders) => Err(ManageError::Other(anyhow!(
                "{path} is in use by {}",
                busy::list(&holders)
            ))),
            TakenDown::Unmounted => {
                self.manager.drop_note(generation);
                tracing::info!("{path}: unmounted {}", mount.image);
                Ok(())
            }
        }
    }

    /// Goes on with the daemon's directory.
    pub(super) fn recover_directory(&self, saved: &Saved) {
        let mount = Mount {
            id: saved.id,
            driver: saved.driver,
            image: saved.image.clone(),
            mountpoint: saved.mountpoint.clone(),
            device: 0,
            generation: None,
            serving: Serving::Directory,
        };
        lock(&self.mounts).push(Arc::new(mount));
    }

    /// Gives up an image that cannot be served any more. Whoever still uses it gets
    /// errors, because nobody answers for its blobs.
    pub(super) fn give_up(&self, saved: &Saved, error: &anyhow::Error) {
        let point = saved.mountpoint.display();
        tracing::error!("{point} cannot be served any more: {error:#}");
        detach_if(saved);
        self.keeper.withdraw(&saved::name(saved.id));
    }
}

/// Where the image on a path is mounted.
pub(crate) fn place_of(directory: &Path, path: &str) -> PathBuf {
    match path.trim_start_matches('/') {
        "" => directory.to_owned(),
        below => directory.join(below),
    }
}

impl Posted<'_> {
    pub(super) fn body(&self) -> BorrowedFd<'_> {
        self.body.as_fd()
    }
}
