//! What happens to snapshots: records, directories and lazily mounted images
//! change together here.
//!
//! The order makes crashes harmless. A directory is made before its record is
//! durable and removed after the record is gone, so what a crash can leave is a
//! directory that nobody knows; [`Snapshots::cleanup`] and the next start remove
//! those. An image is mounted after the record of its user, and unmounted after
//! that record is gone; the next start compares ([`reconcile`](crate::reconcile)).
//!
//! Everything here blocks.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::api::types::Mount;
use crate::config::Config;
use crate::daemons::Daemons;
use crate::error::Error;
use crate::filter::Filters;
use crate::images::{self, Account, Image};
use crate::labels::{self, Labels};
use crate::mounts::{Layout, Stack};
use crate::store::{Kind, New, Record, Store, Usage};
use crate::usage;

/// Beginning of the names of directories that are not complete yet.
const NEW: &str = "new-";
/// Beginning of the names of directories that are being removed.
const OLD: &str = "old-";

/// All snapshots of this node.
#[derive(Debug)]
pub struct Snapshots {
    pub(crate) store: Store,
    pub(crate) layout: Layout,
    pub(crate) daemons: Arc<Daemons>,
    /// Held while a directory exists whose record is not durable yet.
    placing: Mutex<()>,
    pub(crate) cache: PathBuf,
    collect_cache: bool,
    sync_remove: bool,
    volatile: bool,
    /// The program that the configuration names for daemons.
    pub(crate) configured: PathBuf,
}

impl Snapshots {
    /// Opens the records below the configured root; nothing is repaired yet.
    ///
    /// # Errors
    /// The root cannot be used, or another process uses it.
    pub fn open(config: &Config, daemons: Arc<Daemons>) -> Result<Self, Error> {
        let layout = Layout::new(&config.root);
        for directory in [config.root.clone(), layout.snapshots()] {
            make_directory(&directory, 0o700)?;
        }
        Ok(Self {
            store: Store::open(&config.root.join("snapshots.redb"))?,
            layout,
            daemons,
            placing: Mutex::new(()),
            cache: config.cache_dir(),
            collect_cache: !config.cache_manager.disable,
            sync_remove: config.snapshot.sync_remove,
            volatile: config.snapshot.enable_overlayfs_volatile,
            configured: config.daemon.nydusd_path.clone(),
        })
    }

