//! Images of the control API that have a mount each, on a directory below the daemon's
//! own: made by the kernel's EROFS or by a FUSE session for that image alone, whichever
//! the ladder chooses.
//!
//! The daemon's directory is in the list of mounts, too, although nothing is mounted on
//! it: the daemon lives as long as that entry does, with and without images. An image is
//! a mount of its own, which is left with the keeper and ends like any other.
//!
//! An image that is replaced stays in its place until the new one is below it and left
//! with the keeper; then it is taken off the top, and served for as long as anybody has
//! it open. Whoever finds a change half made can tell from the mount table how far it
//! got ([`Mounts::finish_replacing`]).

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::ensure;

use super::*;
use crate::erofs::sys::{Detached, device_of};
use crate::fuse::session::set_read_ahead;
use crate::fuse::teach::teach;
use crate::keeper::text;
use crate::manager::{ManageError, normal};

/// How an image came to be below the daemon's directory.
pub(super) struct Posted<'a> {
    /// Its path, as clients name it.
    pub path: &'a str,
    /// The body of the request.
    pub body: OwnedFd,
    /// What it replaces.
    pub old: Option<Old>,
}

/// The visible mount at a place.
#[derive(Debug)]
pub(super) struct Old {
    /// Its root: of this very mount, whatever comes above or below it.
    root: OwnedFd,
    device: u64,
}