    /// Makes a snapshot that can be written to, and says how to mount it.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] also says that a layer needs no unpacking.
    pub fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        if let Some(target) = labels.get(labels::TARGET)
            && labels.contains_key(labels::NYDUS_BLOB)
            && !labels.contains_key(labels::NYDUS_BOOTSTRAP)
        {
            let target = target.clone();
            self.skip(key, &target, parent, labels)?;
            return Err(Error::AlreadyExists(target));
        }
        self.make(Kind::Active, key, parent, labels)
    }

    /// Makes a read-only snapshot, and says how to mount it.
    ///
    /// # Errors
    /// As [`Snapshots::prepare`]; and data layers of Nydus images have nothing to view.
    pub fn view(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        if let Some(parent) = parent
            && self
                .store
                .stat(parent)?
                .labels
                .contains_key(labels::NYDUS_BLOB)
        {
            return Err(Error::precondition(
                parent,
                "is a data layer of a Nydus image: only the topmost layer can be viewed",
            ));
        }
        self.make(Kind::View, key, parent, labels)
    }

    /// How to mount an existing snapshot; mounts its image if necessary.
    ///
    /// # Errors
    /// It does not exist, is committed, or its image cannot be mounted.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let chain = self.store.chain(key)?;
        match chain.first() {
            Some(record) if record.kind != Kind::Committed => self.lead(&chain, None),
            _ => Err(Error::precondition(
                key,
                "is committed and cannot be mounted",
            )),
        }
    }

    /// Makes an active snapshot an unchanging one.
    ///
    /// # Errors
    /// The name is taken; or `key` does not exist or is not active.
    pub fn commit(&self, name: &str, key: &str, labels: Labels) -> Result<(), Error> {
        let chain = self.store.chain(key)?;
        let usage = match chain.first() {
            Some(record) if record.kind == Kind::Active => {
                usage::of_tree(&self.layout.fs(record.id))?
            }
            // The store has the right words for it.
            _ => Usage::default(),
        };
        self.store.commit(name, key, labels::kept(labels), usage)?;
        self.release_below(&chain);
        Ok(())
    }

    /// Removes a snapshot; its directory stays until [`Snapshots::cleanup`] unless
    /// the configuration says otherwise.
    ///
    /// # Errors
    /// It does not exist, or others stand on top of it.
    pub fn remove(&self, key: &str) -> Result<(), Error> {
        let chain = self.store.chain(key)?;
        let record = self.store.remove(key)?;
        if images::is_image(&record) {
            self.daemons.release(record.id, || false);
        } else if record.kind != Kind::Committed {
            self.release_below(&chain);
        }
        if self.sync_remove {
            let directory = self.layout.snapshot(record.id);
            remove_tree(&directory).map_err(Error::io(&directory, "cannot remove"))?;
        }
        Ok(())
    }

    /// The snapshot `key`.
    ///
    /// # Errors
    /// It does not exist.
    pub fn stat(&self, key: &str) -> Result<Record, Error> {
        self.store.stat(key)
    }

    /// Changes labels: all of them, or those that `paths` names (`labels` for all,
    /// `labels.KEY` for one). Returns the outcome.
    ///
    /// # Errors
    /// It does not exist, or a path names something that cannot change.
    pub fn update(&self, key: &str, new: Labels, paths: &[String]) -> Result<Record, Error> {
        self.store.update(key, |labels| {
            if paths.is_empty() {
                labels.clone_from(&new);
            }
            for path in paths {
                if let Some(key) = path.strip_prefix("labels.") {
                    let value = new.get(key).cloned().unwrap_or_default();
                    labels.insert(key.to_owned(), value);
                } else if path == "labels" {
                    labels.clone_from(&new);
                } else {
                    return Err(Error::Invalid(format!(
                        "{path:?} of a snapshot cannot change"
                    )));
                }
            }
            *labels = labels::kept(std::mem::take(labels));
            Ok(())
        })
    }

    /// All snapshots that match one of `filters`.
    ///
    /// # Errors
    /// A filter is not understood.
    pub fn list(&self, filters: &[String]) -> Result<Vec<Record>, Error> {
        let filters = Filters::parse(filters)?;
        let mut records = self.store.all()?;
        records.retain(|record| filters.matches(record));
        Ok(records)
    }

    /// The disk space that a snapshot takes by itself; for data layers of Nydus
    /// images, what the cache holds of them.
    ///
    /// # Errors
    /// It does not exist, or its directory cannot be read.
    pub fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.store.stat(key)?;
        if record.kind != Kind::Committed {
            return usage::of_tree(&self.layout.fs(record.id));
        }
        let mut usage = record.usage;
        if record.labels.contains_key(labels::NYDUS_BLOB)
            && let Some(digest) = record.labels.get(labels::LAYER_DIGEST)
        {
            let cached = usage::of_cached_blob(&self.cache, digest);
            usage.bytes = usage.bytes.saturating_add(cached.bytes);
            usage.inodes = usage.inodes.saturating_add(cached.inodes);
        }
        Ok(usage)
    }

    /// Removes directories that belong to no snapshot, and cached blobs that belong
    /// to no image.
    ///
    /// # Errors
    /// A directory cannot be listed; what cannot be removed is logged.
    pub fn cleanup(&self) -> Result<(), Error> {
        for directory in self.set_aside()? {
            if let Err(error) = remove_tree(&directory) {
                tracing::warn!("cannot remove {}: {error}", directory.display());
            }
        }
        if self.collect_cache {
            crate::gc::collect(&self.cache, &self.store.all()?, &self.layout)?;
        }
        Ok(())
    }

    /// What the cache of fetched data takes.
    pub(crate) fn cache_usage(&self) -> Usage {
        usage::of_tree(&self.cache).unwrap_or_default()
    }

    /// Directories that belong to no snapshot.
    ///
    /// # Errors
    /// The directory of snapshots cannot be listed.
    pub(crate) fn directories_without_record(&self) -> Result<Vec<PathBuf>, Error> {
        let snapshots = self.layout.snapshots();
        let known: HashSet<String> = self
            .store
            .all()?
            .iter()
            .map(|record| record.id.to_string())
            .collect();
        let mut unknown = Vec::new();
        for entry in fs::read_dir(&snapshots).map_err(Error::io(&snapshots, "cannot list"))? {
            let entry = entry.map_err(Error::io(&snapshots, "cannot list"))?;
            if !entry
                .file_name()
                .to_str()
                .is_some_and(|name| known.contains(name))
            {
                unknown.push(entry.path());
            }
        }
        Ok(unknown)
    }

    /// Unmounts an image unless it has users.
    pub(crate) fn release(&self, id: u64) {
        self.daemons.release(id, || self.is_used(id));
    }

    /// Renames every directory without a record, so that it is never mistaken for
    /// one again; returns them.
    fn set_aside(&self) -> Result<Vec<PathBuf>, Error> {
        // Not under the lock: a daemon may take its time to end.
        for path in self.directories_without_record()? {
            if let Some(id) = name_of(&path)
                .parse()
                .ok()
                .filter(|_| path.join("mnt").exists())
            {
                self.daemons.release(id, || false);
            }
        }
        let _placing = self.placing();
        let mut aside = Vec::new();
        for path in self.directories_without_record()? {
            let name = name_of(&path);
            if name.starts_with(OLD) {
                aside.push(path);
                continue;
            }
            let renamed = path.with_file_name(format!("{OLD}{name}"));
            fs::rename(&path, &renamed).map_err(Error::io(&path, "cannot rename"))?;
            aside.push(renamed);
        }
        Ok(aside)
    }

    /// Records a data layer as if it had been unpacked, under the name that
    /// containerd will look for.
    fn skip(
        &self,
        key: &str,
        target: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<(), Error> {
        let new = |name| New {
            kind: Kind::Committed,
            name,
            parent,
            labels: labels::kept(labels.clone()),
        };
        match self.create(new(target)) {
            Err(Error::AlreadyExists(_)) => {}
            other => return other.map(drop),
        }
        if self.store.stat(target)?.parent.as_deref() == parent {
            return Ok(());
        }
        // Namespaces of containerd share chain ids, but not the names of parents.
        // It looks for label and parent, so any other name does.
        self.create(new(key)).map(drop)
    }

    fn make(
        &self,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let account = Account::of(&labels);
        let labels = labels::kept(labels);
        let chain = self.create(New {
            kind,
            name: key,
            parent,
            labels,
        })?;
        self.lead(&chain, account).inspect_err(|_| {
            if let Err(error) = self.remove(key) {
                tracing::warn!("cannot take back snapshot {key:?}: {error}");
            }
        })
    }

    /// Creates records and directory of one snapshot.
    fn create(&self, new: New<'_>) -> Result<Vec<Record>, Error> {
        let _placing = self.placing();
        self.store
            .create(new, |record, below| self.place(record, below.first()))
    }

    fn placing(&self) -> MutexGuard<'_, ()> {
        // It guards no data that could be left half changed.
        self.placing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the directory of one snapshot, complete from the moment it has its name.
    fn place(&self, record: &Record, parent: Option<&Record>) -> Result<(), Error> {
        let snapshots = self.layout.snapshots();
        let directory = tempfile::Builder::new()
            .prefix(NEW)
            .tempdir_in(&snapshots)
            .map_err(Error::io(&snapshots, "cannot make a directory"))?;
        let fs = directory.path().join("fs");
        make_directory(&fs, 0o755)?;
        if record.kind == Kind::Active {
            make_directory(&directory.path().join("work"), 0o711)?;
        }
        if let Some(parent) = parent {
            let below = self.layout.fs(parent.id);
            let owner = fs::metadata(&below).map_err(Error::io(&below, "cannot look at"))?;
            chown(&fs, Some(owner.uid()), Some(owner.gid()))
                .map_err(Error::io(&fs, "cannot give away"))?;
        }
        let place = self.layout.snapshot(record.id);
        // A crash before the record was durable leaves the directory, and the id free.
        remove_tree(&place).map_err(Error::io(&place, "cannot remove"))?;
        fs::rename(directory.path(), &place).map_err(Error::io(&place, "cannot rename to"))?;
        // Under its final name it is not temporary any more.
        let _ = directory.keep();
        Ok(())
    }

    /// The mounts of the first of `chain`, whose image is mounted when this returns.
    fn lead(&self, chain: &[Record], account: Option<Account>) -> Result<Vec<Mount>, Error> {
        let Some(record) = chain.first() else {
            return Err(Error::Records("an empty chain of snapshots".to_owned()));
        };
        let mounted = self.mount_below(chain, account)?;
        let lower: Vec<PathBuf> = match &mounted {
            None => chain
                .iter()
                .skip(1)
                .map(|below| self.layout.fs(below.id))
                .collect(),
            Some((at, mountpoint)) => {
                let above = chain
                    .iter()
                    .take(*at)
                    .skip(1)
                    .map(|below| self.layout.fs(below.id));
                above.chain([mountpoint.clone()]).collect()
            }
        };
        if let (Some((1, mountpoint)), Kind::Active) = (&mounted, record.kind) {
            self.resemble(record.id, mountpoint)?;
        }
        let stack = Stack {
            kind: record.kind,
            id: record.id,
            lower: &lower,
            lazy: mounted.is_some(),
            volatile: self.volatile || record.labels.contains_key(labels::VOLATILE),
        };
        Ok(stack.mounts(&self.layout))
    }

    /// Mounts the image that the first of `chain` stands on; returns its position
    /// and mount point.
    fn mount_below(
        &self,
        chain: &[Record],
        account: Option<Account>,
    ) -> Result<Option<(usize, PathBuf)>, Error> {
        let Some((at, record)) = images::position(chain).and_then(|at| Some((at, chain.get(at)?)))
        else {
            return Ok(None);
        };
        let is_view = at == 1 && chain.first().is_some_and(|first| first.kind == Kind::View);
        if is_view && labels::image_ref(&record.labels).is_none() {
            // Builders look at the metadata layer itself.
            return Ok(None);
        }
        let mut image = Image::new(record, &self.layout)?;
        image.account = account;
        let mountpoint = self.daemons.attach(&image)?;
        Ok(Some((at, mountpoint)))
    }

    /// The root directory of a container looks like that of its image.
    fn resemble(&self, id: u64, image: &Path) -> Result<(), Error> {
        let fs = self.layout.fs(id);
        let root = fs::metadata(image).map_err(Error::io(image, "cannot look at"))?;
        chown(&fs, Some(root.uid()), Some(root.gid()))
            .map_err(Error::io(&fs, "cannot give away"))?;
        let permissions = fs::Permissions::from_mode(root.mode() & 0o7777);
        fs::set_permissions(&fs, permissions).map_err(Error::io(&fs, "cannot change the mode of"))
    }

    /// Unmounts the image below a snapshot that is gone, if it was the last user.
    fn release_below(&self, chain: &[Record]) {
        if let Some(image) = images::position(chain).and_then(|at| chain.get(at)) {
            self.release(image.id);
        }
    }

    /// Whether an image has users; in doubt, yes.
    fn is_used(&self, id: u64) -> bool {
        self.store
            .all()
            .map_or(true, |records| images::in_use(&records).contains_key(&id))
    }
}

/// Makes a directory, unless it is there, with exactly this mode.
pub(crate) fn make_directory(path: &Path, mode: u32) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(Error::io(path, "cannot make the directory"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(Error::io(path, "cannot change the mode of"))
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Removes a tree, if it is there.
pub(crate) fn remove_tree(path: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