impl Mounts {
    /// Makes a directory the place for images that come later.
    ///
    /// * `wish`: how they are mounted.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn open_directory(
        &self,
        directory: &Path,
        wish: Wish,
    ) -> anyhow::Result<Arc<Mount>> {
        let plan = Plan {
            id: self.next(),
            source: None,
            mountpoint: &check_mountpoint(directory)?,
            threads: wish.threads,
        };
        let mut saved = Saved::new(plan.id, Driver::Erofs, None, plan.mountpoint);
        saved.phase = Phase::Served;
        saved.directory = true;
        saved.choice = Some(wish.driver);
        saved.threads = wish.threads;
        self.keeper
            .deposit(&saved::name(plan.id), saved.note()?, &[])?;
        Ok(self.enter(&plan, Driver::Erofs, 0, Serving::Directory(wish), None))
    }

    /// The directory below which images are mounted, if there is one, and how.
    pub(crate) fn directory(&self) -> Option<(PathBuf, Wish)> {
        let mounts = lock(&self.mounts);
        mounts.iter().find_map(|mount| match &mount.serving {
            Serving::Directory(wish) => Some((mount.mountpoint.clone(), *wish)),
            _ => None,
        })
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
        let posted = Posted {
            path: &path,
            body: text::store(body)?,
            old: None,
        };
        let mountpoint = self.place_for(&path)?;
        self.put_below(&mountpoint, source, &posted)?;
        tracing::info!("{path}: mounted {}", source.name);
        Ok(())
    }

    /// Mounts an image in the place of the one on a path, without a moment in which
    /// there is none. Who has files of the old one open keeps them.
    ///
    /// * `body`: of the request.
    ///
    /// # Errors
    /// Nothing is mounted there, or the new image cannot be opened or mounted; the old
    /// one stays then.
    pub(crate) fn replace_below(
        &self,
        path: &str,
        source: &Source,
        body: &[u8],
    ) -> Result<(), ManageError> {
        let _one = lock(&self.changing);
        let path = normal(path)?;
        let old = self.mount_on(&path)?;
        let posted = Posted {
            path: &path,
            body: text::store(body)?,
            old: Some(Old::at(&old)?),
        };
        self.put_below(&old.mountpoint, source, &posted)?;
        old.replaced.store(true, Ordering::Relaxed);
        tracing::info!(
            "{path}: mounted {} in the place of {}",
            source.name,
            old.image
        );
        Ok(())
    }

    /// The directory on which the image on a path is to be mounted.
    fn place_for(&self, path: &str) -> anyhow::Result<PathBuf> {
        let (directory, _) = self.directory().context("there is no directory")?;
        let wanted = place_of(&directory, path);
        fs::create_dir_all(&wanted).with_context(|| wanted.display().to_string())?;
        let mountpoint = check_mountpoint(&wanted)?;
        ensure!(
            mountpoint == wanted,
            "{} is a way out of the daemon's directory",
            wanted.display()
        );
        Ok(mountpoint)
    }

    fn put_below(
        &self,
        mountpoint: &Path,
        source: &Source,
        posted: &Posted<'_>,
    ) -> anyhow::Result<()> {
        let (_, wish) = self.directory().context("there is no directory")?;
        let opened = open(source, self.manager.shared())?;
        // Nothing must be built on a mount that reads zeros.
        place::sweep(opened.cache.path())?;
        let plan = Plan {
            id: self.next(),
            source: Some(source),
            mountpoint,
            threads: wish.threads,
        };
        let choice = source.driver.unwrap_or(wish.driver);
        let cache = opened.cache.path().to_owned();
        let mut driver = choose(choice, &cache);
        let image = self.manager.prepare(posted.path, source, opened)?;
        let mut served = None;
        if driver == Driver::Erofs {
            let parts = (cache.as_path(), image.files.blobs());
            match self.erofs(&plan, source, parts, Some(posted)) {
                Err(error) if choice == Choice::Auto => {
                    self.keeper.withdraw(&saved::name(plan.id));
                    tracing::warn!("driver fuse after all: {error:#}");
                    driver = Driver::Fuse;
                }
                done => served = Some(done),
            }
        }
        let served = served.unwrap_or_else(|| self.fuse_below(&plan, source, &image, posted));
        let (device, serving) =
            served.inspect_err(|_| self.keeper.withdraw(&saved::name(plan.id)))?;
        let generation = Some(image.generation);
        self.enter(&plan, driver, device, serving, generation);
        // Its end releases what it needed.
        self.manager
            .note(&image)
            .inspect_err(|_| detach(mountpoint))?;
        Ok(())
    }

    /// Mounts an image by a FUSE session of its own.
    fn fuse_below(
        &self,
        plan: &Plan<'_>,
        source: &Source,
        image: &Arc<Mounted>,
        posted: &Posted<'_>,
    ) -> anyhow::Result<(u64, Serving)> {
        let device = Session::open_device()?;
        let bootstrap = &source.bootstrap;
        let bootstrap =
            File::open(bootstrap).with_context(|| format!("bootstrap {}", bootstrap.display()))?;
        let (session, detached) = Session::prepare(plan.mountpoint, device.try_clone()?)?;
        let session = Arc::new(session);
        let files = Arc::new(self.manager.vfs().of_one(image));
        self.serve_fuse(plan.id, &session, plan.threads, &files)?;
        session.wait_until_begun();
        set_read_ahead(detached.device());
        let mut saved = Saved::new(plan.id, Driver::Fuse, plan.source, plan.mountpoint);
        saved.threads = plan.threads;
        saved.device = detached.device();
        saved.path = Some(posted.path.to_owned());
        let files = [device.as_fd(), bootstrap.as_fd(), posted.body()];
        let save = |saved: &Saved| {
            let name = saved::name(plan.id);
            self.keeper.deposit(&name, saved.note()?, &files)
        };
        attach(&detached, &mut saved, posted.old.as_ref(), &save)?;
        teach(plan.mountpoint, image.files.image());
        Ok((saved.device, Serving::Fuse))
    }

    /// Takes an image away that was mounted below the daemon's directory.
    ///
    /// # Errors
    /// Nothing is mounted there, or somebody uses it.
    pub(crate) fn unmount_below(&self, path: &str) -> Result<(), ManageError> {
        let _one = lock(&self.changing);
        let path = normal(path)?;
        let mount = self.mount_on(&path)?;
        match mount.take_down()? {
            TakenDown::InUse(holders) => Err(ManageError::Other(anyhow!(
                "{path} is in use by {}",
                busy::list(&holders)
            ))),
            TakenDown::Unmounted => {
                if let Some(generation) = mount.generation {
                    self.manager.drop_note(generation);
                }
                tracing::info!("{path}: unmounted {}", mount.image);
                Ok(())
            }
        }
    }

    /// The mount of the image on a path.
    fn mount_on(&self, path: &str) -> Result<Arc<Mount>, ManageError> {
        let generation = self.manager.generation_at(path);
        let generation = generation.ok_or(ManageError::Absent)?;
        let mut mounts = self.list().into_iter();
        let mount = mounts.find(|mount| mount.generation == Some(generation));
        mount.ok_or(ManageError::Absent)
    }

    /// Ends a change that a predecessor has begun: if its new mount is in place, the old
    /// one goes. Returns whether it is.
    ///
    /// * `new`: what it has left about the new one.
    ///
    /// # Errors
    /// When that cannot be left with the keeper again.
    pub(super) fn finish_replacing(&self, new: &Saved, deposit: &Deposit) -> anyhow::Result<bool> {
        if !new.is_mounted() {
            return Ok(false);
        }
        let point = new.mountpoint.display();
        tracing::info!("{point}: finishing what the last worker had begun");
        while let Some(top) = mountinfo::at(&new.mountpoint)
            && top.device_number() != new.device
        {
            let done = umount2(&new.mountpoint, DETACH);
            done.with_context(|| format!("cannot unmount {}", new.mountpoint.display()))?;
        }
        let mut served = new.clone();
        served.phase = Phase::Served;
        let files: Vec<_> = deposit.files.iter().map(AsFd::as_fd).collect();
        self.keeper
            .deposit(&saved::name(new.id), served.note()?, &files)?;
        Ok(true)
    }

    /// Goes on with the daemon's directory.
    pub(super) fn recover_directory(&self, saved: &Saved) {
        let wish = Wish {
            // What older notes leave out.
            driver: saved.choice.unwrap_or(Choice::Erofs),
            threads: saved.threads,
        };
        let plan = Plan {
            id: saved.id,
            source: None,
            mountpoint: &saved.mountpoint,
            threads: saved.threads,
        };
        self.enter(&plan, saved.driver, 0, Serving::Directory(wish), None);
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

/// Makes a mount visible, in the place of an older one if there is one.
///
/// * `saved`: what a successor has to know; is brought up to date;
/// * `save`: leaves that with the keeper.
///
/// # Errors
/// When the kernel refuses, or nothing can be left with the keeper: an old mount stays.
pub(super) fn attach(
    detached: &Detached,
    saved: &mut Saved,
    old: Option<&Old>,
    save: &dyn Fn(&Saved) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    saved.device = detached.device();
    let (phase, layer) = match old {
        None => (Phase::Mounting, Layer::Top),
        Some(_) => (Phase::Replacing, Layer::Beneath),
    };
    saved.phase = phase;
    save(saved)?;
    let point = saved.mountpoint.clone();
    detached.attach(&point, layer).with_context(|| match old {
        None => format!("cannot mount on {}", point.display()),
        Some(_) => format!(
            "cannot mount below what is on {} (Linux 6.5 can); unmount that first",
            point.display()
        ),
    })?;
    saved.phase = Phase::Served;
    if let Some(old) = old {
        old.take_off();
        // A successor would find out by itself.
        if let Err(error) = save(saved) {
            tracing::warn!("{}: {error:#}", point.display());
        }
        return Ok(());
    }
    save(saved).inspect_err(|_| detach(&point))
}

/// Where the image on a path is mounted.
pub(crate) fn place_of(directory: &Path, path: &str) -> PathBuf {
    match path.trim_start_matches('/') {
        "" => directory.to_owned(),
        below => directory.join(below),
    }
}

impl Old {
    /// The mount of an image.
    ///
    /// # Errors
    /// It is gone, or hidden by something else.
    fn at(mount: &Mount) -> anyhow::Result<Self> {
        let point = mount.mountpoint.display();
        // Asks nobody: the file system may be served by this very process.
        let root = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(&mount.mountpoint)
            .with_context(|| format!("{point} cannot be reached"))?;
        let root = OwnedFd::from(root);
        let device = device_of(&root).with_context(|| format!("{point} cannot be inspected"))?;
        ensure!(
            device == mount.device,
            "what is mounted on {point} is not this daemon's"
        );
        Ok(Self { root, device })
    }

    /// Unmounts it here. It lives on for those who have it open.
    fn take_off(&self) {
        // By its root and not by its place, where another one may be visible: somebody
        // else may have unmounted it at this very moment.
        let root = format!("/proc/self/fd/{}", self.root.as_raw_fd());
        if let Err(errno) = umount2(root.as_str(), MntFlags::MNT_DETACH) {
            let device = self.device;
            tracing::warn!("the mount of device {device} that was replaced: {errno}");
        }
    }
}

impl Posted<'_> {
    pub(super) fn body(&self) -> BorrowedFd<'_> {
        self.body.as_fd()
    }
}
